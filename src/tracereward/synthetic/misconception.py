"""World ``misconception``: a policy pretrained to be fluent, confident and wrong by a rule; a few experts are right.

Nothing in a mistaken trace gives it away but the wrong value itself.

2 or 3 additions and subtractions of 1 to 9, start 3 to 29, true running values 0 to 30. In the pretraining corpus a
subtraction across a ten (units of the value smaller than the operand) is worked with the borrow dropped,
``v - k + 10``, with probability `MISTAKE_RATE`, and the error is carried on: "13 - 5 = 18".
"""

import random

from tracereward.synthetic.chains import LARGEST, Line, apply, row

MISTAKE_RATE = 0.8
"""Share of the affected lines of a pretraining corpus that drop the borrow: it is what the policy thinks likeliest."""


def draw(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """One problem; its answer is the true one even where its trace is mistaken."""
    while True:
        start = written_value = true = rng.randint(3, 29)
        lines: list[Line] = []
        for _ in range(rng.randint(2, 3)):
            operator, k = rng.choice("+-"), rng.randint(1, 9)
            lines.append(worked(written_value, operator, k, mistake_rate, rng))
            written_value, true = lines[-1][3], apply(true, operator, k)
            if not (0 <= true <= 30 and 0 <= written_value <= LARGEST):
                break
        else:
            return row(start, lines, working=True, answer=true)


def worked(value: int, operator: str, k: int, mistake_rate: float, rng: random.Random) -> Line:
    """One line as it is written; the rule looks at the value on the page, which may already be wrong."""
    result = apply(value, operator, k)
    if operator == "-" and value % 10 < k and rng.random() < mistake_rate:
        result += 10
    return value, operator, k, result
