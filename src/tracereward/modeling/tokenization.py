"""Rendering and encoding of prompts and completions, shared by training, sampling, scoring and serving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tracereward.errors import InputError, check_choice

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPLATES = ("plain", "chat")


def render(rows: list[dict], tokenizer: PreTrainedTokenizerBase, template: str) -> list[dict]:
    """Render prompts and completions to the exact texts that are tokenised; returns new rows.

    Args:
        rows: demonstrations, with texts or lists of ``{"role", "content"}`` messages.
        tokenizer: the policy's.
        template: ``plain`` keeps texts; ``chat`` applies the tokenizer's chat template to each prompt, up to the start
            of the assistant's turn. The completion is then the assistant's plain text.

    Raises:
        InputError: unknown template, messages under ``plain``, a tokenizer without a chat template, messages that the
            template refuses, or a completion that is not one assistant message.
    """
    return [
        {
            **row,
            "prompt": render_prompt(tokenizer, row["prompt"], template, row_location(row)),
            "completion": _plain_completion(row),
        }
        for row in rows
    ]


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], template: str, where: str) -> str:
    """The exact text of a prompt that is tokenised; see `render`.

    Args:
        tokenizer: of the model that reads it.
        prompt: a text or ``{"role", "content"}`` messages.
        template: ``plain`` or ``chat``.
        where: location of the row in error messages.

    Raises:
        InputError: unknown template, messages under ``plain``, a tokenizer without a chat template, or messages that
            the template refuses.
    """
    check_choice("template", template, TEMPLATES)
    if template == "plain":
        if not isinstance(prompt, str):
            raise InputError(f"{where}: the prompt is a list of messages: use --template chat")
        return prompt
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise InputError(f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template: use --template plain")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise InputError(f"{where}: the chat template refuses the prompt: {error}") from error
    bos = str(tokenizer.bos_token or "")
    # `encode_prompt` lets the tokenizer add its own beginning-of-sequence token: drop the template's, once.
    adds_bos = bos and tokenizer(text="a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds_bos else text


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
    return completion[0]["content"].rstrip()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a rendered prompt, with the tokenizer's own special tokens, as TRL's GRPOTrainer does it."""
    return tokenizer(text=text)["input_ids"]  # type: ignore[return-value]


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str, finished: bool = True) -> list[int]:
    """Token ids of a completion as a rollout has them: no special token except, if finished, one end-of-sequence token.

    A completion that spells a special token out (``<|im_end|>``) is encoded as ordinary text: a policy must not be able
    to hide something from the reward model by writing it.

    Args:
        tokenizer: of the model that reads the ids.
        text: the completion.
        finished: whether the trace ended by itself; one cut off at a length limit has no end-of-sequence token.

    Raises:
        InputError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path or 'the tokenizer'} has no end-of-sequence token")
    encoding: Any = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return encoding["input_ids"] + [tokenizer.eos_token_id] * finished


def load_tokenizer(name: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """A tokenizer that pads at the left and has a padding and an end-of-sequence token.

    Raises:
        InputError: it cannot be loaded, has tokens that the model's embedding lacks, or no end-of-sequence token.
    """
    from tracereward.modeling.loading import read_tokenizer

    tokenizer = read_tokenizer(name, revision=revision)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{name}: the tokenizer has no end-of-sequence token, so traces could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token's id; 0 if there is none, because padding is masked anyway."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0


def same_tokenizer(policy: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers agree on vocabulary, end-of-sequence token and the encoding of a probe text."""
    probe = "Step 1: 12,345 + 6.5 = 12,351.5\n\nSo the answer is (C). \\boxed{x^2}"
    return (
        policy.get_vocab() == other.get_vocab()
        and policy.eos_token_id == other.eos_token_id
        and policy(probe)["input_ids"] == other(probe)["input_ids"]
    )


def eos_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those of the model's generation config."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [declared] if isinstance(declared, int) else list(declared or [])
    assert isinstance(tokenizer.eos_token_id, int)
    return sorted({*ids, tokenizer.eos_token_id})
