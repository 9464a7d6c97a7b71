"""The rule that marks a trace's suspected first error, and how its threshold is fitted.

A trace is suspect if the lowest mean of `WINDOW` consecutive token rewards lies below a threshold, fitted so that at
most `RATE` of right traces get a mark; the mark is then the step whose last token's reward falls furthest below those
of the steps before. A single token's reward is noisy, so the mean of some decides whether there is an error; rewards
stay low behind an error, so only a new low says where it began. One rule serves `Scorer.first_error`, `score`,
`inspect`, `correct` and the server; `evaluate processbench` judges it beside thresholds fitted on labels.
"""

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.stats import binom

from tracereward.errors import InputError
from tracereward.metrics import wilson_interval

RATE = 0.05
"""Largest share of right traces that may get a mark."""
CONFIDENCE = 0.9
"""Probability that a fitted threshold keeps to `RATE` on new traces like those it was fitted on."""
RIGHT_TRACES = 60
"""Right traces needed to fit a rule: four fifths of them, in each fold, are enough for `safe_threshold`."""
WRONG_TRACES = 20
"""Wrong traces needed to judge the rule by them, rather than by inserted errors."""
WINDOW = 8
"""Consecutive tokens whose mean decides whether a trace is suspect."""
_FOLDS = 5

Steps = Sequence[Sequence[float]]
"""Token rewards of each step of a trace."""


def differences(scores: Sequence[float]) -> list[float]:
    """Each score minus the previous one; 0 for the first step."""
    return [0.0, *(score - before for before, score in itertools.pairwise(scores))][: len(scores)]


def new_lows(scores: Sequence[float]) -> list[float]:
    """Each score minus the lowest of those before it; 0 for the first step."""
    lowest = itertools.accumulate(scores, min)
    return [0.0, *(score - low for low, score in zip(lowest, scores[1:]))][: len(scores)]


def lowest_window(rewards: Sequence[float], width: int = WINDOW) -> float:
    """The lowest mean of `width` consecutive values; the mean of all if there are fewer."""
    width = min(width, len(rewards))
    return min(sum(rewards[start : start + width]) for start in range(len(rewards) - width + 1)) / width


def suspicions(steps: Steps) -> list[float]:
    """What the rule compares with its threshold: the `lowest_window` at the step that it would mark, else infinity.

    That step is the first with the lowest value of `new_lows` of the steps' last token rewards.
    """
    lows = new_lows([step[-1] for step in steps])
    place = min(range(len(steps)), key=lows.__getitem__)
    lowest = lowest_window(list(itertools.chain.from_iterable(steps)))
    return [lowest if step == place else math.inf for step in range(len(steps))]


def first_below(scores: Sequence[float], threshold: float) -> int | None:
    """The first step that scores strictly below the threshold; None if no step does."""
    return next((step for step, score in enumerate(scores) if score < threshold), None)


def lowest_steps(scores: Sequence[float]) -> list[int]:
    """All steps that have the lowest score, in order."""
    lowest = min(scores)
    return [step for step, score in enumerate(scores) if score == lowest]


class MarksSteps(Protocol):
    """Suspects a step of a trace or none."""

    def mark(self, steps: Steps) -> int | None:
        """Index of the suspected first wrong step; None if no step is suspected."""
        ...


@dataclass(frozen=True)
class LevelRule:
    """For a threshold that is chosen by hand: the first step with a lower mean."""

    threshold: float

    def mark(self, steps: Steps) -> int | None:
        """See `MarksSteps`."""
        return first_below([sum(step) / len(step) for step in steps], self.threshold)


@dataclass(frozen=True, kw_only=True)
class FirstErrorRule:
    """Where a trace's suspected first error is; stored in ``tracereward.json``.

    Attributes:
        threshold: a trace whose `lowest_window` lies below it is marked, see `suspicions`.
        traces: number of right traces that the threshold was fitted on; 0 for one that was chosen by hand.
        marked_wrong: share of wrong traces that it marks, of questions that the threshold was not fitted on; None if
            too few were known.
        hit_rate: likewise the share of inserted errors whose step it marks.
    """

    threshold: float
    traces: int = 0
    marked_wrong: float | None = None
    hit_rate: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, (int, float)) or math.isnan(self.threshold):
            raise InputError(f"the threshold of the first error must be a number, not {self.threshold!r}")

    @property
    def line(self) -> str:
        """The rule in a sentence, with what it finds."""
        text = (
            f"Suspected first error: in traces with {WINDOW} tokens in a row whose mean reward is below "
            f"{self.threshold:.3g}, the step whose last token's reward falls furthest below those of the steps before"
        )
        if self.marked_wrong is not None:
            return f"{text}; it marks {100 * self.marked_wrong:.0f} % of wrong traces."
        return (
            f"{text}." if self.hit_rate is None else f"{text}; it finds {100 * self.hit_rate:.0f} % of inserted errors."
        )

    def mark(self, steps: Steps) -> int | None:
        """See `MarksSteps`."""
        return first_below(suspicions(steps), self.threshold)


@dataclass(frozen=True, kw_only=True)
class RatedTrace:
    """Token rewards of a right or wrong trace, to fit a rule on.

    Attributes:
        steps: token rewards of each step.
        question: traces of one question are never split between fitting and judging.
        right: whether it has no error.
        first_error: index of the first wrong step of a wrong trace; None if it is not known.
        source: who wrote it; a threshold keeps to `RATE` for the right traces of each source that has enough of them.
    """

    steps: Steps
    question: Hashable
    right: bool
    first_error: int | None = None
    source: str = ""

    def found(self, mark: int | None) -> bool:
        """Whether `mark` says that a wrong trace is wrong, and where, as far as that is known."""
        return mark is not None and self.first_error in (None, mark)


def safe_threshold(lowest: Sequence[float], rate: float = RATE, confidence: float = CONFIDENCE) -> float | None:
    """The highest threshold under which a new right trace falls with probability at most `rate`.

    It is the k-th lowest of the n values. A new trace like these lies strictly under it with a probability that has
    the distribution Beta(k, n + 1 - k), whatever the values' own distribution (a distribution-free tolerance limit,
    Wilks 1941); k is the largest for which it is at most `rate` with probability `confidence`: P(B >= k) >= confidence
    for B ~ Binomial(n, rate). Ties only lower the share.

    Args:
        lowest: the `lowest_window` of each right trace.
        rate: largest share of right traces that may fall under the threshold.
        confidence: of keeping to `rate`.

    Returns:
        The threshold; None for too few traces (under 45 at the default rate and confidence).
    """
    n = len(lowest)
    ranks = np.arange(1, n + 1)
    kept = ranks[binom.sf(ranks - 1, n, rate) >= confidence]
    return float(sorted(lowest)[kept[-1] - 1]) if len(kept) else None


def fit_rule(traces: Sequence[RatedTrace]) -> FirstErrorRule:
    """The rule with the threshold that spares right traces, if it finds errors.

    The threshold is `safe_threshold` of the right traces: the lowest of those of each source that has enough of them,
    or that of all together. What the rule finds is judged on wrong traces, each with a threshold fitted on right traces
    of other questions (five folds): the share of those with an unknown first error that gets any mark, if there are
    `WRONG_TRACES` of them, and otherwise the share of the others that is marked at the first error.

    Raises:
        InputError: there are too few right traces or no wrong ones; or the rule cannot be trusted: it finds no more
            than twice as many wrong traces as it may mark right ones, by the lower end of the 95 % interval, or most of
            its marks are known to be on another step than the first wrong one.
    """
    right = [trace for trace in traces if trace.right]
    if len(right) < RIGHT_TRACES:
        raise InputError(f"{len(right)} right traces, one for each question, and {RIGHT_TRACES} are needed")
    unlocated = [trace for trace in traces if not trace.right and trace.first_error is None]
    located = [trace for trace in traces if trace.first_error is not None]
    by_answer = len(unlocated) >= WRONG_TRACES
    judged = unlocated if by_answer else located
    if not judged:
        raise InputError(f"{len(unlocated)} wrong traces, and no error could be inserted into right ones")
    marks = _marks(right, [*unlocated, *located])
    hits = sum(trace.found(marks[id(trace)]) for trace in judged)
    total = sum(marks[id(trace)] is not None for trace in judged)
    if wilson_interval(hits, len(judged))[0] <= 2 * RATE or 2 * hits < total:
        where = "" if by_answer else f", {hits} of them at the first wrong step"
        raise InputError(f"it would mark {total} of {len(judged)} wrong traces{where}")
    threshold = _threshold(right)
    assert threshold is not None

    def share(of: Sequence[RatedTrace]) -> float | None:
        return sum(trace.found(marks[id(trace)]) for trace in of) / len(of) if of else None

    return FirstErrorRule(
        threshold=threshold,
        traces=len(right),
        marked_wrong=share(unlocated) if by_answer else None,
        hit_rate=share(located),
    )


def _marks(right: Sequence[RatedTrace], wrong: Sequence[RatedTrace]) -> dict[int, int | None]:
    """Mark of each wrong trace, by its id, with a threshold fitted on right traces of other questions."""
    folds = {
        question: place % _FOLDS for place, question in enumerate(dict.fromkeys(t.question for t in [*right, *wrong]))
    }
    found: dict[int, int | None] = {}
    for fold in range(_FOLDS):
        threshold = _threshold([trace for trace in right if folds[trace.question] != fold])
        if threshold is None:
            raise InputError(f"{len(right)} right traces are of too few questions")
        rule = FirstErrorRule(threshold=threshold)
        found |= {id(trace): rule.mark(trace.steps) for trace in wrong if folds[trace.question] == fold}
    return found


def _threshold(right: Sequence[RatedTrace]) -> float | None:
    """The lowest of the thresholds of the sources that have enough right traces; of all together if none has."""
    lowest: dict[str, list[float]] = {}
    for trace in right:
        lowest.setdefault(trace.source, []).append(min(suspicions(trace.steps)))
    found = [limit for of in lowest.values() if (limit := safe_threshold(of)) is not None]
    return min(found) if found else safe_threshold(list(itertools.chain.from_iterable(lowest.values())))
