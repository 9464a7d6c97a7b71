"""The models that come with the package: the default quickstart's pretrained policy, and its reward model.

``python -m tracereward.quickstart.shipped runs/quickstart``, from a clone, copies them from a run with
``--from-scratch``; nothing else writes them.
"""

import shutil
import sys
from pathlib import Path

from tracereward.errors import InputError
from tracereward.files import atomic_folder, atomic_write_json, read_json

WORLD, SEED = "exposure", 0
FOLDER = Path(__file__).parent / "models"
BASE = FOLDER / "base"
"""A Llama of 113,000 parameters, pretrained on traces of world ``exposure``, seed 0, of which many have a mistake."""
REWARD_MODEL = FOLDER / "reward_model"
"""What ``tracereward train`` learned from fifty expert traces and that policy."""


def has_base(world: str, seed: int) -> bool:
    """Whether `BASE` is the policy of a world and seed: another seed's held-out questions may be in its corpus."""
    return (world, seed) == (WORLD, SEED)


def ship(run: Path, folder: Path) -> None:
    """Copy the pretrained policy and the reward model of a quickstart into a folder.

    Raises:
        InputError: the run is of another world or seed, not from scratch, or not finished.
    """
    stored = read_json(run / "quickstart.json")
    wanted = {"world": WORLD, "seed": SEED, "fast": False, "from_scratch": True}
    if stored != wanted or not (run / "results.json").is_file():
        raise InputError(f"{run}: needs a finished run with {wanted}, and this one has {stored}")
    for source, target in ((run / "base" / "policy", BASE), (run / "train" / "reward_model", REWARD_MODEL)):
        with atomic_folder(folder / target.name) as made:
            shutil.copytree(source, made, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md"))
            settings = read_json(made / "tracereward.json")
            # These name folders of the run, which the package does not have.
            paths = {name: "" for name in ("base_model", "reference_model") if name in settings}
            atomic_write_json(made / "tracereward.json", {**settings, **paths})


if __name__ == "__main__":
    ship(Path(sys.argv[1]), FOLDER)
