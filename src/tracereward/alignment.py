"""Token ids to text with character offsets, and where steps end."""

import re
from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from tracereward.errors import InputError


def token_offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """Decode a completion and say which characters each token wrote.

    Works on sampled ids as they are, without tokenising again. A character whose bytes are spread over several tokens
    belongs to the last of them; the others have an empty span, as special tokens have.

    Returns:
        The text without special tokens, and len(ids) pairs (start, end) into it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{tokenizer.name_or_path}: token offsets need a fast tokenizer (a tokenizer.json file).")
    stream = DecodeStream(skip_special_tokens=True)
    text = ""
    offsets = []
    for token_id in ids:
        chunk = stream.step(backend, int(token_id)) or ""
        offsets.append((len(text), len(text) + len(chunk)))
        text += chunk
    rest = backend.decode([int(token_id) for token_id in ids], skip_special_tokens=True)[len(text) :]
    if rest:  # a trace cut off inside a character: the stream still waits for its other bytes
        last = max(i for i, token_id in enumerate(ids) if backend.decode([int(token_id)], skip_special_tokens=True))
        end = len(text) + len(rest)
        offsets[last:] = [(offsets[last][0], end), *[(end, end)] * (len(ids) - last - 1)]
        text += rest
    return text, offsets


def step_ends(text: str, offsets: Sequence[tuple[int, int]], delimiter: str = "\n") -> list[bool]:
    """Whether each token is the last of a step.

    A step ends with the last character of a run of delimiters (with white space between them): blank lines do not make
    empty steps. White space at the end of a delimiter such as ". " does not count, because most tokenizers put it into
    the next word's token. The token that holds the character is the step's last. The trace's last token always is one.

    Args:
        text: the completion.
        offsets: T character spans of its tokens.
        delimiter: what separates steps; a newline by default.
    """
    ends = [False] * len(offsets)
    runs = re.finditer(rf"(?:{re.escape(delimiter)}\s*?)*{re.escape(delimiter)}", text)
    boundaries = [(match.start() + len(match[0].rstrip()) if delimiter.strip() else match.end()) - 1 for match in runs]
    token = 0
    for character in boundaries:
        while token < len(offsets) and offsets[token][1] <= character:
            token += 1
        if token < len(offsets):
            ends[token] = True
    if ends:
        ends[-1] = True
    return ends
