"""Traffic of a training step, computed from the models' shapes, and the tables of `docs/scale.md`.

The memory of a step is `tracereward.training.memory`, which `tracereward plan` prints too.
"""

import math
from collections.abc import Mapping
from itertools import chain

from tracereward.training.memory import (
    BFLOAT16,
    FLOAT32,
    Setup,
    Shape,
    discriminator_weights,
    frozen_start,
    kv_cache,
    memory,
    trained_weights,
)

__all__ = ["SHAPES", "Setup", "kv_cache", "memory", "table", "traffic"]
# Pickled bytes of a rollout's token: its id (5) twice, its reward (9).
PICKLED_TOKEN = 5 + 5 + 9
SHAPES = {
    "Llama-3.2-3B": Shape(
        layers=28, hidden=3072, heads=24, kv_heads=8, intermediate=8192, vocabulary=128256, tied=True
    ),
    "Llama-3.1-8B": Shape(
        layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocabulary=128256, tied=False
    ),
    "Llama-3.1-70B": Shape(
        layers=80, hidden=8192, heads=64, kv_heads=8, intermediate=28672, vocabulary=128256, tied=False
    ),
}


def all_reduce(size: float, gpus: int) -> float:
    """Bytes that each of `gpus` sends (and receives) in a ring all-reduce of `size` bytes: 2 (N - 1) / N size."""
    return 2 * all_gather(size, gpus)


def all_gather(size: float, gpus: int) -> float:
    """The same for an all-gather to `size` bytes on each GPU, or a reduce-scatter of `size` bytes: (N - 1) / N size."""
    return (gpus - 1) / gpus * size


def traffic(setup: Setup) -> dict[str, float]:
    """Bytes that one GPU sends in an optimiser step with new rollouts, by part, and their sum.

    Weights are gathered, and gradients reduced, in bfloat16, except float32 gradients in DDP; the discriminator's are
    float32. A sharded policy is gathered in each forward and each backward pass of a micro-batch, in each pass without
    its adapter that `logit_plus_logprob` adds, and once to send the weights to a colocated vLLM. A sharded
    discriminator is gathered twice in an update of one micro-batch per GPU, and in each pass that scores rollouts; its
    frozen weights are bfloat16, its trained ones float32.
    """
    gpus, strategy = setup.gpus, setup.strategy
    trained, gather = trained_weights(setup.policy, setup.rank), all_gather(BFLOAT16 * setup.policy.weights, gpus)
    if strategy == "ddp":
        gradients = all_reduce(FLOAT32 * trained, gpus)
    else:
        late = strategy == "fsdp2" and not setup.sync_each_batch
        gradients = (1 if late else setup.accumulation) * all_gather(BFLOAT16 * trained, gpus)
    weights = 0.0
    if setup.sharded:
        weights = 2 * setup.accumulation * gather
    elif strategy == "zero2":
        weights = all_gather(BFLOAT16 * trained, gpus)  # each GPU has updated its shard
    scored = math.ceil(setup.accumulation * setup.tokens / setup.discriminator_budget)
    learned, updates = FLOAT32 * discriminator_weights(setup), setup.discriminator_updates
    frozen = BFLOAT16 * setup.critic.weights if setup.critic_rank else 0
    parts = {
        "policy: gradients": gradients,
        "policy: weights": weights,
        "policy: weights, to score": scored * gather if setup.sharded and setup.rank and setup.frozen_start else 0.0,
        "frozen starting policy": scored * all_gather(frozen_start(setup), gpus) if setup.shard_discriminator else 0.0,
        "policy: weights, for vLLM": gather if setup.sharded else 0.0,
        "discriminator: gradients": updates * (all_gather if setup.shard_discriminator else all_reduce)(learned, gpus),
        "discriminator: weights": (2 * updates + scored) * all_gather(frozen + learned, gpus)
        if setup.shard_discriminator
        else 0.0,
        "rollouts": all_gather(rollouts(setup), gpus),
    }
    return {**parts, "sum": sum(parts.values())}


def rollouts(setup: Setup) -> int:
    """Pickled bytes of all GPUs' rollouts of a step, which each process gathers."""
    return setup.gpus * setup.rows * setup.accumulation * setup.completion * PICKLED_TOKEN


def table(columns: Mapping[str, Mapping[str, float]], corner: str, unit: float = 1e9) -> str:
    """A Markdown table with one column per mapping and one row per key, sizes in `unit` bytes."""
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" + "|--:" * len(columns) + "|"]
    for key in dict.fromkeys(chain.from_iterable(columns.values())):
        sizes = [column[key] / unit for column in columns.values()]
        shown = (f"{size:,.0f}" if size >= 99.95 else f"{size:.1f}" for size in sizes)
        lines.append(f"| {key} | {' | '.join(shown)} |")
    return "\n".join(lines)
