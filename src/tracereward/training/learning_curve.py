"""How a read-out's quality grows with the number of questions, and what more of them would give.

Read-outs are fitted on random shares of the questions to train on, layers and penalty included, and measured on the
same held-out questions. Their mean AUROC within the question is extrapolated as a - b / sqrt(n), by least squares: the
error of an estimate shrinks with the square root of its sample. Intervals are bootstrapped over the held-out questions
and the random shares.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tracereward.errors import InputError
from tracereward.metrics import auroc
from tracereward.training.readout import Examples, fit_readout
from tracereward.verdict import Verdict

SHARES = (0.1, 0.2, 0.4, 0.7, 1.0)
REPEATS = 3  # random shares of each size
RESAMPLES = 1000
BEYOND = (2, 4)  # times as many questions


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean AUROC within the question, with its 95 % interval.

    Attributes:
        questions: number of questions to train on.
        value: measured, or extrapolated.
        low: of the interval.
        high: of the interval.
    """

    questions: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """Measured and extrapolated quality by the number of questions.

    Attributes:
        measured: in increasing order of questions.
        verdicts: at each measured point; None if there is none.
        beyond: extrapolated.
        check: what the points but the last predict for the last; nan if they are fewer than two.
    """

    measured: tuple[Estimate, ...]
    verdicts: tuple[Verdict | None, ...]
    beyond: tuple[Estimate, ...]
    check: float

    @property
    def line(self) -> str:
        """The curve in one sentence."""
        shown = ", ".join(f"{one.value:.3f} with {one.questions}" for one in self.measured)
        text = f"Learning curve, AUROC within the question by questions to learn from: {shown}"
        if self.beyond:
            more = ", ".join(
                f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f}) with {one.questions}" for one in self.beyond
            )
            text += f"; extrapolated: {more}"
        if math.isfinite(self.check):
            last = self.measured[-1]
            text += f"; the points before the last predict {self.check:.3f} for {last.questions} questions"
        return f"{text}."

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers may be nan."""
        return {
            "line": self.line,
            "measured": [vars(one) for one in self.measured],
            "verdicts": [None if one is None else one.to_dict() for one in self.verdicts],
            "extrapolated": [vars(one) for one in self.beyond],
            "check": self.check,
        }


def learning_curve(
    states: tuple[Tensor, Tensor],
    layers: Sequence[int],
    examples: Examples,
    held_out: Examples,
    *,
    objective: str,
    judged: Callable[[np.ndarray], Verdict | None],
    seed: int,
) -> LearningCurve:
    """Fit and measure read-outs on shares of the questions that have a positive; the others are always there.

    Args:
        states: of the examples and of the held-out traces, each (N, L, H).
        layers: (L,) the layers of the states.
        examples: to learn from.
        held_out: labels say which traces are right.
        objective: see `fit_readout`.
        judged: the verdict on rewards of the held-out traces.
        seed: of the random shares.

    Raises:
        InputError: no held-out question has right and wrong traces.
    """
    numbers = np.unique(examples.questions[examples.labels])
    alone = ~np.isin(examples.questions, numbers)
    sizes = sorted({max(2, round(share * len(numbers))) for share in SHARES})
    rows: dict[int, list[np.ndarray]] = {}
    verdicts: dict[int, Verdict | None] = {}
    for size in sizes:
        for repeat in range(1 if size == len(numbers) else REPEATS):
            chosen = np.random.default_rng((seed, size, repeat)).permutation(numbers)[:size]
            here = np.flatnonzero(np.isin(examples.questions, chosen) | alone)
            try:
                fitted = fit_readout(states[0][here], layers, examples[here], objective, seed=seed)
            except InputError:  # too few of them have both classes
                continue
            scores = fitted.score(states[1], layers)
            rows.setdefault(size, []).append(within_questions(scores, held_out))
            if repeat == 0:
                verdicts[size] = judged(scores)
    values = {size: np.stack(found) for size, found in rows.items()}  # (repeats, held-out questions)
    if not values or not next(iter(values.values())).size:
        raise InputError("no learning curve: no held-out question has right and wrong traces")
    return LearningCurve(
        measured=tuple(_measured(size, found, seed) for size, found in values.items()),
        verdicts=tuple(verdicts.get(size) for size in values),
        beyond=tuple(extrapolated(values, times * len(numbers), seed) for times in BEYOND if len(values) > 2),
        check=_check(values),
    )


def within_questions(scores: np.ndarray, known: Examples) -> np.ndarray:
    """The AUROC of each question that has both right and wrong traces, in the order of the questions' numbers."""
    found = []
    for question in np.unique(known.questions):
        here = known.questions == question
        labels = known.labels[here]
        if labels.any() and not labels.all():
            found.append(auroc(scores[here].tolist(), labels.tolist()))
    return np.array(found)


def _measured(size: int, values: np.ndarray, seed: int) -> Estimate:
    low, high = np.quantile([mean[0] for mean in _resampled([values], seed)], (0.025, 0.975))
    return Estimate(questions=size, value=float(values.mean()), low=float(low), high=float(high))


def _resampled(values: Sequence[np.ndarray], seed: int) -> list[list[float]]:
    """Means at each size for resampled held-out questions, the same at all sizes, and one of its shares."""
    rng = np.random.default_rng(seed)
    count = values[0].shape[1]
    found = []
    for _ in range(RESAMPLES):
        questions = rng.integers(count, size=count)
        found.append([float(of_size[rng.integers(len(of_size)), questions].mean()) for of_size in values])
    return found


def extrapolated(values: dict[int, np.ndarray], questions: int, seed: int) -> Estimate:
    """What a - b / sqrt(n) gives for a number of questions.

    Args:
        values: (repeats, held-out questions) AUROCs by the number of questions learned from; three sizes or more.
        questions: n.
        seed: of the bootstrap.
    """
    sizes = list(values)
    value = _predicted(sizes, [float(of_size.mean()) for of_size in values.values()], questions)
    found = [_predicted(sizes, means, questions) for means in _resampled(list(values.values()), seed)]
    low, high = np.quantile(found, (0.025, 0.975))
    return Estimate(questions=questions, value=value, low=float(low), high=float(high))


def _predicted(sizes: Sequence[int], means: Sequence[float], questions: int) -> float:
    """The least-squares a - b / sqrt(n) at `questions`, within 0 and 1."""
    slope, level = np.polyfit(1 / np.sqrt(sizes), means, 1)
    return float(np.clip(level + slope / math.sqrt(questions), 0, 1))


def _check(values: dict[int, np.ndarray]) -> float:
    sizes, means = list(values), [float(of_size.mean()) for of_size in values.values()]
    return _predicted(sizes[:-1], means[:-1], sizes[-1]) if len(sizes) > 2 else math.nan
