"""The rules that predict a trace's first error from its step scores. Low scores look wrong.

| rule | used by |
|---|---|
| `first_below`: the first step under a threshold | `Scorer.first_error`, `tracereward evaluate processbench` |
| `first_token_below`: the token that begins that step | `tracereward correct` |
| `first_below_others`: the first step well under the mean of the other steps | `tracereward inspect` |
| `lowest_steps`: the steps with the lowest score | Hit@1 of `tracereward evaluate`, the report's step tables |

ProcessBench (arXiv 2412.06559) judges `first_below`, whose threshold is fitted on labelled traces.
`first_below_others` needs no labels: it compares steps within a trace, because traces of different questions differ in
level. `lowest_steps` locates the error of a trace that is known to have one.
"""

from collections.abc import Sequence

ERROR_MARGIN = 0.5
"""Log-odds. In two quickstart runs it marked the first wrong line of 39 % and 32 % of the traces with one, and a line
of 26 % and 2 % of those without; a margin of 1 marks hardly any."""


def first_below(scores: Sequence[float], threshold: float) -> int | None:
    """The first step that scores strictly below the threshold; None if no step does."""
    return next((step for step, score in enumerate(scores) if score < threshold), None)


def first_token_below(scores: Sequence[float], step_ends: Sequence[bool], threshold: float) -> int | None:
    """The index of the first token of the step that `first_below` gives; None if there is none.

    Args:
        scores: of each step.
        step_ends: T flags, whether a token is the last of its step.
        threshold: see `first_below`.
    """
    step = first_below(scores, threshold)
    starts = [0, *(token + 1 for token, ends in enumerate(step_ends) if ends)]
    return None if step is None else starts[step]


def first_below_others(scores: Sequence[float], margin: float = ERROR_MARGIN) -> int | None:
    """The first step i with ``scores[i] < mean(scores[j], j != i) - margin``: a hint where to read first, not a proof.

    Args:
        scores: mean rewards of the steps, in log-odds.
        margin: in log-odds.

    Returns:
        Its index; None if no step is that low, or there are fewer than two.
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
