"""Output files that get their name only when complete, and resuming an interrupted one.

Until then the rows are in ``NAME.part`` and their origin (models, data, options) in ``NAME.part.json``, so that rows of
different runs are never mixed.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tracereward.console import say
from tracereward.errors import InputError, RunFailed
from tracereward.files import DISK_FULL, atomic_write_json, read_json, require_parent_folder, sha256_of, write_jsonl
from tracereward.modeling.loading import model_fingerprint

Origin = dict[str, list[Any]]
"""The arguments that determine the rows: for each, its value as given and the value to compare."""


def origin_of(command: str, models: dict[str, str | None], data: str | None, **options: Any) -> Origin:
    """The arguments that determine the rows of an output.

    Args:
        command: name of the command.
        models: by argument; compared by content, since a folder may be retrained under the same name.
        data: file, compared by content, or Hub id.
        **options: all other options that change a row, by Python name.

    Raises:
        InputError: a model or the data cannot be read.
    """
    origin: Origin = {"command": [command, command]}
    for argument, name in models.items():
        origin[argument] = [name, model_fingerprint(name)]
    origin["data"] = [data, _digest(Path(data).expanduser()) if data is not None else None]
    for name, value in options.items():
        origin[("-" if len(name) == 1 else "--") + name.replace("_", "-")] = [value, value]
    return origin


def _digest(path: Path) -> str:
    """SHA-256 of a file; for a Hub id, or a missing file (reported when read), its name."""
    if not path.is_file():
        return str(path)
    try:
        return sha256_of(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def part_of(output: str) -> Path:
    """Path of the rows of an unfinished output."""
    return Path(output + ".part")


def _origin_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def check_output(output: str | None) -> None:
    """Check that an output can be written, before anything slow starts; None and ``-`` are stdout.

    Raises:
        InputError: it cannot.
    """
    if output in (None, "-"):
        return
    path, part = Path(output), part_of(output)
    require_parent_folder(path)
    if path.is_dir():
        raise InputError(f"{output}: is a folder; name a file")
    was_there = part.exists()
    try:
        with open(part, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from error
    if not was_there:
        part.unlink()


@contextmanager
def rows_to(output: str | None, append: bool = False, origin: Origin | None = None) -> Iterator[TextIO]:
    """Open an output for rows: stdout, or a file that gets its name when complete.

    Args:
        output: file; None and ``-`` are stdout.
        append: continue the rows that `unfinished` found.
        origin: stored with an output that can be resumed.

    Raises:
        InputError: it cannot be written.
        RunFailed: the disk is full.
    """
    check_output(output)
    if output is None or output == "-":
        yield sys.stdout
        return
    part = part_of(output)
    try:
        with open(part, "a" if append else "w", encoding="utf-8") as file:
            if origin is not None:  # only after the rows of an earlier run are gone
                atomic_write_json(_origin_file(part), origin)
            yield file
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise RunFailed(f"the disk of {part.absolute().parent} is full; what was finished is in {part}") from error
    part.replace(output)
    _origin_file(part).unlink(missing_ok=True)


def write_row(file: TextIO, row: dict[str, Any]) -> None:
    """One JSON object and a newline."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def is_finished(output: str | None) -> bool:
    """Whether the output of a command with ``--resume`` is already complete; if so, print that.

    Raises:
        InputError: there is no output to resume.
    """
    if output is None:
        raise InputError("--resume needs --output")
    finished = Path(output).is_file() and not part_of(output).exists()
    if finished:
        say(f"{output} is finished")
    return finished


def unfinished(output: str | None, origin: Origin | None) -> Path | None:
    """Path of the rows that an interrupted run with the same `origin` wrote; None if there are none.

    Raises:
        InputError: they are from another run; names the difference.
    """
    if output is None or origin is None:
        raise InputError("--resume needs --output")
    part = part_of(output)
    if not part.is_file() or part.stat().st_size == 0:
        return None
    anew = f"remove {part} to start anew"
    try:
        earlier = read_json(_origin_file(part))
        old = {name: (shown, value) for name, (shown, value) in earlier.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{part}: the origin of its rows is unknown, {_origin_file(part).name} is missing or damaged: {anew}"
        ) from error
    new: Origin = json.loads(json.dumps(origin))  # tuples become lists
    differ = [
        _difference(name, *(side[name][0] if name in side else None for side in (old, new)))
        for name in {**old, **new}
        if name not in old or name not in new or old[name][1] != new[name][1]
    ]
    if differ:
        raise InputError(
            f"{part} is from a run with other arguments: {'; '.join(differ)}. Give the same arguments, or {anew}"
        )
    return part


def _difference(name: str, old: Any, new: Any) -> str:
    if old == new:
        return f"{name} ({new}: the same name, other content)"
    return f"{name} ({'none' if old is None else old}, now {'none' if new is None else new})"


def finished_rows(part: Path) -> int:
    """The number of complete rows of an unfinished output; removes a partial line at its end.

    Raises:
        InputError: see `complete_rows`.
    """
    count = end = 0
    for size, _ in _lines(part, "prompt"):
        count, end = count + 1, end + size
    os.truncate(part, end)
    return count


def finished_questions(part: Path, n: int, chunk: int) -> int:
    """Questions of `n` rows in the complete chunks of an unfinished output; removes the rows after them.

    Raises:
        InputError: see `complete_rows`.
    """
    rows = complete_rows(part, "question")
    done = len(rows) // (n * chunk) * chunk
    write_jsonl(part, rows[: done * n])
    return done


def complete_rows(part: Path, field: str) -> list[dict[str, Any]]:
    """The complete rows of an unfinished output; a partial line at its end is ignored.

    Args:
        part: path returned by `unfinished`.
        field: a field that every row has.

    Raises:
        InputError: a line is not such a row.
    """
    return [row for _, row in _lines(part, field)]


def _lines(part: Path, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Size in bytes and row of every complete line."""
    with open(part, "rb") as file:
        for n, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or field not in row:
                raise InputError(f"{part}:{n}: not a row that this command wrote: remove {part} to start anew")
            yield len(line), row
