"""Time and memory of two micro-steps of a training, from which `tracereward plan` estimates a run.

The trainer is the run's own, with sizes of the run: it samples one batch of rollouts, updates the discriminator,
rewards the batch and makes one or two micro-steps of the policy. Where that would take minutes, the batches are smaller
and their times are scaled with the number of traces.
"""

import contextlib
import copy
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import SupervisedConfig
from tracereward.training.discriminator_batch import Rollout

SLOW = 30e6
"""Parameters from which a CPU gets smaller batches."""
FEWER = 8
"""Of how many prompts such a batch has one."""
SAMPLING_SECONDS = 30.0
"""After which sampling is cut off."""


@dataclass(frozen=True, kw_only=True)
class MicroSteps:
    """Seconds of the parts of a run, each scaled to the sizes of the run; 0 for what it does not have.

    Attributes:
        rollouts: sampling a batch of rollouts on one process.
        rewards: rewarding the batch.
        monitors: monitoring it.
        update: one update of the discriminator.
        policy: forward and backward pass of one micro-batch of the policy.
        peak: bytes that the process held at most; on a GPU, that torch allocated.
        sampled: the rollouts.
        cut_off: whether their sampling was, so that lengths and seconds are of the demonstrations' mean length.
    """

    rollouts: float = 0.0
    rewards: float = 0.0
    monitors: float = 0.0
    update: float = 0.0
    policy: float = 0.0
    peak: int = 0
    sampled: list[Rollout] = field(default_factory=list)
    cut_off: bool = False


def is_slow(parameters: int) -> bool:
    """Whether micro-steps at the run's own sizes would take minutes on this machine."""
    return parameters >= SLOW and not torch.accelerator.is_available()


def short_config(config: Any, folder: str, *, slow: bool) -> Any:
    """A copy of a run's config for the micro-steps: sizes of the run, no checkpoints, logs or trackers.

    Args:
        config: of the run.
        folder: temporary output folder.
        slow: see `is_slow`.
    """
    short = copy.copy(config)
    changes: dict[str, Any] = {
        "output_dir": folder,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "load_best_model_at_end": False,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
    }
    if not isinstance(config, SupervisedConfig):
        steps = config.num_generations if slow else config.steps_per_generation * config.per_device_train_batch_size
        steps = max(1, steps // config.per_device_train_batch_size)
        rollouts = steps * config.per_device_train_batch_size * config.world_size
        changes |= {"steps_per_generation": steps, "generation_batch_size": rollouts, "num_iterations": 1}
        changes["max_steps"] = min(2, steps)
        if not config.use_vllm:
            limit = {"max_time": SAMPLING_SECONDS} if slow else {}
            changes["generation_kwargs"] = {**(config.generation_kwargs or {}), **limit}
    if isinstance(config, AdversarialConfig):
        changes |= {"discriminator_warmup_updates": 0, "discriminator_every": 1, "monitor_every": 1}
        changes |= {"discriminator_updates": 2, "discriminator_gate_high": None, "on_failure": "ignore"}
        changes["discriminator_prompts"] = max(1, config.discriminator_prompts // (FEWER if slow else 1))
    for name, value in changes.items():
        setattr(short, name, value)
    return short


def measure(trainer: Trainer, config: Any, typical: float) -> MicroSteps:
    """Run the micro-steps.

    Args:
        trainer: built with `short_config`.
        config: of the run.
        typical: mean tokens of a demonstration.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    sampled: list[Rollout] = []
    counts: list[int] = []
    discriminator = getattr(trainer, "discriminator", None)
    _timed(trainer, "training_step", seconds)
    parts = ("_generate_and_score_completions", "_generate_single_turn", "_perturbation", "_kl")
    for name in parts if hasattr(trainer, parts[0]) else ():
        _timed(trainer, name, seconds)
    if discriminator is not None:
        _timed(discriminator, "update", seconds)
        _seen(discriminator, "remember", sampled.extend)
        _seen(discriminator, "_accumulate", lambda traces: counts.append(len(traces)))
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    batch = sum(seconds["_generate_and_score_completions"])
    generation = sum(seconds["_generate_single_turn"])
    monitors = sum(seconds["_perturbation"]) + sum(seconds["_kl"])
    steps = seconds["training_step"]
    first = steps[0] - batch
    policy = steps[1] if len(steps) > 1 else first  # the first one allocates
    share, cut_off = _share(trainer, config), False
    if isinstance(config, SupervisedConfig):
        return MicroSteps(policy=policy, peak=peak_memory())
    own = trainer.args
    if sampled and generation >= SAMPLING_SECONDS and (getattr(own, "generation_kwargs", None) or {}).get("max_time"):
        cut_off = True
    tokens = sum(len(rollout.ids) for rollout in sampled) / max(1, len(sampled))
    longer = max(1.0, typical / max(1.0, tokens)) if cut_off else 1.0
    updates = seconds["update"]
    update = updates[-1] if updates else 0.0
    wanted = getattr(config, "discriminator_prompts", 0) * (
        1 + getattr(config, "discriminator_rollouts", 0) + getattr(config, "perturbed_per_expert", 0)
    )
    update *= wanted / counts[-1] if counts and counts[-1] else 1.0
    rewards = batch - generation - monitors - sum(updates)
    return MicroSteps(
        rollouts=generation * share * longer,
        rewards=max(0.0, rewards) * share * longer,
        monitors=monitors,
        update=update * longer,
        policy=policy * longer,
        peak=peak_memory(),
        sampled=sampled,
        cut_off=cut_off,
    )


def _share(trainer: Trainer, config: Any) -> float:
    """Rollouts of a batch of the run over those of a measured one."""
    own = getattr(trainer.args, "generation_batch_size", None)
    return config.generation_batch_size / own if own else 1.0


def peak_memory() -> int:
    """Bytes that this process held at most; on a GPU, that torch allocated there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_memory() -> int:
    """Bytes that this process holds, of which its imports are most before a model is loaded; 0 on a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
    return peak_memory()


def process_seconds() -> float:
    """Seconds since this process started, imports included; where /proc has none, since its interpreter did."""
    with contextlib.suppress(OSError, IndexError), open("/proc/self/stat", encoding="ascii") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.process_time()


def _timed(owner: Any, name: str, seconds: dict[str, list[float]]) -> None:
    """Record the seconds of every call of a method."""
    inner: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        _wait()
        start = time.perf_counter()
        result = inner(*args, **kwargs)
        _wait()
        seconds[name].append(time.perf_counter() - start)
        return result

    setattr(owner, name, timed)


def _seen(owner: Any, name: str, see: Callable[[Any], object]) -> None:
    """Call `see` with the first argument of every call of a method."""
    inner: Callable[..., Any] = getattr(owner, name)

    def seen(first: Any, *args: Any, **kwargs: Any) -> Any:
        see(first)
        return inner(first, *args, **kwargs)

    setattr(owner, name, seen)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
