"""The rule that marks a trace's suspected first error, and how its threshold is fitted.

A signal gives each step one number, low where an error is suspected; the mark is the first step whose signal lies below
the threshold. The threshold is fitted so that at most `RATE` of right traces get a mark, whatever the signal. Of the
signals that one is chosen which then marks the most first errors, on other questions than the threshold was fitted on.
One rule serves `Scorer.first_error`, `score`, `inspect`, `correct` and the server; `evaluate processbench` judges it
beside thresholds fitted on labels.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from tracereward.errors import InputError, check_choice
from tracereward.metrics import wilson_interval

RATE = 0.05
"""Largest share of right traces that may get a mark."""
CONFIDENCE = 0.9
"""Probability that a fitted threshold keeps to `RATE` on new traces like those it was fitted on."""
RIGHT_TRACES = 60
"""Right traces needed to fit a rule: four fifths of them, in each fold, are enough for `safe_threshold`."""
_FOLDS = 5

Steps = Sequence[Sequence[float]]
"""Token rewards of each step of a trace."""


def differences(scores: Sequence[float]) -> list[float]:
    """Each score minus the previous one; 0 for the first step."""
    return [0.0, *(score - before for before, score in itertools.pairwise(scores))][: len(scores)]


def _levels(steps: Steps) -> list[float]:
    return [sum(step) / len(step) for step in steps]


def _minima(steps: Steps) -> list[float]:
    return [min(step) for step in steps]


SIGNALS: dict[str, Callable[[Steps], list[float]]] = {
    "level": _levels,
    "minimum": _minima,
    "fall": lambda steps: differences(_levels(steps)),
    "minimum_fall": lambda steps: differences(_minima(steps)),
}
"""Step values by name, low where an error is suspected."""
SIGNALS_IN_WORDS = {
    "level": "mean reward",
    "minimum": "lowest token reward",
    "fall": "change of the mean reward from the step before",
    "minimum_fall": "change of the lowest token reward from the step before",
}


def first_below(scores: Sequence[float], threshold: float) -> int | None:
    """The first step that scores strictly below the threshold; None if no step does."""
    return next((step for step, score in enumerate(scores) if score < threshold), None)


def lowest_steps(scores: Sequence[float]) -> list[int]:
    """All steps that have the lowest score, in order."""
    lowest = min(scores)
    return [step for step, score in enumerate(scores) if score == lowest]


@dataclass(frozen=True, kw_only=True)
class FirstErrorRule:
    """Where a trace's suspected first error is; stored in ``tracereward.json``.

    Attributes:
        signal: one of `SIGNALS`.
        threshold: the first step whose signal lies below it is marked.
        traces: number of right traces that the threshold was fitted on.
        hit_rate: share of erroneous traces, of questions that the threshold was not fitted on, whose first wrong step
            it marks; None for a threshold that was not fitted.
    """

    signal: str
    threshold: float
    traces: int = 0
    hit_rate: float | None = None

    def __post_init__(self) -> None:
        check_choice("signal of first errors", self.signal, SIGNALS)

    @property
    def line(self) -> str:
        """The rule in a sentence, with what it finds."""
        text = (
            f"Suspected first error: the first step whose {SIGNALS_IN_WORDS[self.signal]} is below {self.threshold:.3g}"
        )
        if self.hit_rate is None:
            return f"{text}."
        return f"{text}; it finds {100 * self.hit_rate:.0f} % of inserted errors."

    def mark(self, steps: Steps) -> int | None:
        """Index of the suspected first wrong step; None if no step is suspected."""
        return first_below(SIGNALS[self.signal](steps), self.threshold)


def level_rule(threshold: float) -> FirstErrorRule:
    """The rule with a threshold that was chosen by hand: the first step with a mean reward below it."""
    return FirstErrorRule(signal="level", threshold=threshold)


@dataclass(frozen=True, kw_only=True)
class RatedTrace:
    """Token rewards of a trace with or without an error, to fit a rule on.

    Attributes:
        steps: token rewards of each step.
        question: traces of one question are never split between fitting and judging.
        first_error: index of the first wrong step; None for a right trace.
        source: who wrote it; a threshold keeps to `RATE` for the right traces of each source that has enough of them.
    """

    steps: Steps
    question: Hashable
    first_error: int | None
    source: str = ""


def safe_threshold(lowest: Sequence[float], rate: float = RATE, confidence: float = CONFIDENCE) -> float | None:
    """The highest threshold under which a new right trace falls with probability at most `rate`.

    It is the k-th lowest of the n values. A new trace like these lies strictly under it with a probability that has
    the distribution Beta(k, n + 1 - k), whatever the values' own distribution (a distribution-free tolerance limit,
    Wilks 1941); k is the largest for which it is at most `rate` with probability `confidence`: P(B >= k) >= confidence
    for B ~ Binomial(n, rate). Ties only lower the share.

    Args:
        lowest: of each right trace, the lowest value of its steps' signal.
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
    """The signal that finds the most first errors at a threshold that spares right traces.

    A threshold is `safe_threshold` of the right traces: the lowest of those of each source that has enough of them, or
    that of all together. A signal's hit rate is the share of erroneous traces whose first wrong step it marks, each
    trace judged with a threshold fitted on right traces of other questions (five folds). The best signal, the first of
    equally good ones, then gets the threshold of all right traces.

    Raises:
        InputError: there are too few right traces, no erroneous ones, or no signal can be trusted: the best one marks
            the first wrong step of no more erroneous traces than it may mark right ones (by the lower end of the 95 %
            interval), or most of its marks on erroneous traces are on another step.
    """
    if sum(trace.first_error is None for trace in traces) < RIGHT_TRACES:
        raise InputError(f"{sum(t.first_error is None for t in traces)} right traces, and {RIGHT_TRACES} are needed")
    questions = {question: place for place, question in enumerate(dict.fromkeys(t.question for t in traces))}
    right, wrong = ([t for t in traces if (t.first_error is None) == is_right] for is_right in (True, False))
    if not wrong:
        raise InputError("no trace with a known first error")
    hits, marks = dict.fromkeys(SIGNALS, 0), dict.fromkeys(SIGNALS, 0)
    for signal in SIGNALS:
        for fold in range(_FOLDS):
            threshold = _threshold([t for t in right if questions[t.question] % _FOLDS != fold], signal)
            if threshold is None:
                raise InputError(f"{len(right)} right traces are too few: {RIGHT_TRACES} or more are needed")
            rule = FirstErrorRule(signal=signal, threshold=threshold)
            found = [(rule.mark(t.steps), t.first_error) for t in wrong if questions[t.question] % _FOLDS == fold]
            hits[signal] += sum(mark == first_error for mark, first_error in found)
            marks[signal] += sum(mark is not None for mark, _ in found)
    best = max(SIGNALS, key=lambda signal: hits[signal])
    if wilson_interval(hits[best], len(wrong))[0] <= RATE or 2 * hits[best] < marks[best]:
        raise InputError(
            f"the best signal, {SIGNALS_IN_WORDS[best]}, marks {marks[best]} of {len(wrong)} erroneous traces, "
            f"{hits[best]} of them at the first wrong step"
        )
    threshold = _threshold(right, best)
    assert threshold is not None
    return FirstErrorRule(signal=best, threshold=threshold, traces=len(right), hit_rate=hits[best] / len(wrong))


def _threshold(right: Sequence[RatedTrace], signal: str) -> float | None:
    """The lowest of the thresholds of the sources that have enough right traces; of all together if none has."""
    lowest: dict[str, list[float]] = {}
    for trace in right:
        lowest.setdefault(trace.source, []).append(min(SIGNALS[signal](trace.steps)))
    found = [limit for of in lowest.values() if (limit := safe_threshold(of)) is not None]
    return min(found) if found else safe_threshold(list(itertools.chain.from_iterable(lowest.values())))
