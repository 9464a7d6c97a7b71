"""Options of the training commands, beside those of TRL's `GRPOConfig`, `SFTConfig` and `ModelConfig`.

Those of `tracereward train` are in `adversarial_config`.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import GRPOConfig, SFTConfig

from tracereward.errors import InputError, check_choice
from tracereward.modeling.tokenization import TEMPLATES

ON_LONG = ("refuse", "drop")
RETIRED: dict[str, Any] = {}
"""Options that only earlier versions have, each with the one value that means the same as its absence."""


@dataclass
class DataArguments:
    """Which demonstrations, read how."""

    task: str = field(
        default="generic",
        metadata={
            "help": "Recipe that maps a set's fields: arithmetic, gsm8k, hotpotqa, math, medreason, mmlu_pro, "
            "prontoqa, strategyqa, or generic for rows with prompt, completion and optionally answer."
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "JSONL or Parquet file, or Hub id. Default: the recipe's own set on the Hub."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a Hub set to train on."})
    unlabeled_dataset_name: str | None = field(
        default=None,
        metadata={"help": "File or Hub id with further prompts for the policy's rollouts; no trace is read from it."},
    )
    validation_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "File or Hub id of questions with gold answers: after each save the policy answers them greedily, "
            "and the run leaves the checkpoint, or the start, that answers most right. Nothing is trained on them."
        },
    )
    validation_dataset_split: str = field(
        default="validation", metadata={"help": "Split of a Hub set in --validation_dataset_name."}
    )
    max_demonstrations: int | None = field(default=None, metadata={"help": "Use the first N demonstrations only."})
    template: str = field(
        default="plain", metadata={"help": "plain: prompts as the recipe writes them; chat: the tokenizer's template."}
    )
    on_long: str = field(
        default="refuse",
        metadata={
            "help": "A completion over --max_completion_length: refuse to start, or drop the row and say so. "
            "Nothing is ever cut."
        },
    )

    def __post_init__(self) -> None:
        check_choice("template", self.template, TEMPLATES)
        check_choice("on_long", self.on_long, ON_LONG)


def _prepare(config: GRPOConfig | SFTConfig) -> dict[str, Any]:
    """Remember the options as they were given, before others are derived from them; float32 on a CPU.

    TRL's default is bf16, which a machine without an accelerator does not train in.
    """
    given = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        config.use_cpu = True
        if config.bf16 is None:
            config.bf16 = False
    return given


@dataclass
class SupervisedConfig(SFTConfig):
    """`trl.SFTConfig` with the length limit of demonstrations and a validation split."""

    max_completion_length: int = field(
        default=1024, metadata={"help": "Longest completion in tokens, with the end-of-sequence token."}
    )
    validation_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of the demonstrations held out; their loss chooses the checkpoint that is kept."},
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every N steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; at least 2."})

    def __post_init__(self) -> None:
        self.given: dict[str, Any] = _prepare(self)
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"validation_fraction must be in [0, 1), not {self.validation_fraction}")
        self.max_length = None  # lengths are checked before; TRL would cut the answer off silently
        self.completion_only_loss = True
        if self.validation_fraction:
            self.eval_strategy = self.save_strategy
            self.eval_steps = self.save_steps
            self.load_best_model_at_end = True
            self.metric_for_best_model = "eval_loss"
            self.greater_is_better = False
        check_checkpoint_limit(self.save_total_limit)
        check_numbers(self)
        super().__post_init__()


@dataclass
class PolicyConfig(GRPOConfig):
    """`trl.GRPOConfig` with the defaults that `grpo` and `train` share."""

    logging_steps: float = field(default=1, metadata={"help": "Log every N steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; at least 2."})
    compile_rollouts: bool = field(
        default=False,
        metadata={
            "help": "On a CUDA GPU without vLLM: draw rollouts by a static cache and a compiled decoding step, in one "
            "shape for the whole run. Costs a minute of compiling; needs gradient_checkpointing false."
        },
    )

    def __post_init__(self) -> None:
        self.given: dict[str, Any] = _prepare(self)
        if self.num_generations is not None and self.num_generations < 2:
            raise InputError(
                f"num_generations is {self.num_generations}: a group needs at least 2 completions of a prompt, "
                "because the advantage compares them. Use 4 or more."
            )
        check_checkpoint_limit(self.save_total_limit)
        check_numbers(self)
        if self.compile_rollouts:
            if self.use_vllm or not torch.cuda.is_available():
                raise InputError("compile_rollouts is for a CUDA GPU without --use_vllm: leave it out")
            if self.gradient_checkpointing:
                raise InputError(
                    "compile_rollouts needs --gradient_checkpointing false: switching it on again after each batch of "
                    "rollouts adds hooks to the model, which would be compiled anew"
                )
            self.cache_implementation: str | None = "static"
        super().__post_init__()
        if self.save_strategy == "steps" and self.save_steps % self.rollout_steps:
            raise InputError(
                f"save_steps {self.save_steps:g} is not a multiple of {self.rollout_steps}, the optimiser steps that "
                f"share one batch of rollouts: a resumed run would differ. Use --save_steps {self.rollout_steps}."
            )

    @property
    def rollout_steps(self) -> int:
        """Optimiser steps until a batch of rollouts and a step end together: there a checkpoint is exact."""
        assert self.steps_per_generation is not None
        passes = self.steps_per_generation * self.num_iterations
        return passes // math.gcd(passes, self.gradient_accumulation_steps)


@dataclass
class RewardConfig(PolicyConfig):
    """Options of `tracereward grpo`: a given reward instead of a learned one."""

    reward: str = field(
        default="verifier",
        metadata={
            "help": "verifier: 1 for a correct answer, uses gold answers (upper baseline). logprob: mean "
            "log-prob under the starting policy, frozen (control: what a learned reward must beat). logratio: the same "
            "less the log-prob under --base_model, the model before SFT (control without a discriminator)."
        },
    )
    base_model: str | None = field(
        default=None, metadata={"help": "For --reward logratio: the causal LM that the starting policy came from."}
    )

    def __post_init__(self) -> None:
        check_choice("reward", self.reward, ("verifier", "logprob", "logratio"))
        if (self.base_model is None) == (self.reward == "logratio"):
            raise InputError("--reward logratio needs --base_model, and no other reward uses it")
        super().__post_init__()


def check_numbers(config: GRPOConfig | SFTConfig) -> None:
    """Refuse what would end in another library's traceback, or in nothing learned.

    Raises:
        InputError: names the option.
    """
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"):
        value = getattr(config, name, None)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs"):
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise InputError(f"{name} must be a number of at least 0, not {value!r}")
    if config.seed < 0:
        raise InputError(f"seed must be 0 or more, not {config.seed}")
    temperature, top_p = getattr(config, "temperature", 1.0), getattr(config, "top_p", 1.0)
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be more than 0, not {temperature}: rollouts of a prompt must differ")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be more than 0 and at most 1, not {top_p}")


def check_checkpoint_limit(limit: int | None) -> None:
    """A kill while the newest checkpoint is written must leave an older one that is whole."""
    if limit is not None and limit < 2:
        raise InputError(
            f"save_total_limit must be at least 2 so that one whole checkpoint always remains, not {limit}"
        )
