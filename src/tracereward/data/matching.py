"""Questions: the demonstrations and the candidates of each prompt, and what is odd about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tracereward.data.candidates import CandidateRow, prompt_key
from tracereward.errors import InputError
from tracereward.messages import content_text, message_text


@dataclass(frozen=True, kw_only=True)
class Question:
    """The demonstrations and the candidates of one prompt.

    Attributes:
        where: location of its first row, for error messages.
        prompt: in the task's wording.
        demonstrations: rows of `load_demonstrations`; empty if the prompt has none.
        candidates: other traces than the demonstrations' own; empty if the prompt has none.
    """

    where: str
    prompt: Any
    demonstrations: list[dict[str, Any]] = field(default_factory=list)
    candidates: list[CandidateRow] = field(default_factory=list)


def trace_text(completion: Any) -> str:
    """The text of a demonstration's completion, which may be one assistant message."""
    return completion if isinstance(completion, str) else message_text(completion[-1])


def match(
    demonstrations: Sequence[Mapping[str, Any]], candidates: Sequence[CandidateRow]
) -> tuple[list[Question], list[str]]:
    """The questions, in the order of their first row, demonstrations first, and what is odd about the data.

    Rows belong together if they have the same prompt. Empty candidates are left out: they have no token to learn from.
    So is a candidate that equals a demonstration of its prompt (white space at the ends apart): it would be both an
    expert's trace and a model's.

    Args:
        demonstrations: rows of `load_demonstrations`; those without a completion are ignored.
        candidates: rows of `read_candidates`.

    Returns:
        Questions, some without a demonstration or without a candidate, and sentences with counts.

    Raises:
        InputError: all candidates are empty, none has the prompt of a demonstration, or none differs from the
            demonstrations.
    """
    found: dict[str, Question] = {}
    for row in demonstrations:
        if row["completion"] is not None:
            where = row.get("source", "a demonstration")
            question = found.setdefault(prompt_key(row["prompt"]), Question(where=where, prompt=row["prompt"]))
            question.demonstrations.append(dict(row))
    empty = [row.where for row in candidates if not row.completion.strip()]
    if len(empty) == len(candidates):
        raise InputError(f"{empty[0]}: all {len(candidates)} candidates are empty: nothing to compare")
    total, candidates = len(candidates), [row for row in candidates if row.completion.strip()]
    identical = []
    for row in candidates:
        question = found.setdefault(row.key, Question(where=row.where, prompt=row.prompt))
        own = {trace_text(demonstration["completion"]).strip() for demonstration in question.demonstrations}
        if row.completion.strip() in own:
            identical.append(row.where)
        else:
            question.candidates.append(row)
    questions = list(found.values())
    shared = {prompt_key(row["prompt"]) for row in demonstrations} & {row.key for row in candidates}
    if not shared:
        raise InputError(_nothing_shared(questions, candidates))
    if len(identical) == len(candidates):
        raise InputError(f"{identical[0]}: all {len(candidates)} candidates equal a demonstration: nothing to compare")
    remarks = _remarks(questions, candidates, identical)
    if empty:
        remarks.insert(0, f"{len(empty)} of {total} candidates are empty and left out, the first at {empty[0]}")
    return questions, remarks


def _nothing_shared(questions: Sequence[Question], candidates: Sequence[CandidateRow]) -> str:
    """Why no candidate answers a demonstration's prompt: a candidate's and the most similar one, where they differ."""
    asked = [question for question in questions if question.demonstrations]
    if not asked:
        return "no demonstration has a completion"
    first = candidates[0]
    words = set(prompt_text(first.prompt).split())
    nearest = max(asked, key=lambda question: len(words & set(prompt_text(question.prompt).split())))
    texts = prompt_text(first.prompt), prompt_text(nearest.prompt)
    differs = next((n for n, (a, b) in enumerate(zip(*texts)) if a != b), min(map(len, texts)))
    at = max(0, differs - 20)
    here, there = (f"{'...' if at else ''}{text[at : at + 60]!r}" for text in texts)
    return (
        f"no candidate has the prompt of a demonstration, so nothing can be compared. {first.where} asks {here}, and "
        f"the most similar demonstration, {nearest.where}, asks {there}. Prompts must be equal: read both by one task"
    )


def prompt_text(prompt: Any) -> str:
    """A prompt as plain text; the messages of a chat one below the other."""
    return prompt if isinstance(prompt, str) else "\n".join(content_text(part.get("content")) for part in prompt)


def _remarks(questions: Sequence[Question], candidates: Sequence[CandidateRow], identical: Sequence[str]) -> list[str]:
    """A sentence, with counts and the first place, for each oddity of matched data."""
    remarks = []
    if identical:
        remarks.append(
            f"{len(identical)} of {len(candidates)} candidates equal a demonstration of their prompt and are left out, "
            f"the first at {identical[0]}"
        )
    texts: dict[str, CandidateRow] = {}
    differing: dict[str, str] = {}
    for row in candidates:
        if texts.setdefault(row.question, row).key != row.key:
            differing.setdefault(row.question, row.where)
    if differing:
        name, where = next(iter(differing.items()))
        remarks.append(
            f"{len(differing)} of {len(texts)} question ids have several prompts, the first {name!r} at {where}: each "
            "prompt counts as a question of its own"
        )
    without = [question.where for question in questions if not question.demonstrations]
    if without:
        remarks.append(f"{len(without)} of {len(questions)} questions have no demonstration, the first at {without[0]}")
    alone = [question.where for question in questions if not question.candidates]
    if alone:
        remarks.append(
            f"{len(alone)} of {len(questions)} questions have no candidate to compare, the first at {alone[0]}"
        )
    single = [question.where for question in questions if len(question.candidates) == 1]
    if len(single) * 2 > len(questions):
        remarks.append(
            f"{len(single)} of {len(questions)} questions have one candidate, the first at {single[0]}: ranking "
            "candidates within a question needs several"
        )
    return remarks
