"""`tracereward select`: from scored candidates to training data: rejection sampling, preference pairs, and controls."""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracereward.commands.partial_output import STDOUT, Output, check_new, check_output, rows_to, write_row
from tracereward.commands.rerank import candidate_of
from tracereward.console import note, say
from tracereward.data.surface_probe import TraceText, leak_warning, surface_probe
from tracereward.data.trace_rows import candidate_rows, check_facts, is_number
from tracereward.errors import InputError, check_choice, check_number
from tracereward.files import write_jsonl
from tracereward.reports.tables import Table, percent, print_tables
from tracereward.selection import Candidate, vote_groups
from tracereward.tasks.recipes import Task, get_task

FORMATS = ("sft", "dpo", "kto")
ANSWERS = ("any", "different", "same")
CONTROLS = ("random", "shortest", "logprob", "majority")
SEED = 0  # of the random control, and of ties of the majority control


@dataclass(frozen=True, kw_only=True)
class SelectOptions:
    """Options of `tracereward select`.

    Attributes:
        data: rows that `tracereward score` wrote.
        top: how many candidates of a question are kept at most, the highest rewards; pairs of a question for ``dpo``.
        threshold: lowest reward that is kept; None for no limit.
        share: of all candidates, how many are kept at most, the highest rewards of those that remain; None for all.
        format: ``sft``, ``dpo`` or ``kto``, as TRL's trainers read them.
        margin: ``dpo``: smallest difference of the rewards of a pair.
        answers: ``dpo``: the answers of a pair are ``different``, the ``same``, or ``any``.
        controls: also write sets of the same size that use no reward, next to the output.
        task: reads and compares answers.
        output: where the rows go.
    """

    data: str
    top: int = 1
    threshold: float | None = None
    share: float | None = None
    format: str = "sft"
    margin: float = 0.0
    answers: str = "any"
    controls: bool = False
    task: str = "generic"
    output: Output = STDOUT


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A candidate that may be kept.

    Attributes:
        question: key of its question.
        prompt: as in the row, text or messages.
        candidate: text, answer, reward, log-prob, correctness.
        finished: whether the trace ended by itself.
    """

    question: str
    prompt: Any
    candidate: Candidate
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A trace that is kept, and in pairs the one that it is preferred to."""

    chosen: Scored
    rejected: Scored | None = None


Pool = dict[str, list[Scored]]
"""Distinct candidates by question."""
Score = Callable[[Scored], float]


def run_select(options: SelectOptions) -> None:
    """`tracereward select`: write the rows, the controls, and say what was kept and what it was selected for.

    Raises:
        InputError: a row cannot be read or has no reward, an option does not fit the others, or nothing is kept.
    """
    _check(options)
    task = get_task(options.task)
    check_output(options.output, [options.data])
    files = _control_files(options)
    pool, count = read_pool(options.data, task, logprobs=options.controls)
    kept = choose(pool, options, task, lambda one: one.candidate.reward)
    if not kept:
        raise InputError(f"{options.data}: nothing is kept: lower --threshold or --margin, or raise --share")
    with rows_to(options.output) as file:
        for row in training_rows(kept, options.format):
            write_row(file, row)
    everything = [one for found in pool.values() for one in found]
    sets = {"all candidates": everything, "selected": [one.chosen for one in kept]}
    for name, path in files.items():
        control = same_size(pool, kept, task, free_score(name, pool, task))
        write_jsonl(path, training_rows(control, options.format))
        sets[name] = [one.chosen for one in control]
    print_tables([_table(sets)], stdout=False)
    doubles = count - len(everything)
    questions = len({one.chosen.question for one in kept})
    note(
        f"{len(kept)} {'traces' if options.format == 'sft' else 'pairs'} of {questions} of {len(pool)} questions"
        + (f"; left out as equal to another of its question: {doubles}" if doubles else "")
    )
    warning = style_warning(everything, kept)
    if warning is not None:
        say(f"warning: {warning}" + ("" if options.controls else "; --controls writes sets to compare with"))


def _check(options: SelectOptions) -> None:
    check_choice("format", options.format, FORMATS)
    check_choice("answers", options.answers, ANSWERS)
    check_number("--margin", options.margin)
    if options.threshold is not None:
        check_number("--threshold", options.threshold)
    if options.controls and options.output.to_stdout:
        raise InputError("--controls writes files next to the output: give one, -o FILE")


def _control_files(options: SelectOptions) -> dict[str, Path]:
    """The file of each control, which may be written."""
    if not options.controls or options.output.path is None:
        return {}
    base = Path(options.output.path)
    files = {name: base.with_name(f"{base.stem}.{name}{base.suffix}") for name in CONTROLS}
    for path in files.values():
        check_new(path, [options.data], overwrite=options.output.overwrite)
    return files


def read_pool(data: str, task: Task, *, logprobs: bool) -> tuple[Pool, int]:
    """The distinct candidates of each question, and the number of rows.

    Two texts are the same if they differ in white space only; the first is kept.

    Args:
        data: file of scored rows.
        task: reads answers.
        logprobs: whether each row needs a log-prob.

    Raises:
        InputError: a row has no reward, several traces, or no log-prob where it is needed.
    """
    pool: Pool = {}
    seen: set[tuple[str, str]] = set()
    count = 0
    for where, row in candidate_rows(data):
        check_facts(where, row)
        if "completion" not in row or not is_number(row.get("reward")):
            raise InputError(f"{where}: needs a completion and its reward: run `tracereward score` first")
        if logprobs and not is_number(row.get("logprob")):
            raise InputError(f"{where}: --controls needs a logprob in each row; `tracereward sample` writes it")
        count += 1
        question = json.dumps([row.get("question"), row["prompt"]], sort_keys=True)
        text = re.sub(r"\s+", " ", row["completion"]).strip()
        if (question, text) in seen:
            continue
        seen.add((question, text))
        found = Scored(
            question=question,
            prompt=row["prompt"],
            candidate=candidate_of(row, task),
            finished=row.get("finished") is not False,
        )
        pool.setdefault(question, []).append(found)
    if not pool:
        raise InputError(f"{data}: no rows")
    return pool, count


def choose(pool: Pool, options: SelectOptions, task: Task, score: Score) -> list[Kept]:
    """What is kept of all questions, in their order: the highest scores, or pairs of high and low ones."""
    if options.format != "sft":
        fits = _fits(options, task)
        return [pair for found in pool.values() for pair in pairs(found, score, options.top, fits=fits)]
    kept = [
        one
        for found in pool.values()
        for one in ranked(found, score)[: options.top]
        if options.threshold is None or score(one) >= options.threshold
    ]
    if options.share is not None:
        limit = max(1, math.floor(options.share * sum(map(len, pool.values()))))
        best = {id(one) for one in ranked(kept, score)[:limit]}
        kept = [one for one in kept if id(one) in best]
    return [Kept(chosen=one) for one in kept]


def ranked(found: Sequence[Scored], score: Score) -> list[Scored]:
    """The candidates, the highest score first; of equals the first."""
    return sorted(found, key=lambda one: -score(one))


def pairs(found: Sequence[Scored], score: Score, most: int, *, fits: Callable[[Scored, Scored], bool]) -> list[Kept]:
    """At most `most` pairs of one question's candidates, none of which is in two of them.

    The best candidate is paired with the worst that `fits`, then the next one likewise. The chosen one always has the
    higher score.
    """
    free = ranked(found, score)
    made: list[Kept] = []
    for chosen in list(free):
        if len(made) == most:
            break
        if chosen not in free:
            continue
        below = [one for one in reversed(free) if score(one) < score(chosen) and fits(chosen, one)]
        if below:
            made.append(Kept(chosen=chosen, rejected=below[0]))
            free = [one for one in free if one is not chosen and one is not below[0]]
    return made


def _fits(options: SelectOptions, task: Task) -> Callable[[Scored, Scored], bool]:
    def fits(chosen: Scored, rejected: Scored) -> bool:
        if chosen.candidate.reward - rejected.candidate.reward < options.margin:
            return False
        mine, other = chosen.candidate.answer, rejected.candidate.answer
        if options.answers == "any":
            return True
        same = mine == other or (mine is not None and other is not None and task.equal(mine, other))
        return same == (options.answers == "same")

    return fits


def same_size(pool: Pool, kept: Sequence[Kept], task: Task, score: Score) -> list[Kept]:
    """As many traces or pairs of each question as `kept` has, by another score."""
    counts = Counter(one.chosen.question for one in kept)
    paired = kept[0].rejected is not None
    made: list[Kept] = []
    for question, count in counts.items():
        if paired:
            made += pairs(pool[question], score, count, fits=lambda *_: True)
        else:
            made += [Kept(chosen=one) for one in ranked(pool[question], score)[:count]]
    return made


def free_score(name: str, pool: Pool, task: Task) -> Score:
    """The score of a control: random, shortness, log-prob, or 1 for the question's most frequent answer."""
    rng = random.Random(SEED)
    chance = {id(one): rng.random() for found in pool.values() for one in found}
    if name == "majority":
        common = {id(one) for found in pool.values() for one in _with_majority(found, task)}
        return lambda one: (id(one) in common) + chance[id(one)] / 2
    if name == "shortest":
        return lambda one: -len(one.candidate.text)
    if name == "logprob":
        return lambda one: one.candidate.logprob or 0.0
    return lambda one: chance[id(one)]


def _with_majority(found: Sequence[Scored], task: Task) -> list[Scored]:
    votes = Counter(one.candidate.answer for one in found if one.candidate.answer is not None)
    groups = vote_groups(votes, task.equal)
    most = max(groups, key=lambda group: sum(votes[text] for text in group), default=[])
    return [one for one in found if one.candidate.answer in most]


def training_rows(kept: Sequence[Kept], form: str) -> list[dict[str, Any]]:
    """The rows as TRL's trainers read them; completions of prompts in messages are messages."""
    rows = []
    for one in kept:
        prompt = one.chosen.prompt
        if form == "sft":
            rows.append({"prompt": prompt, "completion": _text(one.chosen), "reward": one.chosen.candidate.reward})
            continue
        assert one.rejected is not None
        if form == "dpo":
            rows.append({"prompt": prompt, "chosen": _text(one.chosen), "rejected": _text(one.rejected)})
        else:
            rows.append({"prompt": prompt, "completion": _text(one.chosen), "label": True})
            rows.append({"prompt": prompt, "completion": _text(one.rejected), "label": False})
    return rows


def _text(one: Scored) -> Any:
    text = one.candidate.text
    return text if isinstance(one.prompt, str) else [{"role": "assistant", "content": text}]


def _table(sets: dict[str, list[Scored]]) -> Table:
    judged = all(one.candidate.correct is not None for one in sets["all candidates"])
    rows: list[list[str | float | int | None]] = []
    for name, found in sets.items():
        of = [one.candidate for one in found]
        right = percent(sum(bool(c.correct) for c in of) / len(of)) if judged else None
        silent = percent(sum(c.answer is None for c in of) / len(of))
        length = sum(len(c.text) for c in of) / len(of)
        rows.append([name, len(of), f"{sum(c.reward for c in of) / len(of):+.2f}", right, silent, round(length)])
    columns = ["set", "traces", "mean reward", "right, %", "no answer, %", "characters"]
    return Table("What was selected", columns, rows)


def style_warning(everything: Sequence[Scored], kept: Sequence[Kept]) -> str | None:
    """A sentence if surface features alone tell what was kept from what was not."""
    chosen = [one.chosen for one in kept]
    mine = {id(one) for one in chosen}
    rest = [one.rejected for one in kept if one.rejected is not None] or [x for x in everything if id(x) not in mine]
    return leak_warning(surface_probe(_texts(chosen), _texts(rest)), "the rest", mine="what was kept")


def _texts(found: Sequence[Scored]) -> list[TraceText]:
    return [TraceText(prompt=one.question, text=one.candidate.text, finished=one.finished) for one in found]
