"""Disk space: checked before a run, explained when it runs out."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
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
def explain_full_disk(folder: Path, done: str | None = None) -> Iterator[None]:
    """Re-raise writes that failed on a full disk as `RunFailed`.

    Args:
        folder: on that disk.
        done: what is kept, as a clause; by default the last checkpoint of the run folder `folder`.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free if folder.exists() else None
        if not is_disk_full(error) or isinstance(error, RunFailed | Interrupted):
            raise
        raise RunFailed(
            f"the disk of {folder} is full ({free} bytes free). {done or kept(folder / CHECKPOINTS)}: "
            "free some space, then run the same command with --resume."
        ) from error


def check_disk(job: Job | FitJob, models: int, traces: int = 0) -> None:
    """Refuse if the checkpoints and final weights of `models` models, or the states of a read-out, do not fit.

    Existing files of the run folder count as free space, since a resumed run replaces them; so do those of the folder
    of states, which are read again.

    Args:
        job: of the command.
        models: how many are written.
        traces: whose states are kept.
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
    require_free_disk(
        job.output_dir, needed - _present(Path(job.output_dir)), f"{checkpoints} checkpoints and the finished models"
    )
    if isinstance(job, FitJob) and traces:
        config = shape.config.get_text_config()
        states = traces * config.num_hidden_layers * config.hidden_size * torch.bfloat16.itemsize
        what = f"the model's states on {traces} traces"
        require_free_disk(job.states, states - _present(job.states), what, fix="choose another --states")


def _present(folder: Path) -> int:
    """Bytes of the files below a folder, which need not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
