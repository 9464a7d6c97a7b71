"""How well step scores find the first error: fitted thresholds, ProcessBench's F1, Hit@1, and chance.

Pure functions on lists of scores, from any model or baseline. `rewards.first_error_rules` has the predictions.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracereward.metrics import bootstrap_interval, wilson_interval
from tracereward.rewards.first_error_rules import first_below, lowest_steps

STEP_AGGREGATES = ("mean", "min")


def step_values(values: Sequence[float], steps: Sequence[Sequence[int]], aggregate: str) -> list[float]:
    """The `mean` or the `min` of each step's token values."""
    if aggregate == "min":
        return [min(values[t] for t in tokens) for tokens in steps]
    return [sum(values[t] for t in tokens) / len(tokens) for tokens in steps]


def f1(acc_error: Any, acc_correct: Any) -> Any:
    """ProcessBench's F1 (arXiv 2412.06559): the harmonic mean of two accuracies, 0 where both are 0.

    Args:
        acc_error: share of erroneous traces whose first error is found; a number or an array.
        acc_correct: share of correct traces in which no error is seen; likewise.
    """
    total = np.add(acc_error, acc_correct)
    return np.where(total == 0, 0.0, 2 * np.multiply(acc_error, acc_correct) / np.where(total == 0, 1.0, total))


def fit_threshold(scores: Sequence[Sequence[float]], first_errors: Sequence[int | None]) -> float:
    """The threshold with the largest F1, of all observed scores; of equally good ones the lowest.

    Exact, in O(n log n) for n scores. A trace with first error k is right for thresholds in
    (s_k, min(s_0 ... s_{k-1})], a correct one for those in (-inf, min(s)]. F1 is thus constant between two observed
    scores, and 0 above the largest. To be fitted on other traces than those it is judged on.

    Args:
        scores: step scores of each trace.
        first_errors: index of the first wrong step, None for a correct trace.

    Raises:
        ValueError: erroneous or correct traces are missing (then F1 is not defined), or a score is not finite;
            infinity is allowed, for a step that no threshold marks.
    """
    candidates = np.unique(np.concatenate([np.asarray(trace, dtype=float) for trace in scores]))
    candidates = candidates[candidates != math.inf]
    if not np.isfinite(candidates).all():
        raise ValueError("a step score is not finite")
    erroneous = sum(first_error is not None for first_error in first_errors)
    if not 0 < erroneous < len(first_errors):
        raise ValueError("a threshold needs erroneous and correct traces to be fitted on")
    # Rows: erroneous and correct traces; a trace adds 1 where its interval starts and takes 1 off behind its end.
    changes = np.zeros((2, len(candidates) + 1))
    for trace, first_error in zip(scores, first_errors, strict=True):
        before = trace if first_error is None else trace[:first_error]
        low = -math.inf if first_error is None else trace[first_error]
        high = min(before, default=math.inf)
        if low < high:
            start, end = np.searchsorted(candidates, [low, high], side="right")
            changes[int(first_error is None), start] += 1
            changes[int(first_error is None), end] -= 1
    found, passed = changes.cumsum(axis=1)[:, :-1]
    values = f1(found / erroneous, passed / (len(first_errors) - erroneous))
    return float(candidates[int(np.argmax(values))])


def hit(scores: Sequence[float], first_error: int, within: int = 0) -> float:
    """Whether the lowest step lies at most `within` steps from the first error.

    Of several lowest steps each counts its share, as if one were drawn: a scorer that cannot tell steps apart has
    exactly the hits of chance, however early errors come.
    """
    places = lowest_steps(scores)
    return sum(abs(step - first_error) <= within for step in places) / len(places)


def chance(steps: int, first_error: int, within: int = 0) -> float:
    """Exact expectation of `hit` for a step drawn uniformly from the trace's `steps`."""
    return (min(steps - 1, first_error + within) - max(0, first_error - within) + 1) / steps


@dataclass(frozen=True)
class Outcome:
    """Result of a scorer on one trace; fractions in [0, 1] rather than flags if ties or chance decide.

    Attributes:
        is_error: whether the trace has an error. `hit` ... `chance_within_1` are used only then.
        found: whether the prediction is correct: the first error, or none.
        hit: whether the lowest step is the first error.
        hit_within_1: whether it is at most one step away.
        chance: expectation of `hit` for a random step.
        chance_within_1: expectation of `hit_within_1` for a random step.
    """

    is_error: bool
    found: float
    hit: float = 0.0
    hit_within_1: float = 0.0
    chance: float = 0.0
    chance_within_1: float = 0.0


def outcome(scores: Sequence[float], first_error: int | None, predicted: int | None) -> Outcome:
    """Outcome of a trace's step scores and the first error predicted from them (None: no error)."""
    found = float(predicted == first_error)
    if first_error is None:
        return Outcome(False, found)
    return Outcome(
        is_error=True,
        found=found,
        hit=hit(scores, first_error),
        hit_within_1=hit(scores, first_error, 1),
        chance=chance(len(scores), first_error),
        chance_within_1=chance(len(scores), first_error, 1),
    )


def outcomes(scores: Sequence[Sequence[float]], first_errors: Sequence[int | None], threshold: float) -> list[Outcome]:
    """Outcome of each trace, with the prediction of `first_below`."""
    pairs = zip(scores, first_errors, strict=True)
    return [outcome(of_trace, first_error, first_below(of_trace, threshold)) for of_trace, first_error in pairs]


def random_outcome(steps: int, first_error: int | None) -> Outcome:
    """Expected outcome of guessing uniformly among the n steps and "no error": found with probability 1 / (n + 1)."""
    found = 1 / (steps + 1)
    if first_error is None:
        return Outcome(False, found)
    at_1, within_1 = chance(steps, first_error), chance(steps, first_error, 1)
    return Outcome(is_error=True, found=found, hit=at_1, hit_within_1=within_1, chance=at_1, chance_within_1=within_1)


def summarise(results: Sequence[Outcome], questions: Sequence[Hashable], seed: int = 0) -> dict[str, Any]:
    """Metrics of one scorer, ready for JSON.

    acc_error and acc_correct are the mean `found` of erroneous and of correct traces, f1 their harmonic mean. hit_at_1
    and hit_within_1 are means over erroneous traces, and their ``_normalised`` (hit - chance) / (1 - chance), with the
    mean chance: 0 is a random step, 1 always right.

    Each has an ``_interval`` of 95 %: Wilson's for the accuracies (a bootstrap if fractions, not flags, are averaged),
    and for the others a bootstrap over questions, because traces of one question are correlated. Undefined metrics (no
    erroneous trace, no correct one, chance 1) are None.

    Args:
        results: one outcome per trace.
        questions: the question of each trace.
        seed: seed of the bootstraps.
    """
    error = np.array([o.is_error for o in results], dtype=float)
    columns = {name: np.array([getattr(o, name) for o in results], dtype=float) for name in vars(results[0])}
    found, at_1, within_1 = columns["found"], columns["hit"], columns["hit_within_1"]
    chance_1, chance_within = columns["chance"], columns["chance_within_1"]
    right = (found * error, error, found * (1 - error), 1 - error)
    over: dict[str, Any] = {"questions": questions, "seed": seed}
    result: dict[str, Any] = _with_interval("f1", right, _f1_of_counts, **over)
    result |= _accuracy("acc_error", found[error == 1]) | _accuracy("acc_correct", found[error == 0])
    result |= _with_interval("hit_at_1", (at_1, error), np.divide, **over)
    result |= _with_interval("hit_within_1", (within_1, error), np.divide, **over)
    result |= _with_interval("hit_at_1_normalised", (at_1, chance_1, error), _normalised, **over)
    result |= _with_interval("hit_within_1_normalised", (within_1, chance_within, error), _normalised, **over)
    return result


def _f1_of_counts(found: Any, erroneous: Any, passed: Any, correct: Any) -> Any:
    """F1 of found / erroneous and passed / correct, all counts of traces."""
    return f1(np.divide(found, erroneous), np.divide(passed, correct))


def _normalised(hits: Any, chances: Any, count: Any) -> Any:
    """(h - c) / (1 - c) of the means h = hits / count and c = chances / count."""
    return np.divide(hits - chances, count - chances)


def _accuracy(name: str, found: np.ndarray) -> dict[str, Any]:
    """The mean and its 95 % interval."""
    if len(found) == 0:
        return {name: None, f"{name}_interval": None}
    flags = bool(np.isin(found, (0, 1)).all())
    interval = wilson_interval(int(found.sum()), len(found)) if flags else bootstrap_interval(found.tolist())
    return {name: float(found.mean()), f"{name}_interval": list(interval)}


def _with_interval(
    name: str,
    columns: Sequence[np.ndarray],
    statistic: Callable[..., Any],
    questions: Sequence[Hashable],
    *,
    seed: int,
    resamples: int = 2000,
) -> dict[str, Any]:
    """A statistic of column sums, and its 95 % percentile bootstrap interval over questions.

    Args:
        name: key of the result.
        columns: k arrays, one value per trace.
        statistic: function of k arrays of sums.
        questions: the question of each trace; all its traces are resampled together.
        seed: seed of the resampling.
        resamples: number of resamples.
    """
    numbers = {question: number for number, question in enumerate(dict.fromkeys(questions))}
    codes = [numbers[question] for question in questions]
    sums = np.stack([np.bincount(codes, weights=column, minlength=len(numbers)) for column in columns])
    draws = np.random.default_rng(seed).multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*sums.sum(axis=1)))
        values = statistic(*(sums @ draws.T))
    values = values[np.isfinite(values)]
    if not math.isfinite(value):
        return {name: None, f"{name}_interval": None}
    return {name: value, f"{name}_interval": np.percentile(values, [2.5, 97.5]).tolist() if len(values) else None}
