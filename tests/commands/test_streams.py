"""Rows from stdin and from streamed Hub sets: the same results as of a file, and never more than a window is read."""

import io
import json
from collections.abc import Iterator
from itertools import count

import datasets
import pytest

from helpers.command_line import bench, command, refused  # noqa: F401
from helpers.tiny import rows
from tracereward.commands import rerank, sample, score
from tracereward.commands.score import score_rows
from tracereward.data.readers import windows
from tracereward.errors import InputError
from tracereward.files import write_jsonl
from tracereward.rewards.model import TokenRewardModel


class Stdin(io.StringIO):
    """Lines on stdin, each made when it is read; `read` counts them."""

    def __init__(self, lines):
        super().__init__()
        self.lines, self.read, self.buffer = iter(lines), 0, self

    def peek(self, size: int) -> bytes:
        return b"{"

    def __iter__(self) -> Iterator[bytes]:
        for line in self.lines:
            self.read += 1
            yield line


@pytest.fixture
def pipe(monkeypatch):
    """`pipe(lines)` is the command's stdin."""

    def given(lines) -> Stdin:
        stdin = Stdin(lines)
        monkeypatch.setattr("sys.stdin", stdin)
        return stdin

    return given


@pytest.fixture
def pool(bench, tmp_path):
    """Ten questions with three candidates each, of different lengths, in chunks of seven."""
    experts = rows(bench.experts)[:10]
    found = [
        {"question": n, "prompt": one["prompt"], "completion": text, "answer": one["answer"], "logprob": -1.0}
        for n, one in enumerate(experts)
        for text in (one["completion"], one["completion"].split("\n")[0], "#### 5")
    ]
    write_jsonl(tmp_path / "pool.jsonl", found)
    return tmp_path / "pool.jsonl"


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(score, "CHUNK", 7)


def lines_of(path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def words_for(bench, name: str, data: object) -> list[object]:
    if name == "sample":
        words = ["--task", "arithmetic", "--max-new-tokens", 4, "-n", 2, "--batch-size", 6]
        return ["sample", bench.model, "--data", data, *words]
    return [name, bench.reward_model, data, *(["--method", "reward"] if name == "rerank" else [])]


@pytest.mark.parametrize(("name", "behind"), [("score", 7), ("rerank", 7 + 3), ("sample", 3)])
def test_a_pipe_gives_the_rows_of_the_file(command, bench, pool, pipe, monkeypatch, name, behind):
    """And when a row is written, at most a window has been read beyond those that are written."""
    full = command(*words_for(bench, name, pool))
    assert full.code == 0, full.err
    stdin = pipe(lines_of(pool))
    module = {"score": score, "rerank": rerank, "sample": sample}[name]
    write, written, ahead = module.write_row, count(1), []
    rows_each = {"score": 1, "rerank": 1 / 3, "sample": 2}[name]  # rows written for each that is read

    def spy(file, row):
        ahead.append(stdin.read - (next(written) - 1) / rows_each)
        write(file, row)

    monkeypatch.setattr(module, "write_row", spy)
    streamed = command(*words_for(bench, name, "-"))
    assert streamed.code == 0, streamed.err
    assert streamed.out == full.out
    assert len(streamed.out.splitlines()) == 30 * rows_each
    assert max(ahead) <= behind
    if name == "rerank":
        assert "no table" in streamed.err
        refused(command(*words_for(bench, name, "-"), "--json"), "--json")


def test_an_endless_stream_is_read_one_window_ahead(bench):
    read = []
    model = TokenRewardModel.from_pretrained(bench.reward_model)

    def endless():
        for n in count():
            read.append(n)
            yield f"stdin:{n + 1}", {"prompt": "1 + 2 = ?\n", "completion": f"#### {n % 10}"}

    scored = score_rows(model, endless())
    for n in range(15):
        assert next(scored)["completion"] == f"#### {n % 10}"
        assert len(read) == 7 * (n // 7 + 1)


def test_an_error_of_reading_comes_after_the_rows_before_it():
    def broken():
        yield from range(5)
        raise InputError("line 6")

    found = windows(broken(), 3)
    assert [next(found), next(found)] == [[0, 1, 2], [3, 4]]
    with pytest.raises(InputError, match="line 6"):
        next(found)


def test_bad_rows_of_a_pipe_name_their_lines(command, bench, pool, pipe):
    lines = lines_of(pool)
    lines[4] = b'{"prompt": "1 + 2 = ?\\n"}\n'
    lines[-1] = lines[-1][:-20]
    pipe(lines)
    stopped = command("score", bench.reward_model, "-")
    assert (stopped.code, len(stopped.out.splitlines())) == (2, 4)
    assert "tracereward: stdin:5: " in stopped.err
    pipe(lines)
    done = command("score", bench.reward_model, "-", "--skip-bad")
    assert (done.code, len(done.out.splitlines())) == (0, 28), done.err
    skipped = [line for line in done.err.splitlines() if "skipped: " in line]
    assert ["stdin:5" in skipped[0], "stdin:30" in skipped[1], "cut short" in skipped[1]] == [True] * 3
    pipe([])
    refused(command("score", bench.bare_reward, "-"), "stdin: no rows")
    pipe(lines[4:])
    refused(command("score", bench.bare_reward, "-"), "stdin:1: ")  # before the model is loaded
    pipe([b'{"question": "1 + 2 = ?", "solution": "3", "rationale": "sum"}\n'])
    refused(command("score", bench.bare_reward, "-"), "jq -c '. + {prompt: .question, completion: .solution}'")
    pipe(["é\n".encode("cp1252")])
    refused(command("score", bench.bare_reward, "-"), "iconv -f LATIN1 -t UTF-8 |")


def test_interrupted_at_a_pipe(command, bench, pool, pipe):
    def interrupted():
        yield from lines_of(pool)[:10]
        raise KeyboardInterrupt

    pipe(interrupted())
    stopped = command("score", bench.reward_model, "-")
    assert (stopped.code, len(stopped.out.splitlines())) == (130, 7)
    assert stopped.err.splitlines()[-1] == "tracereward: interrupted"


def test_what_cannot_be_read_twice(command, bench, tmp_path):
    output = tmp_path / "out.jsonl"
    refused(command(*words_for(bench, "score", "-"), "-o", output, "--resume"), "--resume", "stdin")
    refused(command(*words_for(bench, "sample", "-"), "-o", output, "--resume"), "--resume", "stdin")
    refused(command(*words_for(bench, "score", "-"), "-o", output, "--engine", "ray"), "--engine ray")
    guided = ["--guide", "beam", "--reward-model", bench.bare_reward, "-n", 1]
    refused(command("sample", bench.bare, "--data", "-", "--task", "generic", *guided), "--guide")
    refused(command(*words_for(bench, "score", "-"), "--split", "test"), "--split test has no effect")
    for words in (
        ["inspect", "-", "--model", bench.bare_reward],
        ["correct", bench.bare, "-", "--reward-model", bench.bare_reward],
        ["sft", "--dataset_name", "-", "--model_name_or_path", bench.bare, "--output_dir", tmp_path / "sft"],
        ["train", "--dataset_name", "-", "--model_name_or_path", bench.bare, "--output_dir", tmp_path / "train"],
        [
            "fit",
            "--demonstrations",
            "-",
            "--candidates",
            bench.experts,
            "--output_dir",
            tmp_path,
            "--model",
            bench.bare,
        ],
    ):
        refused(command(*words), "rows from stdin (-)", "file")
    assert not list(tmp_path.iterdir())


def test_questions_of_a_stream_must_be_adjacent(command, bench, pool, pipe):
    lines = lines_of(pool)
    pipe([*lines[:9], lines[2], *lines[9:]])
    stopped = command(*words_for(bench, "rerank", "-"))
    assert stopped.code == 2
    assert "stdin:10: the question of stdin:3 returns" in stopped.err
    assert [json.loads(line)["question"] for line in stopped.out.splitlines()] == [0, 1]


def test_lists_of_candidates_are_reranked_as_rows(command, bench, pool, tmp_path, pipe):
    single = rows(pool)
    lists = [
        {**first, "completion": None, "candidates": [row["completion"] for row in group], "logprob": [-1.0] * 3}
        for first, group in ((single[n], single[n : n + 3]) for n in range(0, 30, 3))
    ]
    lists = [{name: value for name, value in row.items() if value is not None} for row in lists]
    write_jsonl(tmp_path / "lists.jsonl", lists)
    expected = command(*words_for(bench, "rerank", pool))
    assert command(*words_for(bench, "rerank", tmp_path / "lists.jsonl")).out == expected.out
    pipe(lines_of(tmp_path / "lists.jsonl"))
    assert command(*words_for(bench, "rerank", "-")).out == expected.out


def test_select_reads_a_pipe(command, bench, pool, tmp_path, pipe):
    assert command("score", bench.reward_model, pool, "-o", tmp_path / "scored.jsonl").code == 0
    pipe(lines_of(tmp_path / "scored.jsonl"))
    assert command("select", "-").out == command("select", tmp_path / "scored.jsonl").out


def test_streamed_hub_set(command, bench, pool, tmp_path, monkeypatch):
    """Read once and while it is downloaded; a broken connection names the row, and the command resumes."""
    calls, ends = [], [20, 100]

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        end = ends.pop(0)

        def generate():
            yield from rows(pool)[:end]
            if end < 30:
                raise ConnectionError("reset by peer")

        return datasets.IterableDataset.from_generator(generate)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    full, output = tmp_path / "full.jsonl", tmp_path / "out.jsonl"
    assert command("score", bench.reward_model, pool, "-o", full).code == 0
    words = ["score", bench.reward_model, "owner/traces", "--stream", "--split", "test", "-o", output]
    stopped = command(*words)
    assert stopped.code == 1, stopped.err
    assert "owner/traces:test: cannot be read after row 20: reset by peer" in stopped.err
    assert len(rows(output.with_name("out.jsonl.part"))) == 20
    done = command(*words, "--resume")
    assert done.code == 0, done.err
    # The 20th row was scored at the end of a shorter window; the others byte for byte.
    assert [row["completion"] for row in rows(output)] == [row["completion"] for row in rows(full)]
    assert lines_of(output)[:14] + lines_of(output)[20:] == lines_of(full)[:14] + lines_of(full)[20:]
    assert calls == [(("owner/traces", None), {"split": "test", "streaming": True})] * 2


def test_streamed_questions_resume(command, bench, pool, tmp_path):
    """In the middle of a window: its chunk is sampled again, with the random numbers of its place in the stream."""
    full, output = tmp_path / "full.jsonl", tmp_path / "out.jsonl"
    words = [*words_for(bench, "sample", pool), "--limit", 11]
    assert command(*words, "-o", full).code == 0
    part, origin = output.with_name("out.jsonl.part"), output.with_name("out.jsonl.part.json")

    def stop(file, row):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "write_row", stop)
        assert command(*words, "--stream", "-o", output).code == 130
    assert not part.exists()
    with pytest.MonkeyPatch.context() as patch:
        write, left = sample.write_row, list(range(9))

        def stop_later(file, row):
            write(file, row) if left else stop(file, row)
            left.pop()

        patch.setattr(sample, "write_row", stop_later)
        assert command(*words, "--stream", "-o", output).code == 130
    assert origin.exists()
    done = command(*words, "--stream", "-o", output, "--resume")
    assert (done.code, "resuming after 3 questions" in done.err) == (0, True), done.err
    assert output.read_bytes() == full.read_bytes()
