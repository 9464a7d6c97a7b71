"""`TokenScores`: the one record that crosses layers, from scoring to ranking, files, reports and servers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

AGGREGATES = ("mean", "min", "last", "discounted")
DISCOUNT = 0.99
"""gamma of the aggregate ``discounted``."""


@dataclass(frozen=True)
class TokenScores:
    """Token rewards of one trace.

    Attributes:
        tokens: T strings, the text of each completion token (the end-of-sequence token last, if there is one).
        offsets: T pairs (start, end), character offsets into the completion's text; an end-of-sequence token has
            start = end = len(text).
        rewards: T rewards in log-odds, clipped to +-beta and backfilled: a token has the reward of the next supervised
            position at or after it. Expert is high.
        supervised: T flags, the positions that the granularity supervises.
        step_ends: T flags, the last token of each step (and of the trace).
    """

    tokens: list[str]
    offsets: list[tuple[int, int]]
    rewards: list[float]
    supervised: list[bool]
    step_ends: list[bool]

    def aggregate(self, how: str = "mean") -> float:
        """One number for the trace; see `aggregate_rewards`."""
        return aggregate_rewards(self.rewards, how)

    def step_rewards(self) -> list[float]:
        """The mean reward of each step's tokens, in order."""
        steps: list[float] = []
        start = 0
        for end, is_end in enumerate(self.step_ends):
            if is_end:
                steps.append(sum(self.rewards[start : end + 1]) / (end + 1 - start))
                start = end + 1
        return steps

    def span_rewards(self, spans: Sequence[tuple[int, int]]) -> list[float]:
        """The mean reward of the tokens that write a character of each span (start, end) of the text.

        Raises:
            ValueError: a span without a token.
        """
        means = []
        for start, end in spans:
            inside = [r for r, (a, b) in zip(self.rewards, self.offsets, strict=True) if a < end and b > start]
            if not inside:
                raise ValueError(f"no token between characters {start} and {end}")
            means.append(sum(inside) / len(inside))
        return means

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return asdict(self)


def aggregate_rewards(rewards: Sequence[float], how: str = "mean") -> float:
    """One number for a trace, never the sum, which would pay for length.

    ``mean`` or ``min`` over tokens, the ``last`` token's reward, or ``discounted``, the mean with weights
    `DISCOUNT` ** t of token t = 0, 1, ...: the weights of a return from the first token.

    Raises:
        ValueError: `how` is not one of `AGGREGATES`.
    """
    if how == "mean":
        return sum(rewards) / len(rewards)
    if how == "min":
        return min(rewards)
    if how == "last":
        return rewards[-1]
    if how == "discounted":
        weights = [DISCOUNT**t for t in range(len(rewards))]
        return sum(w * r for w, r in zip(weights, rewards, strict=True)) / sum(weights)
    raise ValueError(f"unknown aggregate {how!r}; known: {', '.join(AGGREGATES)}")
