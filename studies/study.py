"""Run what is missing of a study, then write its page."""

from collections.abc import Sequence
from pathlib import Path

from studies.cells import Place, run_cells
from studies.definitions import STUDIES
from studies.pages.page import write_page
from tracereward.console import note
from tracereward.errors import check_choice


def run_study(
    name: str,
    worlds: Sequence[str] | None,
    seeds: Sequence[int] | None,
    results: Path,
    work: Path,
    jobs: int,
    quick: bool,
) -> Path:
    """Cells of a study that are not there yet, each to its JSON, then the page from all of them.

    Args:
        name: one of `STUDIES`.
        worlds: None for the study's. With others the page and the folder are named after them too.
        seeds: None for the study's.
        results: folder of ``NAME.md``, ``NAME.png`` and ``NAME/``, which holds the cells; with worlds that are not the
            study's ``NAME-WORLD``.
        work: folder of policies and reward models, shared by studies.
        jobs: processes.
        quick: one seed and a tenth of the steps; the page and its cells go to ``results/quick``.

    Returns:
        The page.

    Raises:
        InputError: unknown study or world.
        RunFailed: some cells failed; the others' results are there.
    """
    study = STUDIES[check_choice("study", name, STUDIES)]
    if quick:
        results, seeds = results / "quick", seeds or study.seeds[:1]
    cells = study.cells(worlds, seeds)
    stem = "-".join([name, *(world for world in worlds or () if world not in study.worlds)])
    rows = run_cells(Place(work, results / stem, quick), cells, jobs)
    given = [f"--world {world}" for world in worlds or ()] + [f"--seed {seed}" for seed in seeds or ()]
    command = " ".join(["python -m studies", name, *given, *(["--quick"] if quick else [])])
    page = results / f"{stem}.md"
    write_page(page, study.title, study.question, command, rows)
    note(f"page: {page}")
    return page
