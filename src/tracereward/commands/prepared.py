"""Inputs of the training commands, checked before a model is loaded."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config

from tracereward.commands.choosing import choose
from tracereward.console import note
from tracereward.data.demonstrations import check_lengths, check_positions, load_demonstrations
from tracereward.data.marks import without_dropped
from tracereward.errors import InputError
from tracereward.modeling.loading import check_model
from tracereward.modeling.lost_text import check_texts
from tracereward.modeling.policy_settings import PolicySettings, inherited
from tracereward.modeling.precision import keep_choice, training_precision
from tracereward.modeling.rendering import (
    Rendering,
    check_reasoning,
    dated,
    render,
)
from tracereward.modeling.thinking_marks import check_thinking, thinking_of
from tracereward.modeling.tokenization import (
    policy_tokenizer,
)
from tracereward.runs.job import Config, Job, starting_policy
from tracereward.runs.same_run import stored_options
from tracereward.tasks.recipes import Task, get_task
from tracereward.thinking import MARKS
from tracereward.training.config import SupervisedConfig
from tracereward.training.options import DataArguments
from tracereward.training.quantization import check_quantization
from tracereward.training.validation import Validation, load_validation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """The inputs of a run, checked before any model is loaded."""

    config: Any  # the command's, with values for the options that were not given
    chosen: dict[str, Any]  # those values
    task: Task
    tokenizer: PreTrainedTokenizerBase
    rows: list[dict[str, Any]]
    unlabeled: list[dict[str, Any]]
    raw: list[dict[str, Any]]  # rows, then unlabeled, before templating
    validation: Validation | None
    rendering: Rendering
    dropped: int

    @property
    def remember(self) -> PolicySettings:
        """What is stored with the policy."""
        rendering, thinking = self.rendering, self.task.thinking
        return PolicySettings(
            task=self.task.name,
            template=rendering.template,
            chat_template_kwargs=rendering.chat_template_kwargs,
            date=rendering.date,
            think=() if thinking.marks == MARKS else thinking.marks[0],
        )


def inherit(data: DataArguments, config: Config, model: ModelConfig) -> None:
    """Set the template and its variables where they are not given; see `inherited`."""
    kwargs: Any = config.chat_template_kwargs
    found = inherited(starting_policy(model), data.template, kwargs)
    data.template, config.chat_template_kwargs = found
    config.given["chat_template_kwargs"] = config.chat_template_kwargs  # TRL reads JSON in a text


def choose_precision(job: Job) -> None:
    """Set ``--bf16`` on a CPU, if it is not given, and say so in one line; a resumed run keeps its own.

    Weights sharded over processes stay in float32.

    Raises:
        InputError: the model cannot be read.
    """
    config, model = job.config, job.model
    if not config.use_cpu or config.fp16 or config.fsdp or config.deepspeed or model.load_in_4bit or model.load_in_8bit:
        return
    given, before = config.given["bf16"], stored_options(job.output_dir) if job.resume else {}
    chosen, why = training_precision(starting_policy(model))
    if before and given in (None, before.get("bf16")):  # another one that is given is refused
        given = keep_choice(before.get("bf16"), chosen, "bf16")
    elif not before:
        given, why = (chosen, why) if given is None else (given, "as --bf16 says")
        if why:
            note(f"trains {'under bfloat16 autocast' if given else 'in float32'}: {why}")
    config.given["bf16"] = given
    config.bf16 = bool(given)
    if given:  # otherwise it may be a launcher's
        config.mixed_precision = "bf16"


def prepare(data: DataArguments, config: Config, model: ModelConfig, resume: bool = False) -> Prepared:
    """Load the tokenizer and the demonstrations, choose the options that are not given, and check them.

    Args:
        data: options of the demonstrations.
        config: of the command.
        model: options of the policy.
        resume: whether a run in the output folder is resumed.

    Raises:
        InputError: the model or a file cannot be used, options conflict, or a batch needs more demonstrations.
    """
    Job(kind=config.command, data=data, config=config, model=model, resume=resume)  # refuses options without effect
    task, policy = get_task(data.task), starting_policy(model)
    source = data.dataset_name or task.dataset
    if source is None:
        raise InputError(f"task {task.name!r} has no default dataset: pass --dataset_name, a file or a Hub id")
    subset = data.dataset_config or (task.subset if data.dataset_name in (None, task.dataset) else None)
    rows = load_demonstrations(
        source, task, split=data.dataset_train_split, subset=subset, limit=data.max_demonstrations
    )
    rows, said = without_dropped(rows, data.drop)
    if said:
        note(said)
    unlabeled = []
    if data.unlabeled_dataset_name is not None:
        unlabeled = load_demonstrations(data.unlabeled_dataset_name, task, require_completion=False)
        unlabeled = [{**row, "completion": None} for row in unlabeled]
    check_model(policy)
    check_quantization(model, config)
    by_source = {row["source"]: row for row in [*rows, *unlabeled]}
    kwargs: Any = config.chat_template_kwargs or {}
    rendering = Rendering(template=str(data.template), chat_template_kwargs=kwargs)
    tokenizer = policy_tokenizer(policy, rendering)
    rendering = dated(rendering, tokenizer)
    rows = render(rows, tokenizer, rendering)
    check_reasoning(rows, tokenizer, rendering)
    unlabeled = render(unlabeled, tokenizer, rendering)
    check_texts(tokenizer, texts_of([*rows, *unlabeled]), source)
    config, chosen = choose(config, data, model, rows=[*rows, *unlabeled], tokenizer=tokenizer, resume=resume)
    limit = config.max_completion_length
    assert limit is not None
    rows, dropped = check_lengths(rows, tokenizer, None, limit, on_long=data.on_long)
    if dropped:
        note(f"{dropped} demonstrations dropped: longer than {limit} tokens (--max_completion_length)")
    rollouts = 0 if isinstance(config, SupervisedConfig) else limit
    check_positions([*rows, *unlabeled], tokenizer, policy, rollouts=rollouts)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    prompts = len(rows) + len(unlabeled)
    if isinstance(config, SupervisedConfig):
        needed, what = batch, "one optimiser step"
    else:
        assert config.generation_batch_size is not None
        assert config.num_generations is not None
        needed, what = config.generation_batch_size // config.num_generations, "one batch of rollouts"
    if prompts < needed:
        raise InputError(
            f"{source}: {prompts} demonstrations, but {what} needs {needed} prompts. "
            "Add rows, or lower --per_device_train_batch_size or --gradient_accumulation_steps."
        )
    raw = [by_source[row["source"]] for row in [*rows, *unlabeled]]
    thinking = thinking_of(tokenizer, rendering, [*rows, *unlabeled], getattr(config, "think_marks", None))
    asked = [row["prompt"] for row in raw[: len(rows)]]
    check_thinking(rows, thinking, asked, getattr(config, "thinking_weight", None))
    task = task.behind(thinking)
    validation = load_validation(
        data,
        task,
        tokenizer,
        [*rows, *unlabeled],
        rendering=rendering,
        max_new_tokens=limit,
        batch_size=config.per_device_train_batch_size,
    )
    if validation is not None and config.save_strategy == "no":
        raise InputError(
            "--validation_dataset_name selects a checkpoint, but --save_strategy no writes none; use steps"
        )
    if validation is not None and config.load_best_model_at_end:
        raise InputError(
            "use only one of --validation_dataset_name, --validation_fraction and --load_best_model_at_end"
        )
    return Prepared(
        config=config,
        chosen=chosen,
        dropped=dropped,
        task=task,
        tokenizer=tokenizer,
        rows=rows,
        unlabeled=unlabeled,
        raw=raw,
        validation=validation,
        rendering=rendering,
    )


def texts_of(rows: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Location, prompt and completion of rendered rows, for `check_texts`."""
    return [(row["source"], [text for text in (row["prompt"], row["completion"]) if text]) for row in rows]


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Re-raise configuration errors of transformers, PEFT and TRL as `InputError`, with their message."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a system error, such as a full disk
            raise
        raise InputError(" ".join(str(error).split())) from error


def lora(model: ModelConfig) -> LoraConfig | None:
    """LoRA settings from the options; None without ``use_peft``."""
    config = get_peft_config(model)
    assert config is None or isinstance(config, LoraConfig)
    return config
