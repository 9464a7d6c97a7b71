"""Reading demonstrations, checking their fields and lengths, splitting them.

Nothing is skipped or truncated silently: a row is kept, dropped with a count, or refused with its file and line.
"""

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from tracereward.data.columns import fix, own_columns, reads_columns
from tracereward.data.readers import RowSource, not_json, rows_of
from tracereward.errors import InputError, check_choice, check_list, check_text
from tracereward.modeling.rendering import row_location
from tracereward.modeling.seam import without_end_marks
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.tasks.recipes import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_demonstrations(
    source: RowSource,
    task: Task,
    split: str = "train",
    subset: str | None = None,
    *,
    limit: int | None = None,
    require_completion: bool = True,
) -> list[dict[str, Any]]:
    """Read and check demonstrations; duplicate rows are kept, extra fields are ignored.

    Args:
        source: file, folder or Hub id, a list of dicts, a pandas DataFrame or a `datasets.Dataset`.
        task: turns raw rows into prompt, completion and answer.
        split: split of a Hub set.
        subset: configuration of a Hub set.
        limit: number of rows read from the start; None for all.
        require_completion: refuse rows without a completion. Otherwise they are prompts only, with completion None.

    Returns:
        Rows ``{"prompt", "completion", "answer", "source"}``, source being the location that errors name.

    Raises:
        InputError: no rows, or a row whose fields are missing, empty or of a wrong type; names file, line and field.
    """
    if not isinstance(task, Task):
        raise InputError(f"task must be a Task, not {task!r:.80}: get_task('generic') gives one")
    check_text("split", split)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise InputError(f"limit is {limit!r}: it must be at least 1")
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "demonstrations"
    read = rows_of(source, "demonstrations", split, subset)
    rows = list(islice(checked_rows(read, task, name, require_completion=require_completion), limit))
    if not rows:
        raise InputError(f"{name}: no rows")
    return rows


def checked_rows(
    rows: Iterable[tuple[str, dict[str, Any]]], task: Task, source: str, *, require_completion: bool
) -> Iterator[dict[str, Any]]:
    """Demonstrations from raw rows and their locations, one by one; see `load_demonstrations`."""
    for location, raw in rows:
        if reads_columns(task):
            raw = own_columns(raw, location, source, question=not require_completion, expert=require_completion)
        row = checked_example(task, raw, location, source)
        if wrong := not_json(row):  # such as a date in a message
            raise InputError(f"{location}: {wrong}")
        if isinstance(row["prompt"], str) and without_end_marks(row["prompt"])[1]:
            raise InputError(
                f"{location}: the prompt ends with an end mark ({row['prompt'].rstrip()[-20:]!r}), and a completion "
                "follows it: remove the mark"
            )
        if require_completion and row["completion"] is None:
            given = str(raw.get(task.completion_field) or "").strip()
            wrong = "gives none (no answer, or none is marked correct)" if given else "is missing or empty"
            raise InputError(
                f"{location}: no completion: field {task.completion_field!r} {wrong} for task {task.name!r}"
                f"{fix(raw, source)}"
            )
        yield {**row, "source": location}


def check_demonstrations(rows: object) -> None:
    """Check demonstrations that Python code made, rendered as in training.

    Raises:
        InputError: not a list of rows with ``prompt``, a text, and ``completion``, a text or None; names the row.
    """
    for index, row in enumerate(check_list("demonstrations", rows)):
        where = f"demonstrations[{index}]"
        if not isinstance(row, Mapping) or not {"prompt", "completion"} <= row.keys():
            raise InputError(f"{where} must be a row with the fields prompt and completion, not {row!r:.80}")
        check_text(f"{where}: prompt", row["prompt"])
        if row["completion"] is not None:
            check_text(f"{where}: completion", row["completion"])


def checked_example(task: Task, raw: dict[str, Any], location: str, source: str = "") -> dict[str, Any]:
    """The prompt, completion and answer that a task reads in a raw row.

    Args:
        task: reads it.
        raw: the row.
        location: of the row.
        source: its file or data set, to show the command that fits its columns; "" for none.

    Raises:
        InputError: a field is missing, empty or of a wrong type; names `location` and the field.
    """
    try:
        return task.example(_without_marks(raw, task))
    except KeyError as error:
        has = ", ".join(map(repr, raw)) or "none"
        text = f"{location}: field {error} is missing for task {task.name!r}; fields: {has}"
        raise InputError(text + (fix(raw, source) if source else "")) from error
    except ValueError as error:
        raise InputError(f"{location}: {error}") from error


def _without_marks(raw: dict[str, Any], task: Task) -> dict[str, Any]:
    """A raw row whose trace is without end marks, so that an answer extracted from it has none either."""
    clean = dict(raw)
    for name in (task.completion_field, "cot_content", "generated_solution"):  # of `mmlu_pro` on the Hub, of `openr1`
        trace = raw.get(name)
        if isinstance(trace, str):
            clean[name] = without_end_marks(trace)[0]
        elif isinstance(trace, list) and all(isinstance(text, str) for text in trace):
            clean[name] = [without_end_marks(text)[0] for text in trace]
        elif isinstance(trace, list) and trace and isinstance(trace[-1], dict):
            last = trace[-1]
            if isinstance(last.get("content"), str):
                clean[name] = [*trace[:-1], {**last, "content": without_end_marks(last["content"])[0]}]
    return clean


def check_lengths(
    rows: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_length: int | None,
    max_completion_length: int,
    *,
    on_long: str,
) -> tuple[list[dict[str, Any]], int]:
    """Refuse or drop rows that are too long; nothing is truncated.

    Args:
        rows: rendered rows; one with ``finished`` false has no end-of-sequence token.
        tokenizer: the policy's.
        max_prompt_length: tokens of a prompt; None for no limit.
        max_completion_length: tokens of a completion with its end-of-sequence token.
        on_long: ``refuse`` or ``drop``.

    Returns:
        The rows that fit and the number dropped.

    Raises:
        InputError: under ``refuse``, says how many are too long, the first and the longest; under ``drop``, none fits.
    """
    check_choice("on_long", on_long, ("refuse", "drop"))
    kept: list[dict[str, Any]] = []
    too_long: dict[str, list[tuple[int, str]]] = {"prompt": [], "completion": []}
    for row in rows:
        prompt = len(encode_prompt(tokenizer, row["prompt"]))
        ended = row.get("finished") is not False
        completion = 0 if row["completion"] is None else len(encode_completion(tokenizer, row["completion"], ended))
        long_prompt = max_prompt_length is not None and prompt > max_prompt_length
        long_completion = completion > max_completion_length
        if long_prompt:
            too_long["prompt"].append((prompt, row_location(row)))
        if long_completion:
            too_long["completion"].append((completion, row_location(row)))
        if not long_prompt and not long_completion:
            kept.append(row)
    dropped = len(rows) - len(kept)
    if dropped and (on_long == "refuse" or not kept):
        what = _too_long(too_long, max_prompt_length, max_completion_length)
        raise InputError(f"{dropped} of {len(rows)} rows are too long: {what}")
    return kept, dropped


def check_positions(
    rows: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    model: str,
    *,
    rollouts: int = 0,
) -> None:
    """Refuse prompts whose traces would be longer than a model reads, as scoring does.

    Args:
        rows: rendered rows.
        tokenizer: the model's.
        model: its folder or Hub id.
        rollouts: length limit of the rollouts of these prompts; 0 if there are none in this model's tokens.

    Raises:
        InputError: names the longest such row and the fix.
    """
    from tracereward.modeling.loading import context_length, read_config

    positions = context_length(read_config(model))
    found = []
    for row in rows:
        prompt = len(encode_prompt(tokenizer, row["prompt"]))
        completion = 0 if row["completion"] is None else len(encode_completion(tokenizer, row["completion"]))
        found.append((prompt + max(rollouts, completion), prompt, completion, row_location(row)))
    total, prompt, completion, where = max(found)
    if total > positions:
        left = int(positions) - prompt
        raise InputError(
            f"{where}: {prompt} prompt tokens and up to {total - prompt} of a completion, but {model} reads "
            f"{positions}. {f'Use --max_completion_length {left}' if left >= completion else 'Remove the row'}, or use "
            "a model with a longer context."
        )


def _too_long(found: dict[str, list[tuple[int, str]]], max_prompt: int | None, max_completion: int) -> str:
    """What is too long, the first location, the longest length, and the fix."""
    parts, fixes = [], []
    for what, limit in (("prompt", max_prompt), ("completion", max_completion)):
        if found[what]:
            length, first = found[what][0]
            longest = max(found[what])[0]
            over = f"{len(found[what])} {what}s over {limit} tokens"
            parts.append(f"{over}, first {first} ({length}), longest {longest} tokens")
            fixes.append(f"--max_{what}_length {longest}")
    return f"{'; '.join(parts)}. Use {' '.join(fixes)} or --on_long drop."


def split_rows(
    rows: list[dict[str, Any]], validation: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split demonstrations into training and validation rows that share no prompt.

    Args:
        rows: demonstrations; the order within each part stays.
        validation: share of the rows if under 1, else their number. All rows of a prompt stay together, so the
            validation part may be larger by a few.
        seed: the same seed gives the same split.

    Returns:
        Training rows and validation rows, neither empty.

    Raises:
        InputError: a share or number that would leave one part empty.
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
