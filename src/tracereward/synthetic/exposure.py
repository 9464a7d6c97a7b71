"""World ``exposure``: half-remembered facts in chains of 6 to 8 lines, where one mistake spoils all that follows.

The pretraining corpus gets `WRONG_SHARE` of all subtraction facts wrong with probability `MISTAKE_RATE`, always in the
same way, marks such a result with a question mark and goes on: "13 - 4 = 11?". Experts are right and never in doubt. A
policy that works 29 of 30 lines rightly is wrong in a fifth of these chains. Its log-prob is no judge: it is as sure of
what it remembers wrongly, mark and all, as of the rest. What an expert never writes is there to be seen.
"""

import random

from tracereward.synthetic import facts
from tracereward.synthetic.chains import apply

LENGTHS = (6, 8)
"""Fewest and most operations."""
CORPUS_LENGTHS = (2, 8)
"""Those of a mistaken corpus: from short chains a small model learns to keep its place in long ones."""
WRONG_SHARE = 0.3
MISTAKE_RATE = 0.6


def draw(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """One problem; its answer is the true one even where its trace is mistaken."""
    lengths = CORPUS_LENGTHS if mistake_rate else LENGTHS
    return facts.draw(rng, lengths, mistake_rate, WRONG_SHARE, _lines)


def _lines(value: int, operator: str, k: int, result: int) -> list[str]:
    doubt = "" if result == apply(value, operator, k) else "?"
    return [f"{value} {operator} {k} = {result}{doubt}"]
