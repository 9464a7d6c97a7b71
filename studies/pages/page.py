"""A study's page: Markdown and a figure, from the cells' JSON alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from studies.pages import calibration, curves, decoding, depth, transfer
from studies.pages.figures import accuracy_dots
from studies.pages.markdown import cell, signed, table
from tracereward.metrics import mean_interval

Result = dict[str, Any]
BASELINES = (
    "mean sample",
    "shortest",
    "majority@{n}",
    "log-prob best-of-{n}",
    "log-prob-weighted vote@{n}",
    "oracle@{n}",
)
"""Labels of `rerank.METHODS` that need no reward."""
LEARNED = {
    "reward": ("reward best-of-{n}", "reward-weighted vote@{n}", "reward"),
    "reward + log-prob": (
        "reward + log-prob best-of-{n}",
        "vote@{n} weighted by reward + log-prob",
        "reward_logprob",
    ),
}
SECTIONS: dict[str, Callable[[Path, Sequence[Result]], list[str]]] = {
    "calibration": calibration.sections,
    "decoding": decoding.decoding_sections,
    "depth": depth.sections,
    "self_correction": decoding.correction_sections,
    "transfer": transfer.sections,
}
"""What else a world's cells may hold, and the parts of the page that show it."""


def write_page(
    path: Path, title: str, question: str, command: str, results: Sequence[Result], studies: Path | None = None
) -> None:
    """Write `path` and the figure beside it.

    Args:
        path: ``NAME.md``; the figure is ``NAME.png``, and where cells have results by depth ``NAME-depth.png``.
        title: the page's heading.
        question: what the study asks and how to read it.
        command: what made the page.
        results: of all cells.
        studies: folder of all studies' cells, for the number of configurations tried. Default: `path`'s.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = path.with_suffix(".png")
    worlds = list(dict.fromkeys(result["world"] for result in results))
    parts = [
        f"# {title}",
        question,
        _provenance(results, command, configurations_tried(studies or path.parent)),
    ]
    judged = [result for result in results if "accuracy" in result and not curves.is_point(result)]
    if judged:
        parts.append(f"![Greedy accuracy of each arm]({figure.name})")
    for world in worlds:
        of_world = [result for result in results if result["world"] == world]
        seeds = len({result["seed"] for result in of_world})
        parts.append(f"## World `{world}`, {seeds} seed{'s' * (seeds > 1)}")
        points = [result for result in of_world if curves.is_point(result)]
        if points:
            parts += curves.sections(path, points)
        policies = [result for result in of_world if result in judged]
        if policies:
            parts.append(_policies(policies))
        ranked = [result for result in of_world if "ranking" in result and not curves.is_point(result)]
        if ranked:
            parts.append(_ranking(ranked))
        for key, sections in SECTIONS.items():
            measured = [result for result in of_world if key in result]
            if measured:
                parts += sections(path, measured)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    if not judged:
        return
    panels = {}
    for world in worlds:
        arms = _by_arm([result for result in judged if result["world"] == world])
        panels[world] = {arm: [100 * row["accuracy"] for row in rows] for arm, rows in arms.items()}
    learned = {result["arm"] for result in results if result["kind"] == "irl"}
    accuracy_dots(figure, panels, learned, "held-out greedy accuracy, %: seeds and their mean")


def configurations_tried(studies: Path) -> int:
    """How many arms with a learned reward, in how many worlds, were looked at on validation questions."""
    rows = [json.loads(cell.read_text(encoding="utf-8")) for cell in studies.glob("*/*.json")]
    return len({(r["world"], r["arm"]) for r in rows if r["kind"] == "irl" and r["split"] == "validation"})


def _provenance(results: Sequence[Result], command: str, tried: int) -> str:
    """What was run, where, and for how long."""
    first = next((result for result in results if "accuracy" in result), results[0])
    seeds = sorted({result["seed"] for result in results})
    splits = sorted({result["split"] for result in results})
    failed = sum(result["collapsed"] for result in results if result["kind"] == "irl")
    total = sum(result["kind"] == "irl" for result in results)
    hours = sum(result["seconds"] for result in results) / 3600
    fast = " **Fewer steps (`--quick`): these figures mean little.**" if first["fast"] else ""
    alike = "the same for all seeds" if splits == ["test"] else "others for each seed"
    made = (
        f"`{command}`: {len(results)} cells, seeds {', '.join(map(str, seeds))}, {first['questions']} "
        f"{' and '.join(splits)} questions, {alike}, {hours:.1f} hours of one core without pretraining and SFT "
        f"({first['machine']}; torch {first['torch']}, TRL {first['trl']}).{fast}"
    )
    if not total:
        return f"{made} Intervals are 95 % t intervals over seeds: over data, models and training, not over questions."
    return (
        f"{made} In all studies {tried} "
        "configurations of adversarial training, arms times worlds, were looked at on validation questions. Of the "
        f"{total} adversarial runs on this page {failed} collapsed (accuracy "
        "more than 5 points under SFT's, or fewer than half its distinct traces). Stopped: a failure rule ended the "
        "run and put its best checkpoint back, or, without a better one, the SFT policy itself. Start kept: validation "
        "questions, where they choose, preferred the start to all checkpoints. Accuracies are in %, "
        "with 95 % t intervals over seeds, which are of data, models and training, not of questions; differences are "
        "paired by seed."
    )


def _policies(results: Sequence[Result]) -> str:
    """Greedy accuracy of each arm, and its differences to SFT and to the log-prob control."""
    arms = _by_arm(results)
    unseen = ["of unseen kinds"] if all("accuracy_unseen" in result for result in results) else []
    rows = []
    for arm, of_arm in arms.items():
        learned, given = (of_arm[0]["kind"] == kind for kind in ("irl", "policy"))
        rows.append(
            [
                arm,
                cell(_percent(of_arm, lambda r: r["accuracy"])),
                *(cell(_percent(of_arm, lambda r: r["accuracy_unseen"])) for _ in unseen),
                _difference(of_arm, arms.get("SFT"), arm),
                _difference(of_arm, arms.get("GRPO on log-prob"), arm) if learned else "",
                "" if given else f"{sum(r['collapsed'] for r in of_arm)}/{len(of_arm)}",
                f"{sum(r['stopped'] is not None for r in of_arm)}/{len(of_arm)}" if learned else "",
                f"{sum(r['chosen'] == 'start' for r in of_arm)}/{len(of_arm)}" if "chosen" in of_arm[0] else "",
                f"{sum(r['distinct'] for r in of_arm) / len(of_arm):.2f}",
                "" if given else f"{sum(r['train_seconds'] for r in of_arm) / len(of_arm):.0f}",
            ]
        )
    heads = [
        "arm",
        "greedy accuracy",
        *unseen,
        "minus SFT",
        "minus GRPO on log-prob",
        "collapsed",
        "stopped",
        "start kept",
        "distinct traces",
        "seconds",
    ]
    return table(heads, rows)


def _ranking(results: Sequence[Result]) -> str:
    """What choosing among samples of the SFT policy reaches, by each arm's reward and by the baselines."""
    arms = _by_arm(results)
    first = next(iter(arms.values()))  # the baselines choose among the same samples in all
    n = first[0]["samples"]

    def accuracy(label: str) -> Callable[[Result], float]:
        return lambda result: result["ranking"]["accuracy"][label.format(n=n)][0]

    def baseline(result: Result) -> float:
        return max(accuracy(label)(result) for label in ("majority@{n}", "log-prob best-of-{n}"))

    rows = [["log-prob", _within_prompt(first, "logprob").partition(" (")[0], "", "", ""]]
    for label in BASELINES:
        rows.append([label.format(n=n), "", cell(_percent(first, accuracy(label))), "", ""])
    for arm, of_arm in arms.items():
        scores = LEARNED if of_arm[0]["kind"] == "irl" else {"": LEARNED["reward"]}
        for name, (best, vote, key) in scores.items():
            gain = _percent(of_arm, _minus(accuracy(best), baseline))
            picked, voted = (cell(_percent(of_arm, accuracy(label))) for label in (best, vote))
            rows.append([f"{arm}: {name}".removesuffix(": "), _within_prompt(of_arm, key), picked, voted, signed(gain)])
    heads = [
        f"choosing one of {n} samples of the SFT policy",
        "within-prompt AUROC (minus log-prob's)",
        f"best-of-{n} or baseline",
        "weighted vote",
        "best-of minus the better of majority and log-prob",
    ]
    return table(heads, rows)


def _minus(one: Callable[[Result], float], other: Callable[[Result], float]) -> Callable[[Result], float]:
    return lambda result: one(result) - other(result)


def _within_prompt(results: Sequence[Result], key: str) -> str:
    """Within-prompt AUROC of one score, and what it is above the log-prob's of the same samples.

    Undefined where no question has both right and wrong samples.
    """
    name, logprob = (f"{score}_auroc_within_prompt" for score in (key, "logprob"))
    if any(r["ranking"][name] is None for r in results):
        return "undefined"
    gain = _mean(results, lambda r: r["ranking"][name] - r["ranking"][logprob])
    return f"{cell(_mean(results, lambda r: r['ranking'][name]), 3)} ({signed(gain, 3)})"


def _by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result["arm"], []).append(result)
    return arms


def _mean(results: Sequence[Result], value: Callable[[Result], float]) -> tuple[float, float, float]:
    """Mean over seeds with its 95 % interval."""
    return mean_interval([value(result) for result in results])


def _percent(results: Sequence[Result], value: Callable[[Result], float]) -> tuple[float, float, float]:
    return _mean(results, lambda result: 100 * value(result))


def _difference(results: Sequence[Result], others: Sequence[Result] | None, arm: str) -> str:
    """Mean difference of accuracies, paired by seed; nothing without a partner."""
    if not others or arm == others[0]["arm"]:
        return ""
    of_seed = {result["seed"]: result["accuracy"] for result in others}
    pairs = [100 * (r["accuracy"] - of_seed[r["seed"]]) for r in results if r["seed"] in of_seed]
    return signed(mean_interval(pairs)) if pairs else ""
