"""`tracereward quickstart`: the full method on generated arithmetic and a tiny Llama, on two CPU cores.

Each stage calls the function behind a command (sft, grpo, train, sample, score, rerank), so this file is also an
example of the Python API. In world ``exposure`` the pretrained policy marks facts that it is unsure of and continues
with a mistake; fifty expert traces are right over six to eight steps. In world ``misconception`` the policy makes a
systematic mistake confidently, without a mark. In every stage that trains, validation questions select among the
starting policy and four checkpoints. All printed figures are measured in the run; only the default's pretrained policy
comes with the package, see `shipped`.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bar
from transformers.utils import logging as transformers_logging
from trl import ModelConfig

from tracereward.commands.grpo import run_grpo
from tracereward.commands.partial_output import check_folder_writable
from tracereward.commands.questions import Questions
from tracereward.commands.rerank import rerank_rows, summary
from tracereward.commands.sample import sample_rows
from tracereward.commands.score import score_rows
from tracereward.commands.sft import run_sft
from tracereward.commands.train import run_train
from tracereward.console import note, print_json
from tracereward.data.trace_rows import candidate_rows
from tracereward.errors import InputError, check_choice
from tracereward.files import atomic_folder, atomic_write_json, read_json, without_nan, write_jsonl
from tracereward.generation.params import SamplingParams
from tracereward.metrics import point_biserial, wilson_interval
from tracereward.quickstart.report import print_results, write_quickstart_report
from tracereward.quickstart.shipped import BASE, has_base
from tracereward.quickstart.worlds import COMMON, WORLDS, World, write_rows
from tracereward.reports.tables import percent
from tracereward.rewards.engines import load_scorer
from tracereward.synthetic.arithmetic import build_model, build_tokenizer
from tracereward.tasks.recipes import get_task
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import RewardConfig, SupervisedConfig
from tracereward.training.options import DataArguments
from tracereward.verdict import compared

TASK = "arithmetic"
SAMPLES = 8  # per held-out question, from the SFT policy
CHECKPOINTS = 4  # candidates for validation, with the starting policy
POLICIES = {
    "base": "base (pretrained)",
    "init": "base (untrained)",
    "sft": "SFT",
    "sft-continued": "SFT continued (control)",
    "grpo-logprob": "GRPO on own log-prob (control)",
    "train": "IRL policy (tracereward)",
}


@dataclass(frozen=True)
class Quickstart:
    """One quickstart.

    Attributes:
        folder: holds ``data/``, ``init/`` (the untrained model) and one run folder per policy.
        world: sizes and options.
        seed: seed of data, models and training.
        fast: a tenth of the steps.
        from_scratch: pretrain the policy also where one comes with the package.
    """

    folder: Path
    world: World
    seed: int
    fast: bool
    from_scratch: bool

    @property
    def start(self) -> str:
        """Name of the model that SFT starts from: ``base``, or ``init`` if the world has no pretraining."""
        return "base" if self.world.pretraining else "init"

    def data(self, part: str) -> str:
        """File of one part of the data: experts, unlabeled, validation, test or corpus."""
        return str(self.folder / "data" / f"{part}.jsonl")

    def model(self, name: str) -> ModelConfig:
        """Model options for the policy of a run."""
        return ModelConfig(model_name_or_path=self.policy(name))

    def policy(self, name: str) -> str:
        """Folder of the policy of a run."""
        return str(self.folder / name if name == "init" else self.folder / name / "policy")

    def demonstrations(self, part: str = "experts", choose: bool = True, unlabeled: bool = False) -> DataArguments:
        """Data options of a run. With `choose`, validation questions select its final checkpoint."""
        return DataArguments(
            task=TASK,
            dataset_name=self.data(part),
            unlabeled_dataset_name=self.data("unlabeled") if unlabeled and self.world.unlabeled else None,
            validation_dataset_name=self.data("validation") if choose else None,
        )

    def options(self, name: str, given: dict[str, Any], choose: bool = True) -> dict[str, Any]:
        """All training options of a run: `COMMON`, overridden by `given`."""
        options = {**COMMON, "max_completion_length": self.world.completion, "save_steps": given["max_steps"], **given}
        if choose:
            options |= {"save_strategy": "steps", "save_steps": max(1, math.ceil(given["max_steps"] / CHECKPOINTS))}
        if self.fast:
            options["max_steps"] = max(4, options["max_steps"] // 10)
            options["save_steps"] = min(options["save_steps"], options["max_steps"])
        return {**options, "output_dir": str(self.folder / name), "seed": self.seed}

    def begun(self, name: str) -> bool:
        """Whether a run exists and must be resumed."""
        return (self.folder / name / "config.yaml").is_file()


class Stages:
    """Numbers and times the stages; a stage whose result exists is not run again."""

    def __init__(self, total: int):
        self.total = total
        self.number = 0
        self.seconds: dict[str, float] = {}

    def run(self, name: str, result: Path, work: Callable[[], object]) -> None:
        """Call `work` unless its last output, `result`, exists."""
        self.number += 1
        if result.exists():
            note(f"[{self.number}/{self.total}] {name}: already done")
            return
        note(f"[{self.number}/{self.total}] {name}")
        start = time.perf_counter()
        work()
        self.seconds[name] = time.perf_counter() - start


def run_quickstart(
    output: Path, world_name: str, seed: int, *, resume: bool, fast: bool, from_scratch: bool, json_table: bool
) -> None:
    """SFT, warm-up, adversarial GRPO, two controls, reranking and the report, on generated arithmetic.

    Raises:
        InputError: unknown world; or `output` has a run and `resume` is False, or its options differ.
    """
    check_choice("world", world_name, WORLDS)
    _claim(output, {"world": world_name, "seed": seed, "fast": fast, "from_scratch": from_scratch}, resume)
    transformers_logging.disable_progress_bar()  # the files are half a megabyte
    disable_progress_bar()
    torch.set_num_threads(1)  # two are no faster at this size, and results would depend on the number of cores
    start = time.perf_counter()
    run = Quickstart(output, WORLDS[world_name], seed, fast=fast, from_scratch=from_scratch)
    stages = Stages(7 if run.world.pretraining else 6)
    stages.run("data, and an untrained tiny Llama", output / "init", lambda: make_world(run))
    if run.world.pretraining:
        ready = has_base(world_name, seed) and not from_scratch
        title = "a policy pretrained on traces with mistakes" + (", from the package" if ready else "")
        stages.run(title, Path(run.policy("base")), lambda: copy_base(run) if ready else pretrain(run))
    title = f"SFT on {run.world.experts} expert traces: what imitation reaches"
    stages.run(title, output / "sft", lambda: tune_sft(run))
    for name, title, work in (
        ("sft-continued", "control: as many more steps of SFT as GRPO takes", continue_sft),
        ("grpo-logprob", "control: GRPO on the policy's own log-prob, without expert traces", grpo_on_log_prob),
        ("train", "the reward: told from the experts' traces, then GRPO on it while it is updated", train),
    ):
        stages.run(title, output / name / "report.html", lambda work=work: work(run))
    stages.run("all policies and the reward on held-out questions", output / "results.json", lambda: evaluate(run))
    results = read_json(output / "results.json")
    write_quickstart_report(output, world_name, seed, results)
    if json_table:
        print_json(results)
    else:
        print_results(output, results)
    parts = "".join(f"\n  {seconds:5.0f} s  {name}" for name, seconds in stages.seconds.items())
    note(f"{time.perf_counter() - start:.0f} s in all{parts}")


def _claim(output: Path, options: dict[str, Any], resume: bool) -> None:
    """Store the options in the folder, or check that they equal the stored ones."""
    settings = output / "quickstart.json"
    if settings.is_file():
        stored = read_json(settings)
        if not resume:
            raise InputError(f"{output} already has a run; resume it with --resume, or use another --output")
        if stored != options:
            raise InputError(
                f"{output} has a run with other options ({stored}); pass the same, or use another --output"
            )
    elif output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output} has other files and no quickstart.json: choose another --output")
    check_folder_writable(output)
    output.mkdir(parents=True, exist_ok=True)
    atomic_write_json(settings, options)


def make_world(run: Quickstart) -> None:
    """Generate the rows, then the untrained model with its tokenizer."""
    write_rows(run.world, run.seed, run.folder / "data")
    with atomic_folder(run.folder / "init") as folder:
        tokenizer = build_tokenizer()
        build_model(tokenizer, run.seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def copy_base(run: Quickstart) -> None:
    """The policy that `pretrain` made when the package was built."""
    with atomic_folder(Path(run.policy("base"))) as folder:
        shutil.copytree(BASE, folder, dirs_exist_ok=True)


def pretrain(run: Quickstart) -> None:
    """``tracereward sft`` on the corpus, whose mistakes the policy is to unlearn."""
    config = SupervisedConfig(**run.options("base", run.world.pretraining, choose=False))
    run_sft(run.demonstrations("corpus", choose=False), config, run.model("init"), run.begun("base"))


def tune_sft(run: Quickstart) -> None:
    """``tracereward sft`` with each setting of the world's grid; ``sft`` is the best on validation questions."""
    tried = []
    for index, setting in enumerate(run.world.sft_grid):
        name = f"sft-{index}"
        if not (run.folder / name / "report.html").exists():
            config = SupervisedConfig(**run.options(name, {**run.world.sft, **setting}, choose=False))
            run_sft(run.demonstrations(choose=False), config, run.model(run.start), run.begun(name))
        tried.append({**setting, "accuracy": accuracy(greedy(run, name, "validation"))["accuracy"]})
    best = max(range(len(tried)), key=lambda index: tried[index]["accuracy"])
    share = percent(tried[best]["accuracy"])
    note(f"SFT answers {share} % of the validation questions right, the best of {len(tried)} settings")
    with atomic_folder(run.folder / "sft") as folder:
        shutil.copytree(run.policy(f"sft-{best}"), folder / "policy")
        (folder / "tuning.json").write_text(json.dumps({"tried": tried, "chosen": best}, indent=1), encoding="utf-8")


def continue_sft(run: Quickstart) -> None:
    """``tracereward sft`` from ``sft`` for as many steps as GRPO."""
    given = {**run.world.sft, "max_steps": run.world.grpo["max_steps"]}
    config = SupervisedConfig(**run.options("sft-continued", given))
    run_sft(run.demonstrations(), config, run.model("sft"), run.begun("sft-continued"))


def grpo_on_log_prob(run: Quickstart) -> None:
    """``tracereward grpo --reward logprob`` from ``sft``."""
    config = RewardConfig(**run.options("grpo-logprob", run.world.grpo), reward="logprob")
    run_grpo(run.demonstrations(unlabeled=True), config, run.model("sft"), run.begun("grpo-logprob"))


def train(run: Quickstart) -> None:
    """``tracereward train`` from ``sft``: warm-up of the discriminator, then adversarial GRPO."""
    given = {**run.world.grpo, **run.world.recipe}
    for option in ("discriminator_model", "warmup_model"):
        if given.get(option) == "base":
            given[option] = run.policy(run.start)
    if run.fast:
        given["discriminator_warmup_updates"] = 8
    config = AdversarialConfig(**run.options("train", given))
    run_train(run.demonstrations(unlabeled=True), config, run.model("sft"), run.begun("train"))


def evaluate(run: Quickstart) -> None:
    """Measure greedy accuracy of all policies, score and rank samples of SFT, and write ``results.json``."""
    left_out = "init" if run.world.pretraining else "base"
    names = [name for name in POLICIES if name != left_out]
    right = {name: greedy(run, name, "test") for name in names}
    policies = [{"label": POLICIES[name], **accuracy(right[name])} for name in names]
    samples = run.folder / "samples.jsonl"
    write_jsonl(samples, sample(run, "sft", "test", n=SAMPLES))
    reward_model = load_scorer(str(run.folder / "train" / "reward_model"))
    scored = list(score_rows(reward_model, candidate_rows(str(samples))))
    write_jsonl(samples, scored)
    task = get_task(TASK)
    _, questions = rerank_rows(scored, task, "vote")
    ranking = summary(questions, task)
    assert ranking is not None
    r = point_biserial([row["reward"] for row in scored], [row["correct"] for row in scored])
    ranking["reward_r"] = without_nan(r)
    outcomes = {name: [float(row["correct"]) for row in right[name]] for name in names}
    results = {
        "questions": policies[0]["questions"],
        "seed": run.seed,
        "policies": policies,
        "gains": [
            asdict(compared(POLICIES[name], outcomes["train"], values))
            for name, values in outcomes.items()
            if name != "train"
        ],
        "ranking": ranking,
    }
    atomic_write_json(run.folder / "results.json", results)


def sample(run: Quickstart, policy: str, part: str, n: int, *, temperature: float = 1.0) -> list[dict[str, Any]]:
    """``tracereward sample``: rows of `n` completions per question."""
    sampling = SamplingParams(
        max_new_tokens=run.world.completion,
        temperature=temperature,
        seed=run.seed,
        batch_size=2400 if n > 1 else 512,
    )
    chunks = sample_rows(run.policy(policy), Questions(data=run.data(part), task=TASK), sampling, n=n)
    return [row for rows in chunks for row in rows]


def greedy(run: Quickstart, policy: str, part: str) -> list[dict[str, Any]]:
    """One greedy completion per question."""
    return sample(run, policy, part, n=1, temperature=0.0)


def accuracy(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy with Wilson interval, number of traces without an answer, and share of distinct traces."""
    correct = sum(row["correct"] for row in rows)
    low, high = wilson_interval(correct, len(rows))
    return {
        "accuracy": correct / len(rows),
        "low": low,
        "high": high,
        "no_answer": sum(row["extracted"] is None for row in rows),
        "distinct": len({row["completion"] for row in rows}) / len(rows),
        "questions": len(rows),
    }
