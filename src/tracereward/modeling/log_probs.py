"""Log-probs of completions under a causal LM, without holding the logits of all tokens in memory."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PreTrainedModel

from tracereward.modeling.batching import Batch, grouped_batches, pack, scoring_budget

LOGITS = 2**23
"""Logits of one chunk with gradients: 32 MiB in float32."""
READ_LOGITS = 2**25
"""Logits of one chunk without gradients: 64 MiB in bfloat16. A pass over an LM head of 152,000 tokens takes a quarter
less time than in chunks of `LOGITS`, which read the head's weights four times as often."""
CACHED_LOGITS = 2**20
"""Logits that a CPU normalises at a time, from float32 copies that stay in its caches; all at once takes a fifth more
time than the product with the head's weights."""
PART = 2048
"""Tokens of a row that one pass reads where a cache holds what was before, because rows share their prompts: then
activations and attention masks do not grow with the length. Rows that share nothing are read in one pass: without
gradients the activations of one layer at a time take less memory than the keys and values of all layers, and less time.
"""


# Config fields of models that transform logits after the LM head (Gemma, Cohere, Granite, Falcon-H1).
AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "output_multiplier", "logits_scaling", "lm_head_multiplier")


@dataclass
class HeadInput:
    """Input of an LM head in one forward pass.

    Attributes:
        states: (B, T, H).
        passes_logits: whether the output holds logits, because the model transforms them after the head.
    """

    states: Tensor
    passes_logits: bool

    def at(self, targets: Tensor, output: Tensor) -> Tensor:
        """The log-probs of the targets, each from the state at its place, (B, T) float32, from the pass's output."""
        return token_log_probs(output[:, : targets.size(1)], targets) if self.passes_logits else output[..., 0]


@contextlib.contextmanager
def log_probs_at_the_head(model: nn.Module, targets: Tensor) -> Iterator[HeadInput]:
    """Make a causal LM's forward pass return log-probs of (B, T) `targets` from its LM head, in chunks.

    The first T states of the head's input predict them, in order; further ones predict nothing.

    The logits of all tokens are thus never in memory at once. The model's own forward pass calls the head, whose output
    is log-probs instead of logits, so hooks that gather sharded weights still run, also in the backward pass.
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
        found = _chunked_log_probs(project, states[:, : targets.size(1)], targets, text_config.vocab_size)
        return found[..., None].clone()

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

    The hidden state is the input of the LM head, whatever the architecture calls its modules; output_hidden_states
    would keep those of every layer.

    Args:
        model: the causal LM.
        batch: its input.
        inputs_embeds: (B, P + T, H) instead of the embeddings of `batch.input_ids`, which remain the targets.

    Returns:
        log p(y_t | x, y_<t), (B, T) float32, and h_t, (B, T, H).
    """
    log_probs, states, _ = _one_pass(model, batch, inputs_embeds)
    return log_probs, states


def _one_pass(
    model: nn.Module, batch: Batch, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor, Any]:
    """`completion_log_probs`, and the output of the pass; `kwargs` are the model's."""
    width = batch.completion_mask.size(1)
    targets = batch.input_ids[:, -width:]
    with log_probs_at_the_head(model, targets) as head:
        # width + 1: the state before the first completion token predicts it.
        output = model(
            input_ids=batch.input_ids if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            attention_mask=batch.model_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=width + 1,
            **kwargs,
        )
    return head.at(targets, output.logits), head.states[:, 1:], output


def _chunked_log_probs(project: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """log softmax(project(states)) at `targets`, (B, T) float32, in chunks of `LOGITS` or `READ_LOGITS` logits.

    With gradients, each chunk's logits are recomputed in the backward pass.
    """

    def log_probs(part: Tensor, ids: Tensor) -> Tensor:
        return token_log_probs(project(part), ids)

    chunk = max(1, (LOGITS if torch.is_grad_enabled() else READ_LOGITS) // vocabulary)
    parts = list(zip(states.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True))
    if len(parts) > 1 and torch.is_grad_enabled():
        chunks = [checkpoint(log_probs, part, ids, use_reentrant=False) for part, ids in parts]
    else:
        chunks = [log_probs(part, ids) for part, ids in parts]
    return torch.cat(chunks).view(targets.shape)  # pyright: ignore[reportArgumentType, reportCallIssue]


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits) at `targets`, (...) float32, of (..., V) logits and (...) token ids.

    In slices, because a second copy of all logits would be the largest tensor of the forward pass.
    """
    whole = LOGITS if logits.is_cuda or torch.is_grad_enabled() else CACHED_LOGITS
    rows = max(1, whole // logits.size(-1))
    slices = zip(logits.flatten(0, -2).split(rows), targets.flatten().split(rows), strict=True)
    found = [F.cross_entropy(part.float(), ids, reduction="none") for part, ids in slices]
    return -torch.cat(found).view(targets.shape)


@torch.no_grad()
def log_probs_and_entropies(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """log p(y_t | x, y_<t), and the entropy of p(. | x, y_<t), in nats; each (B, T) float32, 0 on padding."""
    width = batch.completion_mask.size(1)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits
    log_probs = torch.zeros(batch.completion_mask.shape, device=logits.device)
    entropies = torch.zeros_like(log_probs)
    for row, length in enumerate(batch.completion_mask.sum(1).tolist()):  # row by row, because vocabularies are large
        distribution = logits[row, :length].float().log_softmax(-1)
        targets = batch.input_ids[row, -width:][:length, None]
        log_probs[row, :length] = distribution.gather(1, targets)[:, 0]
        entropies[row, :length] = torch.special.entr(distribution.exp()).sum(-1)
    return log_probs, entropies


@torch.no_grad()
def log_probs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    *,
    token_budget: int | None = None,
) -> list[Tensor]:
    """Log-prob of each completion's tokens under `model`, in nats: float32 of len(completion) each, on the CPU."""
    model.eval()
    found: list[Tensor] = [torch.empty(0)] * len(completions)
    token_budget = token_budget or scoring_budget(model.device)
    for rows, sizes in grouped_batches(prompts, completions, token_budget, can_share_prompts(model)):
        batch = pack([prompts[i] for i in rows], [completions[i] for i in rows], pad_id).to(model.device)
        shared = len(sizes) < len(rows)
        values, _ = shared_log_probs(model, batch, sizes) if shared else completion_log_probs(model, batch)
        for index, row in zip(rows, values.cpu(), strict=True):
            found[index] = row[: len(completions[index])]
    return found


def mean_log_probs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    *,
    token_budget: int | None = None,
) -> list[float]:
    """Mean log-prob of each completion's tokens under `model`, in nats."""
    found = log_probs(model, prompts, completions, pad_id, token_budget=token_budget)
    return [float(row.mean()) for row in found]


def can_share_prompts(model: torch.nn.Module) -> bool:
    """Whether a model's keys and values can be copied to several rows: plain attention in every layer.

    Sliding windows and recurrent states depend on the padding that a copy would change.
    """
    config = model.config.get_text_config()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    layers = getattr(config, "layer_types", None)
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    plain = set(layers) == {"full_attention"} if layers else not windowed
    return plain and not getattr(model, "_is_stateful", False)


def _parts(start: int, stop: int) -> Iterator[range]:
    """Columns from `start` to `stop` in ranges of at most `PART`."""
    for first in range(start, stop, PART):
        yield range(first, min(first + PART, stop))


def _read(
    model: torch.nn.Module, batch: Batch, columns: range, cache: Cache, *, rows: Tensor | None = None, **kwargs: Any
) -> Any:
    """The output of one pass over some columns of the batch, or of some of its rows, continued from the cache."""
    chosen = slice(None) if rows is None else rows
    return model(
        input_ids=batch.input_ids[chosen, columns.start : columns.stop],
        attention_mask=batch.attention_mask[chosen, : columns.stop],
        position_ids=batch.position_ids[chosen, columns.start : columns.stop],
        past_key_values=cache,
        use_cache=True,
        **kwargs,
    )


def _read_prompts(model: torch.nn.Module, batch: Batch, sizes: Sequence[int], **kwargs: Any) -> tuple[Tensor, Cache]:
    """Read one prompt of each run of `sizes` rows that share it: its last logits and the cache, for all rows."""
    prompt_width = batch.input_ids.size(1) - batch.completion_mask.size(1)
    counts = torch.tensor(list(sizes), device=batch.input_ids.device)
    starts = counts.cumsum(0) - counts
    rows = torch.repeat_interleave(torch.arange(len(sizes), device=counts.device), counts)
    cache = DynamicCache(config=model.config)  # pyright: ignore[reportArgumentType]
    *_, output = (_read(model, batch, part, cache, rows=starts, **kwargs) for part in _parts(0, prompt_width))
    cache.batch_select_indices(rows)
    return output.logits[rows, -1:], cache


def shared_log_probs(model: torch.nn.Module, batch: Batch, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`completion_log_probs` where runs of `sizes` rows have the same prompt, which is then processed once.

    Rows are read in parts of `PART` tokens, without gradients. Equal to one pass over all rows up to rounding.
    """
    log_probs, states, _ = _shared_pass(model, batch, sizes)
    return log_probs, states


def _shared_pass(
    model: torch.nn.Module, batch: Batch, sizes: Sequence[int], **kwargs: Any
) -> tuple[Tensor, Tensor, list[Any]]:
    """`shared_log_probs`, and the outputs of the passes over the completions; `kwargs` are the model's."""
    prompt_width, width = batch.input_ids.size(1) - batch.completion_mask.size(1), batch.input_ids.size(1)
    logits, cache = _read_prompts(model, batch, sizes, logits_to_keep=1)
    log_probs = [token_log_probs(logits, batch.input_ids[:, prompt_width : prompt_width + 1])]
    states, outputs = [], []
    for part in _parts(prompt_width, width):
        following = batch.input_ids[:, part.start + 1 : part.stop + 1]  # the last token predicts nothing
        with log_probs_at_the_head(model, following) as head:
            output = _read(model, batch, part, cache, **kwargs)
        log_probs.append(head.at(following, output.logits))
        states.append(head.states)
        outputs.append(output)
    return torch.cat(log_probs, 1), torch.cat(states, 1), outputs


def states_and_log_probs(
    model: torch.nn.Module, batch: Batch, sizes: Sequence[int] | None = None
) -> tuple[list[Tensor], Tensor]:
    """Hidden states after each completion token, of every layer, and the completions' log-probs.

    Args:
        model: the causal LM.
        batch: its input.
        sizes: lengths of runs of rows with the same prompt, which is then processed once; None if none is shared.

    Returns:
        L + 1 tensors (B, T, H), as transformers gives them: the embeddings, then the output of each layer, the last
        one normalised; and (B, T) float32.
    """
    if sizes is None:
        log_probs, _, output = _one_pass(model, batch, output_hidden_states=True)
        outputs = [output]
    else:
        log_probs, _, outputs = _shared_pass(model, batch, sizes, output_hidden_states=True)
    layers = [torch.cat(parts, 1) for parts in zip(*(output.hidden_states for output in outputs), strict=True)]
    return [states[:, -batch.completion_mask.size(1) :] for states in layers], log_probs


def shared_classifier_logits(model: torch.nn.Module, batch: Batch, sizes: Sequence[int]) -> Tensor:
    """Logits of a token classifier after each completion token, (B, T, 1); prompts as in `shared_log_probs`."""
    _, cache = _read_prompts(model, batch, sizes)
    parts = _parts(batch.input_ids.size(1) - batch.completion_mask.size(1), batch.input_ids.size(1))
    return torch.cat([_read(model, batch, part, cache).logits for part in parts], 1)
