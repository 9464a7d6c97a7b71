"""Scoring beyond one machine: the workers of a Ray cluster write Parquet shards into one folder.

The command's own process reads and checks all rows and cuts them into shards, one file each in a hidden folder beside
the results. A worker takes a shard, scores it as `score` does, and renames what it wrote to ``part-000012.parquet``.
That name is the only record of what is done: a shard whose worker was killed is scored again from its first row, and
one that is there is not touched again, whoever was killed and however often the command is repeated.
"""

import functools
import hashlib
import json
import logging
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout
from pyarrow import parquet
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tracereward import __version__
from tracereward.errors import InputError, RunFailed
from tracereward.files import DISK_FULL, atomic_write_json, fsync_parent, remove_unfinished
from tracereward.models import check_model, local_folder, looks_local
from tracereward.pool import CHUNK, best_device, candidate_rows, load_beside, score_rows
from tracereward.reward_model import TokenRewardModel
from tracereward.reward_settings import check_reward_model
from tracereward.scores import AGGREGATES

SHARD_ROWS = CHUNK  # what `score` batches together, so that the numbers are the same; lost at most when a worker dies
ATTEMPTS = 3  # a shard that ends its worker so often (out of memory) would end every worker
MANIFEST = "manifest.json"
SKIPPED = b"tracereward.skipped"  # in a shard's metadata: what is wrong with the rows that were left out of it
NEEDS_RAY = "--engine ray needs Ray: pip install 'tracereward[ray]'"


@dataclass(frozen=True)
class Job:
    """What a worker must know.

    Attributes:
        folder: of the results, the same path on every machine.
        todo: folder of the rows, a file for each shard.
        model: folder or Hub id of the reward model.
        reference: see `TokenRewardModel.score`.
        policy: see `TokenRewardModel.score`.
        schema: of every shard.
        skip_bad: leave rows out that are too long for the model, instead of stopping.
    """

    folder: Path
    todo: Path
    model: str
    reference: str | None
    policy: str | None
    schema: pa.Schema
    skip_bad: bool


def score_to_folder(
    model: str,
    data: str,
    output: str | None,
    split: str = "train",
    reference: str | None = None,
    policy: str | None = None,
    workers: int | None = None,
    resume: bool = False,
    skip_bad: bool = False,
) -> list[str]:
    """Score `data` with the workers of a Ray cluster into Parquet shards; see the module's docstring.

    The cluster is the one that ``RAY_ADDRESS`` names, or one of this machine that ends with the call.

    Args:
        model: folder or Hub id of the reward model.
        data: what `candidate_rows` reads. Only this process reads it.
        output: folder of the shards and of ``manifest.json``; all machines must see it.
        split: of a Hub set.
        reference: model whose log-prob is added.
        policy: model whose log-prob is taken off.
        workers: processes with a model each; a GPU of the cluster each if None, or one process.
        resume: go on with what an earlier call left in `output`.
        skip_bad: leave rows out that cannot be scored.

    Returns:
        What was wrong with each row that was left out, in this call or an earlier one.

    Raises:
        InputError: before any model is loaded, if Ray is not installed, anything cannot be read, or `output` holds
            other scores; from a worker, if a row is too long for the model.
        RunFailed: a shard ended its workers, or the disk is full.
    """
    _require_ray()
    settings = check_reward_model(model)
    for other in (reference, policy):
        if other is not None:
            check_model(other)
    if output is None:
        raise InputError("--engine ray needs --output, a folder")
    folder = Path(output).absolute()
    skipped: list[str] | None = [] if skip_bad else None
    with _own_folder(folder, resume) as todo:
        score_fields = _score_fields(calibrated=settings.calibration is not None)
        rows = candidate_rows(data, split, skipped)
        with _room(folder):
            count, fingerprint, schema = _cut(rows, folder, todo, score_fields)
        if count == 0:
            raise InputError(f"{data}: no rows{' that can be scored; the first: ' + skipped[0] if skipped else ''}")
        sizes = [min(SHARD_ROWS, count - start) for start in range(0, count, SHARD_ROWS)]
        _check_manifest(
            folder,
            {
                "tracereward": __version__,
                "model": model,
                "model_sha256": _model_fingerprint(model),
                "reference": reference,
                "reference_sha256": _model_fingerprint(reference),
                "policy": policy,
                "policy_sha256": _model_fingerprint(policy),
                "data": data,
                "data_sha256": fingerprint,
                "rows": count,
                "rows_per_shard": SHARD_ROWS,
                "shards": len(sizes),
            },
        )
        missing = [n for n in range(len(sizes)) if not _part(folder, n).exists()]
        done = len(sizes) - len(missing)
        if missing:
            if done:
                _say(f"going on after {done} of {len(sizes)} shards")
            beside = {
                "reference": reference and _absolute(reference),
                "policy": policy and _absolute(policy),
            }
            job = Job(folder, todo, _absolute(model), **beside, schema=schema, skip_bad=skip_bad)
            scored = count - sum(sizes[n] for n in missing)
            with tqdm(desc="scored", total=count, initial=scored, unit="", file=sys.stderr) as progress:
                for shard in _run(job, missing, workers):
                    progress.update(sizes[shard])
        else:
            _say(f"{output} is finished")
    footers = [parquet.read_metadata(_part(folder, n)) for n in range(len(sizes))]
    _say(f"{sum(footer.num_rows for footer in footers)} rows in {len(footers)} shards: {output}")
    too_long = [text for footer in footers for text in json.loads(footer.metadata[SKIPPED])]
    return [*(skipped or ()), *too_long]


class ShardScorer:
    """A worker: scores one shard after the other with a model that it has loaded once."""

    def __init__(self, job: Job):
        self.job = job

    @functools.cached_property
    def models(self) -> tuple[TokenRewardModel, PreTrainedModel | None, PreTrainedModel | None]:
        """The reward model and those beside it.

        Loaded with the first shard, not with the worker: Ray gives a shard whose worker died to another one, but ends
        the run when a worker dies before its first.
        """
        model = TokenRewardModel.from_pretrained(self.job.model).to(best_device())
        return model, load_beside(model, self.job.reference), load_beside(model, self.job.policy)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Score the shards that `batch` numbers; what went wrong is a value, since Ray would wrap an exception."""
        outcomes: dict[str, list[Any]] = {"shard": [], "refused": [], "failed": []}
        for shard in map(int, batch["shard"]):
            refused = failed = ""
            try:
                self.score(shard)
            except InputError as error:
                refused = str(error)
            except RunFailed as error:
                failed = str(error)
            for name, value in zip(outcomes, (shard, refused, failed)):
                outcomes[name].append(value)
        return outcomes

    def score(self, shard: int) -> None:
        """Write a shard, unless it is there.

        Raises:
            InputError: a row is too long for the model.
            RunFailed: this shard has ended its workers, or the disk is full.
        """
        job, part = self.job, _part(self.job.folder, shard)
        if part.exists():  # Ray may repeat what a worker has finished just before it died
            return
        _note_attempt(job.todo, shard)
        with open(_todo(job.todo, shard), encoding="utf-8") as file:
            rows = [tuple(json.loads(line)) for line in file]
        skipped: list[str] | None = [] if job.skip_bad else None
        model, reference, policy = self.models
        scored = list(score_rows(model, rows, reference, policy, skipped))
        schema = job.schema.with_metadata({SKIPPED: json.dumps(skipped or [])})
        with _room(job.folder):
            _write_part(part, pa.Table.from_pylist(scored, schema=schema))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _part(folder: Path, shard: int) -> Path:
    return folder / f"part-{shard:06d}.parquet"


def _todo(todo: Path, shard: int) -> Path:
    return todo / f"{shard:06d}.jsonl"


def _absolute(model: str) -> str:
    """A model's name as workers in another folder must spell it."""
    return str(Path(model).expanduser().absolute()) if looks_local(model) else model


def _require_ray() -> None:
    # Read when Ray is imported or started. Its C++ side logs to stderr what is of no use to a user of this command.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray.data  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(NEEDS_RAY) from error


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Say so when the disk of `folder` is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise RunFailed(f"the disk of {folder} is full; make room and go on with --resume") from error


@contextmanager
def _own_folder(folder: Path, resume: bool) -> Iterator[Path]:
    """Make the folder of the results this process's own; yields a folder in it that is gone afterwards.

    Raises:
        InputError: it cannot be one, holds something else, or another process writes to it.
    """
    if not folder.parent.is_dir():
        raise InputError(f"{folder}: the folder {folder.parent} does not exist")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; --engine ray writes a folder")
    if (folder / MANIFEST).exists() and not resume:
        raise InputError(f"{folder} holds scores already: go on with --resume, or choose another --output")
    if folder.is_dir() and not (folder / MANIFEST).exists():
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if others:
            raise InputError(f"{folder}: {others[0]} is in it and no {MANIFEST}: choose another --output")
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another process is writing to {folder}: wait for it, or choose another --output") from error
    # A worker may outlive a killed run for a moment: it must not find another run's rows under the names of its own.
    todo = folder / f".todo.{uuid.uuid4().hex}.tmp"
    try:
        remove_unfinished(folder)
        todo.mkdir()
        yield todo
    finally:
        shutil.rmtree(todo, ignore_errors=True)
        lock.release()
        if not (folder / MANIFEST).exists():  # refused before anything was scored
            (folder / ".lock").unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()


def _cut(
    rows: Iterable[tuple[str, dict[str, Any]]], folder: Path, todo: Path, score_fields: list[pa.Field]
) -> tuple[int, str, pa.Schema]:
    """Write the shards that are still to be scored, as lines of location and row.

    Returns:
        Number of rows, their SHA-256, and the schema of all of them with their scores.

    Raises:
        InputError: a row is bad, or a column is not of one type.
    """
    rows, count, fingerprint, schema = iter(rows), 0, hashlib.sha256(), pa.schema([])
    while chunk := list(islice(rows, SHARD_ROWS)):
        lines = []
        for where, row in chunk:
            try:
                fingerprint.update(json.dumps(row).encode() + b"\n")
            except TypeError as error:
                raise InputError(f"{where}: {error}: neither is it in JSON") from error
            lines.append(json.dumps([where, row]) + "\n")
        shard = count // SHARD_ROWS
        schema = _widened(schema, chunk, score_fields)
        if not _part(folder, shard).exists():
            _todo(todo, shard).write_text("".join(lines), encoding="utf-8")
        count += len(chunk)
    return count, fingerprint.hexdigest(), schema


def _score_fields(calibrated: bool) -> list[pa.Field]:
    """The columns that `pool.as_row` gives."""
    number, numbers, flags = pa.float64(), pa.list_(pa.float64()), pa.list_(pa.bool_())
    types = {
        "reward": number,
        **({"probability": number} if calibrated else {}),
        "aggregates": pa.struct([(how, number) for how in AGGREGATES]),
        "step_rewards": numbers,
        "tokens": pa.list_(pa.string()),
        "offsets": pa.list_(pa.list_(pa.int64())),
        "token_rewards": numbers,
        "supervised": flags,
        "step_ends": flags,
    }
    return [pa.field(name, kind) for name, kind in types.items()]


def _widened(schema: pa.Schema, chunk: list[tuple[str, dict[str, Any]]], score_fields: list[pa.Field]) -> pa.Schema:
    """`schema` with room for the rows of `chunk` and their scores, which take the place of columns of their names."""
    of_many, of_one = [pa.field("scores", pa.list_(pa.struct(score_fields)))], score_fields
    columns: dict[str, list[Any]] = {}
    fields: dict[str, pa.Field] = {}
    name = ""
    for _, row in chunk:
        added = {field.name: field for field in (of_many if "candidates" in row else of_one)}
        fields |= added
        for name, value in row.items():
            if name not in added:
                columns.setdefault(name, []).append(value)
    try:
        for name, values in columns.items():
            kind = pa.schema([pa.field(name, pa.array(values).type)])
            parquet.write_table(kind.empty_table(), pa.BufferOutputStream())  # no column of empty objects, for one
            schema = pa.unify_schemas([schema, kind], promote_options="permissive")
        name = ""
        return pa.unify_schemas([schema, pa.schema(list(fields.values()))], promote_options="permissive")
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        column = f"column {name!r}" if name else "a column"
        raise InputError(
            f"{chunk[0][0]} and the {len(chunk) - 1} rows after it: {column} does not fit in Parquet, where a column "
            f"has one type ({error}). Mend the rows, or write JSON Lines, with --engine transformers"
        ) from error


def _model_fingerprint(name: str | None) -> str | None:
    """SHA-256 of all that scoring reads of a model; its folder may have been trained again under the same name."""
    if name is None:
        return None
    total = hashlib.sha256()
    for path in sorted(local_folder(name).iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin"):
            with open(path, "rb") as file:
                total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write what these scores are of, or compare it with what an earlier run has written.

    Raises:
        InputError: the shards in `folder` are of something else.
    """
    path = folder / MANIFEST
    if not path.exists():
        atomic_write_json(path, manifest)
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        old = {name: earlier[name] for name in manifest}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}): choose another --output") from error
    for what, name in (("reward model", "model"), ("--reference", "reference"), ("--policy", "policy")):
        if old[f"{name}_sha256"] != manifest[f"{name}_sha256"]:
            raise InputError(
                f"{folder} was started with another {what} ({old[name]}, now {manifest[name]}; the same name may hold "
                "other weights): go on with that one, or choose another --output"
            )
    if old["data_sha256"] != manifest["data_sha256"]:
        raise InputError(
            f"{folder} was started with other rows ({old['rows']} of {old['data']}, now {manifest['rows']} of "
            f"{manifest['data']}): go on with those, or choose another --output"
        )
    if old["rows_per_shard"] != manifest["rows_per_shard"]:
        raise InputError(
            f"{folder} has {old['rows_per_shard']} rows a shard, this version makes {manifest['rows_per_shard']}: "
            "choose another --output"
        )


def _note_attempt(todo: Path, shard: int) -> None:
    """Leave a file that says who is at a shard. Ray itself would hand a shard on without an end."""
    for attempt in range(ATTEMPTS):
        with suppress(FileExistsError), open(todo / f"{shard:06d}.attempt-{attempt}", "x") as file:
            file.write(f"{os.getpid()} {socket.gethostname()}\n")
            return
    raise RunFailed(
        f"shard {shard} ended its worker {ATTEMPTS} times, perhaps for memory; its rows are numbers "
        f"{shard * SHARD_ROWS} to {(shard + 1) * SHARD_ROWS - 1} of those that can be scored, counted from 0"
    )


def _write_part(part: Path, table: pa.Table) -> None:
    """Write a shard whole or not at all, under a name of its own: two workers may be at it."""
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


def _run(job: Job, shards: list[int], workers: int | None) -> Iterator[int]:
    """Have the shards scored; yields the number of each that is done.

    Raises:
        InputError: a row cannot be scored, or the cluster cannot be reached.
        RunFailed: a shard cannot be written.
    """
    from ray.data import ActorPoolStrategy, from_items  # pyright: ignore[reportMissingImports]

    # Ray reports dead workers on stdout, which is for data.
    with redirect_stdout(sys.stderr), _cluster(workers) as (size, num_cpus, num_gpus):
        numbers = from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        outcomes = numbers.map_batches(
            ShardScorer,
            fn_constructor_args=[job],
            # No shard waits behind another while a worker is free, and a worker that dies takes one shard with it.
            compute=ActorPoolStrategy(size=min(size, len(shards)), max_tasks_in_flight_per_actor=1),
            batch_size=1,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
        yield from map(_finished, outcomes.iter_rows())


def _finished(outcome: dict[str, Any]) -> int:
    """The number of a shard that is done; raises what its worker has said otherwise."""
    if outcome["refused"]:
        raise InputError(outcome["refused"])
    if outcome["failed"]:
        raise RunFailed(outcome["failed"])
    return outcome["shard"]


@contextmanager
def _cluster(workers: int | None) -> Iterator[tuple[int, int, int]]:
    """Connect to Ray, or start it here; yields the number of workers and the CPUs and GPUs of each.

    Raises:
        InputError: the cluster cannot be reached, or has too few GPUs.
    """
    import ray  # pyright: ignore[reportMissingImports]

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    address = os.environ.get("RAY_ADDRESS")
    connected = ray.is_initialized()
    own = not (connected or address)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if own:
            ray.init(
                address="local",
                num_cpus=max(workers or 1, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=128 * 2**20,  # nothing but numbers of shards is in it
                **quiet,
            )
        elif not connected:
            ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise InputError(
            f"RAY_ADDRESS is {address}: no Ray cluster answers there ({error}). One that asks for a token needs "
            "RAY_AUTH_MODE=token here too"
        ) from error
    try:
        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0))
        size = workers or gpus or 1
        if own and 0 < gpus < size:
            raise InputError(f"--workers {size}: there are {gpus} GPUs, and each worker takes one")
        if gpus:
            yield size, 0, 1
        else:  # torch gets as many threads; a machine of a cluster may have no more than one to spare
            yield size, max(1, int(found["CPU"]) // size) if own else 1, 0
    finally:
        if not connected:
            ray.shutdown()
