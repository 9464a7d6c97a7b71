"""`tracereward sft`: supervised fine-tuning on the demonstrations."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTTrainer

from tracereward.commands.prepared import choose_precision, explained, inherit, lora, prepare
from tracereward.console import is_main_process
from tracereward.data.demonstrations import split_rows
from tracereward.modeling.tokenization import (
    encode_completion,
    encode_prompt,
)
from tracereward.runs.cards import about_run, write_policy_card
from tracereward.runs.disk import check_disk
from tracereward.runs.finish import load_policy, train_and_choose
from tracereward.runs.folder import run_folder
from tracereward.runs.job import Job
from tracereward.runs.upload import repositories_of, upload_all
from tracereward.runs.verdict import record_movement
from tracereward.training.checkpoints import SafeTrainer
from tracereward.training.config import SupervisedConfig
from tracereward.training.options import DataArguments


def run_sft(data: DataArguments, config: SupervisedConfig, model: ModelConfig, resume: bool = False) -> Path:
    """Supervised fine-tuning on the demonstrations; returns the run folder, which holds ``policy/``."""
    inherit(data, config, model)
    prepared = prepare(data, config, model, resume)
    config = prepared.config
    job = Job(kind="sft", data=data, config=config, model=model, resume=resume)
    choose_precision(job)
    train, validation = prepared.rows, []
    if config.validation_fraction:
        train, validation = split_rows(prepared.rows, config.validation_fraction, config.seed)
    check_disk(job, models=1)
    with run_folder(job) as run:
        repositories = repositories_of(run, ["policy"])
        tokenizer = prepared.tokenizer
        trainer = build_trainer(train, validation, config, model=model, tokenizer=tokenizer)
        trainer.add_callback(run.metrics)
        trainer.add_callback(run.stop)
        chosen = train_and_choose(run, trainer, prepared.validation, tokenizer, remember=prepared.remember)
        write_policy_card(run, about_run(run, len(train), chosen))
        moved = record_movement(run, trainer.state.global_step) if is_main_process() else ""
        run.report(f"SFT on {len(train)} demonstrations of {data.task}.{chosen}{moved}")
        upload_all(run, repositories)
    return run.folder


def build_trainer(
    train: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    config: SupervisedConfig,
    *,
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> "SupervisedTrainer":
    """Load the policy and tokenise the rows.

    Args:
        train: rows to train on.
        validation: rows whose loss chooses the checkpoint; may be empty.
        config: of the run.
        model: options of the policy.
        tokenizer: its tokenizer.
    """
    with explained():
        return SupervisedTrainer(
            model=load_policy(model),
            args=config,
            train_dataset=tokenised(train, tokenizer),
            eval_dataset=tokenised(validation, tokenizer) if validation else None,
            processing_class=tokenizer,
            peft_config=lora(model),
        )


class SupervisedTrainer(SafeTrainer, SFTTrainer):
    """`trl.SFTTrainer` with complete checkpoints."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        logged = [row["num_tokens"] for row in self.state.log_history if "num_tokens" in row]
        self._total_train_tokens = logged[-1] if logged else 0  # TRL would restart at 0


def tokenised(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows as SFT trains on them: the token ids that the discriminator and scoring use too."""
    encoded = []
    for row in rows:
        prompt, completion = encode_prompt(tokenizer, row["prompt"]), encode_completion(tokenizer, row["completion"])
        mask = [0] * len(prompt) + [1] * len(completion)
        encoded.append({"input_ids": prompt + completion, "completion_mask": mask})
    return Dataset.from_list(encoded)
