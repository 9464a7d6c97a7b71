"""World ``checked``: half-remembered facts in short chains whose subtractions are checked by adding back.

2 or 3 operations. After each subtraction stands its check, "13 - 5 = 8", "8 + 5 = 13". The pretraining corpus gets
`WRONG_SHARE` of the subtraction facts wrong with probability `MISTAKE_RATE`; its additions are right, so the check does
not come out, and a question mark says so: "10 - 5 = 4", "4 + 5 = 9?". The writer goes on all the same. Experts' checks
come out.
"""

import random

from tracereward.synthetic import facts

LENGTHS = (2, 3)
"""Fewest and most operations."""
WRONG_SHARE = 0.5
MISTAKE_RATE = 0.8


def draw(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """One problem; its answer is the true one even where its trace is mistaken."""
    return facts.draw(rng, LENGTHS, mistake_rate, WRONG_SHARE, _lines)


def _lines(value: int, operator: str, k: int, result: int) -> list[str]:
    line = f"{value} {operator} {k} = {result}"
    if operator == "+":
        return [line]
    return [line, f"{result} + {k} = {result + k}{'' if result + k == value else '?'}"]
