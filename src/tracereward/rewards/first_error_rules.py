"""Rules that predict a trace's first error from its step scores; a low score suggests an error.

| rule | used by |
|---|---|
| `first_below`: the first step below a threshold | `Scorer.first_error`, `tracereward evaluate processbench` |
| `first_token_below`: the first token of that step | `tracereward correct` |
| `first_below_others`: the first step well below the mean of the other steps | `tracereward inspect` |
| `lowest_steps`: the steps with the lowest score | Hit@1 of `tracereward evaluate`, the report's step tables |

ProcessBench (arXiv 2412.06559) evaluates `first_below`, with a threshold fitted on labelled traces.
`first_below_others` needs no labels: it compares steps within a trace, because the reward level differs between
questions. `lowest_steps` locates the error in a trace that is known to have one.
"""

from collections.abc import Sequence

ERROR_MARGIN = 0.5
"""Log-odds. In two quickstart runs it marked the first wrong line in 39 % and 32 % of the erroneous traces, and some
line in 26 % and 2 % of the correct ones; a margin of 1 marks hardly any."""


def first_below(scores: Sequence[float], threshold: float) -> int | None:
    """The first step that scores strictly below the threshold; None if no step does."""
    return next((step for step, score in enumerate(scores) if score < threshold), None)


def first_token_below(scores: Sequence[float], step_ends: Sequence[bool], threshold: float) -> int | None:
    """The index of the first token of the step that `first_below` returns; None if it returns None.

    Args:
        scores: one for each step.
        step_ends: T flags, whether a token is the last of its step.
        threshold: see `first_below`.
    """
    step = first_below(scores, threshold)
    starts = [0, *(token + 1 for token, ends in enumerate(step_ends) if ends)]
    return None if step is None else starts[step]


def first_below_others(scores: Sequence[float], margin: float = ERROR_MARGIN) -> int | None:
    """The first step i with ``scores[i] < mean(scores[j], j != i) - margin``: a hint, not a proof.

    Args:
        scores: mean rewards of the steps, in log-odds.
        margin: in log-odds.

    Returns:
        The step's index; None if no step is that low, or there are fewer than two steps.
    """
    others = len(scores) - 1
    total = sum(scores)
    for step, score in enumerate(scores):
        if others and score < (total - score) / others - margin:
            return step
    return None


def lowest_steps(scores: Sequence[float]) -> list[int]:
    """All steps that have the lowest score, in order."""
    lowest = min(scores)
    return [step for step, score in enumerate(scores) if score == lowest]
