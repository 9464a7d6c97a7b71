"""What a study is made of: arms, and how they become cells."""

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
            Cell(world=world, seed=seed, arm=self._arm_in(world, arm), split=self.split, samples=self.samples)
            for world in chosen
            for arm in self._arms_in(world)
            for seed in seeds or self.seeds[: arm.seeds]
        ]

    def _arms_in(self, world: World) -> list[Arm]:
        """The arms in one world, but those that compare with a base model where nothing is pretrained."""
        arms = self.arms if world.model is None or self.pretrained is None else self.pretrained
        return [arm for arm in arms if world.pretraining or arm.kind not in ("log-probs", "grpo-logratio")]

    def _arm_in(self, world: World, arm: Arm) -> Arm:
        """The arm with all options: what learns a reward has the recipe's, the world's and its own over them."""
        learned = arm.kind in ("irl", "calibration", "transfer", *BY_REWARD)
        return replace(arm, options={**self.recipe, **world.adversarial, **arm.options}) if learned else arm

    def _check(self, world: World) -> None:
        """Refuse a world that lacks what an arm needs."""
        if world.name not in MISTAKE_RATES and any(arm.corrupt for arm in self.arms):
            known = ", ".join(MISTAKE_RATES)
            raise InputError(f"world {world.name}: this study has wrong experts, which the worlds {known} have")


def irl(name: str, **options: Any) -> Arm:
    """The recipe with some options replaced."""
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
    """The arms, those that train with the validation questions choosing among start and checkpoints."""
    trained = ("irl", "sft-continued", "grpo-logprob", "grpo-verifier")
    return tuple(replace(arm, options={**arm.options, "choose": True}) if arm.kind in trained else arm for arm in arms)


def at(arm: Arm, x: str, **demonstrations: Any) -> Arm:
    """A point of the arm's line."""
    return replace(arm, name=f"{arm.name} @ {x}", **demonstrations)
