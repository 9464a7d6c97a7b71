"""Rows that `tracereward score` wrote, or should have: one for each trace, and checked field by field."""

from collections.abc import Callable, Sequence
from typing import Any

from tracereward.errors import InputError
from tracereward.traces import is_number

_NEEDED = ("prompt", "completion", "tokens", "offsets", "token_rewards")


def traces_in(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per trace: a row of `candidates` has a list of `scores`."""
    if "candidates" not in row:
        return [row]
    shared = {name: row[name] for name in ("prompt", "answer", "model") if name in row}
    scores = row.get("scores") or [{}] * len(row["candidates"])
    return [{**shared, "completion": text, **found} for text, found in zip(row["candidates"], scores)]


def check_scores(where: str, row: dict[str, Any]) -> None:
    """Refuse a trace whose scores are not what `tracereward score` writes.

    Raises:
        InputError: names `where` and the field.
    """
    missing = [name for name in _NEEDED if row.get(name) is None]
    if missing:
        raise InputError(f"{where}: no {missing[0]}; `tracereward score` writes rows with token rewards")
    for name, (what, fits) in _KINDS.items():
        value = row.get(name)
        if value is not None and not fits(value):
            raise InputError(f"{where}: {name} must be {what}; `tracereward score` writes such rows")
    for name in ("offsets", "token_rewards", "supervised", "step_ends"):
        if row.get(name) is not None and len(row[name]) != len(row["tokens"]):
            raise InputError(f"{where}: {len(row['tokens'])} tokens but {len(row[name])} {name}")
    text = text_read(row["tokens"], row["offsets"], row["completion"])
    if any(not 0 <= start <= end <= len(text) for start, end in row["offsets"]):
        raise InputError(f"{where}: its offsets do not fit its completion of {len(text)} characters")


def text_read(tokens: Sequence[str], offsets: Sequence[tuple[int, int]], completion: str) -> str:
    """The text that the offsets index: the tokens' own where they tile it, for a tokenizer may have normalised the
    completion before it cut it; else the completion.
    """
    placed = [(token, start, end) for token, (start, end) in zip(tokens, offsets) if end > start]
    starts = [0, *(end for _, _, end in placed)]
    if all(start == at and len(token) == end - start for at, (token, start, end) in zip(starts, placed)):
        return "".join(token for token, _, _ in placed)
    return completion


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, (list, tuple)) and all(map(fits, values))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_span(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(type(place) is int for place in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and _is_text(value.get("role")) and _is_text(value.get("content"))


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "prompt": ("a text or a list of messages", lambda value: _is_text(value) or _all(_is_message)(value)),
    "completion": ("a text", _is_text),
    "tokens": ("a list of texts", _all(_is_text)),
    "offsets": ("a list of pairs of whole numbers", _all(_is_span)),
    "token_rewards": ("a list of numbers", _all(is_number)),
    "step_rewards": ("a list of numbers", _all(is_number)),
    "supervised": ("a list of true and false", _all(_is_flag)),
    "step_ends": ("a list of true and false", _all(_is_flag)),
    "reward": ("a number", is_number),
    "logprob": ("a number", is_number),
    "correct": ("true or false", lambda value: value in (0, 1)),
}
