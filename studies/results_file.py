"""``NAME.jsonl``, the results of a study: the options of each world once, then one row per cell."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from studies.setup.site import digest
from tracereward.files import atomic_write_text, read_jsonl

Result = dict[str, Any]


def key_of(result: Result) -> tuple[str, str, int]:
    """Identity of a cell within a study: world, arm and seed."""
    return result["world"], result["arm"], result["seed"]


def read_results(path: Path) -> list[Result]:
    """The results of all cells; empty if there is no file. An incomplete last line is dropped.

    Rows of a study without worlds stay as they are.
    """
    rows = read_jsonl(path)
    worlds = {row["id"]: row["options"] for row in rows if "id" in row}
    return [
        {**row, "world_options": worlds[row["world_options"]]} if "world" in row else row
        for row in rows
        if "id" not in row
    ]


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write the file: rows ``{"id", "options"}`` of worlds, then cells, whose ``world_options`` is such an id."""
    worlds, cells = {}, []
    for result in sorted(results, key=key_of):
        world = f"{result['world']}-{digest(result['world_options'])}"
        worlds[world] = {"id": world, "options": result["world_options"]}
        cells.append({**result, "world_options": world})
    rows = [*worlds.values(), *cells]
    lines = (json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n" for row in rows)
    atomic_write_text(path, "".join(lines))


def add_result(path: Path, result: Result) -> None:
    """Add a cell's result, replacing an older one of the cell. Safe with concurrent processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        others = (other for other in read_results(path) if key_of(other) != key_of(result))
        write_results(path, [*others, result])
