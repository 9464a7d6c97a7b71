"""How `tracereward fit` learns: a read-out of the frozen model, and from there, if asked for, fine-tuning."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from tracereward.console import note
from tracereward.errors import InputError, Interrupted
from tracereward.files import read_jsonl
from tracereward.modeling.loading import best_device
from tracereward.modeling.precision import fast_dtype, keep_choice, reading_precision, training_precision
from tracereward.reports.plots import table_figure
from tracereward.reports.tables import Table
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.runs.disk import explain_full_disk
from tracereward.runs.folder import Run
from tracereward.runs.job import CHECKPOINTS, FitJob
from tracereward.runs.same_run import stored_options
from tracereward.selection import Candidate
from tracereward.tasks.recipes import Task
from tracereward.training.checkpoints import DISCRIMINATOR_FILE, save_checkpoint
from tracereward.training.discriminator import Discriminator
from tracereward.training.discriminator_batch import Rollout
from tracereward.training.fit_data import FitData
from tracereward.training.fit_options import FitOptions
from tracereward.training.fit_preparation import split_questions
from tracereward.training.learning_curve import LearningCurve, learning_curve
from tracereward.training.perturbed_pairs import TracePair, pair_auroc, pair_traces, perturbed_pairs
from tracereward.training.readout import Readout, layers_named
from tracereward.training.readout_training import (
    LabelledTrace,
    ReadoutOptions,
    examples_of,
    states_of,
    train_readout,
)
from tracereward.training.update_loop import UpdateLoop
from tracereward.verdict import Verdict, verdict

JUDGED_EVERY = 10  # updates between two held-out accuracies and perturbation AUROCs
PRIOR_SHARE = 0.2  # of the questions to train on, from which the prior of `nnpu` is estimated
RESUMES = "the same command with --resume continues from there"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """A reward model, and how it was learned.

    Attributes:
        model: the reward model.
        tables: for the report.
        figures: for the report, see `Report`.
        sentences: for the report and the card.
    """

    model: TokenRewardModel
    tables: list[Table] = dataclasses.field(default_factory=list)
    figures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sentences: list[str] = dataclasses.field(default_factory=list)


def learn(run: Run[FitJob], data: FitData, settings: RewardSettings, tokenizer: PreTrainedTokenizerBase) -> Learned:
    """Learn from the labelled candidates of the questions to train on.

    With head ``token`` a read-out is fitted first. Fine-tuning starts from it; with head ``action`` it starts from the
    language model.

    Raises:
        Interrupted: the user stopped it.
        RunFailed: non-finite numbers, or a full disk.
    """
    options = run.job.given
    torch.manual_seed(options.seed)  # random initialisation of the head and LoRA
    dtype = getattr(torch, options.dtype or "float32")
    if run.checkpoint is None:
        run.metrics.rewind(-1, -1)
    if options.head == "token":
        learned = read_out(run, data, settings, tokenizer)
        if options.readout:
            return learned
        learned.model.backbone.to(dtype)  # pyright: ignore[reportArgumentType]
    else:
        model = TokenRewardModel.from_backbone(str(options.model), settings, tokenizer, dtype=dtype)
        learned = Learned(model=model.to(best_device()))
    if options.use_peft:
        learned.model.add_lora(_lora(options))
    fine_tune(run, learned.model, data)
    return learned


def _lora(options: FitOptions) -> LoraConfig:
    layers: Any = options.lora_target_modules
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        target_modules="all-linear" if layers == ["all-linear"] else layers,
        task_type="CAUSAL_LM",
    )


def read_out(run: Run[FitJob], data: FitData, settings: RewardSettings, tokenizer: PreTrainedTokenizerBase) -> Learned:
    """Fit a read-out; the states of the frozen model are kept on the disk."""
    options, fitting, traces = run.job.given, _fitting(run), data.traces
    with _resumable(run):
        model, fitted = train_readout(
            str(options.model),
            settings,
            tokenizer,
            traces,
            options=fitting,
            # Measured, calibrated and stored in the precision in which it was fitted.
            dtype=fitting.dtype if options.readout else torch.float32,
            stopped=run.stop.received,
        )
    tried = _table(fitted)
    if run.checkpoint is None:
        labels = np.array([trace.label for trace in traces])
        row: dict[str, Any] = {
            "readout/layers": list(fitted.layers),
            "readout/penalty": fitted.penalty,
            "readout/cross_validated_auroc": fitted.chosen.auroc,
            "discriminator/accuracy_expert": float((fitted.scores[labels] > 0).mean()),
            "discriminator/accuracy_policy": float((fitted.scores[~labels] < 0).mean()),
        }
        judge, rollouts = _discriminator(data, model, options)
        judge.remember(rollouts)
        row["discriminator/held_out_accuracy"] = judge.held_out_accuracy()
        row |= _perturbation(model, _perturbed(data, judge))
        row |= data.leaks
        row |= {
            f"readout/auroc/{f'layer {read}' if str(read).isdigit() else 'mean of layers'}/{penalty}": auroc
            for read, *values in tried.rows
            for penalty, auroc in zip(tried.columns[1:], values, strict=True)
        }
        run.metrics.append({"phase": "fit", "step": 0, **row})
    sentence = (
        f"Read-out of {_chosen(fitted)}: AUROC within the question {fitted.chosen.auroc:.3f} in cross-validation over "
        "the questions to train on, by the label rule."
    )
    return Learned(model=model, tables=[tried, _measured(run)], figures=[table_figure(tried)], sentences=[sentence])


def reading_dtype(options: FitOptions) -> torch.dtype:
    """In which the frozen model reads traces: for states and log-probs, not for training."""
    device = best_device()
    if options.dtype is None and device.type != "cpu":
        return fast_dtype(device)
    name = reading_precision(str(options.model), options.dtype).name
    return getattr(torch, name) if name else fast_dtype(device)


def with_precision(options: FitOptions, resume: bool) -> FitOptions:
    """The options with the precision in force, which is said in one line.

    A read-out has the `dtype` of the frozen model, fine-tuning autocast (`bf16`). A resumed run keeps its own.

    Args:
        options: of the command.
        resume: whether a run in the output folder is resumed.
    """
    name = "dtype" if options.readout and options.head == "token" else "bf16"
    given, before = getattr(options, name), stored_options(options.output_dir) if resume else {}
    chosen: str | bool | None = None
    why = ""
    if name == "dtype":
        why = reading_precision(str(options.model)).why
        chosen = str(reading_dtype(dataclasses.replace(options, dtype=None))).removeprefix("torch.")
    elif best_device().type == "cpu" and options.dtype in (None, "float32"):
        chosen, why = training_precision(str(options.model))
    if before and given in (None, before.get(name)):  # another one that is given is refused
        given = keep_choice(before.get(name), chosen, name)
    elif not before:
        given, why = (chosen, why) if given is None else (given, f"as --{name} says")
        if why:
            note(f"{'reads traces in' if name == 'dtype' else 'bfloat16 autocast'} {given}: {why}")
    return dataclasses.replace(options, **{name: given})


def _fitting(run: Run[FitJob]) -> ReadoutOptions:
    """How a read-out is fitted."""
    options = run.job.given
    return ReadoutOptions(
        objective="bce" if options.objective == "bce" else "pairwise",
        cache=run.job.states,
        dtype=reading_dtype(options),
        seed=options.seed,
    )


@contextlib.contextmanager
def _resumable(run: Run[FitJob]) -> Iterator[None]:
    """Context in which a signal stops the run where states are kept."""
    with run.stop, explain_full_disk(run.job.states, "The states that were read are kept"):
        try:
            yield
        except Interrupted as error:
            raise Interrupted(f"{error}; {RESUMES}") from error
        if run.stop.received():
            raise Interrupted(f"stopped, with the states of all traces kept; {RESUMES}")


def curve(
    run: Run[FitJob],
    data: FitData,
    model: TokenRewardModel,
    task: Task,
    *,
    log_probs: Sequence[Sequence[float | None]],
) -> LearningCurve:
    """The learning curve of the run's read-out on the held-out questions that are judged.

    Args:
        run: the open run.
        data: what it learned from.
        model: the finished read-out.
        task: compares answers.
        log_probs: mean log-prob of each candidate of the held-out questions.

    Raises:
        InputError: no held-out question has right and wrong traces.
        Interrupted: the user stopped it.
    """
    fitting, traces = _fitting(run), data.traces
    known = zip(data.held_out, log_probs, strict=True)
    judged = [(question, own) for question, own in known if all(c.correct is not None for c in question.candidates)]
    pairs = [
        (number, question, c, log_prob)
        for number, (question, own) in enumerate(judged)
        for c, log_prob in zip(question.candidates, own, strict=True)
    ]
    held_out = [
        LabelledTrace(prompt=question.prompt, completion=c.ids, label=bool(c.correct), question=number)
        for number, question, c, _ in pairs
    ]
    if not held_out:
        raise InputError("no learning curve: it is not known which held-out candidates are right")

    def verdict_on(scores: np.ndarray) -> Verdict | None:
        questions: list[list[Candidate]] = [[] for _ in judged]
        for (number, _, found, log_prob), score in zip(pairs, scores.tolist(), strict=True):
            questions[number].append(found.candidate(score, log_prob))
        return verdict(questions, task.equal)

    with _resumable(run):
        found, layers = states_of(
            str(run.job.given.model),
            model.settings,
            model.tokenizer,
            [*traces, *held_out],
            options=fitting,
            stopped=run.stop.received,
        )
        return learning_curve(
            (found.states[: len(traces)], found.states[len(traces) :]),
            layers,
            examples_of(traces),
            examples_of(held_out),
            objective=fitting.objective,
            judged=verdict_on,
            seed=fitting.seed,
        )


def curve_table(found: LearningCurve) -> Table:
    """The learning curve as a table."""
    rows: list[list[Any]] = []
    for one, of_point in zip(found.measured, found.verdicts, strict=True):
        line = None if of_point is None else of_point.line
        rows.append([one.questions, one.value, one.low, one.high, line])
    rows += [[one.questions, one.value, one.low, one.high, "extrapolated"] for one in found.beyond]
    columns = ["questions", "AUROC within the question", "95 % low", "95 % high", "verdict"]
    note = "Extrapolated as a - b / sqrt(questions)."
    if np.isfinite(found.check):
        note += f" The points before the last measured one predict {found.check:.3f} for it."
    return Table("Learning curve, on the held-out questions", columns, rows, note)


def _table(fitted: Readout) -> Table:
    """The cross-validation, a row a layer, and one for the mean of all of them."""
    tried = list(dict.fromkeys(one.layers for one in fitted.table))
    penalties = sorted({one.penalty for one in fitted.table})
    found = {(one.layers, one.penalty): one.auroc for one in fitted.table}
    return Table(
        "Read-out: AUROC within the question in cross-validation",
        ["layers", *(f"penalty {penalty:g}" for penalty in penalties)],
        [[", ".join(map(str, read)), *(found[read, penalty] for penalty in penalties)] for read in tried],
        f"Chosen: {_chosen(fitted)}.",
        best=tried.index(fitted.layers),
    )


def _chosen(fitted: Readout) -> str:
    """Such as ``layers 11, 14, 18 with penalty 0.1``."""
    return f"{layers_named(fitted.layers)} with penalty {fitted.penalty:g}"


def _measured(run: Run[FitJob]) -> Table:
    """What the read-out's row of ``metrics.jsonl`` has."""
    row = next(row for row in read_jsonl(run.metrics.path) if row["phase"] == "fit" and row["step"] == 0)
    names = {
        "readout/cross_validated_auroc": "AUROC within the question, cross-validated",
        "discriminator/accuracy_expert": "positives with a score above 0, cross-validated",
        "discriminator/accuracy_policy": "negatives with a score below 0, cross-validated",
        "discriminator/held_out_accuracy": "held-out experts above the negatives of their question",
        "monitor/perturbation_auroc": "AUROC of experts against perturbed copies of them",
        "surface/auroc": "AUROC of surface features alone, of the labels",
    }
    return Table("Read-out: figures", ["figure", "value"], [[name, row.get(key)] for key, name in names.items()])


def _discriminator(data: FitData, model: TokenRewardModel, options: FitOptions) -> tuple[Discriminator, list[Rollout]]:
    """What trains a reward model, and measures it on held-out questions; and the labelled candidates."""
    rollouts = data.rollouts(perturbed=options.perturbed_per_expert > 0)
    discriminator = Discriminator(
        model,
        data.experts,
        options.discriminator(len(rollouts)),
        seed=options.seed,
        held_out=data.held_out_experts,
    )
    return discriminator, rollouts


def _perturbed(data: FitData, discriminator: Discriminator) -> list[TracePair]:
    held_out = sorted(discriminator.held_out)
    return perturbed_pairs(data.experts, held_out, discriminator.perturbed, discriminator.seed)


def _perturbation(model: TokenRewardModel, pairs: Sequence[TracePair], budget: int | None = None) -> dict[str, float]:
    """AUROC of experts against their perturbed copies, if there are any."""
    if not pairs:
        return {}
    rewards = model.token_rewards(*pair_traces(pairs), token_budget=budget)
    return {"monitor/perturbation_auroc": pair_auroc(pairs, [float(values.mean()) for values in rewards])}


def fine_tune(run: Run[FitJob], model: TokenRewardModel, data: FitData) -> None:
    """Train a reward model on labelled candidates, from the last complete checkpoint if there is one.

    Raises:
        Interrupted: the user stopped it.
        RunFailed: non-finite numbers, or a full disk.
    """
    options = run.job.given
    if options.objective == "nnpu" and options.positive_prior is None:  # not from questions that measure the result
        train, held_out = split_questions(data.train, PRIOR_SHARE, options.seed)
        data = dataclasses.replace(data, train=train, held_out=held_out)
    discriminator, rollouts = _discriminator(data, model, options)
    pairs = _perturbed(data, discriminator)
    leaks: dict[str, Any] = {}
    if run.checkpoint is None:
        discriminator.remember(rollouts)
        if options.head == "action":  # a read-out's row has them
            leaks = dict(data.leaks)
    else:
        discriminator.load(run.checkpoint / DISCRIMINATOR_FILE)
        run.metrics.rewind(discriminator.updates, sys.maxsize)

    def log(update: int, row: dict[str, float]) -> None:
        named: dict[str, Any] = {f"discriminator/{name}": value for name, value in row.items()}
        if update % JUDGED_EVERY == 0:
            named |= _perturbation(model, pairs, options.token_budget)
        run.metrics.append({"phase": "fit", "step": update, **named, **leaks})
        leaks.clear()

    half = options.bf16
    if half is None:
        half = model.device.type == "cuda" and options.dtype in (None, "float32")
    loop = UpdateLoop(
        discriminator=discriminator,
        seed=options.seed,
        judged_every=JUDGED_EVERY,
        stopped=run.stop.received,
        log=log,
        save=lambda: save_checkpoint(run.folder / CHECKPOINTS, discriminator.updates, discriminator.state_dict()),
        autocast=lambda: torch.autocast(model.device.type, torch.bfloat16, enabled=half),
        saved_every=options.save_steps,
    )
    with run.interruptible(lambda: (discriminator.updates, options.updates)):
        loop.run(options.updates, "fit")
