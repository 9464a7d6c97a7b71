"""Pools: candidates of many questions, in our format or others', read into `PoolRow` records."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tracereward.data.columns import PROMPTS, own_columns, reads_columns
from tracereward.data.demonstrations import checked_example
from tracereward.data.labels import judge
from tracereward.data.readers import read_rows
from tracereward.data.trace_rows import check_labels
from tracereward.errors import InputError
from tracereward.messages import message_text
from tracereward.tasks.recipes import Task, get_task

TRACE_FIELDS = ("completion", "candidate", "reasoning", "solution")
"""Fields that may hold the trace. With ``completion`` the field ``answer`` is the gold answer, as written by
`tracereward sample`; with the others it is the candidate's own."""
OWN_ANSWER_FIELDS = ("answer", "pred")
ID_FIELDS = ("question_id", "qid", "id")
"""Fields that may hold the question's id. In rows with their own prompt or question ``id`` is ignored, since it may be
the candidate's."""


@dataclass(frozen=True, kw_only=True)
class PoolRow:
    """One candidate.

    Attributes:
        where: file and line, for error messages.
        question: the question's id in the row; two files may use one id for two questions.
        prompt: the question in the task's wording.
        completion: the trace. If it states no answer in the task's form but its row has one, that answer is appended
            on a line of its own: reward models are trained on traces that end with one.
        answer: the candidate's answer; None if it has none.
        correct: whether the answer is correct.
        labelled: whether `correct` is the row's own label.
        model: name of the model that wrote it, if the row has it.
        logprob: mean log-prob under the policy that wrote it, if the row has it.
        finished: whether the trace ended by itself.
    """

    where: str
    question: str
    prompt: Any
    completion: str
    answer: str | None
    correct: bool
    labelled: bool
    model: str | None
    logprob: float | None
    finished: bool

    @property
    def asked(self) -> str:
        """The prompt as one string, to compare questions of two files."""
        return json.dumps(self.prompt)


def read_questions(source: str, task: Task) -> dict[str, dict[str, Any]]:
    """Prompts and gold answers of a data set by id; a row without an id has its position, from 0, as its id.

    Reads the split ``test`` of a Hub data set, and the task's subset of the task's own data set.

    Raises:
        InputError: names the file and line of a row that the task cannot read.
    """
    questions = {}
    subset = task.subset if source == task.dataset else None
    for index, (where, row) in enumerate(read_rows(source, "test", subset)):
        name = next((str(row[field]) for field in ID_FIELDS if row.get(field) is not None), str(index))
        if reads_columns(task):
            row = own_columns(row, where, source, question=True)
        questions[name] = checked_example(task, row, where, source)
    return questions


def read_pool(source: str, task: Task, questions: str | None = None, limit: int | None = None) -> list[PoolRow]:
    """Read candidates, in the order of the file.

    Args:
        source: rows with a trace (`TRACE_FIELDS`), its ``correct`` or a gold answer to check it against, and a
            ``prompt``, a ``question``, or an id (`ID_FIELDS`) of `questions`.
        task: formats the prompts, and extracts and compares answers.
        questions: file or Hub id of the questions, if rows have only their id.
        limit: use the first N rows.

    Raises:
        InputError: names the file, line and field of an incomplete row; or the file is empty.
    """
    known = read_questions(questions, task) if questions else None
    read = islice(read_rows(source), limit)
    rows = [_pool_row(where, _own_columns(row, where, source, task), task, known) for where, row in read]
    if not rows:
        raise InputError(f"{source}: no rows")
    return rows


def by_question(rows: list[PoolRow]) -> Iterator[list[PoolRow]]:
    """Candidates grouped by question (id and prompt, as in `rerank`), in the order of their first row."""
    groups: dict[tuple[str, str], list[PoolRow]] = {}
    for row in rows:
        groups.setdefault((row.question, row.asked), []).append(row)
    yield from groups.values()


def _own_columns(row: dict[str, Any], where: str, source: str, task: Task) -> dict[str, Any]:
    """A row of other tools with our columns; `TRACE_FIELDS` keep their meaning, and the task reads a question."""
    if any(isinstance(row.get(name), str) for name in TRACE_FIELDS):
        question = next((name for name in PROMPTS if isinstance(row.get(name), str)), None)
        return row if question is None or not reads_columns(task) else {**row, "prompt": row[question]}
    if not reads_columns(task) and row.get("question") is not None:
        trace = next((name for name in ("response", "output") if isinstance(row.get(name), str)), None)
        return row if trace is None else {**row, "completion": row[trace]}
    found = own_columns(row, where, source)
    if isinstance(found.get("completion"), list):
        try:
            return {**found, "completion": message_text(found["completion"][-1])}
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
    return found


def _pool_row(where: str, row: dict[str, Any], task: Task, known: dict[str, dict[str, Any]] | None) -> PoolRow:
    field = next((name for name in TRACE_FIELDS if isinstance(row.get(name), str)), None)
    if field is None:
        raise InputError(f"{where}: no trace; put it in one of the fields {', '.join(TRACE_FIELDS)}")
    alone = known is None and (row.get("prompt") or row.get("question") is not None)
    named = [row[name] for name in ID_FIELDS if row.get(name) is not None and not (alone and name == "id")]
    name = str(named[0]) if named else None
    if known is not None:
        if name is None or name not in known:
            ids = ", ".join(ID_FIELDS)
            raise InputError(f"{where}: question {name!r} is not in --questions; ids are read from {ids}")
        prompt, gold = known[name]["prompt"], known[name]["answer"]
    elif row.get("prompt"):
        answer = row.get("answer") if field == "completion" else None
        example = checked_example(get_task("generic"), {"prompt": row["prompt"], "answer": answer}, where)
        prompt, gold = example["prompt"], example["answer"]
        name = name or str(prompt if row.get("question") is None else row["question"])
    elif row.get("question") is not None:
        prompt, gold = checked_example(task, {**row, "answer": None}, where)["prompt"], None
        name = name or str(row["question"])
    else:
        raise InputError(f"{where}: no prompt or question; pass --questions if rows have only an id")
    check_labels(where, row)
    own = row
    if field != "completion":  # the answer is the candidate's own, never the gold one
        stated = next((row[name] for name in OWN_ANSWER_FIELDS if row.get(name) not in (None, "")), None)
        own = {"extracted": stated, "correct": row.get("correct")}
    text = row[field]
    judged = judge(own, text, task, gold)
    if judged.correct is None:
        raise InputError(f"{where}: neither correct (true or false) nor a gold answer to check against")
    if judged.answer is not None and task.extract(text) is None:
        text = f"{text.rstrip()}\n{task.answer_line.format(judged.answer)}".lstrip()
    finished = row.get("finished")
    if finished is not None and not isinstance(finished, bool):
        raise InputError(f"{where}: finished must be true or false, not {finished!r}")
    model = None if row.get("model") is None else str(row["model"])
    return PoolRow(
        where=where,
        question=str(name),
        prompt=prompt,
        completion=text,
        answer=judged.answer,
        correct=judged.correct,
        labelled=judged.labelled,
        model=model,
        logprob=row.get("logprob"),
        finished=finished is not False,
    )
