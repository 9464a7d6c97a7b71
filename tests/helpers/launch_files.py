"""Options of a tiny run under a launcher."""

import subprocess
import time
from pathlib import Path
from typing import Any

from helpers.paths import ROOT

FILES = {path.stem: path for path in (ROOT / "configs" / "accelerate").glob("*.yaml")}


TINY_RUN: dict[str, Any] = {
    "dataset_name": "traces.jsonl",
    "output_dir": "run",
    "max_completion_length": 32,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "lr_scheduler_type": "constant",
    "max_steps": 500,
    "discriminator_warmup_updates": 2,
    "warmup_prompts": 8,
    "warmup_rollouts": 2,
    "on_failure": "ignore",
}


def wait_for(condition, process: subprocess.Popen, seconds: float, folder: Path) -> None:
    """Wait for the condition; fail if the process ends or the time runs out first."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, (folder / "output.txt").read_text()[-4000:]
        assert time.monotonic() < end, (folder / "output.txt").read_text()[-4000:]
        time.sleep(0.1)
