"""Checkpoints that are whole or ignored, and runs that stop before a number that is not finite does harm."""

import io
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tracereward.errors import RunFailed
from tracereward.files import atomic_write_json, fsync_tree
from tracereward.modeling.distributed import gather_head_for_gradient, local_shard
from tracereward.training.failures import CORRECT, PERTURBATION, Failure
from tracereward.training.validation import Validation

COMPLETE = "complete.json"  # written last: a checkpoint without it was cut short by a kill


def checkpoint_step(folder: Path) -> int:
    """N of ``checkpoint-N``."""
    return int(folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; the unfinished ones are removed."""
    complete = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (path / COMPLETE).is_file():
            complete.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)  # another process of the same run may be at it too
    return max(complete, key=checkpoint_step, default=None)


def kept(folder: Path) -> str:
    """What a run that ends early leaves, for its last sentence."""
    checkpoint = last_complete_checkpoint(folder)
    return "No checkpoint was finished" if checkpoint is None else f"The last whole checkpoint is {checkpoint.name}"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """`torch.save` under a temporary name, flushed, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class SafeTrainer(Trainer):
    """Mixin for TRL's trainers: complete checkpoints, the best of them kept, no step on a loss that is not finite.

    TRL and transformers write a checkpoint in place, file by file; a marker after everything is on the disk says that
    it is whole.

    Attributes:
        validation: questions that say which checkpoint is the best.
        start_accuracy: what the starting policy reaches on them.
    """

    validation: Validation | None = None
    start_accuracy: float = math.nan

    @property
    def failure(self) -> Failure | None:
        """The failure that ended the run, by a rule of the trainer's."""
        return None

    def load_before_training(self) -> int:
        """Load what a run without a checkpoint has already done; returns its updates."""
        return 0

    def checkpoint_score(self) -> float:
        """How good the policy is now: its accuracy on the validation questions, nan without them."""
        if self.validation is None:
            return math.nan
        accuracy = self.validation.accuracy(self.accelerator.unwrap_model(self.model))
        self.log({"validation/accuracy": accuracy})
        return accuracy

    def beats_start(self) -> bool:
        """Whether the best checkpoint is worth restoring."""
        return self.state.best_metric is not None and self.state.best_metric >= self.start_accuracy

    def restore_best(self) -> str | None:
        """Put the weights of the best checkpoint in the place of the last ones.

        Returns:
            The checkpoint's name. None if none is as good as the start: the caller has to load the starting policy.
        """
        best = self.state.best_global_step
        if best is None or not self.beats_start():
            return None
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{best}"
        self.state.best_model_checkpoint = str(folder)
        self._load_best_model()
        return folder.name

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        gather_head_for_gradient(self.accelerator.unwrap_model(self.model))
        return prepared

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A training step; stops the run at numbers that are not finite, before the optimiser uses them."""
        step = self.state.global_step + 1
        try:
            loss = super().training_step(*args, **kwargs)
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):  # torch.multinomial, while rollouts are drawn
                raise
            raise RunFailed(f"the policy's token probabilities are not finite at step {step}") from error
        if not math.isfinite(float(loss)):
            raise RunFailed(f"the policy's loss is {float(loss)} at step {step}")
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch, unless no step is left or the warm-up was stopped: transformers would take a step and then look."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        for name, parameter in self.model.named_parameters():  # pyright: ignore[reportOptionalMemberAccess]
            if parameter.requires_grad and not bool(torch.isfinite(local_shard(parameter)).all()):
                raise RunFailed(f"the policy's weights {name} are not finite after step {self.state.global_step}")
        score = self.checkpoint_score()
        if not math.isnan(score) and (self.state.best_metric is None or score >= self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = score, self.state.global_step
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            fsync_tree(folder)
            atomic_write_json(folder / COMPLETE, {"step": self.state.global_step})
        self.accelerator.wait_for_everyone()  # a process that ended now would have the launcher end the others


FIRST_ROWS = 3  # of a run: the policy has hardly moved


CLEARLY_WORSE = 0.05  # than the start; a batch of rollouts is no better measure


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
