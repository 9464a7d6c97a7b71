"""Formats, folders and encodings of data; what is expected is written here by hand."""

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from helpers.command_line import bench, command, refused  # noqa: F401
from tracereward.data.readers import read_rows
from tracereward.errors import InputError
from tracereward.files import sha256_of

ROWS = [{"prompt": "1 + 2 = ?\n", "completion": "#### 3"}, {"prompt": "2 + 2 = ?\n", "completion": "#### 4"}]


def values(source: Path, **kwargs) -> list[dict]:
    return [row for _, row in read_rows(str(source), **kwargs)]


def message(source: Path, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(str(source), **kwargs))
    return str(caught.value)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".csv.gz"])
def test_tables(tmp_path, ending):
    """Quoted line breaks and separators; an answer stays text; flags and log-probs do not; an empty cell is null."""
    lines = ["prompt,completion,answer,correct,logprob", '"1 + 2 = ?\n","so, ""3""",007,True,-0.5', "é,4,,0,"]
    text = "\ufeff" + "\n".join(lines) + "\n"
    text = text.replace("so, ", "so; ").replace(",", "\t").replace("so; ", "so, ") if ending == ".tsv" else text
    path = tmp_path / f"rows{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    assert list(read_rows(str(path))) == [
        (f"{path}:1", dict(prompt="1 + 2 = ?\n", completion='so, "3"', answer="007", correct=True, logprob=-0.5)),
        (f"{path}:2", dict(prompt="é", completion="4", answer=None, correct=False, logprob=None)),
    ]


def test_tables_that_are_none(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\n1 + 2, so 3,3\n")
    assert "quote cells with a comma" in message(path)
    path.write_text('prompt,completion\n"1 + 2,3\n')
    assert "not a readable table" in message(path)
    path.write_text("")
    assert "not a readable table" in message(path)
    path.write_text("prompt,logprob\n1,high\n")
    assert f"{path}:1: logprob must be a number, not 'high'" in message(path)


def test_json_arrays(tmp_path):
    (tmp_path / "rows.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode())
    assert list(read_rows(str(tmp_path / "rows.json"))) == [
        (f"{tmp_path / 'rows.json'}:{n + 1}", ROWS[n]) for n in (0, 1)
    ]
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    assert values(tmp_path / "rows.json.gz") == ROWS
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS, indent=1))
    assert "rows.jsonl:1: not valid JSON" in message(tmp_path / "rows.jsonl")
    assert "name it .json" in message(tmp_path / "rows.jsonl")


LATIN = {
    ".jsonl": '{"prompt": "a"}\n\n{"prompt": "caf\u00e9"}\n',
    ".jsonl.gz": '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "caf\u00e9"}\n',
    ".json": '[{"prompt": "a"},\n\n{"prompt": "caf\u00e9"}]',
    ".csv": "prompt\na\ncaf\u00e9\n",
}


@pytest.mark.parametrize("ending", LATIN)
def test_other_encodings_name_the_line_and_the_conversion(tmp_path, ending):
    """0x93 is a quotation mark in cp1252 and a control character in Latin-1."""
    path = tmp_path / f"rows{ending}"
    for byte, name in ((b"\xe9", "LATIN1"), (b"\x93", "CP1252")):
        text = LATIN[ending].encode("latin-1").replace(b"\xe9", byte)
        path.write_bytes(gzip.compress(text) if ending.endswith(".gz") else text)
        found = message(path)
        assert found.startswith(f"{path}:3: not UTF-8 text (byte 0x{byte.hex()}): convert it")
        assert f"iconv -f {name}" in found


def test_utf_16(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes('{"prompt": "a"}\n'.encode("utf-16"))
    assert "rows.jsonl:1: not UTF-8 text" in message(tmp_path / "rows.jsonl")
    assert "iconv -f UTF-16" in message(tmp_path / "rows.jsonl")


def test_folders_of_save_to_disk(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    found = list(read_rows(str(tmp_path / "one"), "test"))  # has no splits, as a file
    assert found == [(f"{tmp_path / 'one'}:1", ROWS[0]), (f"{tmp_path / 'one'}:2", ROWS[1])]
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[1:])).save_to_disk(tmp_path / "two")
    assert list(read_rows(str(tmp_path / "two"), "test")) == [(f"{tmp_path / 'two'}:test:1", ROWS[1])]
    assert "no split 'validation'; it has train, test (--split" in message(tmp_path / "two", split="validation")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"nothing")
    assert f"{tmp_path / 'one'}: not a readable data set after row 0" in message(tmp_path / "one")


def test_folders_of_files(tmp_path):
    """Files whose names tell splits apart, and files that all belong together; the location is that of the file."""
    hub, plain = tmp_path / "hub" / "data", tmp_path / "plain"
    for folder in (hub, plain):
        folder.mkdir(parents=True)
    Dataset.from_list(ROWS).to_parquet(hub / "train-00000-of-00001.parquet")
    Dataset.from_list(ROWS[1:]).to_parquet(hub / "test-00000-of-00001.parquet")
    assert values(hub.parent, split="test") == ROWS[1:]
    assert values(hub.parent) == ROWS
    assert "no split 'dev'; it has train, test" in message(hub.parent, split="dev")
    for n in (0, 1):
        (plain / f"{n}.jsonl").write_text("\n" + json.dumps(ROWS[n]) + "\n")
    assert list(read_rows(str(plain), "test")) == [(f"{plain / f'{n}.jsonl'}:2", ROWS[n]) for n in (0, 1)]
    (plain / "more.csv").write_text("prompt\na\n")
    assert "files of several formats" in message(plain)


def test_relative_and_linked_folders_of_one_split(tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    Dataset.from_list(ROWS).to_parquet(tmp_path / "shards" / "train-00000-of-00001.parquet")
    (tmp_path / "train-link").symlink_to("shards")
    monkeypatch.chdir(tmp_path)
    for name in ("shards", "./shards", "train-link"):
        assert values(name) == ROWS
        assert "no split 'test'; it has train" in message(name, split="test")


def test_folders_that_hold_no_data(tmp_path):
    assert "is a folder without files of the formats .jsonl" in message(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "is the folder of a model, not data" in message(tmp_path)


def test_splits_of_what_has_none_are_refused(command, bench, tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    refused(command("score", bench.bare_reward, tmp_path / "one", "--split", "test"), "--split", "no splits")
    Dataset.from_list(ROWS).to_csv(tmp_path / "rows.csv")
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "two")
    refused(command("sample", bench.bare, "--data", tmp_path / "two"), "no split 'test'; it has train")


def test_scores_of_all_formats_are_equal(command, bench, tmp_path, experts):
    """The same rows from JSON Lines, CSV and a saved set, through the command line."""
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in experts[:3]]
    data = Dataset.from_list(rows)
    data.to_json(tmp_path / "rows.jsonl")
    data.to_csv(tmp_path / "rows.csv", index=False)
    data.save_to_disk(tmp_path / "saved")
    scored = [command("score", bench.reward_model, tmp_path / name).out for name in ("rows.jsonl", "rows.csv", "saved")]
    assert len(scored[0].splitlines()) == 3
    assert scored[0] == scored[1] == scored[2]


@pytest.mark.parametrize("name", ["score", "pool", "calibrate", "processbench", "inspect", "rerank", "sft"])
def test_half_of_a_surrogate_pair_is_refused_with_its_line(command, bench, tmp_path, name):
    """The cut emoji of a log, in the field that each command reads; before any model loads."""
    half = "3 + 4 = 7 \ud83d"
    row = {"prompt": "3 + 4 = ?\n", "completion": half, "correct": True, "answer": "7"}
    if name == "processbench":
        row = {"problem": "3 + 4 = ?", "steps": ["3 + 4 = 7", half], "label": -1, "generator": "a"}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    words = {
        "score": ["score", bench.bare_reward, path],
        "rerank": ["rerank", bench.bare_reward, path],
        "inspect": ["inspect", path, "--model", bench.bare_reward],
        "pool": ["evaluate", "pool", bench.bare_reward, path, "-o", tmp_path / "out"],
        "processbench": ["evaluate", "processbench", bench.bare_reward, path, "-o", tmp_path / "out"],
        "calibrate": ["calibrate", bench.bare_reward, path],
        "sft": ["sft", "--dataset_name", path, "--model_name_or_path", bench.bare, "--output_dir", tmp_path / "run"],
    }[name]
    field = "steps" if name == "processbench" else "completion"
    refused(command(*words), f"{path}:2: field '{field}' has half of a surrogate pair ('\\ud83d')")


def test_the_digest_of_a_folder_changes_with_names_and_contents(tmp_path):
    """By which an unfinished output is known to belong to the same data."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    before = sha256_of(data)
    (data / "a.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    assert sha256_of(data) != before
    (data / "a.jsonl").rename(data / "b.jsonl")
    renamed = sha256_of(data)
    (data / "b.jsonl").rename(data / "a.jsonl")
    assert sha256_of(data) not in (before, renamed)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}\n', "a.jsonl:1: .*field 'prompt' is given twice"),
        ("a.json", '[{"x": {"y": 1, "y": 2}}]', "field 'y' is given twice"),
        ("a.csv", "prompt;completion\na;b\n", "a.csv:1: one column, .* separated by a comma, not by ';'"),
        ("a.tsv", "prompt,completion\na,b\n", "a.tsv:1: one column, .* separated by a tab, not by ','"),
    ],
)
def test_what_a_parser_would_take_silently(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        list(read_rows(str(tmp_path / name)))


def test_an_empty_name_is_not_the_working_folder():
    with pytest.raises(InputError, match="not an empty text"):
        list(read_rows(""))
