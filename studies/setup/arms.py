"""Training of a study's arms, each in its own run folder."""

import json
import math
import shutil
from typing import Any

from transformers import AutoConfig
from trl import ModelConfig

from studies.setup.judging import greedy
from studies.setup.site import TASK, Site
from tracereward.commands.grpo import run_grpo
from tracereward.commands.sft import run_sft
from tracereward.commands.train import run_train
from tracereward.files import atomic_folder, read_jsonl, write_jsonl
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import RewardConfig, SupervisedConfig
from tracereward.training.option_rules import CONFIG_RULES, Values, without_effect
from tracereward.training.option_types import option_defaults
from tracereward.training.options import DataArguments
from tracereward.training.trl_options import TRAIN

MODEL_OPTIONS = ("discriminator_model", "warmup_model")
"""Options that accept the name of an arm, e.g. ``base``."""
LINEAR = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
"""Linear layers of a transformer block, as Llama, Qwen and Gemma name them."""


def train_sft(
    site: Site, arm: str, start: str, given: dict[str, Any], *, part: str | None = None, choose: bool = False
) -> None:
    """SFT of one arm's policy on the demonstrations or another part of the data; `choose` as in `data_of`."""
    data = data_of(site, part or site.demonstrations, choose)
    model = ModelConfig(model_name_or_path=str(site.policy(start)))
    run_sft(data, SupervisedConfig(**site.options(arm, given)), model, site.unfinished(arm))


def tune_sft(site: Site) -> None:
    """Grid search for SFT: ``sft`` is the setting with the best greedy validation accuracy, the first if tied.

    Writes ``sft/tuning.json``.
    """
    tried = []
    for index, setting in enumerate(site.world.sft_grid):
        arm = f"sft-{index}"
        if not (site.run(arm) / "report.html").exists():
            train_sft(site, arm, site.start, {**site.sft, **setting})
        tried.append({**setting, "accuracy": greedy(site, arm, "validation")["accuracy"]})
    best = max(range(len(tried)), key=lambda index: tried[index]["accuracy"])
    with atomic_folder(site.run("sft")) as folder:
        shutil.copytree(site.policy(f"sft-{best}"), folder / "policy")
        (folder / "tuning.json").write_text(json.dumps({"tried": tried, "chosen": best}, indent=1), encoding="utf-8")


def continue_sft(site: Site, arm: str, choose: bool = False) -> None:
    """Control: continue SFT from ``sft`` for as many steps as GRPO."""
    given = {**site.sft, "max_steps": site.world.grpo["max_steps"]}
    train_sft(site, arm, "sft", {**given, **saves(given, choose)}, choose=choose)


def data_of(site: Site, part: str, choose: bool) -> DataArguments:
    """One part of the data. With `choose`, validation accuracy selects among starting policy and checkpoints."""
    validation = str(site.data("validation")) if choose else None
    return DataArguments(task=TASK, dataset_name=str(site.data(part)), validation_dataset_name=validation)


def saves(given: dict[str, Any], choose: bool) -> dict[str, Any]:
    """Save options: four checkpoints to select from, or only the last."""
    if not choose:
        return {}
    return {"save_strategy": "steps", "save_steps": max(1, math.ceil(given["max_steps"] / 4))}


def prompts(site: Site, unlabeled: int | None = None, choose: bool = False) -> DataArguments:
    """The demonstrations and, for rollouts, the first `unlabeled` of the world's further prompts (default: all)."""
    data = data_of(site, site.demonstrations, choose)
    if unlabeled is None and site.world.unlabeled:
        data.unlabeled_dataset_name = str(site.data("unlabeled"))
    elif unlabeled:
        part = f"unlabeled-{unlabeled}"
        if not site.data(part).exists():
            write_jsonl(site.data(part), read_jsonl(site.data("unlabeled"))[:unlabeled])
        data.unlabeled_dataset_name = str(site.data(part))
    return data


def lora(site: Site) -> dict[str, Any]:
    """LoRA options of `trl.ModelConfig` for the world; empty where all weights are trained.

    Only the upper half of the layers has adapters: without a backward pass below, a step takes a third less time.
    """
    rank = site.world.lora
    if rank is None:
        return {}
    layers = AutoConfig.from_pretrained(site.policy(site.start)).num_hidden_layers
    targets = [f"{layer}.{part}" for layer in range(layers // 2, layers) for part in LINEAR]
    return {"use_peft": True, "lora_r": rank, "lora_alpha": 2 * rank, "lora_target_modules": targets}


def train_grpo(site: Site, arm: str, reward: str, choose: bool = False) -> None:
    """GRPO from ``sft`` on ``logprob`` or ``logratio`` (controls) or ``verifier`` (upper bound)."""
    base = str(site.policy(site.start)) if reward == "logratio" else None
    given = {**site.world.grpo, **saves(site.world.grpo, choose)}
    config = RewardConfig(**site.options(arm, given), reward=reward, base_model=base)
    run_grpo(
        prompts(site, choose=choose),
        config,
        ModelConfig(model_name_or_path=str(site.policy("sft")), **lora(site)),
        site.unfinished(arm),
    )


def adversarial(site: Site, arm: str, given: dict[str, Any]) -> AdversarialConfig:
    """The config of an arm, without the recipe's options that have no effect next to the arm's own."""
    options = site.options(arm, given)
    idle = without_effect(TRAIN, Values(option_defaults(AdversarialConfig) | options), CONFIG_RULES)
    return AdversarialConfig(**{name: value for name, value in options.items() if name not in idle})


def train_irl(site: Site, arm: str, options: dict[str, Any]) -> None:
    """Warm-up and adversarial GRPO.

    Args:
        site: where to train.
        arm: name of the run.
        options: those of `AdversarialConfig`, in which a model may be the name of an arm; and ``unlabeled`` (number
            of prompts without traces), ``start`` (arm of the starting policy, default ``sft``) and ``choose`` (see
            `data_of`).
    """
    given = {**site.world.grpo, **options}
    unlabeled, start, choose = given.pop("unlabeled", None), given.pop("start", "sft"), given.pop("choose", False)
    given |= saves(given, choose)
    for name in MODEL_OPTIONS:
        if given.get(name) is not None:
            given[name] = str(site.policy(site.start if given[name] == "base" else given[name]))
    if site.fast:
        given["discriminator_warmup_updates"] = 8
    config = adversarial(site, arm, given)
    policy = str(site.policy(site.start if start == "base" else start))
    model = ModelConfig(model_name_or_path=policy, **lora(site))
    run_train(prompts(site, unlabeled, choose), config, model, site.unfinished(arm))
