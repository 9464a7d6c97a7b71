"""`TokenScores`: the record that scoring returns and ranking, files, reports and servers read."""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tracereward.errors import InputError, check_choice
from tracereward.thinking import part_of, weights_of

if TYPE_CHECKING:
    from pandas import DataFrame

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
            position at or after it. High is expert-like.
        supervised: T flags, whether the granularity supervises the position.
        step_ends: T flags, whether the token is the last of a step (or of the trace).
        thinking: number of leading tokens that are thinking; the others are the answer.
        thinking_weight: see `RewardSettings`.
    """

    tokens: list[str]
    offsets: list[tuple[int, int]]
    rewards: list[float]
    supervised: list[bool]
    step_ends: list[bool]
    thinking: int = 0
    thinking_weight: float | None = None

    def aggregate(self, how: str = "mean") -> float:
        """The trace reward; see `trace_reward`."""
        return trace_reward(self.rewards, how, self.thinking, self.thinking_weight)

    def parts(self, how: str = "mean") -> dict[str, float]:
        """The aggregate of each part, ``thinking`` and ``answer``; empty for a trace without thinking."""
        parts = part_of(self.rewards, self.thinking) if self.thinking else {}
        return {name: aggregate_rewards(rewards, how) for name, rewards in parts.items()}

    def by_step(self, spans: Sequence[tuple[int, int]] = ()) -> list[list[float]]:
        """The token rewards of each step with the delimiter behind it, the last one with the end of sequence.

        Args:
            spans: (start, end) of each step in the text, if the trace was given step by step; otherwise steps end
                where `step_ends` says.
        """
        if not spans:
            bounds = [place + 1 for place, is_end in enumerate(self.step_ends) if is_end]
            return [self.rewards[start:end] for start, end in itertools.pairwise([0, *bounds])]
        return slices(self.rewards, self._starts(spans))

    def ends_of(self, spans: Sequence[tuple[int, int]] = ()) -> list[bool]:
        """Whether each token is the last of a step of `by_step`; steps that share a first token end together."""
        if not spans:
            return list(self.step_ends)
        last = {start - 1 for start in [*self._starts(spans)[1:], len(self.tokens)]}
        return [place in last for place in range(len(self.tokens))]

    def _starts(self, spans: Sequence[tuple[int, int]]) -> list[int]:
        """The first token of each step."""
        ends = [end for _, end in self.offsets]
        return [bisect.bisect_right(ends, start) for start, _ in spans]

    def step_rewards(self, spans: Sequence[tuple[int, int]] = ()) -> list[float]:
        """The mean reward of each step's tokens.

        Args:
            spans: (start, end) of each step in the text, whose tokens are those that overlap it; if empty, steps end
                where `step_ends` says.

        Raises:
            InputError: no token overlaps a span.
        """
        if not spans:
            return [sum(step) / len(step) for step in self.by_step()]
        means = []
        for start, end in spans:
            inside = [r for r, (a, b) in zip(self.rewards, self.offsets, strict=True) if a < end and b > start]
            if not inside:
                raise InputError(f"no token between characters {start} and {end}")
            means.append(sum(inside) / len(inside))
        return means

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain lists, for JSON."""
        return asdict(self)

    def to_pandas(self) -> "DataFrame":
        """A row for each token: token, reward, step (from 0), start, end, supervised."""
        from pandas import DataFrame

        steps = [0, *itertools.accumulate(map(int, self.step_ends))][: len(self.tokens)]
        starts, ends = zip(*self.offsets, strict=True) if self.offsets else ((), ())
        columns = {"token": self.tokens, "reward": self.rewards, "step": steps, "start": starts, "end": ends}
        return DataFrame({**columns, "supervised": self.supervised})

    def _repr_html_(self) -> str:
        """The tokens coloured by their rewards, for notebooks; the largest has the strongest colour."""
        from tracereward.rewards.heatmap import heatmap_html

        return str(heatmap_html(self, max(map(abs, self.rewards), default=0.0) or 1.0))


def slices(values: Sequence[float], starts: Sequence[int]) -> list[list[float]]:
    """Token values by step: each step goes up to the next one's first token, the first one begins with the trace.

    Args:
        values: T values.
        starts: index of each step's first token, in order. Steps that share their first token both have it.
    """
    bounds = itertools.pairwise([0, *starts[1:], len(values)])
    return [list(values[start : max(end, start + 1)]) for start, end in bounds]


def trace_reward(rewards: Sequence[float], how: str, thinking: int = 0, weight: float | None = None) -> float:
    """The trace reward: `aggregate_rewards` of all tokens, or the weighted mean of that of thinking and answer.

    Args:
        rewards: T token rewards.
        how: one of `AGGREGATES`.
        thinking: number of leading tokens that are thinking.
        weight: of the thinking, see `thinking.weights_of`; None: the trace is one text.

    Raises:
        InputError: as `aggregate_rewards`.
    """
    if weight is None or not rewards:
        return aggregate_rewards(rewards, how)
    parts = part_of(rewards, thinking)
    weights = weights_of(list(parts), weight)
    return sum(weights[name] * aggregate_rewards(parts[name], how) for name in parts)


def aggregate_rewards(rewards: Sequence[float], how: str = "mean") -> float:
    """Reduce token rewards to a trace reward; never a sum, which would reward length.

    ``mean`` or ``min`` over tokens, the ``last`` token's reward, or ``discounted``, the mean with weights
    `DISCOUNT` ** t of token t = 0, 1, ...: the weights of a return from the first token.

    Raises:
        InputError: `how` is not one of `AGGREGATES`, or there are no rewards.
    """
    check_choice("aggregate", how, AGGREGATES)
    if not rewards:
        raise InputError("a trace without tokens has no reward")
    if how == "mean":
        return sum(rewards) / len(rewards)
    if how == "min":
        return min(rewards)
    if how == "last":
        return rewards[-1]
    weights = [DISCOUNT**t for t in range(len(rewards))]
    return sum(w * r for w, r in zip(weights, rewards, strict=True)) / sum(weights)
