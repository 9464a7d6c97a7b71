"""Outputs: never replaced without ``--overwrite``, named only when complete, and resumed if interrupted.

Until then the rows are in ``NAME.part`` and their origin (models, data, options) in ``NAME.part.json``, so that rows of
different runs are never mixed.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from tracereward.console import data_out, say
from tracereward.data.readers import STDIN
from tracereward.errors import InputError, Interrupted, RunFailed
from tracereward.files import DISK_FULL, atomic_write_json, read_json, require_parent_folder, sha256_of, write_jsonl
from tracereward.modeling.loading import model_fingerprint

Origin = dict[str, list[Any]]
"""The arguments that determine the rows: for each, its value as given and the value to compare."""


def origin_of(command: str, models: dict[str, str | None], data: str | None, **options: Any) -> Origin:
    """The arguments that determine the rows of an output.

    Args:
        command: name of the command.
        models: by argument; compared by content, since a folder may be retrained under the same name.
        data: file or folder, compared by content, or Hub id.
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
    """SHA-256 of a file or folder; for a Hub id, or a missing file (reported when read), its name."""
    if not path.exists():
        return str(path)
    try:
        return sha256_of(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a command writes its rows, and what it may replace.

    Attributes:
        path: JSONL file; None or ``-`` is stdout.
        resume: continue an unfinished file; None for a command that cannot.
        overwrite: replace an existing file, or the rows of an unfinished run.

    Raises:
        InputError: an option that needs a file, without one.
    """

    path: str | None = None
    resume: bool | None = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for option, given in (("--resume", self.resume), ("--overwrite", self.overwrite)):
            if given and self.to_stdout:
                raise InputError(f"{option} needs --output, a file")

    @property
    def to_stdout(self) -> bool:
        """Whether the rows go to stdout."""
        return self.path in (None, "-")


STDOUT = Output()


def of_stream(output: Output, data: str | None) -> Output:
    """The output of a command that reads rows once: those of stdin cannot be read again to continue.

    Raises:
        InputError: ``--resume`` with stdin.
    """
    if data != STDIN:
        return output
    if output.resume:
        raise InputError("--resume reads the rows again from the first, which stdin cannot: give a file")
    return replace(output, resume=None)


def part_of(output: str) -> Path:
    """Path of the rows of an unfinished output."""
    return Path(output + ".part")


def _origin_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def check_new(path: str | os.PathLike, inputs: Iterable[str | None], *, overwrite: bool) -> None:
    """Refuse to write a file or folder that exists, without ``--overwrite``, or that is an input.

    Args:
        path: what a command writes.
        inputs: files and folders that it reads, and Hub ids; a file in a folder that it reads is an input too.
        overwrite: whether an existing one may be replaced.

    Raises:
        InputError: it exists, is an input, or is neither a file nor a folder.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    for given in inputs:
        if given is not None and _overlap(path, Path(given).expanduser()):
            raise InputError(f"{path}: is read by this command ({given}): choose another --output")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: is a device or a pipe; to write there, leave out --output and redirect stdout")
    if not overwrite:
        raise InputError(f"{path} exists already: choose another --output, or replace it with --overwrite")


def _overlap(path: Path, given: Path) -> bool:
    """Whether two paths are one file or folder, also by a link, or one is in the other."""
    if not path.exists() or not given.exists():
        return False
    inner, outer = path.resolve(), given.resolve()
    return inner.samefile(outer) or outer in inner.parents or inner in outer.parents


def check_file(path: str | os.PathLike, inputs: Iterable[str | None], *, overwrite: bool) -> None:
    """`check_new` for a file, and check that it can be written, before anything slow starts.

    Raises:
        InputError: it cannot, is a folder, or see `check_new`.
    """
    path = Path(path)
    require_parent_folder(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
    check_new(path, inputs, overwrite=overwrite)
    check_writable(path)


def check_writable(path: Path) -> None:
    """Check that a file or folder can be created.

    Raises:
        InputError: it cannot.
    """
    part = part_of(str(path))
    was_there = os.path.lexists(part)
    try:
        with open(part, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    if not was_there:
        part.unlink()


def check_folder_writable(folder: Path) -> None:
    """Check that files can be created in a folder, which need not exist yet.

    Raises:
        InputError: they cannot, or a file is in the way.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise InputError(f"{there}: is a file, not a folder; choose another --output")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from error


def check_output(output: Output, inputs: Iterable[str | None]) -> None:
    """`check_file` for rows: those of an unfinished run are not lost either.

    Args:
        output: of the command.
        inputs: as for `check_new`.

    Raises:
        InputError: it cannot be written, is an input, or may not be replaced.
    """
    if output.path is None or output.to_stdout:
        return
    inputs, part = list(inputs), part_of(output.path)
    begun = part.is_file() and part.stat().st_size > 0
    # With --resume, a file without unfinished rows is the finished one, see `is_finished`.
    check_file(output.path, inputs, overwrite=output.overwrite or (bool(output.resume) and not begun))
    for mine in (part, _origin_file(part)):
        check_new(mine, inputs, overwrite=True)
    if begun and not output.resume and not output.overwrite:
        fix = "discard them with --overwrite"
        fix = fix if output.resume is None else f"continue with --resume, or {fix}"
        raise InputError(f"{part} has the rows of an unfinished run: {fix}")


@contextmanager
def rows_to(output: Output, origin: Origin | None = None, sorted_by: str | None = None) -> Iterator[TextIO]:
    """Open an output for rows: stdout, or a file that gets its name when complete.

    With ``resume`` the rows that `unfinished` found are continued. Call `check_output` first.

    Args:
        output: of the command.
        origin: stored with an output that can be resumed.
        sorted_by: a field, by whose numbers the rows of a complete file are sorted.

    Raises:
        RunFailed: the disk is full, or another process has written the file.
        Interrupted: by Ctrl-C; says where the finished rows are.
    """
    if output.path is None or output.to_stdout:
        yield data_out()
        return
    path, part = Path(output.path), part_of(output.path)
    try:
        with open(part, "a" if output.resume else "w", encoding="utf-8", errors="backslashreplace") as file:
            if origin is not None:  # only after the rows of an earlier run are gone
                atomic_write_json(_origin_file(part), origin)
            yield file
        if sorted_by is not None:
            sort_rows(part, sorted_by)
    except KeyboardInterrupt as error:
        kept = "" if output.resume is None else f"; finished rows are in {part}: continue with --resume"
        raise Interrupted(f"interrupted{kept}") from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        fix = "" if output.resume is None else "; free some space, then continue with --resume"
        raise RunFailed(f"the disk of {part.absolute().parent} is full; finished rows are in {part}{fix}") from error
    except Exception:
        if output.resume is not None and part.stat().st_size > 0:
            say(f"\nfinished rows are in {part}: continue with --resume")
        raise
    finally:
        if part.exists() and part.stat().st_size == 0:  # nothing to continue
            _discard(part)
    if os.path.lexists(path) and not output.overwrite:
        raise RunFailed(f"{path} was written by another process in the meantime; the rows of this one are in {part}")
    part.replace(path)
    _origin_file(part).unlink(missing_ok=True)


def _discard(part: Path) -> None:
    part.unlink()
    _origin_file(part).unlink(missing_ok=True)


def write_row(file: TextIO, row: dict[str, Any]) -> None:
    """One JSON object and a newline."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def is_finished(output: Output) -> bool:
    """Whether ``--resume`` is given and the output is already complete; if so, print that."""
    if not output.resume or output.path is None:
        return False
    finished = Path(output.path).is_file() and not part_of(output.path).exists()
    if finished:
        say(f"{output.path} is finished")
    return finished


def unfinished(output: Output, origin: Origin | None) -> Path | None:
    """Path of the rows that ``--resume`` continues, written with the same `origin`; None if there are none.

    Raises:
        InputError: they are from another run; names the difference.
    """
    if not output.resume or output.path is None or origin is None:
        return None
    part = part_of(output.path)
    if not part.is_file() or part.stat().st_size == 0:
        return None
    anew = "start anew with --overwrite instead of --resume"
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


def finished_questions(part: Path, n: int, chunk: int) -> set[int]:
    """Questions of `n` rows in the complete chunks of an unfinished output; removes all other rows.

    Raises:
        InputError: see `complete_rows`.
    """
    rows = complete_rows(part, "question")
    counts = Counter(row["question"] for row in rows)
    chunks = Counter(question // chunk for question, count in counts.items() if count == n)
    done = {question for question in counts if chunks[question // chunk] == chunk}
    write_jsonl(part, [row for row in rows if row["question"] in done])
    return done


def sort_rows(part: Path, field: str) -> None:
    """Sort the rows of a file by the numbers in a field; rows with the same keep their order.

    Raises:
        InputError: see `complete_rows`.
    """
    places, start = [], 0
    for size, row in _lines(part, field):
        places.append((row[field], start, size))
        start += size
    if places == sorted(places):
        return
    other = part.with_name(part.name + ".sorted")
    with open(part, "rb") as file, open(other, "wb") as target:
        for _, start, size in sorted(places):
            file.seek(start)
            target.write(file.read(size))
    other.replace(part)


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
                raise InputError(
                    f"{part}:{n}: not a row that this command wrote: start anew with --overwrite instead of --resume"
                )
            yield len(line), row
