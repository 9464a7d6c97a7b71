"""What is watched at each training step: does the reward still mean correctness?"""

import math
from collections.abc import Sequence

from tracereward.metrics import auroc, point_biserial, within_prompt_auroc


def reward_monitor(rollouts: Sequence[tuple[str, int, float, float]]) -> dict[str, float]:
    """Agreement of trace rewards with correctness and with length.

    Args:
        rollouts: (prompt, completion tokens, trace reward, 1 or 0 for correct, nan for unknown) of one batch.

    Returns:
        `within_prompt_auroc`, `auroc`, `point_biserial_r` (if answers are known) and `length_reward_r`; nan where
        undefined, e.g. when all traces are right.
    """
    prompts, lengths, rewards, correct = zip(*rollouts, strict=True)
    monitor = {"length_reward_r": _pearson(rewards, lengths)}
    known = [index for index, value in enumerate(correct) if not math.isnan(value)]
    if known:
        scores = [rewards[index] for index in known]
        labels = [bool(correct[index]) for index in known]
        monitor["auroc"] = auroc(scores, labels)
        monitor["within_prompt_auroc"] = within_prompt_auroc(scores, labels, [prompts[index] for index in known])
        monitor["point_biserial_r"] = point_biserial(scores, labels)
    return monitor


def _pearson(a: Sequence[float], b: Sequence[float]) -> float:
    import numpy as np

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])
