"""Orders of demonstrations, the most suspicious first: by rewards and log-probs of their steps."""

import numpy as np

from tracereward.errors import check_choice
from tracereward.training.step_scores import StepScores

ORDERS = ("contrast", "reward", "lowest_reward", "logprob", "lowest_logprob", "sum")
DEFAULT_ORDER = "lowest_reward"
"""Behind the checks of the text it finds most planted errors in real traces, see the study `audit`."""


def suspicion(order: str, scores: StepScores) -> np.ndarray:
    """(N,) values of demonstrations; the lower, the more suspicious.

    - contrast: mean over a demonstration's wrong copies of the reward of its step minus that of the changed step at its
      place. A right trace loses much by a change, a wrong one little. One without a copy has the highest value.
    - reward: mean over the steps of their rewards.
    - lowest_reward: that of the lowest step.
    - logprob: mean over the trace's tokens.
    - lowest_logprob: the lowest step's mean over its tokens.
    - sum: of contrast and lowest_logprob, each in units of its standard deviation over the demonstrations.

    Args:
        order: one of `ORDERS`.
        scores: of the demonstrations' steps.

    Raises:
        InputError: another order.
    """
    check_choice("order", order, ORDERS)
    if order == "contrast":
        known = [values.mean() for values in scores.contrasts if len(values)]
        return np.array([values.mean() if len(values) else max(known) for values in scores.contrasts])
    if order == "reward":
        return np.array([values.mean() for values in scores.rewards])
    if order == "lowest_reward":
        return np.array([values.min() for values in scores.rewards])
    if order == "logprob":
        pairs = zip(scores.log_probs, scores.sizes, strict=True)
        return np.array([np.average(values, weights=sizes) for values, sizes in pairs])
    if order == "lowest_logprob":
        return np.array([values.min() for values in scores.log_probs])
    parts = [suspicion(name, scores) for name in ("contrast", "lowest_logprob")]
    return sum((part / (part.std() or 1.0) for part in parts), np.zeros(len(scores.rewards)))
