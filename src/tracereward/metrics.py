"""Statistics of rewards, correctness and accuracy, for training logs and result tables."""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score


def auroc(scores: Sequence[float], correct: Sequence[bool]) -> float:
    """Probability that a correct trace scores above a wrong one, ties counting half.

    nan if one class is missing or a score is nan.
    """
    if len(set(correct)) < 2 or any(map(math.isnan, scores)):
        return math.nan
    right = np.asarray(correct, dtype=bool)
    ranks = stats.rankdata(np.asarray(scores, dtype=float))  # for the traces of one prompt, 20 times as fast as sklearn
    positives = int(right.sum())
    wins = ranks[right].sum() - positives * (positives + 1) / 2  # Mann and Whitney's U
    return float(wins / (positives * (len(right) - positives)))


def auroc_interval(
    scores: Sequence[float], correct: Sequence[bool], prompts: Sequence[Hashable], resamples: int = 500
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of `auroc`, over prompts: the traces of one prompt are not independent.

    Resamples in which one class is missing are left out; (nan, nan) if it is missing in all.
    """
    index: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        index.setdefault(prompt, []).append(i)
    groups = [np.asarray(group) for group in index.values()]
    values, labels = np.asarray(scores, dtype=float), np.asarray(correct, dtype=bool)
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(resamples):
        chosen = np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))])
        if 0 < labels[chosen].sum() < len(chosen):
            areas.append(float(roc_auc_score(labels[chosen], values[chosen])))
    if not areas:
        return math.nan, math.nan
    low, high = np.percentile(areas, [2.5, 97.5])
    return float(low), float(high)


def auprc(scores: Sequence[float], correct: Sequence[bool]) -> float:
    """Average precision of correct traces (area under precision over recall); chance is their share. nan if none."""
    if not any(correct) or any(map(math.isnan, scores)):
        return math.nan
    return float(average_precision_score(np.asarray(correct, dtype=bool), np.asarray(scores, dtype=float)))


def length_matched_auroc(
    scores: Sequence[float], correct: Sequence[bool], lengths: Sequence[float], bins: int = 10
) -> float:
    """AUROC among traces of similar length: its mean over `bins` quantile bins, weighted by their pairs.

    A score that depends only on the trace's length has about 0.5. nan if no bin holds correct and wrong traces.
    """
    values, labels = np.asarray(scores, dtype=float), np.asarray(correct, dtype=bool)
    edges = np.quantile(lengths, np.linspace(0, 1, bins + 1)[1:-1])
    index = np.searchsorted(edges, lengths, side="right")
    total = pairs = 0.0
    for b in np.unique(index):
        here = labels[index == b]
        weight = float(here.sum()) * float((~here).sum())
        if weight:
            total += weight * auroc(values[index == b], here)  # pyright: ignore[reportArgumentType]
            pairs += weight
    return total / pairs if pairs else math.nan


def within_prompt_auroc(scores: Sequence[float], correct: Sequence[bool], prompts: Sequence) -> float:
    """Mean AUROC within a prompt, over the prompts that have both correct and wrong traces.

    This is what a group-normalised policy gradient and a reranker see; pooled AUROC mostly measures which prompts are
    hard. nan if no prompt has both or a score is nan.
    """
    if any(map(math.isnan, scores)):
        return math.nan
    groups: dict = {}
    for score, is_correct, prompt in zip(scores, correct, prompts, strict=True):
        groups.setdefault(prompt, ([], []))
        groups[prompt][0].append(score)
        groups[prompt][1].append(is_correct)
    values = [value for group in groups.values() if not math.isnan(value := auroc(*group))]
    return float(np.mean(values)) if values else math.nan


def point_biserial(scores: Sequence[float], correct: Sequence[bool]) -> float:
    """Pearson correlation of a score with correctness (0 or 1); nan if either is constant."""
    return pearson(scores, [float(label) for label in correct])


def risk_coverage(scores: Sequence[float], correct: Sequence[bool]) -> list[tuple[float, float]]:
    """Points (coverage, risk) of answering the k questions of the highest scores, k = 1 ... n.

    Coverage is k / n, and risk the share of wrong ones among the k. Questions of equal score come in random order: the
    risk is its expectation.

    Args:
        scores: n confidences.
        correct: whether each answer is right.
    """
    values, wrong = np.asarray(scores, dtype=float), ~np.asarray(correct, dtype=bool)
    order = np.argsort(-values, kind="stable")
    _, group, sizes = np.unique(-values[order], return_inverse=True, return_counts=True)
    shares = np.bincount(group, wrong[order]) / sizes
    count = np.arange(1, len(values) + 1)
    return list(zip((count / len(values)).tolist(), (shares[group].cumsum() / count).tolist(), strict=True))


def risk_coverage_area(scores: Sequence[float], correct: Sequence[bool]) -> float:
    """Area under risk over coverage, the mean of the risks of `risk_coverage`; the lower, the better.

    That of a score that says nothing is the error rate.
    """
    return float(np.mean([risk for _, risk in risk_coverage(scores, correct)]))


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion."""
    interval = stats.binomtest(successes, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over questions."""
    array = np.asarray(values, dtype=float)
    if np.ptp(array) == 0:  # every resample is the same; scipy would warn and return nan
        return float(array[0]), float(array[0])
    result = stats.bootstrap((array,), np.mean, n_resamples=resamples, method="percentile", rng=seed)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds with its 95 % interval, mean +- t(n - 1) s / sqrt(n); the interval is nan for one seed.

    A seed whose value is nan makes the mean nan: dropping it would select among seeds.
    """
    array = np.asarray(values, dtype=float)
    centre = float(array.mean())
    if len(array) < 2:
        return centre, math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return centre, centre - half, centre + half


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method, in the order given.

    The k-th smallest of m is multiplied by m - k + 1, is at least as large as those before it, and at most 1. Rejecting
    those up to a level keeps the probability of any false rejection at that level, whatever their dependence.
    """
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected.tolist()


def centred(values: Sequence[float], prompts: Sequence[Hashable]) -> list[float]:
    """Each value minus the mean of its prompt's values."""
    groups: dict[Hashable, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        groups.setdefault(prompt, []).append(value)
    # Equal values must give exactly 0: a rounding error of their mean would look like variation and could correlate.
    means = {prompt: float(np.mean(group)) if np.ptp(group) else group[0] for prompt, group in groups.items()}
    return [value - means[prompt] for value, prompt in zip(values, prompts)]


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson correlation; nan if either is constant or there are fewer than two values."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman rank correlation; nan if either is constant or there are fewer than two values."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(stats.spearmanr(a, b).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def perturbation_auroc(expert_rewards: Sequence[float], perturbed_rewards: Sequence[float]) -> float:
    """Share of expert traces that score above their own perturbed copy, ties counting half; nan without pairs.

    (1 / N) sum_i ( [R(expert_i) > R(perturbed_i)] + [R(expert_i) = R(perturbed_i)] / 2 ). An AUROC of matched pairs: it
    needs no verified answer, and the difficulty of the prompts cancels. 0.5 is chance; nan if a reward is nan.

    Args:
        expert_rewards: N trace rewards.
        perturbed_rewards: N trace rewards, the i-th for the i-th expert trace with an injected error.

    Raises:
        ValueError: the sequences differ in length.
    """
    pairs = list(zip(expert_rewards, perturbed_rewards, strict=True))
    if any(math.isnan(reward) for pair in pairs for reward in pair):
        return math.nan
    return mean([1.0 if expert > perturbed else 0.5 if expert == perturbed else 0.0 for expert, perturbed in pairs])


def mean(values: Sequence[float]) -> float:
    """The mean; nan for an empty sequence."""
    return float(np.mean(values)) if len(values) else math.nan
