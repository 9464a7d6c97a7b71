"""A study: its arms, and how they expand into cells."""

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from studies.cells import BY_REWARD, SAMPLES, Arm, Cell
from studies.setup.settings import WORLDS
from tracereward.errors import InputError, check_choice
from tracereward.quickstart.worlds import RECIPE, World
from tracereward.synthetic.arithmetic import MISTAKE_RATES


@dataclass(frozen=True)
class Study:
    """Arms over worlds and seeds.

    Attributes:
        title: heading of the page.
        question: the question, and how to read the tables.
        worlds: names in `settings.WORLDS`.
        seeds: seeds of data, models and training.
        arms: rows of the tables.
        split: ``validation`` where the results select something, ``test`` where they are reported.
        samples: samples per question of the SFT policy, ranked by each learned reward.
        recipe: default options of adversarial training.
        steps: number of GRPO steps; None: the world's.
        pretrained: arms for worlds with a pretrained model, which has other backbones; None: `arms`.
    """

    title: str
    question: str
    _: KW_ONLY
    worlds: tuple[str, ...]
    seeds: Sequence[int]
    arms: tuple[Arm, ...]
    split: str = "test"
    samples: int = SAMPLES
    recipe: dict[str, Any] = field(default_factory=lambda: RECIPE)
    steps: int | None = None
    pretrained: tuple[Arm, ...] | None = None

    def cells(self, worlds: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> list[Cell]:
        """One cell for each world, arm and seed.

        Args:
            worlds: names of worlds; None: the study's.
            seeds: None: the study's.

        Raises:
            InputError: unknown world, or an arm needs data that the world does not have.
        """
        chosen = [WORLDS[check_choice("world", world, WORLDS)] for world in worlds or self.worlds]
        for world in chosen:
            self._check(world)
        if self.steps is not None:
            chosen = [replace(world, grpo={**world.grpo, "max_steps": self.steps}) for world in chosen]
        return [
            Cell(world=world, seed=seed, arm=self._arm_in(world, arm), split=self.split, samples=self.samples)
            for world in chosen
            for arm in self._arms_in(world)
            for seed in seeds or self.seeds[: arm.seeds]
        ]

    def _arms_in(self, world: World) -> list[Arm]:
        """The arms in one world, without comparisons to a base model if the world has no pretraining."""
        arms = self.arms if world.model is None or self.pretrained is None else self.pretrained
        return [arm for arm in arms if world.pretraining or arm.kind not in ("log-probs", "grpo-logratio")]

    def _arm_in(self, world: World, arm: Arm) -> Arm:
        """The arm with all options. If it learns a reward: the recipe's, overridden by the world's, then by its own."""
        learned = arm.kind in ("irl", "calibration", "transfer", *BY_REWARD)
        return replace(arm, options={**self.recipe, **world.adversarial, **arm.options}) if learned else arm

    def _check(self, world: World) -> None:
        """Refuse a world without the data that an arm needs."""
        if world.name not in MISTAKE_RATES and any(arm.corrupt for arm in self.arms):
            known = ", ".join(MISTAKE_RATES)
            raise InputError(f"world {world.name} has no wrong experts, which this study needs; use one of {known}")


def irl(name: str, **options: Any) -> Arm:
    """An arm with the recipe, some of its options replaced."""
    return Arm(name=name, kind="irl", options=options)


BASE = Arm(name="base", kind="policy", options={"policy": "base"})
SFT = Arm(name="SFT", kind="policy", options={"policy": "sft"})
CONTINUED = Arm(name="SFT continued", kind="sft-continued")
LOGPROB = Arm(name="GRPO on log-prob", kind="grpo-logprob")
VERIFIER = Arm(name="GRPO with verifier", kind="grpo-verifier")
LOGRATIO = Arm(name="GRPO on log p_SFT - log p_base", kind="grpo-logratio")
RATIO = Arm(name="log p_SFT - log p_base", kind="log-probs", options={"sign": -1.0})
SUM = Arm(name="log p_SFT + log p_base", kind="log-probs", options={"sign": 1.0})
IRL = irl("IRL")

CONTROLS_AND_IRL = (BASE, SFT, CONTINUED, LOGPROB, VERIFIER, IRL, RATIO, SUM)


def chosen(arms: Iterable[Arm]) -> tuple[Arm, ...]:
    """The arms; where they train, validation accuracy selects among the starting policy and the checkpoints."""
    trained = ("irl", "sft-continued", "grpo-logprob", "grpo-verifier")
    return tuple(replace(arm, options={**arm.options, "choose": True}) if arm.kind in trained else arm for arm in arms)


def at(arm: Arm, x: str, **demonstrations: Any) -> Arm:
    """The point `x` of the arm's curve."""
    return replace(arm, name=f"{arm.name} @ {x}", **demonstrations)
