"""Orders of demonstrations, the most suspicious first: by rewards and log-probs of their steps."""

from collections.abc import Sequence

import numpy as np

ORDERS = ("reward", "lowest_reward", "logprob", "lowest_logprob", "sum")


def suspicion(
    order: str, rewards: Sequence[np.ndarray], log_probs: Sequence[np.ndarray], sizes: Sequence[np.ndarray]
) -> np.ndarray:
    """(N,) values of demonstrations; the lower, the more suspicious.

    - reward: mean over the steps of their rewards.
    - lowest_reward: that of the lowest step.
    - logprob: mean over the trace's tokens.
    - lowest_logprob: the lowest step's mean over its tokens.
    - sum: of lowest_reward and lowest_logprob, each in units of its standard deviation over the demonstrations.

    Args:
        order: one of `ORDERS`.
        rewards: of each demonstration, (S,) rewards of its steps.
        log_probs: likewise, (S,) mean log-probs.
        sizes: likewise, (S,) tokens.
    """
    if order == "reward":
        return np.array([values.mean() for values in rewards])
    if order == "lowest_reward":
        return np.array([values.min() for values in rewards])
    if order == "logprob":
        return np.array([np.average(values, weights=size) for values, size in zip(log_probs, sizes, strict=True)])
    if order == "lowest_logprob":
        return np.array([values.min() for values in log_probs])
    if order == "sum":
        parts = [suspicion(name, rewards, log_probs, sizes) for name in ("lowest_reward", "lowest_logprob")]
        return sum((part / (part.std() or 1.0) for part in parts), np.zeros(len(rewards)))
    raise ValueError(f"unknown order {order!r}; known: {', '.join(ORDERS)}")
