"""What commands write: nothing that is there is lost, and any text can be written to any stream."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from helpers.any_text import any_text  # noqa: F401
from helpers.command_line import bench, command, refused  # noqa: F401
from helpers.tiny import launcher, rows, trap
from tracereward.cli import app
from tracereward.commands import score
from tracereward.errors import InputError
from tracereward.evaluate.suites import Results
from tracereward.files import write_jsonl

ROW = {"prompt": "1 + 2 = ?\n", "completion": "1 + 2 = 3\n#### 3", "answer": "3", "logprob": -1.0}
KEPT = "made before\n"


@pytest.fixture
def data(tmp_path):
    """Rows that every command reads."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [ROW, {**ROW, "prompt": "1 + 3 = ?\n"}])
    return path


def commands(bench, data: Path) -> dict[str, list[object]]:
    """Commands that write a file, with models that cannot be loaded."""
    policy, reward_model = bench.bare, bench.bare_reward
    sample = ["sample", policy, "--task", "arithmetic", "--data", data]
    return {
        "sample": sample,
        "guided": [*sample, "--guide", "beam", "--reward-model", reward_model],
        "score": ["score", reward_model, data],
        "correct": ["correct", policy, data, "--reward-model", reward_model],
        "rerank": ["rerank", reward_model, data],
        "inspect": ["inspect", data, "--model", reward_model],
    }


RESUMED = ["sample", "guided", "score", "correct"]


@pytest.mark.parametrize("name", [*RESUMED, "rerank", "inspect"])
def test_existing_output_is_not_replaced(command, bench, data, tmp_path, name):
    output = tmp_path / "out"
    output.write_text(KEPT)
    refused(command(*commands(bench, data)[name], "-o", output), output, "exists already", "--overwrite")
    assert output.read_text() == KEPT
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")  # replacing a broken link would lose it
    refused(command(*commands(bench, data)[name], "-o", link), "--overwrite")


@pytest.mark.parametrize("name", [*RESUMED, "rerank"])
def test_unfinished_output_is_not_discarded(command, bench, data, tmp_path, name):
    output, part = tmp_path / "out", tmp_path / "out.part"
    part.write_text(KEPT)
    fixes = ["--resume", "--overwrite"] if name in RESUMED else ["--overwrite"]
    refused(command(*commands(bench, data)[name], "-o", output), part, "unfinished", *fixes)
    if name in RESUMED:  # the finished rows of an earlier command, and the unfinished ones of another
        output.write_text(KEPT)
        refused(command(*commands(bench, data)[name], "-o", output, "--resume"), output, "--overwrite")
        assert output.read_text() == KEPT
    assert part.read_text() == KEPT


@pytest.mark.parametrize("name", [*RESUMED, "rerank", "inspect"])
def test_output_is_never_an_input(command, bench, data, tmp_path, name):
    """Under any name, with --overwrite too; and the names that a command itself writes to."""
    words = commands(bench, data)[name]
    (tmp_path / "symbolic").symlink_to(data)
    os.link(data, tmp_path / "hard")
    before = data.read_bytes()
    config = (bench.bare if name in ("sample", "guided", "correct") else bench.bare_reward) / "config.json"
    for output in (data, tmp_path / "symbolic", tmp_path / "hard", tmp_path / "." / "rows.jsonl", config):
        refused(command(*words, "-o", output, "--overwrite"), output, "is read by this command")
    assert data.read_bytes() == before
    if name != "inspect":
        part = tmp_path / "new.jsonl.part"
        part.write_bytes(before)
        words[words.index(data)] = part.rename(tmp_path / "new.jsonl.part")
        linked = tmp_path / "given.jsonl"
        os.link(part, linked)
        words[words.index(part)] = linked
        refused(command(*words, "-o", tmp_path / "new.jsonl", "--overwrite"), part, "is read by this command")
        assert linked.read_bytes() == before


def test_overwriting_replaces_only_when_complete(command, bench, data, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text(KEPT)
    words = ["score", bench.reward_model, data, "-o", output]
    killed = launcher()(*words, "--overwrite", trap=trap("rename", "out.jsonl"))
    assert killed.code == -signal.SIGKILL
    assert output.read_text() == KEPT
    assert command(*words, "--resume", "--overwrite").code == 0
    assert [row["prompt"] for row in rows(output)] == ["1 + 2 = ?\n", "1 + 3 = ?\n"]
    for name, given in (("chosen", ["rerank", bench.reward_model, data]), ("page", ["inspect", output])):
        written = tmp_path / name
        written.write_text(KEPT)
        assert command(*given, "-o", written, "--overwrite").code == 0
        assert KEPT not in written.read_text()
    assert not list(tmp_path.glob("*.part*"))


def test_options_of_a_file_need_one(command, bench, data):
    for name, words in commands(bench, data).items():
        for where in ([], ["-o", "-"]) if name != "inspect" else ([],):
            refused(command(*words, *where, "--overwrite"), "--overwrite needs --output")
    refused(command(*commands(bench, data)["score"], "-o", "-", "--resume"), "--resume needs --output")


def test_devices_are_not_replaced(command, bench, data, tmp_path):
    """A rename over /dev/null would break the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for name, words in commands(bench, data).items():
        for path in (pipe, "/dev/null"):
            refused(command(*words, "-o", path, "--overwrite"), path, "redirect stdout")
        assert not Path("/dev/null.part").exists(), name


def test_interrupted_rows_are_kept_and_named(command, bench, data, tmp_path, monkeypatch):
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    words = ["score", bench.reward_model, data, "-o", output]
    write, left = score.write_row, [1]

    def interrupted(file, row):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        write(file, row)

    monkeypatch.setattr(score, "write_row", interrupted)
    stopped = command(*words)
    assert (stopped.code, len(rows(part))) == (130, 1)
    last = stopped.err.splitlines()[-1]
    assert str(part) in last
    assert "--resume" in last
    part.unlink()
    assert command(*words).code == 130  # before the first row: nothing is left in the way of the next run
    assert not list(tmp_path.glob("out*"))


def test_folders_are_not_replaced(command, bench, data, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text(KEPT)
    export = ["export", bench.bare_reward, "--data", data, "-o"]
    refused(command(*export, other), other, "--overwrite")
    refused(command(*export, other, "--overwrite"), "is not a reward model")
    refused(command(*export, bench.bare_reward, "--overwrite"), "is read by this command")
    refused(command("quickstart", "-o", other), other, "quickstart.json")
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    for suite, words in {
        "pool": [bench.bare_reward, data],
        "processbench": [bench.bare_reward, data],
        "perturbation": [bench.bare_reward, data],
        "policy": [bench.bare, "--data", data],
        "guided": [bench.bare, "--reward-model", bench.bare_reward, "--data", data],
    }.items():
        for suffix in ("json", "html"):
            folder = tmp_path / f"{suite}-{suffix}"
            folder.mkdir()
            (folder / f"{suite}.{suffix}").write_text(KEPT)
            given = ["evaluate", suite, *words, "-o", folder]
            refused(command(*given), folder / f"{suite}.{suffix}", "--overwrite")
            assert (folder / f"{suite}.{suffix}").read_text() == KEPT


def test_results_of_other_inputs_are_kept_in_the_same_folder(tmp_path):
    def stored(name: str, **result: object) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps(result))

    stored("policy", policy="first", data="questions")
    assert Results(folder=tmp_path).checked("policy", "second", ["questions"]) == tmp_path / "policy-2"
    assert Results(folder=tmp_path).checked("policy", "first", ["other questions"]) == tmp_path / "policy-2"
    stored("policy-2", policy="second", data="questions")
    for model in ("first", "second"):
        with pytest.raises(InputError, match="exists already"):
            Results(folder=tmp_path).checked("policy", model, ["questions"])
    again = Results(folder=tmp_path, overwrite=True)
    assert again.checked("policy", "second", ["questions"]) == tmp_path / "policy-2"
    assert again.checked("policy", "third", ["questions"]) == tmp_path / "policy"
    stored("pool", model="rm", policy="baseline", data="rows")
    assert Results(folder=tmp_path).checked("pool", "other", ["rows"]) == tmp_path / "pool-2"
    with pytest.raises(InputError, match="exists already"):  # without its baseline it is the same evaluation
        Results(folder=tmp_path).checked("pool", "rm", ["rows"])


def test_calibration_is_not_replaced(command, bench, tmp_path, experts):
    labelled = tmp_path / "labelled.jsonl"
    row = {name: experts[0][name] for name in ("prompt", "completion")}
    write_jsonl(labelled, [{**row, "completion": row["completion"] * (n + 1), "correct": n % 2} for n in range(2)] * 6)
    words = ["calibrate", bench.reward_model, labelled]
    settings = bench.reward_model / "tracereward.json"
    first = command(*words)
    assert first.code == 0, first.err
    before = settings.read_bytes()
    refused(command(*words, "--method", "temperature"), "platt, fitted on 12 traces", "--overwrite")
    assert settings.read_bytes() == before
    assert command(*words, "--method", "temperature", "--overwrite").code == 0
    assert json.loads(settings.read_text())["calibration"]["method"] == "temperature"


# Streams that are not UTF-8

ODD = {"prompt": "3 + 4?", "completion": "3 + 4 ≈ 7 → 🙂 Ωж\n#### 7", "answer": "7", "logprob": -1.0}


@pytest.fixture
def encoded(monkeypatch):
    """`encoded(encoding, word, ...)` runs a command with such a stdout and stderr; returns exit code and bytes."""

    def run(encoding: str, *argv: object) -> tuple[int, bytes, bytes]:
        streams = [io.BytesIO(), io.BytesIO()]
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding, write_through=True))
        monkeypatch.setattr(sys, "argv", ["tracereward", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        return ended.value.code or 0, *(stream.getvalue() for stream in streams)

    return run


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-16"])
def test_rows_on_stdout_are_utf_8(encoded, bench, tmp_path, encoding):
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [ODD])
    for name in ("score", "rerank"):
        code, out, _ = encoded(encoding, name, bench.reward_model, data)
        assert code == 0
        (row,) = map(json.loads, out.decode("utf-8").splitlines())
        assert row["completion"] == ODD["completion"]
    assert "≈" in out.decode("utf-8")  # as in a file, not escaped


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_views_replace_what_cannot_be_shown(encoded, bench, tmp_path, encoding):
    data = tmp_path / "ünïcode 🙂.jsonl"
    write_jsonl(data, [ODD])
    code, out, err = encoded(encoding, "inspect", data, "--model", bench.reward_model)
    assert (code, "#### 7" in out.decode(encoding)) == (0, True), err
    code, out, err = encoded(encoding, "score", bench.reward_model, tmp_path / "Ωж.jsonl")
    assert (code, out, "no such file" in err.decode(encoding)) == (2, b"", True)
    for words in (["--help"], ["train", "--help"], ["score", "--help"], ["evaluate", "pool", "--help"]):
        code, out, _ = encoded(encoding, *words)
        assert (code, b"Usage" in out) == (0, True)
    code, out, err = encoded(encoding, "rerank", bench.reward_model, data, "-o", tmp_path / "chosen.jsonl")
    assert (code, out, "oracle@1" in err.decode(encoding)) == (0, b"", True)
