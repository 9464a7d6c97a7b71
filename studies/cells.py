"""Cells of a study: one JSON each, run side by side, and gone on with where an earlier run stopped."""

import json
import os
import platform
import re
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import torch
from filelock import FileLock
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from studies.measures import calibration, decoding, depth, self_correction, transfer
from studies.setup import arms, judging
from studies.setup.backbones import make_site, own, world_of
from studies.setup.frozen import train_frozen
from studies.setup.site import Site, choose_demonstrations, digest
from tracereward.console import note
from tracereward.errors import Interrupted, RunFailed
from tracereward.files import atomic_write_json
from tracereward.quickstart.worlds import World

SAMPLES = 8
"""Samples of the SFT policy for each question that a reward model ranks."""
BY_REWARD = {"decoding": decoding.measure, "self-correction": self_correction.measure}
"""Kinds that train a reward model and measure what the SFT policy does with it."""


@dataclass(frozen=True)
class Cell:
    """One training or evaluation: a row of a study's table for one seed.

    Attributes:
        world: sizes and options.
        seed: of data, models and training.
        arm: name of the row; irl rows are named after what differs from the recipe.
        kind: ``policy`` (evaluate what preparing the world trained), ``sft-continued``, ``grpo-logprob``,
            ``grpo-logratio``, ``grpo-verifier``, ``irl``, ``log-probs`` (a ranking without a reward model),
            ``calibration`` or ``transfer`` (see the modules of these names), or one of `BY_REWARD`.
        options: of adversarial training, the recipe's included; for ``policy`` the name of the policy; for
            ``log-probs`` the sign of the base model's. ``choose`` in what trains a policy: the validation questions
            choose among start and checkpoints.
        split: ``validation`` where results choose something, ``test`` where they are reported once.
        samples: of the SFT policy for each question, ranked by an irl cell's reward model.
        experts, corrupt: of the demonstrations, see `Site`.
        backbone: see `Site`.
    """

    world: World
    seed: int
    arm: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    split: str = "validation"
    samples: int = SAMPLES
    experts: int | None = None
    corrupt: float | None = None
    backbone: str | None = None

    @property
    def name(self) -> str:
        """File name of its result."""
        return f"{self.world.name}--{slug(self.arm)}--{self.seed}"


@dataclass(frozen=True)
class Place:
    """Where a study's work and results are.

    Attributes:
        work: policies and reward models; worlds are shared by studies.
        results: one JSON for each cell.
        fast: a tenth of the steps.
    """

    work: Path
    results: Path
    fast: bool = False

    def site(
        self,
        world: World,
        seed: int,
        experts: int | None = None,
        corrupt: float | None = None,
        backbone: str | None = None,
    ) -> Site:
        """The folder of one world and seed; other sizes or options of the world are another folder."""
        of = options_of(world)
        for later in ("grpo", "adversarial", "lora"):  # nothing that is shared depends on them
            of.pop(later, None)
        folder = self.work / f"{world.name}-{seed}-{digest([of, self.fast])}"
        return Site(folder, world_of(backbone, world), seed, self.fast, True, experts, corrupt, backbone)


def slug(text: str) -> str:
    """`text` as a part of a file name."""
    return re.sub(r"[^a-zA-Z0-9.+]+", "-", text).strip("-")


def options_of(world: World) -> dict[str, Any]:
    """All that it has; what it has not, e.g. a pretrained model, is left out."""
    return {name: value for name, value in asdict(world).items() if value is not None}


def settings_of(cell: Cell, fast: bool) -> dict[str, Any]:
    """Everything a cell's result depends on, as JSON has it: when it changes, the cell is run again."""
    settings = {**asdict(cell), "world": cell.world.name, "world_options": options_of(cell.world), "fast": fast}
    settings = {name: value for name, value in settings.items() if value is not None}
    return json.loads(json.dumps(settings))


def quieten() -> None:
    """One thread for each worker, and no progress bars of parts."""
    from datasets import disable_progress_bar

    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # As the command line does: names that TRL still uses and transformers has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    disable_progress_bar()
    os.environ["OMP_NUM_THREADS"] = "1"


def prepare_base(site: Site) -> None:
    """Data and pretraining of one world and seed, unless they are there."""
    if not site.run("init").exists():
        make_site(site)
    if site.world.pretraining and not (site.run("base") / "report.html").exists():
        arms.train_sft(site, "base", "init", site.world.pretraining, part="corpus")


def prepare(site: Site) -> None:
    """Data, pretraining and tuned SFT of one world and seed, unless they are there."""
    prepare_base(site)
    choose_demonstrations(site)
    if not site.run("sft").exists():
        arms.tune_sft(site)


def lock(site: Site) -> FileLock:
    """Held while what cells share is made; a backbone does not wait for the world's Llama."""
    return FileLock(f"{site.folder}{'' if site.backbone is None else f'-{site.backbone}'}.lock")


def prepared(site: Site, cell: Cell) -> list[dict[str, Any]]:
    """Samples of the site's SFT policy, which is trained if it is not there."""
    write_world(site)
    with lock(site):
        prepare(site)
        return judging.draw_samples(site, "sft", cell.split, cell.samples)


def prepare_discriminator(place: Place, cell: Cell) -> None:
    """Pretrain the backbone that an arm's discriminator starts from, ``BACKBONE/base``, if it is another one."""
    backbone, _, arm = str(cell.options.get("discriminator_model")).partition("/")
    if arm != "base":
        return
    site = place.site(cell.world, cell.seed, backbone=backbone)
    write_world(site)
    with lock(site):
        prepare_base(site)


def write_world(site: Site) -> None:
    """The data, which a backbone shares with the world's Llama."""
    site.folder.parent.mkdir(parents=True, exist_ok=True)
    llama = replace(site, backbone=None)
    with lock(llama):
        if not llama.run("init").exists():
            make_site(llama)


def run_cell(place: Place, cell: Cell) -> dict[str, Any]:
    """Train and judge one cell; writes and returns its result."""
    quieten()
    site = place.site(cell.world, cell.seed, cell.experts, cell.corrupt, cell.backbone)
    samples = prepared(site, cell)
    prepare_discriminator(place, cell)
    start = time.perf_counter()
    settings = settings_of(cell, place.fast)
    result = dict(settings)
    if cell.kind in BY_REWARD:
        result |= BY_REWARD[cell.kind](lambda seed: reward_of(place, cell, seed), cell.seed, cell.split, cell.samples)
    elif cell.kind == "log-probs":
        result["ranking"] = judging.rank_by_log_probs(site, samples, cell.options["sign"])
    elif cell.kind == "calibration":
        result["questions"] = len({row["question"] for row in samples})
        result["calibration"] = calibration.run(*reward_of(place, cell, cell.seed), samples)
    elif cell.kind == "transfer":
        others = {name: place.site(cell.world, cell.seed, backbone=own(name)) for name in cell.options["policies"]}
        drawn = {name: prepared(other, cell) for name, other in others.items()}
        result["questions"] = len({row["question"] for row in samples})
        _, arm = reward_of(place, replace(cell, options=transfer.of_training(cell.options)), cell.seed)
        result["transfer"] = transfer.run(site, arm, others, cell.options, drawn)
    else:
        arm = _train(site, cell, settings)
        result["train_seconds"] = round(time.perf_counter() - start, 1)
        judged, begun = (judging.greedy(site, name, cell.split) for name in (arm, "sft"))
        collapsed = judging.collapsed(judged["accuracy"], judged["distinct"], begun)
        result |= {**judged, "collapsed": collapsed}
        if cell.options.get("choose"):
            result["chosen"] = judging.chosen(site, arm)
        if cell.kind == "irl":
            result["ranking"], scored = judging.rank(site, arm, samples)
            result["stopped"] = judging.stopped(site, arm)
            if cell.world.name == "hops":
                result["depth"] = depth.by_depth(site, scored)
    result |= {
        "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__,
        "trl": version("trl"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    path = place.results / f"{cell.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, result)
    return result


def reward_of(place: Place, cell: Cell, seed: int) -> tuple[Site, str]:
    """A seed's site, and the arm with the reward model that a cell uses as it is; trained unless it is there."""
    site = place.site(cell.world, seed, cell.experts, cell.corrupt, cell.backbone)
    prepared(site, cell)
    with lock(site):
        return site, train_frozen(site, cell.options)


def _train(site: Site, cell: Cell, settings: dict[str, Any]) -> str:
    """Train a cell's policy unless it is there; returns the name of its arm."""
    if cell.kind == "policy":
        policy = cell.options["policy"]
        return site.start if policy == "base" else policy
    arm = f"{slug(cell.arm)}-{digest(settings)}"
    if not (site.run(arm) / "report.html").exists():
        if cell.kind == "sft-continued":
            arms.continue_sft(site, arm, **cell.options)
        elif cell.kind == "irl":
            arms.train_irl(site, arm, cell.options)
        else:
            arms.train_grpo(site, arm, cell.kind.removeprefix("grpo-"), **cell.options)
    return arm


def stored(place: Place, cell: Cell) -> dict[str, Any] | None:
    """A cell's result, if it is there and of the same settings."""
    path = place.results / f"{cell.name}.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    wanted = settings_of(cell, place.fast)
    return result if all(result.get(key) == value for key, value in wanted.items()) else None


def run_cells(place: Place, cells: list[Cell], jobs: int) -> list[dict[str, Any]]:
    """Results of all cells, in their order; those that are stored are not run again.

    Raises:
        RunFailed: some cells failed; the others' results are stored.
    """
    missing = [cell for cell in cells if stored(place, cell) is None]
    note(f"{len(cells) - len(missing)} of {len(cells)} cells are there; running {len(missing)} on {jobs} processes")
    # Arm by arm, so that the first cells are of different worlds: each is prepared by one process while others wait.
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    works = parallel([joblib.delayed(attempt)(place, cell) for cell in missing])
    failures = list(tqdm(works, total=len(missing), desc="cells", file=sys.stderr, disable=not missing))
    failures = [text for text in failures if text]
    if failures:
        raise RunFailed("\n".join([f"{len(failures)} of {len(cells)} cells failed; run again to retry:", *failures]))
    results = [stored(place, cell) for cell in cells]
    assert all(result is not None for result in results)
    return [result for result in results if result is not None]


def attempt(place: Place, cell: Cell) -> str | None:
    """Run one cell; what went wrong, if anything did, so that the other cells go on."""
    try:
        run_cell(place, cell)
    except Interrupted:
        raise
    except Exception as error:  # any failure belongs to this cell alone, and is reported at the end
        path = place.work / "failed" / f"{cell.name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), encoding="utf-8")
        return f"{cell.name}: {type(error).__name__}: {error} ({path})"
    return None
