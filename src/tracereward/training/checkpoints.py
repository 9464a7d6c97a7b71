"""Checkpoints that are complete or ignored, and runs that stop at the first non-finite number."""

import io
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tracereward.errors import RunFailed
from tracereward.files import atomic_file, atomic_write_json, fsync_tree
from tracereward.modeling.distributed import gather_head_for_gradient, local_shard
from tracereward.modeling.policy_settings import PolicySettings
from tracereward.modeling.quantized import is_quantized
from tracereward.training.failures import CORRECT, PERTURBATION, Failure
from tracereward.training.validation import Validation

DISCRIMINATOR_FILE = "discriminator.pt"  # not in a subfolder with an adapter's name: Trainer would load it as one
COMPLETE = "complete.json"  # written last: without it a checkpoint is incomplete, for example after a kill


def checkpoint_step(folder: Path) -> int:
    """N of ``checkpoint-N``."""
    return int(folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones are removed."""
    complete = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (path / COMPLETE).is_file():
            complete.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)  # another process of the run may be removing it too
    return max(complete, key=checkpoint_step, default=None)


def kept(folder: Path) -> str:
    """One clause for error messages: the newest complete checkpoint, if any."""
    checkpoint = last_complete_checkpoint(folder)
    return "No checkpoint was completed" if checkpoint is None else f"The last complete checkpoint is {checkpoint.name}"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """`torch.save`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # written to a full disk directly, torch's error would not say that it is full
    torch.save(state, buffer)
    with atomic_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


KEPT = 2
"""Checkpoints that `save_checkpoint` keeps."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write the state after a step as a complete checkpoint, and remove all but the newest `KEPT`.

    Args:
        folder: of the checkpoints.
        step: number of the step.
        state: of the discriminator.
    """
    target = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    (target / COMPLETE).unlink(missing_ok=True)
    save_state(target / DISCRIMINATOR_FILE, state)
    atomic_write_json(target / COMPLETE, {"step": step})
    fsync_tree(target)
    older = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=checkpoint_step)[:-KEPT]
    for path in older:
        shutil.rmtree(path)


class SafeTrainer(Trainer):
    """Mixin for TRL's trainers: complete checkpoints, selection of the best one, no step on a non-finite loss.

    TRL and transformers write a checkpoint in place, file by file. A marker is written once all files are on the disk.

    Attributes:
        validation: questions that select the best checkpoint.
        start_accuracy: the starting policy's accuracy on them.
        remember: what the policy remembers, written into each checkpoint too.
        saved: steps of the last two checkpoints; 0 where there is none.
    """

    validation: Validation | None = None
    remember: PolicySettings | None = None
    start_accuracy: float = math.nan
    saved: tuple[int, int] = (0, 0)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for parameter in self.model.parameters():  # pyright: ignore[reportOptionalMemberAccess]
            # TRL trains the adapters of a quantized model in bfloat16, where an update smaller than 1/256 of a weight
            # is rounded away: at the learning rates of GRPO nothing would be learned.
            if parameter.requires_grad and is_quantized(self.model):
                parameter.data = parameter.data.float()

    @property
    def failure(self) -> Failure | None:
        """The failure that stopped the run, if the trainer detects failures."""
        return None

    def load_before_training(self) -> int:
        """Load progress made before the first checkpoint; returns the number of updates."""
        return 0

    def rate_checkpoint(self) -> None:
        """Before a checkpoint is written: compare the policy with the best one on the validation questions, if any."""
        if self.validation is None:
            return
        accuracy = self.validation.accuracy(self.accelerator.unwrap_model(self.model))
        self.log({"validation/accuracy": accuracy})
        self.keep_if_best(self.state.global_step, accuracy)

    def keep_if_best(self, step: int, score: float) -> None:
        """Make a checkpoint the best one unless its score is lower than the best, or nan."""
        if not math.isnan(score) and (self.state.best_metric is None or score >= self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = score, step

    def beats_start(self) -> bool:
        """Whether the best checkpoint is at least as good as the starting policy."""
        return self.state.best_metric is not None and self.state.best_metric >= self.start_accuracy

    def restore_best(self) -> str | None:
        """Load the weights of the best checkpoint.

        Returns:
            The checkpoint's name. None if none is as good as the starting policy, which the caller then loads.
        """
        best = self.state.best_global_step
        if best is None or not self.beats_start():
            return None
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{best}"
        self.state.best_model_checkpoint = str(folder)
        self._load_best_model()
        return folder.name

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint without all weights; tied ones, which are not stored twice, are not missing."""
        tied = set(self.accelerator.unwrap_model(self.model).all_tied_weights_keys)
        wrong = sorted(set(load_result.missing_keys) - tied) + sorted(load_result.unexpected_keys)
        if wrong:
            raise RunFailed(f"the checkpoint does not fit the model: {', '.join(wrong[:3])}")

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        gather_head_for_gradient(self.accelerator.unwrap_model(self.model))
        return prepared

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A training step; raises `RunFailed` at non-finite numbers, before the optimiser uses them."""
        step = self.state.global_step + 1
        try:
            loss = super().training_step(*args, **kwargs)
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):  # torch.multinomial, while rollouts are sampled
                raise
            raise RunFailed(f"the policy's token probabilities are not finite at step {step}") from error
        if not math.isfinite(float(loss)):
            raise RunFailed(f"the policy's loss is {float(loss)} at step {step}")
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch, unless no step is left or the warm-up was stopped: transformers checks only after a step."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        for name, parameter in self.model.named_parameters():  # pyright: ignore[reportOptionalMemberAccess]
            if parameter.requires_grad and not bool(torch.isfinite(local_shard(parameter)).all()):
                raise RunFailed(f"the policy's weights {name} are not finite after step {self.state.global_step}")
        self.rate_checkpoint()
        if self.saved[1] != self.state.global_step:
            self.saved = (self.saved[1], self.state.global_step)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if self.remember is not None:
                self.remember.write(folder)
            fsync_tree(folder)
            atomic_write_json(folder / COMPLETE, {"step": self.state.global_step, "since": self.saved[0]})
        self.accelerator.wait_for_everyone()  # if a process ended now, the launcher would kill the others

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            marker = json.loads((Path(checkpoint) / COMPLETE).read_text(encoding="utf-8"))
            self.saved = (marker.get("since", 0), checkpoint_step(Path(checkpoint)))


FIRST_ROWS = 3  # first logged rows of a run, when the policy has hardly changed
CLEARLY_WORSE = 0.05  # below the start; a batch of rollouts is no more precise


def score_of(rows: Sequence[Mapping[str, Any]]) -> float:
    """Score of the policy from logged rows: mean correctness, or perturbation AUROC without gold answers.

    Both are measured on training prompts. nan if neither was logged.
    """
    for name in (CORRECT, PERTURBATION):
        values = [value for row in rows if (value := row.get(name)) is not None and math.isfinite(value)]
        if values:
            return float(np.mean(values))
    return math.nan


def score_of_checkpoint(rows: Sequence[Mapping[str, Any]], since: int, step: int) -> float:
    """`score_of` a checkpoint: of the policies after the checkpoint before it, up to its own.

    The rollouts of a row were sampled before its step, by the policy of the step before: a policy's own are in the
    first row after it, and correctness counts from the second row after `since` up to the first after `step`. The
    discriminator, which the perturbation AUROC measures, has learned from them already.

    Args:
        rows: all logged rows.
        since: step of the checkpoint before; 0 if there is none.
        step: the checkpoint's.
    """
    first, last = (sum(row["step"] <= place for row in rows) for place in (since, step))
    correct = [{CORRECT: row.get(CORRECT)} for row in rows[first + 1 : last + 1]]
    return score_of([*correct, *({PERTURBATION: row.get(PERTURBATION)} for row in rows[first:last])])


def better_than_start(score: float | None, history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a checkpoint's score is not clearly below that of the run's first steps."""
    start = score_of(history[:FIRST_ROWS])
    return score is not None and not score < start - CLEARLY_WORSE
