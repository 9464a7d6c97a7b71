"""Sharded policies on two processes (FSDP2, DeepSpeed ZeRO-2 and ZeRO-3): the run and saved models of one process.

See `sharded` for how this runs on a CPU, and `test_invariance` for what is compared. To run all of it, with DeepSpeed
installed (``pip install -e .[dev,deepspeed]``):

    pytest tests/training/test_sharded.py -m "slow or not slow" -n 0
"""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.invariance import LOSSES, TOLERANCES, apart, beyond, differences, train
from helpers.sharded import ENGINES, launch
from helpers.tiny import assert_same, launcher, options, rows, trap, weights
from tracereward.errors import InputError
from tracereward.files import write_jsonl
from tracereward.rewards.model import TokenRewardModel
from tracereward.synthetic.arithmetic import build_model, generate
from tracereward.training.adversarial_config import AdversarialConfig

TRAINED = ("sharded", "sharded, LoRA")
SHARDED_DISCRIMINATOR = {"sharded discriminator": "sharded", "sharded discriminator, LoRA": "sharded, LoRA"}
"""Runs with a sharded discriminator, and the runs whose results they must equal."""


def marked(engine: str) -> Any:
    """Mark FSDP2 as long (half a minute) and DeepSpeed, an optional dependency, as slow."""
    return pytest.param(engine, marks=pytest.mark.long if engine == "fsdp2" else pytest.mark.slow)


def needs(engine: str) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install tracereward[deepspeed]")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """Folder of a starting policy: one layer, untied LM head."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    build_model(tokenizer, seed=0, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one(model):
    """Cached runs in this process."""
    return functools.cache(lambda name: train(name, model.parent))


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    """Results of all two-process runs of an engine, from one launch: imports take longest."""

    @functools.cache
    def runs(engine: str) -> dict[str, list[dict[str, Any]]]:
        needs(engine)
        folder = tmp_path_factory.mktemp(engine)
        (folder / "model").symlink_to(model)
        trained = (*TRAINED, *SHARDED_DISCRIMINATOR)
        names = [f"{name}, two processes" for name in trained]
        code = launch(engine, str(folder), *names, output=folder / "output.txt")
        assert code == 0, f"{code}\n{(folder / 'output.txt').read_text(errors='replace')[-6000:]}"
        found = {name: [torch.load(folder / f"{name}, two processes.{rank}.pt") for rank in (0, 1)] for name in trained}
        assert {run["processes"] for both in found.values() for run in both} == {2}
        return found

    return runs


@pytest.mark.parametrize("name", [*TRAINED, *SHARDED_DISCRIMINATOR])
@pytest.mark.parametrize("engine", [marked(engine) for engine in ENGINES])
def test_two_processes_match_one(one, two, engine, name, record_property):
    run, (first, second) = one(SHARDED_DISCRIMINATOR.get(name, name)), two(engine)[name]
    assert len(run["log"]) == len(first["log"]) == 10
    both = [a + b for a, b in zip(first["batches"], second["batches"], strict=True)]
    assert run["batches"] == both, "other prompts, another order, or other completions"
    found = differences(run, first, LOSSES) | {model: apart(run, first, model) for model in run["end"]}
    record_property("differences", found)
    assert beyond(found, "token") == {}
    assert torch.equal(first["end"]["discriminator"], second["end"]["discriminator"])


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("engine", [marked(engine) for engine in ENGINES])
def test_policy_shards(two, engine, name):
    """Each process holds the full policy or one of two shards of the gathered one; frozen weights too."""
    first, second = two(engine)[name]
    sizes = [sum(part.numel() for part in run["held"].values()) for run in (first, second)]
    total = sum(tensor.numel() for tensor in first["full"].values())
    assert total > 50_000
    assert first["held"].keys() == second["held"].keys() == first["full"].keys()
    sharded = engine in ("fsdp2", "zero3")
    if sharded:
        assert max(sizes) < 0.51 * total
        assert first["gathered"] == second["gathered"] == 0
    for name_, tensor in first["full"].items():
        shards = [run["held"][name_] for run in (first, second)]
        held = torch.cat(shards)[: len(tensor)] if sharded else shards[0]  # ZeRO-3 pads the last shard
        assert torch.equal(held, tensor), name_
        assert sharded or torch.equal(*shards), name_


@pytest.mark.parametrize("engine", [marked(engine) for engine in ENGINES])
def test_discriminator_and_reference_shards(two, engine):
    """Half of both if the discriminator is sharded, whatever shards the policy; else all."""
    for name, (first, second) in two(engine).items():
        sizes = [sum(held for held, _ in run["critic"].values()) for run in (first, second)]
        total = sum(size for _, size in first["critic"].values())
        assert total > 50_000
        if name in SHARDED_DISCRIMINATOR:
            assert sum(sizes) == total
            assert max(sizes) < 0.51 * total
        else:
            assert sizes == [total, total]
        of_start = {run["started"][1] for run in (first, second)}
        assert of_start == ({0} if "LoRA" in name else {total})  # head implicit: the same model
        for held, all_of_it in (run["started"] for run in (first, second)):
            assert held <= (0.51 if name in SHARDED_DISCRIMINATOR else 1) * all_of_it
            assert held == all_of_it or name in SHARDED_DISCRIMINATOR


def test_sharding_keeps_the_discriminator_complete_on_one_process(one):
    assert torch.equal(one("sharded discriminator")["end"]["discriminator"], one("sharded")["end"]["discriminator"])


def test_comparison_detects_a_one_percent_change(one):
    """A 1 % larger learning rate of the policy exceeds the tolerances."""
    run, other = one("sharded"), one("sharded, 1 % faster")
    found = differences(run, other, LOSSES) | {model: apart(run, other, model) for model in run["end"]}
    assert beyond(found, "token").keys() >= {"loss", "grad_norm", "policy"}
    assert found["policy"] > 20 * TOLERANCES["token"]["policy"]


# The command line

COMMON: dict[str, Any] = {
    "task": "arithmetic",
    "max_completion_length": 24,
    "max_steps": 6,
    "save_steps": 2,
    "save_total_limit": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-5,
    "lr_scheduler_type": "constant",
    "discriminator_learning_rate": 1e-3,
    "discriminator_warmup_updates": 3,
    "discriminator_every": 1,
    "discriminator_prompts": 6,
    "warmup_rollouts": 2,
    "replay_size": 40,
    "beta_clip": 40.0,  # an untrained policy's log-probs would all be clipped, and rewards equal
    "on_failure": "ignore",
    "report_to": "none",
}
LORA = {"use_peft": "true", "lora_target_modules": ["q_proj", "v_proj"], "lora_r": 4, "lora_dropout": 0.0}
KINDS = {
    "full": {},
    "LoRA": LORA,
    "sharded discriminator": {"shard_discriminator": "true"},
    "sharded discriminator, LoRA": {**LORA, "shard_discriminator": "true", "head": "token"},
}


@pytest.fixture(scope="module")
def given(tmp_path_factory, model):
    """Options for the model and the demonstrations, and the file of validation questions."""
    folder = tmp_path_factory.mktemp("rows")
    write_jsonl(folder / "experts.jsonl", generate("misconception", 12, seed=11))
    write_jsonl(folder / "questions.jsonl", generate("misconception", 6, seed=12))
    known = {"model_name_or_path": model, "dataset_name": folder / "experts.jsonl"}
    return known, folder / "questions.jsonl"


def loaded(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The parameters of both models as users load them."""
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    reward_model = TokenRewardModel.from_pretrained(str(folder / "reward_model"), dtype=torch.float32)
    return {"policy": dict(policy.named_parameters()), "reward_model": dict(reward_model.named_parameters())}


@torch.no_grad()
def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """Distance of two models relative to that of the first from `start`, which has no reward head."""
    assert a.keys() == b.keys()
    before = {name: start.get(name.removeprefix("backbone.")) for name in a}
    missing = start.keys() - {name.removeprefix("backbone.") for name in a}
    assert missing in (set(), {"lm_head.weight"})  # a token classifier has none
    apart_by = sum(float((a[name] - b[name]).square().sum()) for name in a)
    moved = sum(float((a[name] - tensor).square().sum()) for name, tensor in before.items() if tensor is not None)
    return math.sqrt(apart_by / moved)


COMMANDS = [
    pytest.param("fsdp2", "full", True, marks=pytest.mark.long),
    pytest.param("ddp", "sharded discriminator", True, marks=pytest.mark.long),
    pytest.param("fsdp2", "sharded discriminator, LoRA", False, marks=pytest.mark.slow),
    pytest.param("fsdp2", "LoRA", False, marks=pytest.mark.slow),
    pytest.param("fsdp2", "LoRA", True, marks=pytest.mark.slow),
    pytest.param("zero2", "full", True, marks=pytest.mark.slow),
    pytest.param("zero3", "full", False, marks=pytest.mark.slow),
    pytest.param("zero3", "full", True, marks=pytest.mark.slow),
    pytest.param("zero3", "LoRA", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("engine", "kind", "choose"), COMMANDS)
def test_two_processes_save_the_models_of_one(given, model, tmp_path, engine, kind, choose, record_property):
    """Full models with equal weights; with validation questions, those of the first checkpoint."""
    needs(engine)
    known, questions = given
    words = {**COMMON, **KINDS[kind], **known}
    if choose:
        words["validation_dataset_name"] = questions
    alone, both = tmp_path / "one", tmp_path / "two"
    done = launcher()(
        "train", *options(**{**words, "per_device_train_batch_size": 8, "output_dir": alone}), scripted=True
    )
    assert done.code == 0, done.err
    ended = launcher().two("train", *options(**words, output_dir=both), engine=engine, scripted=True)
    assert [result.code for result in ended] == [0, 0], "".join(result.err[-4000:] for result in ended)
    left = [str(both / part) for part in ("policy", "reward_model", "report.html")]
    assert [line for line in ended[0].out.splitlines() if line.startswith("/")] == left  # DeepSpeed logs to stdout too
    assert str(both) not in ended[1].out
    assert (both / "checkpoints" / "checkpoint-6" / "rng_state_1.pth").exists(), "there was one process only"

    start = dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters())
    a, b = loaded(alone), loaded(both)
    found = {name: distance(a[name], b[name], start) for name in a}
    record_property("differences", found)
    assert max(found.values()) < TOLERANCES["token"]["policy"], found
    choice = [row for row in rows(both / "metrics.jsonl") if row["phase"] == "choice"]
    assert choice == [row for row in rows(alone / "metrics.jsonl") if row["phase"] == "choice"]
    assert [row["chosen"] for row in choice] == (["checkpoint-2"] if choose else [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "LoRA", "sharded discriminator"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_killed_run_resumes_to_identical_weights(given, tmp_path, engine, kind):
    """Both processes resume from step 2, bit for bit, with real sampling."""
    needs(engine)
    words = {**COMMON, **KINDS[kind], **given[0]}
    full, cut = tmp_path / "full", tmp_path / "cut"
    ended = launcher().two("train", *options(**words, output_dir=full), engine=engine)
    assert [result.code for result in ended] == [0, 0], "".join(result.err[-4000:] for result in ended)
    fifth = trap("open", "metrics.jsonl", 3 + 3)
    killed = launcher().two("train", *options(**words, output_dir=cut), engine=engine, traps=(fifth, None))
    assert killed[0].code == -9
    assert killed[1].code != 0
    resumed = launcher().two("train", *options(**words, output_dir=cut), "--resume", engine=engine)
    assert [result.code for result in resumed] == [0, 0], "".join(result.err[-4000:] for result in resumed)
    assert f"resuming from {cut}/checkpoints/checkpoint-2" in resumed[0].err
    assert weights(cut / "policy").keys() == weights(full / "policy").keys()
    assert_same(cut, full)


@pytest.mark.slow
def test_sharded_discriminator_resumes_unsharded(given, tmp_path):
    """Two processes with half of it each (LoRA on bfloat16), then one process with all of it."""
    words = {**COMMON, **LORA, **given[0], "dtype": "bfloat16", "bf16": "true", "output_dir": tmp_path / "run"}
    ended = launcher().two("train", *options(**{**words, "shard_discriminator": "true", "max_steps": 4}), engine="ddp")
    assert [result.code for result in ended] == [0, 0], "".join(result.err[-4000:] for result in ended)
    alone = launcher()("train", *options(**{**words, "per_device_train_batch_size": 8}), "--resume")
    assert alone.code == 0, alone.err
    assert f"resuming from {tmp_path}/run/checkpoints/checkpoint-4" in alone.err
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shared_base": True, "head": "action"}, "one of shard_discriminator and shared_base"),
        ({"gradient_penalty": 1.0}, "second derivatives"),
        ({"r1_penalty": 1.0}, "second derivatives"),
        ({"spectral_norm": True, "head": "token"}, "needs head action"),
    ],
)
def test_unsupported_with_sharded_discriminator(given, message):
    with pytest.raises(InputError, match=message):
        AdversarialConfig(output_dir="x", shard_discriminator=True, report_to="none", **given)
