"""Do `sft` and `train` learn with nothing but data and a model? TRL's defaults against those of `training.chosen`.

    python -m benchmarks.defaults --seeds 3 --out benchmarks/results/defaults.jsonl

Sixty demonstrations of a world that the package's tiny model has not seen; each cell is one world, seed and arm.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig

from tracereward.commands.sft import run_sft
from tracereward.commands.train import run_train
from tracereward.files import read_jsonl, write_jsonl
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import sample
from tracereward.metrics import mean
from tracereward.modeling.loading import load_causal_lm
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.quickstart.shipped import BASE
from tracereward.synthetic.arithmetic import splits
from tracereward.tasks.recipes import get_task
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import SupervisedConfig
from tracereward.training.options import DataArguments

TRL_BATCH: dict[str, Any] = {
    "warmup_steps": 0,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 64,
}
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "earlier": {
        "sft": {**TRL_BATCH, "learning_rate": 2e-5},
        "train": {**TRL_BATCH, "learning_rate": 1e-6, "discriminator_learning_rate": 1e-5},
    },
    "chosen": {"sft": {}, "train": {}},
}
COMMON: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}


def accuracy(policy: str, rows: list[dict[str, Any]]) -> float:
    """Share of questions that a policy answers right, greedily."""
    model, tokenizer, task = load_causal_lm(policy, "float32"), load_tokenizer(policy), get_task("arithmetic")
    params = SamplingParams(max_new_tokens=64, temperature=0, batch_size=128)
    chunks = sample(model, tokenizer, [row["prompt"] for row in rows], params, n=1)
    return mean([float(task.verify(one.text, rows[one.prompt]["answer"])) for chunk in chunks for one in chunk])


def cell(world: str, seed: int, arm: str) -> dict[str, Any]:
    """One world, seed and arm: SFT from the package's model, then `train` from the policy of SFT."""
    parts = splits(world, seed, 60, n_validation=0, n_test=200, n_unlabeled=0)
    row: dict[str, Any] = {"world": world, "seed": seed, "arm": arm}
    with tempfile.TemporaryDirectory() as folder:
        experts = Path(folder) / "experts.jsonl"
        write_jsonl(experts, parts["experts"])
        policy = str(BASE)
        for command, run, kind in (("sft", run_sft, SupervisedConfig), ("train", run_train, AdversarialConfig)):
            start, output = time.perf_counter(), f"{folder}/{command}"
            config: Any = kind(output_dir=output, seed=seed, **COMMON, **ARMS[arm][command])
            run(DataArguments(dataset_name=str(experts), task="arithmetic"), config, ModelConfig(policy))
            metrics, policy = read_jsonl(Path(output) / "metrics.jsonl"), f"{output}/policy"
            row[command] = {
                "seconds": time.perf_counter() - start,
                "accuracy": accuracy(policy, parts["test"]),
                "movement": next((m for m in metrics if m["phase"] == "movement"), None),
            }
            losses = [m["loss"] for m in metrics if m["phase"] == "sft" and "loss" in m]
            if losses:
                row[command] |= {"loss_first": losses[0], "loss_last": mean(losses[-8:]), "steps": len(losses)}
                row[command]["token_accuracy"] = metrics[-1].get("mean_token_accuracy") or mean(
                    [m["mean_token_accuracy"] for m in metrics if "mean_token_accuracy" in m][-8:]
                )
    return row


def main() -> None:
    """Run the missing cells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", nargs="+", default=["hops", "multi-skill"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/defaults.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = (
        {(row["world"], row["seed"], row["arm"]) for row in read_jsonl(options.out)} if options.out.exists() else set()
    )
    for seed in range(options.seeds):
        for world in options.worlds:
            for arm in options.arms:
                if (world, seed, arm) not in done:
                    row = cell(world, seed, arm)
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
