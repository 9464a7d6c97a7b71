"""Best-of-N selection among candidates of one question: by reward, by vote, and baselines that a reward must beat."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.special import expit

from tracereward.errors import InputError
from tracereward.metrics import auroc, bootstrap_interval, within_prompt_auroc


@dataclass(frozen=True)
class Candidate:
    """One answer to a question.

    Attributes:
        text: the trace.
        answer: the extracted final answer, None if it has none.
        reward: trace reward, in log-odds.
        logprob: mean policy log-prob, None if unknown.
        length: in tokens or characters; used only for comparison.
        correct: 1 or 0, None if there is no gold answer.
        model: the model that generated it, in a pool with answers of several models.
        labelled: whether `correct` is the row's own label, not a comparison with the gold answer.
    """

    text: str
    answer: str | None
    reward: float
    logprob: float | None = None
    length: int = 0
    correct: bool | None = None
    model: str | None = None
    labelled: bool = False


def vote_weights(rewards: Sequence[float], temperature: float | None = None) -> list[float]:
    """exp((r - max) / temperature); without a temperature exp(z), z = (r - mean) / std within the question.

    Mean log-odds of full traces differ little between candidates. Without a scale (from the question, or fitted on
    other questions with `fit_vote_temperature`), their softmax would be nearly uniform, which is a majority vote. All
    weights are 1 if the rewards are equal.
    """
    if temperature is not None:
        top = max(rewards)
        return [math.exp((r - top) / temperature) for r in rewards]
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    return [math.exp((r - mean) / std) if std > 0 else 1.0 for r in rewards]


def weighted_vote(
    candidates: Sequence[Candidate],
    weights: Sequence[float],
    equal: Callable[[str, str], bool],
) -> int:
    """Index of the candidate that represents the answer with the largest summed weight.

    Answers are merged as in `vote_groups`; candidates without an answer do not vote. The candidate with the largest
    weight represents its answer; if no candidate has an answer, the largest weight wins.
    """
    places: dict[str, list[int]] = {}
    for index, candidate in enumerate(candidates):
        if candidate.answer is not None:
            places.setdefault(candidate.answer, []).append(index)
    by_text = {text: sum(weights[i] for i in found) for text, found in places.items()}
    groups = [sorted(i for text in group for i in places[text]) for group in vote_groups(by_text, equal)]
    # A tie goes to the answer that was given first.
    best = max(sorted(groups), key=lambda group: sum(weights[i] for i in group), default=list(range(len(candidates))))
    return max(best, key=lambda i: weights[i])


def vote_groups(weights: Mapping[str, float], equal: Callable[[str, str], bool]) -> list[list[str]]:
    """Partition of the distinct answers of a vote, whatever their order.

    Equality need not be transitive: "5" equals "5 km" and "5 m", which differ. An answer that equals two answers which
    differ joins the heavier of their groups, so that different answers never share one.

    Args:
        weights: answer -> its weight.
        equal: symmetric.
    """
    texts = sorted(weights)
    same = {text: {text} for text in texts}
    for left, right in combinations(texts, 2):
        if equal(left, right):
            same[left].add(right)
            same[right].add(left)
    clear: dict[frozenset[str], list[str]] = {}  # members of a group equal the same answers
    ambiguous = []
    for text in texts:
        if all(same[text] <= same[other] for other in same[text]):
            clear.setdefault(frozenset(same[text]), []).append(text)
        else:
            ambiguous.append(text)
    groups = sorted(clear.values(), key=lambda group: -sum(weights[text] for text in group))
    joined = [[*group] for group in groups]
    for text in ambiguous:
        # Those that equal no clear answer have groups of their own, of members that all equal one another.
        fits = [i for i, group in enumerate(joined) if same[text].issuperset(group)]
        fits = [i for i in fits if i < len(groups)] or fits
        if fits:
            joined[fits[0]].append(text)
        else:
            joined.append([text])
    return joined


def choose(
    candidates: Sequence[Candidate],
    method: str,
    equal: Callable[[str, str], bool],
    *,
    seed: int = 0,
    temperature: float | None = None,
) -> int:
    """Index of the candidate that a method picks.

    Args:
        candidates: candidates of one question; at least one.
        method: one of `METHODS` except ``oracle``, ``mean`` and ``model``, which need more than the candidates.
        equal: whether two extracted answers are the same.
        seed: for ``random``.
        temperature: for ``softmax_vote``, see `fit_vote_temperature`.

    Raises:
        ValueError: the method is unknown, needs a log-prob that a candidate lacks, or needs a temperature.
    """
    if not candidates:
        raise InputError("no candidates to choose from")
    rewards = [c.reward for c in candidates]
    if method == "majority":
        return weighted_vote(candidates, [1.0] * len(candidates), equal)
    if method == "vote":
        return weighted_vote(candidates, vote_weights(rewards), equal)
    if method == "sigmoid_vote":
        return weighted_vote(candidates, expit(rewards).tolist(), equal)
    if method == "softmax_vote":
        if temperature is None:
            raise ValueError("softmax_vote needs a temperature; fit_vote_temperature gives one")
        # A candidate without an answer does not vote, so its reward must not scale the weights of the others to 0.
        top = max([c.reward for c in candidates if c.answer is not None] or rewards)
        return weighted_vote(candidates, vote_weights([min(r, top) for r in rewards], temperature), equal)
    if method == "random":
        return random.Random(f"{seed}{len(candidates)}{candidates[0].text}").randrange(len(candidates))
    if method in ("reward", "shortest"):
        scores = rewards if method == "reward" else [-c.length for c in candidates]
        return max(range(len(candidates)), key=scores.__getitem__)
    if method not in ("logprob", "logprob_vote", "reward_logprob", "reward_logprob_vote"):
        raise ValueError(f"unknown method {method!r}")
    scores = [_known(c.logprob) + (c.reward if method.startswith("reward") else 0.0) for c in candidates]
    if method.endswith("vote"):
        return weighted_vote(candidates, vote_weights(scores), equal)
    return max(range(len(candidates)), key=scores.__getitem__)


def _known(logprob: float | None) -> float:
    if logprob is None:
        raise ValueError("a candidate has no policy log-prob; `tracereward sample` writes one")
    return logprob


METHODS = {
    "mean": "mean sample",
    "random": "random",
    "shortest": "shortest",
    "model": "the model with most right answers to other questions",
    "majority": "majority@{n}",
    "logprob": "log-prob best-of-{n}",
    "logprob_vote": "log-prob-weighted vote@{n}",
    "reward": "reward best-of-{n}",
    "reward_logprob": "reward + log-prob best-of-{n}",
    "vote": "reward-weighted vote@{n}",
    "sigmoid_vote": "vote@{n} weighted by sigmoid of reward",
    "softmax_vote": "vote@{n} weighted by softmax of reward",
    "reward_logprob_vote": "vote@{n} weighted by reward + log-prob",
    "oracle": "oracle@{n}",
}


RERANK_METHODS = [name for name in METHODS if name not in ("mean", "oracle", "model", "softmax_vote")]
"""Methods that need no correctness labels, model names or fitted temperature."""


@dataclass(frozen=True)
class RankingRow:
    """Accuracy of one method over questions, with its 95 % bootstrap interval."""

    method: str
    label: str
    accuracy: float
    low: float
    high: float


def outcomes(
    questions: Sequence[Sequence[Candidate]],
    method: str,
    equal: Callable[[str, str], bool],
    *,
    seed: int = 0,
    temperature: float | None = None,
) -> list[float]:
    """For each question, 1 if the candidate that the method picks is correct, else 0; ``mean``: the share correct."""
    if method == "mean":
        return [sum(bool(c.correct) for c in candidates) / len(candidates) for candidates in questions]
    if method == "oracle":
        return [float(any(c.correct for c in candidates)) for candidates in questions]
    if method == "model":
        picks = [max(range(len(scores)), key=scores.__getitem__) for scores in model_scores(questions)]
    else:
        picks = [choose(candidates, method, equal, seed=seed, temperature=temperature) for candidates in questions]
    return [float(bool(candidates[pick].correct)) for candidates, pick in zip(questions, picks, strict=True)]


def model_scores(questions: Sequence[Sequence[Candidate]]) -> list[list[float]]:
    """For each candidate, its model's accuracy on the other questions; 0.5 if the model has no other candidates.

    A baseline that uses neither rewards nor traces: in a pool of several models, the model alone predicts correctness.
    """
    right: dict[str | None, int] = {}
    total: dict[str | None, int] = {}
    for c in (c for candidates in questions for c in candidates):
        right[c.model] = right.get(c.model, 0) + bool(c.correct)
        total[c.model] = total.get(c.model, 0) + 1
    scores = []
    for candidates in questions:
        row = []
        for c in candidates:
            same = [other for other in candidates if other.model == c.model]
            rest = total[c.model] - len(same)
            row.append((right[c.model] - sum(bool(other.correct) for other in same)) / rest if rest else 0.5)
        scores.append(row)
    return scores


def methods_for(questions: Sequence[Sequence[Candidate]], temperature: float | None = None) -> list[str]:
    """The `METHODS` whose inputs are present: log-probs, model names, a fitted temperature."""
    flat = [c for candidates in questions for c in candidates]
    missing = {
        "logprob": any(c.logprob is None for c in flat),
        "model": any(c.model is None for c in flat),
        "softmax": temperature is None,
    }
    return [name for name in METHODS if not any(lacks and part in name for part, lacks in missing.items())]


def ranking_table(
    questions: Sequence[Sequence[Candidate]],
    equal: Callable[[str, str], bool],
    seed: int = 0,
    temperature: float | None = None,
) -> list[RankingRow]:
    """Accuracy of each method of `methods_for` on questions with verified candidates."""
    n = max(map(len, questions))
    rows = []
    for method in methods_for(questions, temperature):
        values = outcomes(questions, method, equal, seed=seed, temperature=temperature)
        low, high = bootstrap_interval(values, seed)
        rows.append(
            RankingRow(
                method=method,
                label=METHODS[method].format(n=n),
                accuracy=sum(values) / len(values),
                low=low,
                high=high,
            )
        )
    return rows


def ranking_curves(
    questions: Sequence[Sequence[Candidate]],
    equal: Callable[[str, str], bool],
    *,
    seed: int = 0,
    temperature: float | None = None,
    draws: int = 8,
) -> dict[str, list[tuple[int, float, float, float]]]:
    """Accuracy of each method at N = 1, 2, 4, ... candidates of each question, with 95 % bootstrap intervals.

    A point is the mean over `draws` random subsets of each question, the same for all methods. Questions with fewer
    than N candidates use all of them. The last N is the largest number of candidates of a question.

    Returns:
        For each method, rows (N, accuracy, low, high).
    """
    most = max(map(len, questions))
    sizes = [1 << power for power in range(most.bit_length()) if 1 << power < most] + [most]
    curves: dict[str, list[tuple[int, float, float, float]]] = {m: [] for m in methods_for(questions, temperature)}
    for size in sizes:
        rng = random.Random(f"{seed}{size}")
        subsets = [[rng.sample(list(cs), min(size, len(cs))) for cs in questions] for _ in range(draws)]
        if size == most:  # ties depend on the order: keep it, so that the last point equals `ranking_table`'s
            subsets = [questions]
        for method, points in curves.items():
            sampled = [outcomes(subset, method, equal, seed=seed, temperature=temperature) for subset in subsets]
            values = np.mean(sampled, axis=0).tolist()
            points.append((size, float(np.mean(values)), *bootstrap_interval(values, seed)))
    return curves


TEMPERATURES = [2.0**power for power in range(-8, 4)]
"""The grid of `fit_vote_temperature`, in log-odds."""


def fit_vote_temperature(questions: Sequence[Sequence[Candidate]], equal: Callable[[str, str], bool]) -> float:
    """The temperature of the most accurate ``softmax_vote``; ties go to the highest, nearest to a majority vote.

    Fit it on held-out questions, not on the ones it is evaluated on.
    """
    return max(
        reversed(TEMPERATURES),
        key=lambda temperature: sum(outcomes(questions, "softmax_vote", equal, temperature=temperature)),
    )


def ranking_aurocs(questions: Sequence[Sequence[Candidate]]) -> dict[str, float]:
    """AUROC of the reward, the log-prob and their sum for correctness, pooled and within the question."""
    result = {}
    flat = [(index, c) for index, candidates in enumerate(questions) for c in candidates]
    correct = [bool(c.correct) for _, c in flat]
    prompts = [index for index, _ in flat]
    scores = {"reward": [c.reward for _, c in flat]}
    if all(c.logprob is not None for _, c in flat):
        scores["logprob"] = [_known(c.logprob) for _, c in flat]
        scores["reward_logprob"] = [c.reward + _known(c.logprob) for _, c in flat]
    for name, values in scores.items():
        result[f"{name}_auroc"] = auroc(values, correct)
        result[f"{name}_auroc_within_prompt"] = within_prompt_auroc(values, correct, prompts)
    return result
