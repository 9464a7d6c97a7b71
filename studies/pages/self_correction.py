"""Sections and figure of the study of self-correction, from the rows of its results."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from studies.pages.equal_budget import EQUAL, PLAIN, POOL, SCORES, TICKS, draw_pool, frame_of, margins, means, set_axes
from studies.pages.markdown import mean, percent, points, table
from studies.results_file import Result

SHARES = {
    "mended": "mended, %",
    "broken": "broken, %",
    "suspected_wrong": "wrong: suspected, %",
    "suspected_right": "right: suspected, %",
    "untouched": "untouched, %",
}
"""Keys of `self_correction.summary`, as columns."""
_HOW_TO_READ = (
    "The sample that is corrected counts too. Mended: of wrong traces those that are right afterwards. Broken: of "
    "right traces those that are wrong afterwards. Suspected: with a step under the threshold."
)
_THRESHOLDS = (
    "The threshold of each way and seed is the one farthest above best-of-N by the same judge at the same tokens, on "
    "the seed's validation questions, with two rounds of two. Those that were tried let suspect a given share of the "
    "validation traces; with 100 % each trace is drawn anew from its beginning."
)
_LOOKS = {
    ("reward", "reward"): ("#0b6e4f", "s"),
    ("reward_logprob", "reward_logprob"): ("#c2571a", "o"),
    ("logprob", "reward_logprob"): ("#1f6fb2", "v"),
    ("logprob", "logprob"): ("#7a7a7a", "D"),
}


def sections(path: Path, results: Sequence[Result]) -> list[str]:
    """Parts of the page; writes ``NAME.png`` beside `path`."""
    found = [result["self_correction"] for result in results]
    pool, rows = (frame_of(own[name] for own in found) for name in ("pool", "rows"))
    tried = [
        {**row, "detector": way["detector"], "judge": way["judge"], "chosen": place == way["chosen"]}
        for own in found
        for way in own["tuning"]
        for place, row in enumerate(way["tried"])
    ]
    correction_figure(path.with_suffix(".png"), pool, rows)
    return [
        f"![Accuracy against sampled tokens]({path.stem}.png)",
        _whole_samples(pool),
        f"{EQUAL} {_HOW_TO_READ}",
        _corrections(pool, rows),
        _THRESHOLDS,
        _thresholds(pd.DataFrame(tried)),
    ]


def _way(rows: pd.DataFrame) -> pd.Series:
    """What suspects and what judges, in words."""
    return rows["detector"].map(SCORES) + " suspects, " + rows["judge"].map(SCORES) + " judges"


def _whole_samples(pool: pd.DataFrame) -> str:
    """What choosing among whole samples reaches."""
    reached = pool.groupby(["method", "budget"])["accuracy"].agg(percent).unstack().rename(POOL)
    shown = reached.reindex([label for label in POOL.values() if label in reached.index])
    one = pool[pool["method"] == pool["method"].iloc[0]]
    shown.loc["tokens of a question"] = one.groupby("budget")["sampled_tokens"].agg(mean, digits=0)
    return table("choosing among whole samples, %", shown.add_prefix("N = "))


def _corrections(pool: pd.DataFrame, rows: pd.DataFrame) -> str:
    """What each way, number of rounds and of continuations reaches."""
    rows = rows.assign(
        point=_way(rows) + ": r " + rows["rounds"].astype(str) + ", k " + rows["k"].astype(str),
        plain=margins(rows, pool, PLAIN),
    )
    for judge, own in rows.groupby("judge"):
        rows.loc[own.index, "best"] = margins(own, pool, [judge])
    cells = rows.groupby("point", sort=False)
    shown = {
        "tokens": cells["sampled_tokens"].agg(mean, digits=0),
        "accuracy, %": cells["accuracy"].agg(percent),
        "minus best-of-N by the judge": cells["best"].agg(points),
        "minus the better of majority and log-prob": cells["plain"].agg(points),
        **{head: cells[name].agg(percent) for name, head in SHARES.items()},
    }
    return table("", pd.DataFrame(shown))


def _thresholds(tried: pd.DataFrame) -> str:
    """Of each way the margins of the thresholds tried, and how often each share was chosen."""
    cells = tried.assign(way=_way(tried)).groupby(["way", "share"], sort=False)
    shown = cells["margin"].agg(points) + cells["chosen"].sum().map(" ({})".format)
    wide = shown.unstack()[tried["share"].unique()].reindex(_way(tried).unique())
    heads = [f"{100 * share:.0f} % suspected" for share in wide.columns]
    return table("validation: above best-of-N by the judge (seeds that chose it)", wide.set_axis(heads, axis=1))


def correction_figure(path: Path, pool: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Write a PNG: accuracy against mean sampled tokens, a mark for each way, number of rounds and of continuations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    axis = figure.subplots()
    draw_pool(axis, pool)
    ways = rows.assign(way=_way(rows)).groupby(["detector", "judge", "way"], sort=False)
    for (detector, judge, way), own in ways:
        colour, mark = _LOOKS[detector, judge]
        axis.plot(*means(own, ["k", "rounds"]), mark, color=colour, markersize=4.5, alpha=0.8, label=way)
    set_axes(axis, "self-correction: 1 to 3 rounds of 1, 2 or 4 continuations", TICKS[:-1])
    axis.set_ylabel("accuracy, %", fontsize=8)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
