"""Thinking and answer of a trace, by the settings of a reward model: tokens, weights of positions, and the task."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tracereward.rewards.settings import RewardSettings
from tracereward.rewards.supervision import part_weights, reward_shares, supervision_mask
from tracereward.tasks.recipes import Task, get_task
from tracereward.thinking import MARKS, Thinking


def task_of(settings: RewardSettings, name: str | None = None) -> Task:
    """A task, the reward model's unless named, that reads answers behind the thinking of its traces.

    Raises:
        InputError: there is no such task.
    """
    return get_task(name or settings.task).behind(settings.thinking)


def stored(thinking: Thinking) -> dict[str, Any]:
    """The fields of `RewardSettings` that keep how completions are split."""
    return {"think": () if thinking.marks == MARKS else thinking.marks[0], "think_opened": thinking.opened}


def thinking_tokens(settings: RewardSettings, text: str, offsets: Sequence[tuple[int, int]]) -> int:
    """Number of leading tokens that are thinking, the marks included; a token that spans the cut is one.

    Args:
        settings: how completions are split.
        text: the completion.
        offsets: T character spans of its tokens.
    """
    start = settings.thinking.answer_start(text)
    if start is None:
        return len(offsets)
    return sum(first < start for first, _ in offsets)


def position_weights(settings: RewardSettings, completion_mask: Tensor, step_ends: Tensor, thinking: Tensor) -> Tensor:
    """What each position weighs in a mean over supervised positions; 0 where none is supervised.

    Args:
        settings: granularity, and what the thinking weighs.
        completion_mask: (B, T).
        step_ends: (B, T) bool.
        thinking: (B, T) bool, tokens of the thinking; all false unless it counts separately.

    Returns:
        (B, T) float: 1 at supervised positions, or `supervision.part_weights`.
    """
    granularity, interval, weight = settings.granularity, settings.interval, settings.thinking_weight
    if weight is None:
        return supervision_mask(completion_mask, step_ends, granularity, interval).float()
    return part_weights(_of_parts(settings, completion_mask, step_ends, thinking), thinking, weight)


def token_shares(settings: RewardSettings, completion_mask: Tensor, step_ends: Tensor, thinking: Tensor) -> Tensor:
    """Share of each supervised position in the trace reward ``mean``; arguments as of `position_weights`.

    Returns:
        (B, T) float; each row sums to 1.
    """
    if settings.thinking_weight is None:
        mask = supervision_mask(completion_mask, step_ends, settings.granularity, settings.interval)
        return reward_shares(mask)
    shares = reward_shares(_of_parts(settings, completion_mask, step_ends, thinking))
    within = (
        torch.where(thinking, shares, 0).sum(1, keepdim=True),
        torch.where(thinking, 0, shares).sum(1, keepdim=True),
    )
    both = (within[0] > 0) & (within[1] > 0)
    weights = [torch.where(both, of, 1.0) for of in (settings.thinking_weight, 1 - settings.thinking_weight)]
    tiny = torch.finfo(shares.dtype).tiny
    scale = [weight / total.clamp(min=tiny) for weight, total in zip(weights, within)]
    return shares * torch.where(thinking, *scale)


def _of_parts(settings: RewardSettings, completion_mask: Tensor, step_ends: Tensor, thinking: Tensor) -> Tensor:
    """Supervised positions of both parts, each as if it were a trace: the last token of each is one."""
    real = completion_mask.bool()
    masks = [
        supervision_mask(real & part, step_ends, settings.granularity, settings.interval)
        for part in (thinking, ~thinking)
    ]
    return masks[0] | masks[1]
