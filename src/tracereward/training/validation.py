"""Questions with gold answers that select a run's final checkpoint. They are not trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracereward.data.demonstrations import load_demonstrations
from tracereward.errors import InputError
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import generate
from tracereward.modeling.rendering import Rendering, render
from tracereward.tasks.recipes import Task
from tracereward.training.options import DataArguments


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Validation questions and the settings of answering them.

    Attributes:
        prompts: rendered prompts.
        answers: gold answers.
        completions: rendered traces of experts, None for a question without one. They are only for the rule for the
            first error.
        task: verifies answers.
        tokenizer: the policy's.
        max_new_tokens: length limit of an answer.
        batch_size: questions per batch.
    """

    prompts: list[str]
    answers: list[str]
    completions: list[str | None]
    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    batch_size: int

    def __len__(self) -> int:
        return len(self.prompts)

    def accuracy(self, policy: PreTrainedModel) -> float:
        """Share of the questions that `policy` answers correctly by greedy decoding. Uses no random numbers."""
        training = policy.training
        greedy = SamplingParams(max_new_tokens=self.max_new_tokens, temperature=0.0)
        right = []
        for start in range(0, len(self.prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            ids = generate(policy, self.tokenizer, self.prompts[part], greedy)
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            right += [self.task.verify(text, gold) for text, gold in zip(texts, self.answers[part], strict=True)]
        policy.train(training)
        return float(np.mean(right))


def load_validation(
    data: DataArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    rendering: Rendering,
    max_new_tokens: int,
    batch_size: int,
) -> Validation | None:
    """Load the validation questions; None without `validation_dataset_name`.

    Args:
        data: data options of the run.
        task: the run's task.
        tokenizer: the policy's.
        rows: rendered training rows.
        rendering: how their prompts were rendered.
        max_new_tokens: see `Validation`.
        batch_size: see `Validation`.

    Raises:
        InputError: a question has no gold answer or is also trained on; names file and line.
    """
    if data.validation_dataset_name is None:
        return None
    split = data.validation_dataset_split
    questions = load_demonstrations(data.validation_dataset_name, task, split=split, require_completion=False)
    questions = render(questions, tokenizer, rendering)
    trained_on = {row["prompt"]: row["source"] for row in rows}
    for row in questions:
        if row["answer"] is None:
            raise InputError(f"{row['source']}: no answer; a validation question needs one")
        if row["prompt"] in trained_on:
            raise InputError(
                f"{row['source']}: the run also trains on this question ({trained_on[row['prompt']]}); "
                "remove it from one of the two"
            )
    return Validation(
        prompts=[row["prompt"] for row in questions],
        answers=[row["answer"] for row in questions],
        completions=[row["completion"] for row in questions],
        task=task,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
