"""Sets the options of a training command that are not given; see `training.chosen`."""

import dataclasses
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from tracereward.console import note
from tracereward.modeling.loading import context_length, local_folder, read_config
from tracereward.modeling.precision import parameters
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.runs.job import Config, starting_policy
from tracereward.runs.same_run import stored_options
from tracereward.training.chosen import Size, chosen_values
from tracereward.training.config import SupervisedConfig
from tracereward.training.option_rules import values_of, without_effect
from tracereward.training.options import DataArguments

AnyConfig = TypeVar("AnyConfig", bound=Config)
EVERY_LAYER = "all-linear"


def choose(
    config: AnyConfig,
    data: DataArguments,
    model: ModelConfig,
    *,
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    resume: bool,
) -> tuple[AnyConfig, dict[str, Any]]:
    """A config with values for all options that are not given, and the chosen values; says them in one line.

    Adapters are put on all linear layers, unless layers are given. A resumed run keeps its own values; those that an
    earlier version did not store were TRL's.

    Args:
        config: of the command.
        data: options of the demonstrations.
        model: options of the policy; its layers of LoRA are set.
        rows: demonstrations and unlabeled prompts, rendered.
        tokenizer: the policy's.
        resume: whether a run in the output folder is resumed.
    """
    size = size_of(config, model, rows=rows, tokenizer=tokenizer)
    found = chosen_values(config.command, size, config.given)
    idle = without_effect(config.command, values_of(data, model, config))
    found = {name: value for name, value in found.items() if name not in idle}
    before = stored_options(str(config.output_dir)) if resume else {}
    if before:
        found = {name: before[name] for name in found if name in before}
    elif model.use_peft and model.lora_target_modules is None and model.lora_target_parameters is None:
        model.lora_target_modules = EVERY_LAYER  # pyright: ignore[reportAttributeAccessIssue] (PEFT's word for all)
        found["lora_target_modules"] = EVERY_LAYER
    if not found:
        return config, {}
    if not before:
        shown = ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
        )
        what = "adapters" if size.lora else "all weights"
        note(f"chosen for {what} of {millions(size.parameters)} and {size.prompts} prompts: {shown}")
    given = {field.name: config.given[field.name] for field in dataclasses.fields(config) if field.name in config.given}
    own = {name: value for name, value in found.items() if name in given}
    return type(config)(**{**given, **own}), found


def size_of(
    config: Config, model: ModelConfig, *, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Size:
    """What the values depend on; rows are only encoded if their lengths matter."""
    policy = starting_policy(model)
    limit = config.given["max_completion_length"]
    prompts = [0] if limit else [len(encode_prompt(tokenizer, row["prompt"])) for row in rows]
    completions = [
        limit or len(encode_completion(tokenizer, row["completion"])) for row in rows if row["completion"] is not None
    ]
    group = None if isinstance(config, SupervisedConfig) else config.num_generations
    return Size(
        parameters=parameters(local_folder(policy))[0],
        lora=model.use_peft,
        prompts=len(rows),
        longest_prompt=max(prompts),
        longest_completion=max(completions, default=1),
        context=context_length(read_config(policy)),
        processes=config.world_size,
        group=group or 1,
    )


def millions(count: int) -> str:
    """A number of parameters for people."""
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.3g} M"
