"""Padded batches of token ids, under a budget of tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from tracereward.errors import InputError


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, completions on the right, so that all completions start in the same column.

    Attributes:
        input_ids: (B, P + T).
        attention_mask: (B, P + T), 1 for tokens that others may attend to.
        position_ids: (B, P + T), counted from each row's first token, so that left padding has no effect.
        completion_mask: (B, T).
        step_ends: (B, T) bool.
        thinking: (B, T) bool, tokens of the thinking if it counts separately.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    completion_mask: Tensor
    step_ends: Tensor
    thinking: Tensor

    @property
    def model_mask(self) -> Tensor:
        """The attention mask to give to a causal model: all ones where padding only follows a row's tokens.

        No token attends to what follows it, and a mask without zeros is not expanded to (B, P + T, P + T), which for
        three traces of 16,000 tokens is 3 GB. Rows of one prompt have no other padding.
        """
        prompts, completions = self.attention_mask.tensor_split([-self.completion_mask.size(1)], dim=1)
        plain = bool(prompts.all()) and torch.equal(completions, self.completion_mask)  # nor are tokens hidden
        return torch.ones_like(self.attention_mask) if plain else self.attention_mask

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    ends: Sequence[Sequence[bool]] | None = None,
    *,
    thinking: Sequence[int] | None = None,
) -> Batch:
    """Pad token ids to a `Batch`.

    Args:
        prompts: token ids.
        completions: token ids, one for each prompt.
        pad_id: of the padding.
        ends: the step ends of each completion, if needed.
        thinking: number of tokens of each completion's thinking, if needed.
    """
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
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        completion_mask=attention_mask[:, prompt_width:],
        step_ends=steps,
        thinking=torch.arange(width)[None] < torch.tensor([0] * rows if thinking is None else list(thinking))[:, None],
    )


def hide_tokens(batch: Batch, rate: float, seeds: Sequence[int]) -> Batch:
    """Token dropout: each completion token is hidden from the others with probability `rate`.

    A hidden token keeps its position, logit and label, but other tokens cannot attend to it, so that no single token
    gives a trace away (word dropout: Iyyer et al. 2015).

    Args:
        batch: as `pack` makes it.
        rate: in [0, 1).
        seeds: one a row, so that the hidden tokens do not depend on batching.
    """
    attention_mask = batch.attention_mask.clone()
    width = batch.completion_mask.size(1)
    for row, seed in enumerate(seeds):
        length = int(batch.completion_mask[row].sum())
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.rand(length, generator=generator) < rate
        start = attention_mask.size(1) - width
        attention_mask[row, start : start + length].masked_fill_(hidden.to(attention_mask.device), 0)
    return replace(batch, attention_mask=attention_mask)


def token_budget_batches(
    lengths: Sequence[int], budget: int, sizes: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Indices of sequences of similar length, longest first, with at most `budget` padded tokens a batch.

    A sequence longer than the budget is a batch by itself.

    Args:
        lengths: of the sequences, or of the longest of each group of sequences that must stay together.
        budget: padded tokens of a batch.
        sizes: sequences in each group; 1 each if None.
    """
    sizes = [1] * len(lengths) if sizes is None else sizes
    batch: list[int] = []
    rows = width = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and width * (rows + sizes[index]) > budget:
            yield batch
            batch = []
        if not batch:
            rows, width = 0, lengths[index]
        batch.append(index)
        rows += sizes[index]
    if batch:
        yield batch


def scoring_budget(device: torch.device) -> int:
    """Padded tokens of one forward pass without gradients: few on a CPU, where larger logits do not fit its caches."""
    return 1024 if device.type == "cpu" else 16384


def prompt_groups(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], budget: int, share: bool
) -> list[list[int]]:
    """Indices of rows with the same prompt, in groups of at most `budget` padded tokens; without `share`, one each."""
    if not share:
        return [[index] for index in range(len(prompts))]
    same: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        same.setdefault(tuple(prompt), []).append(index)
    groups = []
    for prompt, indices in same.items():
        indices.sort(key=lambda index: len(completions[index]))
        group: list[int] = []
        for index in indices:  # rising lengths: the newest is the longest
            if group and (len(group) + 1) * (len(prompt) + len(completions[index])) > budget:
                groups.append(group)
                group = []
            group.append(index)
        groups.append(group)
    return groups


def grouped_batches(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    budget: int,
    share: bool,
) -> Iterator[tuple[list[int], list[int]]]:
    """Batches of at most `budget` padded tokens, longest first: row indices, and the sizes of runs that share a prompt.

    Without `share` each run has one row.

    Raises:
        InputError: a prompt has no tokens: padding would predict its first completion token.
    """
    if (empty := next((row for row, prompt in enumerate(prompts) if not prompt), None)) is not None:
        raise InputError(f"row {empty}: the prompt has no tokens; give a non-empty prompt")
    groups = prompt_groups(prompts, completions, budget, share)
    lengths = [len(prompts[group[0]]) + max(len(completions[i]) for i in group) for group in groups]
    for chosen in token_budget_batches(lengths, budget, list(map(len, groups))):
        yield [i for place in chosen for i in groups[place]], [len(groups[place]) for place in chosen]
