"""What a command prints when an exception that is none of ours ends it: never a traceback, always where one is."""

import errno
import os
import platform
import sys
import tempfile
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tracereward import __version__
from tracereward.errors import first_line
from tracereward.files import is_disk_full

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "unable to allocate")
"""Parts of the messages of torch, NumPy, Arrow and the system when memory runs out."""
SMALLER = (
    "use smaller batches (--batch-size; in training --per_device_train_batch_size with more "
    "--gradient_accumulation_steps), shorter traces, or a smaller model"
)
HUB = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")
"""Packages whose exceptions are about the connection to the Hub."""


def explained(error: BaseException) -> str:
    """One sentence about an exception that ended a command.

    The cause and the fix where they are known: memory, disk, permissions, network, a missing package. Anything else is
    a fault of this package; its traceback is then in a file, which the sentence names.
    """
    text = first_line(error)
    if isinstance(error, MemoryError) or any(part in str(error).lower() for part in MEMORY):
        return f"out of memory ({text}): {SMALLER}"
    if is_disk_full(error):
        named = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return f"{named}the disk is full ({text}): free some space, then run the command again"
    origin = type(error).__module__.partition(".")[0]
    if origin in HUB or isinstance(error, ConnectionError | TimeoutError):
        return f"the network failed ({text}): try again, or set HF_HUB_OFFLINE=1 if all models and data are local"
    if isinstance(error, OSError) and error.errno is not None:
        return _of_the_system(error)
    if isinstance(error, ImportError):
        name = f" {error.name}" if error.name else ""
        return f"the package{name} cannot be loaded ({text}): install it again{_traceback_file(error)}"
    raised_in = _library(error)
    if str(error).startswith("CUDA error") or (origin == "torch" and "Accelerator" in type(error).__name__):
        return f"the GPU failed ({text}){_traceback_file(error)}"
    if raised_in is not None and isinstance(error, ValueError | NotImplementedError):
        return f"{raised_in} refused this: {text}{_traceback_file(error)}"
    return f"this is a fault of tracereward: {type(error).__name__}: {text}{_traceback_file(error, report=True)}"


def _of_the_system(error: OSError) -> str:
    what = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{what}too many open files: raise the limit, as with `ulimit -n 4096`"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{what}{error.strerror}: use a file or folder that you may read and write"
    return f"{what}{error.strerror or error}"


def _library(error: BaseException) -> str | None:
    """The library whose code raised it; None if ours did."""
    frames = traceback.extract_tb(error.__traceback__)
    parts = Path(frames[-1].filename).parts if frames else ()
    return next((name for name in LIBRARIES if name in parts and "tracereward" not in parts[parts.index(name) :]), None)


def _traceback_file(error: BaseException, *, report: bool = False) -> str:
    """Write the traceback to a new file; returns the end of the sentence that names it."""
    lines = [f"tracereward {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for name in LIBRARIES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    lines += [f"command: {' '.join(sys.argv[1:2])}", "".join(traceback.format_exception(error))]
    try:
        handle, path = tempfile.mkstemp(prefix="tracereward-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines))
    except OSError:  # no disk either: it must not be lost
        return f". Its traceback could not be written to a file:\n{lines[-1]}"
    return f". The full traceback is in {path}" + ("; please report it with that file" if report else "")
