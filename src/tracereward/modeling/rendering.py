"""Rendering of prompts and completions to the exact texts that are tokenised: one place for all commands.

A chat template that reads the clock (``strftime_now``, as Llama 3.1's) is given the day of `Rendering.date`, so that a
prompt is the same text in training, in scoring, in a resumed run and on any other day.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from tracereward.errors import InputError, check_choice
from tracereward.messages import READ, THINK, content_text, message_text, other_fields, reasoning_of
from tracereward.modeling.seam import continued, without_end_marks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = ("plain", "chat")
FIXED_DATE = "2024-07-26"
"""The day that a template writes unless a model stores another: the fallback in Llama 3's templates."""
CLOCK = "strftime_now"
"""The function by which a chat template reads the clock; transformers defines it."""
RESERVED = (
    "messages",
    "conversation",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "sanitize_control_tokens",
    CLOCK,
)
"""Arguments of `apply_chat_template` that are not variables of the template, or that are set here."""


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How a conversation becomes the text of a prompt.

    Attributes:
        template: ``plain`` keeps texts; ``chat`` applies the tokenizer's chat template.
        chat_template_kwargs: variables for the chat template, such as ``enable_thinking``.
        date: the day, as ``YYYY-MM-DD``, that a chat template which reads the clock writes; "" is `FIXED_DATE`.

    Raises:
        InputError: a value is unknown, or an option would have no effect.
    """

    template: str = "plain"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""

    def __post_init__(self) -> None:
        check_choice("template", self.template, TEMPLATES)
        given = self.chat_template_kwargs
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise InputError(
                f"chat_template_kwargs must map names to values, as in {{'enable_thinking': false}}: {given!r}"
            )
        if given and self.template == "plain":
            raise InputError(
                f"chat_template_kwargs ({', '.join(given)}) need --template chat: plain uses no chat template"
            )
        for name in given:
            if name in RESERVED:
                raise InputError(f"chat_template_kwargs: {name} is no variable of a chat template that can be set")
        try:
            json.dumps(dict(given))
        except (TypeError, ValueError) as error:
            raise InputError(f"chat_template_kwargs must be values of JSON: {error}") from error
        if self.date:
            parse_date(self.date)


def parse_date(text: str) -> datetime.date:
    """The day of a text as ``YYYY-MM-DD``.

    Raises:
        InputError: it is none.
    """
    try:
        return datetime.date.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise InputError(f"the template's date must be a day as YYYY-MM-DD, not {text!r}") from error


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the tokenizer's chat template.

    Raises:
        InputError: it has none.
    """
    if not tokenizer.chat_template:
        raise InputError(f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template: use --template plain")
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # several templates, none of them named default
        raise InputError(f"{tokenizer.name_or_path or 'the tokenizer'}: {error}") from error


def check_rendering(tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> None:
    """Check that the tokenizer has what a rendering needs, and that each of its variables has an effect.

    Raises:
        InputError: no chat template, or one that does not read a variable.
    """
    if rendering.template == "plain":
        return
    text = chat_template_of(tokenizer)
    for name in rendering.chat_template_kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", text):
            raise InputError(
                f"chat_template_kwargs: the chat template of {tokenizer.name_or_path or 'the tokenizer'} does not read "
                f"{name}; remove it"
            )


def dated(rendering: Rendering, tokenizer: PreTrainedTokenizerBase) -> Rendering:
    """The rendering with the day that the chat template writes, to be stored with a model; "" if it reads no clock."""
    if rendering.template == "plain" or CLOCK not in chat_template_of(tokenizer):
        return replace(rendering, date="")
    return replace(rendering, date=rendering.date or FIXED_DATE)


def render(rows: list[dict], tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> list[dict]:
    """Render prompts and completions to the exact texts that are tokenised; returns new rows.

    A completion continues its prompt: what the prompt already opened (``<think>``) is not opened again.

    Args:
        rows: demonstrations, with texts or lists of ``{"role", "content"}`` messages.
        tokenizer: the policy's.
        rendering: ``plain`` keeps texts; ``chat`` applies the tokenizer's chat template to each prompt, up to the start
            of the assistant's turn. The completion is then the assistant's plain text.

    Raises:
        InputError: messages under ``plain``, a tokenizer without a chat template, messages that the template refuses,
            or a completion that is not one assistant message.
    """
    check_rendering(tokenizer, rendering)
    messages = any(isinstance(row["completion"], list) for row in rows)
    think = think_marks(tokenizer, rendering) if messages else THINK
    rendered = []
    for row in rows:
        where = row_location(row)
        prompt = render_prompt(tokenizer, row["prompt"], rendering, where)
        text = _completion_text(row["completion"], think, where)
        rendered.append({**row, "prompt": prompt, "completion": None if text is None else continued(prompt, text)})
    return rendered


def check_reasoning(rows: list[dict], tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> None:
    """Refuse rendered demonstrations that reason where their prompt has closed the reasoning already.

    Raises:
        InputError: names the row and the fix.
    """
    if rendering.template == "plain":
        return
    opening, closing = (mark.strip() for mark in think_marks(tokenizer, rendering))
    for row in rows:
        if row["prompt"].rstrip().endswith(closing) and (row["completion"] or "").lstrip().startswith(opening):
            raise InputError(
                f"{row_location(row)}: the completion opens the reasoning ({opening}), which the chat template has "
                f"closed in the prompt ({closing}): remove the reasoning, or the option in --chat_template_kwargs"
            )


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], rendering: Rendering, where: str
) -> str:
    """The exact text of a prompt that is tokenised; see `render`.

    A conversation whose last message is the assistant's is continued: that message stays open.

    Args:
        tokenizer: of the model that reads it.
        prompt: a text or ``{"role", "content"}`` messages.
        rendering: how it becomes text.
        where: location of the row in error messages.

    Raises:
        InputError: messages under ``plain``, a tokenizer without a chat template, messages that the template refuses,
            or that have a field which it does not read.
    """
    if rendering.template == "plain":
        return plain_prompt(prompt, where)
    from jinja2 import TemplateError

    template = chat_template_of(tokenizer)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        messages = [_as_read(message, template) for message in messages]
        text = _applied(tokenizer, messages, rendering)
        _check_written(messages, text)
    except (TemplateError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        problem = "the chat template refuses the prompt: " if isinstance(error, TemplateError) else ""
        raise InputError(f"{where}: {problem}{' '.join(str(error).split())}") from error
    if header := _header_at_end(prompt, text):
        raise InputError(
            f"{where}: the prompt is rendered already, it ends with {header!r}: give the question alone, or use "
            "--template plain"
        )
    return text


def plain_prompt(prompt: str | list[dict], where: str) -> str:
    """A prompt that is a text already.

    Raises:
        InputError: it is a list of messages.
    """
    if not isinstance(prompt, str):
        raise InputError(f"{where}: the prompt is a list of messages: use --template chat")
    return prompt


def _check_written(messages: list[dict], text: str) -> None:
    """ValueError if the template has left out a question: some for images read lists of parts only.

    Templates may take commands such as ``/no_think`` off a message, so that its start or its end suffices.
    """
    for message in messages:
        content = str(message.get("content") or "").strip()
        if message["role"] == "user" and content and content[:20] not in text and content[-20:] not in text:
            raise ValueError(f"the chat template leaves out the user's message {content[:40]!r}: use --template plain")


_ASSISTANT = re.compile(
    r"(?:<\|(?:im_start|start)\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model"
    r"|<\|turn>model|\[/INST\]|<[|\uff5c][Aa]ssistant[|\uff5c]>|<\|CHATBOT_TOKEN\|>)\s*(?:<think>\s*)?\Z"
)
"""How the chat templates of well-known models open the assistant's turn."""


def _header_at_end(prompt: str | list[dict], rendered: str) -> str:
    """What a chat template, this one or a well-known one, has written at the end of a prompt; "" if nothing."""
    asked = prompt.strip() if isinstance(prompt, str) else ""
    if foreign := _ASSISTANT.search(asked[-200:]):
        return foreign[0].strip()
    header = rendered.rpartition(asked)[2].strip() if asked else ""
    return header if header and asked.endswith(header) else ""


def is_rendered(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], rendering: Rendering) -> bool:
    """Whether a prompt is a text that the chat template has been applied to already."""
    if rendering.template == "plain" or not isinstance(prompt, str):
        return False
    return bool(_header_at_end(prompt, _applied(tokenizer, [{"role": "user", "content": prompt}], rendering)))


def _as_read(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """A message of a prompt as the template reads it; ValueError if the template does not read one of its fields."""
    for name in other_fields(message):
        if name not in template:
            raise ValueError(f"{name} of a message is not read by the chat template; remove it")
    reasoning = reasoning_of(message)
    named = [name for name in READ[2:] if message.get(name)]
    if reasoning and not any(name in template for name in READ[2:]):
        raise ValueError(
            f"{named[0]} of a message is not read by the chat template; put it into the content or remove it"
        )
    kept = {name: value for name, value in message.items() if name not in READ and value is not None}
    if reasoning:  # under each name, as templates differ in what they read
        kept |= {name: reasoning for name in READ[2:]}
    if "content" in message:
        kept["content"] = content_text(message["content"])
        if message["role"] == "assistant":  # the template writes the end of a turn itself
            kept["content"] = without_end_marks(kept["content"])[0]
    return {"role": message["role"], **kept}


def _applied(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], rendering: Rendering, answer: bool = True
) -> str:
    """The text of a conversation, up to the assistant's turn or within it; with `answer` false up to its end."""
    continues = answer and messages[-1]["role"] == "assistant"
    return str(
        tokenizer.apply_chat_template(
            messages,
            chat_template=_with_date(chat_template_of(tokenizer), rendering.date or FIXED_DATE),
            add_generation_prompt=answer and not continues,
            continue_final_message=continues,
            tokenize=False,
            **rendering.chat_template_kwargs,
        )
    )


@lru_cache
def _with_date(template: str, date: str) -> str:
    """A chat template whose clock stands at midnight of a day.

    A macro hides the function that transformers defines. Values passed to the template cannot: since 5.2x transformers
    lets only plain data through. The macro replaces each directive of `strftime` by its value on that day.
    """
    if CLOCK not in template:
        return template
    day = datetime.datetime.combine(parse_date(date), datetime.time())
    letters = "aAwdbBmyYHIMpSfzZjUWcxXGuVDeFhklPrRTC"
    # "%%" is hidden first, so that "%%d" is not taken for "%" and "%d".
    values = {"%%": "\0"}
    values |= {f"%-{letter}": str(int(day.strftime(f"%{letter}"))) for letter in "dmyHIMSj"}
    for letter in letters:
        value = day.strftime(f"%{letter}")
        if value != f"%{letter}":  # a directive that this platform knows
            values[f"%{letter}"] = value
    values["\0"] = "%"
    chain = "".join(f"|replace({json.dumps(old)}, {json.dumps(new)})" for old, new in values.items())
    # The newline ends the macro's line: trim_blocks removes it, and the template starts on a line of its own.
    return f"{{%- macro {CLOCK}(format) -%}}{{{{ format{chain} }}}}{{%- endmacro %}}\n{template}"


def think_marks(tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> tuple[str, str]:
    """The texts that the chat template writes before and after the reasoning of an assistant message.

    They are read off the template's own rendering of such a message; `messages.THINK` if it does not support reasoning.
    """
    if rendering.template == "plain":
        return THINK
    from jinja2 import TemplateError

    asked, thought, said = "Aa0question0aA", "Aa0reasoning0aA", "Aa0content0aA"
    user, again = {"role": "user", "content": asked}, {"role": "user", "content": "and then?"}
    reasoned = {"role": "assistant", "content": said, **{name: thought for name in READ[2:]}}
    found = THINK
    try:
        opened = _applied(tokenizer, [user], rendering).split(asked)[-1]
        earlier = _applied(tokenizer, [user, {"role": "assistant", "content": said}, again], rendering)
        header = _common_start(opened, earlier.split(asked)[1].split(said)[0])
        whole = _applied(tokenizer, [user, reasoned], rendering, answer=False).split(asked)[-1]
        if header and whole.startswith(header) and thought in whole and said in whole.split(thought)[1]:
            before, after = whole.removeprefix(header).split(thought, 1)
            found = before, after.split(said)[0]
        elif tag := re.search(r"<(\w+)>\s*\Z", opened.removeprefix(header)):  # opened by the template, closed by nobody
            found = opened.removeprefix(header), f"\n</{tag[1]}>\n\n"
    except (TemplateError, ValueError, TypeError, IndexError):  # a template for conversations of another shape
        pass
    return found if all(mark.strip() for mark in found) else THINK


def turn_end(tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> str | None:
    """The special token with which the chat template ends the assistant's turn; None if there is none."""
    if rendering.template == "plain":
        return None
    from jinja2 import TemplateError

    said = "Aa0content0aA"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": said}]
    try:
        behind = _applied(tokenizer, turns, rendering, answer=False).split(said)[-1].lstrip()
    except (TemplateError, ValueError, TypeError):  # a template for conversations of another shape
        return None
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return next((content for content in special if behind.startswith(content)), None)


def completion_text(
    tokenizer: PreTrainedTokenizerBase, completion: str | list[dict], rendering: Rendering, where: str
) -> str:
    """A completion as text: itself, or the reasoning and content of its one assistant message.

    Raises:
        InputError: it is not one assistant message; names `where`.
    """
    if isinstance(completion, str):
        return completion
    return _completion_text(completion, think_marks(tokenizer, rendering), where) or ""


def _common_start(text: str, other: str) -> str:
    return "".join(a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(text, other)))


def row_location(row: dict) -> str:
    """Location of a row in error messages."""
    return row.get("source", "a row")


def _completion_text(completion: str | list[dict] | None, think: tuple[str, str], where: str) -> str | None:
    """Completion as text: itself, or the reasoning and content of its one assistant message."""
    if completion is None or isinstance(completion, str):
        return completion
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in completion)
        raise InputError(f"{where}: the completion must be one assistant message, not: {roles}")
    try:
        return message_text(completion[0], think).rstrip()
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
