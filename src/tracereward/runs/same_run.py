"""Whether a command resumes the run that a folder holds: same options, same batch."""

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tracereward.errors import InputError
from tracereward.files import atomic_write_json, read_json
from tracereward.runs.job import Config, FitJob, Job
from tracereward.training.config import RETIRED
from tracereward.training.option_rules import effective, values_of
from tracereward.training.option_types import option_defaults
from tracereward.training.trl_options import honoured

SECRETS = {"hub_token"}


def resolved(job: Job | FitJob) -> dict[str, Any]:
    """The options in force, defaults included, in the format of ``--config``; without secrets.

    Left out are options that have no effect next to others (`option_rules`) and those without a value.
    """
    values, defaults = values_of(*job.options), defaults_of(job)
    return {
        name: _plain(value)
        for name, value in effective(job.kind, values, defaults).items()
        if name not in SECRETS and (value not in (None, "") or defaults[name])
    }


def stored_options(folder: str | Path) -> dict[str, Any]:
    """The options in the ``config.yaml`` of a run folder; empty if it has no run."""
    path = Path(folder) / "config.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def derived(job: Job) -> dict[str, Any]:
    """The options that were not given and that TRL derived from others, on this machine."""
    given, shown = job.config.given, honoured()
    return {
        name: _plain(value)
        for name, value in vars(job.config).items()
        if name in shown and given.get(name, value) is None and isinstance(value, bool | int | float | str)
    }


def defaults_of(job: Job | FitJob) -> dict[str, Any]:
    """The default of every option of a job."""
    return option_defaults(*map(type, job.options))


def _plain(value: Any) -> Any:
    """A value as YAML has it: names of enumerations, paths as text."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


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
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "per_device_eval_batch_size",
    "shard_discriminator",
    # Their product with the number of processes must not change, see `check_same_batch`.
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    # Of `fit`
    "updates",
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
