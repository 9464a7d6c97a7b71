"""The exceptions that end a command, each with its exit code, and checks of what a user gives."""

import difflib
import math
from collections.abc import Iterable, Mapping, Set


class InputError(ValueError):
    """Invalid user input: names the file, line or field and the fix. The commands exit with 2."""


class EmptyTrace(InputError):
    """A trace without a token."""


class TooLong(InputError):
    """A trace that is longer than the model's context."""


class RunFailed(RuntimeError):
    """A run failed after it started: says at which step, and what was saved. The commands exit with 1."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class; at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`, to suggest instead of a misspelt name; None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def check_choice(what: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        InputError: with the nearest choice, e.g. ``unknown granularity 'stpe': did you mean 'step'?``
    """
    names = list(choices)
    if not isinstance(value, str):
        raise InputError(f"{what} must be a name, not {value!r:.80}. Known: {', '.join(names)}.")
    if value in names:
        return value
    near = nearest(value, names)
    fix = f"did you mean {near!r}? " if near else ""
    raise InputError(f"unknown {what} {value!r}: {fix}Known: {', '.join(names)}.")


def check_number(what: str, value: object) -> None:
    """Reject a value that is not a finite number.

    Raises:
        InputError: with the value, e.g. ``--threshold must be a finite number, not nan``
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{what} must be a finite number, not {value!r}")


def check_text(what: str, value: object) -> str:
    """Return a value if it is text that can be encoded.

    Raises:
        InputError: it is of another type, or has half of a surrogate pair; says what to give instead.
    """
    if not isinstance(value, str):
        messages = isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], dict)
        fix = ": render the messages with the tokenizer's chat template" if messages else ""
        raise InputError(f"{what} must be a text, not {_kind(value)}{fix}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise InputError(f"{what} has half of a surrogate pair ({half}), which is no character: remove it") from error
    return value


def check_list(what: str, values: object, length: int | None = None) -> list:
    """Return values as a list.

    Raises:
        InputError: not a sequence (a set has no order), a single text, empty, or not of this length.
    """
    single = isinstance(values, (str, bytes, Mapping, Set))
    if single or not (hasattr(values, "__len__") and hasattr(values, "__iter__")):
        fix = f": put it into a list, [{values!r:.40}]" if isinstance(values, str) else ""
        raise InputError(f"{what} must be a list, not {_kind(values)}{fix}")
    found = list(values)  # pyright: ignore[reportArgumentType]
    if not found:
        raise InputError(f"{what} is empty: give at least one")
    if length is not None and len(found) != length:
        raise InputError(f"{what} has {len(found)} entries and needs {length}, one each")
    return found


def check_text_list(what: str, values: object, length: int | None = None) -> list[str]:
    """Return values as a list of texts; see `check_list` and `check_text`."""
    return [check_text(f"{what}[{n}]", value) for n, value in enumerate(check_list(what, values, length))]


def _kind(value: object) -> str:
    return "a text" if isinstance(value, str) else "None" if value is None else f"{type(value).__name__}"


class Interrupted(RuntimeError):
    """The user interrupted the run; says how to resume. The commands exit with 130, the code of Ctrl-C in shells."""
