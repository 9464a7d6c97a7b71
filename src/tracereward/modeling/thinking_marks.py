"""How the completions of rendered prompts are split into thinking and answer: recognised from the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tracereward.errors import InputError
from tracereward.modeling.rendering import Rendering, render_prompt, row_location, think_marks
from tracereward.thinking import MARKS, Thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_marks(marks: Sequence[str]) -> Thinking:
    """Completions that are split at the texts which open and close the thinking.

    Raises:
        InputError: `marks` are not two texts.
    """
    if len(marks) != 2:
        raise InputError(f"think_marks must be two texts, what opens and what closes the thinking, not {len(marks)}")
    return Thinking(marks=((marks[0], marks[1]),))


def thinking_of(
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    rows: Sequence[Mapping[str, Any]],
    marks: Sequence[str] | None = None,
) -> Thinking:
    """How the completions of rendered rows are split.

    Args:
        tokenizer: of the model that writes them.
        rendering: of the prompts.
        rows: with ``prompt``, rendered.
        marks: the texts that open and close the thinking; None recognises the chat template's and well-known ones.

    Raises:
        InputError: `marks` are not two texts.
    """
    if marks is not None:
        known = with_marks(marks)
    else:
        opening, closing = (mark.strip() for mark in think_marks(tokenizer, rendering))
        known = Thinking(marks=MARKS if (opening, closing) in MARKS else ((opening, closing),))
    return Thinking(marks=known.marks, opened=bool(rows) and all(known.opens(row["prompt"]) for row in rows))


def thinking_of_template(
    tokenizer: PreTrainedTokenizerBase, rendering: Rendering, marks: Sequence[str] | None = None
) -> Thinking:
    """How the completions of any prompt are split, as far as the chat template says; see `thinking_of`."""
    if rendering.template == "plain":
        return thinking_of(tokenizer, rendering, [], marks)
    return thinking_of(tokenizer, rendering, [{"prompt": render_prompt(tokenizer, "?", rendering, "a prompt")}], marks)


def check_thinking(
    rows: Sequence[Mapping[str, Any]], thinking: Thinking, asked: Sequence[object], weight: float | None
) -> None:
    """Check demonstrations of which thinking and answer count separately.

    Args:
        rows: rendered.
        thinking: how they are split.
        asked: their prompts as given.
        weight: of the thinking; None: nothing is checked.

    Raises:
        InputError: a row has several blocks of thinking or one that is not closed, its prompt has one, some prompts end
            within the thinking and others do not, or no row has any; names the row and the fix.
    """
    if weight is None:
        return
    opened = [thinking.opens(row["prompt"]) for row in rows]
    if any(opened) and not all(opened):
        first, other = (row_location(dict(rows[opened.index(which)])) for which in (True, False))
        raise InputError(
            f"{first}: prompt: it ends within the thinking, and that of {other} does not: end all prompts alike"
        )
    for row, prompt in zip(rows, asked, strict=True):
        thinking.check(row_location(dict(row)), row["prompt"], row["completion"], prompt)
    if rows and not any(thinking.answer_start(row["completion"]) for row in rows):
        marks = " or ".join(f"{opening} ... {closing}" for opening, closing in thinking.marks[:1])
        raise InputError(
            f"--thinking_weight has no effect: none of {len(rows)} demonstrations has thinking ({marks}): name what "
            "opens and closes it with --think_marks, or leave the option out"
        )
