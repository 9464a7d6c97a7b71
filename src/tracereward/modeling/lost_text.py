"""Text that a tokenizer cannot hold: characters that become ``<unk>``, or no token at all.

A model reads a different text than the one it was given, and says nothing. Byte-level vocabularies hold everything.
What a tokenizer's normaliser changes by design (case, accents, NFKC, white space) is held: the character has a token.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tracereward.console import warn
from tracereward.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_OF_A_TEXT = 0.1
"""Share of a text's visible characters; above it the text is refused: the model would judge another one."""
MOST_OF_A_SET = 0.01
"""Share of a training set's visible characters; above it the set is refused. Under it, there is a warning."""

_PROBE = "".join(map(chr, range(33, 127))) + "é—²½Ωжא中あ한🧮\U000f1234"
"""Printable ASCII and rare characters, down to one of the private use area, which only bytes can hold."""
_NOT_VISIBLE = ("Cc", "Cf", "Mn", "Zs", "Zl", "Zp")


@dataclass(frozen=True)
class Loss:
    """What a tokenizer cannot hold of a text.

    Attributes:
        lost: number of visible characters that have no token, or ``<unk>``.
        visible: number of visible characters.
        example: the first characters that are lost; "" if none is.
    """

    lost: int
    visible: int
    example: str = ""

    @property
    def share(self) -> float:
        """Lost characters over visible ones."""
        return self.lost / self.visible if self.visible else 0.0


def loss_of(tokenizer: "PreTrainedTokenizerBase", text: str) -> Loss:
    """The characters of a text that a tokenizer cannot hold, by the spans of its tokens.

    A text that spells ``<unk>`` out, as a sample of a policy may, holds what it says.
    """
    return Loss(0, len(text)) if _holds_all(tokenizer) else _loss(tokenizer, text)


@lru_cache(maxsize=16)
def _holds_all(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the vocabulary holds any text, as byte-level ones do; a tokenizer without spans counts as one."""
    return not getattr(tokenizer, "is_fast", False) or _loss(tokenizer, _PROBE).lost == 0


def _unknown(tokenizer: "PreTrainedTokenizerBase") -> tuple[str | None, int | None]:
    """The token that stands for text outside the vocabulary, and its id."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    token = tokenizer.unk_token or getattr(getattr(backend, "model", None), "unk_token", None)
    return (token, tokenizer.convert_tokens_to_ids(token)) if isinstance(token, str) else (None, None)


@lru_cache(maxsize=4096)
def _known(tokenizer: "PreTrainedTokenizerBase", character: str) -> bool:
    """Whether a character has a token of its own: a long number in a vocabulary of words is not foreign text."""
    ids: Any = tokenizer(character, add_special_tokens=False)["input_ids"]
    return len(ids) > 0 and _unknown(tokenizer)[1] not in ids


def _loss(tokenizer: "PreTrainedTokenizerBase", text: str) -> Loss:
    encoding: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spelt, unknown = _unknown(tokenizer)
    held = bytearray(len(text))
    for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"]):
        if token != unknown or text[start:end] == spelt:
            held[start:end] = b"\1" * (end - start)
    visible = [place for place, character in enumerate(text) if unicodedata.category(character) not in _NOT_VISIBLE]
    lost = [place for place in visible if not held[place] and not _known(tokenizer, text[place])]
    return Loss(len(lost), len(visible), _run(text, held, lost[0]) if lost else "")


def _run(text: str, held: bytearray, start: int) -> str:
    """The lost characters from `start`, up to 20 and to the end of the line."""
    end = start
    while end < min(start + 20, len(text)) and not held[end] and text[end] != "\n":
        end += 1
    return text[start:end].rstrip()


def check_text(tokenizer: "PreTrainedTokenizerBase", text: str, ids: Sequence[int], where: str) -> None:
    """Refuse a text of which the tokenizer loses more than `MOST_OF_A_TEXT`.

    Args:
        tokenizer: reads it.
        text: the text.
        ids: its token ids.
        where: its location.

    Raises:
        InputError: names `where`, the share and an example.
    """
    unknown = _unknown(tokenizer)[1]
    if unknown is not None and unknown not in ids:
        return
    if wrong := too_much(tokenizer, loss_of(tokenizer, text)):
        raise InputError(f"{where}: {wrong}")


def too_much(tokenizer: "PreTrainedTokenizerBase", loss: Loss) -> str | None:
    """What to say of a text that loses more than `MOST_OF_A_TEXT`; None if it does not."""
    if loss.share <= MOST_OF_A_TEXT:
        return None
    return (
        f"{_percent(loss.share)} of the characters ({loss.example!r}, ...) are not in the vocabulary of "
        f"{tokenizer.name_or_path or 'the tokenizer'} and would be read as <unk>: use a model that knows them"
    )


class Tally:
    """Adds up what a tokenizer loses of the rows of a set.

    Args:
        tokenizer: reads them.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.lost = self.visible = self.rows = self.affected = 0
        self.first: tuple[str, str] | None = None

    def add(self, where: str, texts: Iterable[str], most: float = 1.0) -> Loss:
        """Count a row; returns the loss of the text that loses most. If that is over `most`, the row does not count."""
        losses = [loss_of(self.tokenizer, text) for text in texts]
        worst = max(losses, key=lambda loss: loss.share, default=Loss(0, 0))
        if worst.share > most:
            return worst
        self.rows += 1
        self.affected += worst.lost > 0
        self.lost += sum(loss.lost for loss in losses)
        self.visible += sum(loss.visible for loss in losses)
        if worst.lost and self.first is None:
            self.first = (where, worst.example)
        return worst

    def report(self, what: str, most: float) -> None:
        """Refuse a set of which more than the share `most` is lost; warn if any is.

        Raises:
            InputError: names the share of characters and of rows, and an example.
        """
        if self.first is None:
            return
        share, (where, example) = self.lost / self.visible, self.first
        text = (
            f"{what}: {_percent(share)} of the characters, in {self.affected} of {self.rows} rows, are not in the "
            f"vocabulary of {self.tokenizer.name_or_path or 'the tokenizer'} and are read as <unk> (first {where}: "
            f"{example!r})"
        )
        if share > most:
            raise InputError(f"{text}: use a model that knows them, or change the rows")
        warn(text)


def check_texts(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Iterable[tuple[str, Sequence[str]]],
    what: str,
    most: float = MOST_OF_A_SET,
) -> None:
    """Refuse a set of rows of which the tokenizer loses more than a share; warn if it loses any.

    Args:
        tokenizer: reads them.
        rows: location and texts of each row.
        what: the set, for the message.
        most: share of the visible characters.

    Raises:
        InputError: names the share of characters and of rows, and an example.
    """
    if not _holds_all(tokenizer):
        tally = Tally(tokenizer)
        for where, texts in rows:
            tally.add(where, texts)
        tally.report(what, most)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else "all"
