"""A site: the folder, rows and models of one world and seed."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracereward.files import atomic_folder, read_jsonl, write_jsonl
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.quickstart.worlds import COMMON, World, write_rows
from tracereward.synthetic.arithmetic import MISTAKE_RATES, build_model, build_tokenizer, generate
from tracereward.tasks.recipes import get_task

TASK = "arithmetic"


def digest(value: Any) -> str:
    """Eight hexadecimal digits of a JSON value's SHA-256."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Site:
    """One world and seed, and the folder in which its policies are trained.

    Attributes:
        folder: holds ``data/``, ``init/`` and one run folder per arm.
        world: sizes and options.
        seed: seed of data, models and training.
        fast: a tenth of the steps, for trials.
        quiet: no progress bars.
        experts: use only this many of the world's demonstrations, the first ones; None: all.
        corrupt: share of the demonstrations that end in a wrong answer.
        backbone: one of `backbones.LABELS`, trained on the same data as the world's own; None: the world's own.
    """

    folder: Path
    world: World
    seed: int
    fast: bool = False
    quiet: bool = False
    experts: int | None = None
    corrupt: float | None = None
    backbone: str | None = None

    def data(self, part: str) -> Path:
        """File of one part of the data."""
        return self.folder / "data" / f"{part}.jsonl"

    @property
    def demonstrations(self) -> str:
        """Name of the data part with the demonstrations."""
        few = "" if self.experts is None else f"-{self.experts}"
        wrong = "" if self.corrupt is None else f"-corrupt-{self.corrupt:g}"
        return f"experts{few}{wrong}"

    def run(self, arm: str) -> Path:
        """Run folder of an arm. ``init`` and ``base`` do not depend on the demonstrations and are shared."""
        shared = arm in ("init", "base") or self.demonstrations == "experts"
        home = self.folder if self.backbone is None else self.folder / self.backbone
        return home / arm if shared else home / self.demonstrations / arm

    def policy(self, arm: str) -> Path:
        """Folder of an arm's policy, or the Hub id of the world's model."""
        if arm == "init" and self.world.model is not None:
            return Path(self.world.model)
        return self.run(arm) if arm == "init" else self.run(arm) / "policy"

    @property
    def sft(self) -> dict[str, Any]:
        """The world's SFT options; a batch has at most as many rows as there are demonstrations."""
        batch = min(self.world.sft["per_device_train_batch_size"], self.experts or self.world.experts)
        return {**self.world.sft, "per_device_train_batch_size": batch}

    @property
    def start(self) -> str:
        """Arm that SFT starts from: ``base``, or ``init`` if the world has no pretraining."""
        return "base" if self.world.pretraining else "init"

    def options(self, arm: str, given: dict[str, Any]) -> dict[str, Any]:
        """All training options of an arm."""
        merged = {**COMMON, "max_completion_length": self.world.completion, "save_steps": given["max_steps"], **given}
        if self.fast:
            merged["max_steps"] = max(4, merged["max_steps"] // 10)
            merged["save_steps"] = min(merged["save_steps"], merged["max_steps"])
        if merged.get("save_strategy") == "no":
            del merged["save_steps"]
        quiet = {"disable_tqdm": True} if self.quiet else {}
        return {**merged, **quiet, "output_dir": str(self.run(arm)), "seed": self.seed}

    def unfinished(self, arm: str) -> bool:
        """Whether a run of this arm exists and must be resumed."""
        return (self.run(arm) / "config.yaml").is_file()


def make_world(site: Site) -> None:
    """Write the rows and then ``init``: the untrained model, or only the tokenizer of a pretrained one."""
    if site.backbone is None:  # other backbones use the same rows
        write_rows(site.world, site.seed, site.folder / "data")
    with atomic_folder(site.run("init")) as folder:
        if site.world.model is not None:
            load_tokenizer(site.world.model).save_pretrained(folder)
            return
        tokenizer = build_tokenizer()
        build_model(tokenizer, site.seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def choose_demonstrations(site: Site) -> None:
    """Write the site's demonstrations, unless they exist.

    Corrupt ones are wrong traces like those in the pretraining corpus, on problems of their own.
    """
    path = site.data(site.demonstrations)
    if path.exists():
        return
    world, task = site.world, get_task(TASK)
    rows = read_jsonl(site.data("experts"))[: site.experts]
    count = round((site.corrupt or 0) * len(rows))
    if count:
        parts = ("experts", "validation", "test", "unlabeled")
        used = {row["prompt"] for part in parts if site.data(part).exists() for row in read_jsonl(site.data(part))}
        drawn = generate(world.name, 10 * count, 9000 + site.seed, mistake_rate=MISTAKE_RATES[world.name], exclude=used)
        wrong = [row for row in drawn if not task.verify(row["completion"], row["answer"])]
        rows[:count] = wrong[:count]
    write_jsonl(path, rows)
