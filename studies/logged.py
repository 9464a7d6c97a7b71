"""``python -m studies.logged readouts|lora|page``, from a clone: rewards from logged traces of real models.

The traces are given as files; the results hold figures alone, none of their text.
"""

import functools
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tracereward.cli.app import main

if TYPE_CHECKING:
    from studies.measures.logged import Arm
    from studies.setup.logged_pool import LoggedPool

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)


Pool = Annotated[str, typer.Option(help="Traces of several models.")]
Questions = Annotated[str, typer.Option(help="Their questions; solutions in it may be experts.")]
Model = Annotated[str, typer.Option(help="Folder of the frozen model.")]
States = Annotated[Path, typer.Option(help="Folder of its features, computed where missing.")]
TaskName = Annotated[str, typer.Option(help="Task that reads the files: gsm8k or mmlu_pro.")]
ResultsFile = Annotated[Path, typer.Option(help="File of results.")]
STATES, RESULTS = Path("runs/states"), Path("studies/results/logged.jsonl")


@app.command()
def readouts(
    *,
    pool: Pool,
    questions: Questions,
    model: Model,
    states: States = STATES,
    task: TaskName = "gsm8k",
    minutes: Annotated[float | None, typer.Option(help="That computing stored features took.")] = None,
    at_most: Annotated[int | None, typer.Option(help="Use so many of the questions, at random.")] = None,
    results: ResultsFile = RESULTS,
) -> None:
    """Fit and measure the read-outs that have no result yet, one after the other."""
    from studies.measures.logged import arms, has_solutions, some_questions
    from studies.setup.logged_pool import load_pool
    from tracereward.tasks.recipes import get_task

    chosen = None if at_most is None else functools.partial(some_questions, at_most=at_most)
    loaded = load_pool((pool, questions), get_task(task), model, states, template="plain", chosen=chosen)
    run(loaded, Path(model).name, results, arms(has_solutions(loaded)), minutes=minutes)


@app.command()
def lora(
    *,
    pool: Pool,
    questions: Questions,
    model: Model,
    learn: Annotated[int, typer.Option(help="Number of questions to learn from, of the first fold.")] = 160,
    states: States = STATES,
    task: TaskName = "gsm8k",
    results: ResultsFile = RESULTS,
) -> None:
    """Train and measure the LoRA adapters that have no result yet, one after the other."""
    from studies.measures import logged_lora
    from studies.setup.logged_pool import load_pool
    from tracereward.tasks.recipes import get_task

    chosen = functools.partial(logged_lora.split, learn=learn)
    loaded = load_pool((pool, questions), get_task(task), model, states, template="plain", chosen=chosen)
    kept = Results(results, {"data": task, "model": Path(model).name, "learned from": learn})
    for arm in logged_lora.ARMS:
        if kept.lacks(f"{arm.name}, LoRA"):
            kept.add(logged_lora.lora_row(loaded, arm, questions=questions, model=model, states=states))


@app.command("page")
def write(
    *,
    results: ResultsFile = RESULTS,
    page: Annotated[Path, typer.Option(help="The page, Markdown.")] = Path("docs/studies/logged.md"),
) -> None:
    """Write the page from the results."""
    from studies.pages.logged import write_page
    from tracereward.console import note
    from tracereward.errors import InputError
    from tracereward.files import read_jsonl

    rows = read_jsonl(results)
    if not rows:
        raise InputError(f"{results}: no results: run `python -m studies.logged readouts` first")
    write_page(page, rows)
    note(f"page: {page}")


def run(pool: "LoggedPool", model: str, path: Path, arms: "Sequence[Arm]", *, minutes: float | None) -> None:
    """Add the missing rows of one data set and model to the results.

    Args:
        pool: the traces and their features.
        model: its name in the results.
        path: the results.
        arms: to run; the curves are of the first with the default rule and loss.
        minutes: that computing the features took, if they were stored.
    """
    from studies.measures import logged

    common = {
        "data": pool.task.name,
        "model": model,
        "questions": len(set(pool.questions.tolist())),
        "candidates": int((pool.models != "").sum()),
    }
    results = Results(path, common)
    missing = results.lacks("no reward")
    folds = logged.outer_folds(pool)
    free = logged.measure_free(pool, folds)
    if missing:
        spent = pool.seconds / 60 if pool.seconds else minutes
        results.add({**logged.free_row(pool, folds, free), "minutes": spent, "gigabytes": round(peak_memory(), 2)})
    for arm in arms:
        if results.lacks(arm.name):
            results.add(logged.arm_row(pool, folds, free, arm))
    if results.lacks("curves"):
        main_arm = next(arm for arm in arms if (arm.rule, arm.loss) == (logged.MAIN.rule, logged.MAIN.loss))
        row: dict[str, Any] = {"arm": "curves", "method": "readout", "of": main_arm.name}
        row["by_questions"] = logged.question_curve(pool, folds, free, main_arm)
        row["by_size"] = logged.size_curves(pool, folds, main_arm)
        results.add(row)


class Results:
    """The file of results: one row for each arm of a data set and model.

    Args:
        path: the file.
        common: fields of all rows of this data set and model; those with others are replaced.
    """

    def __init__(self, path: Path, common: dict[str, Any]):
        self.path = path
        self.common = common
        self.started: float = time.perf_counter()

    def lacks(self, arm: str) -> bool:
        """Whether an arm has no row; time is measured from here."""
        from tracereward.files import read_jsonl

        self.started = time.perf_counter()
        wanted = {**self.common, "arm": arm}
        return not any(all(row.get(name) == value for name, value in wanted.items()) for row in read_jsonl(self.path))

    def add(self, row: dict[str, Any]) -> None:
        """Write a row, replacing an older one of the arm."""
        from tracereward.console import note
        from tracereward.files import read_jsonl, write_jsonl

        row = {**self.common, **row, "seconds": round(time.perf_counter() - self.started, 1)}
        identity = ("data", "model", "arm")
        others = [one for one in read_jsonl(self.path) if any(one[name] != row[name] for name in identity)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(self.path, sorted([*others, row], key=lambda one: [one[name] for name in identity]))
        note(f"{row['arm']}: {row['seconds']} s")


def peak_memory() -> float:
    """GB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1e9 if sys.platform == "darwin" else 1e6)


if __name__ == "__main__":
    main(app)
