"""`tracereward audit`: which demonstrations are odd or wrong, by their text and by cross-fitted rewards of steps."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tracereward.commands.partial_output import check_folder_writable, check_new
from tracereward.console import note, say
from tracereward.data.candidates import read_candidates
from tracereward.data.demonstration_checks import ERRORS, Finding, check_rows, outvoted
from tracereward.data.demonstrations import load_demonstrations
from tracereward.data.marks import fingerprint
from tracereward.data.matching import trace_text
from tracereward.errors import Interrupted, check_choice
from tracereward.files import write_jsonl
from tracereward.modeling.loading import best_device, check_model, context_length, read_config
from tracereward.modeling.lost_text import check_texts
from tracereward.modeling.policy_settings import inherited
from tracereward.modeling.precision import fast_dtype, reading_precision
from tracereward.modeling.rendering import Rendering, dated, render
from tracereward.modeling.steps import StepRule, check_steps
from tracereward.modeling.tokenization import policy_tokenizer
from tracereward.reports.audit import write_audit
from tracereward.runs.disk import explain_full_disk
from tracereward.tasks.recipes import Task, get_task
from tracereward.training.audit_orders import DEFAULT_ORDER, ORDERS, suspicion
from tracereward.training.callbacks import StopSignal
from tracereward.training.readout import layers_named
from tracereward.training.step_scores import StepOptions, StepScores, score_steps, step_texts, stepped_traces

ROWS, PAGE, STATES = "audit.jsonl", "audit.html", "states"
SAID = {
    "contrast": "reward of the steps minus that of changed ones in their place",
    "reward": "mean reward of the steps",
    "lowest_reward": "reward of the lowest step",
    "logprob": "mean log-prob",
    "lowest_logprob": "log-prob of the lowest step",
    "sum": "contrast with changed steps plus log-prob of the lowest step, each in standard deviations",
}


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """Options of `tracereward audit`.

    Attributes:
        data: demonstrations: a file, a folder or a Hub id.
        model: folder or Hub id of the causal LM that reads them; None for the checks of the text alone.
        task: maps a data set's fields and reads answers.
        candidates: logged traces of models for the same questions, whose answers are compared.
        questions: file of the questions, if candidates have only their ids.
        output_dir: folder of the results and of the model's states.
        order: one of `ORDERS`.
        template: ``plain``, ``chat``, or None: as the model was trained.
        step_delimiter: text that ends a step; the task's if None.
        steps: another rule for what ends one, see `StepRule`.
        limit: use the first N demonstrations.
        seed: of wrong copies and folds.
        states: folder of the model's states, which other audits may share; in `output_dir` if None.
        dtype: precision of the model, see `reading_precision`.
        overwrite: replace results in the folder.
    """

    data: str
    model: str | None = None
    task: str = "generic"
    candidates: str | None = None
    questions: str | None = None
    output_dir: str = "runs/audit"
    order: str = DEFAULT_ORDER
    template: str | None = None
    step_delimiter: str | None = None
    steps: str | None = None
    limit: int | None = None
    seed: int = 0
    states: str | None = None
    dtype: str | None = None
    overwrite: bool = False

    def rule(self, task: Task) -> StepRule:
        """What ends a step."""
        return StepRule(delimiter=self.step_delimiter or task.step_delimiter, steps=self.steps or "")


def run_audit(options: AuditOptions) -> Path:
    """`tracereward audit`: write ``audit.jsonl`` and ``audit.html``, and say what was found.

    Returns:
        The page.

    Raises:
        InputError: an input cannot be read, results exist already, or nothing can be learned.
        Interrupted: the user stopped it; what the model has read is kept.
    """
    check_choice("order", options.order, ORDERS)
    check_steps(options.step_delimiter, options.steps)
    folder = Path(options.output_dir)
    check_folder_writable(folder)
    for name in (ROWS, PAGE):
        check_new(folder / name, [options.data, options.candidates, options.questions], overwrite=options.overwrite)
    task = get_task(options.task)
    if options.model is not None:
        check_model(options.model)
    subset = task.subset if options.data == task.dataset else None
    rows = load_demonstrations(options.data, task, subset=subset, limit=options.limit)
    findings = check_rows(rows, task)
    if options.candidates is not None:
        for index, finding in outvoted(
            rows, read_candidates(options.candidates, task, questions=options.questions), task
        ):
            findings[index].append(finding)
    audited = [_unread(row, found, task, options) for row, found in zip(rows, findings, strict=True)]
    order = "Those with a finding that says that something is wrong come first."
    if options.model is not None:
        with (
            StopSignal() as stop,
            explain_full_disk(Path(options.states or folder / STATES), "The states that were read are kept"),
        ):
            try:
                read, scores, texts = _score(rows, task, options, stop)
            except Interrupted as error:
                raise Interrupted(f"{error}; the same command continues") from error
        for place, index in enumerate(read):
            audited[index] |= _scored(scores, place, texts[place])
        order += f" Then by {SAID[options.order]}, the lowest first."
        values = suspicion(options.order, scores)
        for index, value in zip(read, values.tolist(), strict=True):
            audited[index]["suspicion"] = -value
    ranked = sorted(audited, key=_rank)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / ROWS, ranked)
    command = " ".join(["tracereward", *sys.argv[1:]])
    write_audit(folder / PAGE, ranked, f"Audit of {Path(options.data).name}", order=order, command=command)
    counts = Counter(kind for row in ranked for kind in {finding["kind"] for finding in row["findings"]})
    say(f"{len(rows)} demonstrations; findings: " + (", ".join(f"{n} {kind}" for kind, n in counts.items()) or "none"))
    return folder / PAGE


def _rank(row: dict[str, Any]) -> tuple[bool, float]:
    """First what is wrong by its text, then what is suspicious; what was not read comes last."""
    wrong = any(finding["kind"] in ERRORS for finding in row["findings"])
    return not wrong, -row["suspicion"] if row["suspicion"] is not None else np.inf


def _unread(row: dict[str, Any], findings: Sequence[Finding], task: Task, options: AuditOptions) -> dict[str, Any]:
    """What is known of a demonstration that no model has read."""
    text = trace_text(row["completion"])
    pieces = options.rule(task).pieces(text)
    return {
        "id": fingerprint(row),
        "source": row["source"],
        "prompt": row["prompt"],
        "completion": row["completion"],
        "answer": task.extract(text),
        "findings": [{"kind": finding.kind, "text": finding.text} for finding in findings],
        "suspicion": None,
        "steps": [{"text": text[start:end]} for start, end in pieces],
    }


def _score(
    rows: Sequence[dict[str, Any]], task: Task, options: AuditOptions, stop: StopSignal
) -> tuple[list[int], StepScores, list[list[str]]]:
    """Score the demonstrations that the model can read: their indices, scores, and the texts of their steps."""
    name = str(options.model)
    template, kwargs = inherited(name, options.template, None)
    rendering = Rendering(template=template, chat_template_kwargs=kwargs or {})
    tokenizer = policy_tokenizer(name, rendering)
    rendered = render(list(rows), tokenizer, dated(rendering, tokenizer))
    check_texts(tokenizer, [(row["source"], [row["prompt"], row["completion"]]) for row in rendered], options.data)
    rule = options.rule(task)
    rule.check(row["completion"] for row in rendered)
    traces = stepped_traces(rendered, tokenizer, rule)
    positions = context_length(read_config(name))
    read = [i for i, trace in enumerate(traces) if len(trace.prompt) + len(trace.completion) <= positions]
    if len(read) < len(rows):
        note(
            f"{len(rows) - len(read)} demonstrations are longer than {name} reads ({positions:.0f} tokens): not scored"
        )
    precision = reading_precision(name, options.dtype)
    scores = score_steps(
        [traces[i] for i in read],
        [rendered[i] for i in read],
        task,
        tokenizer,
        options=StepOptions(
            model=name,
            cache=Path(options.states or Path(options.output_dir) / STATES),
            dtype=getattr(torch, precision.name) if precision.name else fast_dtype(best_device()),
            rule=rule,
            seed=options.seed,
        ),
        stopped=stop.received,
    )
    chosen = scores.readout
    note(
        f"{len(read)} demonstrations with {sum(map(len, scores.rewards))} steps, compared with {scores.changed} "
        f"changed steps: read-out of {layers_named(chosen.layers)}, cross-validated AUROC {chosen.chosen.auroc:.3f}"
    )
    return read, scores, [step_texts(traces[i], tokenizer) for i in read]


def _scored(scores: StepScores, place: int, texts: Sequence[str]) -> dict[str, Any]:
    """The scores of a demonstration and of its steps."""
    rewards, log_probs, sizes = scores.rewards[place], scores.log_probs[place], scores.sizes[place]
    return {
        "reward": round(float(rewards.mean()), 4),
        "logprob": round(float(np.average(log_probs, weights=sizes)), 4),
        "lowest_step": int(rewards.argmin()),
        "steps": [
            {"text": text, "reward": round(reward, 4), "logprob": round(log_prob, 4)}
            for text, reward, log_prob in zip(texts, rewards.tolist(), log_probs.tolist(), strict=True)
        ],
    }
