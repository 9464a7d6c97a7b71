"""Token ids to padded batches, and what a causal LM says about the completions in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Prompts padded at the left, completions at the right, so that completions share their first column.

    Attributes:
        input_ids: (B, P + T).
        attention_mask: (B, P + T).
        completion_mask: (B, T).
        step_ends: (B, T) bool.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    step_ends: Tensor

    @property
    def position_ids(self) -> Tensor:
        """Positions counted from the first real token, so that left padding changes nothing. (B, P + T)."""
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    ends: Sequence[Sequence[bool]] | None = None,
) -> Batch:
    """Pad token ids to a `Batch`; `ends` are the step ends of each completion, if they are needed."""
    rows, prompt_width = len(prompts), max(map(len, prompts))
    width = max(map(len, completions))
    input_ids = torch.full((rows, prompt_width + width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    steps = torch.zeros(rows, width, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        span = slice(prompt_width - len(prompt), prompt_width + len(completion))
        input_ids[row, span] = torch.tensor([*prompt, *completion])
        attention_mask[row, span] = 1
        if ends is not None:
            steps[row, : len(completion)] = torch.tensor(ends[row])
    return Batch(input_ids, attention_mask, attention_mask[:, prompt_width:], steps)


def token_budget_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of sequences of similar length, longest first, with at most `budget` padded tokens a batch.

    A sequence that is longer than the budget is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        size = max(1, budget // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def completion_log_probs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs of the completion tokens under a causal LM, and the final hidden states after each of them.

    The hidden state is what enters the LM head, whatever the architecture calls its parts; asking the model for
    hidden states would keep every layer's.

    Returns:
        log p(y_t | x, y_<t), (B, T) float32, and h_t, (B, T, H).
    """
    width = batch.completion_mask.size(1)
    captured: list[Tensor] = []
    lm_head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    handle = lm_head.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    try:
        # width + 1: the state before the first completion token predicts it.
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=width + 1,
        ).logits
    finally:
        handle.remove()
    targets = batch.input_ids[:, -width:]
    loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none")
    return -loss.view_as(targets), captured[0][:, 1:]
