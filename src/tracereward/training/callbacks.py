"""Callbacks of the training commands: metrics file, stop signal, progress bar and failure detection."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from tracereward.files import read_jsonl, without_nan, write_jsonl
from tracereward.modeling.distributed import all_reduce_max
from tracereward.training.failures import Failure, detect
from tracereward.training.trackers import Trackers


class MetricsFile(TrainerCallback):
    """Appends each log to ``metrics.jsonl``: one object per line, starting with `phase` and `step`.

    Attributes:
        trackers: also get the rows that are appended; the trainer's own logs reach them without this class.
    """

    def __init__(self, path: Path, phase: str):
        self.path = path
        self.phase = phase
        self.trackers: Trackers | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by the trainer for each log."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            self._write({"phase": self.phase, "step": state.global_step, **logs})

    def append(self, row: dict[str, Any]) -> None:
        """Append one row, and give it to the trackers; in the file nan and infinity become null."""
        self._write(row)
        if self.trackers is not None:
            self.trackers.log(row)

    def _write(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(without_nan(row)) + "\n")

    def rewind(self, step: int, warmup_updates: int) -> None:
        """Remove the rows that were logged after the checkpoint from which the run resumes, and those of its end."""

        def keep(row: dict) -> bool:
            if row["phase"] == "warmup":
                return row["update"] <= warmup_updates
            return row["phase"] == self.phase and row["step"] <= step

        write_jsonl(self.path, [row for row in read_jsonl(self.path) if keep(row)])


class StopSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM finishes the current step, saves a checkpoint and stops; a second signal stops at once.

    Args:
        every: optimiser steps per batch of rollouts; the run stops after the last of them.
    """

    def __init__(self, every: int = 1):
        self.every = every
        self.signalled: bool = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        """Install handlers of SIGINT and SIGTERM; main thread only."""
        self._old = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Restore the signal handlers.

        A failed process of a distributed run ignores SIGTERM: the launcher sends it when another process has ended, and
        this one must still report its error.
        """
        for number, handler in self._old.items():
            fails = kind is not None and number == signal.SIGTERM and dist.is_initialized()
            signal.signal(number, signal.SIG_IGN if fails else handler)

    def _handle(self, number, frame):
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = True

    def received(self) -> bool:
        """Whether any process received a signal. A collective call, so that all stop at the same step."""
        return all_reduce_max(int(self.signalled)) > 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer after each optimiser step."""
        if self.received() and state.global_step < state.max_steps and state.global_step % self.every == 0:
            control.should_save = True
            control.should_training_stop = True


class Progress(TrainerCallback):
    """A progress bar on stderr with the remaining time and a few metrics; stdout stays free for data."""

    SHOWN: ClassVar = {
        "loss": "loss",
        "reward": "reward",
        "rewards/correct/mean": "correct",
        "monitor/within_prompt_auroc": "AUROC",
    }

    def __init__(self, description: str):
        self.description = description
        self.bar: tqdm | None = None

    @classmethod
    def replace_default(cls, trainer: Trainer, description: str) -> None:
        """Replace the trainer's progress bar, which prints every log to stdout."""
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(cls(description))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance; the bar starts with the first step, after any warm-up."""
        if not state.is_world_process_zero or args.disable_tqdm:
            return
        if self.bar is None:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step - 1, desc=self.description)
        self.bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show current metrics after the bar."""
        if self.bar is not None and logs:
            shown = {label: logs[key] for key, label in self.SHOWN.items() if isinstance(logs.get(key), float)}
            self.bar.set_postfix({label: f"{value:.3g}" for label, value in shown.items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class FailureWatch(TrainerCallback):
    """Applies the rules of `failures` after each log; stops the run or warns, once per failure.

    Args:
        on_failure: ``stop``, ``warn`` or ``ignore``.
        say: called with a warning.
    """

    def __init__(self, on_failure: str, say: Callable[[str], None]):
        self.on_failure = on_failure
        self.say = say
        self.history: list[dict[str, Any]] = []
        self.found: list[Failure] = []

    @property
    def stopped(self) -> Failure | None:
        """The failure that stopped the run, if any."""
        return self.found[0] if self.found and self.on_failure == "stop" else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the history of a resumed run."""
        self.history = [dict(row) for row in state.log_history if "reward" in row]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by the trainer for each log."""
        if not logs or "reward" not in logs:
            return
        self.history.append({"step": state.global_step, **logs})
        if self.on_failure == "ignore":
            return
        failure = detect(self.history)
        if failure is None or failure.name in {known.name for known in self.found}:
            return
        self.found.append(failure)
        self.say(f"{failure.name} at step {failure.step}: {failure.reason}")
        if self.on_failure == "stop":
            control.should_training_stop = True
