"""Comparing methods at equal sampled tokens, where their budgets do not coincide."""

import math
from collections.abc import Sequence
from itertools import pairwise


def accuracy_at(points: Sequence[tuple[float, float]], tokens: float) -> float:
    """What a baseline reaches with a number of tokens: linear in log tokens between two of its points.

    Args:
        points: its (tokens, accuracy), one for each budget; no two with the same tokens.
        tokens: of the method that is compared.

    Returns:
        The accuracy. Under the baseline's least budget that budget counts, although it draws more: there is nothing
        less than one trace to choose from. nan above its largest, which says nothing about more.
    """
    points = sorted(points)
    if tokens <= points[0][0]:
        return points[0][1]
    for (low, before), (high, after) in pairwise(points):
        if tokens <= high:
            share = (math.log(tokens) - math.log(low)) / (math.log(high) - math.log(low))
            return before + share * (after - before)
    return math.nan


def margin(method: tuple[float, float], *baselines: Sequence[tuple[float, float]]) -> float:
    """A method's accuracy minus the best of the baselines' at its tokens.

    Args:
        method: its (tokens, accuracy).
        baselines: the points of each; see `accuracy_at`. All must reach as far, or the margin is nan.
    """
    tokens, accuracy = method
    reached = [accuracy_at(points, tokens) for points in baselines]
    return math.nan if any(map(math.isnan, reached)) else accuracy - max(reached)
