"""The final policy of a training run: the last weights, or the best after a failure or with validation."""

import dataclasses
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from tracereward.console import is_main_process, note
from tracereward.errors import RunFailed
from tracereward.files import atomic_folder
from tracereward.modeling.adapters import merged
from tracereward.modeling.distributed import full_state_dict, gathered_parameters, is_sharded, zero3_disabled
from tracereward.modeling.loading import load_causal_lm
from tracereward.modeling.policy_settings import PolicySettings
from tracereward.modeling.quantized import is_quantized, prepare_for_lora
from tracereward.runs.folder import Run
from tracereward.runs.job import starting_policy
from tracereward.training.checkpoints import SafeTrainer
from tracereward.training.failures import Failure
from tracereward.training.quantization import quantization
from tracereward.training.validation import Validation


def load_policy(model: ModelConfig, name: str | None = None) -> PreTrainedModel:
    """The starting policy, in float32 unless `dtype` says otherwise; quantized if the options say so.

    Args:
        model: options.
        name: another model to load with the same options.
    """
    policy = load_causal_lm(
        name or starting_policy(model),
        dtype=model.dtype or "float32",
        attn_implementation=model.attn_implementation,
        **quantization(model),
    )
    return prepare_for_lora(policy) if is_quantized(policy) else policy


def train_and_choose(
    run: Run,
    trainer: SafeTrainer,
    validation: Validation | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    remember: PolicySettings,
) -> str:
    """Train and write ``policy/``: the last weights, or, after a failure or with validation questions, the best.

    Args:
        run: the open run folder.
        trainer: not yet trained.
        validation: questions that select the best checkpoint.
        tokenizer: the policy's.
        remember: what is stored with the policy.

    Returns:
        A sentence for the report on how the policy was selected, with a leading space; empty for the last weights.
    """
    model = run.job.model
    trainer.validation, trainer.remember = validation, remember
    if validation is not None:
        start = trainer.accelerator.unwrap_model(trainer.model)
        with gathered_parameters(start):
            trainer.start_accuracy = validation.accuracy(start)
        note(f"validation: the start answers {100 * trainer.start_accuracy:.1f} % of {len(validation)} right")
    run.train(trainer)
    failure = trainer.failure
    folder, text = run.folder / "policy", ""
    if failure is None and validation is None:
        save_policy(trainer, folder, tokenizer, model)
        return text
    restored = trainer.restore_best()
    if failure is not None:
        note_failure(run, failure, restored)
    if validation is not None:
        text = note_choice(run, trainer, restored, len(validation))
    if restored is None:
        with zero3_disabled():
            start = load_policy(dataclasses.replace(model, load_in_4bit=False, load_in_8bit=False))
            save_model(start, folder, tokenizer, remember)
    else:
        save_policy(trainer, folder, tokenizer, model)
    return text


def note_choice(run: Run, trainer: SafeTrainer, restored: str | None, questions: int) -> str:
    """Report the checkpoint that validation selected: on the screen, in ``metrics.jsonl``, and as the returned text."""
    best, start = trainer.state.best_metric, trainer.start_accuracy
    accuracy = start if restored is None or best is None else best
    if restored is None:
        found = f"the start with {100 * start:.1f} %, which no checkpoint reaches"
    else:
        found = f"{restored} with {100 * accuracy:.1f} %; the start has {100 * start:.1f} %"
    text = f"Chosen by greedy accuracy on {questions} validation questions: {found}."
    note(text)
    if is_main_process():
        row = {"phase": "choice", "step": trainer.state.global_step, "chosen": restored or "start"}
        run.metrics.append({**row, "start_accuracy": start, "accuracy": accuracy, "questions": questions})
    return f" {text}"


def note_failure(run: Run, failure: Failure, restored: str | None) -> None:
    """Report the failure that ended a run, its reason and what was restored, on the screen and in ``metrics.jsonl``."""
    what = restored or "the starting policy, and the discriminator as it was before the policy's first step"
    note(f"stopped at step {failure.step}: {failure.name.replace('_', ' ')}. {failure.reason}. Restored: {what}.")
    if is_main_process():
        row = {"phase": "failure", "step": failure.step, "failure": failure.name}
        run.metrics.append({**row, "reason": failure.reason, "restored": what})


def save_policy(trainer: SafeTrainer, folder: Path, tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> None:
    """Write the policy as a plain checkpoint with LoRA merged, atomically. A collective call."""
    weights = full_state_dict(trainer) if is_sharded(trainer) else None
    if not trainer.is_world_process_zero():
        return
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if weights is not None:
        with zero3_disabled():
            fresh = load_policy(model)
        policy = get_peft_model(fresh, policy.peft_config["default"]) if isinstance(policy, PeftModel) else fresh
        policy.load_state_dict(weights)
    policy = merged(policy) if isinstance(policy, PeftModel) else policy
    save_model(policy, folder, tokenizer, trainer.remember)


def save_model(
    policy: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase, remember: PolicySettings | None
) -> None:
    """Write a plain checkpoint with its tokenizer and its settings, atomically.

    Raises:
        RunFailed: a weight is not finite.
    """
    if not is_main_process():
        return
    for name, parameter in policy.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise RunFailed(f"the policy's weights {name} are not finite; {folder} was not written")
    with atomic_folder(folder) as target:
        policy.save_pretrained(target)
        tokenizer.save_pretrained(target)
        if remember is not None:
            remember.write(target)
