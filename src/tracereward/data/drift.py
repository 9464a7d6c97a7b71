"""Drift: whether the traces of two periods differ in the means of their features, tested by permuting questions.

Traces of one question are alike, so the questions are what is exchangeable: each counts once, by its traces' mean.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tracereward.data.surface_probe import probe_model
from tracereward.metrics import auroc, holm

ALPHA = 0.05
"""Level of the family of tests: the share of comparisons without a drift in which any feature is said to have one."""
PERMUTATIONS = 9_999
"""So that the smallest p, 1 in 10,000, is significant also after the correction for up to 500 features."""
MIN_QUESTIONS = 10
"""Of each period: the smallest p of fewer could not be significant for twenty features."""
PROBE = "surface_probe"
_CHUNK = 256  # permutations at a time: their weights for 10,000 questions take 10 MB
_SEED = 0  # the same traces give the same p

Means = Mapping[Hashable, np.ndarray]
"""The mean features, shape (F,), of the traces of each question."""


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A feature of two periods.

    Attributes:
        name: of the feature.
        before: mean over the questions of the first period.
        now: mean over the questions of the second.
        size: their difference in standard deviations over the questions of both periods; at most 2 if they are as many.
        p: of the permutation test, two-sided.
        p_corrected: by Holm's method, for all features that vary.
    """

    name: str
    before: float
    now: float
    size: float
    p: float
    p_corrected: float

    @property
    def varies(self) -> bool:
        """Whether it is tested: not the same value for all questions."""
        return self.size != 0 or self.p < 1

    @property
    def drifted(self) -> bool:
        """Whether the change is significant after the correction."""
        return self.p_corrected <= ALPHA


@dataclass(frozen=True, kw_only=True)
class Period:
    """The traces of a period.

    Attributes:
        questions: the question of each of N traces.
        features: by name, one value for each trace.
    """

    questions: Sequence[Hashable]
    features: Mapping[str, Sequence[float]]

    def values(self, names: Sequence[str]) -> np.ndarray:
        """Features as an array, shape (N, F)."""
        return np.array([self.features[name] for name in names], dtype=float).T


def question_means(questions: Sequence[Hashable], values: np.ndarray) -> dict[Hashable, np.ndarray]:
    """Mean of the rows of each question: N questions and an array of shape (N, F) as `Means`."""
    rows: dict[Hashable, list[int]] = {}
    for index, question in enumerate(questions):
        rows.setdefault(question, []).append(index)
    return {question: values[found].mean(axis=0) for question, found in rows.items()}


def permutation_p(before: Means, now: Means, permutations: int = PERMUTATIONS, seed: int = _SEED) -> np.ndarray:
    """p of each feature under the hypothesis that the period of a question's traces does not matter, shape (F,).

    The statistic is T = mean over questions now - mean over questions before. A question of one period only may be of
    either, and their numbers are kept; the two means of a question that both have may be swapped. p is the share of T*,
    the observed one counted in, that are at least as far as T from the mean of all T*: exact for any sample size.
    """
    shared = [question for question in now if question in before]
    old = [question for question in before if question not in now]
    new = [question for question in now if question not in before]
    # T* = constant + (1 / n_now + 1 / n_before) x weight, where weight sums what counts as now and differs.
    width = len(next(iter(now.values())))
    gains = np.array([before[question] - now[question] for question in shared]).reshape(-1, width)
    single = np.array([*(before[q] for q in old), *(now[q] for q in new)]).reshape(-1, width)
    is_new = np.r_[np.zeros(len(old)), np.ones(len(new))]
    expected = gains.sum(axis=0) / 2 + single.sum(axis=0) * (is_new.mean() if len(single) else 0.0)
    observed = np.abs(is_new @ single - expected)
    # Equal sums differ by rounding.
    slack = 1e-9 * (np.abs(gains).sum(axis=0) + np.abs(single).sum(axis=0))
    rng = np.random.default_rng(seed)
    extreme = np.ones(width)
    for start in range(0, permutations, _CHUNK):
        count = min(_CHUNK, permutations - start)
        swapped = rng.integers(0, 2, size=(count, len(shared)))
        labels = rng.permuted(np.tile(is_new, (count, 1)), axis=1)
        weights = swapped @ gains + labels @ single
        extreme += (np.abs(weights - expected) >= observed - slack).sum(axis=0)
    return extreme / (permutations + 1)


def probe_scores(before: Period, now: Period, names: Sequence[str], seed: int = _SEED) -> tuple[Means, Means, float]:
    """Scores of a classifier of the two periods, on questions that it was not fitted on: a two-sample test.

    Half of the questions of either period, those of both together, fit a logistic regression; the others are scored.

    Args:
        before: the first period.
        now: the second.
        names: the features that it reads.
        seed: of the halves.

    Returns:
        The mean score of each question before and now, shape (1,), and the AUROC of the scores of all traces.
    """
    rng = np.random.default_rng(seed)
    fitted: set[Hashable] = set()
    old, new = set(before.questions), set(now.questions)
    for group in (old & new, old - new, new - old):
        listed = sorted(group, key=str)  # sets have no order that two processes share
        fitted |= {listed[index] for index in rng.permutation(len(listed))[: len(listed) // 2]}
    values = np.concatenate([before.values(names), now.values(names)])
    questions = [*before.questions, *now.questions]
    is_now = np.arange(len(questions)) >= len(before.questions)
    train = np.array([question in fitted for question in questions])
    scores = probe_model().fit(values[train], is_now[train]).decision_function(values[~train])
    rest = [question for question in questions if question not in fitted]
    later = is_now[~train]
    parts = [question_means([q for q, one in zip(rest, mask) if one], scores[mask, None]) for mask in (~later, later)]
    return parts[0], parts[1], auroc(scores.tolist(), later.tolist())


def shifts(
    before: Period, now: Period, probed: Sequence[str] = (), permutations: int = PERMUTATIONS
) -> tuple[list[Shift], float]:
    """Compare all features of two periods.

    Args:
        before: the first period.
        now: the second, with the same features.
        probed: features that a classifier of the two periods reads together; its scores are the feature `PROBE`.
        permutations: of each test.

    Returns:
        A shift for each feature, and for the probe, and the probe's held-out AUROC (nan without `probed`).
    """
    names = list(now.features)
    first, second = (question_means(one.questions, one.values(names)) for one in (before, now))
    found = [_compared(name, index, first, second) for index, name in enumerate(names)]
    p = permutation_p(first, second, permutations).tolist()
    area = float("nan")
    if probed:
        first, second, area = probe_scores(before, now, probed)
        found.append(_compared(PROBE, 0, first, second))
        p += permutation_p(first, second, permutations).tolist()
    # A feature without variation cannot be significant; without it the others have more power.
    varied = [index for index, (*_, spread) in enumerate(found) if spread > 0]
    corrected = dict(zip(varied, holm([p[index] for index in varied])))
    return [
        Shift(
            name=name,
            before=old,
            now=new,
            size=(new - old) / spread if spread > 0 else 0.0,
            p=p[index],
            p_corrected=corrected.get(index, 1.0),
        )
        for index, (name, old, new, spread) in enumerate(found)
    ], area


def _compared(name: str, index: int, before: Means, now: Means) -> tuple[str, float, float, float]:
    """Name, mean before, mean now, and the standard deviation over the questions of both."""
    old, new = (np.array([means[index] for means in one.values()]) for one in (before, now))
    both = np.concatenate([old, new])
    return name, float(old.mean()), float(new.mean()), float(both.std()) if np.ptp(both) else 0.0
