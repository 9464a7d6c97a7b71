"""The training commands: check everything, train, and leave a run folder that is whole.

A run folder holds ``config.yaml`` (resolved), ``metrics.jsonl``, ``checkpoints/`` (each complete or ignored), and, when
the run is done, ``policy/``, for `train` also ``reward_model/``, and ``report.html``.
"""

import contextlib
import copy
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import init_empty_weights
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import GRPOTrainer, ModelConfig, SFTTrainer, get_peft_config

from tracereward import __version__
from tracereward.callbacks import MetricsFile, Progress, StopSignal
from tracereward.checkpoints import SafeTrainer, kept, last_complete_checkpoint
from tracereward.config import AdversarialConfig, DataArguments, PolicyConfig, RewardConfig, SupervisedConfig
from tracereward.demonstrations import (
    check_lengths,
    encode_completion,
    encode_prompt,
    load_demonstrations,
    render,
    split_rows,
)
from tracereward.errors import InputError, Interrupted, RunFailed
from tracereward.files import (
    DISK_FULL,
    atomic_folder,
    atomic_write_text,
    read_jsonl,
    remove_unfinished,
    require_free_disk,
)
from tracereward.models import check_model, check_same_tokenizer, load_tokenizer, pad_id
from tracereward.report import Table, Trace, write_report
from tracereward.reward_model import RewardSettings, TokenRewardModel
from tracereward.sampling import mean_log_probs, sample
from tracereward.tasks import Task, get_task
from tracereward.trainer import AdversarialTrainer

Config = SupervisedConfig | RewardConfig | AdversarialConfig
CHECKPOINTS = "checkpoints"


def note(text: str) -> None:
    """A line for the person who watches; stdout is for data."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass
class Prepared:
    """What a run reads, checked before any model is loaded."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    rows: list[dict[str, Any]]
    unlabeled: list[dict[str, Any]]


def prepare(data: DataArguments, config: Config, model: ModelConfig) -> Prepared:
    """Load the tokenizer and the demonstrations and check them against the options.

    Raises:
        InputError: see `demonstrations` and `models`; also fewer demonstrations than a batch holds.
    """
    task = get_task(data.task)
    if model.model_name_or_path is None:
        raise InputError("no model: give --model_name_or_path, a folder or a Hub id")
    source = data.dataset_name or task.dataset
    if source is None:
        raise InputError(f"task {task.name!r} has no set of its own: give --dataset_name, a file or a Hub id")
    subset = data.dataset_config or (task.subset if data.dataset_name in (None, task.dataset) else None)
    rows = load_demonstrations(source, task, data.dataset_train_split, subset, data.max_demonstrations)
    unlabeled = []
    if data.unlabeled_dataset_name is not None:
        unlabeled = load_demonstrations(data.unlabeled_dataset_name, task, require_completion=False)
        unlabeled = [{**row, "completion": None} for row in unlabeled]
    check_model(model.model_name_or_path, model.model_revision)
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision)
    rows = render(rows, tokenizer, data.template)
    unlabeled = render(unlabeled, tokenizer, data.template)
    limit = config.max_completion_length
    assert limit is not None
    rows, dropped = check_lengths(rows, tokenizer, None, limit, data.on_long)
    if dropped:
        note(f"{dropped} demonstrations left out: longer than {limit} tokens (--max_completion_length)")
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
            f"{source}: {prompts} demonstrations, {needed} prompts needed for {what}. "
            "Give more, or lower --per_device_train_batch_size or --gradient_accumulation_steps."
        )
    return Prepared(task, tokenizer, rows, unlabeled)


def load_policy(model: ModelConfig) -> PreTrainedModel:
    """The starting policy, in float32 unless `dtype` says otherwise."""
    return AutoModelForCausalLM.from_pretrained(
        str(model.model_name_or_path),
        revision=model.model_revision,
        dtype=model.dtype or "float32",
        attn_implementation=model.attn_implementation,
    )


def lora(model: ModelConfig) -> LoraConfig | None:
    """The LoRA settings among the options; None without ``use_peft``."""
    config = get_peft_config(model)
    assert config is None or isinstance(config, LoraConfig)
    return config


def run_sft(data: DataArguments, config: SupervisedConfig, model: ModelConfig, resume: bool = False) -> Path:
    """Supervised fine-tuning on the demonstrations; returns the run folder, which holds ``policy/``."""
    prepared = prepare(data, config, model)
    train, validation = prepared.rows, []
    if config.validation_fraction:
        train, validation = split_rows(prepared.rows, config.validation_fraction, config.seed)
    check_disk(config, model, models=1)
    with run_folder("sft", data, config, model, resume) as run:
        tokenizer = prepared.tokenizer
        trainer = SupervisedTrainer(
            model=load_policy(model),
            args=config,
            train_dataset=tokenised(train, tokenizer),
            eval_dataset=tokenised(validation, tokenizer) if validation else None,
            processing_class=tokenizer,
            peft_config=lora(model),
            callbacks=[run.metrics, run.stop],
        )
        run.train(trainer)
        save_policy(trainer, run.folder / "policy", tokenizer)
        run.report(f"SFT on {len(train)} demonstrations of {data.task}")
    return run.folder


class SupervisedTrainer(SafeTrainer, SFTTrainer):
    """`trl.SFTTrainer` with whole checkpoints."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        logged = [row["num_tokens"] for row in self.state.log_history if "num_tokens" in row]
        self._total_train_tokens = logged[-1] if logged else 0  # TRL would count from 0 again


class GivenRewardTrainer(SafeTrainer, GRPOTrainer):
    """`trl.GRPOTrainer` with whole checkpoints."""


def tokenised(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows as SFT trains on them: the same token ids that the discriminator reads and that scoring reads."""
    encoded = []
    for row in rows:
        prompt, completion = encode_prompt(tokenizer, row["prompt"]), encode_completion(tokenizer, row["completion"])
        mask = [0] * len(prompt) + [1] * len(completion)
        encoded.append({"input_ids": prompt + completion, "completion_mask": mask})
    return Dataset.from_list(encoded)


def run_grpo(data: DataArguments, config: RewardConfig, model: ModelConfig, resume: bool = False) -> Path:
    """GRPO with a given reward: the verifier (upper baseline) or the starting policy's log-prob (control)."""
    prepared = prepare(data, config, model)
    task, tokenizer = prepared.task, prepared.tokenizer
    rows = [{"prompt": r["prompt"], "answer": r["answer"]} for r in [*prepared.rows, *prepared.unlabeled]]
    missing = next((row for row in [*prepared.rows, *prepared.unlabeled] if row["answer"] is None), None)
    if config.reward == "verifier" and missing is not None:
        raise InputError(f"{missing['source']}: no answer; the verifier needs one in every row")
    check_disk(config, model, models=1)

    def correct(completions: list[str], answer: list[str | None], **_: Any) -> list[float | None]:
        pairs = zip(completions, answer, strict=True)
        return [None if gold is None else float(task.verify(text, gold)) for text, gold in pairs]

    with run_folder("grpo", data, config, model, resume) as run:
        policy = load_policy(model)
        functions = [correct]
        if config.reward == "logprob":
            frozen = copy.deepcopy(policy).eval()

            def logprob(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
                frozen.to(trainer.accelerator.device)
                ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
                return mean_log_probs(frozen, ids, completion_ids, pad_id(tokenizer))

            functions = [logprob, correct] if missing is None else [logprob]
        config.reward_weights = [1.0, 0.0][: len(functions)]
        trainer = GivenRewardTrainer(
            model=policy,
            reward_funcs=functions,  # pyright: ignore[reportArgumentType] (lists are invariant)
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora(model),
            callbacks=[run.metrics, run.stop],
        )
        run.train(trainer)
        save_policy(trainer, run.folder / "policy", tokenizer)
        run.report(f"GRPO on {data.task} with reward: {config.reward}")
    return run.folder


def run_train(data: DataArguments, config: AdversarialConfig, model: ModelConfig, resume: bool = False) -> Path:
    """Warm-up and adversarial training; the run folder holds ``policy/``, ``reward_model/`` and ``report.html``."""
    prepared = prepare(data, config, model)
    task, tokenizer = prepared.task, prepared.tokenizer
    start = config.discriminator_model or model.model_name_or_path
    assert start is not None
    for other in (config.discriminator_model, config.warmup_model):
        if other is not None:
            check_model(other)
            check_same_tokenizer(tokenizer, load_tokenizer(other), (str(model.model_name_or_path), other))
    settings = RewardSettings(
        head=config.head,
        granularity=config.granularity,
        interval=config.interval,
        step_delimiter=config.step_delimiter or task.step_delimiter,
        beta_clip=config.beta_clip,
        aggregate=config.reward_aggregate,
        task=task.name,
        template=data.template,
        base_model=start,
    )
    check_disk(config, model, models=2)
    use_peft = model.use_peft if config.discriminator_use_peft is None else config.discriminator_use_peft
    peft = lora(dataclasses.replace(model, use_peft=True)) if use_peft else None
    with run_folder("train", data, config, model, resume) as run:
        torch.manual_seed(config.seed)  # the head and LoRA start at random
        reward_model = TokenRewardModel.from_backbone(start, settings, tokenizer, peft, dtype=model.dtype or "float32")
        trainer = AdversarialTrainer(
            model=load_policy(model),
            reward_model=reward_model,
            demonstrations=prepared.rows,
            args=config,
            task=task,
            processing_class=tokenizer,
            unlabeled=prepared.unlabeled,
            peft_config=lora(model),
            metrics_file=run.metrics,
            stop=run.stop,
            callbacks=[run.metrics, run.stop],
        )
        run.train(trainer)
        save_policy(trainer, run.folder / "policy", tokenizer)
        if trainer.is_world_process_zero():
            reward_model.save_pretrained(run.folder / "reward_model")
            report_rewards(run, trainer, reward_model, prepared.rows, task)
    return run.folder


def report_rewards(
    run: "Run", trainer: AdversarialTrainer, reward_model: TokenRewardModel, rows: list[dict[str, Any]], task: Task
) -> None:
    """The run's report: curves, rewards of fresh rollouts on some of its prompts, and five of them token by token."""
    config = trainer.config
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:32]
    gold = {row["prompt"]: row["answer"] for row in rows}
    policy = trainer.accelerator.unwrap_model(trainer.model)
    assert config.max_completion_length is not None
    samples = [
        s
        for chunk in sample(
            policy, reward_model.tokenizer, prompts, 4, config.max_completion_length, seed=config.seed, batch_size=128
        )
        for s in chunk
    ]
    ids = [encode_prompt(reward_model.tokenizer, prompts[s.prompt]) for s in samples]
    rewards = reward_model.token_rewards(ids, [s.ids for s in samples], config.discriminator_token_budget)
    traces = []
    for s, values in zip(samples, rewards, strict=True):
        answer, prompt = gold[prompts[s.prompt]], prompts[s.prompt]
        correct = None if answer is None else task.verify(s.text, answer)
        scores = reward_model.to_scores(s.ids, values)
        traces.append(Trace(prompt, s.text, scores, correct, task.extract(s.text)))
    how = config.reward_aggregate
    right = [t.scores.aggregate(how) for t in traces if t.correct]
    wrong = [t.scores.aggregate(how) for t in traces if t.correct is False]
    run.report(
        f"Adversarial training on {len(rows)} demonstrations of {task.name}. Rewards and heatmaps: fresh rollouts of "
        f"the final policy on {len(prompts)} of its training prompts.",
        rewards_correct=right,
        rewards_wrong=wrong,
        traces=pick_traces(traces),
    )


def pick_traces(traces: list[Trace], count: int = 5) -> list[Trace]:
    """Up to `count` different traces for a page: wrong and right ones, those the reward is least sure of last."""
    unique = list({(t.question, t.completion): t for t in traces}.values())
    wrong = [t for t in unique if t.correct is False]
    others = [t for t in unique if t.correct is not False]
    chosen = wrong[: count // 2 + 1]
    chosen += others[: count - len(chosen)]
    chosen += wrong[count // 2 + 1 :][: count - len(chosen)]
    return sorted(chosen, key=lambda t: t.question)


def save_policy(trainer: Trainer, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the policy as a plain checkpoint, LoRA merged, whole or not at all."""
    if not trainer.is_world_process_zero():
        return
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(policy, PeftModel):
        policy = copy.deepcopy(policy).merge_and_unload()
    with atomic_folder(folder) as target:
        policy.save_pretrained(target)
        tokenizer.save_pretrained(target)


def check_disk(config: Config, model: ModelConfig, models: int) -> None:
    """Refuse when the checkpoints of `models` models and their final weights do not fit on the disk.

    What the run folder holds already counts: a run that goes on replaces it.
    """
    with init_empty_weights():
        shape = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(str(model.model_name_or_path), revision=model.model_revision)
        )
    weights = sum(p.numel() for p in shape.parameters())
    trained = weights // 10 if model.use_peft else weights  # LoRA of a generous rank
    checkpoints = 0 if config.save_strategy == "no" else (config.save_total_limit or 10) + 1
    needed = models * (checkpoints * trained * 12 + weights * 4)  # float32 weights and two Adam moments; final weights
    present = sum(path.stat().st_size for path in Path(str(config.output_dir)).rglob("*") if path.is_file())
    require_free_disk(str(config.output_dir), needed - present, f"{checkpoints} checkpoints and the finished models")


# The run folder


@dataclasses.dataclass
class Run:
    """An open run folder."""

    kind: str
    folder: Path
    metrics: MetricsFile
    stop: StopSignal
    checkpoint: Path | None
    settings: dict[str, Any]

    def train(self, trainer: Trainer) -> None:
        """Train from the last whole checkpoint, if there is one.

        Raises:
            Interrupted: the user stopped it.
            RunFailed: numbers that are not finite, or a full disk.
        """
        warmed = 0
        if isinstance(trainer, AdversarialTrainer) and self.checkpoint is None:
            warmed = trainer.load_warm_up()
        self.metrics.rewind(
            0 if self.checkpoint is None else int(self.checkpoint.name.split("-")[-1]),
            warmed if self.checkpoint is None else sys.maxsize,
        )
        Progress.replace_default(trainer, self.kind)
        with self.stop, explain_full_disk(self.folder):
            try:
                trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            except RunFailed as error:
                raise RunFailed(
                    f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}: {error}. "
                    f"{kept(self.folder / CHECKPOINTS)}. A lower learning rate usually helps."
                ) from error
        if self.stop.received and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(
                f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
                "the same command with --resume goes on from there"
            )

    def report(self, summary: str, **content: Any) -> None:
        """Write ``report.html``."""
        if int(os.environ.get("RANK", "0")):
            return
        content = {"rewards_correct": [], "rewards_wrong": [], "traces": [], **content}
        tables: list[Table] = content.pop("tables", [])
        write_report(
            self.folder / "report.html",
            title=f"tracereward {self.kind}: {self.folder.name}",
            summary=summary,
            tables=tables,
            metrics=read_jsonl(self.metrics.path),
            command=f"tracereward {self.kind} --config {shlex.quote(str(self.folder / 'config.yaml'))}",
            config=self.settings,
            **content,
        )


@contextlib.contextmanager
def run_folder(kind: str, data: DataArguments, config: Config, model: ModelConfig, resume: bool) -> Iterator[Run]:
    """Open a run folder; refuses to write over another run.

    Raises:
        InputError: the folder holds a run and `resume` is not given, or that run had other options.
        RunFailed: the disk is full.
    """
    folder = Path(str(config.output_dir))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file, not a folder")
    settings = resolved(data, config, model)
    stored = folder / "config.yaml"
    if stored.is_file():
        if not resume:
            raise InputError(
                f"{folder} already holds a run: go on with --resume, or choose another --output_dir. "
                "Nothing is written over."
            )
        check_same_run(yaml.safe_load(stored.read_text(encoding="utf-8")), settings, folder)
    checkpoints = folder / CHECKPOINTS
    checkpoint = last_complete_checkpoint(checkpoints) if resume else None
    remove_unfinished(folder)
    config.output_dir = str(checkpoints)  # what the trainers write while they run
    with explain_full_disk(folder):
        checkpoints.mkdir(parents=True, exist_ok=True)
        versions = f"# tracereward {__version__} {kind}, torch {torch.__version__}\n"
        atomic_write_text(stored, versions + yaml.safe_dump(settings, sort_keys=False))
        if checkpoint is not None:
            note(f"going on from {checkpoint}")
        metrics = MetricsFile(folder / "metrics.jsonl", kind)
        stop = StopSignal(config.rollout_steps if isinstance(config, PolicyConfig) else 1)
        yield Run(kind, folder, metrics, stop, checkpoint, settings)


def resolved(data: DataArguments, config: Config, model: ModelConfig) -> dict[str, Any]:
    """The options as given, with tracereward's own defaults: what ``--config`` reads again."""
    own = {
        name
        for cls in type(config).__mro__
        if cls.__module__ == "tracereward.config"
        for name in vars(cls).get("__annotations__", {})
    }
    settings: dict[str, Any] = dataclasses.asdict(data)
    for source, given in ((model, vars(model)), (config, config.given)):
        for field in dataclasses.fields(source):
            if field.name not in given:
                continue
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if field.name in own or given[field.name] != default:
                settings[field.name] = given[field.name]
    return {name: value for name, value in settings.items() if value is not None}


# What may change between a run and its continuation; anything else would not be the same run.
MAY_CHANGE = {
    "max_steps",
    "num_train_epochs",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "output_dir",
    "report_to",
    "disable_tqdm",
    "per_device_eval_batch_size",
}


def check_same_run(stored: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
    """Refuse to continue a run with other options.

    Raises:
        InputError: names the options that differ, with both values.
    """
    names = (stored.keys() | given.keys()) - MAY_CHANGE
    differing = [
        f"{name}: {stored.get(name)!r} before, {given.get(name)!r} now"
        for name in sorted(names)
        if stored.get(name) != given.get(name)
    ]
    if differing:
        raise InputError(
            f"{folder} holds a run with other options ({'; '.join(differing)}): give the same, or another --output_dir"
        )


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn a write that failed for want of space into a sentence; what was finished before stays."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free if folder.exists() else None
        written_short = (
            "No space left" in str(error)
            or "file write failed" in str(error)
            or (getattr(error, "errno", None) in DISK_FULL)
        )
        if not written_short or isinstance(error, RunFailed | Interrupted):
            raise
        raise RunFailed(
            f"the disk of {folder} is full ({free} bytes free). {kept(folder / CHECKPOINTS)}: "
            "free some space, then give the same command with --resume."
        ) from error
