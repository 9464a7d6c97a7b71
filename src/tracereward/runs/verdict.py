"""The verdict at the end of a run, and whether anything moved: found, said, and kept in the run folder."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tracereward.console import note
from tracereward.files import read_jsonl
from tracereward.modeling.model_folder import REWARD_MODEL
from tracereward.reports.report import ScoredTrace
from tracereward.reports.verdicts import write_verdict
from tracereward.runs.folder import Run
from tracereward.runs.held_out import HeldOutQuestion
from tracereward.selection import Candidate
from tracereward.training.movement import (
    RAISE,
    discriminator_movement,
    imitation_movement,
    movement_row,
    policy_movement,
)
from tracereward.training.trainer import AdversarialTrainer
from tracereward.verdict import Verdict, verdict

QUESTIONS = 64
"""With `SAMPLES` of each, 256 rollouts: as many as a few steps of training generate."""
SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class FreshTrace(ScoredTrace):
    """A rollout of the final policy with its rewards, its mean log-prob in nats, and whether it ended by itself."""

    logprob: float
    finished: bool


def judged_questions(held_out: Sequence[HeldOutQuestion]) -> tuple[dict[str, str], str]:
    """Up to `QUESTIONS` prompts with their gold answers; if there are none, why, and what would give some.

    Args:
        held_out: see `held_out_questions`.
    """
    if not held_out:
        return {}, "none: no demonstration is held out; raise --held_out_fraction"
    gold = {one.prompt: one.answer for one in held_out if one.answer is not None}
    if not gold:
        missing = f"none: the {len(held_out)} held-out demonstrations have no answers; add answers"
        return {}, f"{missing}, or give --validation_dataset_name"
    chosen = random.Random(0).sample(list(gold), min(QUESTIONS, len(gold)))
    return {prompt: gold[prompt] for prompt in chosen}, ""


def verdict_on(traces: Sequence[FreshTrace], trainer: AdversarialTrainer) -> Verdict | None:
    """The verdict on rollouts of held-out questions, those of a question together; None if there are none."""
    groups = [list(group) for _, group in groupby(traces, key=lambda trace: trace.question)]
    form = trainer.form
    about = f"{SAMPLES} samples of the final policy for each of {len(groups)} held-out questions"
    about += ", with the log-prob of the starting policy in the reward" * form.adds_reference
    about += ", with the log-prob of the policy taken out of the reward" * form.subtracts_policy
    candidates = [[_candidate(trace, trainer.config.reward_aggregate) for trace in group] for group in groups]
    return verdict(candidates, trainer.task.equal, about=about)


def _candidate(trace: FreshTrace, aggregate: str) -> Candidate:
    return Candidate(
        text=trace.completion,
        answer=trace.answer,
        reward=trace.scores.aggregate(aggregate),
        logprob=trace.logprob,
        length=len(trace.completion),
        correct=trace.correct,
    )


def record_verdict(run: Run, found: Verdict | None, missing: str, step: int) -> None:
    """Say the verdict, and store it in the run folder, in its reward model's folder and in ``metrics.jsonl``.

    In the main process only.

    Args:
        run: its reward model is saved.
        found: None if there is none; an earlier one of the run is then removed.
        missing: why there is none.
        step: the last step.
    """
    for folder in (run.folder, run.folder / REWARD_MODEL):
        write_verdict(folder, found)
    if found is None:
        note(f"verdict: {missing}")
        return
    note(f"verdict{f' on {found.about}' * bool(found.about)}: {found.line}")
    one = found.decisive
    aurocs = {f"auroc/{name}_{kind}": value for name, kinds in found.aurocs.items() for kind, value in kinds.items()}
    row = {"line": found.line, "outcome": found.outcome, "questions": found.questions, "baseline": one.baseline}
    gain = {"difference": one.difference, "low": one.low, "high": one.high}
    run.metrics.append({"phase": "verdict", "step": step, **row, **gain, **aurocs})


def record_movement(run: Run[Any], step: int, advice: str = RAISE) -> str:
    """Say whether discriminator and policy moved, on the screen and in ``metrics.jsonl``; in the main process only.

    Args:
        run: trained.
        step: the last step.
        advice: what to do if the discriminator is at chance.

    Returns:
        A sentence for the report with a leading space; empty if nothing was trained.
    """
    rows = read_jsonl(run.metrics.path)
    policy = imitation_movement(rows) if run.job.kind == "sft" else policy_movement(rows)
    row = movement_row(discriminator_movement(rows, advice), policy)
    if not row:
        return ""
    note(row["line"])
    run.metrics.append({"phase": "movement", "step": step, **row})
    return f" {row['line']}."


def ending(folder: Path) -> str:
    """The last line of a command: where its run is, and, if a model that was trained did not move, that and why."""
    path = folder / "metrics.jsonl"
    rows = [row for row in read_jsonl(path) if row.get("phase") == "movement"] if path.is_file() else []
    if rows and any(rows[-1].get(f"{name}_moved") is False for name in ("discriminator", "policy")):
        return f"ended, and something did not learn: {folder}. {rows[-1]['line']}"
    return f"done: {folder}"
