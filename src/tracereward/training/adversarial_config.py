"""Options of `tracereward train`: TRL's GRPO, the discriminator, its reward, and monitoring."""

from dataclasses import dataclass
from typing import ClassVar

from tracereward.errors import InputError
from tracereward.modeling.steps import check_steps
from tracereward.rewards.heads import default_reward_form, reads_log_probs, subtracts_policy
from tracereward.training.config import PolicyConfig
from tracereward.training.option_types import check_options
from tracereward.training.options import DiscriminatorOptions, MonitorOptions, ShapingOptions
from tracereward.training.trl_options import TRAIN


@dataclass
class AdversarialConfig(PolicyConfig, DiscriminatorOptions, ShapingOptions, MonitorOptions):
    """Options of `tracereward train`: `trl.GRPOConfig` and three groups of tracereward's own."""

    command: ClassVar[str] = TRAIN

    def __post_init__(self) -> None:
        check_options(self)
        check_steps(self.step_delimiter, self.steps)
        if self.reward_form is None:
            # The action head's logit estimates a ratio to the policy, whose maximum is not the expert.
            self.reward_form: str | None = (
                "logit_plus_logprob" if self.head == "action" else default_reward_form(self.head)
            )
        self._check_combinations()
        super().__post_init__()

    def _check_combinations(self) -> None:
        """Reject combinations in which an option would have no effect or the wrong one."""
        if self.objective == "wgan" and not (self.gradient_penalty or self.spectral_norm):
            raise InputError(
                "objective wgan is unbounded without a constraint: set --gradient_penalty 10 or --spectral_norm true"
            )
        if self.objective == "nnpu":
            if self.perturbed_per_expert:
                raise InputError(
                    "objective nnpu takes all traces but the experts for unlabelled, and perturbed copies are known to "
                    "be wrong: set --perturbed_per_expert 0"
                )
            if (self.positives, self.negatives) != ("expert", "all"):
                raise InputError(
                    "objective nnpu is for rollouts without labels: set --positives expert and --negatives all"
                )
            if self.positive_prior is None and not self.held_out_fraction:
                raise InputError(
                    "objective nnpu estimates the prior on held-out demonstrations: set --held_out_fraction 0.1, or "
                    "--positive_prior"
                )
        if self.balance == "model":
            raise InputError(
                "balance model is for candidates of several models, not for rollouts: use --balance question"
            )
        if self.spectral_norm and self.head == "implicit":
            raise InputError(
                "spectral_norm limits the head's weights, and head implicit has none: set --spectral_norm false"
            )
        if self.expert_nll and not reads_log_probs(self.head):
            raise InputError(f"expert_nll needs a language-model head: action or implicit, not {self.head}")
        if self.shared_base:
            if not reads_log_probs(self.head):
                raise InputError(f"shared_base needs a language-model head: action or implicit, not {self.head}")
            if self.discriminator_model is not None:
                raise InputError(
                    "shared_base makes the discriminator an adapter on the policy's base model: remove "
                    "--discriminator_model"
                )
        if self.shard_discriminator:
            if self.shared_base:
                raise InputError(
                    "use only one of shard_discriminator and shared_base: a shared base model is not sharded"
                )
            if self.gradient_penalty or self.r1_penalty:
                raise InputError(
                    "gradient_penalty and r1_penalty need second derivatives; shard_discriminator (FSDP2) has none"
                )
            if self.spectral_norm and self.head != "action":
                raise InputError("shard_discriminator with spectral_norm needs head action, whose w is not sharded")
        if self.thinking_weight is not None and self.advantages == "token":
            raise InputError("thinking_weight is of the trace reward: use --advantages trajectory, or leave it out")
        group = self.num_generations
        samples = self.warmup_candidates is None and self.discriminator_warmup_updates > 0
        if samples and self.use_vllm and self.vllm_mode == "server" and group and self.warmup_rollouts % group:
            raise InputError(
                f"--vllm_mode server samples num_generations ({group}) completions per prompt at a time: "
                f"warmup_rollouts {self.warmup_rollouts} must be a multiple of it"
            )
        if self.reward_form == "f" and not subtracts_policy(self.head):
            raise InputError(f"reward_form f is for the heads airl and implicit; with head {self.head} use logit")
        if self.discriminator_gate_high is not None and not self.held_out_fraction:
            raise InputError("discriminator_gate_high needs held-out demonstrations: set --held_out_fraction 0.1")
