"""Options and helpers for tests of interrupted runs."""

from pathlib import Path
from typing import Any

from helpers.tiny import Result

COMMON: dict[str, Any] = {
    "task": "arithmetic",
    "max_completion_length": 24,
    "max_steps": 6,
    "save_steps": 2,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "report_to": "none",
}


GRPO = {**COMMON, "num_generations": 4}


TRAIN = {
    **GRPO,
    "discriminator_learning_rate": 1e-3,
    "discriminator_warmup_updates": 6,
    "discriminator_updates": 1,
    "discriminator_every": 1,
    "discriminator_prompts": 6,
    "perturbed_per_expert": 0,
    "reward_form": "logit",  # log-probs of an untrained policy exceed the clip
    "warmup_rollouts": 2,
    "replay_size": 40,  # small enough that old rollouts are dropped
}


def sentence(ended: Result) -> str:
    """The final message of a command, which must be on its own line and not after a progress bar."""
    said = [line for line in ended.err.splitlines() if line.startswith("tracereward: ")]
    assert len(said) == 1, ended.err
    return said[0]


def whole_checkpoints(output: Path) -> list[str]:
    return sorted(path.parent.name for path in output.glob("checkpoints/checkpoint-*/complete.json"))
