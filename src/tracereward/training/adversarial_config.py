"""Options of `tracereward train`: the discriminator, its reward, and what watches the run.

Deviations of the defaults from arXiv 2510.01857, in one place: head ``action`` instead of ``token`` and granularity
``dense`` instead of ``sparse`` (a freshly headed small backbone learns too slowly to be of use), tokens before a
rollout's first difference from the expert trace left out, at most 60 warm-up updates instead of 250, then one after
every fourth batch of rollouts. `docs/recipe.md` has the evidence for these, for the log-prob that is added to the
logit, and for perturbed experts as negatives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tracereward.data.perturbations import KINDS
from tracereward.errors import InputError, check_choice
from tracereward.rewards.heads import HEADS, REWARD_FORMS, default_reward_form, reads_log_probs, subtracts_policy
from tracereward.rewards.supervision import GRANULARITIES
from tracereward.training.config import PolicyConfig
from tracereward.training.losses import OBJECTIVES

ADVANTAGES = ("trajectory", "token")
REWARD_AGGREGATES = ("mean", "min")
FIRST_DIFFERENCE = ("rollouts", "both", "none")
POSITIVES = ("expert", "mixed")
ON_FAILURE = ("stop", "warn", "ignore")


@dataclass
class DiscriminatorOptions:
    """The discriminator: its head, its loss, what it is shown, and what keeps it stable."""

    head: str = field(
        default="action",
        metadata={
            "help": "token (the paper's), action (learns quickly), or airl and implicit, whose logit is f - log pi and "
            "whose reward is f: a token head's or log p_phi."
        },
    )
    granularity: str = field(default="dense", metadata={"help": "Supervised tokens: sparse, step, interval or dense."})
    interval: int = field(default=15, metadata={"help": "k of granularity interval."})
    step_delimiter: str | None = field(default=None, metadata={"help": "What ends a step. Default: the recipe's."})
    objective: str = field(
        default="bce",
        metadata={
            "help": "bce: cross-entropy of tokens; pairwise: an expert's mean logit above its prompt's rollouts'; "
            "wgan: Wasserstein critic, which needs --gradient_penalty or --spectral_norm."
        },
    )
    label_smoothing: float = field(
        default=0.1, metadata={"help": "Smoothing of the labels in the discriminator's BCE."}
    )
    first_difference: str = field(
        default="rollouts",
        metadata={
            "help": "Tokens that a rollout shares with its prompt's expert trace, from the start: rollouts leaves "
            "them out of the rollout's loss, both also out of the expert's, none keeps them."
        },
    )
    perturbed_per_expert: int = field(
        default=1,
        metadata={"help": "Perturbed copies of each expert trace as further negatives, new ones in each update."},
    )
    perturbations: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": f"Kinds of them: {', '.join(KINDS)}."}
    )
    positives: str = field(
        default="expert",
        metadata={
            "help": "expert, or mixed: rollouts whose answer the verifier finds right join the experts. Mixed USES "
            "GOLD ANSWERS; logs, config and model card say so."
        },
    )
    replay_size: int = field(default=4096, metadata={"help": "Rollouts kept for later updates."})
    replay_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of an update's demonstrations whose rollouts come from the replay buffer: more where fresh "
            "ones are too few; 0: none but in the warm-up."
        },
    )
    discriminator_model: str | None = field(
        default=None, metadata={"help": "Causal LM that the discriminator starts from. Default: the starting policy."}
    )
    discriminator_use_peft: bool | None = field(
        default=None, metadata={"help": "LoRA for the discriminator (the policy's settings). Default: as the policy."}
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
            "help": "Over several processes each holds a part of the discriminator, of its optimiser's state and of "
            "the frozen starting policy (FSDP2), where they are too large to be whole on each."
        },
    )
    discriminator_learning_rate: float = field(default=1e-5, metadata={"help": "AdamW learning rate of the warm-up."})
    discriminator_online_learning_rate: float | None = field(
        default=None, metadata={"help": "Its learning rate after the warm-up. Default: the same."}
    )
    discriminator_prompts: int = field(default=16, metadata={"help": "Demonstrations in one update."})
    discriminator_rollouts: int = field(default=4, metadata={"help": "Rollouts beside each demonstration."})
    discriminator_warmup_updates: int = field(
        default=60, metadata={"help": "Updates before the policy moves, on rollouts drawn once."}
    )
    warmup_target_accuracy: float | None = field(
        default=None, metadata={"help": "End the warm-up early when the held-out accuracy reaches this."}
    )
    discriminator_updates: int = field(
        default=1,
        metadata={"help": "Updates after a batch of rollouts; 0 freezes the discriminator after its warm-up."},
    )
    discriminator_every: int = field(
        default=4,
        metadata={"help": "Update after every N-th batch of rollouts only; the others fill the replay buffer."},
    )
    discriminator_gate_high: float | None = field(
        default=None, metadata={"help": "No update while the held-out accuracy is above this."}
    )
    discriminator_gate_low: float | None = field(
        default=None, metadata={"help": "Twice the updates while the held-out accuracy is below this."}
    )
    discriminator_ema: float = field(
        default=0.0,
        metadata={"help": "Decay of an averaged copy of the discriminator, which then gives the rewards; 0: none."},
    )
    centre_penalty: float = field(
        default=0.0, metadata={"help": "Weight of (s_expert + s_rollout)^2, which keeps the logits centred at 0."}
    )
    gradient_penalty: float = field(
        default=0.0,
        metadata={"help": "Weight of (|gradient| - 1)^2 at embeddings between an expert and a rollout."},
    )
    r1_penalty: float = field(default=0.0, metadata={"help": "Weight of |gradient|^2 / 2 at the experts' embeddings."})
    spectral_norm: bool = field(
        default=False, metadata={"help": "Keep the length of the head's weights w at 1 or less."}
    )
    token_dropout: float = field(
        default=0.0, metadata={"help": "Share of completion tokens hidden from the others in the discriminator."}
    )
    expert_nll: float = field(
        default=0.0,
        metadata={"help": "Weight of the experts' negative log-likelihood under p_phi (heads action and implicit)."},
    )
    discriminator_token_budget: int = field(
        default=8192, metadata={"help": "Padded tokens in one forward pass of the discriminator."}
    )
    warmup_model: str | None = field(
        default=None,
        metadata={
            "help": "Causal LM that draws the warm-up's rollouts, e.g. the one before SFT, when the policy has "
            "memorised its demonstrations and its own rollouts equal them. Default: the starting policy."
        },
    )
    warmup_prompts: int = field(
        default=512, metadata={"help": "Demonstrations, chosen at random, whose prompts the warm-up's rollouts answer."}
    )
    warmup_rollouts: int = field(default=8, metadata={"help": "Rollouts of each of them."})
    warmup_save_updates: int = field(default=20, metadata={"help": "Updates between two saves of the warm-up."})


@dataclass
class ShapingOptions:
    """From the discriminator's values to rewards and advantages."""

    reward_form: str | None = field(
        default=None,
        metadata={
            "help": "Token reward: logit (the paper's), logit_plus_logprob, which adds the token's log-prob under the "
            "starting policy (the logit alone is maximal where the policy copies the experts' mix), or f (heads airl "
            "and implicit). Default: logit_plus_logprob for head action, f for airl and implicit, logit for token."
        },
    )
    reward_temperature: float = field(default=1.0, metadata={"help": "Log-odds are divided by it before the clip."})
    beta_clip: float = field(default=5.0, metadata={"help": "Token rewards are clipped to +-beta_clip, in log-odds."})
    whiten_rewards: bool = field(
        default=False,
        metadata={"help": "Token rewards to mean 0 and variance 1 over the batch; matters with --scale_rewards none."},
    )
    reward_aggregate: str = field(default="mean", metadata={"help": "Trace reward: mean or min of token rewards."})
    advantages: str = field(
        default="trajectory", metadata={"help": "trajectory: one advantage a trace; token: discounted return-to-go."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of token advantages."})
    leave_one_out: bool = field(
        default=False, metadata={"help": "A rollout's baseline is the mean of the others in its group."}
    )
    expert_in_group: bool = field(
        default=False,
        metadata={"help": "The demonstration's own trace counts in its group's mean and standard deviation."},
    )
    expert_prompt_share: float = field(
        default=0.25,
        metadata={"help": "With --unlabeled_dataset_name: share of prompts that have a demonstration."},
    )


@dataclass
class MonitorOptions:
    """What watches a run, and what happens when it goes wrong."""

    held_out_fraction: float = field(
        default=0.1,
        metadata={"help": "Share of the demonstrations that the discriminator is judged on and never learns from."},
    )
    monitor_every: int = field(
        default=4,
        metadata={"help": "Batches of rollouts between two held-out accuracies, perturbation AUROCs and KL estimates."},
    )
    on_failure: str = field(
        default="stop",
        metadata={
            "help": "When a rule finds mode collapse, decoupling or token-level noise: stop and restore the best "
            "checkpoint, warn, or ignore."
        },
    )
    failure_window: int = field(default=20, metadata={"help": "Logged steps over which the rules look."})


@dataclass
class AdversarialConfig(PolicyConfig, DiscriminatorOptions, ShapingOptions, MonitorOptions):
    """Options of `tracereward train`: `trl.GRPOConfig` and the three groups of its own."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("head", HEADS),
            ("granularity", GRANULARITIES),
            ("objective", OBJECTIVES),
            ("advantages", ADVANTAGES),
            ("first_difference", FIRST_DIFFERENCE),
            ("reward_aggregate", REWARD_AGGREGATES),
            ("positives", POSITIVES),
            ("on_failure", ON_FAILURE),
        ):
            check_choice(name, getattr(self, name), choices)
        for kind in self.perturbations:
            check_choice("perturbation", kind, KINDS)
        if self.reward_form is None:
            # The action head's logit estimates a ratio to the policy, whose maximum is not the expert.
            self.reward_form: str | None = (
                "logit_plus_logprob" if self.head == "action" else default_reward_form(self.head)
            )
        check_choice("reward_form", self.reward_form, REWARD_FORMS)
        self._check_ranges()
        self._check_combinations()
        super().__post_init__()

    def _check_ranges(self) -> None:
        for name, low, high in (
            ("label_smoothing", 0, 0.499),
            ("gamma", 0, 1),
            ("replay_share", 0, 1),
            ("expert_prompt_share", 0, 1),
            ("held_out_fraction", 0, 0.9),
            ("token_dropout", 0, 0.9),
            ("discriminator_ema", 0, 0.9999),
            ("warmup_target_accuracy", 0, 1),
            ("discriminator_gate_high", 0, 1),
            ("discriminator_gate_low", 0, 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} must be between {low} and {high:g}, not {value}")
        for name in (
            "centre_penalty",
            "gradient_penalty",
            "r1_penalty",
            "expert_nll",
            "perturbed_per_expert",
            "discriminator_learning_rate",
            "discriminator_online_learning_rate",
            "discriminator_warmup_updates",
            "discriminator_updates",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{name} must be 0 or more, not {value}")
        for name in (
            "interval",
            "discriminator_prompts",
            "discriminator_rollouts",
            "discriminator_every",
            "warmup_prompts",
            "warmup_rollouts",
            "warmup_save_updates",
            "monitor_every",
            "replay_size",
            "discriminator_token_budget",
            "failure_window",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")

    def _check_combinations(self) -> None:
        """Options that do nothing, or not what they say, beside others."""
        if self.objective == "wgan" and not (self.gradient_penalty or self.spectral_norm):
            raise InputError(
                "objective wgan has no lower bound by itself: give --gradient_penalty 10 or --spectral_norm true"
            )
        if self.spectral_norm and self.head == "implicit":
            raise InputError("spectral_norm limits the head's weights; head implicit has none")
        if self.expert_nll and not reads_log_probs(self.head):
            raise InputError(f"expert_nll needs a head that is a language model: action or implicit, not {self.head}")
        if self.shared_base:
            if not reads_log_probs(self.head):
                raise InputError(f"shared_base needs a language model as head: action or implicit, not {self.head}")
            if self.discriminator_model is not None or self.discriminator_use_peft is False:
                raise InputError(
                    "shared_base makes the discriminator an adapter on the policy's base model: leave out "
                    "--discriminator_model and --discriminator_use_peft"
                )
        if self.shard_discriminator:
            if self.shared_base:
                raise InputError("give one of shard_discriminator and shared_base: a shared base is whole everywhere")
            if self.gradient_penalty or self.r1_penalty:
                raise InputError(
                    "shard_discriminator: FSDP2 has no second derivatives, which gradient_penalty and r1_penalty need"
                )
            if self.spectral_norm and self.head != "action":
                raise InputError(
                    "shard_discriminator with spectral_norm needs head action, whose w is whole everywhere"
                )
        group = self.num_generations
        if self.use_vllm and self.vllm_mode == "server" and group and self.warmup_rollouts % group:
            raise InputError(
                f"with --vllm_mode server prompts are asked for num_generations ({group}) completions at a time: "
                f"warmup_rollouts {self.warmup_rollouts} must be a multiple of it"
            )
        if self.reward_form == "f" and not subtracts_policy(self.head):
            raise InputError(f"reward_form f is for the heads airl and implicit; with head {self.head} use logit")
        if not self.held_out_fraction:
            needs: Sequence[str] = ("warmup_target_accuracy", "discriminator_gate_high", "discriminator_gate_low")
            for name in needs:
                if getattr(self, name) is not None:
                    raise InputError(f"{name} looks at held-out demonstrations: give --held_out_fraction 0.1")
        low, high = self.discriminator_gate_low, self.discriminator_gate_high
        if low is not None and high is not None and low >= high:
            raise InputError(f"discriminator_gate_low {low} must be under discriminator_gate_high {high}")
