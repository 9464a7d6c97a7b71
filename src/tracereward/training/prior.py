"""The share of positives among unlabelled traces, from the scores of a classifier of positives against unlabelled."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.9  # of the bound
SLACK = 0.01  # gamma of the paper: how much the chosen threshold's bound counts beyond its own width


class Prior(NamedTuple):
    """An estimated share of positives.

    Attributes:
        value: the estimate.
        upper: with probability `CONFIDENCE` the share is at most this. There is no lower bound without the assumption
            that the highest scores are all of positives; where no threshold is pure, the estimate is too high.
        threshold: the score at and above which the unlabelled are compared with the positives.
    """

    value: float
    upper: float
    threshold: float


def estimate_prior(positive_scores: ArrayLike, unlabelled_scores: ArrayLike) -> Prior:
    """Best-bin estimate of the mixture proportion (Garg et al. 2021, arXiv 2111.00980, algorithm 1).

    With q_p(c) and q_u(c) the shares of positive and of unlabelled scores that are at least c, unlabelled scores hold
    at most q_u(c) / q_p(c) positives, and exactly so many if all of them at and above c are of positives. High
    thresholds are pure and noisy, so c minimises the ratio's upper bound

        q_u(c) / q_p(c) + (1 + gamma) / q_p(c) * (w_u + w_p),   w_n = sqrt(log(4 / delta) / (2 n))

    where w_n bounds the error of an empirical distribution (Dvoretzky, Kiefer and Wolfowitz 1956) at all c at once.

    Args:
        positive_scores: of held-out positives: those the classifier was trained on score too high.
        unlabelled_scores: of held-out unlabelled traces; ideally of the same questions.

    Raises:
        ValueError: one of the two is empty, or holds a number that is not finite.
    """
    positive, unlabelled = (
        np.sort(np.asarray(scores, float).ravel()) for scores in (positive_scores, unlabelled_scores)
    )
    if not len(positive) or not len(unlabelled) or not np.isfinite([*positive, *unlabelled]).all():
        raise ValueError("the prior needs finite scores of positives and of unlabelled traces")
    thresholds = np.unique(positive)  # between two of them q_p is constant and q_u only larger: no better bound
    q_p, q_u = (1 - np.searchsorted(scores, thresholds) / len(scores) for scores in (positive, unlabelled))
    w_p, w_u = (math.sqrt(math.log(4 / (1 - CONFIDENCE)) / (2 * len(scores))) for scores in (positive, unlabelled))
    best = int(np.argmin((q_u + (1 + SLACK) * (w_u + w_p)) / q_p))
    ratio = q_u[best] / q_p[best]
    upper = (q_u[best] + w_u) / (q_p[best] - w_p) if q_p[best] > w_p else 1.0
    return Prior(value=float(min(1, ratio)), upper=float(min(1, upper)), threshold=float(thresholds[best]))
