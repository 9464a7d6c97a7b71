"""Command-line runs that a test can kill at an exact point.

`Launcher` starts one process that only imports the package and forks a child for each command: a real process with a
real exit status, without five seconds of imports. A `trap` is an audit hook of the interpreter: when the command opens
or renames the named file for the n-th time, the process sends itself a signal. Nothing in the package is patched, and
no test depends on timing.
"""

import atexit
import contextlib
import functools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from helpers.paths import ROOT

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR
# Metrics of the machine's speed, which differ between equal runs.
CLOCKS = {"step_time", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


@dataclass
class Result:
    """A finished command; `code` is negative for the signal that killed it, as in `subprocess`."""

    code: int
    out: str
    err: str


class Launcher:
    """Runs `tracereward` commands in forks of a process that has imported the package."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.tiny"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def __call__(self, *argv: object, trap: dict[str, Any] | None = None, scripted: bool = False) -> Result:
        """Run ``tracereward ARGV``; `trap` is from `trap`, `scripted` as in `sharded.script`."""
        return self._run(argv, [trap], scripted=scripted)[0]

    def two(
        self,
        *argv: object,
        traps: tuple[dict[str, Any] | None, dict[str, Any] | None] = (None, None),
        engine: str = "ddp",
        scripted: bool = False,
    ) -> list[Result]:
        """Run ``tracereward ARGV`` in two processes like a launcher: when one fails, the other gets SIGTERM.

        Args:
            argv: arguments of both.
            traps: trap of each.
            engine: one of `sharded.ENGINES`.
            scripted: see `sharded.script`.
        """
        return self._run(argv, list(traps), engine=engine, scripted=scripted, port=free_port())

    def _run(self, argv: tuple[object, ...], traps: list[dict[str, Any] | None], **given: Any) -> list[Result]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.count += 1
        orders, paths = [], []
        for rank, one in enumerate(traps):
            out, err = (self.folder / f"{self.count}.{rank}.{name}" for name in ("out", "err"))
            order = {"argv": [str(word) for word in argv], "trap": one, "out": str(out), "err": str(err)}
            orders.append({**order, **given, "rank": rank})
            paths.append((out, err))
        self.process.stdin.write(json.dumps(orders) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        return [
            Result(code, *(path.read_text(encoding="utf-8") for path in pair))
            for code, pair in zip(codes, paths, strict=True)
        ]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@functools.cache
def launcher() -> Launcher:
    """The launcher of the test session, started on first use."""
    folder = tempfile.TemporaryDirectory(prefix="tracereward-tests-")
    started = Launcher(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(started.close)
    return started


def trap(
    event: str,
    path: str,
    count: int = 1,
    number: int = signal.SIGKILL,
    fill: Path | None = None,
    leave: int = 0,
    other: bool = False,
) -> dict[str, Any]:
    """A signal (by default SIGKILL) at the `count`-th `event` on a file whose path ends with `path`.

    `event` is ``open`` (for writing), ``rename`` (to that name) or ``size``: the kernel kills the process with SIGXFSZ
    when a file that it writes would exceed `count` bytes. With `fill` there is no signal; the file at `fill` is grown
    until its disk has `leave` bytes left. With `other` the signal goes from the first of two processes to the second.
    """
    return {
        "event": event,
        "path": path,
        "count": count,
        "number": int(number),
        "fill": fill and str(fill),
        "leave": leave,
        "other": other,
    }


def free_port() -> int:
    """A free port of 127.0.0.1."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def serve() -> None:
    """Read lists of orders from stdin, run each order in a fork, and write their exit statuses."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import tracereward.commands.score  # noqa: F401
    import tracereward.commands.train  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        children: list[int] = []
        for order in reversed(json.loads(line)):
            child = os.fork()
            if child == 0:
                run_order(order, *children)
            children.insert(0, child)
        codes: dict[int, int] = {}
        while len(codes) < len(children):
            child, status = os.wait()
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child]:
                for other in set(children) - codes.keys():
                    os.kill(other, signal.SIGTERM)
        answers.write(json.dumps([codes[child] for child in children]) + "\n")
        answers.flush()


def run_order(order: dict[str, Any], second: int | None = None) -> None:
    """Run the command and exit; `second` is the id of the second process."""
    from helpers import sharded
    from tracereward.cli.app import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests with `&` ignores SIGINT
    for descriptor, path in ((1, order["out"]), (2, order["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["tracereward", *order["argv"]]
    if "port" in order:
        rank, port = str(order["rank"]), str(order["port"])
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
        sharded.allow(order["engine"])
    if order["scripted"]:
        sharded.script()
    if order["trap"] is not None:
        told = second if order["trap"].pop("other") else os.getpid()
        assert told is not None
        set_trap(**order["trap"], told=told)
    code: Any = 0
    try:
        main()
    except SystemExit as error:
        code = error.code
    except BaseException:  # as the interpreter does
        sys.excepthook(*sys.exc_info())
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0 if code is None else code)


def set_trap(event: str, path: str, count: int, number: int, fill: str | None, leave: int, told: int) -> None:
    """Install a `trap`; the process `told` gets the signal."""
    if event == "size":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # by default Python ignores it and raises OSError
        return
    left = count

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if name == "open" and event == "open":
            target, _, flags = args
            if not flags & WRITE_FLAGS:
                return
        elif name == "os.rename" and event == "rename":
            target = args[1]
        else:
            return
        if not isinstance(target, int) and os.fspath(target).endswith(path):
            left -= 1
            if left == 0 and fill is None:
                os.kill(told, number)
            elif left == 0:
                fill_disk(Path(fill), leave)

    sys.addaudithook(hook)


def fill_disk(path: Path, leave: int) -> None:
    """Grow the file at `path` until its disk has `leave` bytes left."""
    with open(path, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        file.truncate(file.tell() - leave)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in `folder`."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {f"{path.name}:{name}": tensor for name, tensor in load_file(path).items()}
    assert found, f"no weights in {folder}"
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; every line must parse."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The reproducible results of a run: final weights, and metrics without `CLOCKS`."""
    tensors = {f"policy/{name}": tensor for name, tensor in weights(folder / "policy").items()}
    if (folder / "reward_model").exists():
        tensors |= {f"reward_model/{name}": tensor for name, tensor in weights(folder / "reward_model").items()}
    metrics = [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows(folder / "metrics.jsonl")]
    return tensors, metrics


def assert_same(folder: Path, reference: Path) -> None:
    """Assert that two runs have equal final weights and metrics, bit for bit."""
    tensors, metrics = result(folder)
    expected_tensors, expected_metrics = result(reference)
    assert tensors.keys() == expected_tensors.keys()
    different = [name for name in tensors if not torch.equal(tensors[name], expected_tensors[name])]
    assert not different
    assert metrics == expected_metrics


def options(**given: object) -> Iterator[str]:
    """``--name value`` words."""
    for name, value in given.items():
        yield f"--{name}"
        yield from map(str, value) if isinstance(value, (list, tuple)) else [str(value)]


if __name__ == "__main__":
    serve()
