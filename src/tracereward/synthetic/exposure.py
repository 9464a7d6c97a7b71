"""World ``exposure``: partly wrong subtraction facts in chains of 6 to 8 lines; one mistake makes the answer wrong.

The pretraining corpus gets `WRONG_SHARE` of all subtraction facts wrong with probability `MISTAKE_RATE`, always in the
same way, puts a question mark after such a result and continues: "13 - 4 = 11?". Expert traces are correct and have no
question marks. A policy that gets 29 of 30 lines right fails a fifth of these chains. Its log-prob does not detect the
mistakes: it is as confident in them, marker included, as in the rest. But the marker is something experts never write.
"""

import random

from tracereward.synthetic import facts
from tracereward.synthetic.chains import apply

LENGTHS = (6, 8)
"""Fewest and most operations."""
CORPUS_LENGTHS = (2, 8)
"""Lengths in a corpus with mistakes: short chains teach a small model to keep track in long ones."""
WRONG_SHARE = 0.3
MISTAKE_RATE = 0.6


def sample(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """Sample one problem; its answer is correct even if its trace is wrong."""
    lengths = CORPUS_LENGTHS if mistake_rate else LENGTHS
    return facts.sample(rng, lengths=lengths, mistake_rate=mistake_rate, wrong_share=WRONG_SHARE, write=_lines)


def _lines(value: int, operator: str, k: int, result: int) -> list[str]:
    doubt = "" if result == apply(value, operator, k) else "?"
    return [f"{value} {operator} {k} = {result}{doubt}"]
