"""World ``checked``: partly wrong subtraction facts in short chains, each subtraction checked by adding back.

2 or 3 operations. Each subtraction is followed by its check, "13 - 5 = 8", "8 + 5 = 13". The pretraining corpus gets
`WRONG_SHARE` of the subtraction facts wrong with probability `MISTAKE_RATE`; its additions are correct, so the check
fails, which a question mark shows: "10 - 5 = 4", "4 + 5 = 9?". The trace continues all the same. Experts' checks
succeed.
"""

import random

from tracereward.synthetic import facts

LENGTHS = (2, 3)
"""Fewest and most operations."""
WRONG_SHARE = 0.5
MISTAKE_RATE = 0.8


def sample(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """Sample one problem; its answer is correct even if its trace is wrong."""
    return facts.sample(rng, lengths=LENGTHS, mistake_rate=mistake_rate, wrong_share=WRONG_SHARE, write=_lines)


def _lines(value: int, operator: str, k: int, result: int) -> list[str]:
    line = f"{value} {operator} {k} = {result}"
    if operator == "+":
        return [line]
    return [line, f"{result} + {k} = {result + k}{'' if result + k == value else '?'}"]
