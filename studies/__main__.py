"""``python -m studies NAME``, from a clone: run what is missing of a study, then write its page."""

from pathlib import Path
from typing import Annotated

import typer

from tracereward.cli.app import main

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="Study; an unknown name is answered with those there are.")],
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seed; repeatable. Default: the study's.")] = None,
    worlds: Annotated[
        list[str] | None,
        typer.Option("--world", help="World; repeatable. Default: the study's. word-problems takes hours on a CPU."),
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder of the pages and of each cell's JSON.")] = Path("docs/studies"),
    work: Annotated[Path, typer.Option(help="Folder of policies and reward models.")] = Path("runs/studies"),
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    quick: Annotated[
        bool, typer.Option(help="One seed, a tenth of the steps: to try out; the figures mean little.")
    ] = False,
) -> None:
    """Run a study on generated worlds and write its page; cells that are there are not run again."""
    from studies.study import run_study

    run_study(name, worlds, seeds, results, work, jobs, quick)


if __name__ == "__main__":
    main(app)
