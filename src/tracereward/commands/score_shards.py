"""Parquet shards of scores in one folder: splitting rows, atomic writes, attempts, and the manifest of the inputs.

A shard's file name is the only record that it is finished: no row is written twice or lost if a process is killed.
"""

import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout
from pyarrow import parquet

from tracereward.commands.partial_output import Output, check_new
from tracereward.data.trace_rows import holds_steps
from tracereward.errors import InputError, RunFailed
from tracereward.files import (
    DISK_FULL,
    atomic_write_json,
    fsync_parent,
    read_json,
    remove_unfinished,
    require_parent_folder,
)
from tracereward.rewards.records import CHUNK
from tracereward.rewards.settings import RewardSettings
from tracereward.rewards.token_scores import AGGREGATES

SHARD_ROWS = CHUNK  # the chunks of `score`, so results are identical; also the most that a dying worker loses
ATTEMPTS = 3  # a shard that crashed so many workers (out of memory) would crash every worker
MANIFEST = "manifest.json"
SKIPPED = b"tracereward.skipped"  # metadata key of a shard: errors of its skipped rows


def part_file(folder: Path, shard: int) -> Path:
    """Path of a finished shard of scores."""
    return folder / f"part-{shard:06d}.parquet"


def todo_file(todo: Path, shard: int) -> Path:
    """Path of the rows of an unfinished shard."""
    return todo / f"{shard:06d}.jsonl"


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """Raise `RunFailed` if the disk of `folder` is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise RunFailed(f"the disk of {folder} is full; free some space and resume with --resume") from error


def check_folder(folder: Path, output: Output, inputs: Iterable[str | None]) -> None:
    """Check that the folder of the results can be created, and that nothing is lost by it.

    Args:
        folder: absolute path.
        output: as given.
        inputs: as for `check_new`.

    Raises:
        InputError: it cannot, it is an input, has other files in it, or scores that may not be replaced.
    """
    require_parent_folder(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; --engine ray writes a folder")
    check_new(folder, inputs, overwrite=True)
    if (folder / MANIFEST).exists() and not output.resume and not output.overwrite:
        raise InputError(
            f"{folder} already has scores: continue with --resume, choose another --output, or replace them with "
            "--overwrite"
        )
    if output.resume and output.overwrite:
        raise InputError("--resume keeps the shards that are finished and --overwrite replaces them: give one of them")
    if folder.is_dir() and not (folder / MANIFEST).exists():
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if others:
            raise InputError(f"{folder} has {others[0]} but no {MANIFEST}: choose another --output")


@contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """Create and lock the folder of the results; yield a temporary folder inside it.

    Raises:
        InputError: another process writes to it.
    """
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another process is writing to {folder}: wait for it, or choose another --output") from error
    # A worker may briefly outlive a killed run: it must not find another run's rows under its own file names.
    todo = folder / f".todo.{uuid.uuid4().hex}.tmp"
    try:
        remove_unfinished(folder)
        todo.mkdir()
        yield todo
    finally:
        shutil.rmtree(todo, ignore_errors=True)
        lock.release()
        if not (folder / MANIFEST).exists():  # rejected before anything was scored
            (folder / ".lock").unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()


def clear(folder: Path) -> None:
    """Remove the results in `folder`, the manifest last: if killed, what is left is an unfinished run."""
    for path in folder.glob("part-*.parquet"):
        path.unlink()
    (folder / MANIFEST).unlink(missing_ok=True)


def cut(
    rows: Iterable[tuple[str, dict[str, Any]]],
    folder: Path,
    todo: Path,
    score_fields: list[pa.Field],
    *,
    everything: bool = False,
) -> tuple[int, str, pa.Schema]:
    """Split rows into shards and write the unfinished ones, or all, as lines of location and row.

    Returns:
        Number of rows, their SHA-256, and the schema of all rows with their scores.

    Raises:
        InputError: a row is invalid, or a column has several types.
    """
    rows, count, fingerprint, schema = iter(rows), 0, hashlib.sha256(), pa.schema([])
    while chunk := list(islice(rows, SHARD_ROWS)):
        lines = []
        for where, row in chunk:
            fingerprint.update(json.dumps(row).encode() + b"\n")
            lines.append(json.dumps([where, row]) + "\n")
        shard = count // SHARD_ROWS
        schema = _widened(schema, chunk, score_fields)
        if everything or not part_file(folder, shard).exists():
            todo_file(todo, shard).write_text("".join(lines), encoding="utf-8")
        count += len(chunk)
    return count, fingerprint.hexdigest(), schema


def score_columns(settings: RewardSettings, calibrated: bool) -> list[pa.Field]:
    """The columns that `commands.score.as_row` returns."""
    probability, mark = settings.calibration is not None, settings.first_error is not None
    number, numbers, flags = pa.float64(), pa.list_(pa.float64()), pa.list_(pa.bool_())
    types = {
        "reward": number,
        **({"probability": number} if calibrated and probability else {}),
        "aggregates": pa.struct([(how, number) for how in AGGREGATES]),
        "step_rewards": numbers,
        **({"suspected_error": pa.int64()} if calibrated and mark else {}),
        "tokens": pa.list_(pa.string()),
        "offsets": pa.list_(pa.list_(pa.int64())),
        "token_rewards": numbers,
        "supervised": flags,
        "step_ends": flags,
    }
    return [pa.field(name, kind) for name, kind in types.items()]


def _widened(schema: pa.Schema, chunk: list[tuple[str, dict[str, Any]]], score_fields: list[pa.Field]) -> pa.Schema:
    """Extend `schema` by the columns of `chunk` and its scores; scores replace columns of the same name."""
    of_many, of_one = [pa.field("scores", pa.list_(pa.struct(score_fields)))], score_fields
    columns: dict[str, list[Any]] = {}
    fields: dict[str, pa.Field] = {}
    name = ""
    for _, row in chunk:
        added = {field.name: field for field in (of_many if "candidates" in row else of_one)}
        if holds_steps(row) or isinstance(row.get("completion"), list):
            added["completion"] = pa.field("completion", pa.string())
        fields |= added
        for name, value in row.items():
            if name not in added:
                columns.setdefault(name, []).append(value)
    try:
        for name, values in columns.items():
            kind = pa.schema([pa.field(name, pa.array(values).type)])
            parquet.write_table(
                kind.empty_table(), pa.BufferOutputStream()
            )  # fails for types that Parquet lacks, such as empty structs
            schema = pa.unify_schemas([schema, kind], promote_options="permissive")
        name = ""
        return pa.unify_schemas([schema, pa.schema(list(fields.values()))], promote_options="permissive")
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        column = f"column {name!r}" if name else "a column"
        raise InputError(
            f"{chunk[0][0]} and the {len(chunk) - 1} rows after it: {column} does not fit in Parquet, where a column "
            f"has one type ({error}). Fix the rows, or write JSON Lines, with --engine transformers"
        ) from error


def check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or compare it with that of an earlier run.

    Raises:
        InputError: the shards in `folder` have other inputs.
    """
    path = folder / MANIFEST
    if not path.exists():
        atomic_write_json(path, manifest)
        return
    try:
        earlier = read_json(path)
        old = {name: earlier[name] for name in manifest}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}): choose another --output") from error
    for what, name in (("reward model", "model"), ("--reference", "reference"), ("--policy", "policy")):
        if old[f"{name}_sha256"] != manifest[f"{name}_sha256"]:
            raise InputError(
                f"{folder} was started with another {what} ({old[name]}, now {manifest[name]}; the same name may have "
                "other weights): use the earlier one, or choose another --output"
            )
    if old["data_sha256"] != manifest["data_sha256"]:
        raise InputError(
            f"{folder} was started with other rows ({old['rows']} of {old['data']}, now {manifest['rows']} of "
            f"{manifest['data']}): use the earlier rows, or choose another --output"
        )
    if old["rows_per_shard"] != manifest["rows_per_shard"]:
        raise InputError(
            f"{folder} has {old['rows_per_shard']} rows per shard, this version writes {manifest['rows_per_shard']}: "
            "choose another --output"
        )


def note_attempt(todo: Path, shard: int) -> None:
    """Record an attempt at a shard in a file; raise after too many, since Ray itself retries without limit."""
    for attempt in range(ATTEMPTS):
        with suppress(FileExistsError), open(todo / f"{shard:06d}.attempt-{attempt}", "x") as file:
            file.write(f"{os.getpid()} {socket.gethostname()}\n")
            return
    raise RunFailed(
        f"shard {shard} crashed its worker {ATTEMPTS} times, perhaps out of memory; it has rows "
        f"{shard * SHARD_ROWS} to {(shard + 1) * SHARD_ROWS - 1} of the rows that can be scored, counted from 0"
    )


def write_part(part: Path, table: pa.Table) -> None:
    """Write a shard atomically, through a unique temporary name: two workers may write the same shard."""
    temporary = part.with_name(f".{part.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            parquet.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, part)
        fsync_parent(part)
    finally:
        temporary.unlink(missing_ok=True)
