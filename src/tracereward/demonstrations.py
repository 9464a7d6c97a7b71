"""Demonstrations: read, checked, rendered to text and measured in tokens.

Nothing is skipped or cut silently: a row is kept, left out with a count, or refused with its file and line.
"""

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from tracereward.errors import InputError, check_choice
from tracereward.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
TEMPLATES = ("plain", "chat")


def read_rows(source: str, split: str = "train", subset: str | None = None) -> Iterator[tuple[str, dict]]:
    """Yield ``(location, row)`` of a local file or a Hub data set.

    Args:
        source: path that ends in one of `SUFFIXES`, or a Hub id such as ``openai/gsm8k``.
        split: split of a Hub set; a local file has none.
        subset: configuration of a Hub set.

    Yields:
        The location is ``path:12``, where 12 counts the lines of a JSON Lines file (blank ones too) or the rows of any
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
        numbered = _json_lines(path)
    for n, row in numbered:
        if not isinstance(row, dict):
            raise InputError(f"{source}:{n}: a JSON {_json_type(row)}, not an object with fields")
        yield f"{source}:{n}", row


def _is_local(source: str, path: Path) -> bool:
    """Whether `source` is a file: it exists, or looks like a path. Hub ids are ``name`` or ``owner/name``."""
    looks_like_path = source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1
    known_ending = path.name.endswith((*SUFFIXES, ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".yaml"))
    return path.exists() or looks_like_path or known_ending


def _missing(path: Path) -> str:
    """Why there is no file at `path`, and the nearest name beside it."""
    if path.is_dir():
        return "is a folder; name a file in it"
    if not path.parent.is_dir():
        return f"no such file; the folder {path.parent} does not exist either"
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"no such file; did you mean {path.parent / near[0]}?" if near else f"no such file in {path.parent}"


def _json_type(value: object) -> str:
    """JSON's name for the type of a value that is no object."""
    if value is None:
        return "null"
    return {list: "array", str: "string", bool: "boolean"}.get(type(value), "number")


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Line number and value of every line that is not blank."""
    n = 0
    try:
        open_text = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8-sig") as lines:
            for n, line in enumerate(lines, start=1):
                if line.strip():
                    yield n, json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{n}: not valid JSON: {error.msg} at character {error.pos + 1}") from error
    except UnicodeDecodeError as error:  # read in blocks, so the line is only roughly known
        raise InputError(f"{path}: not UTF-8 text after line {n}: {error.reason}") from error
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
        mend = " (one object a line? then name it .jsonl)" if error.msg == "Extra data" else ""
        raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}{mend}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason}") from error
    except ValueError as error:
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


def load_demonstrations(
    source: str,
    task: Task,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    require_completion: bool = True,
) -> list[dict]:
    """Read and check demonstrations; identical rows are all kept, more fields than needed are ignored.

    Args:
        source: file or Hub id, as for `read_rows`.
        task: recipe that turns raw rows into prompt, completion and answer.
        split: split of a Hub set.
        subset: configuration of a Hub set.
        limit: number of rows read from the start; None for all.
        require_completion: refuse rows without a completion. Otherwise they are prompts only, with completion None.

    Returns:
        Rows ``{"prompt", "completion", "answer", "source"}``, source being the location that errors name.

    Raises:
        InputError: no rows, or a row whose fields are missing, empty or of a wrong type; names file, line and field.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: it must be at least 1")
    rows: list[dict] = []
    for location, raw in read_rows(source, split, subset):
        try:
            row = task.example(raw)
        except KeyError as error:
            has = ", ".join(map(repr, raw)) or "none"
            raise InputError(f"{location}: field {error} is missing for task {task.name!r}; fields: {has}") from error
        except ValueError as error:
            raise InputError(f"{location}: {error}") from error
        if require_completion and row["completion"] is None:
            raise InputError(
                f"{location}: no completion: field {task.completion_field!r} is missing or empty for task {task.name!r}"
            )
        rows.append({**row, "source": location})
        if len(rows) == limit:
            break
    if not rows:
        raise InputError(f"{source}: no rows")
    return rows


def render(rows: list[dict], tokenizer: "PreTrainedTokenizerBase", template: str) -> list[dict]:
    """Turn prompts and completions into the exact texts that are tokenised; returns new rows.

    Args:
        rows: demonstrations, with texts or lists of ``{"role", "content"}`` messages.
        tokenizer: the policy's.
        template: ``plain`` keeps texts as they are; ``chat`` puts each prompt through the tokenizer's chat template, up
            to the start of the assistant's turn. The completion is then the assistant's plain text.

    Raises:
        InputError: unknown template, messages under ``plain``, a tokenizer without a chat template, messages that the
            template refuses, or a completion that is not one assistant message.
    """
    check_choice("template", template, TEMPLATES)
    if template == "chat" and not tokenizer.chat_template:
        raise InputError(f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template: use --template plain")
    bos = str(tokenizer.bos_token or "")
    # encode_prompt() lets the tokenizer add its own: the template's must then go, once.
    strip_bos = bos and tokenizer(text="a")["input_ids"][:1] == [tokenizer.bos_token_id]
    rendered = []
    for row in rows:
        prompt = row["prompt"]
        if template == "chat":
            prompt = _chat_prompt(prompt, tokenizer, _where(row))
            prompt = prompt.removeprefix(bos) if strip_bos else prompt
        elif not isinstance(prompt, str):
            raise InputError(f"{_where(row)}: the prompt is a list of messages: use --template chat")
        rendered.append({**row, "prompt": prompt, "completion": _plain_completion(row)})
    return rendered


def _where(row: dict) -> str:
    """Location of a row in messages."""
    return row.get("source", "a row")


def _chat_prompt(prompt: str | list[dict], tokenizer: "PreTrainedTokenizerBase", where: str) -> str:
    """Prompt through the chat template."""
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)  # type: ignore[return-value]
    except TemplateError as error:
        raise InputError(f"{where}: the chat template refuses the prompt: {error}") from error


def _plain_completion(row: dict) -> str | None:
    """Completion as text: itself, or the content of its one assistant message."""
    completion = row["completion"]
    if completion is None or isinstance(completion, str):
        return completion
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in completion)
        raise InputError(f"{_where(row)}: the completion must be one assistant message, not: {roles}")
    return completion[0]["content"].rstrip()


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a rendered prompt, with the tokenizer's own special tokens, as TRL's GRPOTrainer does it."""
    return tokenizer(text=text)["input_ids"]  # type: ignore[return-value]


def encode_completion(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a completion without special tokens, and one end-of-sequence token, as a finished rollout has it.

    Raises:
        InputError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path or 'the tokenizer'} has no end-of-sequence token")
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]  # type: ignore[misc]


def check_lengths(
    rows: list[dict],
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_length: int | None,
    max_completion_length: int,
    on_long: str,
) -> tuple[list[dict], int]:
    """Refuse or leave out rows that are too long; nothing is ever cut.

    Args:
        rows: rendered rows.
        tokenizer: the policy's.
        max_prompt_length: tokens of a prompt; None for no limit.
        max_completion_length: tokens of a completion with its end-of-sequence token.
        on_long: ``refuse`` or ``drop``.

    Returns:
        The rows that fit and the number left out.

    Raises:
        InputError: under ``refuse``, how many are too long, the first and the longest; under ``drop``, none is left.
    """
    check_choice("on_long", on_long, ("refuse", "drop"))
    kept: list[dict] = []
    too_long: dict[str, list[tuple[int, str]]] = {"prompt": [], "completion": []}
    for row in rows:
        prompt = len(encode_prompt(tokenizer, row["prompt"]))
        completion = 0 if row["completion"] is None else len(encode_completion(tokenizer, row["completion"]))
        long_prompt = max_prompt_length is not None and prompt > max_prompt_length
        long_completion = completion > max_completion_length
        if long_prompt:
            too_long["prompt"].append((prompt, _where(row)))
        if long_completion:
            too_long["completion"].append((completion, _where(row)))
        if not long_prompt and not long_completion:
            kept.append(row)
    dropped = len(rows) - len(kept)
    if dropped and (on_long == "refuse" or not kept):
        what = _too_long(too_long, max_prompt_length, max_completion_length)
        raise InputError(f"{dropped} of {len(rows)} rows are too long: {what}")
    return kept, dropped


def _too_long(found: dict[str, list[tuple[int, str]]], max_prompt: int | None, max_completion: int) -> str:
    """What is too long, where first, by how much, and the mend."""
    parts, mends = [], []
    for what, limit in (("prompt", max_prompt), ("completion", max_completion)):
        if found[what]:
            length, first = found[what][0]
            longest = max(found[what])[0]
            over = f"{len(found[what])} {what}s over {limit} tokens"
            parts.append(f"{over}, first {first} ({length}), longest {longest} tokens")
            mends.append(f"--max_{what}_length {longest}")
    return f"{'; '.join(parts)}. Use {' '.join(mends)} or --on_long drop."


def split_rows(rows: list[dict], validation: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Split demonstrations into training and validation rows so that no prompt is on both sides.

    Args:
        rows: demonstrations; the order within each side stays.
        validation: share of the rows if under 1, else their number. All rows of a prompt go together, so that the
            validation side may be larger by a few.
        seed: the same seed gives the same split.

    Returns:
        Training rows and validation rows, neither empty.

    Raises:
        InputError: a share or number that would leave one side empty.
    """
    wanted = validation * len(rows) if validation < 1 else validation
    if validation <= 0 or wanted >= len(rows):
        raise InputError(f"validation is {validation} for {len(rows)} rows: give a share under 1, or fewer than all")
    keys = [json.dumps(row["prompt"], sort_keys=True) for row in rows]
    sizes = {key: 0 for key in keys}
    for key in keys:
        sizes[key] += 1
    order = list(sizes)
    random.Random(seed).shuffle(order)
    held_out: set[str] = set()
    count = 0
    for key in order:
        if count >= wanted:
            break
        held_out.add(key)
        count += sizes[key]
    if len(held_out) == len(order):
        raise InputError(f"validation is {validation}, but {len(rows)} rows have only {len(order)} different prompts")
    train = [row for row, key in zip(rows, keys) if key not in held_out]
    return train, [row for row, key in zip(rows, keys) if key in held_out]
