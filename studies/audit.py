"""``python -m studies.audit``, from a clone: does `tracereward audit` find errors planted in real traces, and the page.

The results hold figures alone, none of the files' text.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tracereward.cli.app import main

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)


@app.command()
def study(
    *,
    data: Annotated[str | None, typer.Option(help="File of traces; without it only the page.")] = None,
    name: Annotated[str, typer.Option(help="gsm8k, mmlu_pro or medmcqa: how the file is read.")] = "gsm8k",
    model: Annotated[str | None, typer.Option(help="Folder of the frozen model.")] = None,
    states: Annotated[Path, typer.Option(help="Folder of its states, computed where missing.")] = Path("runs/states"),
    demonstrations: Annotated[int, typer.Option(min=20, help="Number of demonstrations, chosen at random.")] = 150,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of the demonstrations that are made wrong.")] = 3,
    results: Annotated[Path, typer.Option(help="File of results.")] = Path("studies/results/audit.jsonl"),
    page: Annotated[Path, typer.Option(help="The page, Markdown.")] = Path("docs/studies/audit.md"),
) -> None:
    """Plant errors, audit, and write how many of them are found; rows that are there already are kept."""
    from studies.pages.audit import write_page
    from tracereward.console import note
    from tracereward.errors import InputError
    from tracereward.files import read_jsonl, write_jsonl

    if data is not None:
        from studies.measures.audit import RATES, measured
        from studies.setup.planted import load_planted

        if model is None:
            raise InputError("--data needs --model")
        pool = load_planted(data, name, model, count=demonstrations)
        common: dict[str, Any] = {"data": name, "model": Path(model).name, "demonstrations": len(pool.clean)}
        for seed in range(seeds):
            for rate in RATES:
                row = {**common, "seed": seed, "rate": rate}
                if any(all(one.get(key) == value for key, value in row.items()) for one in read_jsonl(results)):
                    continue
                started = time.perf_counter()
                row |= measured(pool, states, seed=seed, rate=rate)
                row["seconds"] = round(time.perf_counter() - started, 1)
                key = ("data", "model", "seed", "rate")
                others = [one for one in read_jsonl(results) if any(one[part] != row[part] for part in key)]
                results.parent.mkdir(parents=True, exist_ok=True)
                write_jsonl(results, sorted([*others, row], key=lambda one: [one[part] for part in key]))
                note(f"{name}, seed {seed}, {100 * rate:g} %: {row['seconds']} s")
    rows = read_jsonl(results)
    if not rows:
        raise InputError(f"{results}: no results; give --data, --name and --model")
    write_page(page, rows)
    note(f"page: {page}")


if __name__ == "__main__":
    main(app)
