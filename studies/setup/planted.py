"""Demonstrations of real data sets, each with a wrong copy that may be planted in its place."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tracereward.data.demonstrations import load_demonstrations
from tracereward.data.readers import read_rows
from tracereward.data.wrong_copies import ANSWER, wrong_copy
from tracereward.errors import InputError, check_choice
from tracereward.modeling.rendering import Rendering, render
from tracereward.modeling.steps import LINES, StepRule
from tracereward.modeling.tokenization import encode_completion, encode_prompt, load_tokenizer
from tracereward.tasks.recipes import Task, get_task

PLANTED = ("operator", "number", "swap_steps", ANSWER)
"""Kinds of errors that are planted."""
LONGEST = 300
"""Tokens of a demonstration with its prompt, at most."""


def _medmcqa(row: dict[str, Any]) -> dict[str, Any]:
    """A row of MedMCQA with the fields of the task `medreason`."""
    return {
        "question": row["question"],
        "options": [row[name] for name in ("opa", "opb", "opc", "opd")],
        "reasoning": row["exp"],
        "answer": "ABCD"[row["cop"] - 1],
    }


@dataclass(frozen=True, kw_only=True)
class Source:
    """How a data set is read: its task, what ends a step, and what is done to a raw row first."""

    task: str
    rule: StepRule
    row: Callable[[dict[str, Any]], dict[str, Any]] = dict


SOURCES = {
    "gsm8k": Source(task="gsm8k", rule=LINES),
    "mmlu_pro": Source(task="mmlu_pro", rule=StepRule(steps="sentence")),
    "medmcqa": Source(task="medreason", rule=StepRule(steps="sentence"), row=_medmcqa),
}


@dataclass(frozen=True, kw_only=True)
class PlantedPool:
    """N demonstrations, and a wrong copy of each.

    Attributes:
        task: reads their answers.
        rule: what ends their steps.
        model: folder of the frozen model.
        tokenizer: its tokenizer.
        clean: rendered rows as they are.
        wrong: rendered rows with one error; None where none can be planted.
        kinds: of the errors.
    """

    task: Task
    rule: StepRule
    model: str
    tokenizer: PreTrainedTokenizerBase
    clean: Sequence[dict[str, Any]]
    wrong: Sequence[dict[str, Any] | None]
    kinds: Sequence[str | None]

    def planted(self, seed: int, rate: float) -> tuple[list[dict[str, Any]], list[bool]]:
        """The rows with a share of them wrong, and which; those of a lower rate are among those of a higher one."""
        order = [i for i, row in enumerate(self.wrong) if row is not None]
        random.Random(f"planted {seed}").shuffle(order)
        chosen = set(order[: round(rate * len(self.clean))])
        rows = [self.wrong[i] if i in chosen else row for i, row in enumerate(self.clean)]
        return [row for row in rows if row is not None], [i in chosen for i in range(len(rows))]


def load_planted(data: str, name: str, model: str, *, count: int) -> PlantedPool:
    """Read a data set and make the wrong copies.

    Args:
        data: its file.
        name: one of `SOURCES`.
        model: folder of the frozen model.
        count: number of demonstrations, chosen at random among those of at most `LONGEST` tokens.

    Raises:
        InputError: the file cannot be read, or has too few short demonstrations.
    """
    source = SOURCES[check_choice("name", name, SOURCES)]
    task, tokenizer = get_task(source.task), load_tokenizer(model)
    raw = [source.row(row) for _, row in read_rows(data)]
    random.Random("demonstrations").shuffle(raw)
    found: list[dict[str, Any]] = []
    for row in raw:
        [example] = render(load_demonstrations([row], task), tokenizer, Rendering())
        tokens = len(encode_prompt(tokenizer, example["prompt"])) + len(
            encode_completion(tokenizer, example["completion"])
        )
        if tokens <= LONGEST:
            found.append(example)
        if len(found) == count:
            break
    else:
        raise InputError(f"{data}: {len(found)} demonstrations of {LONGEST} tokens or fewer, and {count} are asked for")
    wrong, kinds = [], []
    for number, row in enumerate(found):
        rng = random.Random(f"planted copy {number}")
        copy = wrong_copy(row["completion"], row["prompt"], task, rng, kinds=PLANTED, rule=source.rule)
        wrong.append(None if copy is None else {**row, "completion": copy[0], "answer": None})
        kinds.append(None if copy is None else copy[1])
    clean = [{**row, "answer": None, "source": f"row {number}"} for number, row in enumerate(found)]
    return PlantedPool(
        task=task,
        rule=source.rule,
        model=model,
        tokenizer=tokenizer,
        clean=clean,
        wrong=wrong,
        kinds=kinds,
    )
