"""Candidates of one question: their prompt is read once, and each completion goes on from its keys and values."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from tracereward.batching import Batch, token_budget_batches, token_log_probs


@dataclass(frozen=True)
class SharedOutputs:
    """What the backbone says of completions that go on from shared prompts.

    Attributes:
        first: logits after the prompt's last token, (B, V).
        logits: after each completion token, (B, T, V); (B, T, 1) of a token classifier.
        hidden: what enters the LM head there, (B, T, H); of a token classifier None.
    """

    first: Tensor
    logits: Tensor
    hidden: Tensor | None


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
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    budget: int,
    share: bool,
) -> Iterator[tuple[list[int], list[int]]]:
    """Batches of at most `budget` padded tokens, longest first: indices of rows, and how many in a row share a prompt.

    Where no prompt is shared, or `model` cannot share one, each row is alone.
    """
    groups = prompt_groups(prompts, completions, budget, share and can_share_prompts(model))
    lengths = [len(prompts[group[0]]) + max(len(completions[i]) for i in group) for group in groups]
    for chosen in token_budget_batches(lengths, budget, list(map(len, groups))):
        yield [i for place in chosen for i in groups[place]], [len(groups[place]) for place in chosen]


def shared_prompt_forward(model: torch.nn.Module, batch: Batch, sizes: Sequence[int]) -> SharedOutputs:
    """Two passes: over one row of each run of `sizes` rows with the same prompt, then over all completions.

    The numbers are those of one pass over all rows, up to rounding.
    """
    width = batch.completion_mask.size(1)
    prompt_width = batch.input_ids.size(1) - width
    counts = torch.tensor(list(sizes), device=batch.input_ids.device)
    starts = counts.cumsum(0) - counts
    rows = torch.repeat_interleave(torch.arange(len(sizes), device=counts.device), counts)
    cache = DynamicCache(config=model.config)  # pyright: ignore[reportArgumentType]
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]  # None of a token classifier
    prompt = model(
        input_ids=batch.input_ids[starts, :prompt_width],
        attention_mask=batch.attention_mask[starts, :prompt_width],
        position_ids=batch.position_ids[starts, :prompt_width],
        past_key_values=cache,
        use_cache=True,
        **({} if head is None else {"logits_to_keep": 1}),
    )
    cache.batch_select_indices(rows)
    captured: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: captured.append(args[0])) if head is not None else None
    try:
        output = model(
            input_ids=batch.input_ids[:, prompt_width:],
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids[:, prompt_width:],
            past_key_values=cache,
            use_cache=True,
        )
    finally:
        if handle is not None:
            handle.remove()
    return SharedOutputs(prompt.logits[rows, -1], output.logits, captured[0] if captured else None)


def shared_log_probs(outputs: SharedOutputs, batch: Batch) -> Tensor:
    """log p(y_t | x, y_<t), (B, T) float32: the first from the prompt's last token, the others from the one before."""
    targets = batch.input_ids[:, -batch.completion_mask.size(1) :]
    first = token_log_probs(outputs.first[:, None], targets[:, :1])
    return torch.cat([first, token_log_probs(outputs.logits[:, :-1], targets[:, 1:])], 1)
