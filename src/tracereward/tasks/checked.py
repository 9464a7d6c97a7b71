"""World ``checked``: half-remembered facts in short chains whose subtractions are checked by adding back.

2 or 3 operations. After each subtraction stands its check, "13 - 5 = 8", "8 + 5 = 13". The pretraining corpus gets
`WRONG_SHARE` of the subtraction facts wrong with probability `MISTAKE_RATE`; its additions are right, so the check does
not come out, and a question mark says so: "10 - 5 = 4", "4 + 5 = 9?". The writer goes on all the same. Experts' checks
come out.
"""

import random

from tracereward.tasks.chains import LARGEST, apply, prompt
from tracereward.tasks.facts import operations, remembered

LENGTHS = (2, 3)
"""Fewest and most operations."""
WRONG_SHARE = 0.5
MISTAKE_RATE = 0.8


def draw(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """One problem; its answer is the true one even where its trace is mistaken."""
    while True:
        chain = operations(rng, rng.randint(*LENGTHS))
        if chain is None:
            continue
        start, asked = chain
        written = true = start
        lines = []
        for operator, k in asked:
            result = apply(written, operator, k)
            if operator == "-" and rng.random() < mistake_rate:
                result = remembered(written, k, WRONG_SHARE)
            lines.append(f"{written} {operator} {k} = {result}")
            if operator == "-":
                lines.append(f"{result} + {k} = {result + k}{'' if result + k == written else '?'}")
            written, true = result, apply(true, operator, k)
            if not (0 <= written <= 30 and result + k <= LARGEST):
                break
        else:
            text = "\n".join([*lines, f"#### {written}"])
            return {"prompt": prompt(start, asked), "completion": text, "answer": str(true)}
