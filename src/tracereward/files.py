"""Atomic writes: a file or folder is written under a temporary name, flushed to disk, then renamed."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tracereward.errors import InputError, nearest

DISK_FULL = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)
_FULL = ("No space left", "File too large", "Disk quota exceeded", "file write failed")
"""Parts of the messages of torch and safetensors, whose exceptions have no errno."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception of the system, torch or safetensors says that a disk is full."""
    return getattr(error, "errno", None) in DISK_FULL or any(part in str(error) for part in _FULL)


def fsync_tree(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to the disk."""
    for root, _, names in os.walk(folder):
        for path in [*(os.path.join(root, name) for name in names), root]:
            _fsync(path)


def _fsync(path: str | os.PathLike) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _usual_mode(path: Path) -> int:
    """The mode of a new file, which is created; safetensors makes files that other users cannot read."""
    path.touch()
    return path.stat().st_mode & 0o777


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` if the block succeeds; a reader never sees a partial one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        mode = _usual_mode(temporary)
        yield temporary
        temporary.chmod(mode)
        _fsync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a failed write has no name, and that of the temporary file helps nobody
        raise
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Replace the file at `path` by `text`; a reader sees the old file or the new one, never a partial one."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_write_json(path: str | os.PathLike, value: Any) -> None:
    """`atomic_write_text` of `value` as indented JSON."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        mode = _usual_mode(temporary / ".mode")
        (temporary / ".mode").unlink()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        fsync_tree(temporary)
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        fsync_parent(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove temporary files and folders that a killed process left in `folder`.

    A finished folder that was moved aside between the two renames of `atomic_folder` gets its name back.
    """
    for path in folder.glob(".*.old"):
        target = folder / path.name.removeprefix(".").rsplit(".", 2)[0]
        if not target.exists():
            path.rename(target)
    for path in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # another process of the same run may remove it too
        else:
            path.unlink(missing_ok=True)


def fsync_parent(path: Path) -> None:
    """Make a rename of `path` durable."""
    _fsync(path.parent)


def read_json(path: str | os.PathLike) -> Any:
    """The value of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def without_nan(value: Any) -> Any:
    """A JSON value with None for each nan and infinity, also inside dicts and lists: JSON has neither."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The complete rows of a JSONL file that a run appends to; a last line cut short by a kill is skipped."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().splitlines(keepends=True)
    for line in lines:
        if line.endswith(b"\n"):
            rows.append(json.loads(line))
    return rows


def write_jsonl(path: str | os.PathLike, rows: list[dict]) -> None:
    """Replace the file at `path` by one JSON object per line."""
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sha256_of(path: str | os.PathLike) -> str:
    """Hex digest of a file's content, or of the names and contents of a folder's files."""
    path = Path(path)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        listed = "".join(f"{file.relative_to(path)} {sha256_of(file)}\n" for file in files)
        return hashlib.sha256(listed.encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def nearest_path(path: Path) -> Path | None:
    """The path with the most similar name in the folder of a missing `path`; None if there is none."""
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, siblings)
    return None if near is None else path.parent / near


def require_parent_folder(path: str | os.PathLike) -> None:
    """Refuse an output whose folder does not exist.

    Raises:
        InputError: names the folder.
    """
    parent = Path(path).parent
    if not parent.is_dir():
        raise InputError(f"{path}: the folder {parent} does not exist")


def require_free_disk(
    folder: str | os.PathLike, needed: int, what: str, fix: str = "choose another --output_dir"
) -> None:
    """Check that the disk can hold what the run will write.

    Args:
        folder: output folder; need not exist yet.
        needed: bytes.
        what: for the message, e.g. "2 checkpoints and the finished models".
        fix: besides freeing space.

    Raises:
        InputError: fewer than `needed` bytes are free.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(f"{folder}: {_size(free)} free, {_size(needed)} needed for {what}. Free some space or {fix}.")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
