"""The run folder: opened by one process, never overwritten, resumed from the last complete checkpoint.

It holds ``config.yaml`` (resolved), ``metrics.jsonl``, ``checkpoints/`` (each complete or ignored) and, when the run is
finished, ``policy/``, for `train` also ``reward_model/``, and ``report.html``.
"""

import contextlib
import dataclasses
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import init_empty_weights
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig

from tracereward import __version__
from tracereward.console import is_main_process, note
from tracereward.errors import InputError, Interrupted, RunFailed
from tracereward.files import (
    DISK_FULL,
    atomic_write_json,
    atomic_write_text,
    read_json,
    read_jsonl,
    remove_unfinished,
    require_free_disk,
)
from tracereward.modeling.distributed import broadcast_object, is_peer_failure, zero3_disabled
from tracereward.reports.report import Report, write_report
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.callbacks import MetricsFile, Progress, StopSignal
from tracereward.training.checkpoints import SafeTrainer, kept, last_complete_checkpoint
from tracereward.training.config import RETIRED, PolicyConfig, RewardConfig, SupervisedConfig
from tracereward.training.options import DataArguments

Config = SupervisedConfig | RewardConfig | AdversarialConfig
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a training command was asked to do.

    Attributes:
        kind: the command: ``sft``, ``grpo`` or ``train``.
        data: options of the demonstrations.
        config: options of the training.
        model: options of the starting policy.
        resume: whether a run in the output folder is resumed.
    """

    kind: str
    data: DataArguments
    config: Config
    model: ModelConfig
    resume: bool = False


@dataclasses.dataclass(kw_only=True)
class Run:
    """An open run folder."""

    job: Job
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
        with self.stop, explain_full_disk(self.folder):
            try:
                trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            except RunFailed as error:
                raise RunFailed(
                    f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}: {error}. "
                    f"{kept(self.folder / CHECKPOINTS)}. A lower learning rate usually helps."
                ) from error
            except RuntimeError as error:
                if not is_peer_failure(error):
                    raise
                raise RunFailed(
                    f"another process of this run ended after step {trainer.state.global_step} of "
                    f"{trainer.state.max_steps}; see its message above, if any. "
                    f"{kept(self.folder / CHECKPOINTS)}: the same command with --resume continues from there."
                ) from error
        if self.stop.received() and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(
                f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
                "the same command with --resume continues from there"
            )

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
def run_folder(job: Job) -> Iterator[Run]:
    """Open a run folder; refuses to overwrite another run.

    Raises:
        InputError: the folder has a run that is not to be resumed or had other options.
        RunFailed: the disk is full.
    """
    folder = Path(str(job.config.output_dir))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file, not a folder")
    with explain_full_disk(folder), locked(folder):
        yield _open(job, folder)


def _open(job: Job, folder: Path) -> Run:
    config = job.config
    settings = resolved(job.data, config, job.model)
    checkpoint: Path | InputError | None = None
    if is_main_process():
        try:
            checkpoint = _claim(job, folder, settings)
        except InputError as error:
            checkpoint = error
    checkpoint = broadcast_object(checkpoint)
    if isinstance(checkpoint, InputError):
        raise checkpoint
    config.output_dir = str(folder / CHECKPOINTS)  # what the trainers write while they run
    if checkpoint is not None:
        note(f"resuming from {checkpoint}")
    metrics = MetricsFile(folder / "metrics.jsonl", job.kind)
    stop = StopSignal(config.rollout_steps if isinstance(config, PolicyConfig) else 1)
    return Run(job=job, folder=folder, metrics=metrics, stop=stop, checkpoint=checkpoint, settings=settings)


def _claim(job: Job, folder: Path, settings: dict[str, Any]) -> Path | None:
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
        defaults = option_defaults(DataArguments, type(job.config), ModelConfig)
        check_same_run(yaml.safe_load(stored.read_text(encoding="utf-8")), settings, defaults, folder)
    else:  # a run that ended before training, for example by an invalid option
        (checkpoints / "batch.json").unlink(missing_ok=True)
    checkpoint = last_complete_checkpoint(checkpoints) if job.resume else None
    if checkpoint is None and "report.html" in made:
        raise InputError(f"{folder} is finished and has no checkpoint to resume from; use another --output_dir")
    remove_unfinished(folder)
    checkpoints.mkdir(parents=True, exist_ok=True)
    check_same_batch(checkpoints / "batch.json", job.config)
    versions = f"# tracereward {__version__} {job.kind}, torch {torch.__version__}\n"
    atomic_write_text(stored, versions + yaml.safe_dump(settings, sort_keys=False))
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
        InputError: another process holds it.
    """
    if not is_main_process():
        yield
        return
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / CHECKPOINTS / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise InputError(f"another process is running in {folder}; wait for it, or use another --output_dir") from error
    with lock:
        yield


def resolved(data: DataArguments, config: Config, model: ModelConfig) -> dict[str, Any]:
    """The options as given and the defaults of tracereward's own, in the format of ``--config``."""
    own = {
        name
        for cls in type(config).__mro__
        if cls.__module__.startswith("tracereward.")
        for name in vars(cls).get("__annotations__", {})
    }
    settings: dict[str, Any] = dataclasses.asdict(data)
    for source, given in ((model, vars(model)), (config, config.given)):
        for field in dataclasses.fields(source):
            if field.name not in given:
                continue
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if field.name in own or given[field.name] != default:
                settings[field.name] = given[field.name]
    return {name: value for name, value in settings.items() if value is not None}


# Options that may change when a run is resumed.
MAY_CHANGE = {
    "max_steps",
    "num_train_epochs",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "output_dir",
    "report_to",
    "disable_tqdm",
    "per_device_eval_batch_size",
    "shard_discriminator",
    # Their product with the number of processes must not change, see `check_same_batch`.
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
}


def option_defaults(*classes: type) -> dict[str, Any]:
    """The default of every option of these dataclasses."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for cls in classes
        for field in dataclasses.fields(cls)
    }


def check_same_run(stored: dict[str, Any], given: dict[str, Any], defaults: dict[str, Any], folder: Path) -> None:
    """Refuse to resume a run with other options.

    An option that is not stored had its default, including options added since the run was written.

    Args:
        stored: the run's ``config.yaml``, possibly of an earlier version.
        given: the options of the command, see `resolved`.
        defaults: all options of this version, with their defaults.
        folder: the run folder.

    Raises:
        InputError: options differ (named with both values), or this version does not have them.
    """
    unknown = stored.keys() - defaults.keys()
    gone = [
        f"{name}: {stored[name]!r}" for name in sorted(unknown) if name not in RETIRED or stored[name] != RETIRED[name]
    ]
    if gone:
        raise InputError(
            f"{folder} has a run with options that this version of tracereward does not have ({'; '.join(gone)}); "
            "resume it with the version that started it, or use another --output_dir"
        )
    before, now = defaults | stored, defaults | given
    names = (stored.keys() | given.keys()) - MAY_CHANGE - unknown
    differing = [
        f"{name}: {before[name]!r} before, {now[name]!r} now" for name in sorted(names) if before[name] != now[name]
    ]
    if differing:
        raise InputError(
            f"{folder} has a run with other options ({'; '.join(differing)}); pass those, or use another --output_dir"
        )


def check_same_batch(path: Path, config: Config) -> None:
    """Store the batch sizes in `path`, or check them: a run may be resumed with another number of processes.

    Raises:
        InputError: the run was started with another batch size.
    """
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    now = {"rows": rows, "rollouts": getattr(config, "generation_batch_size", None)}
    before = now | (read_json(path) if path.is_file() else {})
    folder = path.parent.parent
    if before["rows"] != rows:
        raise InputError(
            f"{folder} has a run with {before['rows']} rows per optimiser step, this command has {rows} "
            f"({config.world_size} processes): change --per_device_train_batch_size or "
            "--gradient_accumulation_steps so that their product with the processes stays the same"
        )
    if before["rollouts"] != now["rollouts"]:
        raise InputError(
            f"{folder} has a run with {before['rollouts']} rollouts per generation, this command has "
            f"{now['rollouts']}: change --steps_per_generation so that its product with the processes and "
            "--per_device_train_batch_size stays the same"
        )
    atomic_write_json(path, now)


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Re-raise writes that failed on a full disk as `RunFailed`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free if folder.exists() else None
        written_short = (
            "No space left" in str(error)
            or "file write failed" in str(error)
            or (getattr(error, "errno", None) in DISK_FULL)
        )
        if not written_short or isinstance(error, RunFailed | Interrupted):
            raise
        raise RunFailed(
            f"the disk of {folder} is full ({free} bytes free). {kept(folder / CHECKPOINTS)}: "
            "free some space, then run the same command with --resume."
        ) from error


def check_disk(job: Job, models: int) -> None:
    """Refuse if the checkpoints and final weights of `models` models do not fit on the disk.

    Existing files of the run folder count as free space, since a resumed run replaces them.
    """
    config, model = job.config, job.model
    with zero3_disabled(), init_empty_weights():
        shape = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(str(model.model_name_or_path), revision=model.model_revision)
        )
    weights = sum(p.numel() for p in shape.parameters())
    trained = weights // 10 if model.use_peft else weights  # an upper estimate for LoRA
    checkpoints = 0 if config.save_strategy == "no" else (config.save_total_limit or 10) + 1
    needed = models * (checkpoints * trained * 12 + weights * 4)  # float32 weights and two Adam moments; final weights
    present = sum(path.stat().st_size for path in Path(str(config.output_dir)).rglob("*") if path.is_file())
    require_free_disk(str(config.output_dir), needed - present, f"{checkpoints} checkpoints and the finished models")
