"""Comparison at equal sampled tokens: selection among full samples, margins over it, and its lines in figures."""

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
"""Methods that select among full samples, with their labels."""
SCORES = {"reward": "reward", "reward_logprob": "reward + log-prob", "logprob": "log-prob"}
PLAIN = ("majority", "logprob")
"""Methods without a reward; the better of them is a baseline."""
EQUAL = (
    "Differences are at equal sampled tokens: for each seed, a baseline's accuracy is interpolated linearly in log "
    "tokens between its numbers of samples. Accuracies with N full samples are means over random subsets of all "
    "samples."
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
    """The rows of all seeds, with the index of the seed in ``cell``."""
    return pd.DataFrame([{"cell": cell, **row} for cell, own in enumerate(rows) for row in own])


def margins(rows: pd.DataFrame, pool: pd.DataFrame, methods: Sequence[str]) -> list[float]:
    """Margin of each row over the best baseline of its seed at equal tokens.

    Args:
        rows: cell, sampled_tokens and accuracy.
        pool: method and the same columns of selection among full samples.
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
    """Draw the lines of the selection methods in `_STROKES`."""
    for method, (colour, stroke) in _STROKES.items():
        line = means(pool[pool["method"] == method])
        axis.plot(*line, stroke, color=colour, linewidth=1.3, label=POOL[method])


def set_axes(axis: Any, title: str, ticks: Sequence[int]) -> None:
    """Style axes with log tokens on x."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("sampled tokens of a question, mean", fontsize=8)
    axis.set_title(title, loc="left", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
