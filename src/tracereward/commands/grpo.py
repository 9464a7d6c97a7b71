"""`tracereward grpo`: GRPO with a fixed reward, the upper baseline and the controls."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import ModelConfig

from tracereward.commands.prepared import choose_precision, explained, inherit, lora, prepare
from tracereward.console import is_main_process
from tracereward.data.demonstrations import check_positions
from tracereward.errors import InputError
from tracereward.modeling.distributed import zero3_disabled
from tracereward.modeling.loading import check_model, frozen_copy
from tracereward.modeling.log_probs import mean_log_probs
from tracereward.modeling.tokenization import (
    encode_prompt,
    load_tokenizer,
    pad_id,
    same_vocabulary,
)
from tracereward.runs.cards import about_run, write_policy_card
from tracereward.runs.disk import check_disk
from tracereward.runs.finish import load_policy, train_and_choose
from tracereward.runs.folder import run_folder
from tracereward.runs.job import Job
from tracereward.runs.upload import repositories_of, upload_all
from tracereward.runs.verdict import record_movement
from tracereward.training.config import RewardConfig
from tracereward.training.options import DataArguments
from tracereward.training.rollout_trainer import RolloutTrainer


def run_grpo(data: DataArguments, config: RewardConfig, model: ModelConfig, resume: bool = False) -> Path:
    """GRPO with a fixed reward: the verifier (upper baseline), or log-probs of frozen models (controls)."""
    inherit(data, config, model)
    prepared = prepare(data, config, model, resume)
    config = prepared.config
    job = Job(kind="grpo", data=data, config=config, model=model, resume=resume)
    choose_precision(job)
    if config.base_model is not None:
        check_model(config.base_model)
        if not same_vocabulary(prepared.tokenizer, load_tokenizer(config.base_model)):
            raise InputError(
                f"--base_model {config.base_model} and the policy have different tokenizers; use the model before SFT"
            )
        check_positions(
            [*prepared.rows, *prepared.unlabeled],
            prepared.tokenizer,
            config.base_model,
            rollouts=config.max_completion_length or 0,
        )
    task, tokenizer = prepared.task, prepared.tokenizer
    rows = [{"prompt": r["prompt"], "answer": r["answer"]} for r in [*prepared.rows, *prepared.unlabeled]]
    missing = next((row for row in [*prepared.rows, *prepared.unlabeled] if row["answer"] is None), None)
    if config.reward == "verifier" and missing is not None:
        raise InputError(f"{missing['source']}: no answer; --reward verifier needs one in every row")
    check_disk(job, models=1)

    def correct(completions: list[str], answer: list[str | None], **_: Any) -> list[float | None]:
        pairs = zip(completions, answer, strict=True)
        return [None if gold is None else float(task.verify(text, gold)) for text, gold in pairs]

    with run_folder(job) as run:
        repositories = repositories_of(run, ["policy"])
        with explained():
            policy = load_policy(model)
        functions = [correct]
        if config.reward != "verifier":
            frozen = [(1.0, frozen_copy(policy))]
            if config.base_model is not None:
                with zero3_disabled():
                    base = load_policy(model, config.base_model)
                frozen.append((-1.0, base.eval()))

            def log_probs(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
                ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
                rewards = [0.0] * len(prompts)
                for sign, one in frozen:
                    one.to(trainer.accelerator.device)
                    values = mean_log_probs(one, ids, completion_ids, pad_id(tokenizer))
                    rewards = [reward + sign * value for reward, value in zip(rewards, values, strict=True)]
                return rewards

            log_probs.__name__ = config.reward  # TRL's log name for a reward is its function's name
            functions = [log_probs, correct] if missing is None else [log_probs]
        config.reward_weights = [1.0, 0.0][: len(functions)]
        with explained():
            trainer = RolloutTrainer(
                model=policy,
                reward_funcs=functions,  # pyright: ignore[reportArgumentType] (lists are invariant)
                args=config,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                peft_config=lora(model),
                callbacks=[run.metrics, run.stop],
            )
        chosen = train_and_choose(run, trainer, prepared.validation, tokenizer, remember=prepared.remember)
        write_policy_card(run, about_run(run, len(prepared.rows), chosen))
        moved = record_movement(run, trainer.state.global_step) if is_main_process() else ""
        run.report(f"GRPO on {data.task} with reward: {config.reward}.{chosen}{moved}")
        upload_all(run, repositories)
    return run.folder
