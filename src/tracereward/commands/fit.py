"""`tracereward fit`: a reward model from expert traces and logged traces, without a policy."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from tracereward.commands.prepared import explained
from tracereward.console import note
from tracereward.data.matching import Question
from tracereward.data.readers import rows_of
from tracereward.errors import InputError, nearest
from tracereward.files import atomic_write_json, without_nan, write_jsonl
from tracereward.modeling.loading import check_model, load_causal_lm, read_config
from tracereward.modeling.log_probs import mean_log_probs
from tracereward.modeling.model_folder import REWARD_MODEL
from tracereward.modeling.policy_settings import inherited
from tracereward.modeling.rendering import Rendering, dated
from tracereward.modeling.thinking_marks import check_thinking, thinking_of, thinking_of_template, with_marks
from tracereward.modeling.tokenization import pad_id, policy_tokenizer
from tracereward.reports.verdicts import verdict_html, verdict_markdown
from tracereward.rewards.first_error_fit import JudgedTrace, find_rule
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.parts import stored
from tracereward.rewards.settings import RewardSettings
from tracereward.runs.cards import about_fit
from tracereward.runs.disk import check_disk
from tracereward.runs.fit_report import Measured, measure
from tracereward.runs.fit_training import Learned, curve, curve_table, learn, reading_dtype, with_precision
from tracereward.runs.folder import Run, run_folder
from tracereward.runs.job import FitJob
from tracereward.runs.report import pick_traces
from tracereward.runs.upload import repositories_of, upload_all
from tracereward.runs.verdict import record_movement, record_verdict
from tracereward.tasks.recipes import Task, get_task
from tracereward.training.fit_data import FitData, FitQuestion
from tracereward.training.fit_options import FitOptions
from tracereward.training.fit_preparation import prepare_fit_data, read_fit_data
from tracereward.training.label_rules import LabelRule
from tracereward.training.trackers import Trackers, check_trackers
from tracereward.verdict import Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """The result of `fit`.

    Attributes:
        reward_model: ready to score.
        verdict: whether the reward chooses better than the baselines on the held-out questions; None if unknown.
        label_rule: which candidates were positives and which negatives, such as ``agreeing/disagreeing``.
        folder: the run folder; None if none was asked for.
    """

    reward_model: TokenRewardModel
    verdict: Verdict | None
    label_rule: str
    folder: Path | None = None


def fit(
    demonstrations: Any,
    candidates: Any,
    *,
    model: str,
    output_dir: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> Fitted:
    """Learn a reward model from expert traces and logged traces, without a policy.

    Args:
        demonstrations: rows with prompt and completion: a list of dicts, a pandas DataFrame, a `datasets.Dataset`, or
            the name of a file.
        candidates: traces of models for the same prompts, likewise; optionally with answer, correct, model, logprob.
        model: folder or Hub id of the causal LM that reads the traces.
        output_dir: the run folder; None leaves none behind.
        resume: continue an unfinished run in `output_dir`.
        **options: those of `tracereward fit`, such as ``task="gsm8k"``.

    Raises:
        InputError: unknown options, or rows that cannot be used; names the row and the fix.
        RunFailed: the run failed after it started.
    """
    known = [one.name for one in dataclasses.fields(FitOptions)]
    for name in options:
        if name not in known:
            near = nearest(name, known)
            raise InputError(f"unknown option {name!r}" + (f": did you mean {near!r}?" if near else ""))
    rows = {"demonstrations": demonstrations, "candidates": candidates}
    with contextlib.ExitStack() as stack:
        folder = output_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="tracereward-fit-"))
        files = {
            name: os.fspath(value) if isinstance(value, (str, os.PathLike)) else str(Path(folder) / f"{name}.jsonl")
            for name, value in rows.items()
        }
        named = {"model": model, "output_dir": folder, **files, **options}
        given = FitOptions(**{k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in named.items()})
        fitted = run_fit(given, resume, rows)
    return fitted if output_dir else dataclasses.replace(fitted, folder=None)


def run_fit(options: FitOptions, resume: bool = False, rows: dict[str, Any] | None = None) -> Fitted:
    """`tracereward fit`; the run folder holds ``reward_model/``, ``verdict.json`` and ``report.html``.

    Args:
        options: of the command.
        resume: whether a run in the output folder is resumed.
        rows: demonstrations and candidates by name, where they are not in files.

    Raises:
        InputError: an input cannot be used; before any model is loaded.
        RunFailed: the run failed after it started.
        Interrupted: the user stopped it.
    """
    FitJob(given=options)  # refuses options without effect
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("fit runs in one process: start it without a launcher")
    if options.model is None:
        raise InputError("no model: pass --model, a folder or a Hub id")
    check_trackers(options.report_to)
    task, name = get_task(options.task), options.model
    template, kwargs = inherited(name, options.template, options.chat_template_kwargs)
    read = None
    if template == "plain":
        task = task.behind(with_marks(options.think_marks)) if options.think_marks else task
        read = _read(options, task, rows or {})
    check_model(name)
    if options.use_peft:
        _check_layers(name, options.lora_target_modules)
    options = with_precision(dataclasses.replace(options, template=template, chat_template_kwargs=kwargs), resume)
    rendering = Rendering(template=template, chat_template_kwargs=kwargs or {})
    tokenizer = policy_tokenizer(name, rendering)
    rendering = dated(rendering, tokenizer)
    if read is None:  # only a chat template says whether traces start within the thinking
        task = task.behind(thinking_of_template(tokenizer, rendering, options.think_marks))
        read = _read(options, task, rows or {})
    data = prepare_fit_data(options, task, read, tokenizer=tokenizer, rendering=rendering)
    task = _split(data, options, task, tokenizer=tokenizer, rendering=rendering)
    settings = RewardSettings(
        head=options.head,
        granularity=options.granularity,
        interval=options.interval,
        step_delimiter=options.step_delimiter or task.step_delimiter,
        steps=options.steps or "",
        **stored(task.thinking),
        thinking_weight=options.thinking_weight,
        reward_form="logit",
        task=task.name,
        template=rendering.template,
        chat_template_kwargs=rendering.chat_template_kwargs,
        date=rendering.date,
        base_model=name,
        label_rule=data.rule.name,
    )
    settings.step_rule.check(expert.text for question in data.questions for expert in question.experts)
    job = FitJob(given=options, resume=resume)
    check_disk(job, models=1, traces=_read_states(options, data))
    with run_folder(job) as run:
        repositories = repositories_of(run, [REWARD_MODEL])
        if options.report_to not in (None, ["none"]):
            run.metrics.trackers = Trackers.started(options.report_to, run.folder, run.settings, options.run_name)
        for kind, source in (rows or {}).items():
            if not isinstance(source, (str, os.PathLike)):
                write_jsonl(run.folder / f"{kind}.jsonl", [row for _, row in rows_of(source, kind)])
        with explained():
            learned = learn(run, data, settings, tokenizer)
        model = learned.model.eval()
        judged = sum(len(question.candidates) for question in data.held_out)
        note(f"measuring on {judged} candidates of {len(data.held_out)} held-out questions")
        log_probs = _log_probs(options, model, data.held_out)
        found = measure(model, data.held_out, log_probs, task)
        if options.learning_curve:
            shown = curve(run, data, model, task, log_probs=log_probs)
            atomic_write_json(run.folder / "learning_curve.json", without_nan(shown.to_dict()))
            learned.tables.append(curve_table(shown))
            learned.sentences.append(shown.line)
            note(shown.line)
        _finish(run, learned, data, found)
        upload_all(run, repositories)
    return Fitted(reward_model=model, verdict=found.verdict, label_rule=data.rule.name, folder=run.folder)


def _read(options: FitOptions, task: Task, rows: dict[str, Any]) -> tuple[list[Question], LabelRule, str]:
    """The matched rows, from memory or from the files of the options."""
    demonstrations = rows.get("demonstrations", options.demonstrations or task.dataset)
    candidates = rows.get("candidates", options.candidates)
    if demonstrations is None:
        raise InputError(f"task {task.name!r} has no default dataset: pass --demonstrations, a file or a Hub id")
    if candidates is None:
        raise InputError("no candidates: pass --candidates, traces of models as `tracereward sample` writes them")
    return read_fit_data(options, task, demonstrations, candidates)


def _split(
    data: FitData, options: FitOptions, task: Task, *, tokenizer: PreTrainedTokenizerBase, rendering: Rendering
) -> Task:
    """The task with how the demonstrations are split into thinking and answer, which are checked."""
    rows = [
        {"prompt": question.text, "completion": expert.text, "source": question.where}
        for question in data.questions
        for expert in question.experts
    ]
    thinking = thinking_of(tokenizer, rendering, rows, options.think_marks)
    asked = [row["prompt"] if rendering.template == "plain" else "" for row in rows]
    check_thinking(rows, thinking, asked, options.thinking_weight)
    return task.behind(thinking)


def _check_layers(name: str, wanted: list[str] | None) -> None:
    """Refuse layers for LoRA that the model does not have; reads its configuration only.

    Raises:
        InputError: with the most similar name.
    """
    if wanted in (None, ["all-linear"]):
        return
    with init_empty_weights():
        shape = AutoModelForCausalLM.from_config(read_config(name))
    layers = {full.rpartition(".")[2] for full, layer in shape.named_modules() if isinstance(layer, torch.nn.Linear)}
    for layer in wanted or ():
        if layer.rpartition(".")[2] not in layers:
            near = nearest(layer, layers)
            fix = f"did you mean {near!r}? " if near else ""
            raise InputError(
                f"--lora_target_modules {layer}: {fix}{name} has {', '.join(sorted(layers))}, or all-linear"
            )


def _read_states(options: FitOptions, data: FitData) -> int:
    """Number of traces whose states are read."""
    judged = sum(len(question.candidates) for question in data.held_out) if options.learning_curve else 0
    return len(data.traces) + judged if options.head == "token" else 0


def _log_probs(
    options: FitOptions, model: TokenRewardModel, questions: Sequence[FitQuestion]
) -> list[list[float | None]]:
    """Mean log-prob of each candidate: the rows' own, if all have one, else under the model before training."""
    candidates = [candidate for question in questions for candidate in question.candidates]
    own = sum(candidate.row.logprob is not None for candidate in candidates)
    if own == len(candidates):
        return [[candidate.row.logprob for candidate in question.candidates] for question in questions]
    if own:
        note(f"{own} of {len(candidates)} held-out candidates have a logprob: it is computed for all, with the model")
    prompts = [question.prompt for question in questions for _ in question.candidates]
    language_model = load_causal_lm(str(options.model), reading_dtype(options), model.device)
    flat = iter(mean_log_probs(language_model, prompts, [c.ids for c in candidates], pad_id(model.tokenizer)))
    return [[next(flat) for _ in question.candidates] for question in questions]


def _finish(run: Run[FitJob], learned: Learned, data: FitData, found: Measured) -> None:
    """Write the reward model with its calibration and card, the verdict and the report; says the verdict."""
    model, traces = learned.model, sum(len(question.candidates) for question in data.questions)
    sentences = [
        f"{data.demonstrations} demonstrations and {traces} candidates of {len(data.questions)} questions of the task "
        f"`{model.settings.task}`, of which {len(data.held_out)} questions were held out.",
        f"{data.said[0].upper()}{data.said[1:]}.",
        *learned.sentences,
        *found.missing,
    ]
    step = 0 if run.job.given.readout else run.job.given.updates
    if step and (moved := record_movement(run, step, "raise --learning_rate or --updates").strip()):
        sentences.append(moved)
    rule, sentence = find_rule(model, _judged_traces(data.held_out), run.job.given.seed)
    sentences.append(sentence)
    model.settings = dataclasses.replace(
        model.settings, calibration=found.calibration, abstention=found.abstention, first_error=rule
    )
    folder, missing = run.folder / REWARD_MODEL, " ".join(found.missing)
    model.save_pretrained(folder, verdict_markdown(found.verdict, missing) + about_fit(run, sentences))
    run.report(
        " ".join(sentences),
        verdict=verdict_html(found.verdict, missing),
        tables=learned.tables,
        figures=learned.figures,
        rewards_correct=found.rewards(correct=True),
        rewards_wrong=found.rewards(correct=False),
        traces=pick_traces(found.traces),
    )
    for line in (sentence, *(found.missing if found.verdict is not None else ())):
        note(line)
    record_verdict(run, found.verdict, missing, step)


def _judged_traces(questions: Sequence[FitQuestion]) -> list[JudgedTrace]:
    """Experts, and the candidates that are known to be right or wrong, for the rule for the first error."""
    experts = [(q, expert.text, True, True) for q in questions for expert in q.experts]
    others = [(q, c.row.completion, c.row.finished, c.correct) for q in questions for c in q.candidates]
    return [
        JudgedTrace(prompt=q.text, completion=text, right=right, finished=finished, source=source)
        for source, traces in (("expert", experts), ("candidate", others))
        for q, text, finished, right in traces
        if right is not None
    ]
