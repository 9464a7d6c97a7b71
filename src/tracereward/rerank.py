"""Choosing among candidates of one question: by reward, by vote, and by the baselines that a reward must beat."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tracereward.metrics import auroc, bootstrap_interval, within_prompt_auroc


@dataclass(frozen=True)
class Candidate:
    """One answer to a question.

    Attributes:
        text: the trace.
        answer: its extracted final answer, None if it has none.
        reward: trace reward, in log-odds.
        logprob: mean policy log-prob, None if unknown.
        length: tokens or characters; only compared.
        correct: 1 or 0, None if there is no gold answer.
    """

    text: str
    answer: str | None
    reward: float
    logprob: float | None = None
    length: int = 0
    correct: bool | None = None


def vote_weights(rewards: Sequence[float]) -> list[float]:
    """exp(z) of rewards standardised within the question, z = (r - mean) / std; all 1 where the rewards are equal.

    A mean log-odds of a whole trace differs by little between candidates: without the scale of the question, a sigmoid
    of it would weigh all alike, which is a majority vote.
    """
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    return [math.exp((r - mean) / std) if std > 0 else 1.0 for r in rewards]


def weighted_vote(
    candidates: Sequence[Candidate],
    weights: Sequence[float],
    equal: Callable[[str, str], bool],
) -> int:
    """Index of the candidate that represents the answer with the largest summed weight.

    Answers that `equal` calls the same are one answer, so that 0.5 and 1/2 meet; candidates without an answer do not
    vote. Among the winners the one with the largest weight represents it; without any answer, the largest weight wins.
    """
    groups: list[list[int]] = []
    for index, candidate in enumerate(candidates):
        if candidate.answer is None:
            continue
        for group in groups:
            if equal(candidate.answer, candidates[group[0]].answer or ""):
                group.append(index)
                break
        else:
            groups.append([index])
    best = max(groups, key=lambda group: sum(weights[i] for i in group), default=list(range(len(candidates))))
    return max(best, key=lambda i: weights[i])


def choose(candidates: Sequence[Candidate], method: str, equal: Callable[[str, str], bool], seed: int = 0) -> int:
    """Index of the candidate that a method picks.

    Args:
        candidates: of one question; at least one.
        method: one of `METHODS` but ``oracle`` and ``mean``, which pick nothing.
        equal: whether two extracted answers are the same.
        seed: for ``random``.

    Raises:
        ValueError: unknown method, or one with log-probs where a candidate has none.
    """
    votes: dict[str, Callable[[Candidate], float]] = {
        "vote": lambda c: c.reward,
        "logprob_vote": lambda c: _known(c.logprob),
        "reward_logprob_vote": lambda c: c.reward + _known(c.logprob),
    }
    if method in votes:
        return weighted_vote(candidates, vote_weights([votes[method](c) for c in candidates]), equal)
    if method == "majority":
        return weighted_vote(candidates, [1.0] * len(candidates), equal)
    if method == "random":
        return random.Random(f"{seed}{len(candidates)}{candidates[0].text}").randrange(len(candidates))
    keys: dict[str, Callable[[Candidate], float]] = {
        "reward": lambda c: c.reward,
        "logprob": lambda c: _known(c.logprob),
        "reward_logprob": lambda c: c.reward + _known(c.logprob),
        "shortest": lambda c: -c.length,
    }
    if method not in keys:
        raise ValueError(f"unknown method {method!r}")
    return max(range(len(candidates)), key=lambda i: keys[method](candidates[i]))


def _known(logprob: float | None) -> float:
    if logprob is None:
        raise ValueError("a candidate has no policy log-prob; `tracereward sample` writes one")
    return logprob


METHODS = {
    "mean": "mean sample",
    "random": "random",
    "shortest": "shortest",
    "majority": "majority@{n}",
    "logprob": "log-prob best-of-{n}",
    "logprob_vote": "log-prob-weighted vote@{n}",
    "reward": "reward best-of-{n}",
    "reward_logprob": "reward + log-prob best-of-{n}",
    "vote": "reward-weighted vote@{n}",
    "reward_logprob_vote": "vote@{n} weighted by reward + log-prob",
    "oracle": "oracle@{n}",
}


@dataclass(frozen=True)
class RankingRow:
    """Accuracy of one method over questions, with its 95 % bootstrap interval."""

    method: str
    label: str
    accuracy: float
    low: float
    high: float


def ranking_table(
    questions: Sequence[Sequence[Candidate]], equal: Callable[[str, str], bool], seed: int = 0
) -> list[RankingRow]:
    """Accuracy of each method on questions whose candidates are marked correct or not.

    Rows are those of `METHODS`; those with a log-prob only where each candidate's is known.
    """
    n = max(map(len, questions))
    has_logprob = all(c.logprob is not None for candidates in questions for c in candidates)
    rows = []
    for method, label in METHODS.items():
        if "logprob" in method and not has_logprob:
            continue
        if method == "mean":
            values = [sum(bool(c.correct) for c in candidates) / len(candidates) for candidates in questions]
        elif method == "oracle":
            values = [float(any(c.correct for c in candidates)) for candidates in questions]
        else:
            values = [float(bool(cs[choose(cs, method, equal, seed)].correct)) for cs in questions]
        low, high = bootstrap_interval(values, seed)
        rows.append(RankingRow(method, label.format(n=n), sum(values) / len(values), low, high))
    return rows


def ranking_aurocs(questions: Sequence[Sequence[Candidate]]) -> dict[str, float]:
    """AUROC of reward, of log-prob and of their sum for correctness, pooled and within the question."""
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
