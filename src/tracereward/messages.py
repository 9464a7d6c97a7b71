"""Chat messages: their shape, and the text in them. Nothing in a message is dropped: it is read or refused by name."""

from collections.abc import Mapping
from typing import Any

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields of an assistant message that hold the reasoning before its content, as servers and data sets spell them."""
THINK = ("<think>\n", "\n</think>\n\n")
"""The text before and after the reasoning, where the chat template has none of its own."""
READ = ("role", "content", *REASONING_FIELDS)
ABOUT = ("name", "id")
"""Fields that name a message or its author: no content, so that a template need not read them."""
SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Authors of messages with ``from`` and ``value``."""


def read_sharegpt(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without its null fields, with role and content where it has ShareGPT's ``from`` and ``value``."""
    found = {key: value for key, value in message.items() if value is not None}
    if "from" not in found or "role" in found:
        return found
    author = found["from"]
    rest = {key: value for key, value in found.items() if key not in ("from", "value")}
    return {"role": SHAREGPT.get(str(author), author), "content": found.get("value")} | rest


def check_messages(messages: object, field: str) -> None:
    """Raise ValueError unless `messages` is a non-empty list of ``{"role": text, "content": text}``.

    The content may be a list of text parts; an assistant's may be missing if its reasoning is given.
    """
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        kind = type(messages).__name__
        raise ValueError(f"field {field!r} is {kind}, neither text nor a list of {{role, content}} messages")
    for message in messages:
        if "content" not in message and not reasoning_of(message) and not other_fields(message):
            raise ValueError(f"field {field!r}: a message has no content")
        content_text(message.get("content"))
        if message["role"] != "assistant" and reasoning_of(message):
            raise ValueError(
                f"field {field!r}: a message of role {message['role']!r} has reasoning; only an assistant's may"
            )
    if not any(content_text(m.get("content")).strip() or reasoning_of(m) or other_fields(m) for m in messages):
        raise ValueError(f"field {field!r} is empty")


def content_text(content: object) -> str:
    """The text of a message's content: itself, its text parts joined, or "" if there is none.

    Raises:
        ValueError: the content is of another type, or a part is not text; names it.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"content is {type(content).__name__}, neither text nor a list of text parts")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"content has a part of type {kind!r}; only text is read")
    return "".join(texts)


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning of an assistant message, "" if it has none.

    Raises:
        ValueError: a field of it is not text, or two differ; names it.
    """
    found = {name: message[name] for name in REASONING_FIELDS if message.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} is {type(value).__name__}, not text")
    texts = {name: value for name, value in found.items() if value.strip()}
    if len(set(texts.values())) > 1:
        raise ValueError(f"{' and '.join(texts)} differ; keep one")
    return next(iter(texts.values()), "")


def other_fields(message: Mapping[str, Any]) -> list[str]:
    """Fields that hold content which no text of the message has, such as ``tool_calls``."""
    return [
        name
        for name, value in message.items()
        if name not in READ + ABOUT and isinstance(value, (str, list, tuple, dict)) and len(value)
    ]


def message_text(message: Mapping[str, Any], think: tuple[str, str] = THINK) -> str:
    """The trace in an assistant message: its reasoning, if it has one, between the template's marks, then its content.

    Args:
        message: with ``content``, and possibly one of `REASONING_FIELDS`.
        think: the text before and after the reasoning.

    Raises:
        ValueError: the reasoning or the content is not text, or the message has other content; names the field.
    """
    others = other_fields(message)
    if others:
        raise ValueError(f"{others[0]} of a message is not read: only its content and reasoning are; remove it")
    reasoning, content = reasoning_of(message).strip("\n"), content_text(message.get("content"))
    if not reasoning:
        return content
    if not content.strip():  # cut off while it reasoned
        return f"{think[0]}{reasoning}"
    return think[0] + reasoning + think[1] + content.lstrip("\n")


ENDED = (None, "stop", "eos_token")
"""Finish reasons of samples that ended by themselves; with any other the end of sequence is not scored."""


def read_choice(choice: Mapping[str, Any], think: tuple[str, str] = THINK) -> tuple[str, str, bool]:
    """The sample in a choice of an OpenAI-compatible server, of chat or text completions.

    Args:
        choice: as the server returns it.
        think: the text before and after the reasoning.

    Returns:
        The trace with its reasoning, the content alone, and whether it ended by itself: not at a length limit or a stop
        string.

    Raises:
        ValueError: it has tool calls, or something else than text.
    """
    # vLLM and SGLang name the stop string that was found here; a number is an end-of-sequence id.
    stopped = any(isinstance(choice.get(name), str) for name in ("stop_reason", "matched_stop"))
    message = choice.get("message")
    if not isinstance(message, dict):
        message = {"content": choice.get("text")}
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise ValueError(f"it has {name}")
    text, content = message_text(message, think), content_text(message.get("content"))
    return text, content, choice.get("finish_reason") in ENDED and not stopped
