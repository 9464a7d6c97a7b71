"""Progress and warnings on stderr; stdout is for data, in UTF-8."""

import io
import json
import os
import sys
from typing import Any, TextIO

from tracereward.errors import InputError


class _Closed(io.TextIOBase):
    """Stands in for a stream that the parent process has closed."""

    def write(self, s: str, /) -> int:
        """Drop the text."""
        return len(s)


def open_streams() -> None:
    """Make stdout and stderr safe to write any text to: a character that they cannot show is replaced.

    File descriptors 0 to 2 are opened if closed; otherwise a file of the command could get the number that libraries
    print to.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    sys.stdout, sys.stderr = sys.stdout or _Closed(), sys.stderr or _Closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def data_out() -> TextIO:
    """stdout for JSON: UTF-8, as files are, whatever the terminal's encoding.

    Raises:
        InputError: stdout is closed.
    """
    if isinstance(sys.stdout, _Closed):
        raise InputError("stdout is closed: redirect it to a file, or give --output")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Half of a surrogate pair, which UTF-8 lacks, becomes JSON's escape of it.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")
    return sys.stdout


def print_json(value: Any) -> None:
    """Print a JSON value as one line on stdout."""
    print(json.dumps(value, ensure_ascii=False), file=data_out(), flush=True)


def is_main_process() -> bool:
    """Whether this is rank 0, also before torch.distributed has started."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print a line on stderr, in every process."""
    print(text, file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Print a line on stderr, in the main process only."""
    if is_main_process():
        say(text)


def warn(text: str) -> None:
    """Print a warning on stderr above any progress bar, in the main process only."""
    from tqdm.auto import tqdm

    if is_main_process():
        tqdm.write(f"warning: {text}", file=sys.stderr)
