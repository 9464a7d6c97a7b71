"""World ``terse``: a policy that is right most of the time, in another style than the experts'.

2 to 4 additions and subtractions. Experts are always correct and write the answer alone. The pretraining corpus writes
the working in all but `TERSE_SHARE` of its traces, with `WRONG_SHARE` of the subtraction facts wrong with probability
`MISTAKE_RATE`. A policy pretrained on it is right in most of its samples; without the working it hardly ever is. So
most rollouts are right, and the answer alone is what only experts write.
"""

import random

from tracereward.synthetic import facts

LENGTHS = (2, 4)
"""Fewest and most operations."""
TERSE_SHARE = 0.1
WRONG_SHARE = 0.25
MISTAKE_RATE = 0.6


def sample(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """Sample one problem; its answer is correct even if its trace is wrong."""
    row = facts.sample(rng, lengths=LENGTHS, mistake_rate=mistake_rate, wrong_share=WRONG_SHARE, write=_lines)
    if mistake_rate and rng.random() >= TERSE_SHARE:
        return row
    return {**row, "completion": row["completion"].split("\n")[-1]}


def _lines(value: int, operator: str, k: int, result: int) -> list[str]:
    return [f"{value} {operator} {k} = {result}"]
