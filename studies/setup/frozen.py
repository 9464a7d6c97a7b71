"""The reward of the study of reranking: a discriminator frozen after its warm-up, of any backbone."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from studies.setup import arms
from studies.setup.site import Site, digest
from tracereward.modeling.loading import best_device
from tracereward.rewards.model import TokenRewardModel

FROZEN: dict[str, Any] = {"discriminator_updates": 0, "max_steps": 4, "discriminator_warmup_updates": 40}
"""What it has in the place of the recipe's."""


def train_frozen(site: Site, options: dict[str, Any]) -> str:
    """Train it unless it is there; returns the name of its arm, which studies with the same options share."""
    arm = f"frozen-{digest(options)}"
    if not (site.run(arm) / "report.html").exists():
        arms.train_irl(site, arm, options)
    return arm


Value = TypeVar("Value")


def once(samples: Sequence[dict[str, Any]], of: Callable[[list[dict[str, Any]]], Sequence[Value]]) -> list[Value]:
    """`of` of all samples, computed once for those that are alike: a policy repeats itself."""
    keys = [(row["prompt"], row["completion"], row["finished"]) for row in samples]
    different = dict(zip(keys, samples, strict=True))
    found = dict(zip(different, of(list(different.values())), strict=True))
    return [found[key] for key in keys]


def load_frozen(site: Site, arm: str) -> TokenRewardModel:
    """The reward model of an arm."""
    return TokenRewardModel.from_pretrained(str(site.run(arm) / "reward_model")).to(best_device())
