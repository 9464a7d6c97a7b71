"""Progress and warnings on stderr; stdout is for data."""

import os
import sys


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
