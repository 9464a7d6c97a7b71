"""Monitoring metrics of one batch of rollouts: does the reward track correctness, and how diverse is the policy?

Pure functions on the rollouts of all processes.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from tracereward.metrics import auroc, centred, mean, pearson, point_biserial, within_prompt_auroc


@dataclass(frozen=True, kw_only=True)
class RewardedRollout:
    """A rollout with its rewards.

    Attributes:
        prompt: the prompt's text.
        ids: completion tokens.
        finished: whether it ends with the end-of-sequence token.
        rewards: shaped token rewards r_t in log-odds, one per token.
        reward: trace reward, their aggregate.
        correct: 1 or 0, nan without a gold answer.
    """

    prompt: str
    ids: Sequence[int]
    finished: bool
    rewards: Sequence[float]
    reward: float
    correct: float


def rollout_metrics(rollouts: Sequence[RewardedRollout]) -> dict[str, float]:
    """Metrics of one batch; nan where undefined.

    Always: `length` (mean tokens), `repetition`, `distinct_share`, `eos_rate`, `reward_std` (population standard
    deviation of the trace rewards), `token_noise`, `length_reward_r`, `length_reward_r_within`. If some traces have
    gold answers, over those traces: `auroc`, `within_prompt_auroc`, `point_biserial_r`, and the mean rewards
    `reward_correct` and `reward_wrong`.
    """
    prompts = [rollout.prompt for rollout in rollouts]
    completions = [tuple(rollout.ids) for rollout in rollouts]
    lengths = [len(ids) for ids in completions]
    rewards = [rollout.reward for rollout in rollouts]
    known = [rollout for rollout in rollouts if not math.isnan(rollout.correct)]
    right = [rollout for rollout in known if rollout.correct]
    noisy = right if known else rollouts
    metrics = {
        "length": mean(lengths),
        "repetition": mean([repetition(ids) for ids in completions]),
        "distinct_share": distinct_share(prompts, completions),
        "eos_rate": mean([float(rollout.finished) for rollout in rollouts]),
        "reward_std": float(np.std(rewards)) if rewards else math.nan,
        "token_noise": token_noise([rollout.rewards for rollout in noisy]),
        "length_reward_r": pearson(rewards, lengths),
        "length_reward_r_within": pearson(centred(rewards, prompts), centred(lengths, prompts)),
    }
    if known:
        scores = [rollout.reward for rollout in known]
        labels = [bool(rollout.correct) for rollout in known]
        metrics["auroc"] = auroc(scores, labels)
        metrics["within_prompt_auroc"] = within_prompt_auroc(scores, labels, [rollout.prompt for rollout in known])
        metrics["point_biserial_r"] = point_biserial(scores, labels)
        metrics["reward_correct"] = mean([rollout.reward for rollout in right])
        metrics["reward_wrong"] = mean([rollout.reward for rollout in known if not rollout.correct])
    return metrics


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of a completion's n-grams that repeat an earlier one: 1 - distinct / all; 0 for fewer than n tokens."""
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_share(prompts: Sequence[Hashable], completions: Sequence[Hashable]) -> float:
    """Mean of distinct completions / completions over prompts with at least two completions; nan if there are none.

    1: all completions of a prompt differ. 1 / G: all G are equal.
    """
    groups: dict[Hashable, list[Hashable]] = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        groups.setdefault(prompt, []).append(completion)
    return mean([len(set(group)) / len(group) for group in groups.values() if len(group) > 1])


def token_noise(rewards: Sequence[Sequence[float]]) -> float:
    """Mean over traces of the variance of the token rewards inside the trace: mean_i mean_t (r_it - mean_t r_it)^2.

    In squared log-odds. `rollout_metrics` passes the correct traces: no token of theirs should stand out, so variation
    is noise. Without gold answers it passes all traces, and the marking of errors counts as noise too. Traces without
    tokens are skipped; nan if none is left.
    """
    return mean([float(np.var(trace)) for trace in rewards if len(trace)])
