"""Whether a candidate is right: by its row's own label, else by comparing its answer with the gold answer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tracereward.selection import Candidate
from tracereward.tasks.recipes import Task


@dataclass(frozen=True)
class Judgement:
    """What is known about one candidate.

    Attributes:
        answer: the answer it states, None if it states none.
        correct: whether it is right; None without a label and without a gold answer.
        labelled: whether `correct` is the row's own label.
    """

    answer: str | None
    correct: bool | None
    labelled: bool = False


def judge(row: Mapping[str, Any], text: str, task: Task, gold: str | None) -> Judgement:
    """Judge one candidate; every command that reads labelled rows goes through this function.

    The row's own ``correct`` wins: people, or a stronger grader, may have set it. Without one, the answer is compared
    with the gold answer by the task.

    Args:
        row: fields ``extracted`` (the answer, where it is already known) and ``correct``, each optional or null.
        text: the trace.
        task: extracts and compares answers.
        gold: the gold answer, None if it is unknown.
    """
    found = row.get("extracted")
    answer = str(found) if found is not None and str(found).strip() else task.extract(text)
    if row.get("correct") is not None:
        return Judgement(answer, bool(row["correct"]), labelled=True)
    return Judgement(answer, None if gold is None else answer is not None and task.equal(answer, gold))


def judgement_counts(candidates: Iterable[Candidate]) -> dict[str, int]:
    """How many candidates are ``labelled``, ``graded`` (compared with a gold answer) and ``unknown``."""
    found = list(candidates)
    labelled = sum(c.labelled for c in found)
    unknown = sum(c.correct is None for c in found)
    return {"labelled": labelled, "graded": len(found) - labelled - unknown, "unknown": unknown}


def judged_by(counts: Mapping[str, int]) -> str:
    """`judgement_counts` as a sentence."""
    text = (
        f"Right or wrong: {counts['labelled']} by the rows' own label (correct), "
        f"{counts['graded']} graded against the gold answer"
    )
    return f"{text}, {counts['unknown']} unknown." if counts["unknown"] else f"{text}."
