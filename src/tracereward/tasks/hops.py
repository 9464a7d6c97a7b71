"""World ``hops``: a chain of facts to be looked up one after another; how many hops it takes is its difficulty.

The prompt lists `FACTS` links in random order, which together run through as many different numbers once around, then a
start and the number of hops. A line of the trace follows one link::

    prompt      "30 = 8\\n5 = 17\\n8 = 5\\n...\\n30 * 3 = ?\\n"
    completion  "30 = 8\\n8 = 5\\n5 = 17\\n#### 17"
    answer      "17"

The pretraining corpus reads the link at a number that three divides backwards with probability `MISTAKE_RATE` and goes
on from there: "8 = 5" is followed by "5 = 17", but "15 = 6" by "6 = 15" rather than by what six leads to. The writer is
sure of it; the facts in the prompt say otherwise. Backward steps never cancel, so that one makes the answer wrong.
"""

import random

from tracereward.tasks.chains import LARGEST

FACTS = 7
"""Links of a prompt: more than hops, so that an expert comes to no number twice; odd, so that no number of backward
steps, each two places behind, ends where an expert does."""
DEPTHS = (2, 6)
"""Fewest and most hops."""
MISTAKE_RATE = 0.6


def half_remembered(number: int) -> bool:
    """Whether a mistaken corpus reads the link at this number backwards."""
    return number % 3 == 0


def draw(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """One problem; its answer is the true one even where its trace is mistaken."""
    cycle = rng.sample(range(LARGEST + 1), FACTS)
    depth = rng.randint(*DEPTHS)
    links = [f"{number} = {cycle[(place + 1) % FACTS]}" for place, number in enumerate(cycle)]
    rng.shuffle(links)
    place, lines = 0, []
    for _ in range(depth):
        back = half_remembered(cycle[place]) and rng.random() < mistake_rate
        after = (place + (-1 if back else 1)) % FACTS
        lines.append(f"{cycle[place]} = {cycle[after]}")
        place = after
    return {
        "prompt": "\n".join([*links, f"{cycle[0]} * {depth} = ?\n"]),
        "completion": "\n".join([*lines, f"#### {cycle[place]}"]),
        "answer": str(cycle[depth]),
    }


def depth_of(prompt: str) -> int:
    """Number of hops that a prompt asks for."""
    return int(prompt.removesuffix(" = ?\n").rsplit(" ", 1)[1])


def first_wrong_line(prompt: str, completion: str) -> int | None:
    """Index of the first line of a trace that is not what an expert writes there; None if all of it is.

    A trace that stops early or goes on too long is wrong at the line where an expert does the other.
    """
    *facts, question, _ = prompt.split("\n")
    links = dict(fact.split(" = ") for fact in facts)
    number, lines = question.split(" ", 1)[0], []
    for _ in range(depth_of(prompt)):
        lines.append(f"{number} = {links[number]}")
        number = links[number]
    written, wanted = completion.split("\n"), [*lines, f"#### {number}"]
    pairs = enumerate(zip(written, wanted))
    wrong = next((index for index, (line, right) in pairs if line != right), None)
    return min(len(written), len(wanted)) if wrong is None and len(written) != len(wanted) else wrong
