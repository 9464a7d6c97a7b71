"""From token logits to rewards and advantages. Masks are (B, T), completions start in column 0."""

import torch
from torch import Tensor

from tracereward.errors import check_choice

AGGREGATES = ("mean", "min")


def log_odds(probability: Tensor) -> Tensor:
    """v = log D - log(1 - D), the implicit reward of a discriminator with expert probability D.

    It is the logit: with D = sigmoid(f), v = f (arXiv 2510.01857). Use f if you have it: near 1, rounding of
    D loses most of its digits.

    Args:
        probability: D in [0, 1], any shape.

    Returns:
        The same shape; -inf at 0 and inf at 1.
    """
    return probability.log() - torch.log1p(-probability)


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


def token_rewards(logits: Tensor, supervised: Tensor, beta_clip: float, temperature: float = 1.0) -> Tensor:
    """r_t = clip(v_{t'} / temperature, -beta, beta), backfilled (arXiv 2510.01857: v = `log_odds` of D, the logit).

    Args:
        logits: (B, T).
        supervised: (B, T) bool.
        beta_clip: beta.
        temperature: positive; above 1 it brings logits that the clip would level back into its range.

    Returns:
        (B, T), 0 on padding.
    """
    return backfill((logits / temperature).clamp(-beta_clip, beta_clip), supervised)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the positions where `mask` is not 0, (B, T) -> (B,)."""
    return torch.where(mask.bool(), values, torch.zeros_like(values)).sum(1) / mask.sum(1)


def masked_min(values: Tensor, mask: Tensor) -> Tensor:
    """Minimum over the positions where `mask` is not 0, (B, T) -> (B,)."""
    return values.masked_fill(~mask.bool(), torch.inf).amin(1)


def aggregate(rewards: Tensor, mask: Tensor, how: str = "mean") -> Tensor:
    """Trace rewards: the `mean` or `min` of the token rewards; never a sum, which would reward length.

    Args:
        rewards: (B, T).
        mask: (B, T), 1 for completion tokens.
        how: one of `AGGREGATES`.

    Returns:
        (B,); NaN for rows without a token.

    Raises:
        InputError: `how` is not one of `AGGREGATES`.
    """
    check_choice("reward_aggregate", how, AGGREGATES)
    values = masked_mean(rewards, mask) if how == "mean" else masked_min(rewards, mask)
    return torch.where(mask.bool().any(1), values, torch.nan)
