"""Self-correction: cut a trace before its first suspected step, resample the rest, keep the higher reward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tracereward.generation.decoding import best
from tracereward.generation.guide import Guide, digest
from tracereward.rewards.first_error_rules import MarksSteps
from tracereward.rewards.token_scores import TokenScores


@dataclass(frozen=True, kw_only=True)
class Correction:
    """A trace after self-correction.

    Attributes:
        ids: its tokens.
        finished: whether it has an end of sequence.
        reward: its reward, at least `reward_before`.
        reward_before: reward of the original trace.
        cuts: for each round that sampled, the number of tokens kept before the suspected step.
        sampled_tokens: all tokens sampled for it, kept or not.
    """

    ids: list[int]
    finished: bool
    reward: float
    reward_before: float
    cuts: list[int]
    sampled_tokens: int


def self_correct(
    guide: Guide,
    prompts: Sequence[Sequence[int]],
    traces: Sequence[Sequence[int]],
    *,
    rounds: int = 3,
    k: int = 4,
    rule: MarksSteps,
    detector: Guide | None = None,
) -> list[Correction]:
    """Correct traces for up to `rounds` rounds.

    Each round cuts the trace before the step that `rule` suspects and samples `k` continuations. The one with the
    highest reward replaces the trace if its reward is higher; otherwise the next round samples again from the same cut.
    A trace is unchanged if no step of it is suspected, or if the cut is at the length limit.

    Args:
        guide: policy and reward model.
        prompts: token ids.
        traces: token ids of as many traces, with the end-of-sequence token if they ended.
        rounds: maximum number of rounds.
        k: continuations per round.
        rule: marks the suspected first error.
        detector: its token rewards decide where to cut, instead of the guide's; it does not sample.

    Returns:
        One correction per trace.
    """
    how = guide.scorer.settings.aggregate
    current = [list(trace) for trace in traces]
    scores = guide.score(prompts, current)
    before = [found.aggregate(how) for found in scores]
    rewards, sampled = list(before), [0] * len(current)
    cuts: list[list[int]] = [[] for _ in current]

    def suspected(owners: Sequence[int], scores: Sequence[TokenScores]) -> list[int | None]:
        """Where to cut the current trace of each owner; `scores` are the guide's."""
        if detector is not None:
            scores = detector.score([prompts[row] for row in owners], [current[row] for row in owners])
        marks = [(trace.by_step(), rule.mark(trace.by_step())) for trace in scores]
        return [None if step is None else sum(map(len, steps[:step])) for steps, step in marks]

    places = suspected(range(len(current)), scores)
    for number in range(rounds):
        rows = [row for row, place in enumerate(places) if place is not None and place < guide.sampling.max_new_tokens]
        if not rows:
            break
        owners = [row for row in rows for _ in range(k)]
        starts = [current[row][: places[row]] for row in owners]
        streams = [f"{digest(traces[row])} {number} {i}" for row in rows for i in range(k)]
        row_prompts = [prompts[row] for row in owners]
        grown, counts = guide.grow(row_prompts, starts, streams, by_step=False)
        found = guide.score(row_prompts, grown)
        values = [trace.aggregate(how) for trace in found]
        better: dict[int, TokenScores] = {}
        for index, row in enumerate(rows):
            mine = range(index * k, index * k + k)
            sampled[row] += sum(counts[i] for i in mine)
            cuts[row].append(len(starts[index * k]))
            top = best(values, mine, 1)[0]
            if values[top] > rewards[row]:
                current[row], rewards[row] = grown[top], values[top]
                better[row] = found[top]
        for row, place in zip(better, suspected(list(better), list(better.values())), strict=True):
            places[row] = place
    return [
        Correction(
            ids=ids,
            finished=guide.finished(ids),
            reward=rewards[row],
            reward_before=before[row],
            cuts=cuts[row],
            sampled_tokens=sampled[row],
        )
        for row, ids in enumerate(current)
    ]


def lowest_steps(detector: Guide, prompts: Sequence[Sequence[int]], traces: Sequence[Sequence[int]]) -> list[float]:
    """The mean reward of each trace's lowest step."""
    return [min(scores.step_rewards()) for scores in detector.score(prompts, traces)]


def threshold_of(lowest: Sequence[float], share: float) -> float:
    """The threshold that suspects a step in this share of traces; infinity for all of them.

    Args:
        lowest: see `lowest_steps`.
        share: from 0 to 1.
    """
    count = round(share * len(lowest))
    return math.inf if count >= len(lowest) else sorted(lowest)[count]
