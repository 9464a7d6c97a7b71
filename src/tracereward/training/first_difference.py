"""Token weights and labels that depend on where a trace leaves the expert's."""

from collections.abc import Sequence

import torch
from torch import Tensor


def first_difference(completion: Sequence[int], expert: Sequence[int]) -> int:
    """Index of the first token in which a trace differs from an expert trace of its prompt.

    The shorter length where one is a prefix of the other; the common length where they are equal.
    """
    for index, (a, b) in enumerate(zip(completion, expert)):
        if a != b:
            return index
    return min(len(completion), len(expert))


def after_first_difference(lengths: Sequence[int], starts: Sequence[Sequence[int]], width: int) -> Tensor:
    """Weights that exclude the initial tokens that a rollout shares with the expert trace, which are uninformative.

    A rollout has one start: its weight is 0 before it and 1 from there on. An expert trace has the starts of the
    rollouts it is compared with, and its weight at t is the share of them that have diverged by t.

    Args:
        lengths: B completion lengths.
        starts: for each of the B completions, the first differences that apply to it.
        width: T.

    Returns:
        (B, T) float in [0, 1], 0 on padding.
    """
    weights = torch.zeros(len(lengths), width)
    for row, (length, row_starts) in enumerate(zip(lengths, starts, strict=True)):
        for start in row_starts:
            weights[row, start:length] += 1 / len(row_starts)
    return weights


def labels_from(first_change: Sequence[int], width: int) -> Tensor:
    """Token labels: 1, the expert's, before the first changed token, and 0, the policy's, from it on.

    With `step`, `interval` and `dense` supervision the tokens before a perturbation are still the expert's.

    Args:
        first_change: for each of B traces its first changed token: 0 for a rollout, its length or more for an expert.
        width: T.

    Returns:
        (B, T) float.
    """
    starts = torch.tensor(first_change, dtype=torch.long)
    return (torch.arange(width) < starts[:, None]).float()
