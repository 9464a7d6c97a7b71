"""Which of several scored candidates are kept as training data, and sets of the same size that use no reward."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tracereward.selection import Candidate, vote_groups
from tracereward.tasks.recipes import Task

FORMATS = ("sft", "dpo", "kto")
ANSWERS = ("any", "different", "same")
CONTROLS = ("random", "shortest", "logprob", "majority")
SEED = 0  # of the random control, and of ties of the majority control


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What is kept.

    Attributes:
        top: how many candidates of a question at most, the highest rewards; in pairs, how many pairs.
        threshold: lowest reward of a single trace; None for no limit.
        share: of all candidates, how many single traces at most, the highest rewards; None for all that remain.
        format: ``sft`` for single traces, ``dpo`` or ``kto`` for pairs, as TRL's trainers read them.
        margin: smallest difference of the rewards of a pair.
        answers: those of a pair are ``different``, the ``same``, or ``any``.
    """

    top: int = 1
    threshold: float | None = None
    share: float | None = None
    format: str = "sft"
    margin: float = 0.0
    answers: str = "any"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A candidate that may be kept.

    Attributes:
        question: key of its question.
        prompt: as in the row, text or messages.
        candidate: text, answer, reward, log-prob, correctness.
        finished: whether the trace ended by itself.
    """

    question: str
    prompt: Any
    candidate: Candidate
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A trace that is kept, and in pairs the one that it is preferred to."""

    chosen: Scored
    rejected: Scored | None = None


Pool = dict[str, list[Scored]]
"""Distinct candidates by question."""
Score = Callable[[Scored], float]


def choose(pool: Pool, keeping: Keeping, task: Task, score: Score) -> list[Kept]:
    """What is kept of all questions, in their order: the highest scores, or pairs of high and low ones."""
    if keeping.format != "sft":
        fits = _fits(keeping, task)
        return [pair for found in pool.values() for pair in pairs(found, score, keeping.top, fits=fits)]
    kept = [
        one
        for found in pool.values()
        for one in ranked(found, score)[: keeping.top]
        if keeping.threshold is None or score(one) >= keeping.threshold
    ]
    if keeping.share is not None:
        limit = max(1, math.floor(keeping.share * sum(map(len, pool.values()))))
        best = {id(one) for one in ranked(kept, score)[:limit]}
        kept = [one for one in kept if id(one) in best]
    return [Kept(chosen=one) for one in kept]


def ranked(found: Sequence[Scored], score: Score) -> list[Scored]:
    """The candidates, the highest score first; of equals the first."""
    return sorted(found, key=lambda one: -score(one))


def pairs(found: Sequence[Scored], score: Score, most: int, *, fits: Callable[[Scored, Scored], bool]) -> list[Kept]:
    """At most `most` pairs of one question's candidates, none of which is in two of them.

    The best candidate is paired with the worst that `fits`, then the next one likewise. The chosen one always has the
    higher score.
    """
    free = ranked(found, score)
    made: list[Kept] = []
    for chosen in list(free):
        if len(made) == most:
            break
        if chosen not in free:
            continue
        below = [one for one in reversed(free) if score(one) < score(chosen) and fits(chosen, one)]
        if below:
            made.append(Kept(chosen=chosen, rejected=below[0]))
            free = [one for one in free if one is not chosen and one is not below[0]]
    return made


def _fits(keeping: Keeping, task: Task) -> Callable[[Scored, Scored], bool]:
    def fits(chosen: Scored, rejected: Scored) -> bool:
        if chosen.candidate.reward - rejected.candidate.reward < keeping.margin:
            return False
        mine, other = chosen.candidate.answer, rejected.candidate.answer
        if keeping.answers == "any":
            return True
        same = mine == other or (mine is not None and other is not None and task.equal(mine, other))
        return same == (keeping.answers == "same")

    return fits


def same_size(pool: Pool, kept: Sequence[Kept], score: Score) -> list[Kept]:
    """As many traces or pairs of each question as `kept` has, by another score."""
    counts = Counter(one.chosen.question for one in kept)
    paired = kept[0].rejected is not None
    made: list[Kept] = []
    for question, count in counts.items():
        if paired:
            made += pairs(pool[question], score, count, fits=lambda *_: True)
        else:
            made += [Kept(chosen=one) for one in ranked(pool[question], score)[:count]]
    return made


def free_score(name: str, pool: Pool, task: Task) -> Score:
    """The score of a control: random, shortness, log-prob, or 1 for the question's most frequent answer."""
    rng = random.Random(SEED)
    chance = {id(one): rng.random() for found in pool.values() for one in found}
    if name == "majority":
        common = {id(one) for found in pool.values() for one in _with_majority(found, task)}
        return lambda one: (id(one) in common) + chance[id(one)] / 2
    if name == "shortest":
        return lambda one: -len(one.candidate.text)
    if name == "logprob":
        return lambda one: one.candidate.logprob or 0.0
    return lambda one: chance[id(one)]


def _with_majority(found: Sequence[Scored], task: Task) -> list[Scored]:
    votes = Counter(one.candidate.answer for one in found if one.candidate.answer is not None)
    groups = vote_groups(votes, task.equal)
    most = max(groups, key=lambda group: sum(votes[text] for text in group), default=[])
    return [one for one in found if one.candidate.answer in most]


def training_rows(kept: Sequence[Kept], form: str) -> list[dict[str, Any]]:
    """The rows as TRL's trainers read them; completions of prompts in messages are messages."""
    rows = []
    for one in kept:
        prompt = one.chosen.prompt
        if form == "sft":
            rows.append({"prompt": prompt, "completion": _text(one.chosen), "reward": one.chosen.candidate.reward})
            continue
        assert one.rejected is not None
        if form == "dpo":
            rows.append({"prompt": prompt, "chosen": _text(one.chosen), "rejected": _text(one.rejected)})
        else:
            rows.append({"prompt": prompt, "completion": _text(one.chosen), "label": True})
            rows.append({"prompt": prompt, "completion": _text(one.rejected), "label": False})
    return rows


def _text(one: Scored) -> Any:
    text = one.candidate.text
    return text if isinstance(one.prompt, str) else [{"role": "assistant", "content": text}]
