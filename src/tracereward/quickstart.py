"""The whole method on the embedded default: generated arithmetic, a tiny Llama built from scratch, two CPU cores.

World ``misconception``: a policy pretrained on a corpus that drops the borrow in subtractions is fluent, confident and
wrong by a rule; a few dozen experts are right. World ``style``: experts are always right, but most skip the working,
which the student needs. Everything printed is measured in the run.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bar
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging
from trl import ModelConfig

from tracereward.adversarial_config import AdversarialConfig
from tracereward.config import DataArguments, RewardConfig, SupervisedConfig
from tracereward.errors import InputError, check_choice
from tracereward.files import atomic_folder, atomic_write_json, read_jsonl, write_jsonl
from tracereward.metrics import wilson_interval
from tracereward.models import load_tokenizer
from tracereward.pool import as_row, rerank_rows, summary
from tracereward.report import Table, Trace, write_report
from tracereward.reward_model import TokenRewardModel
from tracereward.run import pick_traces, run_grpo, run_sft, run_train
from tracereward.run_folder import note
from tracereward.sampling import sample
from tracereward.tables import AUROC_LABELS, print_policies, print_ranking
from tracereward.tasks import get_task
from tracereward.tasks.arithmetic import build_model, build_tokenizer, generate, splits

MAX_NEW_TOKENS = 32
COMMON: dict[str, Any] = {
    "gradient_checkpointing": False,
    "report_to": "none",
    "adam_beta2": 0.98,
    "max_grad_norm": 1.0,
    "dataloader_pin_memory": False,
}


@dataclass(frozen=True)
class World:
    """Sizes and options of one world."""

    experts: int
    unlabeled: int
    mistake_rate: float | None
    pretraining: dict[str, Any]
    sft: dict[str, Any]
    grpo: dict[str, Any]
    adversarial: dict[str, Any]
    test: int = 300
    corpus: int = 10_000


GRPO = {
    "per_device_train_batch_size": 192,
    "num_generations": 8,
    "max_completion_length": MAX_NEW_TOKENS,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "max_steps": 50,
    "save_steps": 25,
}
ADVERSARIAL = {
    "reward_form": "logit_plus_logprob",
    "discriminator_learning_rate": 3e-4,
    "discriminator_online_learning_rate": 5e-5,
    "discriminator_prompts": 32,
    "discriminator_rollouts": 2,
    "discriminator_warmup_updates": 40,
    "discriminator_every": 4,
    "warmup_rollouts": 16,
}
WORLDS = {
    "misconception": World(
        experts=50,
        unlabeled=3000,
        mistake_rate=0.8,
        pretraining={
            "max_steps": 900,
            "learning_rate": 4e-3,
            "per_device_train_batch_size": 128,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 20,
            "weight_decay": 0.01,
        },
        sft={
            "max_steps": 60,
            "learning_rate": 5e-4,
            "per_device_train_batch_size": 50,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 20,
            "weight_decay": 0.01,
        },
        grpo=GRPO,
        # So few experts leave none to hold out: with five of them held out, the policy gained nothing over SFT.
        # SFT memorises them: its rollouts on their prompts equal the demonstrations and teach nothing.
        adversarial={**ADVERSARIAL, "held_out_fraction": 0.0, "discriminator_model": "base", "warmup_model": "base"},
    ),
    "style": World(
        experts=1500,
        unlabeled=0,
        mistake_rate=None,
        pretraining={},
        sft={
            "max_steps": 420,
            "learning_rate": 4e-3,
            "per_device_train_batch_size": 96,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 20,
            "weight_decay": 0.01,
        },
        grpo=GRPO,
        adversarial={**ADVERSARIAL, "discriminator_learning_rate": 2e-4},
    ),
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
        self.seconds[name] = round(time.perf_counter() - start, 1)


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
    stage = Stage(7 if world.pretraining else 6)
    stage.run("data and an untrained tiny Llama", output / "init", lambda: make_world(output, world, world_name, seed))
    train_policies(output, world, seed, fast, stage)
    stage.run("evaluation on held-out questions", output / "results.json", lambda: evaluate(output, seed))
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    write_quickstart_report(output, world_name, seed, results)
    if json_table:
        sys.stdout.write(json.dumps(results) + "\n")
    else:
        print_policies(results["policies"], results["questions"], stdout=True)
        print_ranking(results["ranking"], stdout=True)
    note(f"{time.perf_counter() - start:.0f} s: {stage.seconds}")
    note(f"report: {output / 'report.html'}")


def make_world(output: Path, world: World, name: str, seed: int) -> None:
    """Write the rows and the untrained model, ``init`` last."""
    parts = splits(name, seed, world.experts, n_validation=0, n_test=world.test, n_unlabeled=world.unlabeled)
    (output / "data").mkdir(exist_ok=True)
    for part in ("experts", "test", "unlabeled"):
        write_jsonl(output / "data" / f"{part}.jsonl", parts[part])
    if world.mistake_rate is not None:
        held_out = {row["prompt"] for row in parts["test"]}
        corpus = generate(
            name, world.corpus, 5000 + seed, mistake_rate=world.mistake_rate, exclude=held_out, unique=False
        )
        write_jsonl(output / "data" / "corpus.jsonl", corpus)
    tokenizer = build_tokenizer()
    with atomic_folder(output / "init") as folder:
        build_model(tokenizer, seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def train_policies(output: Path, world: World, seed: int, fast: bool, stage: Stage) -> None:
    """Base, SFT, the two controls and the adversarial run, each in a run folder of its own."""
    data = output / "data"
    experts = DataArguments(task="arithmetic", dataset_name=str(data / "experts.jsonl"))
    prompts = DataArguments(task="arithmetic", dataset_name=str(data / "experts.jsonl"))
    if world.unlabeled:
        prompts.unlabeled_dataset_name = str(data / "unlabeled.jsonl")

    def options(name: str, given: dict[str, Any]) -> dict[str, Any]:
        merged = {**COMMON, "max_completion_length": MAX_NEW_TOKENS, "save_steps": given["max_steps"], **given}
        if fast:
            merged["max_steps"] = max(4, merged["max_steps"] // 10)
            merged["save_steps"] = merged["max_steps"]
        return {**merged, "output_dir": str(output / name), "seed": seed}

    def policy(name: str) -> ModelConfig:
        path = output / name if name == "init" else output / name / "policy"
        return ModelConfig(model_name_or_path=str(path))

    def unfinished(name: str) -> bool:
        return (output / name / "config.yaml").is_file()

    def sft(name: str, start: str, rows: DataArguments, given: dict[str, Any]) -> Callable[[], object]:
        return lambda: run_sft(rows, SupervisedConfig(**options(name, given)), policy(start), unfinished(name))

    base = "init"
    if world.pretraining:
        base = "base"
        corpus = DataArguments(task="arithmetic", dataset_name=str(data / "corpus.jsonl"))
        stage.run(
            "pretraining on a corpus with a misconception",
            output / "base" / "report.html",
            sft("base", "init", corpus, world.pretraining),
        )
    stage.run("SFT on the experts", output / "sft" / "report.html", sft("sft", base, experts, world.sft))
    steps = options("train", world.grpo)["max_steps"]
    stage.run(
        "control: the same SFT continued for as many steps as GRPO",
        output / "sft-continued" / "report.html",
        sft("sft-continued", "sft", experts, {**world.sft, "max_steps": steps * (10 if fast else 1)}),
    )
    stage.run(
        "control: GRPO on the SFT model's own log-prob",
        output / "grpo-logprob" / "report.html",
        lambda: run_grpo(
            prompts,
            RewardConfig(**options("grpo-logprob", world.grpo), reward="logprob"),
            policy("sft"),
            unfinished("grpo-logprob"),
        ),
    )
    given = {**world.grpo, **world.adversarial}
    if fast:
        given["discriminator_warmup_updates"] = 8
    for name in ("discriminator_model", "warmup_model"):
        if name in given:
            given[name] = str(output / given[name] / "policy")
    stage.run(
        "warm-up of the discriminator and adversarial GRPO",
        output / "train" / "report.html",
        lambda: run_train(prompts, AdversarialConfig(**options("train", given)), policy("sft"), unfinished("train")),
    )


def evaluate(output: Path, seed: int) -> None:
    """Greedy accuracies of all policies, and 8 samples of the SFT policy ranked; writes ``results.json``."""
    task = get_task("arithmetic")
    test = read_jsonl(output / "data" / "test.jsonl")
    prompts = [row["prompt"] for row in test]
    policies = {
        "base (pretrained)": output / "base" / "policy",
        "base (untrained)": output / "init",
        "SFT": output / "sft" / "policy",
        "SFT continued (control)": output / "sft-continued" / "policy",
        "GRPO on own log-prob (control)": output / "grpo-logprob" / "policy",
        "IRL policy (tracereward)": output / "train" / "policy",
    }
    if policies["base (pretrained)"].exists():
        del policies["base (untrained)"]
    else:
        del policies["base (pretrained)"]
    tokenizer = load_tokenizer(str(output / "init"))
    rows = []
    for label, folder in policies.items():
        policy = AutoModelForCausalLM.from_pretrained(folder)
        texts = [
            s.text for chunk in sample(policy, tokenizer, prompts, 1, MAX_NEW_TOKENS, 0, batch_size=512) for s in chunk
        ]
        right = sum(task.verify(text, row["answer"]) for text, row in zip(texts, test, strict=True))
        low, high = wilson_interval(right, len(test))
        no_answer = sum(task.extract(text) is None for text in texts)
        rows.append({"label": label, "accuracy": right / len(test), "low": low, "high": high, "no_answer": no_answer})
    samples = rank_samples(output, test, seed)
    _, questions = rerank_rows(samples, task, "vote")
    ranking = summary(questions, task)
    assert ranking is not None
    write_jsonl(output / "samples.jsonl", samples)
    atomic_write_json(
        output / "results.json", {"questions": len(test), "seed": seed, "policies": rows, "ranking": ranking}
    )


def rank_samples(output: Path, test: list[dict[str, Any]], seed: int, n: int = 8) -> list[dict[str, Any]]:
    """`n` scored samples of the SFT policy for each held-out question."""
    task = get_task("arithmetic")
    reward_model = TokenRewardModel.from_pretrained(str(output / "train" / "reward_model"))
    policy: PreTrainedModel = AutoModelForCausalLM.from_pretrained(output / "sft" / "policy")
    prompts = [row["prompt"] for row in test]
    rows = []
    for chunk in sample(policy, reward_model.tokenizer, prompts, n, MAX_NEW_TOKENS, seed=seed, batch_size=2400):
        scores = reward_model.score(
            [prompts[s.prompt] for s in chunk], [s.text for s in chunk], [s.finished for s in chunk]
        )
        for s, trace in zip(chunk, scores, strict=True):
            row = {
                "question": s.prompt,
                "prompt": prompts[s.prompt],
                "completion": s.text,
                "answer": test[s.prompt]["answer"],
                "correct": task.verify(s.text, test[s.prompt]["answer"]),
                "logprob": s.logprob,
                "supervised": trace.supervised,
                "step_ends": trace.step_ends,
            }
            rows.append({**row, **as_row(trace, reward_model)})
    return rows


def write_quickstart_report(output: Path, world: str, seed: int, results: dict[str, Any]) -> None:
    """The page that the command ends with."""
    from tracereward.scores import TokenScores

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
