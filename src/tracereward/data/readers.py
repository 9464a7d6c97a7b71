"""Readers of data: files, folders, what `datasets` saved, sets on the Hub, stdin. Each row comes with its location."""

import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from tracereward.errors import InputError, RunFailed, first_line
from tracereward.files import nearest_path

FORMATS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
"""Endings of files that are read. All but Parquet may be compressed: ``.jsonl.gz``."""
Row = TypeVar("Row")
STDIN = "-"
"""The data that is JSON Lines on stdin."""
_NUMBERS, _FLAGS = ("logprob", "reward"), ("correct", "finished")
"""Columns of a CSV file, where everything is text, that are read as numbers and as true or false."""


def read_rows(
    source: str,
    split: str = "train",
    subset: str | None = None,
    skipped: list[str] | None = None,
    *,
    stream: bool = False,
) -> Iterator[tuple[str, dict]]:
    """Yield ``(location, row)`` of a local file or folder, of a Hub data set, or of stdin.

    Args:
        source: file with one of the endings `FORMATS`, a folder of such files or one that ``save_to_disk`` of
            `datasets` wrote, a Hub id such as ``openai/gsm8k``, or `STDIN`.
        split: split of a Hub set or of a folder; a file has none.
        subset: configuration of a Hub set or of a folder.
        skipped: receives a message for each invalid row of a JSON file, which is then skipped; None makes the first
            one an error.
        stream: read a Hub set while it is downloaded, and allow stdin: the caller reads the rows once, as they come.

    Yields:
        The location is ``path:12``, where 12 is the line of a JSON Lines file (blank ones count) or the row of any
        other file, from 1; for the Hub and ``save_to_disk`` folders ``openai/gsm8k:train:12``; ``stdin:12``.

    Raises:
        InputError: missing, unreadable or corrupt file, a row that is no JSON object or has half of a surrogate pair
            (no tokenizer can encode it), an unknown ending, a split that is not there, a Hub set that cannot be
            loaded, or stdin where rows are read more than once.
        RunFailed: the download of a streamed set stops.
    """
    if not source.strip():
        raise InputError("the data must be a file, a folder or a Hub id, not an empty text")
    if source == STDIN:
        if not stream:
            raise InputError(
                "only sample, score, rerank and select read rows from stdin (-); others read their data more than "
                "once: write the rows to a file"
            )
        yield from _checked("stdin", _stdin_lines(skipped), skipped)
        return
    path = Path(source).expanduser()
    if not _is_local(source, path):
        yield from _hub_rows(source, split, subset, stream=stream)
    elif _is_saved(path):
        yield from _saved_rows(source, path, split)
    elif path.is_dir():
        for file in _files_of(path, split, subset):
            yield from _file_rows(str(file), file, skipped)
    else:
        yield from _file_rows(source, path, skipped)


def data_name(source: str) -> str:
    """What messages call a source."""
    return "stdin" if source == STDIN else source


def windows(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Lists of `size` rows, the last one shorter; an error of reading is raised after the rows that came before it."""
    rows = iter(rows)
    while True:
        window: list[Row] = []
        try:
            for row in islice(rows, size):
                window.append(row)
        except (InputError, RunFailed):
            if window:
                yield window
            raise
        if not window:
            return
        yield window


RowSource = Any
"""Rows in any form that Python users have: a file, folder or Hub id, a list of dicts, a pandas DataFrame or a
`datasets.Dataset`."""


def rows_of(
    source: RowSource, name: str, split: str = "train", subset: str | None = None
) -> Iterator[tuple[str, dict]]:
    """Yield ``(location, row)`` of a `RowSource`; see `read_rows` for files.

    Args:
        source: the rows; they are not changed.
        name: of the argument, for locations (``candidates[12]``, from 0) and error messages.
        split: of a Hub set or a folder.
        subset: configuration of a Hub set or a folder.

    Raises:
        InputError: of another type, or a row that is not a dict; names it.
    """
    if isinstance(source, (str, os.PathLike)):
        yield from read_rows(os.fspath(source), split, subset)
        return
    table = hasattr(source, "to_dict") and hasattr(source, "columns")
    if hasattr(source, "keys") and not table:
        fix = ": choose one of its splits" if all(hasattr(part, "column_names") for part in source.values()) else ""
        raise InputError(f"{name} must be rows, not {type(source).__name__}{fix}")
    values = source.to_dict("records") if table else source
    if not hasattr(values, "__len__") or not hasattr(values, "__getitem__"):
        raise InputError(
            f"{name} must be a file, a list of dicts, a DataFrame or a Dataset, not {type(source).__name__}"
        )
    for n, row in enumerate(values):
        if not isinstance(row, Mapping):
            raise InputError(f"{name}[{n}] must be a dict, not {row!r:.80}")
        found = {str(key): _plain(value, missing=table) for key, value in row.items()}
        if (wrong := _half_pair(found)) is not None:
            raise InputError(f"{name}[{n}]: {wrong}")
        yield f"{name}[{n}]", found


def _plain(value: Any, *, missing: bool) -> Any:
    """A cell as JSON has it: numpy's arrays and numbers as Python's, and a table's nan, which stands for no value."""
    if missing and (value is None or (not hasattr(value, "__len__") and value != value) or str(value) == "<NA>"):
        return None
    return value.tolist() if hasattr(value, "tolist") else value


def has_splits(source: str | None) -> bool:
    """Whether a split of a source can be chosen: not of a file, nor of a folder whose files name no split."""
    path = Path(source or "").expanduser()
    if source == STDIN:
        return False
    if source is None or not path.exists():
        return True
    if _is_saved(path):
        return (path / "dataset_dict.json").is_file()
    return path.is_dir() and len(_splits(path, None)) > 0


def not_json(row: dict) -> str | None:
    """Why a row cannot be written as JSON, such as a Parquet date or nan; None if it can."""
    for name, value in row.items():
        try:
            json.dumps({name: value}, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            return f"field {name!r} does not fit in JSON ({error}): remove or change it"
    return None


def _is_local(source: str, path: Path) -> bool:
    """Whether `source` is a path: it exists, or looks like one. Hub ids are ``name`` or ``owner/name``."""
    looks_like_path = source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1
    known_ending = path.name.endswith((*FORMATS, ".txt", ".arrow", ".gz", ".zip", ".yaml"))
    return path.exists() or looks_like_path or known_ending


def _missing(path: Path) -> str:
    """Why there is no file at `path`, and the most similar file name in its folder."""
    if not path.parent.is_dir():
        return f"no such file; the folder {path.parent} does not exist either"
    near = nearest_path(path)
    return f"no such file; did you mean {near}?" if near else f"no such file in {path.parent}"


# Folders


def _is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` of `datasets` wrote a folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _saved_rows(source: str, path: Path, split: str) -> Iterator[tuple[str, dict]]:
    """Location and row of a `Dataset` or `DatasetDict` on disk."""
    import datasets
    import pyarrow

    n = 0
    try:
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise InputError(_no_split(source, split, [str(name) for name in saved]))
            source, saved = f"{source}:{split}", saved[split]
        for n, row in enumerate(saved, start=1):
            yield f"{source}:{n}", dict(row)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: not a readable data set after row {n}: {first_line(error)}") from error


def _no_split(source: object, split: str, splits: list[str]) -> str:
    return f"{source}: no split {split!r}; it has {', '.join(splits)} (--split, in training --dataset_train_split)"


def _files_of(path: Path, split: str, subset: str | None) -> list[Path]:
    """The files of one split in a folder; all files if their names tell no splits apart.

    Raises:
        InputError: it has no data, files of several formats, or not this split.
    """
    if (path / "config.json").is_file() or (path / "config.yaml").is_file():
        raise InputError(
            f"{path}: is the folder of a {'model' if (path / 'config.json').is_file() else 'run'}, not data"
        )
    splits = _splits(path, subset)
    if splits and split not in splits:
        raise InputError(_no_split(path, split, list(splits)))
    return splits[split] if splits else _data_files(path)


def _splits(path: Path, subset: str | None) -> dict[str, list[Path]]:
    """The files of each split in a folder, by the conventions of the Hub; empty if their names tell no splits apart."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        builder = datasets.load_dataset_builder(str(path), subset)
    except (DatasetsError, OSError, ValueError) as error:
        if not _data_files(path):
            raise InputError(f"{path}: is a folder without files of the formats {', '.join(FORMATS)}") from error
        raise InputError(f"{path}: cannot be read as a data set: {first_line(error)}") from error
    found = {str(split): [Path(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    known = _data_files(path)
    if builder.config.name == "default" and len({format_of(file) for file in known}) > 1:
        raise InputError(f"{path}: files of several formats ({', '.join(f.name for f in known[:3])}, ...): name one")
    if list(found) == ["train"] and not any(_names_train(file, path) for file in found["train"]):
        return {}
    return found


def _names_train(file: Path, folder: Path) -> bool:
    """Whether the path of a file inside a folder, which may be relative or a link, names the split."""
    return "train" in os.path.relpath(file.resolve(), folder.resolve())


def _data_files(path: Path) -> list[Path]:
    about = ("dataset_infos.json", "dataset_info.json")
    inside = (
        file for file in sorted(path.rglob("*")) if not any(p.startswith(".") for p in file.parts[len(path.parts) :])
    )
    return [file for file in inside if file.is_file() and format_of(file) and file.name not in about]


def format_of(path: str | Path) -> str | None:
    """The ending that tells a file's format, without ``.gz``; None if it is not one of `FORMATS`."""
    name = str(path).removesuffix(".gz")
    found = next((ending for ending in FORMATS if name.endswith(ending)), None)
    return None if found == ".parquet" and str(path).endswith(".gz") else found


# Files


def _file_rows(source: str, path: Path, skipped: list[str] | None) -> Iterator[tuple[str, dict]]:
    """Location and row of a file; what is no row is an error or skipped."""
    kind = format_of(path)
    if kind is None:
        known = ", ".join((*FORMATS, ".jsonl.gz"))
        fix = "give the folder that it is in" if path.suffix == ".arrow" else f"use one of {known}, or a folder"
        fix += ", or - for JSON Lines on stdin" if path.exists() and not path.is_file() else ""  # such as <(command)
        raise InputError(f"{source}: cannot tell the format from the name; {fix}")
    if not path.is_file():
        raise InputError(f"{source}: {_missing(path)}")
    if kind == ".parquet":
        numbered = _parquet_rows(path)
    elif kind in (".csv", ".tsv"):
        numbered = _table_rows(path, "," if kind == ".csv" else "\t")
    else:
        numbered = _json_rows(path) if kind == ".json" else _file_lines(path, skipped)
    yield from _checked(source, numbered, skipped, kind)


def _checked(
    source: str, numbered: Iterable[tuple[int, object]], skipped: list[str] | None, kind: str = ".jsonl"
) -> Iterator[tuple[str, dict]]:
    """Location and row of numbered values."""
    for n, row in numbered:
        if not isinstance(row, dict):
            wrong = f"a JSON {_json_type(row)}, not an object with fields"
            wrong += ": an array of rows is a .json file" if isinstance(row, list) and kind == ".jsonl" else ""
        elif kind == ".parquet" or (wrong := _half_pair(row)) is None:
            yield f"{source}:{n}", row
            continue
        if skipped is None:
            raise InputError(f"{source}:{n}: {wrong}")
        skipped.append(f"{source}:{n}: {wrong}")


def _half_pair(row: dict) -> str | None:
    """The field with half of a surrogate pair, which only JSON files can have; None if there is none."""
    for name, value in row.items():
        try:
            json.dumps({name: value}, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            return f"field {name!a} has half of a surrogate pair ({half}), which is no character: remove it"
        except (ValueError, RecursionError):  # not of a surrogate; see `not_json`
            continue
    return None


def _json_type(value: object) -> str:
    """JSON's name for the type of a value that is not an object."""
    if value is None:
        return "null"
    return {list: "array", str: "string", bool: "boolean"}.get(type(value), "number")


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose fields are given once: JSON's parser takes the last one silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _file_lines(path: Path, skipped: list[str] | None) -> Iterator[tuple[int, object]]:
    """Line number and value of every line of a file that is not blank."""
    n = 0
    try:
        with _opened(path) as lines:
            for n, value in _json_lines(str(path), lines, skipped):
                yield n, value
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: corrupt gzip file after line {n}: {error}; copy or download it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _stdin_lines(skipped: list[str] | None) -> Iterator[tuple[int, object]]:
    """Line number and value of every line of stdin that is not blank."""
    if sys.stdin is None:  # closed by the parent process
        return
    lines: Any = sys.stdin.buffer
    if lines.peek(2)[:2] == b"\x1f\x8b":
        raise InputError("stdin is compressed: put `gzip -dc |` in front")
    yield from _json_lines("stdin", lines, skipped)


def _json_lines(source: str, lines: Iterable[bytes], skipped: list[str] | None) -> Iterator[tuple[int, object]]:
    """Line number and value of every line that is not blank; invalid lines are added to `skipped` if given."""
    for n, line in enumerate(lines, start=1):
        text = ""
        try:
            text = line.decode("utf-8-sig" if n == 1 else "utf-8")
            if text.strip():
                yield n, json.loads(text, object_pairs_hook=_once)
        except UnicodeDecodeError as error:
            wrong = f"{source}:{n}: {_not_utf8(source, line, error)}"
        except json.JSONDecodeError as error:
            wrong = f"{source}:{n}: not valid JSON: {error.msg} at character {error.pos + 1}"
            if n == 1 and text.lstrip().startswith("["):
                wrong += " (an array of rows? then name it .json)"
            elif not line.endswith(b"\n"):
                wrong += " (the last line, cut short)"
        except (RecursionError, ValueError) as error:
            what = "nested too deep" if isinstance(error, RecursionError) else str(error)
            wrong = f"{source}:{n}: not valid JSON: {what}"
        else:
            continue
        if skipped is None:
            raise InputError(wrong)
        skipped.append(wrong)


def _not_utf8(source: str, line: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with the text of a line, and the command that converts the file."""
    path = Path(source)
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        name = "UTF-16"
    else:  # cp1252 is Latin-1 with letters and quotes in place of control characters
        name = "CP1252" if any(0x80 <= byte < 0xA0 for byte in line) else "LATIN1"
    if source == "stdin":
        return f"not UTF-8 text (byte 0x{line[error.start]:02x}): put `iconv -f {name} -t UTF-8 |` in front"
    read = f"gzip -dc {path} | iconv -f {name}" if path.suffix == ".gz" else f"iconv -f {name} {path}"
    ending = "".join(path.suffixes).removesuffix(".gz")
    new = f"{path.name.split('.')[0]}.utf8{ending}"
    return f"not UTF-8 text (byte 0x{line[error.start]:02x}): convert it, {read} -t UTF-8 > {new}"


def _text_of(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: it cannot be read or is not UTF-8; names the line.
    """
    try:
        with _opened(path) as file:
            data = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: corrupt gzip file: {error}; copy or download it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: {_not_utf8(str(path), data, error)}") from error


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Number and value of every element of a JSON array."""
    try:
        values = json.loads(_text_of(path), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        fix = " (one object a line? then name it .jsonl)" if error.msg == "Extra data" else ""
        raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}{fix}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, list):
        raise InputError(f"{path}: must hold an array of objects; one object a line is .jsonl")
    return iter(enumerate(values, start=1))


def _table_rows(path: Path, separator: str) -> Iterator[tuple[int, object]]:
    """Number and value of every row of a table with a line of column names; an empty cell is None."""
    import pandas

    try:
        table = pandas.read_csv(io.StringIO(_text_of(path)), sep=separator, dtype=str, keep_default_na=False)
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError) as error:
        raise InputError(f"{path}: not a readable table: {first_line(error)}") from error
    if not isinstance(table.index, pandas.RangeIndex):  # pandas takes columns without a name for row names
        raise InputError(
            f"{path}: its rows have more cells than its first line has column names: quote cells with a "
            f"{'comma' if separator == ',' else 'tab'}"
        )
    if len(table.columns) == 1 and (other := next((mark for mark in ";\t|," if mark in str(table.columns[0])), None)):
        raise InputError(
            f"{path}:1: one column, {table.columns[0]!r}: cells must be separated by "
            f"{'a comma' if separator == ',' else 'a tab'}, not by {other!r}"
        )
    for n, values in enumerate(table.itertuples(index=False, name=None), start=1):
        row = {name: None if value == "" else value for name, value in zip(map(str, table.columns), values)}
        yield n, {name: _cell(path, n, name, value) for name, value in row.items()}


def _cell(path: Path, n: int, name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return None
    if name in _FLAGS:
        known = {"true": True, "1": True, "false": False, "0": False}
        return known.get(value.strip().lower(), value)
    if name in _NUMBERS:
        try:
            return float(value)
        except ValueError as error:
            raise InputError(f"{path}:{n}: {name} must be a number, not {value!r}") from error
    return value


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


def _hub_rows(source: str, split: str, subset: str | None, *, stream: bool) -> Iterator[tuple[str, dict]]:
    """Location and row of a Hub data set; of a streamed one while it is downloaded."""
    import datasets
    from datasets.exceptions import DatasetsError

    named = f"{source!r} (split {split!r}{f', subset {subset!r}' if subset else ''})"
    how: dict[str, Any] = {"streaming": True} if stream else {}
    try:
        rows = datasets.load_dataset(source, subset, split=split, **how)
    except ConnectionError as error:
        raise InputError(
            f"cannot load {named}: the Hugging Face Hub cannot be reached ({error}). Give a local file "
            f"({', '.join(FORMATS)}) or folder, or load it once where there is a network and keep the cache."
        ) from error
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load {named} from the Hugging Face Hub: {error}") from error
    n, found = 0, iter(rows)
    while True:
        try:
            row = next(found, None)
        except Exception as error:  # of the network or of any format's reader
            if not stream:
                raise
            raise RunFailed(f"{source}:{split}: cannot be read after row {n}: {first_line(error)}") from error
        if row is None:
            return
        n += 1
        yield f"{source}:{split}:{n}", dict(row)
