"""Disk space: checked before a run, explained when it runs out."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from tracereward.errors import Interrupted, RunFailed
from tracereward.files import is_disk_full, require_free_disk
from tracereward.modeling.distributed import zero3_disabled
from tracereward.modeling.loading import read_config
from tracereward.runs.job import CHECKPOINTS, FitJob, Job, starting_policy
from tracereward.training.checkpoints import KEPT, kept


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Re-raise writes that failed on a full disk as `RunFailed`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free if folder.exists() else None
        if not is_disk_full(error) or isinstance(error, RunFailed | Interrupted):
            raise
        raise RunFailed(
            f"the disk of {folder} is full ({free} bytes free). {kept(folder / CHECKPOINTS)}: "
            "free some space, then run the same command with --resume."
        ) from error


def check_disk(job: Job | FitJob, models: int) -> None:
    """Refuse if the checkpoints and final weights of `models` models do not fit on the disk.

    Existing files of the run folder count as free space, since a resumed run replaces them.
    """
    if isinstance(job, FitJob):
        name, lora = str(job.given.model), job.given.use_peft
        checkpoints = 0 if job.given.readout else KEPT + 1
    else:
        config, name, lora = job.config, starting_policy(job.model), job.model.use_peft
        checkpoints = 0 if config.save_strategy == "no" else (config.save_total_limit or 10) + 1
    with zero3_disabled(), init_empty_weights():
        shape = AutoModelForCausalLM.from_config(read_config(name))
    weights = sum(p.numel() for p in shape.parameters())
    trained = weights // 10 if lora else weights  # an upper estimate for LoRA
    needed = models * (checkpoints * trained * 12 + weights * 4)  # float32 weights and two Adam moments; final weights
    present = sum(path.stat().st_size for path in Path(job.output_dir).rglob("*") if path.is_file())
    require_free_disk(job.output_dir, needed - present, f"{checkpoints} checkpoints and the finished models")
