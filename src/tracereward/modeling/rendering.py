"""Rendering of prompts and completions to the exact texts that are tokenised: one place for all commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tracereward.errors import InputError, check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = ("plain", "chat")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold the reasoning before its content, in the spellings of servers and data sets."""


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How a conversation becomes the text of a prompt.

    Attributes:
        template: ``plain`` keeps texts; ``chat`` applies the tokenizer's chat template.
        chat_template_kwargs: variables for the chat template, such as ``enable_thinking``.
        date: the day, as ``YYYY-MM-DD``, that a chat template which reads the clock writes.

    Raises:
        InputError: the template is unknown.
    """

    template: str = "plain"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""

    def __post_init__(self) -> None:
        check_choice("template", self.template, TEMPLATES)


def render(rows: list[dict], tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> list[dict]:
    """Render prompts and completions to the exact texts that are tokenised; returns new rows.

    Args:
        rows: demonstrations, with texts or lists of ``{"role", "content"}`` messages.
        tokenizer: the policy's.
        rendering: ``plain`` keeps texts; ``chat`` applies the tokenizer's chat template to each prompt, up to the start
            of the assistant's turn. The completion is then the assistant's plain text.

    Raises:
        InputError: messages under ``plain``, a tokenizer without a chat template, messages that the template refuses,
            or a completion that is not one assistant message.
    """
    return [
        {
            **row,
            "prompt": render_prompt(tokenizer, row["prompt"], rendering, row_location(row)),
            "completion": _plain_completion(row),
        }
        for row in rows
    ]


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], rendering: Rendering, where: str
) -> str:
    """The exact text of a prompt that is tokenised; see `render`.

    Args:
        tokenizer: of the model that reads it.
        prompt: a text or ``{"role", "content"}`` messages.
        rendering: how it becomes text.
        where: location of the row in error messages.

    Raises:
        InputError: messages under ``plain``, a tokenizer without a chat template, or messages that the template
            refuses.
    """
    if rendering.template == "plain":
        if not isinstance(prompt, str):
            raise InputError(f"{where}: the prompt is a list of messages: use --template chat")
        return prompt
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise InputError(f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template: use --template plain")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        text = str(
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **rendering.chat_template_kwargs
            )
        )
    except TemplateError as error:
        raise InputError(f"{where}: the chat template refuses the prompt: {error}") from error
    bos = str(tokenizer.bos_token or "")
    # `encode_prompt` lets the tokenizer add its own beginning-of-sequence token: drop the template's, once.
    adds_bos = bos and tokenizer(text="a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds_bos else text


def message_text(message: Mapping[str, Any], think: tuple[str, str] = ("<think>\n", "\n</think>\n\n")) -> str:
    """The trace in an assistant message: its reasoning, if it has one, between the template's marks, then its content.

    Args:
        message: with ``content`` and possibly one of `REASONING_FIELDS`.
        think: the text before and after the reasoning.

    Raises:
        ValueError: the reasoning or the content is not text; names the field.
    """
    reasoning = ""
    for name in REASONING_FIELDS:
        value = message.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} is {type(value).__name__}, not text")
        reasoning = reasoning or value or ""
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise ValueError(f"content is {type(content).__name__}, not text")
    if not reasoning.strip():
        return content or ""
    before, after = think
    return f"{before}{reasoning.strip()}{after}{(content or '').lstrip()}"


def row_location(row: dict) -> str:
    """Location of a row in error messages."""
    return row.get("source", "a row")


def _plain_completion(row: dict) -> str | None:
    """Completion as text: itself, or the content of its one assistant message."""
    completion = row["completion"]
    if completion is None or isinstance(completion, str):
        return completion
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in completion)
        raise InputError(f"{row_location(row)}: the completion must be one assistant message, not: {roles}")
    return message_text(completion[0]).rstrip()
