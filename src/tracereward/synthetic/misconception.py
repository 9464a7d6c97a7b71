"""World ``misconception``: a policy pretrained to be fluent, confident and systematically wrong; a few correct experts.

Only the wrong value identifies a mistake.

2 or 3 additions and subtractions of 1 to 9, start 3 to 29, true running values 0 to 30. In the pretraining corpus a
subtraction across a ten (units of the value smaller than the operand) drops the borrow, ``v - k + 10``, with
probability `MISTAKE_RATE`, and the error propagates: "13 - 5 = 18".
"""

import random

from tracereward.synthetic.chains import LARGEST, Line, apply, row

MISTAKE_RATE = 0.8
"""Share of the affected lines of a pretraining corpus that drop the borrow; the policy learns this as most likely."""


def sample(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """Sample one problem; its answer is correct even if its trace is wrong."""
    while True:
        start = written_value = true = rng.randint(3, 29)
        lines: list[Line] = []
        for _ in range(rng.randint(2, 3)):
            operator, k = rng.choice("+-"), rng.randint(1, 9)
            lines.append(written_line(rng, written_value, (operator, k), mistake_rate))
            written_value, true = lines[-1][3], apply(true, operator, k)
            if not (0 <= true <= 30 and 0 <= written_value <= LARGEST):
                break
        else:
            return row(start, lines, working=True, answer=true)


def written_line(rng: random.Random, value: int, operation: tuple[str, int], mistake_rate: float) -> Line:
    """One line of a trace; the borrow depends on the written value, which may already be wrong."""
    operator, k = operation
    result = apply(value, operator, k)
    if operator == "-" and value % 10 < k and rng.random() < mistake_rate:
        result += 10
    return value, operator, k, result
