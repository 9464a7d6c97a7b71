"""Runs on two processes that fail, are killed and resume, with the same or another number of processes.

All of it:

    pytest tests/runs/test_processes.py -m "slow or not slow" -n 0
"""

import contextlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from helpers.faults import TRAIN, sentence, whole_checkpoints
from helpers.sharded import launch
from helpers.tiny import Result, assert_same, launcher, options, rows, trap
from tracereward.errors import RunFailed
from tracereward.files import write_jsonl
from tracereward.training import callbacks

# In a run of `train` the first six rows of metrics.jsonl are the warm-up's.
MID_WARM_UP = trap("open", "metrics.jsonl", 4, other=True)
AFTER_CHECKPOINT = trap("open", "metrics.jsonl", 9, other=True)


class Bench:
    """Data, a model, and an uninterrupted run of two processes."""

    def __init__(self, folder: Path, model: Path):
        self.folder = folder
        self.given = {**TRAIN, "per_device_train_batch_size": 4, "model_name_or_path": model}
        self.given["dataset_name"] = folder / "experts.jsonl"
        self.first: list[Result] = []

    def words(self, output: Path, **changed: object) -> list[str]:
        """The command line of each process."""
        return ["train", *options(**{**self.given, "output_dir": output, **changed})]

    def reference(self) -> Path:
        """The uninterrupted run; made once, without ``--resume``."""
        output = self.folder / "reference"
        if not self.first:
            self.first = launcher().two(*self.words(output))
        assert [ended.code for ended in self.first] == [0, 0], said(self.first)
        return output


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_model_folder, experts):
    folder = tmp_path_factory.mktemp("processes")
    write_jsonl(folder / "experts.jsonl", experts[:10])
    return Bench(folder, tiny_model_folder)


def said(ended: list[Result]) -> str:
    return "\n".join(result.err[-4000:] for result in ended)


def refused(ended: list[Result]) -> str:
    """The message of the processes that the launcher did not end; all must be equal."""
    assert {result.code for result in ended} in ({2}, {2, -signal.SIGTERM}), said(ended)
    assert "Traceback" not in said(ended)
    [words] = {sentence(result) for result in ended if result.code == 2}
    return words


def test_new_run_needs_no_resume_and_is_not_overwritten(bench):
    """One process creates the folder; the other must not take it for an existing run."""
    output = bench.reference()
    assert bench.first[0].out.splitlines() == [str(output / part) for part in ("policy", "reward_model", "report.html")]
    assert bench.first[1].out == ""
    assert (output / "checkpoints" / "checkpoint-6" / "rng_state_1.pth").exists(), "there was one process only"
    before = (output / "metrics.jsonl").read_bytes()
    words = refused(launcher().two(*bench.words(output)))
    assert f"{output} already has a run" in words
    assert "--resume" in words
    assert (output / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("where", "left"),
    [
        pytest.param(AFTER_CHECKPOINT, ["checkpoint-2"], marks=pytest.mark.long),
        pytest.param(MID_WARM_UP, [], marks=pytest.mark.slow),
    ],
)
def test_survivor_of_killed_process_reports_how_to_resume(bench, tmp_path, where, left):
    output = tmp_path / "run"
    other, killed = launcher().two(*bench.words(output), traps=(where, None))
    assert (other.code, killed.code) == (1, -signal.SIGKILL), said([other, killed])
    last = sentence(other)
    assert "another process of this run ended after step" in last
    assert "--resume" in last
    assert (f"The last complete checkpoint is {left[-1]}" if left else "No checkpoint was completed") in last
    assert "Traceback" not in other.err
    assert whole_checkpoints(output) == left
    resumed = launcher().two(*bench.words(output), "--resume")
    assert [ended.code for ended in resumed] == [0, 0], said(resumed)
    assert_same(output, bench.reference())


@pytest.mark.parametrize(
    ("where", "left"),
    [
        (trap("open", "metrics.jsonl", 8, signal.SIGTERM, other=True), ["checkpoint-2", "checkpoint-3"]),
        pytest.param({**MID_WARM_UP, "number": int(signal.SIGTERM)}, [], marks=pytest.mark.slow),
    ],
)
def test_signal_to_one_process_stops_both_at_same_step(bench, tmp_path, where, left):
    output = tmp_path / "run"
    stopped = launcher().two(*bench.words(output), traps=(where, None))
    # The launcher ends the other process after the first, possibly before it reports the same.
    assert {result.code for result in stopped} in ({130}, {130, -signal.SIGTERM}), said(stopped)
    [words] = {sentence(result) for result in stopped if result.code == 130}
    assert f"stopped at step {3 if left else 0} of 6" in words
    assert "--resume" in words
    assert "Traceback" not in said(stopped)
    assert whole_checkpoints(output) == left
    resumed = launcher().two(*bench.words(output), "--resume")
    assert [ended.code for ended in resumed] == [0, 0], said(resumed)
    assert_same(output, bench.reference())


@pytest.mark.long
def test_run_resumes_with_other_process_count_and_same_batch(bench, tmp_path):
    output = tmp_path / "run"
    launcher().two(*bench.words(output), traps=(AFTER_CHECKPOINT, None))
    half = launcher()(*bench.words(output), "--resume")
    words = refused([half])
    assert "8 rows per optimiser step, this command has 4 (1 processes)" in words
    assert "--per_device_train_batch_size" in words
    more = launcher()(*bench.words(output, per_device_train_batch_size=8, steps_per_generation=2), "--resume")
    words = refused([more])
    assert "8 rollouts per generation, this command has 16" in words
    assert "--steps_per_generation" in words
    alone = launcher()(*bench.words(output, per_device_train_batch_size=8), "--resume")
    assert alone.code == 0, alone.err
    assert f"resuming from {output}/checkpoints/checkpoint-2" in alone.err
    kept = [row for row in rows(output / "metrics.jsonl") if row["phase"] == "train"]
    assert [row["step"] for row in kept] == [1, 2, 3, 4, 5, 6]
    assert (output / "policy" / "model.safetensors").is_file()


@pytest.mark.slow
def test_launcher_ends_run_after_process_is_killed(bench, tmp_path):
    output, text = tmp_path / "run", tmp_path / "output.txt"
    where: dict[str, Any] = {**AFTER_CHECKPOINT, "other": False}
    code = launch("ddp", "--", *bench.words(output), output=text, trap=where)
    assert code not in (0, "timed out")
    assert "ChildFailedError" in text.read_text()
    assert "tracereward: another process of this run ended after step" in text.read_text()
    assert whole_checkpoints(output) == ["checkpoint-2"]
    code = launch("ddp", "--", *bench.words(output), "--resume", output=text)
    assert code == 0, text.read_text()[-4000:]
    assert_same(output, bench.reference())
    assert json.loads((output / "checkpoints" / "batch.json").read_text()) == {"rows": 8, "rollouts": 8}


@pytest.mark.parametrize(("distributed", "fails"), [(True, True), (True, False), (False, True)])
def test_failed_process_reports_error_despite_launcher_signal(monkeypatch, distributed, fails):
    """Regression: on a slow machine SIGTERM ended the process between training and its error message."""
    monkeypatch.setattr(callbacks.dist, "is_initialized", lambda: distributed)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(RunFailed), callbacks.StopSignal():
            if fails:
                raise RunFailed("another process is gone")
        after = signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert after == (signal.SIG_IGN if distributed and fails else signal.default_int_handler)
