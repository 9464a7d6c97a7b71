"""The whole method on the embedded default: generated arithmetic, a tiny Llama built from scratch, two CPU cores.

World ``exposure``: a policy pretrained on a corpus of half-remembered facts marks what it doubts and walks on; fifty
experts are right in chains of six to eight steps. In world ``misconception`` it is fluent, confident and wrong by a
rule, without a mark. In every stage that trains, validation questions choose between the start and four checkpoints.
Everything printed is measured in the run.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bar
from transformers.utils import logging as transformers_logging

from tracereward.console import note
from tracereward.errors import InputError, check_choice
from tracereward.files import atomic_write_json, read_jsonl, write_jsonl
from tracereward.quickstart import arms, judging
from tracereward.quickstart.site import Site, make_world
from tracereward.quickstart.worlds import WORLDS
from tracereward.reports.report import Trace, write_report
from tracereward.reports.tables import AUROC_LABELS, Table, print_policies, print_ranking
from tracereward.rewards.token_scores import TokenScores
from tracereward.runs.report import pick_traces
from tracereward.tasks.recipes import get_task

SAMPLES = 8  # of the SFT policy for each held-out question
POLICIES = {
    "base": "base (pretrained)",
    "init": "base (untrained)",
    "sft": "SFT",
    "sft-continued": "SFT continued (control)",
    "grpo-logprob": "GRPO on own log-prob (control)",
    "train": "IRL policy (tracereward)",
}


class Stage:
    """Numbers and times the stages of a run; a stage whose result exists is not run again."""

    def __init__(self, total: int):
        self.total = total
        self.number = 0
        self.seconds: dict[str, float] = {}

    def run(self, name: str, result: Path, work: Callable[[], object]) -> None:
        """Do `work` unless `result`, which it writes as its last act, is there."""
        self.number += 1
        if result.exists():
            note(f"[{self.number}/{self.total}] {name}: done before")
            return
        note(f"[{self.number}/{self.total}] {name}")
        start = time.perf_counter()
        work()
        self.seconds[name] = time.perf_counter() - start


def run_quickstart(output: Path, world_name: str, seed: int, resume: bool, fast: bool, json_table: bool) -> None:
    """SFT, warm-up, adversarial GRPO, two controls, reranking and the report, on generated arithmetic.

    Raises:
        InputError: unknown world, or `output` holds a run and `resume` is not given or its options differ.
    """
    check_choice("world", world_name, WORLDS)
    world = WORLDS[world_name]
    options = {"world": world_name, "seed": seed, "fast": fast}
    settings = output / "quickstart.json"
    if settings.is_file():
        stored = json.loads(settings.read_text(encoding="utf-8"))
        if not resume:
            raise InputError(f"{output} already holds a run: go on with --resume, or choose another --output")
        if stored != options:
            raise InputError(f"{output} holds a run with other options ({stored}): give the same, or another --output")
    output.mkdir(parents=True, exist_ok=True)
    atomic_write_json(settings, options)
    transformers_logging.disable_progress_bar()  # of loading and saving files of half a megabyte
    disable_progress_bar()
    torch.set_num_threads(1)  # a second one gains nothing at this size, and sums would depend on the machine's cores
    start = time.perf_counter()
    site = Site(output, world, seed, fast)
    stage = Stage(7 if world.pretraining else 6)
    stage.run("data and an untrained tiny Llama", output / "init", lambda: make_world(site))
    train_policies(site, stage)
    stage.run("evaluation on held-out questions", output / "results.json", lambda: evaluate(site))
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    write_quickstart_report(output, world_name, seed, results)
    if json_table:
        sys.stdout.write(json.dumps(results) + "\n")
    else:
        print_policies(results["policies"], results["questions"], stdout=True)
        print_ranking(results["ranking"], stdout=True)
    parts = "".join(f"\n  {seconds:5.0f} s  {name}" for name, seconds in stage.seconds.items())
    note(f"{time.perf_counter() - start:.0f} s in all{parts}")
    note(f"report: {output / 'report.html'}")


def train_policies(site: Site, stage: Stage) -> None:
    """Base, tuned SFT, the two controls and the adversarial run, each in a run folder of its own."""
    world, folder = site.world, site.folder
    if world.pretraining:
        stage.run(
            "pretraining on a corpus with mistakes",
            folder / "base" / "report.html",
            lambda: arms.train_sft(site, "base", "init", world.pretraining, part="corpus"),
        )
    stage.run("SFT on the experts, tuned on validation questions", folder / "sft", lambda: arms.tune_sft(site))
    stage.run(
        "control: the same SFT continued for as many steps as GRPO",
        folder / "sft-continued" / "report.html",
        lambda: arms.continue_sft(site, "sft-continued", choose=True),
    )
    stage.run(
        "control: GRPO on the SFT model's own log-prob",
        folder / "grpo-logprob" / "report.html",
        lambda: arms.train_grpo(site, "grpo-logprob", "logprob", choose=True),
    )
    stage.run(
        "warm-up of the discriminator and adversarial GRPO",
        folder / "train" / "report.html",
        lambda: arms.train_irl(site, "train", {**world.recipe, "choose": True}),
    )


def evaluate(site: Site) -> None:
    """Greedy accuracies of all policies, and samples of the SFT policy ranked; writes ``results.json``."""
    left_out = "init" if site.world.pretraining else "base"
    rows = [{"label": label, **judging.greedy(site, arm, "test")} for arm, label in POLICIES.items() if arm != left_out]
    ranking, scored = judging.rank(site, "train", judging.draw_samples(site, "sft", "test", SAMPLES))
    write_jsonl(site.folder / "samples.jsonl", scored)
    results = {"questions": rows[0]["questions"], "seed": site.seed, "policies": rows, "ranking": ranking}
    atomic_write_json(site.folder / "results.json", results)


def write_quickstart_report(output: Path, world: str, seed: int, results: dict[str, Any]) -> None:
    """The page that the command ends with."""
    samples = read_jsonl(output / "samples.jsonl")
    traces = []
    for row in samples:
        scores = TokenScores(
            row["tokens"], [tuple(o) for o in row["offsets"]], row["token_rewards"], row["supervised"], row["step_ends"]
        )
        answer = get_task("arithmetic").extract(row["completion"])
        traces.append(Trace(row["prompt"], row["completion"], scores, row["correct"], answer))
    policies = Table(
        f"Greedy accuracy on {results['questions']} held-out questions, %",
        ["policy", "accuracy", "95 % interval", "no answer"],
        [
            [r["label"], 100 * r["accuracy"], f"[{100 * r['low']:.1f}, {100 * r['high']:.1f}]", r["no_answer"]]
            for r in results["policies"]
        ],
        note="Wilson intervals. The controls say what a reward model must beat.",
    )
    ranking = Table(
        "Choosing one of 8 samples of the SFT policy, %",
        ["method", "accuracy", "95 % interval"],
        [
            [label, 100 * value, f"[{100 * low:.1f}, {100 * high:.1f}]"]
            for label, (value, low, high) in results["ranking"]["accuracy"].items()
        ],
        note="Bootstrap intervals over questions.",
    )
    aurocs = Table(
        "AUROC for correctness of the same samples",
        ["score", "pooled", "within the prompt"],
        [
            [label, results["ranking"][f"{key}_auroc"], results["ranking"][f"{key}_auroc_within_prompt"]]
            for key, label in AUROC_LABELS.items()
        ],
        note="Pooled AUROC mostly measures which questions are hard; a reranker sees the one within the prompt.",
    )
    write_report(
        output / "report.html",
        title=f"tracereward quickstart: {world}",
        summary="Generated arithmetic, a tiny Llama trained from scratch, experts' traces, no verifier in training. "
        "Everything on this page was measured in this run.",
        tables=[policies, ranking, aurocs],
        metrics=read_jsonl(output / "train" / "metrics.jsonl"),
        rewards_correct=[row["reward"] for row in samples if row["correct"]],
        rewards_wrong=[row["reward"] for row in samples if not row["correct"]],
        traces=pick_traces(traces),
        command=f"tracereward quickstart --world {world} --seed {seed}",
    )
