"""``python -m studies.logged``, from a clone: read-outs of logged traces of real models, given as files, and the page.

The results hold figures alone, none of the files' text.
"""

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


@app.command()
def study(
    *,
    pool: Annotated[str | None, typer.Option(help="Traces of several models; without it only the page.")] = None,
    questions: Annotated[str | None, typer.Option(help="Their questions; solutions in it may be experts.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder of the frozen model.")] = None,
    states: Annotated[Path, typer.Option(help="Folder of its features, computed where missing.")] = Path("runs/states"),
    task: Annotated[str, typer.Option(help="Task that reads the files: gsm8k or mmlu_pro.")] = "gsm8k",
    minutes: Annotated[float | None, typer.Option(help="That computing stored features took.")] = None,
    results: Annotated[Path, typer.Option(help="File of results.")] = Path("studies/results/logged.jsonl"),
    page: Annotated[Path, typer.Option(help="The page, Markdown.")] = Path("docs/studies/logged.md"),
) -> None:
    """Fit and measure the arms that have no result yet, one after the other, and write the page."""
    from studies.pages.logged import write_page
    from tracereward.console import note
    from tracereward.errors import InputError
    from tracereward.files import read_jsonl

    if pool is not None:
        from studies.measures.logged import arms, has_solutions
        from studies.setup.logged_pool import load_pool
        from tracereward.tasks.recipes import get_task

        if questions is None or model is None:
            raise InputError("--pool needs --questions and --model")
        loaded = load_pool((pool, questions), get_task(task), model, states, template="plain")
        run(loaded, Path(model).name, results, arms(has_solutions(loaded)), minutes=minutes)
    rows = read_jsonl(results)
    if not rows:
        raise InputError(f"{results}: no results; give --pool, --questions and --model")
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
        "questions": int(pool.questions.max()) + 1,
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
