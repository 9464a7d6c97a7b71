"""World ``style``: experts are always correct, but most use a style that the policy cannot execute.

2 to 4 additions, subtractions and multiplications, values 0 to 20. 60 % of the experts skip the intermediate lines and
write only ``#### n``; the policy, trained from scratch, is far better with intermediate lines than without.
"""

import random

from tracereward.synthetic.chains import Line, apply, row

SKIP_RATE = 0.6
"""Share of the experts that write only the answer."""


def sample(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """Sample one problem; `mistake_rate` is always 0."""
    while True:
        start = value = rng.randint(1, 9)
        lines: list[Line] = []
        for _ in range(rng.randint(2, 4)):
            operator = rng.choice("++--*")
            k = rng.randint(2, 3) if operator == "*" else rng.randint(1, 5)
            result = apply(value, operator, k)
            lines.append((value, operator, k, result))
            value = result
            if not 0 <= value <= 20:
                break
        else:
            return row(start, lines, working=rng.random() >= SKIP_RATE, answer=value)
