"""From token logits to rewards and advantages. Masks are (B, T), completions start in column 0."""

import torch
from torch import Tensor

EPSILON = 1e-4  # TRL's, so that both kinds of advantages divide alike


def backfill(values: Tensor, supervised: Tensor) -> Tensor:
    """r_t = v_{t'}, t' = min{k >= t : m_k = 1}: a token has the value of the next supervised position.

    Args:
        values: (B, T).
        supervised: (B, T) bool.

    Returns:
        (B, T); 0 where no supervised position follows (padding).
    """
    width = values.size(1)
    position = torch.arange(width, device=values.device).expand_as(values)
    following = torch.where(supervised, position, width).flip(1).cummin(1).values.flip(1)
    filled = values.gather(1, following.clamp(max=width - 1))
    return torch.where(following < width, filled, torch.zeros_like(filled))


def token_rewards(logits: Tensor, supervised: Tensor, beta_clip: float) -> Tensor:
    """r_t = clip(v_{t'}, -beta, beta), backfilled (arXiv 2510.01857: v = log D - log(1 - D), which is the logit)."""
    return backfill(logits.clamp(-beta_clip, beta_clip), supervised)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the positions where `mask` is not 0, (B, T) -> (B,)."""
    return torch.where(mask.bool(), values, torch.zeros_like(values)).sum(1) / mask.sum(1)


def masked_min(values: Tensor, mask: Tensor) -> Tensor:
    """Minimum over the positions where `mask` is not 0, (B, T) -> (B,)."""
    return values.masked_fill(~mask.bool(), torch.inf).amin(1)


def discounted_return_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma * G_{t+1} over real tokens, by a reverse scan.

    The scan needs no division by gamma^t, which overflows float32 near t = 800 for gamma = 0.9.

    Args:
        rewards: (B, T).
        mask: (B, T), 1 for completion tokens.
        gamma: discount in [0, 1].

    Returns:
        (B, T), 0 on padding.
    """
    rewards = torch.where(mask.bool(), rewards, torch.zeros_like(rewards))
    returns = torch.empty_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.size(1) - 1, -1, -1):
        running = rewards[:, t] + gamma * running
        returns[:, t] = running
    return torch.where(mask.bool(), returns, torch.zeros_like(returns))


def group_moments(rewards: Tensor, mask: Tensor) -> Tensor:
    """Per-sequence sums for group statistics over real tokens: count, sum, sum of squares. (B, T) -> (B, 3), float64.

    Sums can be gathered across processes, unlike (B, T) tensors of unequal T. They are float64 because the variance is
    their difference.
    """
    rewards = torch.where(mask.bool(), rewards, torch.zeros_like(rewards)).double()
    return torch.stack([mask.sum(1).double(), rewards.sum(1), rewards.square().sum(1)], 1)


def token_advantages(rewards: Tensor, mask: Tensor, mean: Tensor, std: Tensor, gamma: float) -> Tensor:
    """Return-to-go of group-standardised token rewards: A_t = sum_{k >= t} gamma^(k-t) (r_k - mean) / (std + eps).

    Args:
        rewards: (B, T).
        mask: (B, T), 1 for completion tokens.
        mean: (B,) mean reward of the sequence's prompt group over real tokens.
        std: (B,) its standard deviation.
        gamma: discount in [0, 1].

    Returns:
        (B, T), 0 on padding.
    """
    standardised = (rewards - mean[:, None]) / (std[:, None] + EPSILON)
    return discounted_return_to_go(standardised, mask, gamma)


def moments_to_statistics(moments: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Mean and (population) standard deviation of each sequence's group from `group_moments`, rows in group order.

    Args:
        moments: (B, 3).
        group_size: G; rows i*G ... i*G + G - 1 are one prompt's.

    Returns:
        Two (B,) float32 tensors.
    """
    count, total, squares = moments.view(-1, group_size, 3).sum(1).unbind(1)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean.float().repeat_interleave(group_size), std.float().repeat_interleave(group_size)
