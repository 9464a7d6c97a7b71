"""Whether a command resumes the run that a folder holds: same options, same batch."""

import dataclasses
from pathlib import Path
from typing import Any

from trl import ModelConfig

from tracereward.errors import InputError
from tracereward.files import atomic_write_json, read_json
from tracereward.runs.job import Config
from tracereward.training.config import RETIRED
from tracereward.training.options import DataArguments


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
