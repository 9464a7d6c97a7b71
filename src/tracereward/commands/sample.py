"""`tracereward sample`: completions of a policy, as rows."""

import math
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from tracereward.data.demonstrations import load_demonstrations
from tracereward.errors import InputError
from tracereward.generation.sampling import Sample, sample
from tracereward.modeling.loading import best_device, check_model, load_causal_lm
from tracereward.modeling.tokenization import load_tokenizer, render_prompt
from tracereward.tasks import Task, get_task


def check_drawing(temperature: float, top_p: float) -> None:
    """Refuse what tokens cannot be drawn by.

    Raises:
        InputError: names the option.
    """
    if not 0 <= temperature < math.inf:  # nan is not either
        raise InputError(f"--temperature must be a number from 0, not {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p must be over 0 and at most 1, not {top_p}")


def sample_rows(
    model: str,
    data: str | None,
    task_name: str,
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    limit: int | None = None,
    split: str = "test",
    template: str = "plain",
    batch_size: int = 64,
    done: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """Completions of a set's prompts, as rows; see `sampling.sample`.

    Yields:
        For each chunk of prompts, rows with question (its number), prompt, completion, answer (gold), extracted,
        correct, finished, length (in tokens), logprob.

    Raises:
        InputError: before the model is loaded, if anything cannot be read.
    """
    check_drawing(temperature, top_p)
    if temperature == 0 and n > 1:
        raise InputError(f"n is {n}: at temperature 0 all completions of a prompt are the same; use -n 1")
    rows, prompts, tokenizer = load_questions(model, data, task_name, limit, split, template)
    policy = load_causal_lm(model, device=best_device())
    size = max(1, batch_size // n)
    for chunk in sample(
        policy, tokenizer, prompts, n, max_new_tokens, temperature, top_p, seed, batch_size, first_chunk=done // size
    ):
        yield [sample_row(s, rows[s.prompt], get_task(task_name)) for s in chunk]


def load_questions(
    model: str, data: str | None, task_name: str, limit: int | None, split: str, template: str
) -> tuple[list[dict[str, Any]], list[str], PreTrainedTokenizerBase]:
    """The questions to draw completions of, their rendered prompts and the policy's tokenizer; loads no model.

    Raises:
        InputError: anything cannot be read.
    """
    task = get_task(task_name)
    source = data or task.dataset
    if source is None:
        raise InputError(f"task {task.name!r} has no set of its own: give --data, a file or a Hub id")
    subset = task.subset if data in (None, task.dataset) else None
    rows = load_demonstrations(source, task, split, subset, limit, require_completion=False)
    check_model(model)
    tokenizer = load_tokenizer(model)
    prompts = [render_prompt(tokenizer, row["prompt"], template, row["source"]) for row in rows]
    return rows, prompts, tokenizer


def sample_row(drawn: Sample, row: dict[str, Any], task: Task) -> dict[str, Any]:
    """What `sample` writes of one completion of the question in `row`."""
    return {
        "question": drawn.prompt,
        "prompt": row["prompt"],
        "completion": drawn.text,
        "answer": row["answer"],
        "extracted": task.extract(drawn.text),
        "correct": None if row["answer"] is None else task.verify(drawn.text, row["answer"]),
        "finished": drawn.finished,
        "length": len(drawn.ids),
        "logprob": drawn.logprob,
    }
