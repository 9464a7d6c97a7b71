"""The questions of a stream, in windows: memory use does not grow with their number, and they are sampled as they come.

Questions keep the number that they have in the stream, so that the samples are those that a file of them would have.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from tracereward.commands.questions import Questions, source_of
from tracereward.data.demonstrations import checked_rows
from tracereward.data.readers import data_name, read_rows, windows
from tracereward.errors import InputError
from tracereward.generation.engine import EngineOptions
from tracereward.modeling.policy_settings import PolicySettings, remembered
from tracereward.tasks.recipes import Task, get_task


def first_window(
    questions: Questions, model: str, engine: EngineOptions, *, size: int
) -> tuple[Questions, Iterator[Questions]]:
    """The first window of a stream, and the further ones.

    Args:
        questions: of the stream, with the task as given.
        model: folder or Hub id of the policy, or its name at the server.
        engine: where to sample.
        size: questions in a window; a multiple of those that share random numbers.

    Raises:
        InputError: the first rows cannot be read, or there are none.
    """
    here = not engine.is_server or Path(model).expanduser().is_dir()
    stored = remembered(model) if here else None
    task = get_task(questions.task or (stored or PolicySettings()).task)
    found = _windows(questions, task, size)
    first = next(found, None)
    if first is None:
        raise InputError(f"{data_name(source_of(questions, task)[0])}: no rows")
    return first, found


def _windows(questions: Questions, task: Task, size: int) -> Iterator[Questions]:
    source, subset = source_of(questions, task)
    read = read_rows(source, questions.split, subset, stream=True)
    rows = islice(checked_rows(read, task, source, require_completion=False), questions.limit)
    before = 0
    for window in windows(rows, size):
        yield replace(questions, rows=window, before=before)
        before += len(window)
