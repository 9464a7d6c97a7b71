"""Reward models for reasoning, learned from expert traces alone.

The names below are loaded when they are first used, so that importing the package does not import torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tracereward.adversarial_config import AdversarialConfig as AdversarialConfig
    from tracereward.demonstrations import load_demonstrations as load_demonstrations
    from tracereward.reward_func import as_reward_func as as_reward_func
    from tracereward.reward_model import RewardModel as RewardModel
    from tracereward.reward_model import TokenRewardModel as TokenRewardModel
    from tracereward.reward_settings import RewardSettings as RewardSettings
    from tracereward.scores import TokenScores as TokenScores
    from tracereward.tasks import get_task as get_task
    from tracereward.trainer import AdversarialTrainer as AdversarialTrainer

_HOME = {
    "AdversarialConfig": "adversarial_config",
    "AdversarialTrainer": "trainer",
    "RewardModel": "reward_model",
    "RewardSettings": "reward_settings",
    "TokenRewardModel": "reward_model",
    "TokenScores": "scores",
    "as_reward_func": "reward_func",
    "get_task": "tasks",
    "load_demonstrations": "demonstrations",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tracereward' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"tracereward.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
