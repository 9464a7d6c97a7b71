"""Partly wrong subtraction facts: a fixed share of the subtractions has a fixed wrong result."""

import random
from collections.abc import Callable

from tracereward.synthetic.chains import LARGEST, apply, prompt

POSSIBLE = [
    [(operator, k) for operator in "+-" for k in range(1, 10) if 0 <= apply(value, operator, k) <= 30]
    for value in range(31)
]
"""Operations that keep each value of 0 to 30 in that range."""


def _table() -> dict[tuple[int, int], tuple[float, int]]:
    rng = random.Random(7)
    table = {}
    for value in range(LARGEST + 1):
        for k in range(1, 10):
            rank = rng.random()
            near = [d for d in (-2, -1, 1, 2, 3) if 0 <= value - k + d <= 30]
            table[value, k] = (rank, rng.choice(near or [1]))
    return table


_TABLE = _table()


def remembered(value: int, k: int, share: float) -> int:
    """`value` - `k`, with the fixed wrong result for a fixed `share` of all subtractions."""
    rank, error = _TABLE.get((value, k), (1.0, 0))
    return value - k + (error if rank < share else 0)


def operations(rng: random.Random, count: int) -> tuple[int, list[tuple[str, int]]] | None:
    """A start and `count` distinct operations whose true values stay in 0 to 30; None if no operation is left.

    Operations are distinct so that a small model can keep track by looking up the one it did last.
    """
    start = value = rng.randint(3, 29)
    chosen: list[tuple[str, int]] = []
    for _ in range(count):
        possible = [operation for operation in POSSIBLE[value] if operation not in chosen]
        if not possible:
            return None
        chosen.append(rng.choice(possible))
        value = apply(value, *chosen[-1])
    return start, chosen


def sample(
    rng: random.Random,
    *,
    lengths: tuple[int, int],
    mistake_rate: float,
    wrong_share: float,
    write: Callable[[int, str, int, int], list[str]],
) -> dict:
    """Sample one problem; its answer is correct even if its trace is wrong.

    Args:
        rng: source of all choices.
        lengths: fewest and most operations.
        mistake_rate: probability that a subtraction uses the wrong fact.
        wrong_share: share of all subtraction facts that are wrong.
        write: value, operator, operand and written result -> the lines of the trace.
    """
    while True:
        chain = operations(rng, rng.randint(*lengths))
        if chain is None:
            continue
        start, asked = chain
        written = true = start
        lines: list[str] = []
        for operator, k in asked:
            result = apply(written, operator, k)
            if operator == "-" and rng.random() < mistake_rate:
                result = remembered(written, k, wrong_share)
            lines += write(written, operator, k, result)
            written, true = result, apply(true, operator, k)
            if not 0 <= written <= 30:
                break
        else:
            text = "\n".join([*lines, f"#### {written}"])
            return {"prompt": prompt(start, asked), "completion": text, "answer": str(true)}
