"""Text of requests as token ids, with the limits that only tokens can tell."""

from collections.abc import Sequence

from tracereward.demonstrations import encode_completion, encode_prompt
from tracereward.errors import InputError
from tracereward.scorer import Scorer

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and a completion."""


class TooManyTokens(Exception):
    """A request with more tokens than one may have.

    Attributes:
        field: of the request, in which the limit was passed.
    """

    def __init__(self, field: str, limit: float):
        super().__init__(f"{field}: the request has more than {limit:.0f} tokens, prompts included (--max-tokens)")
        self.field = field


def encode_traces(
    model: Scorer,
    prompts: Sequence[str],
    completions: Sequence[str],
    finished: Sequence[bool],
    max_tokens: float,
    field: str,
) -> list[Pair]:
    """Token ids of traces, each distinct prompt tokenised once; see `Engine.score`.

    It stops at the limit: a small request with one prompt and many candidates can have a thousand times as many tokens.
    """
    known: dict[str, list[int]] = {}
    pairs: list[Pair] = []
    total = 0
    for index, (prompt, completion, ended) in enumerate(zip(prompts, completions, finished, strict=True)):
        if prompt not in known:
            known[prompt] = encode_prompt(model.tokenizer, prompt)
            if not known[prompt]:
                raise InputError(f"prompt {index}: it has no token")
        ids = encode_completion(model.tokenizer, completion)
        pairs.append((known[prompt], ids if ended else ids[:-1]))
        total += sum(map(len, pairs[-1]))
        if total > max_tokens:
            raise TooManyTokens(field, max_tokens)
        model.check_ids(f"{field} {index}", *pairs[-1])
    return pairs


def encode_inputs(model: Scorer, inputs: Sequence[str | list[int]], max_tokens: float) -> list[Pair]:
    """Token ids of texts, or what was given as ids; the first token is the prompt."""
    pairs: list[Pair] = []
    total, vocabulary = 0, len(model.tokenizer)
    for index, given in enumerate(inputs):
        ids = encode_completion(model.tokenizer, given)[:-1] if isinstance(given, str) else given
        total += len(ids)
        if total > max_tokens:
            raise TooManyTokens("input", max_tokens)
        if not all(0 <= one < vocabulary for one in ids):
            raise InputError(f"input {index}: the model's token ids are 0 to {vocabulary - 1}")
        if len(ids) < 2:
            raise InputError(f"input {index}: one token alone has no reward; give two or more")
        pairs.append((ids[:1], ids[1:]))
        model.check_ids(f"input {index}", *pairs[-1])
    return pairs
