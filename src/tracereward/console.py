"""Lines for the person who watches; stdout is for data."""

import os
import sys


def say(text: str) -> None:
    """A line for the person who watches; stdout is for data."""
    print(text, file=sys.stderr, flush=True)


def is_main_process() -> bool:
    """Whether this is the process that writes, also before torch.distributed has started."""
    return int(os.environ.get("RANK", "0")) == 0


def note(text: str) -> None:
    """A line for the person who watches; stdout is for data."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)
