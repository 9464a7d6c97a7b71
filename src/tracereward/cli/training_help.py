"""``--help`` of the training commands: the essential options, then our own; loads neither torch nor TRL."""

import dataclasses
import textwrap

from tracereward.training.fit_options import FIT_GROUPS
from tracereward.training.option_types import own_fields
from tracereward.training.options import GROUPS, NOT_OF
from tracereward.training.trl_options import HONOURED, commands_with

COMMANDS = {
    "sft": ("Fine-tune a model on expert traces.", "SFTConfig"),
    "train": ("Learn a reward model from expert traces and train the policy on it.", "GRPOConfig"),
    "fit": ("Learn a reward model from expert traces and logged traces, without a policy.", ""),
    "grpo": (
        "Train a policy on a given reward: the verifier (upper baseline) or its own log-prob (control).",
        "GRPOConfig",
    ),
}
FIRST = {
    "config": "YAML file with any of these options, one `name: value` a line; overridden by the command line",
    "model_name_or_path": "folder or Hub id of the starting policy",
    "task": "",
    "dataset_name": "",
    "output_dir": "the run folder (default: runs/{command})",
    "resume": "continue the run in --output_dir from its last complete checkpoint, with the options in its config.yaml",
    "dry_run": "print what the run would take, from two measured micro-steps, and train nothing (not of grpo)",
    "max_completion_length": "longest completion in tokens",
    "per_device_train_batch_size": "rows in one forward and backward pass",
    "learning_rate": "learning rate of the policy",
    "max_steps": "optimiser steps, instead of --num_train_epochs",
}
"""The essential options; an empty text is taken from `options`."""
FIRST_OF_FIT = {
    **{name: FIRST[name] for name in ("config", "output_dir", "resume")},
    **dict.fromkeys(("demonstrations", "candidates", "model", "task"), ""),
}
LORA = {
    "use_peft": "train LoRA adapters instead of all weights",
    "lora_r, --lora_alpha, --lora_target_modules": "their rank, scale and layers",
}


def help_text(command: str) -> str:
    """Help of ``sft``, ``train``, ``grpo`` or ``fit``."""
    about, parent = COMMANDS[command]
    groups, first = (FIT_GROUPS, FIRST_OF_FIT) if command == "fit" else (GROUPS[command], FIRST)
    lines = [f"Usage: tracereward {command} [--config FILE.yaml] [--resume] [--OPTION VALUE ...]", "", about, ""]
    own = {option.name: _line(option) for group in groups.values() for option in own_fields(group)}
    lines += ["First:"]
    lines += [own.get(name) or _wrapped(f"--{name}: {text.format(command=command)}") for name, text in first.items()]
    if parent:
        lines += ["", "LoRA:", *(f"  --{name}: {text}" for name, text in LORA.items())]
    for heading, group in groups.items():
        names = [option.name for option in own_fields(group) if option.name not in (*first, *NOT_OF.get(command, ()))]
        lines += ["", f"{heading}:", *(own[name] for name in names)] if names else []
    if not parent:
        return "\n".join(lines)
    lines += ["", f"Options of trl.{parent} and trl.ModelConfig (docs/options.md says what each does):"]
    for heading, group in HONOURED.items():
        names = [f"--{name}" for name in group if command in commands_with(name) and name not in own]
        if names:
            lines += [f"  {heading}:", *_lines(" ".join(names), 80, "    ", "    ")]
    return "\n".join(lines)


def _line(option: dataclasses.Field) -> str:
    default = "" if option.default in (None, dataclasses.MISSING) else f" (default: {option.default!r})"
    return _wrapped(f"--{option.name}: {option.metadata['help']}{default}")


def _wrapped(text: str) -> str:
    """An option's line, with its continuation lines indented further."""
    return "\n".join(_lines(text, 100, "  ", "      "))


def _lines(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
