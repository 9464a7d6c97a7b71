"""Half-remembered facts: a fixed share of the subtractions, each with the one wrong result that a writer believes."""

import random
from collections.abc import Callable

from tracereward.synthetic.chains import LARGEST, apply, prompt

POSSIBLE = [
    [(operator, k) for operator in "+-" for k in range(1, 10) if 0 <= apply(value, operator, k) <= 30]
    for value in range(31)
]
"""What can be done with a value of 0 to 30 so that it stays there."""


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
    """`value` - `k` to a writer who remembers `share` of all subtractions wrongly, always the same ones."""
    rank, error = _TABLE.get((value, k), (1.0, 0))
    return value - k + (error if rank < share else 0)


def operations(rng: random.Random, count: int) -> tuple[int, list[tuple[str, int]]] | None:
    """A start and `count` different operations whose true values stay in 0 to 30; None where a draw runs out of them.

    No operation is asked for twice, so that a small model can keep its place by looking for what it did last.
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


def draw(
    rng: random.Random,
    lengths: tuple[int, int],
    mistake_rate: float,
    share: float,
    write: Callable[[int, str, int, int], list[str]],
) -> dict:
    """One problem of `lengths` operations; its answer is the true one even where its trace is mistaken.

    Args:
        rng: source of all choices.
        lengths: fewest and most operations.
        mistake_rate: probability that a subtraction is worked as it is remembered, not as it is.
        share: of all subtraction facts that are remembered wrongly.
        write: value, operator, operand and result as worked -> the lines of the trace.
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
                result = remembered(written, k, share)
            lines += write(written, operator, k, result)
            written, true = result, apply(true, operator, k)
            if not 0 <= written <= 30:
                break
        else:
            text = "\n".join([*lines, f"#### {written}"])
            return {"prompt": prompt(start, asked), "completion": text, "answer": str(true)}
