"""Scoring on several machines: the workers of a Ray cluster write Parquet shards into one folder.

The command's process (the driver) reads and checks all rows and splits them into shards, one file each in a hidden
subfolder of the results. A worker takes a shard, scores it as `score` does, and renames its output to
``part-000012.parquet``. That name is the only record of progress: if a worker is killed, its shard is scored again from
the first row; a finished shard is never written again, even if the driver is killed and the command repeated.
"""

import functools
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import pyarrow as pa
from pyarrow import parquet
from tqdm.auto import tqdm

from tracereward import __version__
from tracereward.commands import score_shards
from tracereward.commands.score import ScoreOptions, check_any_rows, score_rows
from tracereward.console import say
from tracereward.data.trace_rows import candidate_rows
from tracereward.errors import InputError, RunFailed
from tracereward.modeling.hub import looks_local, split_name
from tracereward.modeling.loading import model_fingerprint
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards.engines import check_log_prob_models, load_log_prob_models, load_scorer
from tracereward.rewards.records import LogProbModels
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.settings import check_reward_model

NEEDS_RAY = "--engine ray needs Ray: pip install 'tracereward[ray]'"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a worker needs.

    Attributes:
        folder: folder of the results, the same path on every machine.
        todo: folder of the rows to score, a file for each shard.
        options: options of the command; models have absolute paths, since workers run in another folder.
        schema: schema of every shard.
    """

    folder: Path
    todo: Path
    options: ScoreOptions
    schema: pa.Schema


def score_to_folder(options: ScoreOptions) -> list[str]:
    """Score rows with the workers of a Ray cluster into Parquet shards; see the module's docstring.

    Connects to the cluster at ``RAY_ADDRESS``, or starts a local one for the duration of the call. The output is a
    folder with the shards and ``manifest.json``. Only this process reads the data.

    Returns:
        The error of each skipped row, of this call and earlier ones.

    Raises:
        InputError: Ray is not installed, an input cannot be read, or the output has scores of other inputs (all before
            a model is loaded); or a row is too long for the model.
        RunFailed: a shard crashed its workers, or the disk is full.
    """
    _require_ray()
    settings = check_reward_model(options.model)
    check_log_prob_models(settings, options.reference, options.policy)
    output = options.output
    if output.path is None or output.to_stdout:
        raise InputError("--engine ray needs --output, a folder")
    folder = Path(output.path).absolute()
    score_shards.check_folder(folder, output, [options.model, options.data, options.reference, options.policy])
    skipped: list[str] | None = [] if options.skip_bad else None
    with score_shards.own_folder(folder) as todo:
        tokenizer = load_tokenizer(options.model)
        rows = candidate_rows(options.data, options.split, skipped, settings.template, tokenizer=tokenizer)
        with score_shards.room(folder):
            columns = score_shards.score_columns(settings, options.calibrated)
            count, fingerprint, schema = score_shards.cut(rows, folder, todo, columns, everything=output.overwrite)
        check_any_rows(count, options.data, skipped)
        if output.overwrite:  # all rows are checked
            score_shards.clear(folder)
        sizes = [min(score_shards.SHARD_ROWS, count - start) for start in range(0, count, score_shards.SHARD_ROWS)]
        score_shards.check_manifest(folder, _manifest(options, count, len(sizes), fingerprint))
        missing = [n for n in range(len(sizes)) if not score_shards.part_file(folder, n).exists()]
        if not missing:
            say(f"{output.path} is finished")
        elif len(missing) < len(sizes):
            say(f"resuming after {len(sizes) - len(missing)} of {len(sizes)} shards")
        if missing:
            job = Job(folder=folder, todo=todo, options=_for_workers(options), schema=schema)
            scored = count - sum(sizes[n] for n in missing)
            with tqdm(desc="scored", total=count, initial=scored, unit="", file=sys.stderr) as progress:
                for shard in _run(job, missing):
                    progress.update(sizes[shard])
    footers = [parquet.read_metadata(score_shards.part_file(folder, n)) for n in range(len(sizes))]
    say(f"{sum(footer.num_rows for footer in footers)} rows in {len(footers)} shards: {output.path}")
    too_long = [text for footer in footers for text in json.loads(footer.metadata[score_shards.SKIPPED])]
    return [*(skipped or ()), *too_long]


def _manifest(options: ScoreOptions, rows: int, shards: int, fingerprint: str) -> dict[str, Any]:
    """Inputs of the scores: models and data, with hashes of their content."""
    return {
        "tracereward": __version__,
        "model": options.model,
        "model_sha256": model_fingerprint(options.model),
        "reference": options.reference,
        "reference_sha256": model_fingerprint(options.reference),
        "policy": options.policy,
        "policy_sha256": model_fingerprint(options.policy),
        "data": options.data,
        "data_sha256": fingerprint,
        "rows": rows,
        "rows_per_shard": score_shards.SHARD_ROWS,
        "shards": shards,
        **({} if options.dtype in (None, "auto") else {"dtype": options.dtype}),
    }


def _for_workers(options: ScoreOptions) -> ScoreOptions:
    """The options with absolute paths and commits of models: workers run in another folder, and may start later."""
    names = {name: getattr(options, name) for name in ("model", "reference", "policy")}
    return replace(options, **{name: value and _absolute(value) for name, value in names.items()})


class ShardScorer:
    """A worker: loads the model once and scores one shard after the other."""

    def __init__(self, job: Job):
        self.job = job

    @functools.cached_property
    def models(self) -> tuple[Scorer, LogProbModels]:
        """The reward model, and the models whose log-probs enter its rewards.

        Loaded with the first shard, not in the constructor: Ray retries the shard of a dead worker, but ends the run if
        a worker dies before its first shard.
        """
        options = self.job.options
        model = load_scorer(options.model, dtype=options.dtype)
        named = {"reference": options.reference, "policy": options.policy}
        return model, load_log_prob_models(model, **named, dtype=options.dtype)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Score the shards in `batch`; errors are returned as values, since Ray would wrap exceptions."""
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
        """Write a shard, unless it exists.

        Raises:
            InputError: a row is too long for the model.
            RunFailed: this shard has crashed its workers, or the disk is full.
        """
        job, part = self.job, score_shards.part_file(self.job.folder, shard)
        if part.exists():  # Ray may repeat a shard that a worker finished just before it died
            return
        score_shards.note_attempt(job.todo, shard)
        with open(score_shards.todo_file(job.todo, shard), encoding="utf-8") as file:
            rows = [tuple(json.loads(line)) for line in file]
        skipped: list[str] | None = [] if job.options.skip_bad else None
        model, extra = self.models
        scored = list(score_rows(model, rows, extra=extra, skipped=skipped))
        schema = job.schema.with_metadata({score_shards.SKIPPED: json.dumps(skipped or [])})
        with score_shards.room(job.folder):
            score_shards.write_part(part, pa.Table.from_pylist(scored, schema=schema))


def _absolute(model: str) -> str:
    """The absolute path of a local model; of a Hub model, its commit."""
    if looks_local(model):
        return str(Path(model).expanduser().absolute())
    return f"{split_name(model)[0]}@{model_fingerprint(model)}"


def _require_ray() -> None:
    # Ray reads these when it is imported or started. The logs of its C++ code are of no use to a user of this command.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray.data  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(NEEDS_RAY) from error


def _run(job: Job, missing: list[int]) -> Iterator[int]:
    """Score the shards on the cluster; yield the number of each finished shard.

    Raises:
        InputError: a row cannot be scored, or the cluster cannot be reached.
        RunFailed: a shard cannot be written.
    """
    from ray.data import ActorPoolStrategy, from_items  # pyright: ignore[reportMissingImports]

    # Ray reports dead workers on stdout, which is reserved for data.
    with redirect_stdout(sys.stderr), _cluster(job.options.workers) as (size, num_cpus, num_gpus):
        numbers = from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
        outcomes = numbers.map_batches(
            ShardScorer,
            fn_constructor_args=[job],
            # One task per worker: no shard waits while a worker is idle, and a worker that dies loses one shard.
            compute=ActorPoolStrategy(size=min(size, len(missing)), max_tasks_in_flight_per_actor=1),
            batch_size=1,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
        yield from map(_finished, outcomes.iter_rows())


def _finished(outcome: dict[str, Any]) -> int:
    """The number of a finished shard; re-raises the error of its worker."""
    if outcome["refused"]:
        raise InputError(outcome["refused"])
    if outcome["failed"]:
        raise RunFailed(outcome["failed"])
    return outcome["shard"]


@contextmanager
def _cluster(workers: int | None) -> Iterator[tuple[int, int, int]]:
    """Connect to a Ray cluster or start one; yield the number of workers and the CPUs and GPUs of each.

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
                num_cpus=max(workers or 1, joblib.cpu_count()),  # of the container
                include_dashboard=False,
                object_store_memory=128 * 2**20,  # it stores shard numbers only
                **quiet,
            )
        elif not connected:
            ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise InputError(
            f"RAY_ADDRESS is {address}: no Ray cluster answers there ({error}). If the cluster needs a token, set "
            "RAY_AUTH_MODE=token here too"
        ) from error
    try:
        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0))
        size = workers or gpus or 1
        if own and 0 < gpus < size:
            raise InputError(f"--workers {size}: there are {gpus} GPUs, one per worker; use --workers {gpus}")
        if gpus:
            yield size, 0, 1
        else:  # also the number of torch threads; on a cluster a machine may have only one free CPU
            yield size, max(1, int(found["CPU"]) // size) if own else 1, 0
    finally:
        if not connected:
            ray.shutdown()
