"""A run is the same however its batches are cut up: gradient accumulation, micro-batches, processes.

Sampling would hide this: each process draws from its own random state. Here a completion is a function of the prompt,
of the number of the batch, of its place among the prompt's completions, and of the policy, so that an error anywhere
comes back in all later steps. It is one of a few scripted traces, drawn in proportion to the policy's probability of
each. A whole trace is one decision: of the 800 in a run, of a distribution over 4 traces, one flips between two layouts
only where a uniform number falls within the rounding error of a boundary.
"""

import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tracereward.adversarial_config import AdversarialConfig
from tracereward.batching import completion_log_probs, pack
from tracereward.discriminator import Discriminator
from tracereward.reward_model import TokenRewardModel
from tracereward.reward_settings import RewardSettings
from tracereward.tasks import get_task
from tracereward.tasks.arithmetic import build_model, build_tokenizer, generate
from tracereward.trainer import AdversarialTrainer

STEPS, GROUP, LONGEST, CHOICES = 50, 4, 21, 4


class Layout(NamedTuple):
    """How the rollouts of a batch are cut up."""

    rows: int  # of a micro-batch
    accumulation: int = 1
    processes: int = 1
    token_budget: int = 8192  # of the discriminator's micro-batches


# Four prompts a batch, on-policy, the discriminator sees the rollouts of demonstrations only.
TRAJECTORY = {
    "objective": "bce",
    "gradient_penalty": 1.0,
    "perturbed_per_expert": 1,
    "held_out_fraction": 0.25,
    "first_difference": "both",
}
# Three prompts a batch, two optimiser steps on each batch, and all that is computed over groups or in the policy.
TOKEN = {
    "head": "implicit",
    "objective": "pairwise",
    "advantages": "token",
    "gamma": 0.9,
    "expert_in_group": True,
    "leave_one_out": True,
    "whiten_rewards": True,
    "loss_type": "grpo",
    "num_iterations": 2,
    "beta": 0.05,
    "perturbed_per_expert": 1,
    "held_out_fraction": 0.25,
    "centre_penalty": 0.01,
    "token_dropout": 0.1,
    "discriminator_ema": 0.9,
    "expert_prompt_share": 0.6,
}
RUNS: dict[str, tuple[dict[str, Any], Layout]] = {
    "trajectory": (TRAJECTORY, Layout(16)),
    "trajectory, accumulated": (TRAJECTORY, Layout(4, accumulation=4, token_budget=150)),
    "trajectory, two processes": (TRAJECTORY, Layout(8, processes=2)),
    "trajectory, another seed": ({**TRAJECTORY, "seed": 4}, Layout(16)),
    "token": (TOKEN, Layout(12)),
    "token, micro-batches": (TOKEN, Layout(2, accumulation=6, token_budget=150)),
    # Six rollouts a process: the second prompt's group spans both.
    "token, two processes": (TOKEN, Layout(3, accumulation=2, processes=2)),
    "no all-reduce": ({**TRAJECTORY, "max_steps": 3}, Layout(8, processes=2)),
}


class Scripted(AdversarialTrainer):
    """Completions are drawn from the policy by a generator of their own; keeps what each batch was."""

    def __init__(self, *args, **kwargs):
        self.batches = []
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **_):
        first = self.accelerator.process_index * len(prompt_ids)  # of this process's rows among all of the batch
        traces = {tuple(expert.prompt): expert.completion for expert in self.discriminator.experts}
        candidates, draws = [], []
        for row, prompt in enumerate(prompt_ids):
            rng = random.Random(f"{prompt} {len(self.batches)} {(first + row) % num_generations}")
            trace = traces.get(tuple(prompt), [])
            candidates += [mutated(trace, rng) for _ in range(CHOICES)]
            draws.append(rng.random())
        repeated = [prompt for prompt in prompt_ids for _ in range(CHOICES)]
        with torch.no_grad(), self._evaluated() as policy:
            batch = pack(repeated, candidates, 0)
            log_probs = (completion_log_probs(policy, batch)[0] * batch.completion_mask).sum(1)
        below = log_probs.double().view(-1, CHOICES).softmax(1).cumsum(1)
        completions = []
        for row, draw in enumerate(draws):
            place = min(int((below[row] < draw).sum()), CHOICES - 1)
            completions.append(candidates[row * CHOICES + place])
        self.batches.append([[list(p), c] for p, c in zip(prompt_ids, completions, strict=True)])
        return completions, None


def mutated(trace: list[int], rng: random.Random) -> list[int]:
    """A trace with up to three tokens replaced, and cut off behind any token; half of those that are cut have an end."""
    ids = list(trace) or [rng.randrange(3, 51) for _ in range(12)]
    for _ in range(rng.randrange(1, 4)):
        ids[rng.randrange(len(ids) - 1)] = rng.randrange(3, 51)
    if rng.random() < 0.7:
        ids = ids[: rng.randrange(3, len(ids))]
        ids += [1] if rng.random() < 0.5 else []
    return ids[:LONGEST]


def train(name: str, folder: Path) -> dict[str, Any]:
    """Train as `RUNS` says. The weights also go to a file, one for each process."""
    settings, layout = RUNS[name]
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    config = AdversarialConfig(
        **{
            "output_dir": str(folder / name),
            "per_device_train_batch_size": layout.rows,
            "gradient_accumulation_steps": layout.accumulation,
            "discriminator_token_budget": layout.token_budget,
            "num_generations": GROUP,
            "max_completion_length": LONGEST,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "discriminator_warmup_updates": 3,
            "discriminator_learning_rate": 1e-3,
            "discriminator_prompts": 6,
            "warmup_rollouts": GROUP,
            "on_failure": "ignore",
            "seed": 3,
            **settings,
        }
    )
    assert config.generation_batch_size == (12 if settings is TOKEN else 16)
    if not (folder / "model").exists():
        build_model(tokenizer, seed=0).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    unlabeled = generate("misconception", 8, seed=77) if settings is TOKEN else []
    trainer = Scripted(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        reward_model=TokenRewardModel.from_backbone(
            str(folder / "model"),
            RewardSettings(head=config.head, granularity=config.granularity, reward_form=config.reward_form),
            tokenizer,
        ),
        demonstrations=generate("misconception", 12, seed=11),
        args=config,
        task=get_task("arithmetic"),
        processing_class=tokenizer,
        unlabeled=[{**row, "completion": None} for row in unlabeled],
    )
    assert trainer.accelerator.num_processes == layout.processes
    flat = lambda parameters: torch.cat([p.detach().flatten() for p in parameters])  # noqa: E731
    models = {"policy": trainer.policy, "discriminator": trainer.discriminator.model}
    start = {key: flat(model.parameters()) for key, model in models.items()}
    trainer.train()
    return {
        "world": trainer.accelerator.num_processes,
        "log": [row for row in trainer.state.log_history if "reward" in row],
        "batches": trainer.batches,
        "start": start,
        "end": {key: flat(model.parameters()) for key, model in models.items()},
    }


if __name__ == "__main__":
    import time

    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        if name == "no all-reduce":
            Discriminator._add_up = lambda self, sums: None
        t = time.time()
        c = time.process_time()
        r = train(name, folder)
        print(name, time.time() - t, time.process_time() - c, file=sys.stderr)
        torch.save(r, folder / f"{name}.{os.environ.get('RANK', '0')}.pt")
