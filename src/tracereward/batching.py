"""Token ids to padded batches, and what a causal LM says about the completions in them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS = 2**23  # of one chunk: 32 MiB in float32
# What some models do to logits behind the LM head (Gemma, Cohere, Granite, Falcon-H1).
AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "output_multiplier", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True)
class Batch:
    """Prompts padded at the left, completions at the right, so that completions share their first column.

    Attributes:
        input_ids: (B, P + T).
        attention_mask: (B, P + T), 1 for the tokens that others may look at.
        position_ids: (B, P + T), counted from each row's first token, so that left padding changes nothing.
        completion_mask: (B, T).
        step_ends: (B, T) bool.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    completion_mask: Tensor
    step_ends: Tensor

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
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return Batch(input_ids, attention_mask, position_ids, attention_mask[:, prompt_width:], steps)


def hide_tokens(batch: Batch, rate: float, seeds: Sequence[int]) -> Batch:
    """Token dropout: each completion token is hidden from the others with probability `rate`.

    A hidden token keeps its place, its own logit and its label. Its neighbours cannot rely on it, so that no single
    token gives a trace away (word dropout: Iyyer et al. 2015).

    Args:
        batch: as `pack` makes it.
        rate: in [0, 1).
        seeds: one a row, so that what is hidden does not depend on how rows are batched.
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

    What is longer than the budget is a batch of its own.

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


@dataclass
class HeadInput:
    """What entered an LM head in one pass.

    Attributes:
        states: (B, T, H).
        passes_logits: whether the pass's output has logits: the model changes them behind the head.
    """

    states: Tensor
    passes_logits: bool

    def at(self, targets: Tensor, output: Tensor) -> Tensor:
        """The log-probs of the targets, each from the state before it, (B, T - 1) float32, from the pass's output."""
        return token_log_probs(output[:, :-1], targets) if self.passes_logits else output[..., 0]


@contextlib.contextmanager
def log_probs_at_the_head(model: nn.Module, targets: Tensor) -> Iterator[HeadInput]:
    """Within, a forward pass of a causal LM reads the log-probs of (B, T - 1) `targets` at its LM head, in chunks.

    So the logits of all tokens are never held at once. The model's own pass calls the head, and the log-probs leave it
    in the place of the logits: hooks that gather spread weights, in the backward pass too, still run.
    """
    lm_head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    text_config = model.config.get_text_config()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    plain = all(getattr(text_config, name, None) in (None, 1.0) for name in AFTER_THE_HEAD)
    project, patched = lm_head.forward, vars(lm_head).get("forward")
    head = HeadInput(torch.empty(0), passes_logits=not plain)

    def log_probs_instead(states: Tensor) -> Tensor:
        head.states = states
        if not plain:
            return project(states)
        return _chunked_log_probs(project, states[:, :-1], targets, text_config.vocab_size)[..., None].clone()

    lm_head.forward = log_probs_instead
    try:
        yield head
    finally:
        if patched is None:
            del lm_head.forward
        else:
            lm_head.forward = patched


def completion_log_probs(model: nn.Module, batch: Batch, inputs_embeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probs of the completion tokens under a causal LM, and the final hidden states after each of them.

    The hidden state is what enters the LM head, whatever the architecture calls its parts; asking the model for
    hidden states would keep every layer's.

    Args:
        model: the causal LM.
        batch: what it reads.
        inputs_embeds: (B, P + T, H) in the place of the embeddings of `batch.input_ids`, which stay the targets.

    Returns:
        log p(y_t | x, y_<t), (B, T) float32, and h_t, (B, T, H).
    """
    width = batch.completion_mask.size(1)
    targets = batch.input_ids[:, -width:]
    with log_probs_at_the_head(model, targets) as head:
        # width + 1: the state before the first completion token predicts it.
        logits = model(
            input_ids=batch.input_ids if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=width + 1,
        ).logits
    return head.at(targets, logits), head.states[:, 1:]


def _chunked_log_probs(project: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """log softmax(project(states)) at `targets`, (B, T) float32, with at most `LOGITS` logits at a time.

    With gradients the logits of a chunk are computed again in the backward pass.
    """

    def log_probs(part: Tensor, ids: Tensor) -> Tensor:
        return -F.cross_entropy(project(part).float(), ids, reduction="none")

    chunk = max(1, LOGITS // vocabulary)
    parts = list(zip(states.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True))
    if len(parts) > 1 and torch.is_grad_enabled():
        chunks = [checkpoint(log_probs, part, ids, use_reentrant=False) for part, ids in parts]
    else:
        chunks = [log_probs(part, ids) for part, ids in parts]
    return torch.cat(chunks).view(targets.shape)  # pyright: ignore[reportArgumentType, reportCallIssue]


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits) at `targets`, (B, T) float32, of (B, T, V) logits and (B, T) token ids.

    Row by row: a second copy of all logits would be the largest tensor of the forward pass.
    """
    rows = [F.cross_entropy(row.float(), ids, reduction="none") for row, ids in zip(logits, targets, strict=True)]
    return -torch.stack(rows)


def scoring_budget(device: torch.device) -> int:
    """Padded tokens of one forward pass without gradients: few on a CPU, where larger logits only leave its caches."""
    return 1024 if device.type == "cpu" else 16384
