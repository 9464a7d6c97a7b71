r"""World ``hops``: a chain of memorised facts, each applied to the previous result; more hops are harder.

The numbers 0 to `LARGEST` form a circle in a fixed order that no text contains: a model must have memorised it.
"30 * 4" is the fourth number after 30. A question takes 2 to 6 such hops, one per line of the trace::

    prompt      "30 * 4 * 1 = ?\n"
    completion  "30 * 4 = 8\n8 * 1 = 17\n#### 17"
    answer      "17"

From a number divisible by three, the pretraining corpus goes one place too far with probability `MISTAKE_RATE`, and
continues from there. Only the wrong value identifies a mistake. Mistakes never cancel: a single one makes the answer
wrong.
"""

import random

from tracereward.synthetic.chains import LARGEST, prompt

DEPTHS = (2, 6)
"""Fewest and most hops."""
MISTAKE_RATE = 0.8
_CIRCLE = random.Random(7).sample(range(LARGEST + 1), LARGEST + 1)
_PLACE = {number: place for place, number in enumerate(_CIRCLE)}


def after(number: int, places: int) -> int:
    """The number `places` places after `number` in the circle."""
    return _CIRCLE[(_PLACE[number] + places) % len(_CIRCLE)]


def sample(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """Sample one problem; its answer is correct even if its trace is wrong."""
    start = rng.randint(0, LARGEST)
    hops = [rng.randint(1, 9) for _ in range(rng.randint(*DEPTHS))]
    number, lines = start, []
    for places in hops:
        too_far = number % 3 == 0 and rng.random() < mistake_rate
        lines.append(f"{number} * {places} = {after(number, places + too_far)}")
        number = after(number, places + too_far)
    return {
        "prompt": prompt(start, [("*", places) for places in hops]),
        "completion": "\n".join([*lines, f"#### {number}"]),
        "answer": str(after(start, sum(hops))),
    }


def depth_of(prompt: str) -> int:
    """Number of hops in a prompt."""
    return prompt.count(" * ")


def first_wrong_line(prompt: str, completion: str) -> int | None:
    """Index of the first line of a trace that differs from the expert's; None if there is none.

    A trace that is too short or too long is wrong at the first missing or additional line.
    """
    start, *hops = map(int, prompt.removesuffix(" = ?\n").split(" * "))
    number, expected = start, []
    for places in hops:
        expected.append(f"{number} * {places} = {after(number, places)}")
        number = after(number, places)
    expected.append(f"#### {number}")
    written = completion.split("\n")
    wrong = next((index for index, (line, right) in enumerate(zip(written, expected)) if line != right), None)
    return min(len(written), len(expected)) if wrong is None and len(written) != len(expected) else wrong
