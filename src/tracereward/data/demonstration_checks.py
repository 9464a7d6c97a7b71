"""What is odd about demonstrations by their text alone: no model reads them.

Of one row: an answer that the task cannot read or that is not the row's own, an answer that the prompt gives away, an
equation that does not hold. Of several: near-duplicates, and different answers to one question.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tracereward.data.candidates import CandidateRow, prompt_key
from tracereward.data.equations import wrong_equations
from tracereward.data.matching import prompt_text, trace_text
from tracereward.data.near_duplicates import near_duplicates
from tracereward.errors import InputError
from tracereward.selection import vote_groups
from tracereward.tasks.recipes import Task

ERRORS = ("unreadable", "other answer", "contradiction", "outvoted", "option", "equation", "leak")
"""Kinds of findings that say that something is wrong."""
KINDS = (*ERRORS, "duplicate prompt", "duplicate completion")
_VOTES = 3  # fewest votes that count against a demonstration
_SHORTEST = 4  # characters of an option with the spaces around it that a text has by chance
_WORDS = 4  # of an answer line that a prompt cannot have by chance


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something odd about a demonstration.

    Attributes:
        kind: one of `KINDS`.
        text: what it is, in a sentence without a full stop.
        others: indices of the other demonstrations that it concerns.
    """

    kind: str
    text: str
    others: tuple[int, ...] = ()


def check_rows(rows: Sequence[Mapping[str, Any]], task: Task) -> list[list[Finding]]:
    """The findings on each demonstration.

    Args:
        rows: of `load_demonstrations`.
        task: reads and compares answers.
    """
    answers = [task.extract(trace_text(row["completion"])) for row in rows]
    found: list[list[Finding]] = [list(_alone(row, answer, task)) for row, answer in zip(rows, answers, strict=True)]
    for index, finding in [*_contradictions(rows, answers, task), *_duplicates(rows)]:
        found[index].append(finding)
    return found


def _alone(row: Mapping[str, Any], answer: str | None, task: Task) -> Iterator[Finding]:
    """Findings on one row without the others."""
    text, prompt = trace_text(row["completion"]), prompt_text(row["prompt"])
    if answer is None:
        yield Finding(kind="unreadable", text=f"task {task.name} reads no answer in the completion")
    elif row.get("answer") is not None and not task.equal(answer, str(row["answer"])):
        yield Finding(
            kind="other answer", text=f"the completion states {answer!r}, the row's answer is {row['answer']!r}"
        )
    if leak := _leak(prompt, text, answer, task):
        yield Finding(kind="leak", text=leak)
    if answer is not None and (other := named_option(text, prompt, answer)):
        yield Finding(kind="option", text=f"the completion answers {answer}, and has the words of option {other} alone")
    for equation in wrong_equations(text):
        yield Finding(kind="equation", text=f"{equation} does not hold")


def named_option(completion: str, prompt: str, answer: str) -> str | None:
    """The letter of the only option of the prompt whose words the completion has, if that is not the answer's.

    Of options of which one contains the other, the longer one counts.

    Args:
        completion: the trace.
        prompt: with its options on lines of their own, ``A. ...``.
        answer: the letter that the trace states.
    """
    options = {letter: _words(text) for letter, text in re.findall(r"^\(?([A-J])[.):] (.*)$", prompt, re.MULTILINE)}
    if answer not in options:
        return None
    text = _words(completion)
    named = {letter: words for letter, words in options.items() if words.strip() and words in text}
    alone = [
        letter
        for letter, words in named.items()
        if len(words) > _SHORTEST and not any(words != other and words in other for other in named.values())
    ]
    return alone[0] if len(alone) == 1 and alone[0] != answer else None


def _words(text: str) -> str:
    """The words of a text, with a space before and after each."""
    words = re.findall(r"[0-9]+(?:[.][0-9]+)?|[^\W_]+", text.casefold())
    return f" {' '.join(words)} "


def _leak(prompt: str, completion: str, answer: str | None, task: Task) -> str | None:
    """How the prompt gives the answer away: it states it in the task's form, or has the trace's last line or step."""
    given = task.extract(prompt)
    if answer is not None and given is not None and task.equal(given, answer):
        return f"the prompt states the answer {given!r}"
    steps = [step.strip() for line in completion.splitlines() for step in line.split(task.step_delimiter)]
    last = next((step for step in reversed(steps) if len(step.split()) >= _WORDS), None)
    if last is not None and " ".join(last.split()).casefold() in " ".join(prompt.split()).casefold():
        return f"the prompt has the completion's last step, {last[:60]!r}"
    return None


def _contradictions(
    rows: Sequence[Mapping[str, Any]], answers: Sequence[str | None], task: Task
) -> Iterator[tuple[int, Finding]]:
    """Rows of one question, up to case and white space, that state different answers."""
    asked: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if answers[index] is not None:
            asked.setdefault(" ".join(prompt_text(row["prompt"]).split()).casefold(), []).append(index)
    for group in asked.values():
        for index in group:
            mine = str(answers[index])
            others = tuple(i for i in group if not task.equal(mine, str(answers[i])))
            if others:
                other, theirs = rows[others[0]]["source"], answers[others[0]]
                said = f"states {mine!r}; {other} answers the same question with {theirs!r}"
                yield index, Finding(kind="contradiction", text=said, others=others)


def outvoted(
    rows: Sequence[Mapping[str, Any]], candidates: Sequence[CandidateRow], task: Task
) -> Iterator[tuple[int, Finding]]:
    """Demonstrations whose answer is not the one that most candidates for their question state.

    The other answer has at least `_VOTES` votes and more than half of those that can be read.

    Args:
        rows: of `load_demonstrations`.
        candidates: of models, for the same prompts.
        task: reads and compares answers.

    Raises:
        InputError: no candidate has the prompt of a demonstration.
    """
    asked: dict[str, Counter[str]] = {prompt_key(row["prompt"]): Counter() for row in rows}
    if not any(row.key in asked for row in candidates):
        raise InputError(
            f"{candidates[0].where}: no candidate has the prompt of a demonstration: read both by one task, and give "
            "--questions if the candidates have only ids"
        )
    for row in candidates:
        if row.key in asked and row.answer is not None:
            asked[row.key][row.answer] += 1
    for index, row in enumerate(rows):
        votes = asked[prompt_key(row["prompt"])]
        mine = task.extract(trace_text(row["completion"]))
        if not votes or mine is None:
            continue
        groups = vote_groups({str(answer): float(count) for answer, count in votes.items()}, task.equal)
        winner = max(groups, key=lambda group: sum(votes[answer] for answer in group))
        count, total = sum(votes[answer] for answer in winner), sum(votes.values())
        if count >= _VOTES and 2 * count > total and not any(task.equal(answer, mine) for answer in winner):
            said = f"{count} of {total} candidates answer {winner[0]!r}, the completion {mine!r}"
            yield index, Finding(kind="outvoted", text=said)


def _duplicates(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Finding]]:
    """Rows whose prompt or completion is nearly that of another one; the first of each group has no finding."""
    texts = {
        "duplicate prompt": [prompt_text(row["prompt"]) for row in rows],
        "duplicate completion": [trace_text(row["completion"]) for row in rows],
    }
    for kind, held in texts.items():
        what = kind.split()[1]
        earlier: dict[int, list[tuple[int, float]]] = {}
        for first, second, index in near_duplicates(held):
            earlier.setdefault(second, []).append((first, index))
        for second, pairs in earlier.items():
            first, index = max(pairs, key=lambda pair: (pair[1], -pair[0]))
            said = (
                f"{what} {'the same as' if index == 1 else f'{100 * index:.0f} % the same as'} {rows[first]['source']}"
            )
            yield second, Finding(kind=kind, text=said, others=tuple(i for i, _ in pairs))
