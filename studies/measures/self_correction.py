"""Study of self-correction: accuracy, fixed and broken traces of cutting at the first suspected step and resampling."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from studies.measures.decoding import ASKED, Bench, Row, load_bench, points_of
from studies.measures.equal_tokens import margin
from studies.setup.site import TASK, Site
from tracereward.generation.self_correction import lowest_steps, self_correct, threshold_of
from tracereward.rewards.first_error_rules import LevelRule
from tracereward.tasks.recipes import get_task

WAYS = (
    ("reward", "reward"),
    ("reward_logprob", "reward_logprob"),
    ("logprob", "reward_logprob"),
    ("logprob", "logprob"),
)
"""(detector, judge): the scores that suspect steps and that compare full traces. The last needs no reward model."""
ROUNDS = 3
DRAWS = (1, 2, 4)
"""Values of k, the continuations per round."""
TUNED_AT = {"rounds": 2, "k": 2}
VALIDATION = 8
"""Plain samples per validation question, for the best-of-N baseline."""
SHARES = (0.1, 0.2, 0.3, 0.5, 1.0)
"""Shares of validation traces that a threshold suspects; the last resamples full traces."""


def corrected(bench: Bench, way: tuple[str, str], threshold: float, rounds: int, *, k: int) -> list[Row]:
    """`summary` after each round of correcting the first sample of each question.

    Each round starts from the traces of the last one with a new seed, equivalent to `rounds` rounds in one call.
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
        rule = LevelRule(threshold)
        found = self_correct(seeded, asked, traces, rounds=1, k=k, rule=rule, detector=bench.guides[detector])
        traces = [correction.ids for correction in found]
        drawn = [total + correction.sampled_tokens for total, correction in zip(drawn, found, strict=True)]
        cuts = [known or bool(correction.cuts) for known, correction in zip(cuts, found, strict=True)]
        texts = guide.tokenizer.batch_decode(traces, skip_special_tokens=True)
        after = [task.verify(text, gold) for text, gold in zip(texts, bench.golds, strict=True)]
        tokens = [len(ids) + count for ids, count in zip(given, drawn, strict=True)]
        rows.append({"rounds": number + 1, "k": k, **summary(before, after, cuts, tokens)})
    return rows


def summary(before: Sequence[bool], after: Sequence[bool], suspected: Sequence[bool], tokens: Sequence[int]) -> Row:
    """Statistics of self-correction.

    Args:
        before, after: whether each trace is right.
        suspected: whether a step of it was suspected in any round.
        tokens: tokens sampled for it, including its own.

    Returns:
        accuracy; sampled_tokens, the mean; mended, the share of wrong traces that became right; broken, the share of
        right traces that became wrong; suspected_right and suspected_wrong, the shares of right and wrong traces with
        a suspected step; untouched, the share of all traces without one. A share of no traces is None.
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
    """Threshold search for one (detector, judge): all results, and the index of the best.

    The best has the largest margin over best-of-N by the same judge at equal tokens, the first if tied.
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
    """The result of a cell.

    Args:
        reward_of: maps a seed to its site and the arm of its reward model.
        seed: seed of the cell; its validation questions select the thresholds.
        part: data part with the questions.
        n: plain samples per question.

    Returns:
        questions: their number; self_correction: the threshold search, the corrections, and the plain samples (pool).
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
