"""Methods at equal sampled tokens: what choosing among whole samples reaches, margins above it, and how it is drawn."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from studies.measures.equal_tokens import margin

POOL = {
    "greedy": "greedy, one trace",
    "shortest": "shortest",
    "majority": "majority",
    "logprob": "log-prob best-of-N",
    "logprob_vote": "log-prob-weighted vote",
    "reward": "reward best-of-N",
    "vote": "reward-weighted vote",
    "reward_logprob": "reward + log-prob best-of-N",
    "reward_logprob_vote": "vote weighted by reward + log-prob",
    "oracle": "oracle",
}
"""What chooses among whole samples."""
SCORES = {"reward": "reward", "reward_logprob": "reward + log-prob", "logprob": "log-prob"}
PLAIN = ("majority", "logprob")
"""What needs no reward, the better of which is a baseline."""
EQUAL = (
    "Differences are at equal sampled tokens: a baseline's accuracy is interpolated, linearly in log tokens, between "
    "its numbers of samples, for each seed by itself. Accuracies of N whole samples are means over random subsets of "
    "all that were drawn."
)
TICKS = (25, 50, 100, 200, 400, 800)
_STROKES = {
    "majority": ("#7a7a7a", ":"),
    "logprob": ("#7a7a7a", "--"),
    "shortest": ("#7a7a7a", "-."),
    "reward": ("#0b6e4f", "--"),
    "reward_logprob": ("#0b6e4f", "-"),
}


def frame_of(rows: Iterable[Sequence[dict[str, Any]]]) -> pd.DataFrame:
    """The rows of all seeds, with the number of the seed in ``cell``."""
    return pd.DataFrame([{"cell": cell, **row} for cell, own in enumerate(rows) for row in own])


def margins(rows: pd.DataFrame, pool: pd.DataFrame, methods: Sequence[str]) -> list[float]:
    """What each row is above the best of some baselines of its seed at its tokens.

    Args:
        rows: cell, sampled_tokens and accuracy.
        pool: the same and method of what chooses among whole samples.
        methods: the baselines.
    """
    curves = {key: list(zip(own["sampled_tokens"], own["accuracy"])) for key, own in pool.groupby(["cell", "method"])}
    return [
        margin((row.sampled_tokens, row.accuracy), *(curves[row.cell, method] for method in methods))
        for row in rows.itertuples()
    ]


def means(rows: pd.DataFrame, by: str | list[str] = "budget") -> tuple[pd.Series, pd.Series]:
    """Means over seeds of tokens and of accuracy in %."""
    found = rows.groupby(by)[["sampled_tokens", "accuracy"]].mean()
    return found["sampled_tokens"], 100 * found["accuracy"]


def draw_pool(axis: Any, pool: pd.DataFrame) -> None:
    """The lines of what chooses among whole samples, but the oracle's."""
    for method, (colour, stroke) in _STROKES.items():
        line = means(pool[pool["method"] == method])
        axis.plot(*line, stroke, color=colour, linewidth=1.3, label=POOL[method])


def set_axes(axis: Any, title: str, ticks: Sequence[int]) -> None:
    """Log tokens below, accuracy at the left."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("sampled tokens of a question, mean", fontsize=8)
    axis.set_title(title, loc="left", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
