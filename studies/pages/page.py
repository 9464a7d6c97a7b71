"""A study's page, Markdown and figures, from its results alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from studies.design import Study
from studies.pages import calibration, curves, decoding, depth, self_correction, transfer
from studies.pages.figures import accuracy_dots
from studies.pages.markdown import counted, difference, mean, paired, percent, points, table
from studies.pages.rankings import against, ranking_frame
from studies.results_file import Result, read_results

BASELINES = (
    "mean sample",
    "shortest",
    "majority@{n}",
    "log-prob best-of-{n}",
    "log-prob-weighted vote@{n}",
    "oracle@{n}",
)
"""Labels of selection methods without a reward."""
LEARNED = {
    "reward": ("reward best-of-{n}", "reward-weighted vote@{n}", "reward"),
    "reward + log-prob": ("reward + log-prob best-of-{n}", "vote@{n} weighted by reward + log-prob", "reward_logprob"),
}
"""Labels of best-of and weighted vote by each score, and the prefix of its AUROCs."""
FIELDS = (
    *("world", "seed", "arm", "kind", "samples", "questions", "accuracy", "accuracy_unseen", "distinct"),
    *("collapsed", "chosen", "stopped", "train_seconds", "ranking"),
)
"""Fields of a cell that the tables of policies and rankings read; not every kind has all."""
SECTIONS: dict[str, Callable[[Path, Sequence[Result]], list[str]]] = {
    "calibration": calibration.sections,
    "decoding": decoding.sections,
    "depth": depth.sections,
    "self_correction": self_correction.sections,
    "transfer": transfer.sections,
}
"""Further measurements of a cell, and their page sections."""


def write_page(path: Path, study: Study, command: str, results: Sequence[Result], *, tried: int) -> None:
    """Write `path` and its figures.

    Args:
        path: ``NAME.md``; figures are ``NAME.png`` and, for some sections, ``NAME-SECTION.png``.
        study: gives title and question.
        command: the command that made the page.
        results: results of all cells.
        tried: see `configurations_tried`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [f"# {study.title}", study.question, _provenance(results, command, tried)]
    lines = [result for result in results if curves.is_point(result)]
    arms = pd.DataFrame([result for result in results if not curves.is_point(result)], columns=FIELDS)
    judged, ranked = (arms[arms[name].notna()] for name in ("accuracy", "ranking"))
    if len(judged):
        figure = path.with_suffix(".png")
        accuracy_dots(figure, judged)
        parts.append(f"![Greedy accuracy of each arm]({figure.name})")
    for world in dict.fromkeys(result["world"] for result in results):
        of_world = [result for result in results if result["world"] == world]
        seeds = len({result["seed"] for result in of_world})
        parts.append(f"## World `{world}`, {seeds} seed{'s' * (seeds > 1)}")
        if own := [result for result in lines if result["world"] == world]:
            parts += curves.sections(path, own)
        parts += [
            tabulate(cells[cells["world"] == world])
            for tabulate, cells in ((_policies, judged), (_ranking, ranked))
            if (cells["world"] == world).any()
        ]
        for key, sections in SECTIONS.items():
            if own := [result for result in of_world if key in result]:
                parts += sections(path, own)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def configurations_tried(folder: Path) -> int:
    """Number of (world, arm) pairs with a learned reward that were evaluated on validation questions.

    Args:
        folder: results of all studies.
    """
    results = [result for path in folder.glob("*.jsonl") for result in read_results(path)]
    return len({(r["world"], r["arm"]) for r in results if r.get("kind") == "irl" and r["split"] == "validation"})


def _provenance(results: Sequence[Result], command: str, tried: int) -> str:
    """What was run, on which machine, for how long, and how to read the tables."""
    first = next((result for result in results if "accuracy" in result), results[0])
    seeds = sorted({result["seed"] for result in results})
    splits = sorted({result["split"] for result in results})
    failed = [result["collapsed"] for result in results if result["kind"] == "irl"]
    hours = sum(result["seconds"] for result in results) / 3600
    fast = " **A trial with a tenth of the steps (`--quick`), not a result.**" if first["fast"] else ""
    alike = "the same for all seeds" if splits == ["test"] else "different for each seed"
    made = (
        f"`{command}`: {len(results)} cells, seeds {', '.join(map(str, seeds))}, {first['questions']} "
        f"{' and '.join(splits)} questions, {alike}, {hours:.1f} core hours without pretraining and SFT "
        f"({first['machine']}; torch {first['torch']}, TRL {first['trl']}).{fast}"
    )
    if not failed:
        return f"{made} Intervals are 95 % t intervals over seeds (data, models and training), not over questions."
    return (
        f"{made} All studies together evaluated {tried} configurations of adversarial training (arm and world) on "
        f"validation questions. Of the {len(failed)} adversarial runs on this page {sum(failed)} collapsed (accuracy "
        "more than 5 points below SFT, or fewer than half of its distinct traces). Stopped: a failure rule ended the "
        "run and restored its best checkpoint, or the SFT policy if none was better. Start kept: validation questions "
        "preferred the starting policy to all checkpoints. Accuracies are in %, with 95 % t intervals over seeds "
        "(data, models and training), not over questions; differences are paired by seed."
    )


def _policies(cells: pd.DataFrame) -> str:
    """Greedy accuracy of each arm, minus SFT, and minus the log-prob control."""
    baselines = {f"minus {arm}": arm for arm in ("SFT", "GRPO on log-prob")}
    gaps = {head: against(cells, cells[cells["arm"] == arm], ["seed"]) for head, arm in baselines.items()}
    flags = {"stopped": cells["stopped"].notna(), "start kept": cells["chosen"] == "start"}
    arms = cells.assign(**gaps, **flags).groupby("arm", sort=False)
    kind, chose = arms["kind"].first(), arms["chosen"].count() > 0
    shown = pd.DataFrame(
        {
            "greedy accuracy": arms["accuracy"].agg(percent),
            "on unseen kinds": arms["accuracy_unseen"].agg(percent),
            **{head: arms[head].agg(paired).where(kind.index != arm) for head, arm in baselines.items()},
            "collapsed": arms["collapsed"].agg(counted).where(kind != "policy"),
            "stopped": arms["stopped"].agg(counted),
            "start kept": arms["start kept"].agg(counted).where(chose),
            "distinct traces": arms["distinct"].mean().map("{:.2f}".format),
            "seconds": arms["train_seconds"].mean().map("{:.0f}".format).where(kind != "policy"),
        }
    )
    of_learned = ["minus GRPO on log-prob", "stopped"]
    shown[of_learned] = shown[of_learned].where(kind == "irl")
    if cells["accuracy_unseen"].isna().any():
        shown = shown.drop(columns="on unseen kinds")
    return table("arm", shown)


def _ranking(cells: pd.DataFrame) -> str:
    """Accuracy of choosing among samples of the SFT policy by each arm's reward and by the baselines."""
    n = cells["samples"].iloc[0]
    arms = dict(iter(ranking_frame(cells).groupby("arm", sort=False)))
    first = next(iter(arms.values()))  # all arms have the same samples and so the same baselines
    rows = {"log-prob": [_within_prompt(first, "logprob").partition(" (")[0], "", "", ""]}
    for label in BASELINES:
        rows[label.format(n=n)] = ["", percent(first[label.format(n=n)]), "", ""]
    for arm, own in arms.items():
        scores = LEARNED if (own["kind"] == "irl").all() else {"": LEARNED["reward"]}
        for name, (best, vote, score) in scores.items():
            picked, voted = (own[label.format(n=n)] for label in (best, vote))
            gain = points(picked - own["plain"])
            texts = [_within_prompt(own, score), percent(picked), percent(voted), gain]
            rows[f"{arm}: {name}".removesuffix(": ")] = texts
    heads = [
        "within-prompt AUROC (minus log-prob's)",
        f"best-of-{n} or baseline",
        "weighted vote",
        "best-of minus the better of majority and log-prob",
    ]
    shown = pd.DataFrame.from_dict(rows, orient="index", columns=heads)
    return table(f"choosing one of {n} samples of the SFT policy", shown)


def _within_prompt(cells: pd.DataFrame, score: str) -> str:
    """Within-prompt AUROC of one score, and its difference to that of the log-prob on the same samples.

    Undefined if no question has both right and wrong samples.
    """
    own, logprob = (cells[f"{name}_auroc_within_prompt"].astype(float) for name in (score, "logprob"))
    return mean(own, 3) if own.isna().any() else f"{mean(own, 3)} ({difference(own - logprob, 3)})"
