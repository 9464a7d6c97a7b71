"""Tokenization of requests, with limits on the number of tokens."""

from collections.abc import Sequence

from tracereward.console import warn_once
from tracereward.errors import InputError
from tracereward.modeling.lost_text import check_text
from tracereward.modeling.seam import continued
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.rewards.scorer import Scorer

CHARACTERS = 4  # per token, an estimate for text that is not tokenised yet
Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and a completion."""


class TooManyTokens(Exception):
    """A request with more tokens than the limit.

    Attributes:
        field: the request's field that exceeds the limit.
    """

    def __init__(self, field: str, limit: float):
        super().__init__(f"{field}: the request has more than {limit:.0f} tokens, prompts included (--max-tokens)")
        self.field = field


def encode_traces(
    model: Scorer,
    prompts: Sequence[str],
    completions: Sequence[str],
    finished: Sequence[bool],
    *,
    max_tokens: float,
    field: str,
) -> list[Pair]:
    """Token ids of traces; each distinct prompt is tokenised once. See `Engine.score`.

    Stops at the limit: a small request with one prompt and many candidates can have a thousand times as many tokens.
    """
    known: dict[str, list[int]] = {}
    pairs: list[Pair] = []
    total = 0
    for index, (prompt, completion, ended) in enumerate(zip(prompts, completions, finished, strict=True)):
        if prompt not in known:
            _check_pieces(model, prompt, max_tokens, field)
            known[prompt] = encode_prompt(model.tokenizer, prompt)
            if not known[prompt]:
                raise InputError(f"prompt {index}: no tokens; give a non-empty prompt")
            _check_text(model, prompt, known[prompt], "prompt", strict=field not in PROXIED)
        _check_pieces(model, completion, max_tokens, field)
        pairs.append((known[prompt], encode_completion(model.tokenizer, continued(prompt, completion), ended)))
        total += sum(map(len, pairs[-1]))
        if total > max_tokens:
            raise TooManyTokens(field, max_tokens)
        model.check_ids(f"{field} {index}", *pairs[-1])
        _check_text(model, completion, pairs[-1][1], f"{field} {index}", strict=field not in PROXIED)
    return pairs


def encode_inputs(model: Scorer, inputs: Sequence[str | list[int]], max_tokens: float) -> list[Pair]:
    """Token ids of inputs given as texts or as ids; the first token serves as the prompt."""
    pairs: list[Pair] = []
    total, vocabulary = 0, len(model.tokenizer)
    for index, given in enumerate(inputs):
        if isinstance(given, str):
            _check_pieces(model, given, max_tokens, "input")
            ids = encode_completion(model.tokenizer, given, finished=False)
            _check_text(model, given, ids, f"input {index}")
        else:
            ids = given
        total += len(ids)
        if total > max_tokens:
            raise TooManyTokens("input", max_tokens)
        if not all(0 <= one < vocabulary for one in ids):
            raise InputError(f"input {index}: token ids must be 0 to {vocabulary - 1}")
        if len(ids) < 2:
            raise InputError(f"input {index}: a single token has no reward; give two or more tokens")
        pairs.append((ids[:1], ids[1:]))
        model.check_ids(f"input {index}", *pairs[-1])
    return pairs


PROXIED = ("sample", "prompt")
"""Fields of requests that the upstream answers: the client did not send these texts to be judged."""


def _check_text(model: Scorer, text: str, ids: Sequence[int], where: str, *, strict: bool = True) -> None:
    """Refuse a text that the vocabulary does not hold; if not strict, warn once."""
    try:
        check_text(model.tokenizer, text, ids, where)
    except InputError as error:
        if strict:
            raise
        warn_once(str(error))


def _check_pieces(model: Scorer, text: str, max_tokens: float, field: str) -> None:
    """Reject a text far over the limit without tokenising all of it, which can take many seconds.

    The text is tokenised in pieces. Cutting at arbitrary characters adds a few tokens, so a text up to 10 % over the
    limit is left to the exact count.
    """
    size, total = CHARACTERS * max_tokens, 0
    if len(text) <= size:
        return
    for start in range(0, len(text), int(size)):
        total += len(encode_completion(model.tokenizer, text[start : start + int(size)]))
        if total > 1.1 * max_tokens:
            raise TooManyTokens(field, max_tokens)
