"""Calibration: from a trace's reward to the probability that the trace is correct, and metrics of calibration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from tracereward.errors import InputError, check_choice

METHODS = ("platt", "temperature", "isotonic")
MIN_TRACES = 10
"""Minimum number of labelled traces to fit a calibration."""


@dataclass(frozen=True)
class Calibration:
    """A monotone map from trace rewards to probabilities; stored in ``tracereward.json``.

    Attributes:
        method: ``platt``: p = sigmoid(slope r + intercept) (Platt 1999); ``temperature``: p = sigmoid(slope r), slope
            = 1 / T (Guo et al. 2017); ``isotonic``: piecewise linear through `knots` (Zadrozny and Elkan 2002).
        slope: of ``platt`` and ``temperature``.
        intercept: of ``platt``.
        knots: pairs (reward, probability) of ``isotonic``, in increasing order of reward; constant outside them.
        traces: number of labelled traces used for the fit.
    """

    method: str
    slope: float = 1.0
    intercept: float = 0.0
    knots: tuple[tuple[float, float], ...] = ()
    traces: int = 0

    def __post_init__(self) -> None:
        check_choice("calibration method", self.method, METHODS)
        # JSON has lists where this has tuples.
        object.__setattr__(self, "knots", tuple((float(r), float(p)) for r, p in self.knots))
        if (self.method == "isotonic") != bool(self.knots):
            raise InputError(f"a calibration by {self.method} {'needs' if not self.knots else 'has no'} knots")

    def probability(self, reward: float) -> float:
        """Probability that a trace with this reward is correct."""
        return float(self.probabilities([reward])[0])

    def probabilities(self, rewards: Sequence[float]) -> np.ndarray:
        """Probabilities of several rewards, (n,) float64."""
        values = np.asarray(rewards, dtype=float)
        if self.method == "isotonic":
            known, probabilities = zip(*self.knots, strict=True)
            return np.interp(values, known, probabilities)
        return expit(self.slope * values + self.intercept)


def check_labels(correct: Sequence[bool]) -> None:
    """Refuse labels that no calibration can be fitted on.

    Raises:
        InputError: fewer than `MIN_TRACES` traces, or all of them correct or all wrong.
    """
    right = sum(map(bool, correct))
    wrong = len(correct) - right
    if right + wrong < MIN_TRACES or not right or not wrong:
        raise InputError(
            f"cannot calibrate on {right} right and {wrong} wrong traces: it needs {MIN_TRACES} or more, of both kinds"
        )


def fit_calibration(rewards: Sequence[float], correct: Sequence[bool], method: str = "platt") -> Calibration:
    """Fit on a small labelled set: a few dozen traces for ``platt``, hundreds for ``isotonic``.

    ``platt`` and ``temperature`` minimise the log loss; ``platt`` against Platt's smoothed targets (n + 1) / (n + 2)
    and 1 / (m + 2), so that the slope is finite for separable traces.

    Raises:
        InputError: see `check_labels`.
    """
    check_choice("calibration method", method, METHODS)
    values, labels = np.asarray(rewards, dtype=float), np.asarray(correct, dtype=bool)
    check_labels(labels.tolist())
    right = int(labels.sum())
    wrong = len(labels) - right
    if method == "isotonic":
        fit = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(values, labels)
        knots = zip(fit.X_thresholds_.tolist(), fit.y_thresholds_.tolist(), strict=True)
        return Calibration(method, knots=tuple(knots), traces=len(labels))
    if method == "temperature":
        best: Any = minimize_scalar(
            lambda log_slope: log_loss(expit(math.exp(log_slope) * values), labels),
            bounds=(-8.0, 8.0),
            method="bounded",
        )
        return Calibration(method, slope=math.exp(best.x), traces=len(labels))
    # Soft targets as weights: each trace counts t towards right and 1 - t towards wrong.
    target = np.where(labels, (right + 1) / (right + 2), 1 / (wrong + 2))
    centre, scale = float(values.mean()), float(values.std()) or 1.0  # the solver's steps suit values of size 1
    both = (np.concatenate([values, values])[:, None] - centre) / scale
    kinds = np.concatenate([np.ones(len(values)), np.zeros(len(values))])
    fit = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(
        both, kinds, sample_weight=np.concatenate([target, 1 - target])
    )
    slope = float(fit.coef_[0, 0]) / scale
    return Calibration(method, slope, float(fit.intercept_[0]) - slope * centre, traces=len(labels))


def log_loss(probabilities: Sequence[float] | np.ndarray, correct: Sequence[bool] | np.ndarray) -> float:
    """Mean negative log-likelihood of the labels, probabilities kept away from 0 and 1 by 1e-12."""
    p = np.clip(np.asarray(probabilities, dtype=float), 1e-12, 1 - 1e-12)
    return float(-np.where(np.asarray(correct, dtype=bool), np.log(p), np.log1p(-p)).mean())


def brier_score(probabilities: Sequence[float] | np.ndarray, correct: Sequence[bool]) -> float:
    """Mean squared difference of probability and label; 0.25 if every probability is one half (Brier 1950)."""
    difference = np.asarray(probabilities, dtype=float) - np.asarray(correct, dtype=float)
    return float((difference**2).mean())


@dataclass(frozen=True)
class Bin:
    """Traces with a probability in one interval: their mean probability, their accuracy and their number."""

    probability: float
    accuracy: float
    count: int


def reliability(probabilities: Sequence[float] | np.ndarray, correct: Sequence[bool], bins: int = 10) -> list[Bin]:
    """Non-empty bins of equal width over [0, 1], in increasing order."""
    p, labels = np.asarray(probabilities, dtype=float), np.asarray(correct, dtype=float)
    index = np.minimum((p * bins).astype(int), bins - 1)
    return [
        Bin(float(p[index == b].mean()), float(labels[index == b].mean()), int((index == b).sum()))
        for b in np.unique(index)
    ]


def expected_calibration_error(
    probabilities: Sequence[float] | np.ndarray, correct: Sequence[bool], bins: int = 10
) -> float:
    """sum over bins of (traces in it / all) * abs(accuracy - mean probability) (Naeini et al. 2015)."""
    found = reliability(probabilities, correct, bins)
    total = sum(b.count for b in found)
    return sum(b.count / total * abs(b.accuracy - b.probability) for b in found)
