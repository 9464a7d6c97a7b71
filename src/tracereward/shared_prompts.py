"""Candidates of one question: their prompt is read once, and each completion goes on from its keys and values."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from tracereward.batching import Batch, log_probs_at_the_head, token_budget_batches, token_log_probs


def can_share_prompts(model: torch.nn.Module) -> bool:
    """Whether a model's keys and values can be copied to several rows: plain attention in every layer.

    Sliding windows and recurrent states depend on the padding that a copy would change.
    """
    config = model.config.get_text_config()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    layers = getattr(config, "layer_types", None)
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    plain = set(layers) == {"full_attention"} if layers else not windowed
    return plain and not getattr(model, "_is_stateful", False)


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
    """Batches of at most `budget` padded tokens, longest first: indices of rows, and how many in a row share a prompt.

    Where no prompt is shared each row is alone.
    """
    groups = prompt_groups(prompts, completions, budget, share)
    lengths = [len(prompts[group[0]]) + max(len(completions[i]) for i in group) for group in groups]
    for chosen in token_budget_batches(lengths, budget, list(map(len, groups))):
        yield [i for place in chosen for i in groups[place]], [len(groups[place]) for place in chosen]


def _read_prompts(model: torch.nn.Module, batch: Batch, sizes: Sequence[int], **kwargs: Any) -> tuple[Tensor, Cache]:
    """One pass over one row of each run of `sizes` rows with the same prompt: logits and cache, for all rows."""
    prompt_width = batch.input_ids.size(1) - batch.completion_mask.size(1)
    counts = torch.tensor(list(sizes), device=batch.input_ids.device)
    starts = counts.cumsum(0) - counts
    rows = torch.repeat_interleave(torch.arange(len(sizes), device=counts.device), counts)
    cache = DynamicCache(config=model.config)  # pyright: ignore[reportArgumentType]
    output = model(
        input_ids=batch.input_ids[starts, :prompt_width],
        attention_mask=batch.attention_mask[starts, :prompt_width],
        position_ids=batch.position_ids[starts, :prompt_width],
        past_key_values=cache,
        use_cache=True,
        **kwargs,
    )
    cache.batch_select_indices(rows)
    return output.logits[rows], cache


def _read_completions(model: torch.nn.Module, batch: Batch, cache: Cache) -> Tensor:
    """One pass over all completions, which go on from their prompts' cache: its logits."""
    prompt_width = batch.input_ids.size(1) - batch.completion_mask.size(1)
    return model(
        input_ids=batch.input_ids[:, prompt_width:],
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids[:, prompt_width:],
        past_key_values=cache,
        use_cache=True,
    ).logits


def shared_log_probs(model: torch.nn.Module, batch: Batch, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`completion_log_probs` where runs of `sizes` rows have the same prompt, which is then read once.

    The numbers are those of one pass over all rows, up to rounding.
    """
    targets = batch.input_ids[:, -batch.completion_mask.size(1) :]
    logits, cache = _read_prompts(model, batch, sizes, logits_to_keep=1)
    first = token_log_probs(logits[:, -1:], targets[:, :1])  # from the prompt's last token
    with log_probs_at_the_head(model, targets[:, 1:]) as head:
        logits = _read_completions(model, batch, cache)
    return torch.cat([first, head.at(targets[:, 1:], logits)], 1), head.states


def shared_classifier_logits(model: torch.nn.Module, batch: Batch, sizes: Sequence[int]) -> Tensor:
    """Logits of a token classifier after each completion token, (B, T, 1); prompts as in `shared_log_probs`."""
    _, cache = _read_prompts(model, batch, sizes)
    return _read_completions(model, batch, cache)
