"""The frozen reward: a discriminator of any backbone that is not updated after its warm-up."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from studies.setup import arms
from studies.setup.site import Site, digest
from tracereward.modeling.loading import best_device
from tracereward.rewards.model import TokenRewardModel

FROZEN: dict[str, Any] = {"discriminator_updates": 0, "max_steps": 4, "discriminator_warmup_updates": 40}
"""Its differences from the recipe."""


def train_frozen(site: Site, options: dict[str, Any]) -> str:
    """Train the frozen reward unless it exists; return the name of its arm, shared by studies with the same options."""
    arm = f"frozen-{digest(options)}"
    if not (site.run(arm) / "report.html").exists():
        arms.train_irl(site, arm, options)
    return arm


Value = TypeVar("Value")


def once(samples: Sequence[dict[str, Any]], of: Callable[[list[dict[str, Any]]], Sequence[Value]]) -> list[Value]:
    """`of` for all samples, computed once per distinct sample: policies repeat themselves."""
    keys = [(row["prompt"], row["completion"], row["finished"]) for row in samples]
    different = dict(zip(keys, samples, strict=True))
    found = dict(zip(different, of(list(different.values())), strict=True))
    return [found[key] for key in keys]


def load_frozen(site: Site, arm: str) -> TokenRewardModel:
    """The reward model of an arm."""
    return TokenRewardModel.from_pretrained(str(site.run(arm) / "reward_model")).to(best_device())
