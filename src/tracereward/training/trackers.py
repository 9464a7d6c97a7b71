"""Trackers of ``--report_to`` (TensorBoard, Weights & Biases, Trackio, ...): checked before a run, ended after it."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, integration_utils

from tracereward.console import warn_once
from tracereward.errors import InputError, first_line, nearest

PACKAGES: dict[str, tuple[Callable[[], bool], str]] = {
    "azure_ml": (integration_utils.is_azureml_available, "pip install azureml-core"),
    "clearml": (integration_utils.is_clearml_available, "pip install clearml"),
    "codecarbon": (integration_utils.is_codecarbon_available, "pip install codecarbon"),
    "comet_ml": (integration_utils.is_comet_available, "pip install comet-ml, and set COMET_API_KEY"),
    "dagshub": (integration_utils.is_dagshub_available, "pip install dagshub mlflow"),
    "dvclive": (integration_utils.is_dvclive_available, "pip install dvclive"),
    "flyte": (integration_utils.is_flytekit_available, "pip install flytekit"),
    "kubeflow": (integration_utils.is_kubeflow_available, "run it in a Kubeflow TrainJob"),
    "mlflow": (integration_utils.is_mlflow_available, "pip install mlflow"),
    "neptune": (integration_utils.is_neptune_available, "pip install neptune"),
    "swanlab": (integration_utils.is_swanlab_available, "pip install swanlab"),
    "tensorboard": (integration_utils.is_tensorboard_available, "pip install tensorboard"),
    "trackio": (integration_utils.is_trackio_available, "pip install trackio"),
    "wandb": (integration_utils.is_wandb_available, "pip install wandb"),
}
"""The trackers of transformers: whether each can be used, and what is needed for it."""


def check_trackers(report_to: str | list[str] | None) -> None:
    """Check that each tracker is known and installed.

    Raises:
        InputError: names the tracker and the command that installs it.
    """
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if names == ["all"] and not any(available() for available, _ in PACKAGES.values()):
        raise InputError("--report_to all: no tracker is installed (for example: pip install tensorboard)")
    if names in (["all"], ["none"]):
        return
    for name in names:
        if name not in PACKAGES:
            near = nearest(name, PACKAGES)
            fix = f"did you mean {near!r}? " if near else ""
            raise InputError(f"--report_to {name}: {fix}Known: {', '.join(PACKAGES)}, all, none")
        available, fix = PACKAGES[name]
        if not available():
            raise InputError(f"--report_to {name} is not installed: {fix}")


class Trackers(TrainerCallback):
    """Forwards a trainer's events to its trackers, and the rows that tracereward adds to ``metrics.jsonl``.

    transformers ends the trackers with the training. The choice of a checkpoint and a failure are logged later, so
    they are ended by `end`, when the run is complete.

    Args:
        trackers: of transformers.
        args: of the training.
        folder: the run folder; its name is the name of the run unless ``run_name`` is set.
        settings: options of the run, for the trackers' configuration.
    """

    def __init__(
        self, trackers: Sequence[TrainerCallback], args: TrainingArguments, folder: Path, settings: dict[str, Any]
    ):
        self.trackers: list[TrainerCallback] = list(trackers)
        for tracker in self.trackers:
            if isinstance(tracker, TensorBoardCallback):
                tracker.logging_dir = tracker.logging_dir or str(folder / "tensorboard")
        self.args: Any = copy.copy(args)
        self.args.run_name = args.run_name or folder.name
        options = {**args.to_dict(), **settings, "run_name": self.args.run_name}
        self.args.to_dict = lambda: options  # trackers read their configuration here
        self.state: TrainerState = TrainerState()
        self.control: TrainerControl = TrainerControl()
        self.context: dict[str, Any] = {}  # the model, the tokenizer, ...
        self.began: bool = False

    @classmethod
    def of_trainer(cls, trainer: Trainer, folder: Path, settings: dict[str, Any]) -> "Trackers":
        """Take over the trackers of a trainer."""
        kinds = tuple(integration_utils.get_reporting_integration_callbacks(trainer.args.report_to))
        handler = trainer.callback_handler
        made = cls([one for one in handler.callbacks if isinstance(one, kinds)], trainer.args, folder, settings)
        handler.callbacks = [made, *(one for one in handler.callbacks if one not in made.trackers)]
        made.state, made.control = trainer.state, trainer.control
        return made

    @classmethod
    def started(
        cls, report_to: list[str], folder: Path, settings: dict[str, Any], run_name: str | None = None
    ) -> "Trackers":
        """Trackers of a run without a trainer, started.

        Raises:
            InputError: a tracker cannot start, for example without a login.
        """
        args = TrainingArguments(output_dir=str(folder), report_to=report_to, run_name=run_name)
        kinds = integration_utils.get_reporting_integration_callbacks(args.report_to)
        made = cls([kind() for kind in kinds], args, folder, settings)
        made.on_train_begin(made.args, made.state, made.control)
        return made

    def _forward(self, event: str, state: TrainerState, **kwargs: Any) -> None:
        """Forward an event. A tracker that fails, for example without a connection, does not end the run."""
        for tracker in self.trackers:
            try:
                getattr(tracker, event)(self.args, state, self.control, **kwargs)
            except Exception as error:  # each tracker raises its own kinds
                warn_once(f"{type(tracker).__name__}: the tracker failed ({first_line(error)}); the run goes on")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the trackers.

        Raises:
            InputError: a tracker cannot start, for example without a login.
        """
        self.state, self.context, self.began = state, kwargs, True
        try:
            for tracker in self.trackers:
                tracker.on_train_begin(self.args, state, self.control, **kwargs)
        except Exception as error:  # each tracker raises its own kinds
            raise InputError(
                f"--report_to {', '.join(self.args.report_to)} cannot start: {first_line(error)}"
            ) from error

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Forward a log, without metrics that have no value."""
        logs = {name: value for name, value in (logs or {}).items() if value is not None}
        self._forward("on_log", state, logs=logs, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forward the end of a step."""
        self._forward("on_step_end", state, **kwargs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forward an evaluation."""
        self._forward("on_evaluate", state, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forward a saved checkpoint."""
        self._forward("on_save", state, **kwargs)

    def log(self, row: dict[str, Any]) -> None:
        """Log a row of tracereward: its values under the row's phase, at its step or, in the warm-up, its update."""
        step = row.get("step", row.get("update", 0))
        logs = {
            f"{row['phase']}/{name}": ", ".join(map(str, value)) if isinstance(value, list) else value
            for name, value in row.items()
            if name not in ("phase", "step", "update") and value is not None
        }
        state = copy.copy(self.state)
        state.global_step = step
        self._forward("on_log", state, logs=logs, **self.context)

    def end(self) -> None:
        """End the trackers, if they were started."""
        if self.began:
            self.began = False
            self._forward("on_train_end", self.state, **self.context)
