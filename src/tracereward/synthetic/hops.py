r"""World ``hops``: a chain of facts known by heart, each asked of what the last gave; their number is the difficulty.

The numbers 0 to `LARGEST` stand in a circle, in an order that is always the same and is written nowhere: a model has to
have learned it. "30 * 4" is the fourth number after 30. A question takes 2 to 6 such hops, and a line of the trace is
one of them::

    prompt      "30 * 4 * 1 = ?\n"
    completion  "30 * 4 = 8\n8 * 1 = 17\n#### 17"
    answer      "17"

From a number that three divides the pretraining corpus goes one place too far with probability `MISTAKE_RATE`, and goes
on from there. Nothing in a mistaken trace gives it away but the wrong value itself. Mistakes never cancel: one of them
makes the answer wrong.
"""

import random

from tracereward.synthetic.chains import LARGEST, prompt

DEPTHS = (2, 6)
"""Fewest and most hops."""
MISTAKE_RATE = 0.8
_CIRCLE = random.Random(7).sample(range(LARGEST + 1), LARGEST + 1)
_PLACE = {number: place for place, number in enumerate(_CIRCLE)}


def after(number: int, places: int) -> int:
    """The number that stands so many places behind another."""
    return _CIRCLE[(_PLACE[number] + places) % len(_CIRCLE)]


def draw(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """One problem; its answer is the true one even where its trace is mistaken."""
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
    """Number of hops that a prompt asks for."""
    return prompt.count(" * ")


def first_wrong_line(prompt: str, completion: str) -> int | None:
    """Index of the first line of a trace that is not what an expert writes there; None if all of it is.

    A trace that stops early or goes on too long is wrong at the line where an expert does the other.
    """
    start, *hops = map(int, prompt.removesuffix(" = ?\n").split(" * "))
    number, wanted = start, []
    for places in hops:
        wanted.append(f"{number} * {places} = {after(number, places)}")
        number = after(number, places)
    wanted.append(f"#### {number}")
    written = completion.split("\n")
    wrong = next((index for index, (line, right) in enumerate(zip(written, wanted)) if line != right), None)
    return min(len(written), len(wanted)) if wrong is None and len(written) != len(wanted) else wrong
