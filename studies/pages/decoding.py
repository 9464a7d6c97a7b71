"""Page sections and figure of the guided decoding study, from its results."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from studies.pages.equal_budget import EQUAL, PLAIN, POOL, SCORES, TICKS, draw_pool, frame_of, margins, means, set_axes
from studies.pages.markdown import mean, percent, points, table
from studies.results_file import Result

AGAINST = {
    "reward best-of-N": ("reward",),
    "reward + log-prob best-of-N": ("reward_logprob",),
    "shortest": ("shortest",),
    "the better of majority and log-prob": PLAIN,
}
"""Baselines of the differences."""
_TUNED = (
    "It has the largest margin, in points, over best-of-N by the same score at equal tokens. Shape square: equal width "
    "and expansions; narrow: one partial trace; wide: two expansions of each partial trace."
)
_GUIDED = {"beam": "#c2571a", "reject": "#8a2be2", "tilt": "#1f6fb2", "top-k": "#1f6fb2"}


def sections(path: Path, results: Sequence[Result]) -> list[str]:
    """Parts of the page; writes ``NAME.png`` next to `path`."""
    rows = frame_of(result["decoding"]["rows"] for result in results)
    rows = rows[rows["score"].notna() | rows["method"].isin(POOL)]
    guides = rows["method"] + " by " + rows["score"].map(SCORES)
    names = guides.fillna(rows["method"].map(POOL))
    labels = pd.CategoricalDtype([*POOL.values(), *guides.dropna().unique()], ordered=True)
    rows = rows.assign(label=names.astype(labels)).sort_values(["label", "budget", "cell"])
    decoding_figure(path.with_suffix(".png"), rows)
    tuning = results[0]["decoding"]["tuning"]
    return [
        f"![Accuracy against sampled tokens]({path.stem}.png)",
        _budgets(rows),
        EQUAL,
        _equal_tokens(rows),
        f"Grid search on {tuning['questions']} validation questions of seed {tuning['seed']}. The setting in bold is "
        f"used for all seeds. {_TUNED}",
        _tuning(tuning["grids"]),
    ]


def _budgets(rows: pd.DataFrame) -> str:
    """Accuracy of each method by number of samples, and tokens per question at the largest."""
    shown = rows.groupby(["label", "budget"], observed=True)["accuracy"].agg(percent).unstack().add_prefix("N = ")
    largest = rows[rows["budget"] == rows.groupby("label", observed=True)["budget"].transform("max")]
    tokens = largest.groupby("label", observed=True)["sampled_tokens"].agg(mean, digits=0)
    return table("accuracy, %", shown.assign(**{"tokens per question, largest N": tokens}))


def _equal_tokens(rows: pd.DataFrame) -> str:
    """Methods with a reward minus baselines at equal tokens, for the three largest budgets of each."""
    pool, guided = rows[rows["score"].isna()], rows["score"].notna()
    learned = guided | rows["method"].isin(["vote", "reward_logprob", "reward_logprob_vote"])
    own = rows[learned & (rows["budget"] <= rows.loc[guided, "budget"].max())]
    last = own.groupby("label", observed=True)["budget"].rank("dense", ascending=False) <= 3
    own = own[last].assign(point=own["label"].astype(str) + ", N = " + own["budget"].astype(str))
    for head, methods in AGAINST.items():
        own[f"minus {head}"] = margins(own, pool, methods)
    cells = own.groupby("point", sort=False)
    shown = {"tokens": cells["sampled_tokens"].agg(mean, digits=0), "accuracy, %": cells["accuracy"].agg(percent)}
    label = cells["label"].first()
    for head in AGAINST:
        shown[f"minus {head}"] = cells[f"minus {head}"].agg(points).where(label != head)
    return table("", pd.DataFrame(shown))


def _tuning(grids: dict[str, dict[str, dict]]) -> str:
    """All settings of the grid search, the selected ones in bold."""
    lines = []
    for score, methods in grids.items():
        for method, grid in methods.items():
            for place, row in enumerate(grid["tried"]):
                options = {name: value for name, value in row.items() if name not in _MEASURED}
                setting = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in options.items())
                lines.append(
                    {
                        "tried": f"{method} by {SCORES[score]}, N = {row['budget']}",
                        "setting": f"**{setting}**" if place == grid["chosen"] else setting,
                        "tokens": f"{row['sampled_tokens']:.0f}",
                        "accuracy, %": f"{100 * row['accuracy']:.1f}",
                        "above best-of-N": f"{100 * row['margin']:+.1f}",
                    }
                )
    return table("tried", pd.DataFrame(lines).set_index("tried"))


_MEASURED = ("budget", "accuracy", "sampled_tokens", "margin")


def decoding_figure(path: Path, rows: pd.DataFrame) -> None:
    """Write a PNG: accuracy against mean sampled tokens, one panel per guiding score, one line per method."""
    from matplotlib.figure import Figure

    scores = list(dict.fromkeys(rows["score"].dropna()))
    figure = Figure(figsize=(3.6 * len(scores), 3.6), layout="constrained")
    panels = figure.subplots(1, len(scores), squeeze=False, sharey=True)[0]
    for axis, score in zip(panels, scores, strict=True):
        draw_pool(axis, rows[rows["score"].isna()])
        for method, line in rows[rows["score"] == score].groupby("method", sort=False):
            stroke = "o:" if method == "top-k" else "o-"
            axis.plot(*means(line), stroke, color=_GUIDED[method], markersize=4, linewidth=1.6, label=method)
        set_axes(axis, f"guided by {SCORES[score]}", TICKS)
    panels[0].set_ylabel("accuracy, %", fontsize=8)
    lines = {line.get_label(): line for axis in panels for line in axis.get_lines()}
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
