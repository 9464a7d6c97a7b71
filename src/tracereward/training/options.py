"""tracereward's own options of the training commands: plain dataclasses that import neither torch nor TRL.

`config` and `adversarial_config` combine them with TRL's configs. Allowed values are in the annotations, because the
parser of transformers passes all of a field's metadata to argparse. The classes are tables of options: their fields
look alike on purpose.

Defaults that differ from arXiv 2510.01857: head ``action`` instead of ``token`` and granularity ``dense`` instead of
``sparse`` (a small backbone with a new head learns too slowly), tokens before a rollout's first difference from the
expert trace excluded, at most 60 warm-up updates instead of 250, then one update after every fourth batch of rollouts.
`docs/recipe.md` has the evidence for these, for adding the log-prob to the logit, and for perturbed experts as
negatives.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from tracereward.rewards.choices import GRANULARITIES, HEADS, NEGATIVES, POSITIVES, REWARD_FORMS
from tracereward.training.option_types import OneOf, Range, check_options


@dataclass
class DataArguments:
    """The demonstrations and how to read them."""

    task: str = field(
        default="generic",
        metadata={
            "help": "Task that maps a dataset's fields: aime, arc, arithmetic, casehold, gpqa, gsm8k, hotpotqa, math, "
            "medmcqa, medmcqa_from_1, medqa, medreason, mmlu_pro, openr1, prontoqa, strategyqa, or generic for rows "
            "with prompt, completion and optionally answer."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "JSONL, CSV or Parquet file, a folder, or Hub id. Default: the task's dataset on the Hub."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a Hub dataset to train on."})
    unlabeled_dataset_name: str | None = field(
        default=None,
        metadata={"help": "File or Hub id with further prompts for the policy's rollouts; traces in it are ignored."},
    )
    validation_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "File or Hub id of questions with gold answers. The policy answers them greedily after each save; "
            "the most accurate checkpoint, or the starting policy, is kept. They are not trained on."
        },
    )
    validation_dataset_split: str = field(
        default="validation", metadata={"help": "Split of a Hub dataset in --validation_dataset_name."}
    )
    max_demonstrations: Annotated[int | None, Range(min=1, whole=True)] = field(
        default=None, metadata={"help": "Use the first N demonstrations only."}
    )
    drop: str | None = field(
        default=None,
        metadata={
            "help": "Marks exported from the page of `tracereward audit`: demonstrations marked drop are left out."
        },
    )
    template: Annotated[str | None, OneOf(("plain", "chat"))] = field(
        default=None,
        metadata={
            "help": "plain: prompts as the task formats them; chat: the tokenizer's chat template. Default: as the "
            "model was trained by tracereward, else plain."
        },
    )
    on_long: Annotated[str, OneOf(("refuse", "drop"))] = field(
        default="refuse",
        metadata={
            "help": "If a completion exceeds --max_completion_length: refuse to start, or drop the row and report it. "
            "Completions are never truncated."
        },
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class SavingOptions:
    """Logging and checkpoints, for all three commands."""

    logging_steps: float = field(default=1, metadata={"help": "Log every N steps."})
    save_total_limit: Annotated[int | None, Range(min=2, why="so that one complete checkpoint always remains")] = field(
        default=2,
        metadata={"help": "Number of checkpoints kept; at least 2."},
    )


@dataclass
class ChosenOptions:
    """Options that are chosen by the size of the model and the data, where they are not given; see `chosen`.

    None until then, although their types are those of TRL.
    """

    learning_rate: float = field(  # pyright: ignore[reportAssignmentType]
        default=None, metadata={"help": "Peak learning rate of the policy. Default: by its size and --use_peft."}
    )
    warmup_steps: float = field(  # pyright: ignore[reportAssignmentType]
        default=None, metadata={"help": "Steps until the peak learning rate, or their share. Default: a tenth."}
    )
    num_train_epochs: float = field(  # pyright: ignore[reportAssignmentType]
        default=None,
        metadata={"help": "Passes over the demonstrations. Default: 3, or as many as make 100 steps, at most 15."},
    )
    per_device_train_batch_size: int = field(  # pyright: ignore[reportAssignmentType]
        default=None,
        metadata={"help": "Demonstrations or rollouts in one forward and backward pass. Default: 8."},
    )
    gradient_accumulation_steps: int = field(  # pyright: ignore[reportAssignmentType]
        default=None,
        metadata={
            "help": "Passes in one optimiser step. Default: 1 for sft; else as many as make 8 prompts a step, each "
            "with --num_generations rollouts."
        },
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest completion in tokens, with the end-of-sequence token. Default: the longest demonstration, "
            "for rollouts half as much again; at most 1024, and what the model reads."
        },
    )


@dataclass
class SupervisedOptions(SavingOptions, ChosenOptions):
    """The rendering of demonstrations and a validation split."""

    chat_template_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": 'Variables of the chat template as JSON, such as {"enable_thinking": false}. Default: as the model '
            "was trained."
        },
    )
    validation_fraction: Annotated[float, Range(min=0, below=1)] = field(
        default=0.0,
        metadata={"help": "Share of the demonstrations held out; their loss chooses the checkpoint that is kept."},
    )


@dataclass
class PolicyOptions(SavingOptions, ChosenOptions):
    """Options shared by `grpo` and `train`."""

    compile_rollouts: bool = field(
        default=False,
        metadata={
            "help": "On a CUDA GPU without vLLM: sample rollouts with a static cache and a compiled decoding step, "
            "in one shape for the run. Compilation takes a minute; needs gradient_checkpointing false."
        },
    )


@dataclass
class RewardOptions:
    """A fixed reward instead of a learned one."""

    reward: Annotated[str, OneOf(("verifier", "logprob", "logratio"))] = field(
        default="verifier",
        metadata={
            "help": "verifier: 1 for a correct answer, uses gold answers (upper baseline). logprob: mean "
            "log-prob under the frozen starting policy (control that a learned reward must beat). logratio: the same "
            "minus the log-prob under --base_model, the model before SFT (control without a discriminator)."
        },
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "For --reward logratio: the causal LM from which the starting policy was trained."},
    )


@dataclass
class DiscriminatorModelOptions:
    """The discriminator as a model: initial weights, head and supervised tokens."""

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
    step_delimiter: str | None = field(default=None, metadata={"help": "String that ends a step. Default: the task's."})
    steps: str | None = field(
        default=None,
        metadata={
            "help": 'How a trace is cut into steps: line, blank (lines), numbered (before "1." or "Step 1:"), sentence '
            "or a regular expression of what ends a step; code blocks and display formulas stay whole. Default: by "
            "--step_delimiter."
        },
    )
    thinking_weight: Annotated[float | None, Range(min=0, max=1)] = field(
        default=None,
        metadata={
            "help": "Split completions into thinking and answer: what the thinking weighs in the loss and in the trace "
            "reward; the answer has the rest. 0: only the answer is supervised, 1: only the thinking. Default: a trace "
            "is one text."
        },
    )
    think_marks: list[str] | None = field(
        default=None,
        metadata={
            "help": "The two texts that open and close the thinking. Default: the chat template's, and those of "
            "well-known models, such as <think> </think>."
        },
    )
    discriminator_model: str | None = field(
        default=None, metadata={"help": "Causal LM that initialises the discriminator. Default: the starting policy."}
    )
    shared_base: bool = field(
        default=False,
        metadata={
            "help": "Policy and discriminator are two LoRA adapters on one base model (--use_peft true, head action or "
            "implicit): the discriminator needs memory for an adapter, not for a second model."
        },
    )
    shard_discriminator: bool = field(
        default=False,
        metadata={
            "help": "Shard the discriminator, its optimiser's state and the frozen starting policy over processes "
            "(FSDP2), if the full ones are too large for a device."
        },
    )
    discriminator_token_budget: Annotated[int, Range(min=1)] = field(
        default=8192, metadata={"help": "Padded tokens in one forward pass of the discriminator."}
    )


@dataclass
class ExampleOptions:
    """The traces of one discriminator update."""

    discriminator_prompts: Annotated[int, Range(min=1)] = field(
        default=16, metadata={"help": "Demonstrations in one update."}
    )
    discriminator_rollouts: Annotated[int, Range(min=1)] = field(
        default=4, metadata={"help": "Rollouts per demonstration."}
    )
    first_difference: Annotated[str, OneOf(("rollouts", "both", "none"))] = field(
        default="rollouts",
        metadata={
            "help": "Initial tokens that a rollout shares with its prompt's expert trace: rollouts excludes them from "
            "the rollout's loss, both also from the expert's, none keeps them."
        },
    )
    perturbed_per_expert: Annotated[int, Range(min=0)] = field(
        default=1,
        metadata={"help": "Perturbed copies per expert trace as further negatives, new in each update."},
    )
    positives: Annotated[str, OneOf((*POSITIVES, "mixed"))] = field(
        default="expert",
        metadata={
            "help": "expert: the demonstrations alone. agreeing: also rollouts whose answer equals the one that the "
            "demonstration of their prompt states. mixed: also rollouts with a correct answer; it USES GOLD ANSWERS, "
            "as logs, config and model card record."
        },
    )
    negatives: Annotated[str, OneOf(NEGATIVES)] = field(
        default="all",
        metadata={
            "help": "all: every rollout that is no positive. disagreeing: only those whose answer differs from the "
            "demonstration's; the others are neither."
        },
    )
    replay_size: Annotated[int, Range(min=1)] = field(
        default=4096, metadata={"help": "Rollouts kept in the replay buffer."}
    )
    replay_share: Annotated[float, Range(min=0, max=1)] = field(
        default=0.5,
        metadata={
            "help": "Share of an update's demonstrations whose rollouts come from the replay buffer; more if there are "
            "too few fresh ones; 0: only in the warm-up."
        },
    )


@dataclass
class LossOptions:
    """The discriminator's loss and regularisation."""

    objective: Annotated[str, OneOf(("bce", "pairwise", "pairwise_tokens", "nnpu", "wgan"))] = field(
        default="bce",
        metadata={
            "help": "bce: binary cross-entropy per token; pairwise: Bradley-Terry on mean logits of an expert and "
            "rollouts of its prompt; pairwise_tokens: each token against the other side's mean logit; nnpu: rollouts "
            "count as unlabelled, a share of them as good as an expert (non-negative positive-unlabelled risk); wgan: "
            "Wasserstein critic, needs --gradient_penalty or --spectral_norm."
        },
    )
    positive_prior: Annotated[float | None, Range(above=0, below=1)] = field(
        default=None,
        metadata={
            "help": "For --objective nnpu: the share of rollouts that are as good as an expert. Default: estimated on "
            "held-out demonstrations after 20 updates with bce."
        },
    )
    balance: Annotated[str, OneOf(("none", "question", "model"))] = field(
        default="none",
        metadata={
            "help": "none: experts weigh one half, rollouts the other; question: the same within every prompt, and "
            "every prompt with both weighs the same; model: candidates are weighted so that neither the prompt nor "
            "the model that wrote one says anything about its label."
        },
    )
    label_smoothing: Annotated[float, Range(min=0, max=0.499)] = field(
        default=0.1, metadata={"help": "Label smoothing in the discriminator's BCE."}
    )
    centre_penalty: Annotated[float, Range(min=0)] = field(
        default=0.0,
        metadata={"help": "Weight of (s_expert + s_rollout)^2, which keeps the logits centred at 0."},
    )
    gradient_penalty: Annotated[float, Range(min=0)] = field(
        default=0.0,
        metadata={"help": "Weight of (|gradient| - 1)^2 at embeddings interpolated between an expert and a rollout."},
    )
    r1_penalty: Annotated[float, Range(min=0)] = field(
        default=0.0, metadata={"help": "Weight of |gradient|^2 / 2 at the experts' embeddings."}
    )
    spectral_norm: bool = field(default=False, metadata={"help": "Limit the norm of the head's weights w to 1."})
    token_dropout: Annotated[float, Range(min=0, max=0.9)] = field(
        default=0.0,
        metadata={"help": "Share of completion tokens that other tokens cannot attend to in the discriminator."},
    )
    expert_nll: Annotated[float, Range(min=0)] = field(
        default=0.0,
        metadata={"help": "Weight of the experts' negative log-likelihood under p_phi (heads action and implicit)."},
    )


@dataclass
class UpdateOptions:
    """Schedule and learning rates of the discriminator's updates."""

    discriminator_learning_rate: Annotated[float | None, Range(min=0)] = field(
        default=None, metadata={"help": "AdamW learning rate of the warm-up. Default: by the model's size."}
    )
    discriminator_online_learning_rate: Annotated[float | None, Range(min=0)] = field(
        default=None,
        metadata={"help": "AdamW learning rate after the warm-up. Default: the same, or a fifth if both are chosen."},
    )
    discriminator_updates: Annotated[int, Range(min=0)] = field(
        default=1,
        metadata={"help": "Updates per batch of rollouts; 0 freezes the discriminator after the warm-up."},
    )
    discriminator_every: Annotated[int, Range(min=1)] = field(
        default=4,
        metadata={"help": "Update only after every N-th batch of rollouts; the others fill the replay buffer."},
    )
    discriminator_gate_high: Annotated[float | None, Range(min=0, max=1)] = field(
        default=None,
        metadata={"help": "Skip updates while the held-out accuracy is above this."},
    )
    discriminator_ema: Annotated[float, Range(min=0, max=0.9999)] = field(
        default=0.0,
        metadata={"help": "Decay of an averaged copy of the discriminator, which computes the rewards; 0: no copy."},
    )


@dataclass
class WarmUpOptions:
    """Updates of the discriminator before the policy is trained."""

    discriminator_warmup_updates: Annotated[int, Range(min=0)] = field(
        default=60, metadata={"help": "Updates before the policy is trained, on rollouts sampled once."}
    )
    warmup_model: str | None = field(
        default=None,
        metadata={
            "help": "Causal LM that samples the warm-up's rollouts, e.g. the one before SFT if the policy reproduces "
            "its demonstrations. Default: the starting policy."
        },
    )
    warmup_candidates: str | None = field(
        default=None,
        metadata={
            "help": "File or Hub id of candidates (rows of tracereward sample, or a pool) for the demonstrations' "
            "prompts: the warm-up's rollouts, instead of sampling them."
        },
    )
    warmup_prompts: Annotated[int, Range(min=1)] = field(
        default=512,
        metadata={"help": "Randomly chosen demonstrations whose prompts are used in the warm-up."},
    )
    warmup_rollouts: Annotated[int, Range(min=1)] = field(default=8, metadata={"help": "Warm-up rollouts per prompt."})


@dataclass
class DiscriminatorOptions(DiscriminatorModelOptions, ExampleOptions, LossOptions, UpdateOptions, WarmUpOptions):
    """All options of the discriminator."""

    @property
    def warmup_rate(self) -> float:
        """The learning rate of the warm-up, also where no command has chosen one."""
        return 1e-5 if self.discriminator_learning_rate is None else self.discriminator_learning_rate


@dataclass
class ShapingOptions:
    """Rewards and advantages from the discriminator's values."""

    reward_form: Annotated[str | None, OneOf(REWARD_FORMS)] = field(
        default=None,
        metadata={
            "help": "Token reward: logit (the paper's), logit_plus_logprob, which adds the token's log-prob under the "
            "starting policy (the logit alone is maximised by imitating the experts' distribution), or f (heads airl "
            "and implicit). Default: logit_plus_logprob for head action, f for airl and implicit, logit for token."
        },
    )
    beta_clip: float = field(default=5.0, metadata={"help": "Token rewards are clipped to +-beta_clip, in log-odds."})
    whiten_rewards: bool = field(
        default=False,
        metadata={
            "help": "Whiten token rewards (mean 0, variance 1) over the batch; matters with --scale_rewards none."
        },
    )
    reward_aggregate: Annotated[str, OneOf(("mean", "min"))] = field(
        default="mean", metadata={"help": "Trace reward: mean or min of token rewards."}
    )
    advantages: Annotated[str, OneOf(("trajectory", "token"))] = field(
        default="trajectory",
        metadata={"help": "trajectory: one advantage per trace; token: discounted return-to-go."},
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
    """Monitoring of a run and the response to failures."""

    held_out_fraction: Annotated[float, Range(min=0, max=0.9)] = field(
        default=0.1,
        metadata={
            "help": "Share of the demonstrations held out to evaluate the discriminator; they are not trained on."
        },
    )
    monitor_every: Annotated[int, Range(min=1)] = field(
        default=4,
        metadata={"help": "Batches of rollouts between evaluations of held-out accuracy, perturbation AUROC and KL."},
    )
    on_failure: Annotated[str, OneOf(("stop", "warn", "ignore"))] = field(
        default="stop",
        metadata={
            "help": "On mode collapse, decoupling or token-level noise: stop and restore the best checkpoint, warn, or "
            "ignore."
        },
    )


GROUPS: dict[str, dict[str, type]] = {
    "sft": {
        "Data": DataArguments,
        "Chosen by the model and the data": ChosenOptions,
        "Logging and checkpoints": SavingOptions,
        "Validation": SupervisedOptions,
    },
    "grpo": {
        "Data": DataArguments,
        "Chosen by the model and the data": ChosenOptions,
        "Reward": RewardOptions,
        "Rollouts": PolicyOptions,
        "Logging and checkpoints": SavingOptions,
    },
    "train": {
        "Data": DataArguments,
        "Chosen by the model and the data": ChosenOptions,
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
"""Each command's own options (not TRL's), by heading of its help."""
NOT_OF: dict[str, tuple[str, ...]] = {"sft": ("unlabeled_dataset_name",)}
"""Options of the groups that a command refuses."""
