"""Character offsets of token ids, step boundaries, and projection of values between two tokenizers' tokens."""

import math
from bisect import bisect_left
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from tracereward.errors import InputError
from tracereward.modeling.steps import LINES, StepRule


def token_offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """Decode a completion and return the character span of each token.

    Works on sampled ids, without tokenising again. A character whose bytes are split over several tokens belongs to the
    last of them, together with other characters in the token of its first bytes, such as " " in b" \\xc3", b"\\xb1".
    The other tokens have an empty span, as special tokens have.

    Returns:
        The text without special tokens, and len(ids) pairs (start, end) into it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{tokenizer.name_or_path}: token offsets need a fast tokenizer (a tokenizer.json file).")
    ids = [int(token_id) for token_id in ids]
    text = backend.decode(ids, skip_special_tokens=True)
    ends = _ends_by_stream(backend, ids, text)
    if ends is None:
        ends = _ends_by_prefixes(backend, ids, text)
    if ends and ends[-1] < len(text):  # a trace cut off inside a character, whose last bytes are missing
        last = max(i for i, token_id in enumerate(ids) if backend.decode([token_id], skip_special_tokens=True))
        ends[last:] = [len(text)] * (len(ids) - last)
    return text, list(zip([0, *ends], ends))


def _ends_by_stream(backend: Tokenizer, ids: list[int], text: str) -> list[int] | None:
    """Characters of `text` that are settled after each token; None if a later token changed what was settled."""
    stream = DecodeStream(skip_special_tokens=True)
    written = ""
    ends = []
    for token_id in ids:
        try:
            chunk = stream.step(backend, token_id)
        except Exception:  # a bare Exception, "invalid prefix", is all that the library raises
            return None
        written += chunk or ""
        ends.append(len(written))
    return ends if text.startswith(written) else None


def _ends_by_prefixes(backend: Tokenizer, ids: list[int], text: str) -> list[int]:
    """As `_ends_by_stream`, from the decoded prefixes of `ids`, in quadratic time.

    For vocabularies with byte fallback: a run of byte tokens is decoded as text only if all its bytes are valid, so
    that one invalid byte undoes the characters before it.
    """
    ends = [0]
    for length in range(1, len(ids) + 1):
        settled = backend.decode(ids[:length], skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
        same = next((i for i, (a, b) in enumerate(zip(settled, text)) if a != b), min(len(settled), len(text)))
        ends.append(max(ends[-1], same))
    return ends[1:]


def step_ends(text: str, offsets: Sequence[tuple[int, int]], rule: StepRule = LINES) -> list[bool]:
    """Whether each token is the last of a step: the token that holds the step's last character.

    The trace's last token always is one.

    Args:
        text: the completion.
        offsets: T character spans of its tokens.
        rule: what ends a step; a newline by default.
    """
    ends = [False] * len(offsets)
    token = 0
    for cut in rule.cuts(text):
        while token < len(offsets) and offsets[token][1] < cut:
            token += 1
        if token < len(offsets):
            ends[token] = True
    if ends:
        ends[-1] = True
    return ends


def containing_tokens(source: Sequence[tuple[int, int]], target: Sequence[tuple[int, int]], ended: bool) -> list[int]:
    """For each source token, the target token that holds its last character.

    Both are tokenisations of the same text. The result never decreases, and ``containing_tokens(s, s, ended)`` is
    0 ... S - 1. An empty span at p (a token with some bytes of character p, or a special token) stands for character p:
    the j-th such token goes to the target's j-th at p, or, if the target has fewer, to the token that holds p. Where
    there is no character p, it goes to the target's last token with text or, if one of its run has gone there, to the
    last empty one after it.

    Args:
        source: S character spans, as `token_offsets` gives them.
        target: T character spans.
        ended: whether the last token of both is the end-of-sequence token. Those two belong together, and no other
            token goes there unless it is the target's only one.

    Returns:
        S indices into `target`.

    Raises:
        ValueError: the source has tokens and the target has none.
    """
    if not source:
        return []
    if not target:
        raise ValueError(f"{len(source)} source tokens, but no target token to hold them")
    body = target[:-1] if ended and len(target) > 1 else target
    keys = _order_keys(body)
    last_text = max((i for i, (start, end) in enumerate(body) if start < end), default=len(body) - 1)
    tokens: list[int] = []
    for key in _order_keys(source[:-1] if ended else source):
        token = bisect_left(keys, key)
        if token == len(body):  # beyond the target's text; max() keeps the order
            token = max([last_text, *tokens[-1:]])
        tokens.append(token)
    return [*tokens, len(target) - 1] if ended else tokens


def _order_keys(spans: Sequence[tuple[int, int]]) -> list[tuple[int, float]]:
    """(last character, infinity) of a token with text, (p, j) of the j-th empty one at p: strictly increasing."""
    keys: list[tuple[int, float]] = []
    for start, end in spans:
        if start < end:
            keys.append((end - 1, math.inf))
        else:
            keys.append((start, keys[-1][1] + 1 if keys and keys[-1][0] == start else 0))
    return keys


def project(
    values: Sequence[float],
    supervised: Sequence[bool],
    source: Sequence[tuple[int, int]],
    target: Sequence[tuple[int, int]],
    *,
    ended: bool,
) -> tuple[list[float], list[bool]]:
    """Move values from a reward model's tokens to those of a policy with another tokenizer.

    The value of a supervised source token goes to the target token that holds its last character
    (`containing_tokens`); those that meet there add up, because the log-odds of a span are the sum of its tokens'
    log-odds. The total over supervised tokens stays the same.

    `shaping.backfill` over the target tokens completes the rule that a policy token takes the reward of the
    reward-model token that contains its last character. Split, "12" into "1" and "2": the value lands on "2", and "1"
    has it by backfill. Merged, "1" and "2" into "12": the two values add. A sum may leave the interval that values are
    clipped to, so that clipping comes after.

    Args:
        values: S values; those of unsupervised tokens are not read.
        supervised: S flags.
        source: S character spans of the reward model's tokens.
        target: T character spans of the policy's tokens.
        ended: as for `containing_tokens`.

    Returns:
        T values and T flags: 0 and False where no supervised token landed.

    Raises:
        ValueError: lengths differ, or the source has tokens and the target has none.
    """
    moved = [0.0] * len(target)
    landed = [False] * len(target)
    for value, counts, token in zip(values, supervised, containing_tokens(source, target, ended), strict=True):
        if counts:
            moved[token] += value
            landed[token] = True
    return moved, landed
