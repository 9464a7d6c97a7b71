"""The exceptions that end a command, each with its exit code, and checks of what a user gives."""

import difflib
import math
from collections.abc import Iterable


class InputError(ValueError):
    """Invalid user input: names the file, line or field and the fix. The commands exit with 2."""


class EmptyTrace(InputError):
    """A trace without a token."""


class TooLong(InputError):
    """A trace that is longer than the model's context."""


class RunFailed(RuntimeError):
    """A run failed after it started: says at which step, and what was saved. The commands exit with 1."""


def first_line(error: Exception) -> str:
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


class Interrupted(RuntimeError):
    """The user interrupted the run; says how to resume. The commands exit with 130, the code of Ctrl-C in shells."""
