"""A read-out: a linear head on the mean hidden state of one layer of a frozen model, fitted by convex optimisation.

With x_i the state of trace i, averaged over its tokens and standardised, the trace's score is s_i = v . x_i, and the
token's logit is the same map applied to the token's own state: the trace's mean logit is s_i.

- ``pairwise``: mean over questions of the mean over their pairs of a positive p and a negative n of
  log(1 + exp(s_n - s_p)): only differences within a question count (Bradley and Terry 1952).
- ``bce``: weighted mean of log(1 + exp(-+ (s_i + b))): what a question's level is worth is learned too.

Both with penalty / 2 |v|^2. Layer and penalty have the highest mean within-question AUROC in cross-validation over
questions; the head is the mean of the folds' heads, each of which has seen all but one fold.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from tracereward.errors import InputError
from tracereward.metrics import within_prompt_auroc

DEPTHS = (0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Layers that are tried, as shares of the depth."""
PENALTIES = (1e-3, 1e-2, 1e-1)
PAIRS = 64  # of a question: more say little that is new


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Labelled traces, N of them.

    Attributes:
        labels: (N,) bool; True for a positive.
        questions: (N,) which question a trace answers.
        weights: (N,) weight of a trace, all the same or of `balance_weights`; see `pairs`.
    """

    labels: np.ndarray
    questions: np.ndarray
    weights: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "Examples":
        return Examples(labels=self.labels[rows], questions=self.questions[rows], weights=self.weights[rows])


@dataclass(frozen=True, kw_only=True)
class Validated:
    """Cross-validation of one layer and penalty: the mean within-question AUROC over questions, by the labels."""

    layer: int
    penalty: float
    auroc: float


@dataclass(frozen=True, kw_only=True)
class Readout:
    """A fitted read-out.

    Attributes:
        layer: the layer that it reads, from 1.
        penalty: the chosen penalty.
        weight: (H,) map of a token's normalised state to its logit.
        bias: of the logit; the mean score of positives and of negatives are equally far from 0.
        table: all that was tried.
        scores: (N,) of each example, by the fold's head that has not seen its question.
        folds: (folds, H) the folds' heads, of which `weight` is the mean.
    """

    layer: int
    penalty: float
    weight: np.ndarray
    bias: float
    table: tuple[Validated, ...]
    scores: np.ndarray
    folds: np.ndarray


def layers_to_try(layers: Sequence[int]) -> list[int]:
    """The layers at `DEPTHS` of those that can be read."""
    return sorted({min(layers, key=lambda layer: abs(layer - depth * layers[-1])) for depth in DEPTHS})


def fit_readout(
    states: Tensor,
    layers: Sequence[int],
    examples: Examples,
    objective: str = "pairwise",
    *,
    folds: int = 5,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> Readout:
    """Choose layer and penalty by cross-validation over questions, and fit the head.

    Args:
        states: (N, L, H), see `hidden_states.TraceStates`.
        layers: (L,) the layers of `states`.
        examples: the labels.
        objective: ``pairwise`` or ``bce``.
        folds: of the cross-validation; at most the number of questions.
        seed: of the folds and of sampled pairs.
        progress: called after each fit.

    Raises:
        InputError: fewer than two questions can be learned from.
    """
    fold_of = fold_numbers(examples, folds, seed)
    tried = {}
    for layer in layers_to_try(layers):
        values = states[:, list(layers).index(layer)].float().numpy()
        for penalty in PENALTIES:
            tried[layer, penalty] = _cross_fitted(values, examples, fold_of, objective, penalty=penalty, seed=seed)
            progress()
    table = tuple(
        Validated(layer=layer, penalty=penalty, auroc=_auroc(scores, examples))
        for (layer, penalty), (scores, _) in tried.items()
    )
    best = max(table, key=lambda one: one.auroc)
    scores, heads = tried[best.layer, best.penalty]
    weight = heads.mean(0)
    values = states[:, list(layers).index(best.layer)].float().numpy() @ weight
    middle = (values[examples.labels].mean() + values[~examples.labels].mean()) / 2
    return Readout(
        layer=best.layer,
        penalty=best.penalty,
        weight=weight,
        bias=-float(middle),
        table=table,
        scores=scores - middle,
        folds=heads,
    )


def fold_numbers(examples: Examples, folds: int, seed: int) -> np.ndarray:
    """The fold of each example; the questions that have both classes are spread evenly.

    Raises:
        InputError: fewer than two questions have a positive and a negative.
    """
    both = set(examples.questions[examples.labels].tolist()) & set(examples.questions[~examples.labels].tolist())
    if len(both) < 2:
        raise InputError(
            f"{len(both)} questions have a positive and a negative trace, and a read-out needs 2 at least (better 50): "
            "add candidates, or choose another label rule"
        )
    folds = min(folds, len(both))
    order = sorted(both)
    random.Random(f"folds {seed}").shuffle(order)
    rest = sorted(set(examples.questions.tolist()) - both)
    number = {question: place % folds for place, question in enumerate([*order, *rest])}
    return np.array([number[question] for question in examples.questions.tolist()])


def _cross_fitted(
    values: np.ndarray, examples: Examples, fold_of: np.ndarray, objective: str, *, penalty: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) scores by heads that have not seen the question, and (folds, H) the heads."""
    scores, heads = np.zeros(len(values)), []
    for fold in range(int(fold_of.max()) + 1):
        seen = fold_of != fold
        head = fit_head(values[seen], examples[seen], objective, penalty=penalty, seed=seed)
        heads.append(head)
        scores[~seen] = values[~seen] @ head
    return scores, np.stack(heads)


def _auroc(scores: np.ndarray, examples: Examples) -> float:
    return within_prompt_auroc(scores.tolist(), examples.labels.tolist(), examples.questions.tolist())


def fit_head(values: np.ndarray, examples: Examples, objective: str, *, penalty: float, seed: int = 0) -> np.ndarray:
    """(H,) the map of the objective's minimum, for states that are not standardised."""
    scale = values.std(0) + 1e-6
    standard = (values - values.mean(0)) / scale
    if objective == "pairwise":
        risk = _pairwise_risk(examples, seed)
        found = _minimum(standard, risk, penalty, intercept=False)
    else:
        found = _minimum(standard, _logistic_risk(examples), penalty, intercept=True)
    return found / scale


Risk = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""(N,) scores -> the risk, and its (N,) gradient."""


def _pairwise_risk(examples: Examples, seed: int) -> Risk:
    high, low, weights = pairs(examples, seed)

    def risk(scores: np.ndarray) -> tuple[float, np.ndarray]:
        gap = scores[high] - scores[low]
        slope = weights * expit(-gap)
        gradient = np.bincount(low, slope, len(scores)) - np.bincount(high, slope, len(scores))
        return float(weights @ np.logaddexp(0, -gap)), gradient

    return risk


def _logistic_risk(examples: Examples) -> Risk:
    sign, weights = np.where(examples.labels, 1.0, -1.0), examples.weights / examples.weights.sum()

    def risk(scores: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * scores
        return float(weights @ np.logaddexp(0, -margin)), -weights * sign * expit(-margin)

    return risk


def _minimum(standard: np.ndarray, risk: Risk, penalty: float, *, intercept: bool) -> np.ndarray:
    """(H,) argmin over v of min over b of risk(X v + b) + penalty / 2 |v|^2."""
    size = standard.shape[1]

    def value(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        v, b = parameters[:size], parameters[size:].sum()
        loss, slope = risk(standard @ v + b)
        gradient = np.concatenate([slope @ standard + penalty * v, np.full(len(parameters) - size, slope.sum())])
        return loss + penalty / 2 * float(v @ v), gradient

    start = np.zeros(size + intercept)
    return minimize(value, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x[:size]


def pairs(examples: Examples, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of a positive and a negative of one question: their indices, and weights.

    All pairs of a question weigh 1 / questions together. If the traces' weights differ, a pair's is proportional to
    their product, and a question's to the total of its negatives: where positives have the same, as in
    `balance_weights`, each trace weighs in its pairs what it weighs itself. Of more than `PAIRS`, as many are sampled.
    """
    equal = np.ptp(examples.weights) == 0
    rng = np.random.default_rng(seed)
    high, low, weights = [], [], []
    for question in np.unique(examples.questions):
        here = np.flatnonzero(examples.questions == question)
        above, below = here[examples.labels[here]], here[~examples.labels[here]]
        count = len(above) * len(below)
        if not count:
            continue
        chosen = np.arange(count) if count <= PAIRS else rng.choice(count, PAIRS, replace=False)
        high.append(above[chosen // len(below)])
        low.append(below[chosen % len(below)])
        products = examples.weights[high[-1]] * examples.weights[low[-1]]
        question_weight = 1.0 if equal else examples.weights[below].sum()
        weights.append(question_weight * products / max(products.sum(), np.finfo(float).tiny))
    together = np.concatenate(weights)
    return np.concatenate(high), np.concatenate(low), together / max(together.sum(), np.finfo(float).tiny)
