"""Runs that are killed, interrupted, out of disk or diverging leave complete files, and `--resume` is exact.

Each failure is real: a signal or a full disk at a named point of a real process (see `helpers.tiny`). Two runs are
equal if all final weights are equal bit for bit, and all metrics except timings.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.faults import COMMON, GRPO, TRAIN, sentence, whole_checkpoints
from helpers.tiny import assert_same, launcher, options, result, rows, trap, weights
from tracereward.files import write_jsonl
from tracereward.training.update_loop import SAVED_UPDATES

LORA = {
    **TRAIN,
    "use_peft": "true",
    "lora_target_modules": ["q_proj", "v_proj"],
    "lora_r": 4,
    "lora_dropout": 0.1,  # random numbers in every forward pass
    "advantages": "token",
    "gamma": 0.95,
}
TOKEN_HEAD = {
    **TRAIN,
    "head": "token",
    "granularity": "step",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
}
SHARED = {**TRAIN, "num_iterations": 2, "max_steps": 8}  # two optimiser steps on one batch of rollouts
RUNS = {
    "full": ("train", TRAIN),
    "lora": ("train", LORA),
    "token-head": ("train", TOKEN_HEAD),
    "two-steps-a-batch": ("train", SHARED),
    "sft": ("sft", COMMON),
    "sft-validation": ("sft", {**COMMON, "validation_fraction": 0.25}),
    "grpo-verifier": ("grpo", GRPO),
    "grpo-logprob": ("grpo", {**GRPO, "reward": "logprob"}),
}
# In a run of `train` with these options the first six rows of metrics.jsonl are the warm-up's.
POOL = trap("rename", "warmup/rollouts.jsonl", 2)
MID_WARM_UP = trap("open", "metrics.jsonl", 4)  # before the first save
FIRST_STEP = trap("open", "metrics.jsonl", 7)
AFTER_CHECKPOINT = trap("open", "metrics.jsonl", 9)
MID_CHECKPOINT = trap("open", "checkpoint-4/trainer_state.json")
UNMARKED = trap("rename", "checkpoint-4/complete.json")
BEFORE_POLICY = trap("rename", "/policy")
BEFORE_REWARD_MODEL = trap("rename", "/reward_model")
BEFORE_REPORT = trap("rename", "/report.html")


class Bench:
    """Data, a model, and uninterrupted reference runs."""

    def __init__(self, folder: Path, model: Path, data: Path):
        self.folder = folder
        self.given = {"model_name_or_path": model, "dataset_name": data}

    def words(self, name: str, output: Path, **changed: object) -> list[str]:
        """The command line of the run `name`."""
        kind, given = RUNS[name]
        return [kind, *options(**{**given, **self.given, "output_dir": output, **changed})]

    def reference(self, name: str) -> Path:
        """The uninterrupted run; made once."""
        output = self.folder / name
        if not output.exists():
            done = launcher()(*self.words(name, output))
            assert done.code == 0, done.err
        return output


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_model_folder, experts):
    folder = tmp_path_factory.mktemp("faults")
    write_jsonl(folder / "experts.jsonl", experts[:10])  # five steps an epoch: runs end within one
    return Bench(folder, tiny_model_folder, folder / "experts.jsonl")


def test_reference_run_changes_weights(bench, tiny_model_folder):
    """Otherwise comparing weights would prove nothing."""
    tensors, metrics = result(bench.reference("full"))
    before = weights(tiny_model_folder)
    moved = {n for n, t in before.items() if not torch.equal(t, tensors[f"policy/{n}"])}
    assert len(moved) == len(before)
    assert any(not torch.equal(t, tensors[f"reward_model/{n}"]) for n, t in before.items())
    assert "reward_model/head.safetensors:w" in tensors
    assert float(tensors["reward_model/head.safetensors:w"].abs().max()) > 0
    assert [row.get("update") or row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 6, 6]
    assert [row["phase"] for row in metrics] == ["warmup"] * 6 + ["train"] * 6 + ["movement", "verdict"]
    assert whole_checkpoints(bench.reference("full")) == ["checkpoint-4", "checkpoint-6"]


KILLS = [
    pytest.param("full", POOL, [], marks=pytest.mark.long),
    pytest.param("full", MID_CHECKPOINT, ["checkpoint-2"], marks=pytest.mark.long),
    ("full", AFTER_CHECKPOINT, ["checkpoint-2"]),
    pytest.param("lora", MID_WARM_UP, [], marks=pytest.mark.long),
    ("sft", trap("open", "metrics.jsonl", 4), ["checkpoint-2"]),
    ("grpo-logprob", trap("open", "metrics.jsonl", 4), ["checkpoint-2"]),
]
MORE_KILLS = [
    ("full", MID_WARM_UP, []),
    ("full", BEFORE_REWARD_MODEL, ["checkpoint-4", "checkpoint-6"]),
    ("lora", AFTER_CHECKPOINT, ["checkpoint-2"]),
    ("grpo-verifier", trap("open", "metrics.jsonl", 4), ["checkpoint-2"]),
    ("full", FIRST_STEP, []),
    ("full", UNMARKED, ["checkpoint-2"]),
    ("full", BEFORE_POLICY, ["checkpoint-4", "checkpoint-6"]),
    ("full", BEFORE_REPORT, ["checkpoint-4", "checkpoint-6"]),
    ("lora", POOL, []),
    ("lora", FIRST_STEP, []),
    ("lora", MID_CHECKPOINT, ["checkpoint-2"]),
    ("lora", BEFORE_POLICY, ["checkpoint-4", "checkpoint-6"]),
    ("token-head", POOL, []),
    ("token-head", MID_WARM_UP, []),
    ("token-head", AFTER_CHECKPOINT, ["checkpoint-2"]),
    ("token-head", MID_CHECKPOINT, ["checkpoint-2"]),
    ("two-steps-a-batch", AFTER_CHECKPOINT, ["checkpoint-2"]),
    ("sft", MID_CHECKPOINT, ["checkpoint-2"]),
    ("sft", BEFORE_POLICY, ["checkpoint-4", "checkpoint-6"]),
    ("sft-validation", MID_CHECKPOINT, ["checkpoint-2"]),
    ("sft-validation", BEFORE_POLICY, ["checkpoint-4", "checkpoint-6"]),
    ("grpo-verifier", MID_CHECKPOINT, ["checkpoint-2"]),
    ("grpo-logprob", BEFORE_POLICY, ["checkpoint-4", "checkpoint-6"]),
]


def describe(value: object) -> str | None:
    if isinstance(value, dict):
        return "{event}-{path}-{count}".format(**value).replace("/", "_")
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(
    ("name", "where", "left"),
    KILLS + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_KILLS],
    ids=describe,
)
def test_killed_run_resumes_exactly(bench, tmp_path, name, where, left):
    output = tmp_path / "run"
    killed = launcher()(*bench.words(name, output), trap=where)
    assert killed.code == -signal.SIGKILL, killed.err
    assert whole_checkpoints(output) == left
    assert not (output / "report.html").exists()
    resumed = launcher()(*bench.words(name, output), "--resume")
    assert resumed.code == 0, resumed.err
    assert (f"resuming from {output}/checkpoints/{left[-1]}" in resumed.err) if left else "resuming" not in resumed.err
    assert_same(output, bench.reference(name))
    assert (output / "report.html").exists()
    assert not [*output.glob(".*")], "unfinished files of the killed process are removed"


def test_resume_continues_warm_up(bench, tmp_path):
    """Resuming after a kill keeps saved warm-up rollouts and updates."""
    output = tmp_path / "run"
    words = bench.words("full", output, discriminator_warmup_updates=SAVED_UPDATES + 3)
    launcher()(*words, trap=trap("open", "metrics.jsonl", SAVED_UPDATES + 2))
    pool = output / "checkpoints" / "warmup" / "rollouts.jsonl"
    before = pool.stat().st_mtime_ns, pool.read_bytes()
    # Killed again before its first new row of metrics: rows up to the last saved update remain.
    again = launcher()(*words, "--resume", trap=trap("open", "metrics.jsonl", 1))
    assert again.code == -signal.SIGKILL
    assert [row["update"] for row in rows(output / "metrics.jsonl")] == [*range(1, SAVED_UPDATES + 1)]
    assert (pool.stat().st_mtime_ns, pool.read_bytes()) == before


@pytest.mark.long
def test_resume_in_new_process_with_other_hash_seed(bench, tmp_path):
    """As by a user, with another hash seed than the killed process."""
    output = tmp_path / "run"
    launcher()(*bench.words("lora", output), trap=UNMARKED)
    command = [sys.executable, "-m", "tracereward", *bench.words("lora", output), "--resume"]
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(output / part) for part in ("policy", "reward_model", "report.html")]
    assert_same(output, bench.reference("lora"))


@pytest.mark.slow
@pytest.mark.parametrize("row", [1, 5, 8, 11])
def test_resume_after_external_sigkill(bench, tmp_path, row):
    """SIGKILL from another process once metrics.jsonl has `row` rows, at an arbitrary point of the run."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "tracereward", *bench.words("full", output)]
    metrics = output / "metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(60_000):
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= row:
                break
            try:
                process.wait(timeout=0.005)
            except subprocess.TimeoutExpired:
                continue
            break
        process.kill()
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same(output, bench.reference("full"))


def test_incomplete_checkpoint_is_ignored_and_removed(bench, tmp_path):
    """Even the newest one, with all files except the completion mark."""
    output = tmp_path / "run"
    launcher()(*bench.words("full", output), trap=UNMARKED)
    unfinished = output / "checkpoints" / "checkpoint-4"
    assert (unfinished / "optimizer.pt").exists()
    stop = launcher()(*bench.words("full", output), "--resume", trap=trap("open", "metrics.jsonl", 1))
    assert stop.code == -signal.SIGKILL
    assert f"resuming from {output}/checkpoints/checkpoint-2" in stop.err
    assert not unfinished.exists()


def test_resuming_finished_run_does_not_train(bench, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(bench.reference("full"), output)
    again = launcher()(*bench.words("full", output), "--resume")
    assert again.code == 0, again.err
    assert_same(output, bench.reference("full"))


@pytest.mark.parametrize(
    ("name", "number", "where", "left"),
    [
        ("full", signal.SIGINT, MID_WARM_UP, []),
        ("sft", signal.SIGTERM, trap("open", "metrics.jsonl", 2), ["checkpoint-2", "checkpoint-3"]),
        pytest.param("full", signal.SIGTERM, POOL, [], marks=pytest.mark.slow),
        pytest.param(
            "full",
            signal.SIGTERM,
            trap("open", "metrics.jsonl", 8),
            ["checkpoint-2", "checkpoint-3"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "lora",
            signal.SIGINT,
            trap("open", "metrics.jsonl", 8),
            ["checkpoint-2", "checkpoint-3"],
            marks=pytest.mark.slow,
        ),
        # Stopped in step 5, the first of two on its rollouts: it can only save after step 6.
        pytest.param(
            "two-steps-a-batch",
            signal.SIGINT,
            trap("open", "metrics.jsonl", 10),
            ["checkpoint-4", "checkpoint-6"],
            marks=pytest.mark.long,
        ),
    ],
    ids=describe,
)
def test_interrupted_run_saves_and_resumes(bench, tmp_path, name, number, where, left):
    output = tmp_path / "run"
    stopped = launcher()(*bench.words(name, output), trap={**where, "number": int(number)})
    assert stopped.code == 130, stopped.err
    assert "--resume" in sentence(stopped)
    assert "Traceback" not in stopped.err
    assert whole_checkpoints(output) == left
    if where == MID_WARM_UP:
        assert [row.get("update") for row in rows(output / "metrics.jsonl")] == [1, 2, 3, 4], "no step after a stop"
    resumed = launcher()(*bench.words(name, output), "--resume")
    assert resumed.code == 0, resumed.err
    assert_same(output, bench.reference(name))


def test_sampling_resumes_after_kill(bench, tmp_path, tiny_model_folder):
    command = ["sample", tiny_model_folder, "--task", "arithmetic", "--data", bench.given["dataset_name"], "-n", 2,
               "--max-new-tokens", 8, "--batch-size", 4, "-o"]  # fmt: skip
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert launcher()(*command, whole).code == 0
    assert len(rows(whole)) == 20
    assert launcher()(*command, cut, trap=trap("rename", "cut.jsonl")).code == -signal.SIGKILL
    part = tmp_path / "cut.jsonl.part"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:14]) + lines[14][:20])  # as if killed in the middle of a chunk and a line
    assert not cut.exists()
    resumed = launcher()(*command, cut, "--resume")
    assert resumed.code == 0
    assert "resuming after 6 questions" in resumed.err
    assert cut.read_bytes() == whole.read_bytes()
    assert not part.exists()
    finished = launcher()(*command, cut, "--resume")
    assert (finished.code, finished.err) == (0, f"{cut} is finished\n")
    interrupted = launcher()(*command, cut, "--overwrite", trap=trap("open", "cut.jsonl.part", number=signal.SIGINT))
    assert interrupted.code == 130
    assert "interrupted" in interrupted.err
    assert "Traceback" not in interrupted.err
    assert cut.read_bytes() == whole.read_bytes()


# Disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 12 MB, which the tests fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("where", "leave", "left"),
    [
        (trap("open", "metrics.jsonl", 3), 0, "No checkpoint was completed"),
        pytest.param(
            trap("open", "checkpoint-4/config.json"),
            200_000,
            "The last complete checkpoint is checkpoint-2",
            marks=pytest.mark.long,
        ),
        pytest.param(
            trap("open", ".tmp/config.json"),  # of the final policy
            200_000,
            "The last complete checkpoint is checkpoint-6",
            marks=pytest.mark.slow,
        ),
    ],
    ids=describe,
)
def test_run_stopped_by_full_disk_resumes(bench, small_disk, where, leave, left):
    output, ballast = small_disk / "run", small_disk / "ballast"
    full = launcher()(*bench.words("full", output), trap={**where, "fill": str(ballast), "leave": leave})
    assert full.code == 1, full.err
    last = sentence(full)
    assert f"the disk of {output} is full" in last
    assert left in last
    assert "--resume" in last
    assert "Traceback" not in full.err
    assert full.out == ""
    assert not (output / "policy").exists()
    assert not (output / "report.html").exists()
    ballast.unlink()
    resumed = launcher()(*bench.words("full", output), "--resume")
    assert resumed.code == 0, resumed.err
    assert_same(output, bench.reference("full"))


def test_insufficient_disk_is_reported_before_training(bench, small_disk):
    (small_disk / "ballast").write_bytes(bytes(6_000_000))
    refused = launcher()(*bench.words("full", small_disk / "run"))
    assert refused.code == 2
    last = sentence(refused)
    assert "MB free" in last
    assert "MB needed" in last
    assert refused.out == ""
    assert not (small_disk / "run").exists()


def test_full_disk_while_sampling(bench, small_disk, tiny_model_folder):
    output, ballast = small_disk / "samples.jsonl", small_disk / "ballast"
    command = ["sample", tiny_model_folder, "--task", "arithmetic", "--data", bench.given["dataset_name"], "-n", 2,
               "--max-new-tokens", 8, "--batch-size", 4, "-o", output]  # fmt: skip
    full = launcher()(*command, trap=trap("open", "samples.jsonl.part", fill=ballast))
    assert full.code == 1
    assert f"the disk of {small_disk} is full" in full.err
    assert "Traceback" not in full.err
    assert not output.exists()
    ballast.unlink()
    assert launcher()(*command, "--resume").code == 0
    assert len(rows(output)) == 20


# Numbers that are not finite


@pytest.mark.parametrize(
    ("name", "changed", "message", "left"),
    [
        # Learning-rate warm-up gives step 1 a rate of 0 and step 2 an excessive one.
        (
            "full",
            {"learning_rate": 1e30, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4, "save_steps": 1},
            "token probabilities are not finite at step 3",
            ["checkpoint-1", "checkpoint-2"],
        ),
        (
            "sft",
            {"learning_rate": 1e30, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4, "save_steps": 1},
            "the policy's loss is nan at step 3",
            ["checkpoint-1", "checkpoint-2"],
        ),
        (
            "sft",
            {"weight_decay": 1e38, "learning_rate": 1e30, "warmup_steps": 0, "save_steps": 1},
            "are not finite after step 1",
            [],
        ),
        (
            "full",
            {"discriminator_learning_rate": 1e30},
            "the norm of the discriminator's gradient is nan at its update 2",
            [],
        ),
    ],
    ids=["policy", "sft", "weights", "discriminator"],
)
def test_non_finite_numbers_stop_run(bench, tmp_path, name, changed, message, left):
    output = tmp_path / "run"
    failed = launcher()(*bench.words(name, output, **changed))
    assert failed.code == 1, failed.err
    last = sentence(failed)
    assert message in last
    assert (f"The last complete checkpoint is {left[-1]}" if left else "No checkpoint was completed") in last
    assert "Traceback" not in failed.err
    assert failed.out == ""
    assert whole_checkpoints(output) == left
    for checkpoint in left:
        for name_, tensor in load_file(output / "checkpoints" / checkpoint / "model.safetensors").items():
            assert torch.isfinite(tensor).all(), name_
    assert not (output / "policy").exists()


# Options


def test_saved_options_reproduce_run(bench, tmp_path):
    output = tmp_path / "again"
    again = launcher()("train", "--config", bench.reference("lora") / "config.yaml", "--output_dir", output)
    assert again.code == 0, again.err
    assert_same(output, bench.reference("lora"))


def test_run_is_not_overwritten_or_resumed_with_other_options(bench):
    output = bench.reference("full")
    before = result(output)[1]
    over = launcher()(*bench.words("full", output))
    assert over.code == 2
    assert "already has a run" in over.err
    assert "--resume" in over.err
    other = launcher()(*bench.words("full", output, learning_rate=2e-3, beta_clip=4.0), "--resume")
    assert other.code == 2
    last = sentence(other)
    assert "learning_rate: 0.001 before, 0.002 now" in last
    assert "beta_clip: 5.0 before, 4.0 now" in last
    assert "Traceback" not in over.err + other.err
    assert result(output)[1] == before
    assert json.loads(json.dumps(yaml.safe_load((output / "config.yaml").read_text())))["learning_rate"] == 0.001
