"""What watches a training run: named failures on its log, and which of its checkpoints is the best."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback

from tracereward.failures import CORRECT, PERTURBATION, Failure, detect

FIRST_ROWS = 3  # of a run: the policy has hardly moved
CLEARLY_WORSE = 0.05  # than the start; a batch of rollouts is no better measure


class FailureWatch(TrainerCallback):
    """Asks the rules of `failures` after each log; stops the run, or warns, once for each name.

    Args:
        on_failure: ``stop``, ``warn`` or ``ignore``.
        window: logged steps that the rules look at.
        say: where a warning goes.
    """

    def __init__(self, on_failure: str, window: int, say: Callable[[str], None]):
        self.on_failure = on_failure
        self.window = window
        self.say = say
        self.history: list[dict[str, Any]] = []
        self.found: list[Failure] = []

    @property
    def stopped(self) -> Failure | None:
        """The failure that ended the run."""
        return self.found[0] if self.found and self.on_failure == "stop" else None

    def on_train_begin(self, args, state, control, **kwargs):
        """A resumed run goes on with what was logged before."""
        self.history = [dict(row) for row in state.log_history if "reward" in row]

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called by the trainer with what it logs."""
        if not logs or "reward" not in logs:
            return
        self.history.append({"step": state.global_step, **logs})
        if self.on_failure == "ignore":
            return
        failure = detect(self.history, self.window)
        if failure is None or failure.name in {known.name for known in self.found}:
            return
        self.found.append(failure)
        self.say(f"{failure.name} at step {failure.step}: {failure.reason}")
        if self.on_failure == "stop":
            control.should_training_stop = True


def score_of(rows: Sequence[Mapping[str, Any]]) -> float:
    """How good the policy of some logged rows was: mean correctness, or perturbation AUROC where no answer is known.

    Both are measured on prompts of the training file. nan if neither was logged.
    """
    for name in (CORRECT, PERTURBATION):
        values = [value for row in rows if (value := row.get(name)) is not None and math.isfinite(value)]
        if values:
            return float(np.mean(values))
    return math.nan


def better_than_start(score: float | None, history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a checkpoint is worth restoring: its score is not clearly under that of the run's first steps."""
    start = score_of(history[:FIRST_ROWS])
    return score is not None and not score < start - CLEARLY_WORSE
