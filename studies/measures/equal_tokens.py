"""Comparison of methods at equal sampled tokens, with interpolation between budgets."""

import math
from collections.abc import Sequence
from itertools import pairwise


def accuracy_at(points: Sequence[tuple[float, float]], tokens: float) -> float:
    """A baseline's accuracy at a number of tokens, interpolated linearly in log tokens.

    Args:
        points: (tokens, accuracy) of each of its budgets, with distinct tokens.
        tokens: tokens of the compared method.

    Returns:
        The accuracy. Below the smallest budget that budget's, although it samples more: there is no budget below one
        trace. nan above the largest budget, since nothing is extrapolated.
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
    """A method's accuracy minus that of the best baseline at equal tokens.

    Args:
        method: (tokens, accuracy).
        baselines: points of each, see `accuracy_at`; the margin is nan if one does not reach the method's tokens.
    """
    tokens, accuracy = method
    reached = [accuracy_at(points, tokens) for points in baselines]
    return math.nan if any(map(math.isnan, reached)) else accuracy - max(reached)
