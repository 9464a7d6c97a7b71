"""Training runs that must end with equal weights, and differences between two runs."""

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from transformers.trainer_callback import PrinterCallback

from tracereward.modeling.batching import pack
from tracereward.modeling.distributed import full_state_dict, full_tensor, is_sharded, local_shard
from tracereward.modeling.log_probs import completion_log_probs
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.synthetic.arithmetic import build_model, build_tokenizer, generate
from tracereward.tasks.recipes import get_task
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.trainer import AdversarialTrainer

STEPS, GROUP, LONGEST = 25, 4, 21


CHOICES, SHARPNESS = 3, 10.0  # a trace is sampled with probability proportional to exp(SHARPNESS * mean token log-prob)


class Layout(NamedTuple):
    """How the rollouts of a batch are split."""

    rows: int  # per micro-batch
    accumulation: int = 1
    processes: int = 1
    token_budget: int = 8192  # of the discriminator's micro-batches
    checkpointing: bool = False  # of gradients, in both models
    lora: bool = False  # both models


# Four prompts per batch, on-policy; the discriminator sees only rollouts on demonstrations.
TRAJECTORY = {
    "reward_form": "logit",
    "whiten_rewards": True,
    "scale_rewards": "none",
    "objective": "bce",
    "gradient_penalty": 1.0,
    "perturbed_per_expert": 1,
    "held_out_fraction": 0.1,
    "first_difference": "both",
}


# Three prompts per batch, two optimiser steps per batch, and all options computed over groups or in the policy.
TOKEN = {
    "head": "implicit",
    "objective": "pairwise",
    "advantages": "token",
    "gamma": 0.9,
    "loss_type": "grpo",
    "num_iterations": 2,
    "beta": 0.05,
    "perturbed_per_expert": 1,
    "held_out_fraction": 0.1,
    "centre_penalty": 0.01,
    "token_dropout": 0.1,
    "discriminator_ema": 0.9,
    "expert_prompt_share": 0.6,
}


# Three demonstrations per update: of two processes one makes two passes and the other one.
SHARDED = {**TOKEN, "reward_form": "logit_plus_logprob", "discriminator_prompts": 3, "max_steps": 10}


FEW_TOKENS = 120  # one demonstration with its negatives fills a pass


RUNS: dict[str, tuple[dict[str, Any], Layout]] = {
    "trajectory": (TRAJECTORY, Layout(16)),
    "trajectory, accumulated": (TRAJECTORY, Layout(4, accumulation=4, token_budget=250)),
    "trajectory, two processes": (TRAJECTORY, Layout(8, processes=2)),
    "trajectory, checkpointed": ({**TRAJECTORY, "max_steps": 5}, Layout(16, checkpointing=True)),
    "trajectory, another seed": ({**TRAJECTORY, "seed": 4, "max_steps": 10}, Layout(16)),
    "trajectory, policy at rest": ({**TRAJECTORY, "learning_rate": 0.0, "max_steps": 15}, Layout(16)),
    "token": (TOKEN, Layout(12)),
    "token, micro-batches": (TOKEN, Layout(3, accumulation=4, token_budget=250)),
    # Six rollouts per process: the second prompt's group spans both.
    "token, two processes": (TOKEN, Layout(3, accumulation=2, processes=2)),
    # For test_sharded; the log-probs of the policy and of the starting policy enter both losses.
    "sharded": (SHARDED, Layout(12)),
    "sharded, two processes": (SHARDED, Layout(3, accumulation=2, processes=2, token_budget=FEW_TOKENS)),
    "sharded, 1 % faster": ({**SHARDED, "learning_rate": 1.01e-3}, Layout(12)),
    "sharded, LoRA": (SHARDED, Layout(12, lora=True)),
    "sharded, LoRA, two processes": (
        SHARDED,
        Layout(3, accumulation=2, processes=2, token_budget=FEW_TOKENS, lora=True),
    ),
    "sharded discriminator": ({**SHARDED, "shard_discriminator": True}, Layout(12)),
    "sharded discriminator, two processes": (
        {**SHARDED, "shard_discriminator": True},
        Layout(3, accumulation=2, processes=2, token_budget=FEW_TOKENS),
    ),
    "sharded discriminator, LoRA, two processes": (
        {**SHARDED, "shard_discriminator": True},
        Layout(3, accumulation=2, processes=2, token_budget=FEW_TOKENS, checkpointing=True, lora=True),
    ),
    "few steps, two processes": ({**TOKEN, "max_steps": 4}, Layout(3, accumulation=2, processes=2)),
    "no all-reduce": ({**TRAJECTORY, "max_steps": 2}, Layout(8, processes=2)),
}


class Scripted(AdversarialTrainer):
    """Samples completions with a separate random generator, and records each batch."""

    def __init__(self, *args, **kwargs):
        self.batches = []
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **_):
        first = self.accelerator.process_index * len(prompt_ids)  # index of this process's first row in the batch
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
        means = log_probs.double() / batch.completion_mask.sum(1)
        below = (SHARPNESS * means).view(-1, CHOICES).softmax(1).cumsum(1)
        completions = []
        for row, draw in enumerate(draws):
            place = min(int((below[row] < draw).sum()), CHOICES - 1)
            completions.append(candidates[row * CHOICES + place])
        self.batches.append([[list(p), c] for p, c in zip(prompt_ids, completions, strict=True)])
        return completions, None


def weights(trainer: AdversarialTrainer) -> dict[str, torch.Tensor]:
    """All trained parameters of each model as one vector."""
    trained = {name for name, parameter in trainer.policy.named_parameters() if parameter.requires_grad}
    if is_sharded(trainer):
        policy = [parameter for name, parameter in full_state_dict(trainer).items() if name in trained]
    else:
        policy = [parameter for name, parameter in trainer.policy.named_parameters() if name in trained]
    models = {"policy": policy, "discriminator": trainer.discriminator.parameters.values()}
    return {
        name: torch.cat(
            [torch.zeros(0), *(full_tensor(part.detach()).flatten().float() for part in parameters)]
        ).double()
        for name, parameters in models.items()
    }


def mutated(trace: list[int], rng: random.Random) -> list[int]:
    """A trace with up to three tokens replaced, and sometimes cut; half of the cut ones get an end token."""
    ids = list(trace) or [rng.randrange(3, 51) for _ in range(12)]
    for _ in range(rng.randrange(1, 4)):
        ids[rng.randrange(len(ids) - 1)] = rng.randrange(3, 51)
    if rng.random() < 0.7:
        ids = ids[: rng.randrange(3, len(ids))]
        ids += [1] if rng.random() < 0.5 else []
    return ids[:LONGEST]


def train(name: str, folder: Path) -> dict[str, Any]:
    """Train one of `RUNS`.

    Returns:
        The number of processes; the log of each step; (prompt, completion) of each rollout of this process in each
        batch; and both models' weights at the start (unless sharded) and at the end. For all parameters of the policy,
        including frozen ones: this process's shard and, on the main process, the full tensor. For discriminator and
        frozen starting policy: numbers of weights in this process's shard and in total.
    """
    settings, layout = RUNS[name]
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = str(folder / "model")
    config = AdversarialConfig(
        **{
            "output_dir": str(folder / name),
            "per_device_train_batch_size": layout.rows,
            "gradient_accumulation_steps": layout.accumulation,
            "gradient_checkpointing": layout.checkpointing,
            "discriminator_token_budget": layout.token_budget,
            "num_generations": GROUP,
            "max_completion_length": LONGEST,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            # Adam normalises gradients: without a larger epsilon it would amplify rounding errors to full steps.
            "adam_epsilon": 1e-5,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "log_level": "error",
            "discriminator_warmup_updates": 3,
            "discriminator_every": 1,
            "monitor_every": 2,
            "discriminator_learning_rate": 1e-3,
            "discriminator_prompts": 4,
            "discriminator_rollouts": 2,
            "replay_size": 64,
            "warmup_rollouts": GROUP,
            "on_failure": "ignore",
            "seed": 3,
            **settings,
        }
    )
    lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear") if layout.lora else None
    assert config.generation_batch_size == layout.rows * layout.accumulation * layout.processes
    unlabeled = generate("misconception", 8, seed=77) if "expert_prompt_share" in settings else []
    torch.manual_seed(0)  # LoRA weights are initialised at random
    trainer = Scripted(
        model=AutoModelForCausalLM.from_pretrained(model),
        reward_model=TokenRewardModel.from_backbone(
            model,
            RewardSettings(head=config.head, granularity=config.granularity, reward_form=config.reward_form),
            tokenizer,
            lora,
        ),
        demonstrations=[
            *generate("misconception", 12, seed=11),
            *({**row, "completion": None} for row in unlabeled),
        ],
        args=config,
        task=get_task("arithmetic"),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.remove_callback(PrinterCallback)
    start = {} if is_sharded(trainer) else weights(trainer)
    trainer.train()
    parameters = dict(trainer.policy.named_parameters())
    critic = dict(trainer.discriminator.model.named_parameters())
    started = [] if trainer._starting_policy is None else list(trainer._starting_policy.parameters())
    return {
        "processes": trainer.accelerator.num_processes,
        "log": [row for row in trainer.state.log_history if "loss" in row],
        "batches": trainer.batches,
        "start": start,
        "end": weights(trainer),
        "held": {name: local_shard(parameter).detach().flatten() for name, parameter in parameters.items()},
        "full": {name: tensor.flatten() for name, tensor in full_state_dict(trainer).items() if name in parameters},
        "critic": {name: (local_shard(parameter).numel(), parameter.numel()) for name, parameter in critic.items()},
        "started": (sum(local_shard(p).numel() for p in started), sum(p.numel() for p in started)),
        "gathered": sum(parameter.numel() for parameter in parameters.values() if hasattr(parameter, "ds_tensor")),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("invariance")
    build_model(tokenizer, seed=0, layers=1).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    return path


LOSSES = ["loss", "grad_norm", "reward", "reward_std", "discriminator/loss", "discriminator/grad_norm"]


# Reordered float32 sums differ by about 1e-7 per step, and accumulate. Measured over 50 steps on "token": at most
# 1.4e-5. On "trajectory" the gradient of the gradient penalty is ill-conditioned for small gradients (1.0e-3 in its
# norm), and close rewards of a group are divided by their standard deviation (1.7e-4 in the policy's loss); all else is
# at most 7e-5. Tolerances are about ten times larger, for other processors.
TOLERANCES = {
    "trajectory": dict.fromkeys([*LOSSES, "policy", "discriminator"], 5e-4)
    | {"loss": 2e-3, "discriminator/grad_norm": 1e-2},
    "token": dict.fromkeys([*LOSSES, "policy", "discriminator"], 1.5e-4),
}


def beyond(found: dict[str, float], settings: str) -> dict[str, float]:
    """The differences that exceed their tolerance."""
    return {name: value for name, value in found.items() if not value <= TOLERANCES[settings][name]}


def differences(run: dict[str, Any], other: dict[str, Any], names: list[str]) -> dict[str, float]:
    """Largest difference of each logged metric over the steps, relative to its root mean square."""
    found = {}
    for name in names:
        pairs = [(a.get(name), b.get(name)) for a, b in zip(run["log"], other["log"])]
        assert [a is None for a, _ in pairs] == [b is None for _, b in pairs], f"{name} is missing in some steps"
        a, b = torch.tensor([pair for pair in pairs if pair[0] is not None], dtype=torch.float64).T
        assert len(a)
        found[name] = float((a - b).abs().max() / a.square().mean().sqrt()) if not torch.equal(a, b) else 0.0
    return found


def apart(run: dict[str, Any], other: dict[str, Any], model: str) -> float:
    """Distance of the final weights, relative to how far they moved."""
    end = run["end"][model]
    return float((end - other["end"][model]).norm() / (end - run["start"][model]).norm())
