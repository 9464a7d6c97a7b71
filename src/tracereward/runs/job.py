"""What a training command was asked to do, in one record."""

import dataclasses
from pathlib import Path
from typing import Any

from trl import ModelConfig

from tracereward.errors import InputError
from tracereward.modeling.hub import with_revision
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import RewardConfig, SupervisedConfig
from tracereward.training.fit_options import FitOptions
from tracereward.training.option_rules import check_fit, check_job
from tracereward.training.options import DataArguments

Config = SupervisedConfig | RewardConfig | AdversarialConfig
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a training command was asked to do.

    Attributes:
        kind: the command: ``sft``, ``grpo`` or ``train``.
        data: options of the demonstrations.
        config: options of the training.
        model: options of the starting policy.
        resume: whether a run in the output folder is resumed.

    Raises:
        InputError: an option would be ignored.
    """

    kind: str
    data: DataArguments
    config: Config
    model: ModelConfig
    resume: bool = False

    def __post_init__(self) -> None:
        check_job(self.kind, self.data, self.config, self.model)

    @property
    def options(self) -> tuple[Any, ...]:
        """All its options, as dataclasses."""
        return self.data, self.model, self.config

    @property
    def output_dir(self) -> str:
        """The run folder."""
        return str(self.config.output_dir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitJob:
    """What `tracereward fit` was asked to do; see `Job`.

    Raises:
        InputError: an option would be ignored.
    """

    given: FitOptions
    resume: bool = False
    kind: str = "fit"

    def __post_init__(self) -> None:
        check_fit(self.given)

    @property
    def options(self) -> tuple[Any, ...]:
        """All its options, as dataclasses."""
        return (self.given,)

    @property
    def output_dir(self) -> str:
        """The run folder."""
        return self.given.output_dir

    @property
    def states(self) -> Path:
        """The folder with the model's states."""
        return Path(self.given.states or Path(self.output_dir) / CHECKPOINTS / "states")


def starting_policy(model: ModelConfig) -> str:
    """The name of the starting policy: a folder, or a Hub id with its revision.

    Raises:
        InputError: there is none, or it is a folder and has a revision.
    """
    if model.model_name_or_path is None:
        raise InputError("no model: pass --model_name_or_path, a folder or a Hub id")
    return with_revision(model.model_name_or_path, model.model_revision)
