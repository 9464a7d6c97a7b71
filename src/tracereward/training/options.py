"""Our own options of the training commands, next to those of TRL: plain dataclasses that load neither torch nor TRL.

`config` and `adversarial_config` mix them into TRL's configs. What an option may be is in its annotation (the parser of
transformers hands all of a field's metadata on to argparse).

Deviations of the defaults from arXiv 2510.01857, in one place: head ``action`` instead of ``token`` and granularity
``dense`` instead of ``sparse`` (a freshly headed small backbone learns too slowly to be of use), tokens before a
rollout's first difference from the expert trace left out, at most 60 warm-up updates instead of 250, then one after
every fourth batch of rollouts. `docs/recipe.md` has the evidence for these, for the log-prob that is added to the
logit, and for perturbed experts as negatives.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tracereward.errors import InputError, check_choice
from tracereward.rewards.choices import GRANULARITIES, HEADS, REWARD_FORMS


@dataclass(frozen=True)
class OneOf:
    """The names that an option may be."""

    names: tuple[str, ...]

    def check(self, option: str, value: Any) -> None:
        """Raises InputError with the nearest name."""
        check_choice(option, value, self.names)


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that an option may be; never nan or infinite.

    Attributes:
        min: smallest.
        above: it is more than this.
        max: largest.
        below: it is less than this.
        whole: whether it is a whole number.
        why: for the message.
    """

    min: float | None = None
    above: float | None = None
    max: float | None = None
    below: float | None = None
    whole: bool = False
    why: str = ""

    def check(self, option: str, value: Any) -> None:
        """Raises InputError with what is allowed."""
        if (
            isinstance(value, int if self.whole else (int, float))
            and math.isfinite(value)
            and (self.min is None or value >= self.min)
            and (self.above is None or value > self.above)
            and (self.max is None or value <= self.max)
            and (self.below is None or value < self.below)
        ):
            return
        limits = (("at least", self.min), ("more than", self.above), ("at most", self.max), ("less than", self.below))
        text = " and ".join(f"{words} {limit:g}" for words, limit in limits if limit is not None)
        if self.min is not None and self.max is not None:
            text = f"between {self.min:g} and {self.max:g}"
        number = "a whole number of " if self.whole else ""
        raise InputError(f"{option} must be {number}{text}, not {value}" + (f": {self.why}" if self.why else ""))


def check_options(options: Any, ranges: Mapping[str, Range] | None = None) -> None:
    """Check each option that is given against its annotation.

    Args:
        options: a dataclass.
        ranges: for fields of another library's, by name; names that `options` lacks are passed over.

    Raises:
        InputError: names the option and what is allowed.
    """
    rules: dict[str, list[Any]] = {name: [limits] for name, limits in (ranges or {}).items()}
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        if get_origin(hint) is Annotated:
            rules[name] = [rule for rule in get_args(hint)[1:] if isinstance(rule, OneOf | Range)]
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        for rule in rules.get(option.name, ()):
            if value is not None:
                rule.check(option.name, value)


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
    template: Annotated[str, OneOf(("plain", "chat"))] = field(
        default="plain",
        metadata={"help": "plain: prompts as the recipe writes them; chat: the tokenizer's template."},
    )
    on_long: Annotated[str, OneOf(("refuse", "drop"))] = field(
        default="refuse",
        metadata={
            "help": "A completion over --max_completion_length: refuse to start, or drop the row and say so. "
            "Nothing is ever cut."
        },
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class SavingOptions:
    """Logging and checkpoints of all three commands."""

    logging_steps: float = field(default=1, metadata={"help": "Log every N steps."})
    save_total_limit: Annotated[int | None, Range(min=2, why="so that one complete checkpoint always remains")] = field(
        default=2,
        metadata={"help": "Checkpoints kept; at least 2."},
    )


@dataclass
class SupervisedOptions(SavingOptions):
    """The length limit of demonstrations and a validation split."""

    max_completion_length: int = field(
        default=1024, metadata={"help": "Longest completion in tokens, with the end-of-sequence token."}
    )
    validation_fraction: Annotated[float, Range(min=0, below=1)] = field(
        default=0.0,
        metadata={"help": "Share of the demonstrations held out; their loss chooses the checkpoint that is kept."},
    )


@dataclass
class PolicyOptions(SavingOptions):
    """What `grpo` and `train` share."""

    compile_rollouts: bool = field(
        default=False,
        metadata={
            "help": "On a CUDA GPU without vLLM: sample rollouts by a static cache and a compiled decoding step, in "
            "one shape for the whole run. Costs a minute of compiling; needs gradient_checkpointing false."
        },
    )


@dataclass
class RewardOptions:
    """A given reward instead of a learned one."""

    reward: Annotated[str, OneOf(("verifier", "logprob", "logratio"))] = field(
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


@dataclass
class DiscriminatorModelOptions:
    """The discriminator as a model: where it starts, its head, the tokens that it judges."""

    head: Annotated[str, OneOf(HEADS)] = field(
        default="action",
        metadata={
            "help": "token (the paper's), action (learns quickly), or airl and implicit, whose logit is f - log pi and "
            "whose reward is f: a token head's or log p_phi."
        },
    )
    granularity: Annotated[str, OneOf(GRANULARITIES)] = field(
        default="dense",
        metadata={"help": "Supervised tokens: sparse, step, interval or dense."},
    )
    interval: Annotated[int, Range(min=1)] = field(default=15, metadata={"help": "k of granularity interval."})
    step_delimiter: str | None = field(default=None, metadata={"help": "What ends a step. Default: the recipe's."})
    discriminator_model: str | None = field(
        default=None, metadata={"help": "Causal LM that the discriminator starts from. Default: the starting policy."}
    )
    shared_base: bool = field(
        default=False,
        metadata={
            "help": "Policy and discriminator are two LoRA adapters on one base model (--use_peft true, head action or "
            "implicit): the discriminator costs its adapter, not a second model."
        },
    )
    shard_discriminator: bool = field(
        default=False,
        metadata={
            "help": "Over several processes each holds a shard of the discriminator, of its optimiser's state and of "
            "the frozen starting policy (FSDP2), where the full ones are too large for a device."
        },
    )
    discriminator_token_budget: Annotated[int, Range(min=1)] = field(
        default=8192, metadata={"help": "Padded tokens in one forward pass of the discriminator."}
    )


@dataclass
class ExampleOptions:
    """What one update of the discriminator is shown."""

    discriminator_prompts: Annotated[int, Range(min=1)] = field(
        default=16, metadata={"help": "Demonstrations in one update."}
    )
    discriminator_rollouts: Annotated[int, Range(min=1)] = field(
        default=4, metadata={"help": "Rollouts of each demonstration."}
    )
    first_difference: Annotated[str, OneOf(("rollouts", "both", "none"))] = field(
        default="rollouts",
        metadata={
            "help": "Tokens that a rollout shares with its prompt's expert trace, from the start: rollouts leaves "
            "them out of the rollout's loss, both also out of the expert's, none keeps them."
        },
    )
    perturbed_per_expert: Annotated[int, Range(min=0)] = field(
        default=1,
        metadata={"help": "Perturbed copies of each expert trace as further negatives, new ones in each update."},
    )
    positives: Annotated[str, OneOf(("expert", "mixed"))] = field(
        default="expert",
        metadata={
            "help": "expert, or mixed: rollouts whose answer the verifier finds right join the experts. Mixed USES "
            "GOLD ANSWERS; logs, config and model card say so."
        },
    )
    replay_size: Annotated[int, Range(min=1)] = field(
        default=4096, metadata={"help": "Rollouts kept for later updates."}
    )
    replay_share: Annotated[float, Range(min=0, max=1)] = field(
        default=0.5,
        metadata={
            "help": "Share of an update's demonstrations whose rollouts come from the replay buffer: more where fresh "
            "ones are too few; 0: none but in the warm-up."
        },
    )


@dataclass
class LossOptions:
    """The discriminator's loss, and what keeps it stable."""

    objective: Annotated[str, OneOf(("bce", "pairwise", "wgan"))] = field(
        default="bce",
        metadata={
            "help": "bce: cross-entropy of tokens; pairwise: an expert's mean logit above its prompt's rollouts'; "
            "wgan: Wasserstein critic, which needs --gradient_penalty or --spectral_norm."
        },
    )
    label_smoothing: Annotated[float, Range(min=0, max=0.499)] = field(
        default=0.1, metadata={"help": "Smoothing of the labels in the discriminator's BCE."}
    )
    centre_penalty: Annotated[float, Range(min=0)] = field(
        default=0.0,
        metadata={"help": "Weight of (s_expert + s_rollout)^2, which keeps the logits centred at 0."},
    )
    gradient_penalty: Annotated[float, Range(min=0)] = field(
        default=0.0,
        metadata={"help": "Weight of (|gradient| - 1)^2 at embeddings between an expert and a rollout."},
    )
    r1_penalty: Annotated[float, Range(min=0)] = field(
        default=0.0, metadata={"help": "Weight of |gradient|^2 / 2 at the experts' embeddings."}
    )
    spectral_norm: bool = field(
        default=False, metadata={"help": "Keep the length of the head's weights w at 1 or less."}
    )
    token_dropout: Annotated[float, Range(min=0, max=0.9)] = field(
        default=0.0,
        metadata={"help": "Share of completion tokens hidden from the others in the discriminator."},
    )
    expert_nll: Annotated[float, Range(min=0)] = field(
        default=0.0,
        metadata={"help": "Weight of the experts' negative log-likelihood under p_phi (heads action and implicit)."},
    )


@dataclass
class UpdateOptions:
    """When the discriminator is updated, and how fast it learns."""

    discriminator_learning_rate: Annotated[float, Range(min=0)] = field(
        default=1e-5, metadata={"help": "AdamW learning rate of the warm-up."}
    )
    discriminator_online_learning_rate: Annotated[float | None, Range(min=0)] = field(
        default=None, metadata={"help": "Its learning rate after the warm-up. Default: the same."}
    )
    discriminator_updates: Annotated[int, Range(min=0)] = field(
        default=1,
        metadata={"help": "Updates after a batch of rollouts; 0 freezes the discriminator after its warm-up."},
    )
    discriminator_every: Annotated[int, Range(min=1)] = field(
        default=4,
        metadata={"help": "Update after every N-th batch of rollouts only; the others fill the replay buffer."},
    )
    discriminator_gate_high: Annotated[float | None, Range(min=0, max=1)] = field(
        default=None,
        metadata={"help": "No update while the held-out accuracy is above this."},
    )
    discriminator_ema: Annotated[float, Range(min=0, max=0.9999)] = field(
        default=0.0,
        metadata={"help": "Decay of an averaged copy of the discriminator, which then gives the rewards; 0: none."},
    )


@dataclass
class WarmUpOptions:
    """Updates of the discriminator before the policy moves."""

    discriminator_warmup_updates: Annotated[int, Range(min=0)] = field(
        default=60, metadata={"help": "Updates before the policy moves, on rollouts sampled once."}
    )
    warmup_model: str | None = field(
        default=None,
        metadata={
            "help": "Causal LM that samples the warm-up's rollouts, e.g. the one before SFT, when the policy has "
            "memorised its demonstrations and its own rollouts equal them. Default: the starting policy."
        },
    )
    warmup_prompts: Annotated[int, Range(min=1)] = field(
        default=512,
        metadata={"help": "Demonstrations, chosen at random, whose prompts the warm-up's rollouts answer."},
    )
    warmup_rollouts: Annotated[int, Range(min=1)] = field(default=8, metadata={"help": "Rollouts of each of them."})


@dataclass
class DiscriminatorOptions(DiscriminatorModelOptions, ExampleOptions, LossOptions, UpdateOptions, WarmUpOptions):
    """The discriminator: its head, its loss, what it is shown, and what keeps it stable."""


@dataclass
class ShapingOptions:
    """From the discriminator's values to rewards and advantages."""

    reward_form: Annotated[str | None, OneOf(REWARD_FORMS)] = field(
        default=None,
        metadata={
            "help": "Token reward: logit (the paper's), logit_plus_logprob, which adds the token's log-prob under the "
            "starting policy (the logit alone is maximal where the policy copies the experts' mix), or f (heads airl "
            "and implicit). Default: logit_plus_logprob for head action, f for airl and implicit, logit for token."
        },
    )
    beta_clip: float = field(default=5.0, metadata={"help": "Token rewards are clipped to +-beta_clip, in log-odds."})
    whiten_rewards: bool = field(
        default=False,
        metadata={"help": "Token rewards to mean 0 and variance 1 over the batch; matters with --scale_rewards none."},
    )
    reward_aggregate: Annotated[str, OneOf(("mean", "min"))] = field(
        default="mean", metadata={"help": "Trace reward: mean or min of token rewards."}
    )
    advantages: Annotated[str, OneOf(("trajectory", "token"))] = field(
        default="trajectory",
        metadata={"help": "trajectory: one advantage a trace; token: discounted return-to-go."},
    )
    gamma: Annotated[float, Range(min=0, max=1)] = field(
        default=1.0, metadata={"help": "Discount of token advantages."}
    )
    expert_prompt_share: Annotated[float, Range(min=0, max=1)] = field(
        default=0.25,
        metadata={"help": "With --unlabeled_dataset_name: share of prompts that have a demonstration."},
    )


@dataclass
class MonitorOptions:
    """What monitors a run, and what happens when it goes wrong."""

    held_out_fraction: Annotated[float, Range(min=0, max=0.9)] = field(
        default=0.1,
        metadata={"help": "Share of the demonstrations that the discriminator is judged on and never learns from."},
    )
    monitor_every: Annotated[int, Range(min=1)] = field(
        default=4,
        metadata={"help": "Batches of rollouts between two held-out accuracies, perturbation AUROCs and KL estimates."},
    )
    on_failure: Annotated[str, OneOf(("stop", "warn", "ignore"))] = field(
        default="stop",
        metadata={
            "help": "When a rule finds mode collapse, decoupling or token-level noise: stop and restore the best "
            "checkpoint, warn, or ignore."
        },
    )


GROUPS: dict[str, dict[str, type]] = {
    "sft": {"Data": DataArguments, "Logging and checkpoints": SavingOptions, "Validation": SupervisedOptions},
    "grpo": {
        "Data": DataArguments,
        "Reward": RewardOptions,
        "Rollouts": PolicyOptions,
        "Logging and checkpoints": SavingOptions,
    },
    "train": {
        "Data": DataArguments,
        "Discriminator": DiscriminatorModelOptions,
        "Discriminator: examples of an update": ExampleOptions,
        "Discriminator: loss and regularisation": LossOptions,
        "Discriminator: updates": UpdateOptions,
        "Warm-up": WarmUpOptions,
        "Reward shaping and advantages": ShapingOptions,
        "Monitoring and failures": MonitorOptions,
        "Rollouts": PolicyOptions,
        "Logging and checkpoints": SavingOptions,
    },
}
"""The options of each command that are not TRL's, under the headings of its help."""


def own_fields(group: type) -> list[dataclasses.Field]:
    """The options that a class itself declares."""
    own = vars(group).get("__annotations__", {})
    return [option for option in dataclasses.fields(group) if option.name in own]
