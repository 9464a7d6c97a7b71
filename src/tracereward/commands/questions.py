"""`Questions`: a set of questions to sample completions for; its rows and prompts."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tracereward.data.demonstrations import load_demonstrations
from tracereward.errors import InputError
from tracereward.generation.sampling import Sample
from tracereward.modeling.loading import check_model
from tracereward.modeling.rendering import Rendering, render_prompt
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.tasks.recipes import Task, get_task


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A set of questions.

    Attributes:
        data: file or Hub id; None is the task's own set.
        task: name of the task that reads the rows and checks answers.
        split: of a Hub set.
        limit: use the first rows only.
        template: plain or chat.
    """

    data: str | None = None
    task: str = "generic"
    split: str = "test"
    limit: int | None = None
    template: str = "plain"


def read_questions(questions: Questions) -> list[dict[str, Any]]:
    """The rows.

    Raises:
        InputError: unreadable input.
    """
    task = get_task(questions.task)
    source = questions.data or task.dataset
    if source is None:
        raise InputError(f"task {task.name!r} has no default data set: give --data, a file or a Hub id")
    subset = task.subset if questions.data in (None, task.dataset) else None
    return load_demonstrations(
        source, task, split=questions.split, subset=subset, limit=questions.limit, require_completion=False
    )


def load_questions(questions: Questions, model: str) -> tuple[list[dict[str, Any]], list[str], PreTrainedTokenizerBase]:
    """The rows, their rendered prompts and the policy's tokenizer, without loading the model.

    Raises:
        InputError: unreadable input.
    """
    rows = read_questions(questions)
    check_model(model)
    tokenizer = load_tokenizer(model)
    prompts = [
        render_prompt(tokenizer, row["prompt"], Rendering(template=questions.template), row["source"]) for row in rows
    ]
    return rows, prompts, tokenizer


def sample_row(sample: Sample, row: dict[str, Any], task: Task) -> dict[str, Any]:
    """The output row of ``tracereward sample`` for one completion of the question in `row`."""
    return {
        "question": sample.prompt,
        "prompt": row["prompt"],
        "completion": sample.text,
        "answer": row["answer"],
        "extracted": task.extract(sample.text),
        "correct": None if row["answer"] is None else task.verify(sample.text, row["answer"]),
        "finished": sample.finished,
        "length": len(sample.ids),
        "logprob": sample.logprob,
    }
