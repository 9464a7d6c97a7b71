"""Continue traces with `generate`; each row has its own random stream and length limit.

`sampling` samples from torch's global RNG, so a row depends on the rest of its batch. Here the uniform number that
samples token t of a row is a function of the stream's name and t: a row is the same in any batch and after any number
of interruptions (up to rounding of the logits, which differs slightly between batch shapes).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from tracereward.generation.settings import generation_config, run_generate
from tracereward.modeling.alignment import step_ends, token_offsets
from tracereward.modeling.batching import pack
from tracereward.modeling.steps import StepRule
from tracereward.modeling.tokenization import eos_ids, pad_id

Tilt = Callable[[list[list[int]], Tensor], Tensor]
"""Maps R token sequences (prompt and trace) and their (R, V) next-token logits to new (R, V) logits."""


@dataclass(frozen=True)
class OpenTrace:
    """A trace to continue.

    Attributes:
        prompt: token ids.
        trace: token ids so far, without end of sequence; may be empty.
        stream: name of its random stream; unused at temperature 0.
        limit: maximum number of tokens to add, at least 1.
    """

    prompt: Sequence[int]
    trace: Sequence[int]
    stream: str
    limit: int


@dataclass(frozen=True)
class Continuation:
    """The tokens added to one trace.

    Attributes:
        ids: the tokens to keep.
        count: number of tokens sampled, which includes a token after the step if only that token shows the step's end.
    """

    ids: list[int]
    count: int


@torch.no_grad()
def extend(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[OpenTrace],
    *,
    rule: StepRule | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 64,
    tilt: Tilt | None = None,
) -> list[Continuation]:
    """Continue each trace until its end, the end of a step, or its limit.

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        rows: R traces.
        rule: what ends a step; None continues to the end of the trace.
        temperature: 0 is greedy decoding.
        top_p: nucleus sampling, applied after the tilt.
        batch_size: rows generated together.
        tilt: changes the next-token logits.

    Returns:
        R continuations.
    """
    model.eval()
    found: list[Continuation] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        contexts = [[*row.prompt, *row.trace] for row in part]
        batch = pack(contexts, [[]] * len(contexts), pad_id(tokenizer)).to(model.device)
        width, limits = batch.input_ids.size(1), [row.limit for row in part]
        stop = _Stop(tokenizer, eos_ids(model, tokenizer), width=width, limits=limits, rule=rule)
        sampler = _Sampler(stop, part, temperature=temperature, top_p=top_p, tilt=tilt)
        output = run_generate(
            model,
            generation_config(model, tokenizer, max_new_tokens=max(limits)),  # greedy: the sampler leaves one token
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([stop]),
        )
        new = output[:, width:].tolist()
        found += [Continuation(row[: stop.kept[i]], stop.counts[i]) for i, row in enumerate(new)]
    return found


def uniform(stream: str, place: int) -> float:
    """The uniform number in [0, 1) for token `place` of a stream."""
    return random.Random(f"{stream} {place}").random()


def choose_token(logits: Tensor, number: float) -> int:
    """Sample a token from softmax(logits) by inverse transform of `number` in [0, 1)."""
    cumulative = logits.float().softmax(0).cumsum(0)
    # right=True skips tokens of probability 0, which do not increase the cumulative sum.
    found = torch.searchsorted(cumulative, cumulative[-1:] * number, right=True)
    return min(int(found), len(logits) - 1)


def first_step(tokenizer: PreTrainedTokenizerBase, ids: list[int], rule: StepRule) -> int | None:
    """Number of tokens in the first step of `ids`; None if the step has not ended.

    Leading white space and delimiters are part of the step: a step is never blank. As in `alignment.step_ends`, it
    includes the token with the step's last visible character.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    blank = len(text) - len(text.lstrip())
    if not rule.steps:
        visible = rule.delimiter.rstrip()
        while visible and text.startswith(visible, blank):
            blank += len(visible)
            blank += len(text[blank:]) - len(text[blank:].lstrip())
        if rule.delimiter not in text[blank:]:
            return None
    if not rule.cuts(text + "a"):  # more may follow
        return None
    text, offsets = token_offsets(tokenizer, ids)
    ends = step_ends(text + "a", offsets, rule)
    return next(i for i, (end, (_, last)) in enumerate(zip(ends, offsets, strict=True)) if end and last > blank) + 1


class _Stop(StoppingCriteria):
    """Stops each row at its end of sequence, the end of its step or its limit, and records the lengths.

    Attributes:
        counts: tokens sampled, by row, for rows that have stopped.
        kept: tokens to keep, by row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos: list[int],
        *,
        width: int,
        limits: Sequence[int],
        rule: StepRule | None,
    ):
        self.tokenizer, self.eos, self.width, self.limits, self.rule = tokenizer, eos, width, limits, rule
        self.counts: dict[int, int] = {}
        self.kept: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        new = input_ids[:, self.width :].tolist()
        for row, ids in enumerate(new):
            if row in self.counts:
                continue
            kept = len(ids) if ids[-1] in self.eos else None
            if kept is None and self.rule is not None:
                kept = first_step(self.tokenizer, ids, self.rule)
            if kept is None and len(ids) >= self.limits[row]:
                kept = len(ids)
            if kept is not None:
                self.kept[row], self.counts[row] = kept, len(ids)
        return torch.tensor([row in self.counts for row in range(len(new))], device=input_ids.device)


class _Sampler(LogitsProcessor):
    """Masks all tokens of a row except the one that its stream samples."""

    def __init__(self, stop: _Stop, rows: Sequence[OpenTrace], *, temperature: float, top_p: float, tilt: Tilt | None):
        self.stop, self.rows, self.temperature, self.tilt = stop, rows, temperature, tilt
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows = [row for row in range(len(input_ids)) if row not in self.stop.counts]
        new = input_ids[:, self.stop.width :]
        logits = scores[rows].float()
        if self.tilt is not None:
            contexts = [[*self.rows[row].prompt, *self.rows[row].trace, *new[row].tolist()] for row in rows]
            logits = self.tilt(contexts, logits)
        if self.temperature:
            logits = logits / self.temperature
            logits = logits if self.nucleus is None else self.nucleus(input_ids[rows], logits)  # pyright: ignore[reportArgumentType]
            tokens = [
                choose_token(values, uniform(self.rows[row].stream, len(self.rows[row].trace) + new.size(1)))
                for row, values in zip(rows, logits, strict=True)
            ]
        else:
            tokens = logits.argmax(1).tolist()
        left = torch.full_like(scores, -torch.inf)
        left[:, 0] = 0.0  # any token, for stopped rows, which `generate` pads
        left[rows, :] = -torch.inf
        left[rows, tokens] = 0.0
        return left
