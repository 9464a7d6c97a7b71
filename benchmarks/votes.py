"""Seconds of a vote over different LaTeX answers, compared with math-verify on every pair.

    python benchmarks/votes.py [--answers 48] [--votes 3] [--json FILE]

Answers are generated: fractions with roots, polynomials, complex numbers, tuples, intervals, matrices, inequalities and
multiples of pi; no two of a vote are equal, so that all pairs are compared. "pairs" parses and compares both answers of
each pair, as a plain use of math-verify does. "vote" is `selection.vote_groups` with the task's equality, its worker
process started before and its caches empty. Wall-clock time, the two in turns.
"""

import itertools
import logging
import random
import time
from collections.abc import Callable

import common
from common import Result, iqr, median
from math_verify import parse, verify

from tracereward.selection import vote_groups
from tracereward.tasks import answers, quantities, symbolic

KINDS: list[Callable[[Callable[[], int]], str]] = [
    lambda n: rf"\frac{{{n()}\sqrt{{{n()}}}}}{{{n()}}}",
    lambda n: rf"{n()}x^2 - {n()}x + {n()}",
    lambda n: rf"{n()} + {n()}i",
    lambda n: rf"\left({n()}, \frac{{{n()}}}{{{n()}}}\right)",
    lambda n: rf"(-\infty, {n()}] \cup [{n() + 100}, \infty)",
    lambda n: rf"\begin{{pmatrix}} {n()} & {n()} \\ {n()} & {n()} \end{{pmatrix}}",
    lambda n: rf"x \le \frac{{{n()}}}{{{n()}}}",
    lambda n: rf"{n()}\pi - \sqrt{{{n()}}}",
]


def generated(count: int, seed: int) -> list[str]:
    """Answers of all kinds in turn."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    for kind in itertools.cycle(KINDS):
        found[kind(lambda: rng.randint(2, 99))] = None
        if len(found) == count:
            return list(found)
    raise AssertionError


def pairs(texts: list[str]) -> list[tuple[str, str]]:
    """The equal pairs according to plain math-verify."""

    def read(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", parsing_timeout=0)

    found = itertools.combinations(texts, 2)
    return [(a, b) for a, b in found if verify(read(b), read(a), timeout_seconds=0)]


def forget() -> None:
    """Empty all caches of answers."""
    for cached in (answers.equal_math, answers.read_form, answers.plain_text, quantities.read_quantity):
        cached.cache_clear()
    symbolic.fingerprint.cache_clear()


def main() -> None:
    parser = common.parser(__doc__, model=False)
    parser.add_argument("--answers", type=int, default=48)
    parser.add_argument("--votes", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # math-verify's, of its disabled timeouts
    result = Result("votes", {"answers": args.answers, "votes": args.votes})
    times: dict[str, list[float]] = {"vote": [], "pairs": []}
    answers.equal_math("x+1", "1+x")
    for seed in range(args.votes):
        texts = generated(args.answers, seed)
        forget()
        start = time.perf_counter()
        groups = vote_groups(dict.fromkeys(texts, 1.0), answers.equal_math)
        times["vote"].append(time.perf_counter() - start)
        start = time.perf_counter()
        equal = pairs(texts)
        times["pairs"].append(time.perf_counter() - start)
        print(f"seed {seed}: {len(groups)} groups, {len(equal)} equal pairs by math-verify {equal[:3]}")
    for name, seconds in times.items():
        ratio = median(seconds) / median(times["pairs"])
        result.rows.append({"what": name, "s": median(seconds), "IQR": iqr(seconds), "ratio": ratio})
    result.write(args.json)


if __name__ == "__main__":
    main()
