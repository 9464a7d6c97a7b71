"""What a study is made of: arms, and how they become cells."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from studies.cells import BY_REWARD, Cell
from tracereward.errors import InputError, check_choice
from tracereward.quickstart.worlds import RECIPE, WORLDS, World
from tracereward.synthetic.arithmetic import MISTAKE_RATES


@dataclass(frozen=True)
class Arm:
    """A row of a study's tables, or a point of a line "LINE @ X" of its curves; see `Cell`.

    It has the first `seeds` of the study's seeds, or all.
    """

    name: str
    kind: str
    options: dict[str, Any]
    experts: int | None = None
    corrupt: float | None = None
    backbone: str | None = None
    seeds: int | None = None

    @property
    def needs_base(self) -> bool:
        """Whether it means nothing in a world without pretraining."""
        return self.kind in ("log-probs", "grpo-logratio")

    def options_in(self, world: World, recipe: dict[str, Any]) -> dict[str, Any]:
        """Its options, over the recipe's and the world's where it has them."""
        learned = self.kind in ("irl", "calibration", "transfer", *BY_REWARD)
        return {**recipe, **world.adversarial, **self.options} if learned else self.options


@dataclass(frozen=True)
class Study:
    """Arms over worlds and seeds.

    Attributes:
        title: heading of the page.
        question: what is asked, and how to read the answer.
        worlds: names in `worlds.WORLDS`.
        seeds: of data, models and training.
        arms: rows of the tables.
        split: ``validation`` where the results choose something, ``test`` where they are the report.
        samples: of the SFT policy for each question, ranked by each learned reward.
        recipe: what the arms differ from.
        steps: of GRPO in the place of the world's.
        pretrained: the arms in a world of a pretrained model, whose backbones are others; None: the same.
    """

    title: str
    question: str
    worlds: tuple[str, ...]
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    split: str = "validation"
    samples: int = 8
    recipe: dict[str, Any] = field(default_factory=lambda: RECIPE)
    steps: int | None = None
    pretrained: tuple[Arm, ...] | None = None

    def cells(self, worlds: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> list[Cell]:
        """One cell for each world, arm and seed.

        Args:
            worlds: any whose parts the arms need; None for the study's.
            seeds: None for the study's.

        Raises:
            InputError: there is no such world, or it lacks a part.
        """
        chosen = [WORLDS[check_choice("world", world, WORLDS)] for world in worlds or self.worlds]
        for world in chosen:
            self._check(world)
        if self.steps is not None:
            chosen = [replace(world, grpo={**world.grpo, "max_steps": self.steps}) for world in chosen]
        return [
            Cell(
                world,
                seed,
                arm.name,
                arm.kind,
                arm.options_in(world, self.recipe),
                self.split,
                self.samples,
                arm.experts,
                arm.corrupt,
                arm.backbone,
            )
            for world in chosen
            for arm in self._arms_in(world)
            if world.pretraining or not arm.needs_base
            for seed in seeds or self.seeds[: arm.seeds]
        ]

    def _arms_in(self, world: World) -> tuple[Arm, ...]:
        return self.arms if world.model is None or self.pretrained is None else self.pretrained

    def _check(self, world: World) -> None:
        """Refuse a world that lacks what an arm needs."""
        if world.name not in MISTAKE_RATES and any(arm.corrupt for arm in self.arms):
            known = ", ".join(MISTAKE_RATES)
            raise InputError(f"world {world.name}: this study has wrong experts, which the worlds {known} have")


def irl(name: str, **options: Any) -> Arm:
    """The recipe with some options replaced."""
    return Arm(name, "irl", options)


BASE = Arm("base", "policy", {"policy": "base"})
SFT = Arm("SFT", "policy", {"policy": "sft"})
CONTINUED = Arm("SFT continued", "sft-continued", {})
LOGPROB = Arm("GRPO on log-prob", "grpo-logprob", {})
VERIFIER = Arm("GRPO with verifier", "grpo-verifier", {})
LOGRATIO = Arm("GRPO on log p_SFT - log p_base", "grpo-logratio", {})
RATIO = Arm("log p_SFT - log p_base", "log-probs", {"sign": -1.0})
SUM = Arm("log p_SFT + log p_base", "log-probs", {"sign": 1.0})
IRL = irl("IRL")

CONTROLS_AND_IRL = (BASE, SFT, CONTINUED, LOGPROB, VERIFIER, IRL, RATIO, SUM)


def chosen(arms: Iterable[Arm]) -> tuple[Arm, ...]:
    """The arms, those that train with the validation questions choosing among start and checkpoints."""
    trained = ("irl", "sft-continued", "grpo-logprob", "grpo-verifier")
    return tuple(replace(arm, options={**arm.options, "choose": True}) if arm.kind in trained else arm for arm in arms)


def at(arm: Arm, x: str, **demonstrations: Any) -> Arm:
    """A point of the arm's line."""
    return replace(arm, name=f"{arm.name} @ {x}", **demonstrations)
