"""What is watched at each training step: does the reward still mean correctness, and how does the policy write?

Pure functions on one batch of rollouts, of all processes together.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from tracereward.metrics import auroc, centred, mean, pearson, point_biserial, within_prompt_auroc


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One completion of the policy and its rewards.

    Attributes:
        prompt: the prompt, as text.
        ids: completion tokens.
        finished: whether it ended by itself, with the end-of-sequence token.
        rewards: shaped token rewards r_t in log-odds, one a token.
        reward: trace reward, their aggregate.
        correct: 1 or 0, nan if not known.
    """

    prompt: str
    ids: Sequence[int]
    finished: bool
    rewards: Sequence[float]
    reward: float
    correct: float


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The monitors of one batch; nan where one is not defined.

    Always: `length` (mean tokens), `repetition`, `distinct_share`, `eos_rate`, `reward_std` (of the trace rewards over
    the whole batch, population), `token_noise`, `length_reward_r`, `length_reward_r_within`. If correctness is known of
    some: `auroc`, `within_prompt_auroc`, `point_biserial_r`, and the mean rewards `reward_correct` and `reward_wrong`,
    all over the traces of which it is known.
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
    """Mean over prompts with at least two completions of distinct completions / completions; nan if there is none.

    1: no two completions of a prompt are equal. 1 / G: all G of a group are.
    """
    groups: dict[Hashable, list[Hashable]] = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        groups.setdefault(prompt, []).append(completion)
    return mean([len(set(group)) / len(group) for group in groups.values() if len(group) > 1])


def token_noise(rewards: Sequence[Sequence[float]]) -> float:
    """Mean over traces of the variance of the token rewards inside the trace: mean_i mean_t (r_it - mean_t r_it)^2.

    In squared log-odds. `rollout_metrics` takes the correct traces: in these no token should stand out, so what varies
    is noise. Where correctness is known of none, it takes all traces, and errors that are marked count too. Traces
    without a token are left out; nan if none is left.
    """
    return mean([float(np.var(trace)) for trace in rewards if len(trace)])
