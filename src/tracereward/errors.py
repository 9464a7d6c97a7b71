"""Exceptions that end a command early, and checks of user input."""

import difflib
import math
from collections.abc import Iterable


class InputError(ValueError):
    """Invalid user input. The message names the file, line or field and the fix. Commands exit with 2."""


class TooLong(InputError):
    """A trace longer than the model's positions."""


class RunFailed(RuntimeError):
    """A started run could not continue. The message names the step and what was saved. Commands exit with 1."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type's name if empty; at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def check_choice(what: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        InputError: with the nearest choice, e.g. ``unknown granularity 'stpe': did you mean 'step'?``
    """
    names = list(choices)
    if value in names:
        return value
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"unknown {what} {value!r}: {hint}Known: {', '.join(names)}.")


def check_number(what: str, value: object) -> None:
    """Reject a value that is not a finite number.

    Raises:
        InputError: with the value, e.g. ``--threshold must be a finite number, not nan``
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{what} must be a finite number, not {value!r}")


class Interrupted(RuntimeError):
    """The user stopped the run. The message says how to resume. Commands exit with 130, as shells expect of Ctrl-C."""
