"""Options of `tracereward fit`: plain dataclasses that import neither torch nor TRL; see `options`."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from tracereward.errors import InputError
from tracereward.generation.params import MAX_SEED
from tracereward.modeling.steps import check_steps
from tracereward.rewards.choices import GRANULARITIES, NEGATIVES, POSITIVES
from tracereward.training.option_types import OneOf, Range, check_options, check_types
from tracereward.training.options import DiscriminatorOptions


@dataclass
class FitDataOptions:
    """The demonstrations, the candidates and how to read them."""

    demonstrations: str | None = field(
        default=None,
        metadata={"help": "Expert traces: JSONL, CSV or Parquet file, a folder, or Hub id. Default: the task's set."},
    )
    drop: str | None = field(
        default=None,
        metadata={
            "help": "Marks exported from the page of `tracereward audit`: demonstrations marked drop are left out."
        },
    )
    candidates: str | None = field(
        default=None,
        metadata={
            "help": "Logged traces of models for the same questions, several a question, as `tracereward sample` "
            "writes them: prompt and completion, optionally answer, correct, model and logprob."
        },
    )
    questions: str | None = field(
        default=None, metadata={"help": "File or Hub id of the questions, if --candidates has only their ids."}
    )
    task: str = field(
        default="generic",
        metadata={"help": "Task that maps a dataset's fields and reads answers, as for `tracereward train`."},
    )
    template: Annotated[str | None, OneOf(("plain", "chat"))] = field(
        default=None,
        metadata={
            "help": "plain: prompts as the task formats them; chat: the tokenizer's chat template. Default: as the "
            "model was trained by tracereward, else plain."
        },
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={"help": 'Variables of the chat template as JSON, such as {"enable_thinking": false}.'},
    )
    max_completion_length: Annotated[int | None, Range(min=1, whole=True)] = field(
        default=None,
        metadata={"help": "Longest trace in tokens, with the end-of-sequence token. Default: what the model reads."},
    )
    on_long: Annotated[str, OneOf(("refuse", "drop"))] = field(
        default="refuse",
        metadata={
            "help": "If a trace is longer: refuse to start, or drop it and report it. Traces are never truncated."
        },
    )


@dataclass
class FitLabelOptions:
    """Which candidates are positives and which are negatives."""

    positives: Annotated[str | None, OneOf(POSITIVES)] = field(
        default=None,
        metadata={
            "help": "expert: the demonstrations alone; agreeing: also candidates that state the demonstration's own "
            "answer. Default: agreeing where at least 80 % of the answers can be read, else expert."
        },
    )
    negatives: Annotated[str | None, OneOf(NEGATIVES)] = field(
        default=None,
        metadata={
            "help": "all: every other candidate; disagreeing: only those that state another answer. Default: as for "
            "--positives, disagreeing or all."
        },
    )
    held_out_fraction: Annotated[float, Range(min=0, max=0.9)] = field(
        default=0.2,
        metadata={
            "help": "Share of the questions that nothing is learned from or selected by: verdict, AUROC and "
            "calibration are measured on them."
        },
    )


@dataclass
class FitModelOptions:
    """The reward model."""

    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the causal LM that reads the traces."}
    )
    dtype: Annotated[str | None, OneOf(("float32", "bfloat16", "float16"))] = field(
        default=None,
        metadata={
            "help": "Precision of the model. Default: bfloat16 for a read-out if the processor has it and, on a CPU, "
            "the model is large; else float32."
        },
    )
    readout: bool = field(
        default=True,
        metadata={
            "help": "Keep the model frozen and fit a linear head on the states of one layer or the mean of heads on "
            "several, chosen by cross-validation over questions. false: fine-tune the model, with head token from "
            "there."
        },
    )
    states: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the frozen model's states, which runs on the same traces may share. Default: in the run "
            "folder."
        },
    )
    head: Annotated[str, OneOf(("token", "action"))] = field(
        default="token",
        metadata={
            "help": "token: a linear map on the hidden state, as a read-out has; action: also reads the token's "
            "log-prob, and starts untrained."
        },
    )
    granularity: Annotated[str, OneOf(GRANULARITIES)] = field(
        default="dense", metadata={"help": "Supervised tokens: sparse, step, interval or dense."}
    )
    interval: Annotated[int, Range(min=1, whole=True)] = field(
        default=15, metadata={"help": "k of granularity interval."}
    )
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
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of all weights."})
    lora_r: Annotated[int, Range(min=1, whole=True)] = field(default=16, metadata={"help": "Rank of LoRA."})
    lora_alpha: Annotated[int, Range(min=1, whole=True)] = field(default=32, metadata={"help": "Scale of LoRA."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers with an adapter, or all-linear. Default: PEFT's for the architecture."}
    )


@dataclass
class FitLossOptions:
    """What is minimised."""

    objective: Annotated[str, OneOf(("pairwise", "bce", "pairwise_tokens", "nnpu"))] = field(
        default="pairwise",
        metadata={
            "help": "pairwise: Bradley-Terry on mean logits of a positive and a negative of one question; bce: binary "
            "cross-entropy. Fine-tuning also has pairwise_tokens: each token against the other side's mean logit; and "
            "nnpu: candidates count as unlabelled, a share of them as good as an expert."
        },
    )
    balance: Annotated[str, OneOf(("none", "question", "model"))] = field(
        default="none",
        metadata={
            "help": "none: every trace weighs the same in its class; question: every question with both classes weighs "
            "the same; model: candidates are weighted so that neither the question nor the model that wrote one says "
            "anything about its label."
        },
    )


@dataclass
class FitUpdateOptions:
    """Loss and updates of the fine-tuning."""

    positive_prior: Annotated[float | None, Range(above=0, below=1)] = field(
        default=None,
        metadata={
            "help": "For --objective nnpu: the share of candidates that are as good as an expert. Default: estimated "
            "on a fifth of the questions to train on, after 20 updates with bce."
        },
    )
    label_smoothing: Annotated[float, Range(min=0, max=0.499)] = field(
        default=0.1, metadata={"help": "Label smoothing of bce."}
    )
    first_difference: Annotated[str, OneOf(("rollouts", "both", "none"))] = field(
        default="rollouts",
        metadata={
            "help": "Initial tokens that a candidate shares with an expert trace of its question: rollouts excludes "
            "them from the candidate's loss, both also from the expert's, none keeps them."
        },
    )
    perturbed_per_expert: Annotated[int, Range(min=0, whole=True)] = field(
        default=0, metadata={"help": "Perturbed copies per expert trace as further negatives, new in each update."}
    )
    updates: Annotated[int, Range(min=1, whole=True)] = field(default=200, metadata={"help": "Optimiser steps."})
    learning_rate: Annotated[float, Range(above=0)] = field(default=1e-5, metadata={"help": "AdamW learning rate."})
    update_prompts: Annotated[int, Range(min=1, whole=True)] = field(
        default=16, metadata={"help": "Demonstrations in one update."}
    )
    update_candidates: Annotated[int, Range(min=1, whole=True)] = field(
        default=4, metadata={"help": "Candidates per demonstration in one update."}
    )
    token_budget: Annotated[int, Range(min=1, whole=True)] = field(
        default=8192, metadata={"help": "Padded tokens in one forward and backward pass."}
    )
    save_steps: Annotated[int, Range(min=1, whole=True)] = field(
        default=20, metadata={"help": "Updates between two checkpoints."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "bfloat16 autocast. Default: on a GPU, and on a CPU that has bfloat16 if the model is large, but "
            "not with --dtype."
        },
    )


@dataclass
class FitRunOptions:
    """The run folder, where its results go, the random numbers and the learning curve."""

    learning_curve: bool = field(
        default=False,
        metadata={
            "help": "Also fit read-outs on shares of the questions: AUROC and verdict on held-out questions by the "
            "number of questions, and what twice and four times as many would give."
        },
    )

    report_to: list[str] | None = field(
        default=None, metadata={"help": "Trackers that get the metrics: wandb, tensorboard, trackio, ..."}
    )
    run_name: str | None = field(
        default=None, metadata={"help": "The run's name in a tracker. Default: that of the run folder."}
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Upload the finished reward model to the Hub; checked before the run."}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository: owner/name, or a name. Default: the name of the run folder."}
    )
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Create a private repository."})
    hub_revision: str | None = field(default=None, metadata={"help": "Branch. Default: main."})
    output_dir: str = field(default="runs/fit", metadata={"help": "The run folder."})
    seed: Annotated[int, Range(min=0, max=MAX_SEED, whole=True)] = field(default=42, metadata={"help": "Random seed."})


@dataclass
class FitOptions(FitDataOptions, FitLabelOptions, FitModelOptions, FitLossOptions, FitUpdateOptions, FitRunOptions):
    """All options of `tracereward fit`."""

    def __post_init__(self) -> None:
        check_types(self)
        check_options(self)
        check_steps(self.step_delimiter, self.steps)
        if self.readout and self.objective not in ("pairwise", "bce"):
            raise InputError(f"objective {self.objective} is for fine-tuning: set --readout false")
        if self.learning_curve and not self.held_out_fraction:
            raise InputError("learning_curve is measured on held-out questions: set --held_out_fraction 0.2")
        if self.objective == "nnpu":
            if self.positives == "agreeing" or self.negatives == "disagreeing":
                raise InputError(
                    "objective nnpu is for candidates without labels: set --positives expert and --negatives all"
                )
            if self.perturbed_per_expert:
                raise InputError(
                    "objective nnpu takes all candidates for unlabelled, and perturbed copies are known to be wrong: "
                    "set --perturbed_per_expert 0"
                )

    def discriminator(self, rollouts: int) -> DiscriminatorOptions:
        """The options of the discriminator.

        Args:
            rollouts: number of candidates, all of which are kept.
        """
        return DiscriminatorOptions(
            head=self.head,
            granularity=self.granularity,
            interval=self.interval,
            objective=self.objective,
            positive_prior=self.positive_prior,
            balance="question" if self.balance == "question" else "none",
            label_smoothing=self.label_smoothing,
            first_difference=self.first_difference,
            perturbed_per_expert=self.perturbed_per_expert,
            discriminator_learning_rate=self.learning_rate,
            discriminator_warmup_updates=self.updates,
            discriminator_prompts=self.update_prompts,
            discriminator_rollouts=self.update_candidates,
            discriminator_token_budget=self.token_budget,
            replay_size=max(1, rollouts),
        )


FIT_GROUPS: dict[str, type] = {
    "Data": FitDataOptions,
    "Labels and held-out questions": FitLabelOptions,
    "Reward model": FitModelOptions,
    "Loss": FitLossOptions,
    "Fine-tuning (--readout false)": FitUpdateOptions,
    "Run": FitRunOptions,
}
"""The options by heading of the help."""
