"""``python -m studies NAME``, from a clone: run the missing cells of a study, then write its page."""

from pathlib import Path
from typing import Annotated

import typer

from tracereward.cli.app import main

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="Study; an unknown name lists all studies.")],
    *,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seed; repeatable. Default: the study's.")] = None,
    worlds: Annotated[
        list[str] | None,
        typer.Option("--world", help="World; repeatable. Default: the study's. word-problems takes hours on a CPU."),
    ] = None,
    pages: Annotated[Path, typer.Option(help="Output folder of pages (NAME.md) and figures.")] = Path("docs/studies"),
    results: Annotated[Path, typer.Option(help="Folder of results (NAME.jsonl).")] = Path("studies/results"),
    work: Annotated[Path, typer.Option(help="Output folder of policies and reward models.")] = Path("runs/studies"),
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    quick: Annotated[
        bool,
        typer.Option(help="A trial: one seed, a tenth of the steps, output in folders quick/. Not for reporting."),
    ] = False,
) -> None:
    """Run the missing cells of a study and write its page. Stored cells are not run again.

    With a world outside the study, page and results are named NAME-WORLD.
    """
    from studies.cells import Place, run_cells
    from studies.definitions import STUDIES
    from studies.pages.page import configurations_tried, write_page
    from tracereward.console import note
    from tracereward.errors import check_choice

    wanted = STUDIES[check_choice("study", name, STUDIES)]
    if quick:
        pages, results, seeds = pages / "quick", results / "quick", seeds or list(wanted.seeds[:1])
    cells = wanted.cells(worlds, seeds)
    stem = "-".join([name, *(world for world in worlds or () if world not in wanted.worlds)])
    rows = run_cells(Place(work, results / f"{stem}.jsonl", quick), cells, jobs)
    given = [f"--world {world}" for world in worlds or ()] + [f"--seed {seed}" for seed in seeds or ()]
    command = " ".join(["python -m studies", name, *given, *(["--quick"] if quick else [])])
    page = pages / f"{stem}.md"
    write_page(page, wanted, command, rows, tried=configurations_tried(results))
    note(f"page: {page}")


if __name__ == "__main__":
    main(app)
