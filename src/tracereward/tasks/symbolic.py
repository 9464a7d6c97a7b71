"""Equality of mathematical expressions by math-verify, in a worker process with a time limit.

Parsing an expression takes milliseconds and comparing two of them up to seconds, so that the many pairs of a vote
would take a minute. Each expression is therefore parsed once and evaluated at two points; only a pair whose values
agree is compared.
"""

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

TIME_LIMIT = 5.0
"""Timeout of math-verify for one expression or one pair in seconds; a pair that times out counts as not equal."""
TOLERANCE = 1e-5
"""Values further apart are different: math-verify compares decimals after rounding them to six places."""
MAX_TIMEOUTS = 2
"""After so many timeouts an expression without a fingerprint equals no other, lest a vote take minutes."""

_TOWER = re.compile(
    r"\^\s*\{?\s*\(?\s*[\d.]+\s*\)?\s*\}?\s*\^|\d\s*\^\s*\{\s*[\d.]+\s*\^|\^\s*\{?\s*-?\d{5,}"  # 9^9^9, 10^99999
    r"|\d{6,}\s*!|!\s*!|\([^()a-zA-Z]*\d{3,}[^()]*\)\s*!|\^\s*\{[^{}]*\d{2,}\s*!"  # 100000!, 2^{99!}
)
_DEPTH = 20

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_worker: subprocess.Popen[str] | None = None
_worker_owner = 0
_timeouts: Counter[str] = Counter()


@dataclass(frozen=True)
class Fingerprint:
    """What is known about an expression without comparing it: see `math_worker.fingerprint`."""

    kind: str
    values: tuple[complex, ...] = ()


def same_expression(answer: str, gold: str) -> bool:
    """Whether two expressions are equal; False if one cannot be parsed within `TIME_LIMIT` seconds. Symmetric.

    Raises:
        RuntimeError: math-verify cannot be started.
    """
    left, right = fingerprint(answer), fingerprint(gold)
    if left is None or right is None or not may_be_same(left, right):
        return False
    unknown = [text for text, found in ((answer, left), (gold, right)) if found.kind == "other"]
    if any(_timeouts[text] >= MAX_TIMEOUTS for text in unknown):
        return False
    equal = _verified(*sorted((answer, gold)))
    if equal is None:
        _timeouts.update(unknown)
    return bool(equal)


def may_be_same(left: Fingerprint, right: Fingerprint) -> bool:
    """False only for fingerprints of expressions that math-verify would not call equal."""
    if "other" in (left.kind, right.kind):
        return True
    return left.kind == right.kind and all(
        abs(a - b) <= TOLERANCE + 1e-9 * max(abs(a), abs(b)) for a, b in zip(left.values, right.values, strict=True)
    )


def hostile(text: str) -> bool:
    """Whether an expression is not worth a time limit: towers of powers, huge factorials, deep nesting."""
    depth = most = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        most = max(most, depth)
    return most > _DEPTH or bool(_TOWER.search(text))


@lru_cache(maxsize=100_000)
def fingerprint(text: str) -> Fingerprint | None:
    """Fingerprint of an expression; None if it cannot be parsed, or not in time."""
    if hostile(text):
        return None
    found = _ask([text])
    if found is None:
        return None
    kind, values = found
    return Fingerprint(kind, tuple(complex(*value) for value in values))


@lru_cache(maxsize=100_000)
def _verified(answer: str, gold: str) -> bool | None:
    return _ask([answer, gold])


def _ask(request: list[str]) -> Any:
    """The worker's reply; None if it does not come within `TIME_LIMIT` seconds.

    Thread-safe; one request at a time. The process is started on first use and restarted after a timeout.

    Raises:
        RuntimeError: the process exited by itself, for instance because math-verify is not installed.
    """
    global _worker, _worker_owner
    with _lock:
        # After a fork the pipe belongs to the parent: with two writers the replies would get mixed up.
        worker = _worker if _worker_owner == os.getpid() else None
        if worker is None:
            worker = _worker = _start_worker()
            _worker_owner = os.getpid()
        assert worker.stdin is not None
        assert worker.stdout is not None
        expired = threading.Event()
        timer = threading.Timer(TIME_LIMIT, lambda: (expired.set(), worker.kill()))
        timer.daemon = True
        timer.start()
        try:
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
            reply = worker.stdout.readline()
        except BrokenPipeError:
            reply = ""
        except BaseException:  # Ctrl-C between request and reply: the next caller must not read this reply
            worker.kill()
            _end(worker)
            _worker = None
            raise
        finally:
            timer.cancel()
            timer.join()  # it may be about to kill the process
        if not reply or expired.is_set():
            _worker = None
            code = _end(worker)
            if not reply and not expired.is_set():
                raise RuntimeError(f"math-verify exited with code {code}; see its message above")
        if reply:
            return json.loads(reply)
        # Do not log the answers: a server's log must not contain user input.
        sizes = " and ".join(str(len(text)) for text in request)
        _log.warning("math-verify stopped after %g s on answers of %s characters", TIME_LIMIT, sizes)
        return None


def _end(worker: subprocess.Popen[str]) -> int:
    """Close the pipes of an ending process and return its exit status."""
    for pipe in (worker.stdin, worker.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # unread input
            pipe.close()
    return worker.wait()


def _start_worker() -> subprocess.Popen[str]:
    """Start the process and wait for the import of math-verify, which must not count as comparison time."""
    script = Path(__file__).with_name("math_worker.py")
    # -P keeps this folder out of sys.path.
    command = [sys.executable, "-P", str(script)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write('["1", "1"]\n')
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # it has exited; the empty line below is detected
    if not worker.stdout.readline():
        raise RuntimeError(f"math-verify exited with code {worker.wait()} at startup; see its message above")
    return worker
