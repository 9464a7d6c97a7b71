"""Pools: candidates of many questions of which each is known to be right or wrong."""

from collections.abc import Iterator
from dataclasses import dataclass

from tracereward.data.candidates import CandidateRow, read_candidates
from tracereward.errors import InputError
from tracereward.tasks.recipes import Task


@dataclass(frozen=True, kw_only=True)
class PoolRow(CandidateRow):
    """A candidate that is known to be right or wrong."""

    correct: bool


def read_pool(source: str, task: Task, questions: str | None = None, limit: int | None = None) -> list[PoolRow]:
    """Read candidates, in the order of the file; see `read_candidates`.

    Raises:
        InputError: as `read_candidates`, or a row has neither a ``correct`` nor a gold answer.
    """
    rows = []
    for row in read_candidates(source, task, questions=questions, limit=limit):
        if row.correct is None:
            raise InputError(f"{row.where}: neither correct (true or false) nor a gold answer to check against")
        rows.append(PoolRow(**vars(row)))
    return rows


def by_question(rows: list[PoolRow]) -> Iterator[list[PoolRow]]:
    """Candidates grouped by question (id and prompt, as in `rerank`), in the order of their first row."""
    groups: dict[tuple[str, str], list[PoolRow]] = {}
    for row in rows:
        groups.setdefault((row.question, row.asked), []).append(row)
    yield from groups.values()
