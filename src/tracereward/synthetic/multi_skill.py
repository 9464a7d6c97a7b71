"""World ``multi-skill``: experts with three correct strategies, which a policy executes with unequal reliability.

2 to 4 additions and subtractions of 1 to 5, values 0 to 20. Each expert uses one strategy, chosen at random:

- ``lines``: one operation per line, the easiest to imitate.
- ``pairs``: two operations per line, ``23 - 7 + 5 = 21``: the intermediate result is not written.
- ``gather``: the sum of the additions and that of the subtractions, ``3 + 9 = 12``, ``5 + 4 = 9``, then
  ``12 - 9 = 3``: the operands must be collected from the question.
"""

import random

from tracereward.synthetic.chains import LARGEST, apply, prompt

STRATEGIES = ("lines", "pairs", "gather")


def sample(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """Sample one problem; `mistake_rate` is always 0."""
    while True:
        start = value = rng.randint(1, 15)
        operations = []
        for _ in range(rng.randint(2, 4)):
            operator, k = rng.choice("+-"), rng.randint(1, 5)
            value = apply(value, operator, k)
            operations.append((operator, k))
            if not 0 <= value <= 20:
                break
        else:
            if start + sum(k for operator, k in operations if operator == "+") <= LARGEST:
                lines = _work(start, operations, rng.choice(STRATEGIES))
                text = "\n".join([*lines, f"#### {value}"])
                return {"prompt": prompt(start, operations), "completion": text, "answer": str(value)}


def _work(start: int, operations: list[tuple[str, int]], strategy: str) -> list[str]:
    """Lines of one strategy."""
    if strategy == "gather":
        value, lines = start, []
        taken = [k for operator, k in operations if operator == "-"]
        for k in (k for operator, k in operations if operator == "+"):
            lines.append(f"{value} + {k} = {value + k}")
            value += k
        total = taken[0] if taken else 0
        for k in taken[1:]:
            lines.append(f"{total} + {k} = {total + k}")
            total += k
        return [*lines, f"{value} - {total} = {value - total}"] if taken else lines
    size = 2 if strategy == "pairs" else 1
    value, lines = start, []
    for first in range(0, len(operations), size):
        part = operations[first : first + size]
        left = f"{value}" + "".join(f" {operator} {k}" for operator, k in part)
        for operator, k in part:
            value = apply(value, operator, k)
        lines.append(f"{left} = {value}")
    return lines
