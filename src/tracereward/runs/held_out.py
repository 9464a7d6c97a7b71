"""Questions that the discriminator of a run was not trained on: for its verdict and its rule for the first error."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tracereward.training.trainer import AdversarialTrainer
from tracereward.training.validation import Validation

QUESTIONS = 300
"""Held-out questions used at most."""


@dataclass(frozen=True, kw_only=True)
class HeldOutQuestion:
    """A question that the discriminator was not trained on.

    Attributes:
        prompt: rendered for the policy.
        completion: an expert's trace; None if there is none.
        answer: the gold answer; None if it is not known.
    """

    prompt: str
    completion: str | None
    answer: str | None


def held_out_questions(
    trainer: AdversarialTrainer, rows: Sequence[dict[str, Any]], validation: Validation | None
) -> list[HeldOutQuestion]:
    """The held-out demonstrations and the validation questions; of more than `QUESTIONS` as many are sampled.

    Args:
        trainer: of the run.
        rows: its rendered demonstrations.
        validation: its validation questions.
    """
    chosen = [rows[index] for index in sorted(trainer.discriminator.held_out)]
    found = [
        HeldOutQuestion(prompt=row["prompt"], completion=row["completion"], answer=row["answer"]) for row in chosen
    ]
    if validation is not None and not trainer.bridge.prompts:  # otherwise they are rendered for the policy alone
        parts = zip(validation.prompts, validation.completions, validation.answers, strict=True)
        found += [HeldOutQuestion(prompt=prompt, completion=text, answer=answer) for prompt, text, answer in parts]
    rng = random.Random(f"held-out questions {trainer.config.seed}")
    return rng.sample(found, QUESTIONS) if len(found) > QUESTIONS else found
