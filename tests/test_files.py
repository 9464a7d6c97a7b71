"""Files are complete or absent, also if writing is interrupted."""

import json
import math
import os

import pytest

from tracereward import files
from tracereward.errors import InputError
from tracereward.files import (
    atomic_file,
    atomic_folder,
    atomic_write_json,
    atomic_write_text,
    nearest_path,
    read_json,
    read_jsonl,
    remove_unfinished,
    require_free_disk,
    require_parent_folder,
    sha256_of,
    without_nan,
    write_jsonl,
)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_is_replaced(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write_text(path, "one é\n")
    atomic_write_text(path, "two")
    assert path.read_text(encoding="utf-8") == "two"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file_and_no_temporary_file(tmp_path, monkeypatch, where):
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, where, fail)
        with pytest.raises(OSError, match="No space left"):
            atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_readers_never_see_a_partial_file(tmp_path, monkeypatch):
    """At the rename, the new file is already complete on disk."""
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")
    replace, seen = os.replace, []

    def spy(source, target):
        seen.append((path.read_text(), source.read_text()))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", spy)
    atomic_write_text(path, "new" * 10_000)
    assert seen == [("old", "new" * 10_000)]


def test_json_keeps_non_ascii_characters(tmp_path):
    atomic_write_json(tmp_path / "a.json", {"é": [1, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"é": [1, None]}
    assert "é" in text


def test_atomic_folder_replaces_the_complete_old_folder(tmp_path):
    target = tmp_path / "new" / "model"
    for content in ("one", "two"):
        with atomic_folder(target) as folder:
            assert folder != target
            (folder / content).write_text(content)
            assert names(target) == ["one"] if content == "two" else not target.exists()
    assert names(target) == ["two"]
    assert names(tmp_path / "new") == ["model"]


def test_failed_block_keeps_the_old_folder(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("old")

    def write():
        with atomic_folder(target) as folder:
            (folder / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert (target / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_failed_rename_keeps_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("old")
    rename = os.rename

    def fail(source, destination):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, destination)

    def write():
        with atomic_folder(target) as folder:
            (folder / "weights").write_text("new")

    monkeypatch.setattr(files.os, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write()
    assert (target / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_leftovers_of_an_earlier_attempt_are_excluded(tmp_path):
    stale = tmp_path / f".model.{os.getpid()}.tmp"
    stale.mkdir()
    (stale / "stale").write_text("x")
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "fresh").write_text("y")
    assert names(tmp_path / "model") == ["fresh"]


def test_nan_and_infinity_become_null(tmp_path):
    value = {"a": [1.5, math.nan, (math.inf, "x")], "b": {"c": -math.inf, "d": True}, "e": 2}
    clean = {"a": [1.5, None, [None, "x"]], "b": {"c": None, "d": True}, "e": 2}
    assert without_nan(value) == clean
    atomic_write_json(tmp_path / "a.json", without_nan(value))
    assert read_json(tmp_path / "a.json") == clean


def test_nearest_path_and_parent_folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text("abc")
    assert nearest_path(tmp_path / "row.jsonl") == tmp_path / "rows.jsonl"
    assert nearest_path(tmp_path / "zzz") is None
    assert nearest_path(tmp_path / "no" / "rows.jsonl") is None
    require_parent_folder(tmp_path / "new")
    with pytest.raises(InputError, match="does not exist"):
        require_parent_folder(tmp_path / "no" / "new")
    assert sha256_of(tmp_path / "rows.jsonl").startswith("ba7816bf8f01cfea")  # FIPS 180-2, "abc"


def test_jsonl_round_trip(tmp_path):
    rows = [{"text": "a\nb\u2028c\r\x85 é"}, {"n": 1.5}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_last_line_cut_by_a_kill_is_skipped(tmp_path):
    """Also if the truncated line is valid JSON, or ends inside a character."""
    path = tmp_path / "a.jsonl"
    whole = b'{"n": 1}\n{"n": 2}\n'
    for rest in (b'{"n": 3, "te', b'{"n": 3}', '{"n": "é'.encode()[:-1]):
        path.write_bytes(whole + rest)
        assert read_jsonl(path) == [{"n": 1}, {"n": 2}]


def test_insufficient_disk_space_is_rejected(tmp_path):
    require_free_disk(tmp_path / "not" / "yet" / "there", 1, "a byte")
    with pytest.raises(InputError, match=r"GB free, 1000000000\.0+ GB needed for 2 checkpoints.*--output_dir"):
        require_free_disk(tmp_path / "run", 10**18, "2 checkpoints")
    assert names(tmp_path) == []


def test_folder_killed_between_two_renames_is_restored(tmp_path):
    """The old folder is then the only complete one; a temporary folder and an old one that was replaced are removed."""
    for name in (".policy.7.old", ".policy.7.tmp", ".reward.7.old", "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "reward"]
    assert (tmp_path / "policy" / "weights").read_text() == ".policy.7.old"
    assert (tmp_path / "reward" / "weights").read_text() == "reward"


def test_files_of_writers_that_hide_them_have_the_usual_mode(tmp_path):
    """safetensors makes files that only their owner can read."""
    plain = tmp_path / "plain"
    plain.write_text("x")
    with atomic_file(tmp_path / "one") as temporary:
        temporary.unlink()
        temporary.write_text("x")
        temporary.chmod(0o600)
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "inner").mkdir()
        for path in (temporary / "a", temporary / "inner" / "b"):
            path.write_text("x")
            path.chmod(0o600)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(("plain", "one", "a", "b"), plain.stat().st_mode & 0o777)
