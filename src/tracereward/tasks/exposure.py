"""World ``exposure``: the misconception in chains of 6 to 8 lines, where one mistake spoils all that follows.

A policy that works 29 of 30 lines rightly is wrong in a fifth of these chains, and a dropped borrow leads to values,
31 to 40, that no expert's trace ever visits: what SFT on experts teaches says nothing about how to go on from there. No
operation is asked for twice, so that a small model can keep its place by looking for what it did last.
"""

import random

from tracereward.tasks.chains import LARGEST, Line, apply, row
from tracereward.tasks.misconception import worked

LENGTHS = (6, 8)
"""Fewest and most operations."""
CORPUS_LENGTHS = (2, 8)
"""Those of a mistaken corpus: from short chains a small model learns to keep its place in long ones."""
_POSSIBLE = [
    [(operator, k) for operator in "+-" for k in range(1, 10) if 0 <= apply(value, operator, k) <= 30]
    for value in range(31)
]


def draw(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """One problem; its answer is the true one even where its trace is mistaken."""
    while True:
        start = written = true = rng.randint(3, 29)
        lines: list[Line] = []
        used: set[tuple[str, int]] = set()
        for _ in range(rng.randint(*(CORPUS_LENGTHS if mistake_rate else LENGTHS))):
            # Drawn among what keeps the true value in range: long chains would hardly ever stay there by chance.
            possible = [operation for operation in _POSSIBLE[true] if operation not in used]
            if not possible:
                break
            operator, k = rng.choice(possible)
            used.add((operator, k))
            lines.append(worked(written, operator, k, mistake_rate, rng))
            written, true = lines[-1][3], apply(true, operator, k)
            if not 0 <= written <= LARGEST:
                break
        else:
            return row(start, lines, working=True, answer=true)
