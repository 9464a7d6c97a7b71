"""Page section and figure of arms that form curves over the demonstrations ("LINE @ X"), from results."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from studies.pages.figures import curve_lines
from studies.pages.markdown import counted, mean, paired, percent, points, table
from studies.pages.rankings import against, ranking_frame, with_control
from studies.results_file import Result

AT = " @ "
FIELDS = ("arm", "seed", "samples", "options", "accuracy", "collapsed", "chosen", "ranking")


def is_point(result: Result) -> bool:
    """Whether a cell's arm is a point of a curve."""
    return AT in result["arm"]


def sections(path: Path, results: Sequence[Result]) -> list[str]:
    """Parts of the page `path`; writes the figure ``NAME.png`` next to it."""
    cells = pd.DataFrame(results, columns=FIELDS)
    cells[["line", "x"]] = cells["arm"].str.split(AT, expand=True)
    cells = cells.assign(x=cells["x"].astype(int), point=cells["line"] + ", " + cells["x"] + " %")
    # With a frozen discriminator only the reward model is evaluated: its policy took almost no steps.
    trained = cells[[options.get("discriminator_updates") != 0 for options in cells["options"]]]
    ranked = cells[cells["ranking"].notna()]
    aurocs = pd.DataFrame(columns=["line", "x", "value"])
    if len(ranked):
        ranked = ranking_frame(ranked)
        rewards = ranked.assign(value=100 * ranked["reward_logprob_auroc_within_prompt"].astype(float))
        aurocs = with_control(rewards, _log_prob(ranked))
    label = "wrong demonstrations, %" if "corrupt" in results[0] else "demonstrations, % of the world's"
    figure = path.with_suffix(".png")
    curve_lines(figure, label, trained.assign(value=100 * trained["accuracy"]), aurocs)
    parts = [f"![Accuracy and AUROC along the lines]({figure.name})", _policies(trained)]
    return [*parts, _baselines(ranked), _rankings(ranked)] if len(ranked) else parts


def _alike(ranked: pd.DataFrame) -> pd.DataFrame:
    """One cell per share and seed: all curves rank the same samples."""
    return ranked.drop_duplicates(["x", "seed"])


def _log_prob(ranked: pd.DataFrame) -> pd.DataFrame:
    alike = _alike(ranked)
    return alike.assign(line="log-prob", value=100 * alike["logprob_auroc_within_prompt"])


def _policies(trained: pd.DataFrame) -> str:
    """Accuracy of each trained policy, minus SFT on the same demonstrations, and minus its curve's smallest share."""
    is_sft, is_least = trained["line"] == "SFT", trained["x"] == trained.groupby("line")["x"].transform("min")
    cells = trained.assign(
        sft=against(trained, trained[is_sft], ["seed", "x"]).mask(is_sft),
        least=against(trained, trained[is_least], ["seed", "line"]).mask(is_least),
        kept=trained["chosen"] == "start",
    ).groupby("point", sort=False)
    shown = {
        "greedy accuracy": cells["accuracy"].agg(percent),
        "minus SFT with that share": cells["sft"].agg(paired),
        "minus the smallest share": cells["least"].agg(paired),
        "collapsed": cells["collapsed"].agg(counted).where(cells["line"].first() != "SFT"),
        "start kept": cells["kept"].agg(counted).where(cells["chosen"].count() > 0),
    }
    return table("arm, share", pd.DataFrame(shown))


def _baselines(ranked: pd.DataFrame) -> str:
    """Accuracy of the selection methods without a reward, for each share."""
    n = ranked["samples"].iloc[0]
    names = ["mean sample", f"majority@{n}", f"log-prob best-of-{n}", "shortest", f"oracle@{n}"]
    shown = _alike(ranked).groupby("x", sort=False)[names].agg(percent)
    return table(f"{n} samples of the SFT policy with that share, %", shown.rename("{} %".format))


def _rankings(ranked: pd.DataFrame) -> str:
    """AUROC of each reward, and gains of selecting by it, on samples of the SFT policy with the same share."""
    n = ranked["samples"].iloc[0]
    reward, both = (ranked[f"{score} best-of-{n}"] for score in ("reward", "reward + log-prob"))
    scores = {
        "within-prompt AUROC, log-prob": "logprob_auroc_within_prompt",
        "reward": "reward_auroc_within_prompt",
        "reward + log-prob": "reward_logprob_auroc_within_prompt",
        "reward-correctness r": "reward_r",
    }
    gains = {
        f"reward best-of-{n} minus the better of majority and log-prob": reward - ranked["plain"],
        "reward + log-prob, the same": both - ranked["plain"],
        "reward + log-prob minus the shortest": both - ranked["shortest"],
    }
    cells = ranked.assign(**gains).groupby("point", sort=False)
    shown = {head: cells[name].agg(mean, digits=3) for head, name in scores.items()}
    shown |= {head: cells[head].agg(points) for head in gains}
    return table(f"{n} samples of the SFT policy with that share", pd.DataFrame(shown))
