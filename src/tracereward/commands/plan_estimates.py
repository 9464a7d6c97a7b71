"""Steps, seconds and memory of a run, estimated from its options and two measured micro-steps; see `plan`."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from trl import ModelConfig

from tracereward.commands.prepared import Prepared
from tracereward.modeling.loading import best_device, read_config
from tracereward.rewards.heads import reads_log_probs
from tracereward.runs.job import starting_policy
from tracereward.training.config import SupervisedConfig
from tracereward.training.memory import BFLOAT16, FLOAT32, Setup, Shape, memory
from tracereward.training.micro_steps import MicroSteps

FULL = 0.9
"""Share of the memory that a run may take by the estimate."""
QUESTIONS, ANSWERS = 64, 4
"""Held-out questions at the end of `train`, and rollouts of each, see `runs.verdict`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of texts: the median, the 95th percentile and the longest."""

    median: int
    p95: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Lengths":
        """Of at least one text."""
        ordered = sorted(lengths)
        return cls(
            median=ordered[len(ordered) // 2], p95=ordered[math.ceil(0.95 * len(ordered)) - 1], longest=ordered[-1]
        )


def steps_of(config: Any, prompts: int) -> int:
    """Optimiser steps of a run."""
    if config.max_steps > 0:
        return config.max_steps
    rows = config.per_device_train_batch_size * config.world_size
    if isinstance(config, SupervisedConfig):
        of_epoch = math.ceil(math.ceil(prompts / rows) / config.gradient_accumulation_steps)
    else:  # TRL leaves out an incomplete batch of rollouts
        batches = prompts // (config.generation_batch_size // config.num_generations)
        passes = batches * config.steps_per_generation * config.num_iterations
        of_epoch = math.ceil(passes / config.gradient_accumulation_steps)
    return math.ceil(config.num_train_epochs * max(1, of_epoch))


def seconds_of(config: Any, found: MicroSteps, prepared: Prepared) -> dict[str, float]:
    """Seconds of the parts of a run, without its start and its checkpoints.

    Args:
        config: of the run.
        found: seconds of the micro-steps.
        prepared: inputs of the run.
    """
    steps = steps_of(config, len(prepared.rows) + len(prepared.unlabeled))
    policy = steps * config.gradient_accumulation_steps * found.policy
    if isinstance(config, SupervisedConfig):
        return {"policy": policy}
    size = config.generation_batch_size
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    batches = steps * rows / size / config.num_iterations
    drawn = 0
    if config.discriminator_warmup_updates and config.warmup_candidates is None:
        drawn = math.ceil(min(config.warmup_prompts, len(prepared.rows)) * config.warmup_rollouts / size)
    asked = min(QUESTIONS, max(16, round(config.held_out_fraction * len(prepared.rows)))) * ANSWERS / size
    return {
        "warm-up": drawn * found.rollouts + config.discriminator_warmup_updates * found.update,
        "rollouts": batches * found.rollouts,
        "rewards": batches * (found.rewards + found.monitors / config.monitor_every),
        "discriminator": batches / config.discriminator_every * config.discriminator_updates * found.update,
        "policy": policy,
        "report": asked * (found.rollouts + found.rewards),
    }


def available_memory() -> int:
    """Bytes of the GPU, or of the machine that no process holds."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def setup_of(config: Any, model: ModelConfig, *, lengths: tuple[Lengths, Lengths], critic: str | None) -> Setup:
    """The shapes and sizes that the memory follows from."""
    policy, on_cpu = starting_policy(model), best_device().type == "cpu"
    strategy = "zero3" if config.deepspeed else "fsdp2" if config.fsdp else "ddp"
    prompt = lengths[0].longest
    checkpointing = config.gradient_checkpointing if config.activation_checkpointing is None else True
    common: dict[str, Any] = {
        "strategy": strategy,
        "gpus": config.world_size,
        "rank": model.lora_r if model.use_peft else 0,
        "prompt": prompt,
        "rows": config.per_device_train_batch_size,
        "accumulation": config.gradient_accumulation_steps,
        "checkpointing": bool(checkpointing),
        "autocast": bool(config.bf16 or config.fp16),
        "frozen_width": FLOAT32 if str(model.dtype) in ("None", "float32") else BFLOAT16,
    }
    shape = Shape.of(read_config(policy))
    if critic is None:
        return Setup(shape, **common, completion=lengths[1].longest, adversarial=False)
    traces = config.discriminator_prompts * (1 + config.discriminator_rollouts + config.perturbed_per_expert)
    tokens = traces * (prompt + lengths[1].longest)
    return Setup(
        shape,
        **common,
        completion=config.max_completion_length,
        discriminator=None if critic == policy else Shape.of(read_config(critic)),
        shared_base=config.shared_base,
        shard_discriminator=config.shard_discriminator,
        frozen_start=config.reward_form == "logit_plus_logprob",
        discriminator_budget=min(config.discriminator_token_budget, tokens),
        reads_logits=reads_log_probs(config.head),
        sampled=0 if config.use_vllm else config.generation_batch_size // config.world_size,
        half_copy=on_cpu and bool(config.bf16),
    )


def advice(setup: Setup, base: int, available: int) -> tuple[list[str], list[str]]:
    """What to change if the memory does not suffice: sentences, and options for the command."""
    if memory(setup)["peak"] + base <= FULL * available:
        return [], []
    rows, times = setup.rows, setup.accumulation
    while rows > 1:
        rows, times = rows // 2, times * 2
        smaller = dataclasses.replace(
            setup, rows=rows, accumulation=times, discriminator_budget=min(setup.discriminator_budget, 2048)
        )
        if memory(smaller)["peak"] + base <= FULL * available:
            options = ["--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(times)]
            if smaller.adversarial:
                options += ["--discriminator_token_budget", str(smaller.discriminator_budget)]
            return ["the estimate does not fit: smaller micro-batches do, see the command"], options
    fix = "use --use_peft true" if not setup.rank else "use --dtype bfloat16, --load_in_4bit true or a smaller model"
    return [f"the estimate does not fit, whatever the micro-batches: {fix}"], []
