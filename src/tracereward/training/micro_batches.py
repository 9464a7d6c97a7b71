"""The policy's micro-batches, sorted by length.

TRL pads all rollouts of a generation to the longest prompt and the longest completion and splits them at random, so
that every micro-batch pays for the longest rollout. Here the rollouts of one optimiser step are sorted by length, and
columns that are only padding are removed from each micro-batch. The number of rows per micro-batch does not change, so
the loss of a step is the same sum.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

MicroBatch = dict[str, Tensor | None]

_OF_PROMPTS = {"prompt_ids", "prompt_mask"}
_OF_ROWS = {
    "completion_ids",
    "completion_mask",
    "advantages",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
    "tool_mask",
}
_KNOWN = _OF_PROMPTS | _OF_ROWS | {"num_items_in_batch"}


def may_change_places(trainer: GRPOTrainer) -> bool:
    """Whether the result does not depend on which rows share a micro-batch.

    It does for a mean over a micro-batch's tokens (loss ``bnpo``, the entropy bonus, the load-balancing loss of a
    mixture of experts), for a quantile of them, and for TRL's logged means if rows may be masked out.
    """
    means = trainer.loss_type == "bnpo" or getattr(trainer, "_entropy_bonus_enabled", False)
    balanced = getattr(trainer, "aux_loss_enabled", False)
    return not (means or balanced or trainer.top_entropy_quantile < 1 or trainer.mask_truncated_completions)


def may_shift(config: Any) -> bool:
    """Whether the model's outputs do not depend on the amount of padding before a prompt.

    TRL passes no position ids, so learned positions would change, and rotary ones that are scaled by the length.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    return bool(rope) and not any(kind in str(rope) for kind in ("dynamic", "longrope"))


def window(accumulation: int, per_generation: int) -> int:
    """Successive micro-batches of one generation in one optimiser step; 1 if steps span generations unevenly."""
    if per_generation % accumulation == 0:
        return accumulation
    return per_generation if accumulation % per_generation == 0 else 1


def by_length(
    batches: Sequence[MicroBatch], size: int, shift: bool = True, multiple: int | None = None
) -> list[MicroBatch]:
    """Sort rows by length within each group of `size` micro-batches and remove columns that are only padding.

    Args:
        batches: micro-batches of one generation as TRL splits it, with prompts padded on the left and completions on
            the right. Returned unchanged if they have fields other than those of text.
        size: number of micro-batches whose rows are sorted together; a divisor of their number.
        shift: whether padding before prompts may be removed, see `may_shift`.
        multiple: widths are multiples of it; TRL's ``pad_to_multiple_of``.
    """
    if any(name not in _KNOWN and value is not None for batch in batches for name, value in batch.items()):
        return list(batches)
    sorted_batches: list[MicroBatch] = []
    for start in range(0, len(batches), size):
        merged = _merge(batches[start : start + size])
        order = torch.argsort(_lengths(merged), stable=True)
        sorted_batches += [_trimmed(_rows(merged, part), shift, multiple or 1) for part in order.chunk(size)]
    return sorted_batches


def _merge(batches: Sequence[MicroBatch]) -> MicroBatch:
    merged: MicroBatch = dict(batches[0])
    for name, value in merged.items():
        if value is not None and value.dim():
            merged[name] = torch.cat([batch[name] for batch in batches])  # pyright: ignore[reportArgumentType]
    return merged


def _rows(batch: MicroBatch, rows: Tensor) -> MicroBatch:
    return {name: value[rows] if value is not None and value.dim() else value for name, value in batch.items()}


def _lengths(batch: MicroBatch) -> Tensor:
    """Columns from a row's first prompt token to its last unmasked completion token, (B,)."""
    prompt, completion = batch["prompt_mask"], batch["completion_mask"]
    assert prompt is not None
    assert completion is not None
    ends = torch.arange(1, completion.size(1) + 1, device=completion.device)
    return prompt.sum(1) + (completion.bool() * ends).amax(1)


def _trimmed(batch: MicroBatch, shift: bool, multiple: int) -> MicroBatch:
    prompt, completion = batch["prompt_mask"], batch["completion_mask"]
    assert prompt is not None
    assert completion is not None
    width = completion.size(1)
    first = int(prompt.any(0).int().argmax()) if shift else 0
    first -= (first - prompt.size(1)) % multiple
    # At least two columns: with one, TRL's logged means would ignore the mask.
    last = max(2, int((completion.any(0) * torch.arange(1, width + 1, device=completion.device)).max()))
    last += -last % multiple
    trimmed = dict(batch)
    for name, value in batch.items():
        if value is None:
            continue
        if name in _OF_PROMPTS:
            trimmed[name] = value[:, first:]
        elif name in _OF_ROWS and value.dim() == 2 and value.size(1) == width:
            trimmed[name] = value[:, :last]
    return trimmed
