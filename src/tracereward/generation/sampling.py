"""Sampling completions from a policy with transformers' `generate`, reproducibly and in chunks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracereward.errors import InputError, RunFailed
from tracereward.generation.params import SamplingParams
from tracereward.generation.settings import NOT_FINITE, generation_config, run_generate
from tracereward.modeling.batching import pack
from tracereward.modeling.log_probs import mean_log_probs
from tracereward.modeling.tokenization import encode_prompt, eos_ids, pad_id

COMPILE_FROM = 2048
"""Decoding steps of a run from which compiling the step on a GPU, about a minute, pays off."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion.

    Attributes:
        prompt: index of its prompt.
        ids: its tokens, including the end-of-sequence token if there is one.
        text: decoded without special tokens.
        finished: whether it has an end of sequence; otherwise it was truncated at the length limit.
        logprob: mean log-prob of its tokens under the policy at temperature 1, in nats; a reranking baseline.
    """

    prompt: int
    ids: list[int]
    text: str
    finished: bool
    logprob: float

    @property
    def length(self) -> int:
        """Number of its tokens."""
        return len(self.ids)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    params: SamplingParams,
    *,
    n: int = 1,
    first_chunk: int = 0,
    before: int | None = None,
) -> Iterator[list[Sample]]:
    """Sample `n` completions of each prompt; yields one list of samples for each chunk of prompts.

    A chunk has about `params.batch_size` completions, including all of each of its prompts, and its own random seed, so
    that the result does not depend on where an earlier run stopped.

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        prompts: rendered prompts.
        params: how to sample; the seed is the run's.
        n: completions per prompt; 1 at temperature 0, where all are the same.
        first_chunk: number of chunks to skip.
        before: number of prompts, of full chunks, that were sampled before these in windows of a stream: the samples
            are those that a list of all prompts would have. None if these are all.
    """
    size = params.prompts_together(n)
    eos = eos_ids(model, tokenizer)
    steps = -(-len(prompts) // size) * params.max_new_tokens
    # The longest prompt of a stream is not known.
    width = (
        max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
        if before is None and _compiles(model, steps)
        else None
    )
    for chunk, start in enumerate(range(0, len(prompts), size)):
        if chunk < first_chunk:
            continue
        torch.manual_seed(params.seed * 1_000_003 + (before or 0) // size + chunk)
        part = list(prompts[start : start + size])
        rows = part if width is None else [*part, *part[-1:] * (size - len(part))]
        completions = generate(
            model,
            tokenizer,
            rows,
            params,
            n=n,
            width=width,
        )[: len(part) * n]
        ids = [encode_prompt(tokenizer, prompt) for prompt in part for _ in range(n)]
        log_probs = mean_log_probs(model, ids, completions, pad_id(tokenizer))
        if not all(map(math.isfinite, log_probs)):  # greedy decoding hides it
            raise RunFailed(NOT_FINITE)
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        yield [
            Sample(
                prompt=(before or 0) + start + row // n,
                ids=completion,
                text=text,
                finished=completion[-1] in eos,
                logprob=log_prob,
            )
            for row, (completion, text, log_prob) in enumerate(zip(completions, texts, log_probs, strict=True))
        ]


def _compiles(model: PreTrainedModel, steps: int) -> bool:
    """Whether to compile the decoding step for a run of `steps` steps."""
    return model.device.type == "cuda" and steps >= COMPILE_FROM


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    params: SamplingParams,
    *,
    n: int = 1,
    width: int | None = None,
) -> list[list[int]]:
    """`n` completions of each prompt in one call of transformers' `generate`, with torch's global RNG.

    The seed and batch size of `params` are not used.

    With a `width`, prompts are padded to it and the cache is static, so that calls with equally many rows have equal
    shapes: transformers then compiles the decoding step once, if it can.

    Returns:
        len(prompts) * n lists of token ids, up to and including the end-of-sequence token.

    Raises:
        InputError: a prompt has no tokens.
    """
    model.eval()
    eos = eos_ids(model, tokenizer)
    config = generation_config(
        model,
        tokenizer,
        max_new_tokens=params.max_new_tokens,
        sampling=params,
        num_return_sequences=n,
        cache_implementation=None if width is None else "static",
    )
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    if not all(ids):
        raise InputError(f"prompt {prompts[ids.index([])]!r}: no tokens; give a non-empty prompt")
    batch = pack(ids, [[]] * len(ids), pad_id(tokenizer)).to(model.device)
    left = 0 if width is None else width - batch.input_ids.size(1)
    inputs = F.pad(batch.input_ids, (left, 0), value=pad_id(tokenizer))
    attention_mask = F.pad(batch.attention_mask, (left, 0))
    output = run_generate(model, config, input_ids=inputs, attention_mask=attention_mask)
    return [_until_eos(row, eos) for row in output[:, inputs.size(1) :].tolist()]


def _until_eos(ids: list[int], eos: list[int]) -> list[int]:
    """The completion up to and including its end-of-sequence token, without padding."""
    for position, token in enumerate(ids):
        if token in eos:
            return ids[: position + 1]
    return ids
