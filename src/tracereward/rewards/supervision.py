"""Which tokens are supervised: the only module that implements granularities.

Training, scoring and serving call `supervision_mask` with the same arguments, so the phase of the interval, the end of
the trace and the step ends are the same everywhere (arXiv 2510.01857, section on supervision granularity).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tracereward.rewards.choices import GRANULARITIES


def supervision_mask(completion_mask: Tensor, step_ends: Tensor, granularity: str, interval: int = 15) -> Tensor:
    """Supervised positions m_t of each completion.

    sparse: the last token. step: the last token of each step, and the last token. interval: every `interval`-th token
    counted from the completion's first (1-based), and the last token. dense: every token. Padding: never.

    Args:
        completion_mask: (B, T), 1 for completion tokens; completions start in column 0 and are padded at the right.
        step_ends: (B, T), 1 for the last token of each step; read by `step` only.
        granularity: one of `GRANULARITIES`.
        interval: k of `interval`.

    Returns:
        (B, T) bool.
    """
    real = completion_mask.bool()
    position = completion_mask.long().cumsum(1)
    last = real & (position == real.sum(1, keepdim=True))
    if granularity == "sparse":
        return last
    if granularity == "step":
        return (step_ends.bool() & real) | last
    if granularity == "interval":
        return (real & (position % interval == 0)) | last
    if granularity == "dense":
        return real
    raise ValueError(f"unknown granularity {granularity!r}; known: {', '.join(GRANULARITIES)}")


def part_weights(supervised: Tensor, thinking: Tensor, weight: float) -> Tensor:
    """What each supervised position weighs where thinking and answer count separately.

    w_t = w_p / n_p for the n_p supervised positions of t's part p, with w_p = `weight` for the thinking and
    1 - `weight` for the answer; a trace with one part has weight 1 there.

    Args:
        supervised: (B, T) bool, `supervision_mask` of each part.
        thinking: (B, T) bool, tokens of the thinking.
        weight: in [0, 1].

    Returns:
        (B, T) float; each row sums to 1, or to 0 without a supervised position.
    """
    parts = (supervised & thinking, supervised & ~thinking)
    counts = [part.sum(1, keepdim=True) for part in parts]
    both = (counts[0] > 0) & (counts[1] > 0)
    shares = [torch.where(both, of_part, 1.0) for of_part in (weight, 1 - weight)]
    terms = [share * part / count.clamp(min=1) for share, part, count in zip(shares, parts, counts)]
    return terms[0] + terms[1]


def reward_shares(supervised: Tensor) -> Tensor:
    """Share of each supervised position in a trace's mean reward, where tokens have the next supervised one's value.

    The mean of the backfilled token rewards is the sum of shares times values at supervised positions: see
    `shaping.backfill`.

    Args:
        supervised: (B, T) bool, of completions that start in column 0; the last token is supervised.

    Returns:
        (B, T) float32; each row sums to 1.
    """
    position = torch.arange(1, supervised.size(1) + 1, device=supervised.device).expand_as(supervised)
    ends = torch.where(supervised, position, 0)
    before = F.pad(ends.cummax(1).values, (1, 0))[:, :-1]  # the supervised position before each one
    tokens = torch.where(supervised, position - before, 0).float()
    return tokens / tokens.sum(1, keepdim=True)
