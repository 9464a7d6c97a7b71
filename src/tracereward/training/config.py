"""Configs of `sft` and `grpo`: TRL's `SFTConfig` and `GRPOConfig` with our own options.

The config of `tracereward train` is in `adversarial_config`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from trl import GRPOConfig, SFTConfig

from tracereward.data.perturbations import KINDS
from tracereward.errors import InputError, check_choice
from tracereward.generation.params import MAX_SEED
from tracereward.training.chosen import LONGEST
from tracereward.training.option_rules import check_config
from tracereward.training.option_types import OneOf, Range, check_options, option_defaults
from tracereward.training.options import ChosenOptions, PolicyOptions, RewardOptions, SupervisedOptions
from tracereward.training.trackers import check_trackers
from tracereward.training.trl_options import GRPO, SFT

RETIRED: dict[str, Any] = {
    "discriminator_gate_low": None,
    "discriminator_use_peft": None,
    "expert_in_group": False,
    "failure_window": 20,
    "leave_one_out": False,
    "perturbations": list(KINDS),
    "reward_temperature": 1.0,
    "warmup_save_updates": 20,
    "warmup_target_accuracy": None,
}
"""Options of earlier versions, each with the value that is equivalent to its absence."""
_COUNT = Range(min=1, whole=True)
_FROM_ZERO = Range(min=0)
_SHARE = Range(min=0, below=1)
TRL_RANGES: dict[str, Range | OneOf] = {
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "steps_per_generation": _COUNT,
    "learning_rate": _FROM_ZERO,
    "weight_decay": _FROM_ZERO,
    "max_grad_norm": _FROM_ZERO,
    "num_train_epochs": Range(above=0),
    "seed": Range(min=0, max=MAX_SEED, whole=True),
    "data_seed": Range(min=0, max=MAX_SEED, whole=True),
    "max_steps": Range(min=-1, whole=True, why="-1 trains --num_train_epochs"),
    "dataloader_num_workers": Range(min=0, whole=True),
    "neftune_noise_alpha": _FROM_ZERO,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _FROM_ZERO,
    "save_steps": Range(above=0),
    "logging_steps": Range(above=0),
    "beta": _FROM_ZERO,
    "epsilon": _FROM_ZERO,
    "epsilon_high": _FROM_ZERO,
    "delta": _FROM_ZERO,
    "num_iterations": _COUNT,
    "max_completion_length": _COUNT,
    "save_strategy": OneOf(("steps", "epoch", "no")),
    "logging_strategy": OneOf(("steps", "epoch", "no")),
    "temperature": Range(above=0, why="rollouts of a prompt must differ"),
    "top_p": Range(above=0, max=1),
    "num_generations": Range(min=2, why="the advantage compares the completions of a prompt; use 4 or more"),
}
"""Ranges of TRL's own options; values outside fail inside another library, or nothing is learned."""

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
"""Losses of TRL's GRPO trainer."""
MODEL_RANGES: dict[str, Range | OneOf] = {
    "lora_r": _COUNT,
    "lora_alpha": Range(above=0),
    "lora_dropout": _SHARE,
}


def _prepare(command: str, config: GRPOConfig | SFTConfig) -> dict[str, Any]:
    """Check the options and return them as given, before others are derived from them; select float32 on a CPU.

    TRL's default is bf16, which is slow on most CPUs; the commands turn it on where it is faster, when they know the
    model (`commands.prepared.choose_precision`).
    """
    check_options(config, TRL_RANGES)
    check_config(command, config)
    check_trackers(config.report_to)
    given = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    own = option_defaults(SFTConfig if isinstance(config, SFTConfig) else GRPOConfig)
    for option in dataclasses.fields(ChosenOptions):  # of Python code that trains without a command
        if given[option.name] is None:
            setattr(config, option.name, own.get(option.name, LONGEST))
    config.push_to_hub = False  # TRL would push each checkpoint, and the policy only: see `runs.upload`
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        config.use_cpu = True
        if config.fp16:
            raise InputError("--fp16 needs a GPU, and there is none: remove it, or use --bf16 true")
        if config.bf16 is None:
            config.bf16 = False
    return given


@dataclass
class SupervisedConfig(SupervisedOptions, SFTConfig):
    """`trl.SFTConfig` with the length limit of demonstrations and a validation split."""

    command: ClassVar[str] = SFT

    def __post_init__(self) -> None:
        self.given: dict[str, Any] = _prepare(self.command, self)
        self.max_length = None  # lengths are checked before; TRL would truncate the answer silently
        self.completion_only_loss = True
        if self.validation_fraction:
            self.eval_strategy = self.save_strategy
            self.eval_steps = self.save_steps
            self.load_best_model_at_end = True
            self.metric_for_best_model = "eval_loss"
            self.greater_is_better = False
        super().__post_init__()


@dataclass
class PolicyConfig(PolicyOptions, GRPOConfig):
    """`trl.GRPOConfig` with the defaults that `grpo` and `train` share."""

    command: ClassVar[str] = GRPO

    def __post_init__(self) -> None:
        self.given: dict[str, Any] = _prepare(self.command, self)
        check_choice("loss_type", self.loss_type, LOSS_TYPES)  # TRL checks these two after the warm-up
        if isinstance(self.scale_rewards, str):
            check_choice("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        if self.compile_rollouts:
            if self.use_vllm or not torch.cuda.is_available():
                raise InputError(
                    "compile_rollouts needs a CUDA GPU and does not work with --use_vllm: remove one of them"
                )
            if self.gradient_checkpointing:
                raise InputError(
                    "compile_rollouts needs --gradient_checkpointing false: re-enabling it after each batch of "
                    "rollouts adds hooks to the model and forces a recompilation"
                )
            self.cache_implementation: str | None = "static"
        super().__post_init__()
        if self.save_strategy == "steps" and self.save_steps % self.rollout_steps:
            raise InputError(
                f"save_steps {self.save_steps:g} is not a multiple of {self.rollout_steps}, the optimiser steps per "
                f"batch of rollouts: a resumed run would differ. Use --save_steps {self.rollout_steps}."
            )

    @property
    def rollout_steps(self) -> int:
        """Optimiser steps until a batch of rollouts and a step end together, where a run resumes exactly."""
        assert self.steps_per_generation is not None
        passes = self.steps_per_generation * self.num_iterations
        return passes // math.gcd(passes, self.gradient_accumulation_steps)


@dataclass
class RewardConfig(RewardOptions, PolicyConfig):
    """Options of `tracereward grpo`: a given reward instead of a learned one."""

    def __post_init__(self) -> None:
        if (self.base_model is None) == (self.reward == "logratio"):
            raise InputError("--reward logratio needs --base_model, and no other reward uses it")
        super().__post_init__()
