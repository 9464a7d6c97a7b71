"""Scoring beyond one machine: the workers of a Ray cluster write Parquet shards into one folder.

The command's own process reads and checks all rows and cuts them into shards, one file each in a hidden folder beside
the results. A worker takes a shard, scores it as `score` does, and renames what it wrote to ``part-000012.parquet``.
That name is the only record of what is done: a shard whose worker was killed is scored again from its first row, and
one that is there is not touched again, whoever was killed and however often the command is repeated.
"""

import functools
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tracereward import __version__
from tracereward.commands import score_shards
from tracereward.commands.score import score_rows
from tracereward.console import say
from tracereward.data.trace_rows import candidate_rows
from tracereward.errors import InputError, RunFailed
from tracereward.modeling.loading import best_device, check_model, looks_local, model_fingerprint
from tracereward.rewards.engines import load_beside
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import check_policy, check_reward_model

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
    check_policy(settings, policy)
    for other in (reference, policy):
        if other is not None:
            check_model(other)
    if output is None:
        raise InputError("--engine ray needs --output, a folder")
    folder = Path(output).absolute()
    skipped: list[str] | None = [] if skip_bad else None
    with score_shards.own_folder(folder, resume) as todo:
        score_fields = score_shards.score_columns(
            calibrated=settings.calibration is not None and reference is None and policy is None
        )
        rows = candidate_rows(data, split, skipped, settings.template)
        with score_shards.room(folder):
            count, fingerprint, schema = score_shards.cut(rows, folder, todo, score_fields)
        if count == 0:
            raise InputError(f"{data}: no rows{' that can be scored; the first: ' + skipped[0] if skipped else ''}")
        sizes = [min(score_shards.SHARD_ROWS, count - start) for start in range(0, count, score_shards.SHARD_ROWS)]
        score_shards.check_manifest(
            folder,
            {
                "tracereward": __version__,
                "model": model,
                "model_sha256": model_fingerprint(model),
                "reference": reference,
                "reference_sha256": model_fingerprint(reference),
                "policy": policy,
                "policy_sha256": model_fingerprint(policy),
                "data": data,
                "data_sha256": fingerprint,
                "rows": count,
                "rows_per_shard": score_shards.SHARD_ROWS,
                "shards": len(sizes),
            },
        )
        missing = [n for n in range(len(sizes)) if not score_shards.part_file(folder, n).exists()]
        done = len(sizes) - len(missing)
        if missing:
            if done:
                say(f"going on after {done} of {len(sizes)} shards")
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
            say(f"{output} is finished")
    footers = [parquet.read_metadata(score_shards.part_file(folder, n)) for n in range(len(sizes))]
    say(f"{sum(footer.num_rows for footer in footers)} rows in {len(footers)} shards: {output}")
    too_long = [text for footer in footers for text in json.loads(footer.metadata[score_shards.SKIPPED])]
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
        job, part = self.job, score_shards.part_file(self.job.folder, shard)
        if part.exists():  # Ray may repeat what a worker has finished just before it died
            return
        score_shards.note_attempt(job.todo, shard)
        with open(score_shards.todo_file(job.todo, shard), encoding="utf-8") as file:
            rows = [tuple(json.loads(line)) for line in file]
        skipped: list[str] | None = [] if job.skip_bad else None
        model, reference, policy = self.models
        scored = list(score_rows(model, rows, reference, policy, skipped))
        schema = job.schema.with_metadata({score_shards.SKIPPED: json.dumps(skipped or [])})
        with score_shards.room(job.folder):
            score_shards.write_part(part, pa.Table.from_pylist(scored, schema=schema))


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


def _run(job: Job, missing: list[int], workers: int | None) -> Iterator[int]:
    """Have the shards scored; yields the number of each that is done.

    Raises:
        InputError: a row cannot be scored, or the cluster cannot be reached.
        RunFailed: a shard cannot be written.
    """
    from ray.data import ActorPoolStrategy, from_items  # pyright: ignore[reportMissingImports]

    # Ray reports dead workers on stdout, which is for data.
    with redirect_stdout(sys.stderr), _cluster(workers) as (size, num_cpus, num_gpus):
        numbers = from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
        outcomes = numbers.map_batches(
            ShardScorer,
            fn_constructor_args=[job],
            # No shard waits behind another while a worker is free, and a worker that dies takes one shard with it.
            compute=ActorPoolStrategy(size=min(size, len(missing)), max_tasks_in_flight_per_actor=1),
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
