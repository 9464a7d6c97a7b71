"""Readers of JSONL, JSON and Parquet files and Hub data sets; each row comes with its location for error messages."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from tracereward.errors import InputError
from tracereward.files import nearest_path

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


def read_rows(
    source: str, split: str = "train", subset: str | None = None, skipped: list[str] | None = None
) -> Iterator[tuple[str, dict]]:
    """Yield ``(location, row)`` of a local file or a Hub data set.

    Args:
        source: path that ends in one of `SUFFIXES`, or a Hub id such as ``openai/gsm8k``.
        split: split of a Hub set; a local file has none.
        subset: configuration of a Hub set.
        skipped: receives a message for each invalid line of a JSON Lines file, which is then skipped; None makes the
            first one an error.

    Yields:
        The location is ``path:12``, where 12 is the line of a JSON Lines file (blank ones count) or the row of any
        other file, from 1; for the Hub ``openai/gsm8k:train:12``.

    Raises:
        InputError: missing, unreadable or corrupt file, a line that is no JSON object, an unknown suffix, or a Hub set
            that cannot be loaded.
    """
    path = Path(source).expanduser()
    if not _is_local(source, path):
        yield from _hub_rows(source, split, subset)
        return
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{source}: cannot tell the format from the name; use one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{source}: {_missing(path)}")
    if path.suffix == ".parquet":
        numbered = _parquet_rows(path)
    elif path.suffix == ".json":
        numbered = _json_rows(path)
    else:
        numbered = _json_lines(path, skipped)
    for n, row in numbered:
        if isinstance(row, dict):
            yield f"{source}:{n}", row
            continue
        wrong = f"{source}:{n}: a JSON {_json_type(row)}, not an object with fields"
        if skipped is None:
            raise InputError(wrong)
        skipped.append(wrong)


def not_json(row: dict) -> str | None:
    """Why a row cannot be written as JSON, such as a Parquet date, half of a surrogate pair or nan; None if it can."""
    for name, value in row.items():
        try:
            json.dumps({name: value}, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            return f"field {name!r} does not fit in JSON ({error}): remove or change it"
    return None


def _is_local(source: str, path: Path) -> bool:
    """Whether `source` is a file: it exists, or looks like a path. Hub ids are ``name`` or ``owner/name``."""
    looks_like_path = source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1
    known_ending = path.name.endswith((*SUFFIXES, ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".yaml"))
    return path.exists() or looks_like_path or known_ending


def _missing(path: Path) -> str:
    """Why there is no file at `path`, and the most similar file name in its folder."""
    if path.is_dir():
        return "is a folder; name a file in it"
    if not path.parent.is_dir():
        return f"no such file; the folder {path.parent} does not exist either"
    near = nearest_path(path)
    return f"no such file; did you mean {near}?" if near else f"no such file in {path.parent}"


def _json_type(value: object) -> str:
    """JSON's name for the type of a value that is not an object."""
    if value is None:
        return "null"
    return {list: "array", str: "string", bool: "boolean"}.get(type(value), "number")


def _json_lines(path: Path, skipped: list[str] | None) -> Iterator[tuple[int, object]]:
    """Line number and value of every line that is not blank; invalid lines are added to `skipped` if given."""
    n = 0
    try:
        open_text = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8-sig") as lines:
            for n, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    what = "nested too deep"
                    if isinstance(error, json.JSONDecodeError):
                        what = f"{error.msg} at character {error.pos + 1}"
                    wrong = f"{path}:{n}: not valid JSON: {what}"
                    if skipped is None:
                        raise InputError(wrong) from error
                    skipped.append(wrong)
                    continue
                yield n, value
    except UnicodeDecodeError as error:  # text is read in blocks, so the line is approximate
        raise InputError(f"{path}: not UTF-8 text after line {n}: {error.reason}") from error
    except InputError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{path}:{n}: not valid JSON: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: corrupt gzip file after line {n}: {error}; copy or download it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Number and value of every element of a JSON array."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        fix = " (one object a line? then name it .jsonl)" if error.msg == "Extra data" else ""
        raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}{fix}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, list):
        raise InputError(f"{path}: must hold an array of objects; one object a line is .jsonl")
    return iter(enumerate(values, start=1))


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Number and value of every row of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    n = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    n += 1
                    yield n, row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file after row {n}: {error}") from error


def _hub_rows(source: str, split: str, subset: str | None) -> Iterator[tuple[str, dict]]:
    """Location and row of a Hub data set."""
    import datasets
    from datasets.exceptions import DatasetsError

    named = f"{source!r} (split {split!r}{f', subset {subset!r}' if subset else ''})"
    try:
        rows = datasets.load_dataset(source, subset, split=split)
    except ConnectionError as error:
        raise InputError(
            f"cannot load {named}: the Hugging Face Hub cannot be reached ({error}). "
            f"Give a local {' or '.join(SUFFIXES)} file, or load it once where there is a network and keep the cache."
        ) from error
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load {named} from the Hugging Face Hub: {error}") from error
    for n, row in enumerate(rows, start=1):
        yield f"{source}:{split}:{n}", dict(row)
