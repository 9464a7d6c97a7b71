"""Token advantages from rewards: return-to-go, group and batch statistics, whitening."""

import torch
from torch import Tensor

EPSILON = 1e-4  # TRL's, so that both kinds of advantages divide alike


def discounted_return_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma * G_{t+1} over real tokens, by a reverse scan.

    The scan needs no division by gamma^t, which overflows float32 near t = 800 for gamma = 0.9. It doubles: when G_t
    holds the next n terms, G_t + gamma^n G_{t+n} holds the next 2n. That takes log2(T) steps instead of T, and rounds
    less.

    Args:
        rewards: (B, T).
        mask: (B, T), 1 for completion tokens.
        gamma: discount in [0, 1].

    Returns:
        (B, T), 0 on padding.
    """
    returns = torch.where(mask.bool(), rewards, torch.zeros_like(rewards))
    terms = 1
    while terms < rewards.size(1):
        longer = returns[:, :-terms] + gamma**terms * returns[:, terms:]
        returns = torch.cat([longer, returns[:, -terms:]], 1)
        terms *= 2
    return torch.where(mask.bool(), returns, torch.zeros_like(returns))


def group_moments(rewards: Tensor, mask: Tensor) -> Tensor:
    """Per-sequence sums for group statistics over real tokens: count, sum, sum of squares. (B, T) -> (B, 3), float64.

    Sums can be gathered across processes, unlike (B, T) tensors of unequal T. They are float64 because the variance is
    their difference.
    """
    rewards = torch.where(mask.bool(), rewards, torch.zeros_like(rewards)).double()
    return torch.stack([mask.sum(1).double(), rewards.sum(1), rewards.square().sum(1)], 1)


def token_advantages(rewards: Tensor, mask: Tensor, mean: Tensor, std: Tensor, *, gamma: float) -> Tensor:
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
        Two (B,) float32 tensors; 0 and 0 for a group without tokens.
    """
    sums = moments.view(-1, group_size, 3).sum(1, keepdim=True)
    mean, std = (values.expand(-1, group_size) for values in _mean_and_std(sums))
    return mean.flatten().float(), std.flatten().float()


def batch_statistics(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (population) standard deviation over all real tokens, for `whiten`.

    Args:
        moments: (B, 3) `group_moments` of the batch, gathered from all processes.

    Returns:
        Two float32 scalars; 0 and 0 without tokens.
    """
    mean, std = _mean_and_std(moments.sum(0))
    return mean.float(), std.float()


def _mean_and_std(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Of (..., 3) sums, in float64; 0 and 0 where the count is 0."""
    count, total, squares = sums.unbind(-1)
    count = count.clamp(min=1)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


def whiten(rewards: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(r - mean) / (std + EPSILON): token rewards of mean 0 and deviation 1 over the batch.

    Every advantage is centred on its group. One that is also divided by a standard deviation, the group's or the
    batch's, does not notice an affine map of the rewards: whitening then only changes the weight of EPSILON. It matters
    with scale `none`, where it keeps the advantages' size while the discriminator's logits grow.

    Args:
        rewards: any shape.
        mean: scalar, from `batch_statistics`.
        std: scalar, likewise.
    """
    return (rewards - mean) / (std + EPSILON)
