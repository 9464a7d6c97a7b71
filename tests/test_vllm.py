"""Rollouts by vLLM inside the training process, through TRL; needs vLLM: pytest -m slow tests/test_vllm.py."""

import json
import os
import subprocess
import sys

import pytest

from tracereward.tasks.arithmetic import build_model, build_tokenizer, generate

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason="vLLM is not installed (pip install '.[vllm]')")

# On CPUs vLLM repacks linear weights for oneDNN and drops the originals, after which TRL cannot load new ones into it.
RUN = """
import torch
if not torch.cuda.is_available():
    import vllm._custom_ops
    vllm._custom_ops._supports_onednn = False
from tracereward.cli import main
main()
"""


def test_training_with_vllm_rollouts(tmp_path):
    """Warm-up and two steps; vLLM's log-probs of its samples agree with the policy's: it has the policy's weights."""
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0, hidden_size=64, layers=2, heads=2).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    rows = tmp_path / "experts.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in generate("misconception", 16, seed=1)))
    options = {
        "task": "arithmetic",
        "dataset_name": rows,
        "model_name_or_path": tmp_path / "tiny",
        "output_dir": tmp_path / "run",
        "use_vllm": "true",
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.1,
        "vllm_max_model_length": 64,
        "max_completion_length": 32,
        "per_device_train_batch_size": 32,
        "num_generations": 4,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "save_strategy": "no",
        "gradient_checkpointing": "false",
        "discriminator_warmup_updates": 4,
        "warmup_prompts": 8,
        "warmup_rollouts": 4,
    }
    argv = ["train", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, *argv], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in logged if row["phase"] == "warmup"] == [1, 2, 3, 4]
    steps = [row for row in logged if row["phase"] == "train"]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["sampling/sampling_logp_difference/mean"] < 0.01 for row in steps)
    assert (tmp_path / "run" / "reward_model" / "tracereward.json").is_file()
