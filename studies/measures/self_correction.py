"""Study of self-correction: what cutting before the first suspected step and drawing on reaches, mends and breaks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from studies.measures.decoding import ASKED, Bench, Row, load_bench, points_of
from studies.measures.equal_tokens import margin
from studies.setup.site import TASK, Site
from tracereward.generation.self_correction import lowest_steps, self_correct, threshold_of
from tracereward.tasks.recipes import get_task

WAYS = (
    ("reward", "reward"),
    ("reward_logprob", "reward_logprob"),
    ("logprob", "reward_logprob"),
    ("logprob", "logprob"),
)
"""What suspects a step, and what judges whole traces; the last needs no reward model."""
ROUNDS = 3
DRAWS = (1, 2, 4)
"""k, continuations of each round."""
TUNED_AT = {"rounds": 2, "k": 2}
VALIDATION = 8
"""Plain samples of a validation question, for the best-of-N to compare with."""
SHARES = (0.1, 0.2, 0.3, 0.5, 1.0)
"""Of validation traces that a threshold lets suspect; with the last a trace is drawn anew from its beginning."""


def corrected(bench: Bench, way: tuple[str, str], threshold: float, rounds: int, k: int) -> list[Row]:
    """`summary` after each round of correcting each question's first sample.

    A round goes on from what the one before left, with random numbers of its own: what `rounds` at once would do.
    """
    detector, judge = way
    task, guide = get_task(TASK), bench.guides[judge]
    asked, given = guide.encode(bench.prompts), [drawn[0] for drawn in bench.samples]
    before = [bool(pool[0].correct) for pool in bench.pool]
    traces, rows = given, []
    drawn, cuts = [0] * len(given), [False] * len(given)
    for number in range(rounds):
        sampling = replace(guide.sampling, seed=guide.sampling.seed + 1000 * number)
        seeded = replace(guide, sampling=sampling)
        found = self_correct(seeded, asked, traces, rounds=1, k=k, threshold=threshold, detector=bench.guides[detector])
        traces = [correction.ids for correction in found]
        drawn = [total + correction.sampled_tokens for total, correction in zip(drawn, found, strict=True)]
        cuts = [known or bool(correction.cuts) for known, correction in zip(cuts, found, strict=True)]
        texts = guide.tokenizer.batch_decode(traces, skip_special_tokens=True)
        after = [task.verify(text, gold) for text, gold in zip(texts, bench.golds, strict=True)]
        tokens = [len(ids) + count for ids, count in zip(given, drawn, strict=True)]
        rows.append({"rounds": number + 1, "k": k, **summary(before, after, cuts, tokens)})
    return rows


def summary(before: Sequence[bool], after: Sequence[bool], suspected: Sequence[bool], tokens: Sequence[int]) -> Row:
    """What self-correction did.

    Args:
        before, after: whether each trace is right.
        suspected: whether a step of it ever was.
        tokens: drawn for it, its own among them.

    Returns:
        accuracy; sampled_tokens, the mean; mended, of wrong traces the share that is right now; broken, of right ones
        the share that is wrong now; suspected_right and suspected_wrong, the shares in which a step was suspected;
        untouched, of all traces the share in which none was. A share of nothing is None.
    """

    def share(hits: Sequence[bool], among: Sequence[bool]) -> float | None:
        chosen = [hit for hit, belongs in zip(hits, among, strict=True) if belongs]
        return sum(chosen) / len(chosen) if chosen else None

    wrong = [not right for right in before]
    return {
        "accuracy": sum(after) / len(after),
        "sampled_tokens": sum(tokens) / len(tokens),
        "mended": share(after, wrong),
        "broken": share([not right for right in after], before),
        "suspected_right": share(suspected, before),
        "suspected_wrong": share(suspected, wrong),
        "untouched": 1 - sum(suspected) / len(suspected),
    }


def tune(bench: Bench, way: tuple[str, str]) -> Row:
    """Of the thresholds tried for one way, what they reach, and the place of the best.

    The best is farthest above best-of-N by the same judge at the same tokens, the first of equals.
    """
    detector, judge = way
    firsts = [drawn[0] for drawn in bench.samples]
    guide = bench.guides[detector]
    lowest = lowest_steps(guide, guide.encode(bench.prompts), firsts)
    plain, tried = points_of(bench.pool_rows(), judge), []
    for share in SHARES:
        threshold = threshold_of(lowest, share)
        row = corrected(bench, way, threshold, **TUNED_AT)[-1]
        gain = margin((row["sampled_tokens"], row["accuracy"]), plain)
        # JSON has no infinity.
        tried.append({"share": share, "threshold": None if share == 1 else threshold, **row, "margin": gain})
    return {"tried": tried, "chosen": max(range(len(tried)), key=lambda index: tried[index]["margin"])}


def measure(reward_of: Callable[[int], tuple[Site, str]], seed: int, part: str, n: int) -> dict[str, Any]:
    """A cell's result.

    Args:
        reward_of: for a seed its site, and the arm whose reward model suspects and judges.
        seed: of the cell; its validation questions choose each way's threshold.
        part: whose questions are asked.
        n: plain samples of each question.

    Returns:
        questions, their number; self_correction: the tuning, rows of each way, and those of plain samples.
    """
    site, arm = reward_of(seed)
    known = load_bench(site, arm, "validation", VALIDATION, asked=ASKED)
    bench = load_bench(site, arm, part, n)
    tuning, rows = [], []
    for way in WAYS:
        tried = tune(known, way)
        names = {"detector": way[0], "judge": way[1]}
        tuning.append({**names, **tried})
        threshold = tried["tried"][tried["chosen"]]["threshold"]
        threshold = math.inf if threshold is None else threshold
        for k in DRAWS:
            rows += [{**names, **row} for row in corrected(bench, way, threshold, rounds=ROUNDS, k=k)]
    return {
        "questions": len(bench.prompts),
        "self_correction": {"tuning": tuning, "rows": rows, "pool": bench.pool_rows()},
    }
