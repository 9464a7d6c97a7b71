"""Encoding of prompts and completions, shared by training, sampling, scoring and serving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tracereward.errors import InputError, first_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        InputError: it cannot be loaded, or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="left")
    except Exception as error:
        raise InputError(f"{name}: the tokenizer cannot be loaded ({first_line(error)})") from error
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
