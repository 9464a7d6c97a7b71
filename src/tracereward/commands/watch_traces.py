"""The traces that `tracereward watch` compares: read, scored where they have no scores, and kept as features."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tracereward.commands.score import score_rows
from tracereward.console import note, say
from tracereward.data.candidates import prompt_key
from tracereward.data.demonstrations import load_demonstrations
from tracereward.data.drift import MIN_QUESTIONS
from tracereward.data.surface_probe import TraceText, surface_features
from tracereward.data.trace_rows import candidate_rows, check_scores, traces_in
from tracereward.errors import InputError
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards.engines import load_scorer
from tracereward.rewards.parts import task_of
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.settings import RewardSettings
from tracereward.tasks.recipes import Task

EXPERTS = 500
"""Experts that are scored, sampled with a fixed seed: enough for quantiles, minutes for a small model on a CPU."""

Rows = list[tuple[str, dict[str, Any]]]
"""Locations and rows."""


@dataclass
class Traces:
    """What is kept of the scored traces of one source, and of all only the features."""

    questions: list[str] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)
    texts: list[TraceText] = field(default_factory=list)

    def add(self, row: dict[str, Any], task: Task) -> float:
        """Keep the features of a scored trace; returns its reward."""
        text, finished, rewards = row["completion"], row.get("finished") is not False, row["token_rewards"]
        reward = float(np.mean(rewards) if row.get("reward") is None else row["reward"])
        self.questions.append(prompt_key(row["prompt"]))
        self.texts.append(TraceText(self.questions[-1], text, finished))
        self.rows.append(
            {
                "reward": reward,
                "no_answer": float(task.extract(text) is None),
                "tokens": float(len(rewards)),
                **surface_features(text, finished),
            }
        )
        return reward

    def column(self, name: str) -> np.ndarray:
        """A feature of all traces."""
        return np.array([row[name] for row in self.rows], dtype=float)


def reward_model_of(reference: str) -> tuple[str, Path | None]:
    """The reward model of a run folder and the folder; for a reward model itself None, or the run that it is in."""
    folder = Path(reference).expanduser()
    if (folder / "reward_model").is_dir():
        return str(folder / "reward_model"), folder
    return reference, folder.parent if (folder.parent / "config.yaml").is_file() else None


def read_experts(given: str | None, run: Path | None, settings: RewardSettings) -> Rows | None:
    """At most `EXPERTS` demonstrations, of the file that is given or of the run; None if neither is known.

    Raises:
        InputError: they cannot be read.
    """
    task = task_of(settings)
    source, split, subset = given, "train", None
    if source is None and run is not None and (run / "config.yaml").is_file():
        stored = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
        copied = run / "demonstrations.jsonl"  # of rows that were given in Python
        source = str(copied) if copied.is_file() else stored.get("demonstrations") or stored.get("dataset_name")
        source, split = source or task.dataset, stored.get("dataset_train_split") or "train"
        subset = stored.get("dataset_config")
    if source is None:
        return None
    subset = subset or (task.subset if source == task.dataset else None)
    try:
        rows = load_demonstrations(source, task, split, subset)
    except InputError as error:
        fix = "" if given else "; --experts names another file of the run's demonstrations"
        raise InputError(f"{error}{fix}") from error
    rows = rows if len(rows) <= EXPERTS else random.Random(0).sample(rows, EXPERTS)
    return [(str(row["source"]), {**row, "finished": True}) for row in rows]


def read_period(source: str, settings: RewardSettings, model: str) -> Rows:
    """The rows of a period; all of them have scores, or none has.

    Raises:
        InputError: a row cannot be read, only some have scores, or there are too few questions.
    """
    rows = list(candidate_rows(source, template=settings.template, tokenizer=load_tokenizer(model)))
    if not rows:
        raise InputError(f"{source}: no rows")
    scored = [_is_scored(row) for _, row in rows]
    if any(scored) and not all(scored):
        raise InputError(f"{rows[scored.index(False)][0]}: no scores, but other rows have them: score all rows or none")
    if scored[0]:
        for where, row in rows:
            for trace in traces_in(row):
                check_scores(where, trace)
        note(f"{source}: its rewards are used as they are; they must be of {model}")
    found = len({prompt_key(row["prompt"]) for _, row in rows})
    if found < MIN_QUESTIONS:
        raise InputError(f"{source}: {found} questions; a comparison needs {MIN_QUESTIONS} or more")
    return rows


def _is_scored(row: dict[str, Any]) -> bool:
    return ("scores" if "candidates" in row else "token_rewards") in row


class Scoring:
    """The reward model, loaded when a row needs it."""

    def __init__(self, model: str, dtype: str | None):
        self.model, self.dtype = model, dtype
        self.loaded: Scorer | None = None

    def scores(self, rows: Rows, what: str) -> Iterator[dict[str, Any]]:
        """The traces of rows with their scores; those that cannot be scored, such as too long ones, are left out.

        Args:
            rows: all with scores, or none.
            what: they are, for a note of how many are scored and left out.
        """
        skipped: list[str] = []
        done: Iterator[dict[str, Any]] = (row for _, row in rows)
        if rows and not _is_scored(rows[0][1]):
            self.loaded = self.loaded or load_scorer(self.model, dtype=self.dtype)
            say(f"scoring {len(rows)} {what}")
            done = score_rows(self.loaded, rows, skipped=skipped)
        for row in done:
            yield from traces_in(row)
        if skipped:
            note(f"left out of the {what}: {len(skipped)} that cannot be scored; the first: {skipped[0]}")
