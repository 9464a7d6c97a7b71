"""The two ways a command ends early, and the sentence it ends with."""

import difflib
import math
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot be used: names the file, line or field and the mend. The commands exit with 2."""


class TooLong(InputError):
    """A trace that the model has no positions for."""


class RunFailed(RuntimeError):
    """A run that started could not go on: says at which step, and what was kept. The commands exit with 1."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its kind; 200 characters at the most."""
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
    mend = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"unknown {what} {value!r}: {mend}Known: {', '.join(names)}.")


def check_number(what: str, value: object) -> None:
    """Refuse what is not a finite number.

    Raises:
        InputError: with the value, e.g. ``--threshold must be a finite number, not nan``
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{what} must be a finite number, not {value!r}")


class Interrupted(RuntimeError):
    """The user stopped the run; says how to go on. The commands exit with 130, as shells expect of Ctrl-C."""
