"""`tracereward plan`, and ``--dry_run`` of `sft` and `train`: what a run would do, measured and written nowhere."""

import dataclasses
import math
import os
import shlex
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from trl import ModelConfig

from tracereward.commands import sft, train
from tracereward.commands.plan_estimates import FULL, Lengths, advice, available_memory, seconds_of, setup_of, steps_of
from tracereward.commands.prepared import Prepared, choose_precision, inherit, prepare
from tracereward.data.demonstrations import split_rows
from tracereward.data.surface_probe import leak_warning
from tracereward.errors import InputError
from tracereward.metrics import mean
from tracereward.modeling.loading import best_device, local_folder
from tracereward.modeling.precision import parameters
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.runs.job import Job, starting_policy
from tracereward.training.memory import memory
from tracereward.training.micro_steps import (
    MicroSteps,
    held_memory,
    is_slow,
    measure,
    process_seconds,
    short_config,
)
from tracereward.training.options import DataArguments
from tracereward.training.token_probe import token_probe

COMMANDS = ("train", "sft")
SAMPLES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do.

    Attributes:
        command: ``train`` or ``sft``.
        source: of the demonstrations.
        demonstrations: that are used.
        dropped: that are longer than `limit`.
        limit: longest completion in tokens.
        prompts: lengths of the prompts in tokens.
        completions: lengths of the demonstrations, with their end.
        policy: name of the model.
        parameters: of the policy.
        device: where it runs, and in which precision.
        values: options that were chosen.
        batch: rows of a micro-batch, micro-batches of a step, processes, rollouts of a prompt.
        steps: of the policy.
        memory: estimated bytes by part; ``peak`` is the sum at the largest moment, ``process`` what imports take.
        measured: bytes at the micro-steps; None if they were not run.
        available: bytes of the machine or the GPU.
        seconds: estimated, by part; empty if the micro-steps were not run.
        leak: what distinguishes experts from the policy at the surface; empty for SFT.
        sampled: what the rollouts are like; empty for SFT.
        samples: up to eight rollouts of the policy, with their prompts.
        advice: what to change.
        run: the command to run.
    """

    command: str
    source: str
    demonstrations: int
    dropped: int
    limit: int
    prompts: Lengths
    completions: Lengths
    policy: str
    parameters: int
    device: str
    values: dict[str, Any]
    batch: tuple[int, int, int, int]
    steps: int
    memory: dict[str, float]
    measured: int | None
    available: int
    seconds: dict[str, float]
    leak: str
    sampled: str
    samples: list[tuple[str, str]]
    advice: list[str]
    run: str


def make_plan(command: str, data: DataArguments, config: Any, model: ModelConfig, *, argv: Sequence[str] = ()) -> Plan:
    """Read data and model, estimate memory, and measure two micro-steps in a temporary folder.

    Args:
        command: ``train`` or ``sft``.
        data: options of the demonstrations.
        config: of the command.
        model: options of the policy.
        argv: the arguments as they were given, for the command to run.

    Raises:
        InputError: the command cannot be planned, or would refuse its inputs.
    """
    if command not in COMMANDS:
        raise InputError(f"a plan is of {' or '.join(COMMANDS)}, not of {command}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a plan is made in one process: start it without a launcher")
    base, refuses = held_memory(), data.on_long == "refuse"
    data.on_long = "drop"
    inherit(data, config, model)
    inputs = train.checked_inputs(data, config, model) if command == "train" else None
    prepared = prepare(data, config, model) if inputs is None else inputs.prepared
    config = prepared.config
    choose_precision(Job(kind=command, data=data, config=config, model=model))
    lengths = _lengths(prepared)
    setup = setup_of(config, model, lengths=lengths, critic=None if inputs is None else inputs.start)
    parts, available = memory(setup), available_memory()
    parts = {"process": float(base), **parts, "peak": parts["peak"] + base}
    fits = parts["peak"] <= FULL * available
    found, trainer, loading = MicroSteps(), None, 0.0
    with tempfile.TemporaryDirectory(prefix="tracereward-plan-") as folder:
        if fits:
            short = short_config(config, folder, slow=is_slow(parameters(local_folder(starting_policy(model)))[0]))
            if inputs is not None:
                trainer, _ = train.build_trainer(inputs, short, model, [])
            else:
                rows = prepared.rows
                if config.validation_fraction:
                    rows, _ = split_rows(rows, config.validation_fraction, config.seed)
                trainer = sft.build_trainer(rows, [], short, model=model, tokenizer=prepared.tokenizer)
            loading = process_seconds()
            found = measure(trainer, config, _typical(prepared))
    changes, more = advice(setup, base, available)
    if prepared.dropped and refuses:
        more += ["--on_long", "drop"]
    leak, sampled, samples = "", "", []
    if inputs is not None and trainer is not None:
        leak, sampled, samples = _of_samples(trainer, found, prepared)
    return Plan(
        command=command,
        source=str(data.dataset_name or prepared.task.dataset),
        demonstrations=len(prepared.rows),
        dropped=prepared.dropped,
        limit=config.max_completion_length,
        prompts=lengths[0],
        completions=lengths[1],
        policy=starting_policy(model),
        parameters=parameters(local_folder(starting_policy(model)))[0],
        device=_device(config),
        values=prepared.chosen,
        batch=(
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            config.world_size,
            getattr(config, "num_generations", None) or 1,
        ),
        steps=steps_of(config, len(prepared.rows) + len(prepared.unlabeled)),
        memory=parts,
        measured=found.peak if trainer is not None else None,
        available=available,
        seconds={} if trainer is None else {"start": loading, **seconds_of(config, found, prepared)},
        leak=leak,
        sampled=sampled,
        samples=samples,
        advice=changes,
        run=shlex.join(["tracereward", command, *argv, *more]),
    )


def _lengths(prepared: Prepared) -> tuple[Lengths, Lengths]:
    tokenizer = prepared.tokenizer
    return (
        Lengths.of([len(encode_prompt(tokenizer, row["prompt"])) for row in [*prepared.rows, *prepared.unlabeled]]),
        Lengths.of([len(encode_completion(tokenizer, row["completion"])) for row in prepared.rows]),
    )


def _typical(prepared: Prepared) -> float:
    """Mean tokens of a demonstration."""
    return mean([len(encode_completion(prepared.tokenizer, row["completion"])) for row in prepared.rows])


def _device(config: Any) -> str:
    device = best_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}"
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}" if device.type == "cpu" else ""
    return f"{name}{threads}, {'bfloat16 autocast' if config.bf16 else 'float32'}"


def _of_samples(trainer: Any, found: MicroSteps, prepared: Prepared) -> tuple[str, str, list[tuple[str, str]]]:
    """What leaks at the surface, what the rollouts are like, and some of them, first of different prompts."""
    tokenizer, experts = trainer.discriminator.model.tokenizer, trainer.discriminator.experts
    if not found.sampled:
        return "", "no rollout of a demonstration's prompt was sampled", []
    probe = token_probe(experts, found.sampled, tokenizer, every_expert=True)
    if math.isnan(probe.auroc):
        leak = "too few rollouts to tell"
    else:
        leak = leak_warning(probe) or f"none: AUROC {probe.auroc:.2f} of surface features"
    ended = sum(rollout.ids[-1:] == [tokenizer.eos_token_id] for rollout in found.sampled)
    tokens = sum(len(rollout.ids) for rollout in found.sampled) / len(found.sampled)
    texts = tokenizer.batch_decode([rollout.ids for rollout in found.sampled], skip_special_tokens=True)
    gold = [prepared.rows[rollout.demonstration]["answer"] for rollout in found.sampled]
    sampled = f"{len(texts)} rollouts of {tokens:.0f} tokens in the mean, {ended} ended"
    sampled += ", sampling cut off" * found.cut_off
    judged = [
        prepared.task.verify(text, answer) for text, answer in zip(texts, gold, strict=True) if answer is not None
    ]
    sampled += f", {sum(judged)} of {len(judged)} right" if judged else ""
    groups: dict[int, list[tuple[str, str]]] = {}
    for rollout, text in zip(found.sampled, texts, strict=True):
        prompt = prepared.rows[rollout.demonstration]["prompt"]
        groups.setdefault(rollout.demonstration, []).append((prompt, text))
    order = [group[rank] for rank in range(SAMPLES) for group in groups.values() if rank < len(group)]
    return leak, sampled, order[:SAMPLES]
