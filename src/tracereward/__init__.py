"""Reward models for reasoning, learned from expert traces alone.

The names below are loaded when they are first used, so that importing the package does not import torch.
"""

import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# PEFT imports bitsandbytes where it is installed, which then warns that a faster kernel for the CPU is not.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from tracereward.commands.fit import Fitted as Fitted
    from tracereward.commands.fit import fit as fit
    from tracereward.data.demonstrations import load_demonstrations as load_demonstrations
    from tracereward.rewards.model import RewardModel as RewardModel
    from tracereward.rewards.model import TokenRewardModel as TokenRewardModel
    from tracereward.rewards.model import as_reward_func as as_reward_func
    from tracereward.rewards.settings import RewardSettings as RewardSettings
    from tracereward.rewards.token_scores import TokenScores as TokenScores
    from tracereward.tasks.recipes import get_task as get_task
    from tracereward.training.adversarial_config import AdversarialConfig as AdversarialConfig
    from tracereward.training.trainer import AdversarialTrainer as AdversarialTrainer

_HOME = {
    "AdversarialConfig": "training.adversarial_config",
    "Fitted": "commands.fit",
    "AdversarialTrainer": "training.trainer",
    "RewardModel": "rewards.model",
    "RewardSettings": "rewards.settings",
    "TokenRewardModel": "rewards.model",
    "TokenScores": "rewards.token_scores",
    "as_reward_func": "rewards.model",
    "fit": "commands.fit",
    "get_task": "tasks.recipes",
    "load_demonstrations": "data.demonstrations",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tracereward' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"tracereward.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
