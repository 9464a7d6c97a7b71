"""A read-out: linear heads on mean hidden states of one layer of a frozen model or several, by convex optimisation.

With x_i the state of trace i after a layer, averaged over its tokens and standardised, the trace's score is
s_i = v . x_i, and the token's logit is the same map applied to the token's own state: the trace's mean logit is s_i.

- ``pairwise``: mean over questions of the mean over their pairs of a positive p and a negative n of
  log(1 + exp(s_n - s_p)): only differences within a question count (Bradley and Terry 1952).
- ``bce``: weighted mean of log(1 + exp(-+ (s_i + b))): what a question's level is worth is learned too.

Both with penalty / 2 |v|^2. The mean of layers is the mean over the tried layers l of s_il d / d_l, where d_l is the
standard deviation of s_il over the traces that the head was fitted on, and d the mean of d_l over the layers: each
layer has the same spread, and the mean's logits are of the size of one layer's.

Layer, or the mean of layers, and penalty have the highest mean within-question AUROC in cross-validation over
questions; the head is the mean of the folds' heads, each of which has seen all but one fold.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit
from torch import Tensor

from tracereward.errors import InputError
from tracereward.metrics import within_prompt_auroc

DEPTHS = (0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Layers that are tried, as shares of the depth."""
PENALTIES = (1e-2, 1e-1, 1.0)
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
    """Cross-validation of one layer or the mean of several, and a penalty.

    Attributes:
        layers: that are read, from 1.
        penalty: of the heads.
        auroc: the mean within-question AUROC over questions, by the labels.
    """

    layers: tuple[int, ...]
    penalty: float
    auroc: float


@dataclass(frozen=True, kw_only=True)
class CrossFitted(Validated):
    """Heads of the folds.

    Attributes:
        scores: (N,) of each example, by the fold's head that has not seen its question.
        heads: (folds, L, H) the folds' maps of a token's normalised states to its logit.
    """

    scores: np.ndarray
    heads: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Readout:
    """A fitted read-out.

    Attributes:
        layers: the L layers that it reads, from 1.
        penalty: the chosen penalty.
        weight: (L, H); a token's logit is the sum over layers of weight . its normalised state.
        bias: of the logit; the mean score of positives and of negatives are equally far from 0.
        table: all that was tried.
        scores: (N,) of each example, by the fold's head that has not seen its question.
        folds: (folds, L, H) the folds' heads, of which `weight` is the mean.
    """

    layers: tuple[int, ...]
    penalty: float
    weight: np.ndarray
    bias: float
    table: tuple[Validated, ...]
    scores: np.ndarray
    folds: np.ndarray

    @property
    def chosen(self) -> Validated:
        """Its own row of the table."""
        return next(one for one in self.table if (one.layers, one.penalty) == (self.layers, self.penalty))

    def score(self, states: Tensor, layers: Sequence[int]) -> np.ndarray:
        """(N,) scores of traces with (N, L', H) `states` after L' `layers`."""
        return _mapped(states, layers, self.layers, self.weight) + self.bias


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
    """Choose layers and penalty by cross-validation over questions, and fit the head; arguments as for `cross_fit`.

    Raises:
        InputError: fewer than two questions can be learned from.
    """
    tried = cross_fit(states, layers, examples, objective, folds=folds, seed=seed, progress=progress)
    return best_readout(tried, states, layers, examples)


def cross_fit(
    states: Tensor,
    layers: Sequence[int],
    examples: Examples,
    objective: str = "pairwise",
    *,
    folds: int = 5,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> list[CrossFitted]:
    """For each penalty, the folds' heads on each layer that is tried, and on the mean of these layers.

    Args:
        states: (N, L, H), see `hidden_states.TraceStates`.
        layers: (L,) the layers of `states`.
        examples: the labels.
        objective: ``pairwise`` or ``bce``.
        folds: of the cross-validation; at most the number of questions.
        seed: of the folds and of sampled pairs.
        progress: called after the fits of a layer and penalty.

    Raises:
        InputError: fewer than two questions can be learned from.
    """
    fold_of = fold_numbers(examples, folds, seed)
    tried = layers_to_try(layers)
    found: list[CrossFitted] = []
    of_penalty: dict[float, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {penalty: [] for penalty in PENALTIES}
    for layer in tried:
        values = states[:, list(layers).index(layer)].float().numpy()
        for penalty, (scores, heads, spreads) in _of_folds(values, examples, fold_of, objective, seed=seed).items():
            found.append(_cross_fitted((layer,), penalty, scores, heads[:, None], examples=examples))
            of_penalty[penalty].append((scores, heads, spreads))
            progress()
    if len(tried) == 1:
        return found
    for penalty, parts in of_penalty.items():
        scores, heads, spreads = (np.stack(part) for part in zip(*parts, strict=True))  # (L, N), (L, F, H), (L, F)
        factors = spreads.mean(0) / (len(tried) * np.maximum(spreads, np.finfo(spreads.dtype).tiny))
        combined = (scores * factors[:, fold_of]).sum(0)
        heads = (heads * factors[..., None]).swapaxes(0, 1)
        found.append(_cross_fitted(tuple(tried), penalty, combined, heads, examples=examples))
    return found


def best_readout(tried: Sequence[CrossFitted], states: Tensor, layers: Sequence[int], examples: Examples) -> Readout:
    """The read-out of the highest AUROC among those of `cross_fit`, whose other arguments are the same."""
    best = max(tried, key=lambda one: one.auroc)
    weight = best.heads.mean(0)
    values = _mapped(states, layers, best.layers, weight)
    middle = (values[examples.labels].mean() + values[~examples.labels].mean()) / 2
    return Readout(
        layers=best.layers,
        penalty=best.penalty,
        weight=weight,
        bias=-float(middle),
        table=tuple(Validated(layers=one.layers, penalty=one.penalty, auroc=one.auroc) for one in tried),
        scores=best.scores - middle,
        folds=best.heads,
    )


def layers_named(layers: Sequence[int]) -> str:
    """Such as ``layer 11``, or ``layers 11, 14, 18``."""
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _mapped(states: Tensor, layers: Sequence[int], read: Sequence[int], weight: np.ndarray) -> np.ndarray:
    """(N,) sum over the L layers of `read` of their states times the (L, H) `weight`."""
    places = [list(layers).index(layer) for layer in read]
    return sum(
        (states[:, place].float().numpy() @ row for place, row in zip(places, weight, strict=True)),
        start=np.zeros(len(states), weight.dtype),
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


def _of_folds(
    values: np.ndarray, examples: Examples, fold_of: np.ndarray, objective: str, *, seed: int
) -> dict[float, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each penalty, of heads on one layer, fitted without a fold each.

    Returns:
        (N,) scores by the head that has not seen the question; (F, H) the heads; (F,) the standard deviation of a
        head's scores over the traces that it has seen.
    """
    scores = {penalty: np.zeros(len(values)) for penalty in PENALTIES}
    heads: dict[float, list[np.ndarray]] = {penalty: [] for penalty in PENALTIES}
    spreads: dict[float, list[float]] = {penalty: [] for penalty in PENALTIES}
    for fold in range(int(fold_of.max()) + 1):
        seen = fold_of != fold
        found = fit_heads(values[seen], examples[seen], objective, penalties=PENALTIES, seed=seed)
        for penalty, head in found.items():
            of_all = values @ head
            heads[penalty].append(head)
            spreads[penalty].append(of_all[seen].std())
            scores[penalty][~seen] = of_all[~seen]
    return {p: (scores[p], np.stack(heads[p]), np.array(spreads[p])) for p in PENALTIES}


def _cross_fitted(
    layers: tuple[int, ...], penalty: float, scores: np.ndarray, heads: np.ndarray, *, examples: Examples
) -> CrossFitted:
    auroc = within_prompt_auroc(scores.tolist(), examples.labels.tolist(), examples.questions.tolist())
    return CrossFitted(layers=layers, penalty=penalty, auroc=auroc, scores=scores, heads=heads)


def fit_heads(
    values: np.ndarray, examples: Examples, objective: str, *, penalties: Sequence[float], seed: int = 0
) -> dict[float, np.ndarray]:
    """For each penalty, (H,) the map of the objective's minimum, for states that are not standardised.

    The penalties share the eigenvectors of the risk's Hessian at 0; in their coordinates, scaled by the Hessian's and
    the penalty's curvature, the objective is nearly round there. A penalty starts from the next larger one's minimum.
    """
    scale = values.std(0) + 1e-6
    standard = (values - values.mean(0)) / scale
    if objective == "pairwise":
        high, low, weights = pairs(examples, seed)
        risk, curved = _pairwise_risk(high, low, weights), _laplacian(high, low, weights, len(values)) @ standard
    else:
        weights = examples.weights / examples.weights.sum()
        risk = _logistic_risk(examples.labels, weights)
        curved = weights[:, None] * (standard - weights @ standard)
    curvature, vectors = np.linalg.eigh(standard.T @ curved.astype(standard.dtype) / 4)
    found, head = {}, np.zeros(standard.shape[1])
    for penalty in sorted(penalties, reverse=True):
        root = np.sqrt(np.maximum(curvature, 0) + penalty)
        basis, start = vectors / root, root * (vectors.T @ head)
        head = basis @ _minimum(standard, risk, penalty, basis=basis, start=start, intercept=objective != "pairwise")
        found[penalty] = head / scale
    return found


Risk = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""(N,) scores -> the risk, and its (N,) gradient."""


def _pairwise_risk(high: np.ndarray, low: np.ndarray, weights: np.ndarray) -> Risk:
    def risk(scores: np.ndarray) -> tuple[float, np.ndarray]:
        gap = scores[high] - scores[low]
        slope = weights * expit(-gap)
        gradient = np.bincount(low, slope, len(scores)) - np.bincount(high, slope, len(scores))
        return float(weights @ np.logaddexp(0, -gap)), gradient

    return risk


def _laplacian(high: np.ndarray, low: np.ndarray, weights: np.ndarray, size: int) -> csr_array:
    """(N, N) L with s L s = the weighted sum of the pairs' (s_p - s_n)^2."""
    values = np.concatenate([weights, weights, -weights, -weights])
    places = np.concatenate([high, low, high, low]), np.concatenate([high, low, low, high])
    return csr_array((values, places), shape=(size, size))  # entries of one place are added


def _logistic_risk(labels: np.ndarray, weights: np.ndarray) -> Risk:
    sign = np.where(labels, 1.0, -1.0)

    def risk(scores: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * scores
        return float(weights @ np.logaddexp(0, -margin)), -weights * sign * expit(-margin)

    return risk


def _minimum(
    standard: np.ndarray, risk: Risk, penalty: float, *, basis: np.ndarray, start: np.ndarray, intercept: bool
) -> np.ndarray:
    """(H,) argmin over u of min over b of risk(X v + b) + penalty / 2 |v|^2, v = basis u, from `start`."""
    size = standard.shape[1]

    def value(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        v, b = basis @ parameters[:size].astype(basis.dtype), parameters[size:].sum()
        loss, slope = risk(standard @ v + b)
        of_v = (slope.astype(basis.dtype) @ standard + penalty * v) @ basis
        gradient = np.concatenate([of_v, np.full(len(parameters) - size, slope.sum())])
        return loss + penalty / 2 * float(v @ v), gradient.astype(float)

    first = np.append(start, np.zeros(int(intercept)))
    return minimize(value, first, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x[:size]


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
