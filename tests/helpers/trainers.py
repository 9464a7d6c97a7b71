"""A small `AdversarialTrainer` on the arithmetic tokenizer, for tests of single steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.tasks.recipes import get_task
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.trainer import AdversarialTrainer


def build_trainer(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    output: Path,
    **options: Any,
) -> AdversarialTrainer:
    """A trainer of two steps whose policy and discriminator both start from the model in `folder`.

    Options that are None here have their default.
    """
    options = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "discriminator_warmup_updates": 1,
        "discriminator_every": 1,
        "discriminator_learning_rate": 1e-3,
        "warmup_rollouts": 4,
        "warmup_prompts": 4,
        "held_out_fraction": 0.0,
        "perturbed_per_expert": 0,
        "seed": 3,
        **options,
    }
    options = {name: value for name, value in options.items() if value is not None}
    config = AdversarialConfig(output_dir=str(output), **options)
    settings = RewardSettings(
        head=config.head, granularity=config.granularity, beta_clip=config.beta_clip, reward_form=config.reward_form
    )
    torch.manual_seed(0)
    return AdversarialTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_model=TokenRewardModel.from_backbone(str(folder), settings, tokenizer, dtype=torch.float32),
        demonstrations=[dict(row) for row in rows],
        args=config,
        task=get_task("arithmetic"),
        processing_class=tokenizer,
    )
