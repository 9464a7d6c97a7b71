"""Extraction and comparison of final answers.

Extraction never guesses. An answer counts only in an explicit form: ``\\boxed{...}``, a ``#### ...`` line, or a phrase
such as "the answer is (C)"; the last occurrence of a form counts. Without such a form the result is None, "no answer".
Each function documents the order in which it tries the forms: the task's own form first.
"""

import contextlib
import json
import logging
import os
import re
import string
import subprocess
import sys
import threading
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

MAX_LENGTH = 300
"""Characters; longer answers are compared as text only."""
TIME_LIMIT = 5.0
"""Timeout of math-verify for one pair in seconds; a pair that times out counts as not equal."""

_LEAD = r"\b(?i:answer)\s*(?i:is|:)[\s:*_]*"
_STOP = r"(?=[*_\s]*(?:[.,;:!]|\n|$))"
_LETTER_PHRASE = re.compile(_LEAD + rf"(?:\(([A-Ja-j])\)|([A-J]){_STOP})")
_YES_NO_PHRASE = re.compile(_LEAD + rf"((?i:yes|no|true|false)){_STOP}")
_ANY_PHRASE = re.compile(r"\b(?i:the\s+(?:final\s+|correct\s+)?answer\s+is)[\s:]*(\S.*?)(?=\.(?:\s|$)|\n|$)")
_PHRASE_LEAD = re.compile(r"\b(?i:the\s+(?:final\s+|correct\s+)?answer\s+is)\b[ \t:*_]*")
_YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(
    r"([+-]?)(?:(\d+)\s*)?\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))", flags=re.ASCII
)
_MIXED = re.compile(r"([+-]?)(\d+)\s+(\d+/\d+)", flags=re.ASCII)
_SIMPLE = re.compile(r"[+-]?(?:\d+/\d+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)", flags=re.ASCII)
_WORDS = re.compile(r"[A-Za-z\s.,'-]*[A-Za-z]{3}[A-Za-z\s.,'-]*")


def extract_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``, braces balanced; None if there is none, or it is empty or unclosed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":  # an escaped brace is a character of the answer, not a group
            i += 2
            continue
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i].strip() or None
        i += 1
    return None


def extract_hashes(text: str) -> str | None:
    """Text after the last ``####`` on its line, without ``$``, thousands separators and a final full stop.

    The result need not be a number ("18 apples"); the comparison decides.
    """
    start = text.rfind("####")
    if start < 0:
        return None
    lines = text[start + 4 :].splitlines()
    answer = lines[0].replace("\\$", "").replace("$", "") if lines else ""
    return _THOUSANDS.sub("", answer).strip().removesuffix(".").strip() or None


def extract_number(text: str) -> str | None:
    r"""Answer of word problems: ``#### n``, then ``\boxed{n}``."""
    return extract_hashes(text) or extract_boxed(text)


def extract_math(text: str) -> str | None:
    r"""Answer of mathematics: ``\boxed{...}``, then ``#### ...``."""
    return extract_boxed(text) or extract_hashes(text)


def extract_letter(text: str) -> str | None:
    r"""Choice A to J: "the answer is (C)" or "the answer is C.", then ``\boxed{C}``, then ``#### C``; upper case.

    A bare letter must be a capital and end its clause: "the answer is a matter of taste" has no answer.
    """
    found = _LETTER_PHRASE.findall(text)
    if found:
        return (found[-1][0] or found[-1][1]).upper()
    for stated in (extract_boxed(text), extract_hashes(text)):
        letter = re.fullmatch(r"\(?([A-Ja-j])\)?", plain_text(stated)) if stated else None
        if letter:
            return letter[1].upper()
    return None


def extract_yes_no(text: str) -> str | None:
    r"""``yes`` or ``no``: "the answer is yes." (or no, true, false), then ``\boxed{yes}``, then ``#### yes``."""
    found = _YES_NO_PHRASE.findall(text)
    if found:
        return _YES_NO[found[-1].lower()]
    for stated in (extract_boxed(text), extract_hashes(text)):
        if stated and plain_text(stated) in _YES_NO:
            return _YES_NO[plain_text(stated)]
    return None


def extract_any(text: str) -> str | None:
    r"""Answer in any form: ``\boxed{...}``, ``#### ...``, "the answer is (C)", then "the answer is <a clause>."."""
    stated = extract_boxed(text) or extract_hashes(text)
    if stated:
        return stated
    letters = _LETTER_PHRASE.findall(text)
    if letters:
        return (letters[-1][0] or letters[-1][1]).upper()
    phrases = _ANY_PHRASE.findall(text)
    if not phrases:
        return None
    return phrases[-1].strip().strip("*_$ ").removesuffix(".") or None


def extract_span(text: str) -> str | None:
    r"""Free text: the rest of the line after the last "the answer is", then ``\boxed{...}``, then ``#### ...``.

    The rest of the line, not of the clause as in `extract_any`: names and dates contain full stops and commas.
    """
    leads = list(_PHRASE_LEAD.finditer(text))
    if leads:
        lines = text[leads[-1].end() :].splitlines()
        return lines[0].strip("*_ \t").removesuffix(".").strip("*_ \t") or None if lines else None
    return extract_boxed(text) or extract_hashes(text)


def plain_text(answer: str) -> str:
    r"""Case-folded answer without ``$``, ``\text{}`` wrappers, repeated spaces and a final full stop."""
    answer = _TEXT_COMMAND.sub(r"\1", answer).replace("\\$", "").replace("$", "")
    return " ".join(answer.split()).removesuffix(".").strip().casefold()


def equal_text(answer: str, gold: str) -> bool:
    """Whether two answers are the same words, by `plain_text`."""
    return plain_text(answer) == plain_text(gold)


def equal_yes_no(answer: str, gold: str) -> bool:
    """Whether two answers are equal as yes or no; "true" is "yes" and "false" is "no"."""
    answer, gold = plain_text(answer), plain_text(gold)
    return _YES_NO.get(answer, answer) == _YES_NO.get(gold, gold)


def normalised(answer: str) -> str:
    """Normalisation of SQuAD and HotpotQA: lower case, without ASCII punctuation, articles and repeated spaces."""
    bare = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def equal_span(answer: str, gold: str) -> bool:
    """Whether two answers are equal after `normalised`; after `plain_text` if that leaves both empty."""
    left, right = normalised(answer), normalised(gold)
    return left == right if left or right else equal_text(answer, gold)


def number(answer: str) -> tuple[Fraction, bool] | None:
    r"""Exact value of a plain number, and whether it has a percent sign (the value is *not* divided by 100).

    Parses integers, decimals, ``1,234``, ``1.5e3`` (exponents of at most three digits), ``3/4``, ``1 1/2`` and
    ``\frac{3}{4}``, optionally with a leading ``$`` or trailing ``%``; None for anything else or a zero denominator.
    """
    text = answer.replace("\u2212", "-").replace("\\!", "").replace("{,}", ",").replace("\\$", "").replace("$", "")
    text = text.strip().removesuffix(".")
    percent = text.endswith("%")
    text = _THOUSANDS.sub("", text.removesuffix("%").removesuffix("\\")).strip()
    if len(text) > MAX_LENGTH:
        return None
    fraction = _FRACTION.fullmatch(text)
    if fraction:  # as a/b, or n a/b
        sign, whole, a, b, a_digit, b_digit = fraction.groups()
        text = f"{sign}{whole + ' ' if whole else ''}{a or a_digit}/{b or b_digit}"
    mixed = _MIXED.fullmatch(text)
    try:
        if mixed:
            value = Fraction(mixed[2]) + Fraction(mixed[3])
            return (-value if mixed[1] == "-" else value), percent
        if _SIMPLE.fullmatch(text):
            return Fraction(text), percent
    except ZeroDivisionError:
        return None
    return None


@lru_cache(maxsize=100_000)
def equal_math(answer: str, gold: str) -> bool:
    r"""Whether two mathematical answers are equal; tried in this order:

    1. the same text (`equal_text`);
    2. both plain numbers: exactly equal ("0.5" = "1/2" = "50%" = ``\frac{1}{2}``, but "0.333" is not "1/3"). If only
       one has a percent sign, both readings are tried, "50%" = "0.5" and "50%" = "50", because datasets use both;
    3. words ("Monday"), different number bases, and answers over `MAX_LENGTH` characters: equal only by 1.
       (math-verify parses words as products of letters, so that anagrams would be equal, and ignores the base);
    4. math-verify, in a separate process and for at most `TIME_LIMIT` seconds.

    Raises:
        RuntimeError: math-verify cannot be started.
    """
    if equal_text(answer, gold):
        return True
    left, right = number(answer), number(gold)
    if left and right:
        (a, a_percent), (b, b_percent) = left, right
        if a_percent == b_percent:
            return a == b
        return a == b or (a / 100 == b if a_percent else a == b / 100)
    if max(len(answer), len(gold)) > MAX_LENGTH:
        return False
    if any(_WORDS.fullmatch(plain_text(text)) for text in (answer, gold)):
        return False
    bases = [set(re.findall(r"_\{?(\d+)", text)) for text in (answer, gold)]
    if all(bases) and bases[0] != bases[1]:
        return False
    return math_verify_equal(answer.strip().removesuffix("."), gold.strip().removesuffix("."))


_log = logging.getLogger(__name__)
_lock = threading.Lock()
_worker: subprocess.Popen[str] | None = None
_worker_owner = 0


def math_verify_equal(answer: str, gold: str) -> bool:
    """Compare one pair with math-verify; False if it does not return within `TIME_LIMIT` seconds.

    Thread-safe; compares one pair at a time. The process is started on first use and restarted after a timeout.

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
            worker.stdin.write(json.dumps([answer, gold]) + "\n")
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
        size = len(answer), len(gold)
        _log.warning("math-verify stopped after %g s on answers of %d and %d characters", TIME_LIMIT, *size)
        return False


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
