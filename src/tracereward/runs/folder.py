"""The run folder: opened by one process, never overwritten, resumed from the last complete checkpoint.

It holds ``config.yaml`` (resolved), ``metrics.jsonl``, ``checkpoints/`` (each complete or ignored) and, when the run is
finished, ``policy/``, for `train` also ``reward_model/``, for `fit` that alone, and ``report.html``.
"""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import yaml
from filelock import FileLock, Timeout

from tracereward import __version__
from tracereward.console import is_main_process, note
from tracereward.errors import InputError, Interrupted, RunFailed
from tracereward.files import (
    DISK_FULL,
    atomic_write_text,
    read_jsonl,
    remove_unfinished,
)
from tracereward.modeling.distributed import broadcast_object, is_peer_failure
from tracereward.reports.report import Report, write_report
from tracereward.runs.disk import explain_full_disk
from tracereward.runs.job import CHECKPOINTS, FitJob, Job
from tracereward.runs.same_run import check_same_batch, check_same_run, defaults_of, derived, resolved
from tracereward.training.callbacks import MetricsFile, Progress, StopSignal
from tracereward.training.checkpoints import SafeTrainer, kept, last_complete_checkpoint
from tracereward.training.config import PolicyConfig
from tracereward.training.option_rules import effective
from tracereward.training.trackers import Trackers

AnyJob = TypeVar("AnyJob", Job, FitJob)


@dataclasses.dataclass(kw_only=True)
class Run(Generic[AnyJob]):
    """An open run folder."""

    job: AnyJob
    folder: Path
    metrics: MetricsFile
    stop: StopSignal
    checkpoint: Path | None
    settings: dict[str, Any]

    def train(self, trainer: SafeTrainer) -> None:
        """Train from the last complete checkpoint, if there is one.

        Raises:
            Interrupted: the user stopped it.
            RunFailed: non-finite numbers, a full disk, or another process ended.
        """
        warmed = 0
        if self.checkpoint is None:
            warmed = trainer.load_before_training()
        if is_main_process():
            self.metrics.rewind(
                0 if self.checkpoint is None else int(self.checkpoint.name.split("-")[-1]),
                warmed if self.checkpoint is None else sys.maxsize,
            )
        Progress.replace_default(trainer, self.job.kind)
        self.metrics.trackers = Trackers.of_trainer(trainer, self.folder, self.settings)
        with self.interruptible(lambda: (trainer.state.global_step, trainer.state.max_steps)):
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)

    @contextlib.contextmanager
    def interruptible(self, progress: Callable[[], tuple[int, int]]) -> Iterator[None]:
        """Context of the steps of a run: a signal ends it after the current one, and failures name the step.

        Args:
            progress: returns the number of finished steps, and of all.

        Raises:
            Interrupted: the user stopped it.
            RunFailed: non-finite numbers, a full disk, or another process ended.
        """
        with self.stop, explain_full_disk(self.folder):
            try:
                yield
            except RunFailed as error:
                step, total = progress()
                raise RunFailed(
                    f"stopped after step {step} of {total}: {error}. "
                    f"{kept(self.folder / CHECKPOINTS)}. A lower learning rate usually helps."
                ) from error
            except RuntimeError as error:
                if not is_peer_failure(error):
                    raise
                step, total = progress()
                raise RunFailed(
                    f"another process of this run ended after step {step} of "
                    f"{total}; see its message above, if any. "
                    f"{kept(self.folder / CHECKPOINTS)}: the same command with --resume continues from there."
                ) from error
        step, total = progress()
        if self.stop.received() and step < total:
            raise Interrupted(f"stopped at step {step} of {total}; the same command with --resume continues from there")

    def report(self, summary: str, **content: Any) -> None:
        """Write ``report.html``."""
        if not is_main_process():
            return
        report = Report(
            title=f"tracereward {self.job.kind}: {self.folder.name}",
            summary=summary,
            command=f"tracereward {self.job.kind} --config {shlex.quote(str(self.folder / 'config.yaml'))}",
            metrics=read_jsonl(self.metrics.path),
            config=self.settings,
            **content,
        )
        write_report(self.folder / "report.html", report)


@contextlib.contextmanager
def run_folder(job: AnyJob) -> Iterator[Run[AnyJob]]:
    """Open a run folder; refuses to overwrite another run.

    Raises:
        InputError: the folder has a run that is not to be resumed or had other options.
        RunFailed: the disk is full.
    """
    folder = Path(job.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file, not a folder")
    if (folder / "config.json").is_file():
        raise InputError(f"--output_dir {folder} is the folder of a model: use another one")
    with explain_full_disk(folder), locked(folder):
        run = _open(job, folder)
        try:
            yield run
        finally:
            if run.metrics.trackers is not None:
                run.metrics.trackers.end()


def _open(job: AnyJob, folder: Path) -> Run[AnyJob]:
    settings = resolved(job)
    checkpoint: Path | InputError | None = None
    if is_main_process():
        try:
            checkpoint = _claim(job, folder, settings)
        except InputError as error:
            checkpoint = error
    checkpoint = broadcast_object(checkpoint)
    if isinstance(checkpoint, InputError):
        raise checkpoint
    steps = 1
    if isinstance(job, Job):
        job.config.output_dir = str(folder / CHECKPOINTS)  # what the trainers write while they run
        steps = job.config.rollout_steps if isinstance(job.config, PolicyConfig) else 1
    if checkpoint is not None:
        note(f"resuming from {checkpoint}")
    metrics = MetricsFile(folder / "metrics.jsonl", job.kind)
    return Run(
        job=job, folder=folder, metrics=metrics, stop=StopSignal(steps), checkpoint=checkpoint, settings=settings
    )


def _claim(job: Job | FitJob, folder: Path, settings: dict[str, Any]) -> Path | None:
    """Check the folder and write the run's options to it; returns the checkpoint to resume from."""
    stored, checkpoints = folder / "config.yaml", folder / CHECKPOINTS
    made = what_was_made(folder)
    if made and not stored.is_file():
        raise InputError(
            f"{folder} has {made[0]} but is not a run folder (config.yaml is missing); use another --output_dir. "
            "Nothing was overwritten."
        )
    if made and not job.resume:
        raise InputError(
            f"{folder} already has a run; resume it with --resume, or use another --output_dir. "
            "Nothing was overwritten."
        )
    if made:
        defaults = defaults_of(job)
        before = effective(job.kind, yaml.safe_load(stored.read_text(encoding="utf-8")), defaults)
        check_same_run(before, settings, defaults, folder)
    else:  # a run that ended before training, for example by an invalid option
        (checkpoints / "batch.json").unlink(missing_ok=True)
    checkpoint = last_complete_checkpoint(checkpoints) if job.resume else None
    if checkpoint is None and "report.html" in made:
        raise InputError(f"{folder} is finished and has no checkpoint to resume from; use another --output_dir")
    remove_unfinished(folder)
    checkpoints.mkdir(parents=True, exist_ok=True)
    if isinstance(job, Job):
        check_same_batch(checkpoints / "batch.json", job.config)
    versions = f"# tracereward {__version__} {job.kind}, torch {torch.__version__}\n"
    found = yaml.safe_dump(derived(job), sort_keys=False).splitlines() if isinstance(job, Job) else []
    rest = "".join(f"# derived: {line}\n" for line in found)
    atomic_write_text(stored, versions + yaml.safe_dump(settings, sort_keys=False) + rest)
    return checkpoint


def what_was_made(folder: Path) -> list[str]:
    """The files and checkpoints of a run that exist in a folder."""
    parts = ("policy", "reward_model", "report.html", "metrics.jsonl", f"{CHECKPOINTS}/warmup")
    found = [name for name in parts if (folder / name).exists()]
    return found + [f"{CHECKPOINTS}/{path.name}" for path in sorted((folder / CHECKPOINTS).glob("checkpoint-*"))]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder: two runs in one would mix their checkpoints. The lock ends with the process.

    Raises:
        InputError: another process holds it, or the folder cannot be written.
    """
    if not is_main_process():
        yield
        return
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / CHECKPOINTS / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise InputError(f"another process is running in {folder}; wait for it, or use another --output_dir") from error
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise InputError(f"--output_dir {folder} cannot be written ({error.strerror}): use another folder") from error
    with lock:
        yield
