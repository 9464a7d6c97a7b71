"""`tracereward train`: warm-up and adversarial training, up to a complete run folder."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import ModelConfig

from tracereward.commands.prepared import Prepared, choose_precision, explained, inherit, lora, prepare, texts_of
from tracereward.console import is_main_process, note
from tracereward.data.demonstrations import check_positions
from tracereward.errors import InputError
from tracereward.modeling.loading import check_model
from tracereward.modeling.lost_text import check_texts
from tracereward.modeling.rendering import (
    check_rendering,
    render_prompt,
)
from tracereward.modeling.tokenization import (
    load_tokenizer,
    same_tokenizer,
    same_vocabulary,
)
from tracereward.rewards.heads import subtracts_policy
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.parts import stored
from tracereward.rewards.settings import RewardSettings
from tracereward.runs.cards import about_run, write_policy_card
from tracereward.runs.disk import check_disk
from tracereward.runs.finish import load_policy, train_and_choose
from tracereward.runs.folder import run_folder
from tracereward.runs.held_out import held_out_questions
from tracereward.runs.job import Job, starting_policy
from tracereward.runs.report import report_rewards
from tracereward.runs.upload import repositories_of, upload_all
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.options import DataArguments
from tracereward.training.quantization import quantization
from tracereward.training.rollout_labels import RolloutLabels
from tracereward.training.trainer import AdversarialTrainer
from tracereward.training.warmup_candidates import rendered_candidates, warmup_candidates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The checked inputs of `tracereward train`; no model is loaded yet.

    Attributes:
        prepared: demonstrations, tokenizer and the config.
        demonstrations: rows as `AdversarialTrainer` takes them.
        settings: of the reward model.
        reward_tokenizer: its tokenizer.
        start: name of the model that it starts from.
    """

    prepared: Prepared
    demonstrations: list[dict[str, Any]]
    settings: RewardSettings
    reward_tokenizer: PreTrainedTokenizerBase
    start: str


def checked_inputs(data: DataArguments, config: AdversarialConfig, model: ModelConfig, resume: bool = False) -> Inputs:
    """Read the inputs, choose the options that are not given, and check everything against everything.

    Raises:
        InputError: a file or a model cannot be used, or options conflict.
    """
    prepared = prepare(data, config, model, resume)
    config = prepared.config
    task, tokenizer = prepared.task, prepared.tokenizer
    policy = starting_policy(model)
    start = config.discriminator_model or policy
    reward_tokenizer = tokenizer
    if config.discriminator_model is not None:
        check_model(start)
        reward_tokenizer = load_tokenizer(start)
        check_texts(reward_tokenizer, texts_of(prepared.rows), "--discriminator_model")
        check_rendering(reward_tokenizer, prepared.rendering)
        if same_vocabulary(tokenizer, reward_tokenizer):  # with the policy's end of sequence and chat template
            reward_tokenizer = tokenizer
    demonstrations, rollouts = with_reward_prompts(reward_tokenizer, prepared), config.max_completion_length or 0
    if config.discriminator_model is not None:
        read = [{**row, "prompt": row.get("reward_prompt", row["prompt"])} for row in demonstrations]
        same = same_tokenizer(tokenizer, reward_tokenizer)  # otherwise rollouts have another number of tokens there
        check_positions(read, reward_tokenizer, start, rollouts=rollouts if same else 0)
    if config.warmup_model is not None:
        check_model(config.warmup_model)
        if not same_vocabulary(tokenizer, load_tokenizer(config.warmup_model)):
            raise InputError(
                f"the policy {policy} and --warmup_model {config.warmup_model} have different tokenizers; "
                "use a model with the policy's tokenizer"
            )
        check_positions([*prepared.rows, *prepared.unlabeled], tokenizer, config.warmup_model, rollouts=rollouts)
    labels = RolloutLabels(prepared.rows, task, config.positives, config.negatives)
    note(labels.said())
    if config.warmup_candidates is not None:
        demonstrations = with_candidates(demonstrations, prepared, labels, data=data, config=config)
        if not same_tokenizer(tokenizer, reward_tokenizer):
            read = [
                {**candidate, "prompt": row.get("reward_prompt", row["prompt"])}
                for row in demonstrations
                for candidate in row.get("candidates", ())
            ]
            check_texts(reward_tokenizer, texts_of(read), "--discriminator_model")
            check_positions(read, reward_tokenizer, start)
    if config.positives == "mixed":
        note("USES GOLD ANSWERS: rollouts with a correct answer are additional positives (--positives mixed)")
    settings = RewardSettings(
        head=config.head,
        granularity=config.granularity,
        interval=config.interval,
        step_delimiter=config.step_delimiter or task.step_delimiter,
        steps=config.steps or "",
        **stored(task.thinking),
        thinking_weight=config.thinking_weight,
        beta_clip=config.beta_clip,
        reward_form=str(config.reward_form),
        reference_model=policy if config.reward_form == "logit_plus_logprob" else "",
        uses_gold_answers=config.positives == "mixed",
        label_rule=labels.name,
        aggregate=config.reward_aggregate,
        task=task.name,
        template=prepared.rendering.template,
        chat_template_kwargs=prepared.rendering.chat_template_kwargs,
        date=prepared.rendering.date,
        base_model=start,
    )
    settings.step_rule.check(row["completion"] for row in prepared.rows)
    if config.shared_base and not model.use_peft:
        raise InputError("--shared_base needs --use_peft true: policy and discriminator are two LoRA adapters")
    return Inputs(
        prepared=prepared,
        demonstrations=demonstrations,
        settings=settings,
        reward_tokenizer=reward_tokenizer,
        start=start,
    )


def build_trainer(
    inputs: Inputs, config: AdversarialConfig, model: ModelConfig, callbacks: list[TrainerCallback]
) -> tuple[AdversarialTrainer, Callable[[], TokenRewardModel]]:
    """Load policy and reward model.

    Args:
        inputs: checked.
        config: of the run; `plan` measures with a shorter one than the inputs'.
        model: options of the policy.
        callbacks: of the trainer.

    Returns:
        The trainer, and a function that makes another reward model, untrained.
    """
    prepared, settings, peft = inputs.prepared, inputs.settings, lora(model)
    with explained():
        torch.manual_seed(config.seed)  # random initialisation of the head and LoRA
        starting, policy_peft = load_policy(model), lora(model)
        make = functools.partial(
            TokenRewardModel.from_backbone,
            inputs.start,
            settings,
            inputs.reward_tokenizer,
            peft_config=peft,
            dtype=model.dtype or "float32",
            **quantization(model),
        )
        if config.shared_base:
            assert peft is not None
            starting, policy_peft = get_peft_model(starting, peft), None
            reward_model = TokenRewardModel.beside_policy(starting, settings, prepared.tokenizer, peft)
        else:
            reward_model = make()
        trainer = AdversarialTrainer(
            model=starting,
            reward_model=reward_model,
            demonstrations=inputs.demonstrations,
            args=config,
            task=prepared.task,
            processing_class=prepared.tokenizer,
            peft_config=policy_peft,
            callbacks=callbacks,
        )
    return trainer, make


def run_train(data: DataArguments, config: AdversarialConfig, model: ModelConfig, resume: bool = False) -> Path:
    """Warm-up and adversarial training; the run folder holds ``policy/``, ``reward_model/`` and ``report.html``."""
    inherit(data, config, model)
    inputs = checked_inputs(data, config, model, resume)
    prepared, config = inputs.prepared, inputs.prepared.config
    job = Job(kind="train", data=data, config=config, model=model, resume=resume)
    choose_precision(job)
    check_disk(job, models=2)
    with run_folder(job) as run:
        repositories = repositories_of(run, ["policy", "reward_model"])
        trainer, make = build_trainer(inputs, config, model, [run.metrics, run.stop])
        reward_model = trainer.discriminator.model
        chosen = train_and_choose(run, trainer, prepared.validation, prepared.tokenizer, remember=prepared.remember)
        with trainer.discriminator.averaged():
            weights = trainer.discriminator.weights() if trainer.discriminator.sharded else None
            if is_main_process():
                if weights is not None:
                    reward_model = make()
                    reward_model.load_state_dict(weights, strict=False)
                about = about_run(run, len(prepared.rows), chosen)
                write_policy_card(run, about)
                reward_model.save_pretrained(run.folder / "reward_model", about)
                questions = held_out_questions(trainer, prepared.rows, prepared.validation)
                report_rewards(run, trainer, reward_model, prepared.rows, questions=questions, chosen=chosen)
        upload_all(run, repositories)
    return run.folder


def with_candidates(
    demonstrations: list[dict[str, Any]],
    prepared: Prepared,
    labels: RolloutLabels,
    *,
    data: DataArguments,
    config: AdversarialConfig,
) -> list[dict[str, Any]]:
    """Demonstrations with the `candidates` of ``--warmup_candidates``, which are checked and labelled.

    Args:
        demonstrations: the training rows, possibly followed by unlabeled prompts.
        prepared: the inputs of the run.
        labels: of the rollouts of these demonstrations.
        data: options of the data.
        config: options of the run.

    Raises:
        InputError: the candidates cannot be used, or the replay buffer would not keep them all.
    """
    source, limit, count = str(config.warmup_candidates), config.max_completion_length or 0, len(prepared.rows)
    rows = warmup_candidates(source, prepared.task, prepared.raw[:count], labels)
    rows = rendered_candidates(rows, prepared.tokenizer, prepared.rendering, limit, on_long=data.on_long)
    check_texts(prepared.tokenizer, texts_of(rows), source)
    labelled = sum(row["label"] is not None for row in rows)
    if labelled > config.replay_size:
        raise InputError(
            f"--warmup_candidates {source}: {labelled} rollouts, of which the replay buffer would keep the last "
            f"{config.replay_size}: use --replay_size {labelled}"
        )
    if subtracts_policy(config.head):
        note(
            f"--head {config.head} subtracts the policy's log-prob from the logit, also for candidates of "
            "--warmup_candidates that another model wrote"
        )
    given: list[list[dict[str, Any]]] = [[] for _ in demonstrations]
    for row in rows:
        given[row["demonstration"]].append(row)
    return [{**row, "candidates": found} for row, found in zip(demonstrations, given, strict=True)]


def with_reward_prompts(tokenizer: PreTrainedTokenizerBase, prepared: Prepared) -> list[dict[str, Any]]:
    """Demonstrations, then unlabeled prompts; with `reward_prompt` if the reward model's rendering may differ."""
    rows = [*prepared.rows, *prepared.unlabeled]
    rendering = prepared.rendering
    if rendering.template == "plain" or same_tokenizer(prepared.tokenizer, tokenizer):
        return rows
    return [
        {**row, "reward_prompt": render_prompt(tokenizer, raw["prompt"], rendering, raw["source"])}
        for row, raw in zip(rows, prepared.raw, strict=True)
    ]
