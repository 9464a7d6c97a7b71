"""Scoring into Parquet shards: their content, and that each row is written exactly once if a process is killed.

Most tests run the worker in this process instead of Ray (`here`); those at the end start their own Ray cluster.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow
import pytest
import torch
from filelock import FileLock
from pyarrow import parquet

from helpers.tiny import rows
from helpers.unloadable import unloadable
from tracereward.cli import app
from tracereward.commands import score, score_ray, score_shards
from tracereward.data.trace_rows import candidate_rows
from tracereward.errors import RunFailed
from tracereward.files import write_jsonl
from tracereward.rewards.calibration import Calibration
from tracereward.rewards.first_error_rules import FirstErrorRule
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings, write_fitted

ROWS = 4
TOO_LONG = {"prompt": "1 + 1 = ?\n", "completion": "\n" * 200}  # the tiny model has 128 positions


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_model_folder, tokenizer, experts):
    """A reward model, one with unloadable weights, and fifty rows of three kinds, some with extra columns."""
    folder = tmp_path_factory.mktemp("ray")
    model = TokenRewardModel.from_backbone(str(tiny_model_folder), RewardSettings(task="arithmetic"), tokenizer)
    with torch.no_grad():
        model.head.w.copy_(torch.linspace(-1, 1, len(model.head.w)))
    model.save_pretrained(folder / "model")
    unloadable(folder / "model", folder / "bare")
    mixed = []
    for n, row in enumerate((experts * 5)[:50]):
        lines = row["completion"].split("\n")
        forms = [{"completion": row["completion"]}, {"steps": lines}, {"candidates": [*lines, row["completion"]][:3]}]
        late = {} if n < 30 else {"meta": {"n": n} if n % 2 else {"by": ["x"]}, "share": n if n < 40 else n / 7}
        mixed.append(
            {"n": n, "prompt": row["prompt"], **forms[n % 3], "answer": row["answer"] if n % 4 else None, **late}
        )
    write_jsonl(folder / "rows.jsonl", mixed)
    return SimpleNamespace(
        folder=folder,
        policy=tiny_model_folder,
        model=folder / "model",
        bare=folder / "bare",
        data=folder / "rows.jsonl",
    )


@pytest.fixture
def command(monkeypatch, capsys):
    """`command(word, ...)` runs the CLI in this process; returns exit code, stdout and stderr."""

    def run(*argv: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["tracereward", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app.main()
        captured = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def here(monkeypatch):
    """Score shards of four rows in this process; the value is the list of scored shards."""
    scored: list[int] = []

    def run(job: score_ray.Job, shards: list[int]) -> Iterator[int]:
        worker = score_ray.ShardScorer(job)
        for shard in shards:
            values = worker({"shard": [shard]})
            scored.append(score_ray._finished({name: value[0] for name, value in values.items()}))
            yield shard

    monkeypatch.setattr(score_ray, "_require_ray", lambda: None)
    monkeypatch.setattr(score_ray, "_run", run)
    monkeypatch.setattr(score_shards, "SHARD_ROWS", ROWS)
    return scored


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def all_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of all shards; checks that the files have one schema and the folder has no unfinished files."""
    found = parts(folder)
    assert (
        len({parquet.read_schema(part).remove_metadata().to_string(show_schema_metadata=False) for part in found}) == 1
    )
    assert {path.name for path in folder.iterdir()} == {".lock", "manifest.json", *(part.name for part in found)}
    return [row for part in found for row in parquet.read_table(part).to_pylist()]


def without_nulls(value: Any) -> Any:
    """Drop null fields: Parquet has every column in every row."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def assert_close(given: Any, expected: Any) -> None:
    """Floats are within 1e-5, everything else is equal."""
    if isinstance(expected, dict):
        assert given.keys() == expected.keys()
        for name in expected:
            assert_close(given[name], expected[name])
    elif isinstance(expected, list):
        assert len(given) == len(expected)
        for one, other in zip(given, expected):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert given == pytest.approx(expected, abs=1e-5)
    else:
        assert given == expected


def assert_rejected(done: SimpleNamespace, *parts: object) -> None:
    assert done.code == 2, done.err
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if line.startswith("tracereward: ")]
    assert len(lines) == 1, done.err
    for text in parts:
        assert str(text) in lines[0]


def test_without_ray(command, bench, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = command("score", bench.bare, bench.data, "--engine", "ray", "-o", tmp_path / "scored")
    assert_rejected(done, "pip install 'tracereward[ray]'")
    assert not (tmp_path / "scored").exists()


@pytest.mark.parametrize(
    ("calibrated", "reference"),
    [(False, []), (True, []), (True, ["--reference"])],
    ids=["uncalibrated", "calibrated", "with reference"],
)
def test_shards_equal_output_of_default_engine(command, bench, here, tmp_path, monkeypatch, calibrated, reference):
    """Bitwise equal if both use the same batches: all kinds of rows, with columns that only some have."""
    model = tmp_path / "model"
    shutil.copytree(bench.model, model)
    if calibrated:
        write_fitted(model, calibration=Calibration("platt", 1.0, 0.5), first_error=FirstErrorRule(threshold=0.0))
    reference = [*reference, bench.policy] if reference else []  # a calibration applies to the reward without it
    monkeypatch.setattr(score, "CHUNK", ROWS)
    assert command("score", model, bench.data, *reference, "-o", tmp_path / "scored.jsonl").code == 0
    done = command("score", model, bench.data, *reference, "-o", tmp_path / "scored", "--engine", "ray")
    assert (done.code, done.out) == (0, ""), done.err
    assert "50 rows in 13 shards" in done.err
    expected = rows(tmp_path / "scored.jsonl")
    found = all_rows(tmp_path / "scored")
    assert [without_nulls(row) for row in found] == [without_nulls(row) for row in expected]
    shown = calibrated and not reference
    assert all(("probability" in without_nulls(row)) == (shown and "candidates" not in row) for row in expected)
    assert {"suspected_error" in row for row in expected if "candidates" not in row} == {shown}
    assert ("no probability" in done.err) == ("no suspected error" in done.err) == bool(reference)
    assert [parquet.read_metadata(part).num_rows for part in parts(tmp_path / "scored")] == [4] * 12 + [2]
    assert parquet.read_schema(parts(tmp_path / "scored")[0]).field("share").type == "double"


def test_scores_replace_columns_of_the_same_name(command, bench, here, tmp_path):
    """Rows that already have a reward, as text."""
    write_jsonl(tmp_path / "rows.jsonl", [{**row, "reward": "high"} for row in rows(bench.data)[::3]])
    done = command("score", bench.model, tmp_path / "rows.jsonl", "-o", tmp_path / "scored", "--engine", "ray")
    assert done.code == 0, done.err
    assert all(isinstance(row["reward"], float) for row in all_rows(tmp_path / "scored"))


def test_parquet_input(command, bench, here, tmp_path):
    """Results equal those of the same rows in JSON Lines."""
    data = tmp_path / "rows.parquet"
    plain = [{name: row[name] for name in ("n", "prompt", "completion")} for row in rows(bench.data)[::3]]
    write_jsonl(tmp_path / "rows.jsonl", plain)
    parquet.write_table(pyarrow.Table.from_pylist(plain), data)
    for source, output in ((data, "a"), (tmp_path / "rows.jsonl", "b")):
        assert command("score", bench.model, source, "-o", tmp_path / output, "--engine", "ray").code == 0
    assert all_rows(tmp_path / "a") == all_rows(tmp_path / "b")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab"]
    assert manifests[0]["data_sha256"] == manifests[1]["data_sha256"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1 + 2 = ?\n"}, ":51: needs a completion"),
        ({"prompt": "1 + 2 = ?\n", "completion": "#### 3", "n": "three"}, ":49 and the 2 rows after it: column 'n'"),
        ({"prompt": "1 + 2 = ?\n", "completion": "#### 3", "m": {}}, ":49 and the 2 rows after it: column 'm'"),
        ({"prompt": "1 + 2 = ?\n", "completion": "#### 3", "m": 2**70}, ":49 and the 2 rows after it: column 'm'"),
        ({"prompt": "1 + 2 = ?\n", "completion": "#### 3", "m": "\ud800"}, ":51: field 'm' has half of a surrogate"),
        ({"prompt": "1 + 2 = ?\n", "completion": "#### 3", "meta": 3}, ":49 and the 2 rows after it: column 'meta'"),
    ],
    ids=["no completion", "two types", "empty struct", "integer overflow", "invalid unicode", "number for object"],
)
def test_invalid_rows_raise_before_a_model_is_loaded(command, bench, here, tmp_path, row, message):
    data = tmp_path / "rows.jsonl"
    data.write_text(bench.data.read_text() + json.dumps(row) + "\n")
    done = command("score", bench.bare, data, "-o", tmp_path / "scored", "--engine", "ray")
    assert_rejected(done, f"{data}{message}")
    assert not (tmp_path / "scored").exists()


def test_no_rows(command, bench, here, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n")
    done = command("score", bench.bare, tmp_path / "rows.jsonl", "-o", tmp_path / "scored", "--engine", "ray")
    assert_rejected(done, "no rows")
    assert not (tmp_path / "scored").exists()


def test_invalid_outputs(command, bench, here, tmp_path):
    words = ["score", bench.bare, bench.data, "--engine", "ray"]
    assert_rejected(command(*words), "needs --output")
    assert_rejected(command(*words, "-o", tmp_path / "no" / "scored"), "does not exist")
    assert_rejected(command(*words, "-o", bench.data), "is a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert_rejected(command(*words, "-o", tmp_path / "full", "--resume"), "thesis.tex", "choose another --output")
    (tmp_path / "busy").mkdir()
    with FileLock(tmp_path / "busy" / ".lock"):
        assert_rejected(command(*words, "-o", tmp_path / "busy"), "another process")
    assert_rejected(command("score", bench.bare, bench.data, "--workers", 2), "--workers")


def test_resume_rejects_other_inputs(command, bench, here, tmp_path, monkeypatch):
    """Other rows, or other weights under the same name; the folder does not change."""
    model, data, output = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "scored"
    shutil.copytree(bench.model, model)
    shutil.copy(bench.data, data)
    words = ["score", model, data, "-o", output, "--engine", "ray"]
    assert command(*words).code == 0
    (output / "part-000003.parquet").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert_rejected(command(*words), "already has scores", "--resume")
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*lines[1:], lines[0]]))
    assert_rejected(command(*words, "--resume"), "other rows", "50 of", data, "choose another --output")
    data.write_text("".join(lines))
    trained_on = TokenRewardModel.from_pretrained(str(model))
    with torch.no_grad():
        trained_on.head.w.neg_()
    trained_on.save_pretrained(model)
    assert_rejected(command(*words, "--resume"), "another reward model", model)
    shutil.rmtree(model)
    shutil.copytree(bench.model, model)
    assert_rejected(command(*words, "--resume", "--reference", bench.policy), "another --reference", "None")
    monkeypatch.setattr(score_shards, "SHARD_ROWS", 5)
    assert_rejected(command(*words, "--resume"), "4 rows per shard")
    monkeypatch.setattr(score_shards, "SHARD_ROWS", ROWS)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    manifest = (output / "manifest.json").read_text()
    (output / "manifest.json").write_text(manifest[:-20])
    assert_rejected(command(*words, "--resume"), "damaged")
    (output / "manifest.json").write_text(manifest)
    here.clear()
    assert command(*words, "--resume").code == 0
    assert here == [3]


def test_resume_scores_missing_shards(command, bench, here, tmp_path):
    """And removes unfinished files of a killed run. The data file may be renamed or moved."""
    output = tmp_path / "scored"
    assert command("score", bench.model, bench.data, "-o", output, "--engine", "ray").code == 0
    complete = all_rows(output)
    for n in (0, 7, 12):
        (output / f"part-{n:06d}.parquet").unlink()
    (output / ".part-000007.parquet.abc.tmp").write_bytes(b"PAR1")
    (output / ".todo.abc.tmp").mkdir()
    (output / ".todo.abc.tmp" / "000007.jsonl").write_text("")
    before = {part.name: (part.stat().st_ino, part.stat().st_mtime_ns) for part in parts(output)}
    here.clear()
    shutil.copy(bench.data, tmp_path / "moved.jsonl")
    words = ["score", bench.model, tmp_path / "moved.jsonl", "-o", output, "--engine", "ray", "--resume"]
    done = command(*words)
    assert done.code == 0, done.err
    assert "resuming after 10 of 13 shards" in done.err
    assert here == [0, 7, 12]
    assert before.items() <= {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in parts(output)}.items()
    assert all_rows(output) == complete
    here.clear()
    done = command(*words)
    assert (done.code, here) == (0, [])
    assert f"{output} is finished" in done.err


def test_every_run_reports_skipped_rows(command, bench, here, tmp_path):
    """Rows without a trace, and rows that are too long once tokenized."""
    given = rows(bench.data)
    given[5:5] = [{"prompt": "1 + 1 = ?\n"}, TOO_LONG]
    data, output = tmp_path / "rows.jsonl", tmp_path / "scored"
    write_jsonl(data, given)
    words = ["score", bench.model, data, "-o", output, "--engine", "ray"]
    assert_rejected(command(*words), f"{data}:6: ", "needs a completion")
    del given[5]
    write_jsonl(tmp_path / "long.jsonl", given)
    assert_rejected(
        command("score", bench.model, tmp_path / "long.jsonl", "-o", tmp_path / "long", "--engine", "ray"),
        f"{tmp_path / 'long.jsonl'}:6: ",
        "the reward model reads 128",
    )
    for resume in ([], ["--resume"]):
        done = command(*words, "--skip-bad", *resume)
        assert done.code == 0, done.err
        reported = [line for line in done.err.splitlines() if line.startswith("skipped: ")]
        assert len(reported) == 2
        assert f"{data}:6: " in reported[0]
        assert f"{data}:7: " in reported[1]
        assert "50 rows in 13 shards" in done.err
    assert [row["n"] for row in all_rows(output)] == list(range(50))


def test_crashing_shard_is_given_up_after_three_attempts(bench, tmp_path):
    """A finished shard costs no attempt."""
    todo = tmp_path / "todo"
    todo.mkdir()
    (todo / "000002.jsonl").write_text(json.dumps(["rows:1", {"prompt": "1 + 2 = ?\n", "completion": "#### 3"}]) + "\n")
    job = score_ray.Job(
        folder=tmp_path,
        todo=todo,
        options=score.ScoreOptions(model=str(bench.bare), data="rows"),
        schema=pyarrow.schema([]),
    )
    for _ in range(3):
        with pytest.raises(Exception, match="were to be loaded"):  # stands in for a crash
            score_ray.ShardScorer(job).score(2)
    with pytest.raises(RunFailed, match=r"shard 2 crashed its worker 3 times"):
        score_ray.ShardScorer(job).score(2)
    (tmp_path / "part-000002.parquet").touch()
    score_ray.ShardScorer(job).score(2)


def test_full_disk(command, bench, here, tmp_path, monkeypatch):
    """The disk fills up in the third shard: finished shards stay, and the message says how to resume."""
    write_table, output = parquet.write_table, tmp_path / "scored"

    def full(table, file, **options):
        if len(parts(output)) == 2 and table.num_rows:
            with open("/dev/full", "wb", buffering=0) as file:
                write_table(table, file, **options)
        write_table(table, file, **options)

    monkeypatch.setattr(parquet, "write_table", full)
    words = ["score", bench.model, bench.data, "-o", output, "--engine", "ray"]
    done = command(*words)
    assert (done.code, done.out) == (1, "")
    last = done.err.splitlines()[-1]
    assert f"the disk of {output} is full" in last
    assert "--resume" in last
    assert {path.name for path in output.iterdir()} == {
        ".lock", "manifest.json", "part-000000.parquet", "part-000001.parquet"
    }  # fmt: skip


# With Ray

PROGRAM = f"""
import sys
from tracereward.cli.app import main
from tracereward.commands import score_shards
score_shards.SHARD_ROWS = {ROWS}
sys.argv[0] = "tracereward"
main()
"""
CLUSTER = """
import sys
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 * 2**20)
print("ADDRESS", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""

# Without an explicit token Ray stores one in the home folder; each process needs the same settings.
RAY_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5eed" * 16}


@contextmanager
def process(code: str, *argv: object, **options: Any) -> Iterator[subprocess.Popen]:
    """Run a Python process; afterwards it and its descendants are killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **RAY_SETTINGS, **options.pop("env", {})}
    started = subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], env=environment, text=True, **options)
    family: dict[int, psutil.Process] = {}

    def look() -> None:
        with suppress(psutil.NoSuchProcess):
            family.update({child.pid: child for child in psutil.Process(started.pid).children(recursive=True)})

    started.look = look  # must be called before the parent is killed, since its children are then unknown
    try:
        yield started
    finally:
        look()
        started.kill()
        started.wait()
        for child in family.values():
            with suppress(psutil.NoSuchProcess):
                child.kill()
        assert not psutil.wait_procs(family.values(), timeout=30)[1]


def wait_for(found: Callable[[], Any], running: subprocess.Popen, seconds: float = 240) -> Any:
    """Poll `found()` until it is true, while `running` runs."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert running.poll() is None, f"ended with {running.returncode}"
        assert time.monotonic() < end
        time.sleep(0.005)
    return value


def hold_a_worker(folder: Path, driver: subprocess.Popen) -> tuple[int, int]:
    """Suspend a worker while it scores a shard; return its pid and the shard."""

    def held() -> tuple[int, int] | None:
        for mark in sorted(folder.glob(".todo.*.tmp/*.attempt-0")):
            shard = int(mark.name.split(".")[0])
            words = mark.read_text().split()
            if not words or (folder / f"part-{shard:06d}.parquet").exists():
                continue
            worker = psutil.Process(int(words[0]))
            worker.suspend()
            wait_for(lambda worker=worker: worker.status() == psutil.STATUS_STOPPED, driver)
            if not (folder / f"part-{shard:06d}.parquet").exists():
                return worker.pid, shard
            worker.resume()
        return None

    return wait_for(held, driver)


@pytest.fixture(scope="module")
def expected(bench, tmp_path_factory):
    """Output of the default engine."""
    model = TokenRewardModel.from_pretrained(str(bench.model))
    scored = score.score_rows(model, candidate_rows(str(bench.data)))
    return [without_nulls(json.loads(json.dumps(row))) for row in scored]


def assert_scored_once(folder: Path, expected: list[dict[str, Any]]) -> None:
    found = all_rows(folder)
    assert [row["n"] for row in found] == list(range(50))
    assert_close([without_nulls(row) for row in found], expected)


@pytest.mark.slow
def test_killed_worker(bench, expected, tmp_path):
    """SIGKILL in an unfinished shard, while others are finished; the shard is scored by another worker."""
    pytest.importorskip("ray", reason="Ray is not installed")
    output = tmp_path / "scored"
    words = ["score", bench.model, bench.data, "-o", output, "--engine", "ray", "--workers", 2]
    with process(PROGRAM, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as driver:
        pid, shard = hold_a_worker(output, driver)
        wait_for(lambda: len(parts(output)) >= 2, driver)
        assert not (output / f"part-{shard:06d}.parquet").exists()
        driver.look()
        os.kill(pid, signal.SIGKILL)
        out, err = driver.communicate(timeout=240)
        assert (driver.returncode, out) == (0, ""), err
        assert "50 rows in 13 shards" in err
    assert_scored_once(output, expected)


@pytest.mark.slow
def test_killed_driver(bench, expected, tmp_path):
    """SIGKILL when some shards are finished and one is started; --resume does not touch the finished ones."""
    pytest.importorskip("ray", reason="Ray is not installed")
    output = tmp_path / "scored"
    words = ["score", bench.model, bench.data, "-o", output, "--engine", "ray", "--workers", 2]
    with process(PROGRAM, *words, stderr=subprocess.DEVNULL) as driver:
        _, shard = hold_a_worker(output, driver)
        wait_for(lambda: len(parts(output)) >= 3, driver)
        driver.look()
        driver.kill()
    before = {part.name: (part.stat().st_ino, part.stat().st_mtime_ns) for part in parts(output)}
    assert 3 <= len(before) < 13
    assert f"part-{shard:06d}.parquet" not in before
    with process(PROGRAM, *words, "--resume", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as driver:
        out, err = driver.communicate(timeout=240)
        assert (driver.returncode, out) == (0, ""), err
    assert f"resuming after {len(before)} of 13 shards" in err
    assert before.items() <= {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in parts(output)}.items()
    assert_scored_once(output, expected)


@pytest.mark.slow
def test_existing_cluster(bench, expected, tmp_path):
    """Commands in another folder use the cluster, which keeps running afterwards."""
    pytest.importorskip("ray", reason="Ray is not installed")
    (tmp_path / "elsewhere").mkdir()
    with process(CLUSTER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path / "elsewhere") as cluster:
        assert cluster.stdout is not None
        address = next(line.split()[1] for line in cluster.stdout if line.startswith("ADDRESS "))
        where = {"env": {"RAY_ADDRESS": address}, "cwd": bench.folder}
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        write_jsonl(bench.folder / "long.jsonl", [*rows(bench.data)[:6], TOO_LONG])
        words = ["--engine", "ray", "--workers", 2]
        with process(PROGRAM, "score", "model", "rows.jsonl", "-o", "scored", *words, **where, **piped) as driver:
            _, err = driver.communicate(timeout=240)
            assert driver.returncode == 0, err
        assert_scored_once(bench.folder / "scored", expected)
        with process(PROGRAM, "score", "model", "long.jsonl", "-o", "long", *words, **where, **piped) as driver:
            out, err = driver.communicate(timeout=240)
            assert (driver.returncode, out) == (2, ""), err
        assert err.splitlines()[-1].startswith("tracereward: long.jsonl:7: ")
        assert cluster.poll() is None
