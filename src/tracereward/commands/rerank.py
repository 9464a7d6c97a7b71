"""`tracereward rerank`: one of the scored candidates of each question."""

import json
from collections.abc import Iterable
from typing import Any

from tracereward.data.trace_rows import gold_of
from tracereward.files import without_nan
from tracereward.selection import Candidate, choose, ranking_aurocs, ranking_table
from tracereward.tasks import Task


def candidate_of(row: dict[str, Any], task: Task) -> Candidate:
    """A scored row as a candidate; its answer is extracted, and verified where the gold one is known."""
    text, gold, correct = row["completion"], gold_of(row), row.get("correct")
    correct = task.verify(text, gold) if gold is not None else None if correct is None else bool(correct)
    return Candidate(text, task.extract(text), row["reward"], row.get("logprob"), len(text), correct)


def rerank_rows(
    scored: Iterable[dict[str, Any]], task: Task, method: str
) -> tuple[list[dict[str, Any]], list[list[Candidate]]]:
    """The chosen row of each question, in the order in which questions first come, and all questions' candidates."""
    groups: dict[str, list[tuple[dict[str, Any], Candidate]]] = {}
    for row in scored:
        kept = {name: row[name] for name in ("question", "prompt", "completion", "answer", "reward") if name in row}
        key = json.dumps([row.get("question"), row["prompt"]])
        groups.setdefault(key, []).append((kept, candidate_of(row, task)))
    chosen, questions = [], []
    for group in groups.values():
        candidates = [candidate for _, candidate in group]
        best = choose(candidates, method, task.equal)
        found = {"extracted": candidates[best].answer, "method": method, "of": len(group)}
        chosen.append({**group[best][0], **found})
        questions.append(candidates)
    return chosen, questions


def summary(questions: list[list[Candidate]], task: Task) -> dict[str, Any] | None:
    """Accuracies and AUROCs where correctness is known for all candidates, else None."""
    if any(c.correct is None for candidates in questions for c in candidates):
        return None
    rows = ranking_table(questions, task.equal)
    return {
        "questions": len(questions),
        "no_answer": sum(c.answer is None for candidates in questions for c in candidates),
        "accuracy": {row.label: [row.accuracy, row.low, row.high] for row in rows},
        # JSON has no nan: an AUROC is undefined where all candidates are right, or all wrong.
        **without_nan(ranking_aurocs(questions)),
    }
