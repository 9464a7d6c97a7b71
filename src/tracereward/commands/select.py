"""`tracereward select`: from scored candidates to training data: rejection sampling, preference pairs, and controls."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tracereward.commands.partial_output import STDOUT, Output, check_new, check_output, rows_to, write_row
from tracereward.commands.rerank import candidate_of
from tracereward.console import note, say
from tracereward.data.keeping import (
    ANSWERS,
    CONTROLS,
    FORMATS,
    Keeping,
    Kept,
    Pool,
    Scored,
    choose,
    free_score,
    same_size,
    training_rows,
)
from tracereward.data.readers import STDIN, data_name
from tracereward.data.surface_probe import TraceText, leak_warning, surface_probe
from tracereward.data.trace_rows import candidate_rows, check_facts, is_number
from tracereward.errors import InputError, check_choice, check_number
from tracereward.files import write_jsonl
from tracereward.reports.tables import Table, percent, print_tables
from tracereward.tasks.recipes import Task, get_task


@dataclass(frozen=True, kw_only=True)
class SelectOptions:
    """Options of `tracereward select`.

    Attributes:
        data: rows that `tracereward score` wrote; a file or stdin.
        keeping: what is kept, and in which form.
        controls: also write sets of the same size that use no reward, next to the output.
        task: reads and compares answers.
        output: where the rows go.
    """

    data: str
    keeping: Keeping
    controls: bool = False
    task: str = "generic"
    output: Output = STDOUT


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
    kept = choose(pool, options.keeping, task, lambda one: one.candidate.reward)
    if not kept:
        raise InputError(f"{data_name(options.data)}: nothing is kept: lower --threshold or --margin, or raise --share")
    with rows_to(options.output) as file:
        for row in training_rows(kept, options.keeping.format):
            write_row(file, row)
    everything = [one for found in pool.values() for one in found]
    sets = {"all candidates": everything, "selected": [one.chosen for one in kept]}
    for name, path in files.items():
        control = same_size(pool, kept, free_score(name, pool, task))
        write_jsonl(path, training_rows(control, options.keeping.format))
        sets[name] = [one.chosen for one in control]
    print_tables([_table(sets)], stdout=False)
    doubles = count - len(everything)
    questions = len({one.chosen.question for one in kept})
    what = "traces" if options.keeping.format == "sft" else "pairs"
    note(
        f"{len(kept)} {what} of {questions} of {len(pool)} questions"
        + (f"; left out as equal to another of its question: {doubles}" if doubles else "")
    )
    warning = style_warning(everything, kept)
    if warning is not None:
        say(f"warning: {warning}" + ("" if options.controls else "; --controls writes sets to compare with"))


def _check(options: SelectOptions) -> None:
    check_choice("format", options.keeping.format, FORMATS)
    check_choice("answers", options.keeping.answers, ANSWERS)
    check_number("--margin", options.keeping.margin)
    if options.keeping.threshold is not None:
        check_number("--threshold", options.keeping.threshold)
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
        data: file of scored rows, or stdin.
        task: reads answers.
        logprobs: whether each row needs a log-prob.

    Raises:
        InputError: a row has no reward, several traces, or no log-prob where it is needed.
    """
    pool: Pool = {}
    seen: set[tuple[str, str]] = set()
    count = 0
    for where, row in candidate_rows(data, stream=data == STDIN):
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
        raise InputError(f"{data_name(data)}: no rows")
    return pool, count


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
