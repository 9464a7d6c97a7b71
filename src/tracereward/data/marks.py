"""Marks: what an expert decided about demonstrations, keep, fix or drop, in a file that training commands read."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tracereward.data.readers import read_rows
from tracereward.errors import InputError, check_choice

MARKS = ("keep", "fix", "drop")


def fingerprint(row: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of a demonstration's prompt and completion, which tell whether it is still the same.

    Args:
        row: of `load_demonstrations`.
    """
    text = json.dumps([row["prompt"], row["completion"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_marks(path: str) -> dict[str, str]:
    """Fingerprint -> mark; of several marks of one demonstration the last counts.

    Raises:
        InputError: the file cannot be read, has no rows, or a row has no ``id`` or an unknown ``mark``; names the line.
    """
    found: dict[str, str] = {}
    for where, row in read_rows(path):
        if not isinstance(row.get("id"), str) or not isinstance(row.get("mark"), str):
            raise InputError(f"{where}: no id or no mark: export the marks from the page of `tracereward audit`")
        try:
            found[row["id"]] = check_choice("mark", row["mark"], MARKS)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    if not found:
        raise InputError(f"{path}: no marks")
    return found


def without_dropped(rows: Sequence[dict[str, Any]], path: str | None) -> tuple[list[dict[str, Any]], str]:
    """The demonstrations that are not marked ``drop``, and a sentence on what was dropped.

    A demonstration that was changed since it was marked is another one, and stays.

    Args:
        rows: of `load_demonstrations`.
        path: of the marks; None keeps all.

    Raises:
        InputError: see `read_marks`; or none is left.
    """
    if path is None:
        return list(rows), ""
    marks = read_marks(path)
    names = [fingerprint(row) for row in rows]
    kept = [row for row, name in zip(rows, names, strict=True) if marks.get(name) != "drop"]
    if not kept:
        raise InputError(f"{path}: all {len(rows)} demonstrations are marked drop: nothing is left to learn from")
    wanted = Counter(marks.values())["drop"]
    unknown = wanted - len({name for name in names if marks.get(name) == "drop"})
    said = f"{len(rows) - len(kept)} of {len(rows)} demonstrations dropped, as {path} says"
    if unknown:
        said += f"; {unknown} of its {wanted} marks drop are of demonstrations that are not here, or were changed since"
    return kept, said
