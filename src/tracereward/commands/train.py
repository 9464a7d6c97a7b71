"""The training commands: check all inputs, train, and write a complete run folder."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTTrainer, get_peft_config

from tracereward.console import is_main_process, note
from tracereward.data.demonstrations import check_lengths, check_positions, load_demonstrations, split_rows
from tracereward.errors import InputError
from tracereward.modeling.distributed import zero3_disabled
from tracereward.modeling.loading import check_model, frozen_copy
from tracereward.modeling.log_probs import mean_log_probs
from tracereward.modeling.lost_text import check_texts
from tracereward.modeling.policy_settings import PolicySettings, inherited
from tracereward.modeling.rendering import (
    Rendering,
    check_reasoning,
    check_rendering,
    dated,
    render,
    render_prompt,
)
from tracereward.modeling.tokenization import (
    encode_completion,
    encode_prompt,
    load_tokenizer,
    pad_id,
    policy_tokenizer,
    same_tokenizer,
    same_vocabulary,
)
from tracereward.rewards.heads import subtracts_policy
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.runs.cards import about_run, write_policy_card
from tracereward.runs.disk import check_disk
from tracereward.runs.finish import load_policy, train_and_choose
from tracereward.runs.first_error import fit_marks
from tracereward.runs.folder import run_folder
from tracereward.runs.held_out import held_out_questions
from tracereward.runs.job import Config, Job, starting_policy
from tracereward.runs.report import report_rewards
from tracereward.runs.upload import repositories_of, upload_all
from tracereward.tasks.recipes import Task, get_task
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.checkpoints import SafeTrainer
from tracereward.training.config import RewardConfig, SupervisedConfig
from tracereward.training.label_rules import RolloutLabels
from tracereward.training.options import DataArguments
from tracereward.training.quantization import check_quantization, quantization
from tracereward.training.rollout_trainer import RolloutTrainer
from tracereward.training.trainer import AdversarialTrainer
from tracereward.training.validation import Validation, load_validation
from tracereward.training.warmup_candidates import rendered_candidates, warmup_candidates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """The inputs of a run, checked before any model is loaded."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    rows: list[dict[str, Any]]
    unlabeled: list[dict[str, Any]]
    raw: list[dict[str, Any]]  # rows, then unlabeled, before templating
    validation: Validation | None
    rendering: Rendering

    @property
    def remember(self) -> PolicySettings:
        """What is stored with the policy."""
        rendering = self.rendering
        return PolicySettings(
            task=self.task.name,
            template=rendering.template,
            chat_template_kwargs=rendering.chat_template_kwargs,
            date=rendering.date,
        )


def inherit(data: DataArguments, config: Config, model: ModelConfig) -> None:
    """Set the template and its variables where they are not given; see `inherited`."""
    kwargs: Any = config.chat_template_kwargs
    found = inherited(starting_policy(model), data.template, kwargs)
    data.template, config.chat_template_kwargs = found
    config.given["chat_template_kwargs"] = config.chat_template_kwargs  # TRL reads JSON in a text


def prepare(data: DataArguments, config: Config, model: ModelConfig) -> Prepared:
    """Load the tokenizer and the demonstrations and check them against the options.

    Raises:
        InputError: the model or a file cannot be used, options conflict, or a batch needs more demonstrations.
    """
    task, policy = get_task(data.task), starting_policy(model)
    source = data.dataset_name or task.dataset
    if source is None:
        raise InputError(f"task {task.name!r} has no default dataset: pass --dataset_name, a file or a Hub id")
    subset = data.dataset_config or (task.subset if data.dataset_name in (None, task.dataset) else None)
    rows = load_demonstrations(
        source, task, split=data.dataset_train_split, subset=subset, limit=data.max_demonstrations
    )
    unlabeled = []
    if data.unlabeled_dataset_name is not None:
        unlabeled = load_demonstrations(data.unlabeled_dataset_name, task, require_completion=False)
        unlabeled = [{**row, "completion": None} for row in unlabeled]
    check_model(policy)
    check_quantization(model, config)
    by_source = {row["source"]: row for row in [*rows, *unlabeled]}
    kwargs: Any = config.chat_template_kwargs or {}
    rendering = Rendering(template=str(data.template), chat_template_kwargs=kwargs)
    tokenizer = policy_tokenizer(policy, rendering)
    rendering = dated(rendering, tokenizer)
    rows = render(rows, tokenizer, rendering)
    check_reasoning(rows, tokenizer, rendering)
    unlabeled = render(unlabeled, tokenizer, rendering)
    limit = config.max_completion_length
    assert limit is not None
    check_texts(tokenizer, texts_of([*rows, *unlabeled]), source)
    rows, dropped = check_lengths(rows, tokenizer, None, limit, on_long=data.on_long)
    if dropped:
        note(f"{dropped} demonstrations dropped: longer than {limit} tokens (--max_completion_length)")
    rollouts = 0 if isinstance(config, SupervisedConfig) else limit
    check_positions([*rows, *unlabeled], tokenizer, policy, rollouts=rollouts)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    prompts = len(rows) + len(unlabeled)
    if isinstance(config, SupervisedConfig):
        needed, what = batch, "one optimiser step"
    else:
        assert config.generation_batch_size is not None
        assert config.num_generations is not None
        needed, what = config.generation_batch_size // config.num_generations, "one batch of rollouts"
    if prompts < needed:
        raise InputError(
            f"{source}: {prompts} demonstrations, but {what} needs {needed} prompts. "
            "Add rows, or lower --per_device_train_batch_size or --gradient_accumulation_steps."
        )
    raw = [by_source[row["source"]] for row in [*rows, *unlabeled]]
    validation = load_validation(
        data,
        task,
        tokenizer,
        [*rows, *unlabeled],
        rendering=rendering,
        max_new_tokens=limit,
        batch_size=config.per_device_train_batch_size,
    )
    if validation is not None and config.save_strategy == "no":
        raise InputError(
            "--validation_dataset_name selects a checkpoint, but --save_strategy no writes none; use steps"
        )
    if validation is not None and config.load_best_model_at_end:
        raise InputError(
            "use only one of --validation_dataset_name, --validation_fraction and --load_best_model_at_end"
        )
    return Prepared(
        task=task,
        tokenizer=tokenizer,
        rows=rows,
        unlabeled=unlabeled,
        raw=raw,
        validation=validation,
        rendering=rendering,
    )


def texts_of(rows: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Location, prompt and completion of rendered rows, for `check_texts`."""
    return [(row["source"], [text for text in (row["prompt"], row["completion"]) if text]) for row in rows]


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Re-raise configuration errors of transformers, PEFT and TRL as `InputError`, with their message."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a system error, such as a full disk
            raise
        raise InputError(" ".join(str(error).split())) from error


def lora(model: ModelConfig) -> LoraConfig | None:
    """LoRA settings from the options; None without ``use_peft``."""
    config = get_peft_config(model)
    assert config is None or isinstance(config, LoraConfig)
    return config


def run_sft(data: DataArguments, config: SupervisedConfig, model: ModelConfig, resume: bool = False) -> Path:
    """Supervised fine-tuning on the demonstrations; returns the run folder, which holds ``policy/``."""
    inherit(data, config, model)
    job = Job(kind="sft", data=data, config=config, model=model, resume=resume)
    prepared = prepare(data, config, model)
    train, validation = prepared.rows, []
    if config.validation_fraction:
        train, validation = split_rows(prepared.rows, config.validation_fraction, config.seed)
    check_disk(job, models=1)
    with run_folder(job) as run:
        repositories = repositories_of(run, ["policy"])
        tokenizer = prepared.tokenizer
        with explained():
            trainer = SupervisedTrainer(
                model=load_policy(model),
                args=config,
                train_dataset=tokenised(train, tokenizer),
                eval_dataset=tokenised(validation, tokenizer) if validation else None,
                processing_class=tokenizer,
                peft_config=lora(model),
                callbacks=[run.metrics, run.stop],
            )
        chosen = train_and_choose(run, trainer, prepared.validation, tokenizer, remember=prepared.remember)
        write_policy_card(run, about_run(run, len(train), chosen))
        run.report(f"SFT on {len(train)} demonstrations of {data.task}.{chosen}")
        upload_all(run, repositories)
    return run.folder


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


def run_grpo(data: DataArguments, config: RewardConfig, model: ModelConfig, resume: bool = False) -> Path:
    """GRPO with a fixed reward: the verifier (upper baseline), or log-probs of frozen models (controls)."""
    inherit(data, config, model)
    job = Job(kind="grpo", data=data, config=config, model=model, resume=resume)
    prepared = prepare(data, config, model)
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
        run.report(f"GRPO on {data.task} with reward: {config.reward}.{chosen}")
        upload_all(run, repositories)
    return run.folder


def run_train(data: DataArguments, config: AdversarialConfig, model: ModelConfig, resume: bool = False) -> Path:
    """Warm-up and adversarial training; the run folder holds ``policy/``, ``reward_model/`` and ``report.html``."""
    inherit(data, config, model)
    job = Job(kind="train", data=data, config=config, model=model, resume=resume)
    prepared = prepare(data, config, model)
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
    if config.shared_base and not model.use_peft:
        raise InputError("--shared_base needs --use_peft true: policy and discriminator are two LoRA adapters")
    check_disk(job, models=2)
    peft = lora(model)
    with run_folder(job) as run:
        repositories = repositories_of(run, ["policy", "reward_model"])
        with explained():
            torch.manual_seed(config.seed)  # random initialisation of the head and LoRA
            starting, policy_peft = load_policy(model), lora(model)
            make = functools.partial(
                TokenRewardModel.from_backbone,
                start,
                settings,
                reward_tokenizer,
                peft_config=peft,
                dtype=model.dtype or "float32",
                **quantization(model),
            )
            if config.shared_base:
                assert peft is not None
                starting, policy_peft = get_peft_model(starting, peft), None
                reward_model = TokenRewardModel.beside_policy(starting, settings, tokenizer, peft)
            else:
                reward_model = make()
            trainer = AdversarialTrainer(
                model=starting,
                reward_model=reward_model,
                demonstrations=demonstrations,
                args=config,
                task=task,
                processing_class=tokenizer,
                peft_config=policy_peft,
                callbacks=[run.metrics, run.stop],
            )
        chosen = train_and_choose(run, trainer, prepared.validation, tokenizer, remember=prepared.remember)
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
                marks = fit_marks(run, trainer, reward_model, questions)
                report_rewards(run, trainer, reward_model, prepared.rows, questions=questions, chosen=chosen + marks)
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
