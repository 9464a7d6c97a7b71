"""Discriminator losses: per sequence, unreduced. Label 1 is the expert; "expert is high" everywhere."""

import torch
import torch.nn.functional as F
from torch import Tensor


def bce(logits: Tensor, weights: Tensor, is_expert: Tensor, smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy of the token logits, averaged over the supervised positions of each sequence.

    loss_i = sum_t w_it * [-y_i log sigmoid(f_it) - (1 - y_i) log(1 - sigmoid(f_it))] / sum_t w_it with y_i = 1 - s for
    the expert and s for the policy. Each sequence weighs the same whatever its length.

    Args:
        logits: (B, T) log-odds f_t.
        weights: (B, T) non-negative; the supervision mask, possibly times `after_first_difference`.
        is_expert: (B,) bool.
        smoothing: s in [0, 0.5).

    Returns:
        (B,); 0 where a sequence has no supervised position.
    """
    target = torch.where(is_expert, 1 - smoothing, smoothing).to(logits.dtype)
    # Padding may hold anything, also nan from a fully masked attention row. It is replaced before the loss, not after:
    # behind a `where` its gradient would be 0 * nan.
    logits = torch.where(weights > 0, logits, torch.zeros_like(logits))
    loss = F.binary_cross_entropy_with_logits(logits, target[:, None].expand_as(logits), reduction="none")
    return (loss * weights).sum(1) / weights.sum(1).clamp(min=torch.finfo(logits.dtype).tiny)


def class_weights(is_expert: Tensor, counts: Tensor) -> Tensor:
    """Sequence weights with which `(weights * loss).sum()` is the mean of the two classes' means.

    Args:
        is_expert: (B,) bool.
        counts: (B,) bool, the sequences that count; those with no supervised position do not.

    Returns:
        (B,) float: 1 / (classes present * members of the class), 0 where a sequence does not count.
    """
    experts, policy = is_expert & counts, ~is_expert & counts
    classes = int(experts.any()) + int(policy.any())
    weights = torch.zeros(is_expert.shape, device=is_expert.device)
    for members in (experts, policy):
        if members.any():
            weights[members] = 1 / (classes * members.sum())
    return weights
