"""Readers of step-labelled data sets in three public formats: traces split into steps, with the first wrong one."""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tracereward.data.demonstrations import checked_example
from tracereward.data.readers import read_rows
from tracereward.errors import InputError, check_choice
from tracereward.tasks.recipes import Task

ORIGINAL = "original"
"""Group of PRMBench's original, correct traces."""

_OPTION_TASKS = ("mmlu_pro", "medreason", "medqa")  # their prompts already list the options

# "Step 4:" and "Step 4." begin a step; the parts "Step 4.A:" and "Step 4_A:" do not.
_NUMBERED = re.compile(r"Step\s*(\d+)\s*(?::|\.(?=\s|$))")


@dataclass(frozen=True)
class StepTrace:
    """A trace with its label.

    Attributes:
        where: location in error messages.
        question: the problem, as text.
        steps: at least one; none is blank or has surrounding white space.
        first_error: index of the first wrong step, from 0; None if no step is wrong.
        group: results are also reported by group: the model that wrote the trace (processbench, mrben), or the kind of
            inserted error (prmbench).
        options: options of a multiple-choice question, one per line with its letter; "" if there are none.
    """

    where: str
    question: str
    steps: list[str]
    first_error: int | None
    group: str
    options: str = ""


def read_step_traces(
    source: str, form: str, *, split: str = "train", subset: str | None = None, limit: int | None = None
) -> list[StepTrace]:
    """Read and check a step-labelled data set.

    - ``processbench`` (arXiv 2412.06559): problem, steps, label (from 0; -1: no error), generator.
    - ``prmbench`` (arXiv 2501.03124): each row yields two traces. The modified one (modified_question,
      modified_process) has its first error at the smallest of error_steps, from 1; if error_steps is empty, it has
      none. Its group is the row's classification. The original one (original_question, original_process) is correct; it
      is kept once, even if several rows contain it.
    - ``mrben`` (arXiv 2406.13975): Question, Options, Sampled_Model, Model_Solution_Steps,
      Model_Solution_Correctness, Model_Solution_First_Error_Step. The last is the number in "Step 4:", not the
      line: a line without such a number belongs to the previous step. "Solution:" starts the step after the last. If
      the numbers start again, the first step with that number is used.

    Args:
        source: file or Hub id, as for `read_rows`.
        form: one of `FORMATS`.
        split: split of a Hub data set.
        subset: configuration of a Hub data set.
        limit: number of traces, sampled with a fixed seed and kept in order; None for all. (ProcessBench starts with
            its erroneous traces, so the first N would be biased.)

    Raises:
        InputError: no rows, an unknown format, or an invalid row: names file, line, field and fix.
    """
    read = FORMATS[check_choice("format", form, FORMATS)]
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: it must be at least 1")
    traces: list[StepTrace] = []
    originals: set[tuple[str, ...]] = set()
    for where, row in read_rows(source, split, subset):
        try:
            for trace in read(where, row):
                key = (trace.question, *trace.steps)
                if trace.group == ORIGINAL and key in originals:
                    continue
                originals |= {key} if trace.group == ORIGINAL else set()
                traces.append(trace)
        except KeyError as error:
            has = ", ".join(map(repr, row)) or "none"
            raise InputError(f"{where}: field {error} is missing for format {form!r}; fields: {has}") from error
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
    if not traces:
        raise InputError(f"{source}: no rows")
    if limit is None or limit >= len(traces):
        return traces
    return [traces[i] for i in sorted(random.Random(0).sample(range(len(traces)), limit))]


def split_by_question(
    traces: list[StepTrace], share: float = 0.5, seed: int = 0
) -> tuple[list[StepTrace], list[StepTrace]]:
    """Split traces by question, for a data set without another subset to fit the threshold on.

    Returns:
        The traces of a random `share` of the questions (rounded), and the others; both in order.
    """
    questions = list(dict.fromkeys(trace.question for trace in traces))
    sampled = set(random.Random(seed).sample(questions, round(share * len(questions))))
    return [t for t in traces if t.question in sampled], [t for t in traces if t.question not in sampled]


def prompt_of(trace: StepTrace, task: Task) -> str:
    """The prompt of the trace's question in the task's wording, as in training.

    Raises:
        InputError: the task's prompts need more than a question (and options), or cannot use options.
    """
    if trace.options and task.name in _OPTION_TASKS:
        row = {"question": trace.question, "options": trace.options}
    else:
        question = f"{trace.question}\n{trace.options}".rstrip()
        # The generic task adds no words: the newline separates the prompt from the trace.
        row = {"question": question, "problem": question, "prompt": question + "\n"}
    return checked_example(task, row, trace.where)["prompt"]


def _processbench(where: str, row: dict) -> Iterator[StepTrace]:
    """The trace of a row."""
    steps = _steps(row, "steps")
    label = _whole_number(row["label"], "label")
    if not -1 <= label < len(steps):
        raise ValueError(f"field 'label' is {label}: give a step from 0 to {len(steps) - 1}, or -1 for no error")
    first_error = None if label == -1 else label
    question, group = _text(row, "problem"), _text(row, "generator")
    yield StepTrace(where=where, question=question, steps=steps, first_error=first_error, group=group)


def _prmbench(where: str, row: dict) -> Iterator[StepTrace]:
    """The original trace and the modified one."""
    steps = _steps(row, "modified_process")
    numbers = row["error_steps"]
    if not isinstance(numbers, list):
        raise ValueError(f"field 'error_steps' is {type(numbers).__name__}: give a list of step numbers from 1")
    first = min((_whole_number(number, "error_steps") for number in numbers), default=None)
    # Some rows also list later steps that do not exist; only the first is used.
    if first is not None and not 1 <= first <= len(steps):
        raise ValueError(f"field 'error_steps' starts with {first}: give steps from 1 to {len(steps)}")
    original = _steps(row, "original_process")
    question = _text(row, "original_question")
    place = f"{where} (original_process)"
    yield StepTrace(where=place, question=question, steps=original, first_error=None, group=ORIGINAL)
    first_error = None if first is None else first - 1
    question, group = _text(row, "modified_question"), _text(row, "classification")
    yield StepTrace(where=where, question=question, steps=steps, first_error=first_error, group=group)


def _mrben(where: str, row: dict) -> Iterator[StepTrace]:
    """The trace of a row."""
    numbers, steps = _numbered_steps(_texts(row, "Model_Solution_Steps"))
    correctness, label = row["Model_Solution_Correctness"], row["Model_Solution_First_Error_Step"]
    if correctness not in ("correct", "incorrect"):
        raise ValueError(f"field 'Model_Solution_Correctness' is {correctness!r}: give 'correct' or 'incorrect'")
    if (label == "N/A") != (correctness == "correct"):
        raise ValueError(
            f"field 'Model_Solution_First_Error_Step' is {label!r}, but the solution is {correctness!r}: "
            "give 'N/A' for a correct one and a step number for an incorrect one"
        )
    first_error = None
    if label != "N/A":
        number = int(label) if isinstance(label, str) and label.isdecimal() else label
        if isinstance(number, bool) or number not in numbers:
            known = ", ".join(map(str, numbers))
            raise ValueError(f"field 'Model_Solution_First_Error_Step' is {label!r}: the steps are {known}")
        first_error = numbers.index(number)
    options = row.get("Options") or ""
    if not isinstance(options, str):
        raise ValueError(f"field 'Options' is {type(options).__name__}: give one text with an option per line")
    yield StepTrace(
        where=where,
        question=_text(row, "Question"),
        steps=steps,
        first_error=first_error,
        group=_text(row, "Sampled_Model"),
        options=options.strip(),
    )


def _numbered_steps(lines: list[str]) -> tuple[list[int], list[str]]:
    """Join lines to steps and number them; ``Solution:`` has the number after the largest."""
    numbers: list[int] = []
    steps: list[str] = []
    head: list[str] = []  # "Here is a step-by-step analysis:" belongs to the first step
    for line in filter(None, map(str.strip, lines)):
        numbered = _NUMBERED.match(line)
        if numbered or (line.startswith("Solution") and numbers):
            numbers.append(int(numbered[1]) if numbered else max(numbers) + 1)
            steps.append("\n".join([*head, line]))
            head = []
        elif steps:
            steps[-1] += "\n" + line
        else:
            head.append(line)
    if not steps:
        raise ValueError("field 'Model_Solution_Steps' has no line that starts with 'Step 1:'")
    return numbers, steps


def _text(row: dict, field: str) -> str:
    """Read a required text field, stripped."""
    value = row[field]
    if not isinstance(value, str) or not value.strip():
        kind = "empty" if isinstance(value, str) else type(value).__name__
        raise ValueError(f"field {field!r} is {kind}: give a text")
    return value.strip()


def _texts(row: dict, field: str) -> list[str]:
    """Read a required field with a list of texts."""
    values = row[field]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"field {field!r} must be a list of texts, one per step")
    return values


def _steps(row: dict, field: str) -> list[str]:
    """Read a required field with a list of steps. A blank step is an error: skipping it would shift the labels."""
    steps = [step.strip() for step in _texts(row, field)]
    if not steps:
        raise ValueError(f"field {field!r} is empty: give at least one step")
    if "" in steps:
        raise ValueError(
            f"field {field!r}: step {steps.index('')} (from 0) is blank: remove it and renumber the labels"
        )
    return steps


def _whole_number(value: object, field: str) -> int:
    """`value` if it is an integer."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"field {field!r} holds {value!r}: give whole numbers")
    return value


FORMATS: dict[str, Callable[[str, dict], Iterator[StepTrace]]] = {
    "processbench": _processbench,
    "prmbench": _prmbench,
    "mrben": _mrben,
}
