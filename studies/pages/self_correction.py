"""Page sections and figure of the self-correction study, from its results."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from studies.pages.equal_budget import EQUAL, PLAIN, POOL, SCORES, TICKS, draw_pool, frame_of, margins, means, set_axes
from studies.pages.markdown import mean, percent, points, table
from studies.results_file import Result

SHARES = {
    "mended": "fixed, %",
    "broken": "broken, %",
    "suspected_wrong": "suspected among wrong, %",
    "suspected_right": "suspected among right, %",
    "untouched": "untouched, %",
}
"""Keys of `measures.self_correction.summary`, with their headings."""
_HOW_TO_READ = (
    "Tokens include the corrected sample. Fixed: share of wrong traces that become right. Broken: share of right "
    "traces that become wrong. Suspected: with a step under the threshold. Untouched: share of all traces without one."
)
_THRESHOLDS = (
    "For each pair of detector and judge and each seed, the threshold with the largest margin over best-of-N by the "
    "same judge at equal tokens is selected on the seed's validation questions, with two rounds of two continuations. "
    "Each candidate threshold suspects a given share of the validation traces; 100 % resamples every trace in full."
)
_LOOKS = {
    ("reward", "reward"): ("#0b6e4f", "s"),
    ("reward_logprob", "reward_logprob"): ("#c2571a", "o"),
    ("logprob", "reward_logprob"): ("#1f6fb2", "v"),
    ("logprob", "logprob"): ("#7a7a7a", "D"),
}


def sections(path: Path, results: Sequence[Result]) -> list[str]:
    """Parts of the page; writes ``NAME.png`` next to `path`."""
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
    """Labels of detector and judge."""
    return "detector " + rows["detector"].map(SCORES) + ", judge " + rows["judge"].map(SCORES)


def _whole_samples(pool: pd.DataFrame) -> str:
    """Accuracy of choosing among full samples."""
    reached = pool.groupby(["method", "budget"])["accuracy"].agg(percent).unstack().rename(POOL)
    shown = reached.reindex([label for label in POOL.values() if label in reached.index])
    one = pool[pool["method"] == pool["method"].iloc[0]]
    shown.loc["tokens per question"] = one.groupby("budget")["sampled_tokens"].agg(mean, digits=0)
    return table("choosing among full samples, %", shown.add_prefix("N = "))


def _corrections(pool: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Results for each detector and judge, number of rounds r and of continuations k."""
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
    """Margins of the candidate thresholds, and how many seeds selected each."""
    cells = tried.assign(way=_way(tried)).groupby(["way", "share"], sort=False)
    shown = cells["margin"].agg(points) + cells["chosen"].sum().map(" ({})".format)
    wide = shown.unstack()[tried["share"].unique()].reindex(_way(tried).unique())
    heads = [f"{100 * share:.0f} % suspected" for share in wide.columns]
    return table("validation: minus best-of-N by the judge (seeds that selected it)", wide.set_axis(heads, axis=1))


def correction_figure(path: Path, pool: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Write a PNG: accuracy against mean sampled tokens, a mark for each detector and judge, r and k."""
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
