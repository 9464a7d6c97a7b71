"""Cells of a study, one row of its results each. They run in parallel; an interrupted study resumes."""

import json
import os
import platform
import re
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
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
from studies.results_file import Result, add_result, key_of, read_results
from studies.setup import arms, judging
from studies.setup.backbones import make_site, own, world_of
from studies.setup.frozen import train_frozen
from studies.setup.site import Site, choose_demonstrations, digest
from tracereward.console import note
from tracereward.errors import Interrupted, RunFailed
from tracereward.quickstart.worlds import World

SAMPLES = 8
"""Samples per question of the SFT policy, which a reward model ranks."""
BY_REWARD = {"decoding": decoding.measure, "self-correction": self_correction.measure}
"""Kinds that train a reward model and then use it to guide or correct the SFT policy."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A row of a study's tables, or the point X of a curve if it is named "LINE @ X".

    Attributes:
        name: label of the row; an irl arm is named after its difference from the recipe.
        kind: ``policy`` (evaluate the base or SFT policy), ``sft-continued``, ``grpo-logprob``, ``grpo-logratio``,
            ``grpo-verifier``, ``irl``, ``log-probs`` (a ranking without a reward model), ``calibration`` or
            ``transfer`` (see the modules of these names), or one of `BY_REWARD`.
        options: options of adversarial training, complete in a cell; for ``policy`` the name of the policy; for
            ``log-probs`` the sign of the base model's term. ``choose``: validation accuracy selects among the
            starting policy and the checkpoints.
        experts, corrupt, backbone: see `Site`.
        seeds: use only this many of the study's seeds, the first ones; None: all.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    experts: int | None = None
    corrupt: float | None = None
    backbone: str | None = None
    seeds: int | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training or evaluation: one arm in one world with one seed.

    Attributes:
        world: sizes and options.
        seed: seed of data, models and training.
        arm: the arm, with all its options.
        split: ``validation`` where results select something, ``test`` where they are reported.
        samples: samples per question of the SFT policy, ranked by an irl cell's reward model.
    """

    world: World
    seed: int
    arm: Arm
    split: str = "validation"
    samples: int = SAMPLES

    @property
    def name(self) -> str:
        """Name of the traceback file if the cell fails."""
        return f"{self.world.name}--{slug(self.arm.name)}--{self.seed}"


@dataclass(frozen=True)
class Place:
    """Paths of a study's work and results.

    Attributes:
        work: folder of policies and reward models; studies share worlds.
        results: file of results, see `results_file`.
        fast: a tenth of the steps.
    """

    work: Path
    results: Path
    fast: bool = False

    def site(self, world: World, seed: int, **given: Any) -> Site:
        """The site of one world and seed. Worlds with different sizes or options have different folders.

        Args:
            world: sizes and options.
            seed: seed of data, models and training.
            given: experts, corrupt and backbone, see `Site`.
        """
        of = options_of(world)
        for later in ("grpo", "adversarial", "lora"):  # shared data and policies do not depend on them
            of.pop(later, None)
        folder = self.work / f"{world.name}-{seed}-{digest([of, self.fast])}"
        return Site(folder, world_of(given.get("backbone"), world), seed, self.fast, quiet=True, **given)

    def site_of(self, cell: Cell, seed: int | None = None) -> Site:
        """The site of a cell, optionally with another seed."""
        seed, arm = cell.seed if seed is None else seed, cell.arm
        return self.site(cell.world, seed, experts=arm.experts, corrupt=arm.corrupt, backbone=arm.backbone)


def slug(text: str) -> str:
    """`text` made safe for a file name."""
    return re.sub(r"[^a-zA-Z0-9.+]+", "-", text).strip("-")


def options_of(world: World) -> dict[str, Any]:
    """The world's fields that are not None."""
    return {name: value for name, value in asdict(world).items() if value is not None}


def settings_of(cell: Cell, fast: bool) -> Result:
    """All settings a cell's result depends on, as JSON values. When they change, the cell is run again."""
    settings = {
        "world": cell.world.name,
        "seed": cell.seed,
        "arm": cell.arm.name,
        "kind": cell.arm.kind,
        "options": cell.arm.options,
        "split": cell.split,
        "samples": cell.samples,
        "experts": cell.arm.experts,
        "corrupt": cell.arm.corrupt,
        "backbone": cell.arm.backbone,
        "world_options": options_of(cell.world),
        "fast": fast,
    }
    return json.loads(json.dumps({name: value for name, value in settings.items() if value is not None}))


def quieten() -> None:
    """One thread per worker, and no progress bars within cells."""
    from datasets import disable_progress_bar

    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # As in the command line: TRL still uses names that transformers has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    disable_progress_bar()
    os.environ["OMP_NUM_THREADS"] = "1"


def prepare_base(site: Site) -> None:
    """Generate the data and pretrain the base model, unless they exist."""
    if not site.run("init").exists():
        make_site(site)
    if site.world.pretraining and not (site.run("base") / "report.html").exists():
        arms.train_sft(site, "base", "init", site.world.pretraining, part="corpus")


def prepare(site: Site) -> None:
    """Generate the data, pretrain the base model and tune SFT, unless they exist."""
    prepare_base(site)
    choose_demonstrations(site)
    if not site.run("sft").exists():
        arms.tune_sft(site)


def lock(site: Site) -> FileLock:
    """Lock on the data and models that cells share. Each backbone has its own, so it need not wait for the Llama."""
    return FileLock(f"{site.folder}{'' if site.backbone is None else f'-{site.backbone}'}.lock")


def prepared(site: Site, cell: Cell) -> list[dict[str, Any]]:
    """Samples of the site's SFT policy, which is trained first if it does not exist."""
    write_world(site)
    with lock(site):
        prepare(site)
        return judging.draw_samples(site, "sft", cell.split, cell.samples)


def prepare_discriminator(place: Place, cell: Cell) -> None:
    """Pretrain the arm's discriminator model if it is another backbone's, given as ``BACKBONE/base``."""
    backbone, _, arm = str(cell.arm.options.get("discriminator_model")).partition("/")
    if arm != "base":
        return
    site = place.site(cell.world, cell.seed, backbone=backbone)
    write_world(site)
    with lock(site):
        prepare_base(site)


def write_world(site: Site) -> None:
    """Generate the data, which a backbone shares with the world's Llama, unless it exists."""
    site.folder.parent.mkdir(parents=True, exist_ok=True)
    llama = replace(site, backbone=None)
    with lock(llama):
        if not llama.run("init").exists():
            make_site(llama)


def run_cell(place: Place, cell: Cell) -> Result:
    """Train and evaluate one cell; write and return its result."""
    quieten()
    site = place.site_of(cell)
    samples = prepared(site, cell)
    prepare_discriminator(place, cell)
    start = time.perf_counter()
    result = {
        **settings_of(cell, place.fast),
        **measured(place, cell, site, samples),
        "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__,
        "trl": version("trl"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    add_result(place.results, result)
    return result


def measured(place: Place, cell: Cell, site: Site, samples: list[dict[str, Any]]) -> Result:
    """Measurements of a cell by name; its kind selects them."""
    arm = cell.arm
    if arm.kind in BY_REWARD:
        return BY_REWARD[arm.kind](lambda seed: reward_of(place, cell, seed), cell.seed, cell.split, cell.samples)
    if arm.kind == "log-probs":
        return {"ranking": judging.rank_by_log_probs(site, samples, arm.options["sign"])}
    questions = len({row["question"] for row in samples})
    if arm.kind == "calibration":
        found = calibration.run(*reward_of(place, cell, cell.seed), samples)
        return {"questions": questions, "calibration": found}
    if arm.kind == "transfer":
        others = {name: place.site(cell.world, cell.seed, backbone=own(name)) for name in arm.options["policies"]}
        drawn = {name: prepared(other, cell) for name, other in others.items()}
        training = replace(arm, options=transfer.of_training(arm.options))
        _, reward = reward_of(place, replace(cell, arm=training), cell.seed)
        found = transfer.run(site, reward, others, options=arm.options, samples=drawn)
        return {"questions": questions, "transfer": found}
    return policy(place, cell, site, samples)


def policy(place: Place, cell: Cell, site: Site, samples: list[dict[str, Any]]) -> Result:
    """Train and evaluate a cell's policy, and rank samples of the SFT policy with its reward model."""
    start = time.perf_counter()
    name = _train(site, cell, place.fast)
    result: Result = {"train_seconds": round(time.perf_counter() - start, 1)}
    judged, begun = (judging.greedy(site, one, cell.split) for one in (name, "sft"))
    collapsed = judging.collapsed(judged["accuracy"], judged["distinct"], begun)
    result |= {**judged, "collapsed": collapsed}
    if cell.arm.options.get("choose"):
        result["chosen"] = judging.chosen(site, name)
    if cell.arm.kind == "irl":
        result["ranking"], scored = judging.rank(site, name, samples)
        result["stopped"] = judging.stopped(site, name)
        if cell.world.name == "hops":
            result["depth"] = depth.by_depth(site, scored)
    return result


def reward_of(place: Place, cell: Cell, seed: int) -> tuple[Site, str]:
    """A seed's site and the arm of the cell's frozen reward model, which is trained if it does not exist."""
    site = place.site_of(cell, seed)
    prepared(site, cell)
    with lock(site):
        return site, train_frozen(site, cell.arm.options)


def _train(site: Site, cell: Cell, fast: bool) -> str:
    """Train a cell's policy unless it exists; return its run name."""
    kind, options = cell.arm.kind, cell.arm.options
    if kind == "policy":
        return site.start if options["policy"] == "base" else options["policy"]
    name = f"{slug(cell.arm.name)}-{digest(settings_of(cell, fast))}"
    if not (site.run(name) / "report.html").exists():
        if kind == "sft-continued":
            arms.continue_sft(site, name, **options)
        elif kind == "irl":
            arms.train_irl(site, name, options)
        else:
            arms.train_grpo(site, name, kind.removeprefix("grpo-"), **options)
    return name


def stored(place: Place, cells: Sequence[Cell]) -> list[Result | None]:
    """The stored result of each cell; None if there is none with the same settings."""
    known = {key_of(result): result for result in read_results(place.results)}

    def of(cell: Cell) -> Result | None:
        wanted = settings_of(cell, place.fast)
        result = known.get(key_of(wanted), {})
        return result if all(result.get(name) == value for name, value in wanted.items()) else None

    return [of(cell) for cell in cells]


def run_cells(place: Place, cells: Sequence[Cell], jobs: int) -> list[Result]:
    """Results of all cells, in order. Stored cells are not run again.

    Raises:
        RunFailed: some cells failed; the results of the others are stored.
    """
    missing = [cell for cell, result in zip(cells, stored(place, cells), strict=True) if result is None]
    note(f"{len(cells) - len(missing)} of {len(cells)} cells are stored; running {len(missing)} in {jobs} processes")
    # Cells are ordered by arm, so the first ones have different sites, which workers prepare in parallel.
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    works = parallel([joblib.delayed(attempt)(place, cell) for cell in missing])
    failures = list(tqdm(works, total=len(missing), desc="cells", file=sys.stderr, disable=not missing))
    failures = [text for text in failures if text]
    if failures:
        raise RunFailed("\n".join([f"{len(failures)} of {len(cells)} cells failed; run again to retry:", *failures]))
    results = [result for result in stored(place, cells) if result is not None]
    assert len(results) == len(cells)
    return results


def attempt(place: Place, cell: Cell) -> str | None:
    """Run one cell. Returns the error message on failure, so that the other cells continue."""
    try:
        run_cell(place, cell)
    except Interrupted:
        raise
    except Exception as error:  # a failure concerns this cell alone and is reported at the end
        path = place.work / "failed" / f"{cell.name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), encoding="utf-8")
        return f"{cell.name}: {type(error).__name__}: {error} ({path})"
    return None
