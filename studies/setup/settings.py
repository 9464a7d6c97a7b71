"""Worlds of the studies: those of the quickstart, and word problems for a pretrained model."""

from typing import Any

from tracereward.quickstart.worlds import WORLDS as GENERATED
from tracereward.quickstart.worlds import World

PRETRAINED_RECIPE: dict[str, Any] = {
    "discriminator_learning_rate": 3e-4,
    "discriminator_online_learning_rate": 1e-4,
    "discriminator_prompts": 8,
    "discriminator_rollouts": 2,
    "discriminator_warmup_updates": 16,
    "discriminator_every": 2,
    "warmup_prompts": 128,
    "warmup_rollouts": 2,
    "discriminator_token_budget": 2560,
}
"""Options for a pretrained language model with LoRA, small enough for two CPU cores."""

WORD_PROBLEMS = World(
    name="word-problems",
    experts=400,
    unlabeled=3000,
    corpus=0,
    completion=88,
    pretraining={},
    sft={
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "max_steps": 50,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 8,
        "warmup_steps": 5,
        "save_strategy": "no",
    },
    sft_grid=[{"learning_rate": rate} for rate in (1e-4, 4e-4)],
    grpo={
        "save_strategy": "no",
        "per_device_train_batch_size": 12,
        "gradient_accumulation_steps": 2,
        "num_generations": 8,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 1,
        "max_steps": 12,
    },
    adversarial=PRETRAINED_RECIPE,
    validation=60,
    test=96,
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    lora=16,
)

WORLDS = {**GENERATED, WORD_PROBLEMS.name: WORD_PROBLEMS}
