"""Encoding of prompts and completions, shared by training, sampling, scoring and serving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tracereward.errors import InputError
from tracereward.modeling.seam import continued, without_end_marks

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a rendered prompt: one beginning-of-sequence token if the tokenizer or the text has one, no end.

    The token stands once, whether the tokenizer adds it, or the text has it because a chat template or the user wrote
    it. Tokens that a tokenizer adds behind every text (``add_eos_token``) are left out: a completion follows.
    """
    before, after = added_ids(tokenizer)
    bos = tokenizer.bos_token
    if isinstance(bos, str) and bos and text.startswith(bos):
        bare = text
        while bare.startswith(bos):
            bare = bare.removeprefix(bos)
        text = bare if tokenizer.bos_token_id in before else bos + bare
    encoded: Any = tokenizer(text=text)
    ids = list(encoded["input_ids"])
    return ids[: len(ids) - len(after)]


def added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer adds before and behind a text."""
    probe = "a"
    found: Any = tokenizer(text=probe)["input_ids"]
    bare: Any = tokenizer(text=probe, add_special_tokens=False)["input_ids"]
    for start in range(len(found) - len(bare) + 1):
        if bare and found[start : start + len(bare)] == bare:
            return list(found[:start]), list(found[start + len(bare) :])
    ends = len(found) > 0 and found[-1] == tokenizer.eos_token_id  # no token for the probe: only what was added
    return (list(found[:-1]), list(found[-1:])) if ends else (list(found), [])


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str, finished: bool = True) -> list[int]:
    """Token ids of a completion as a rollout has them: no special token except, if finished, one end-of-sequence token.

    End marks at the end of the text (see `seam.without_end_marks`) are that end: they are taken off, and the trace is
    finished. A completion that spells another special token out (``<|im_start|>``) is encoded as ordinary text: by
    writing it, a policy must not be able to hide something from the reward model. Tokens that were added to the
    vocabulary but are not special, as reasoning models have for ``<think>``, are one token, as in a rollout.

    Args:
        tokenizer: of the model that reads the ids.
        text: the completion.
        finished: whether the trace ended by itself; one cut off at a length limit has no end-of-sequence token.

    Raises:
        InputError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path or 'the tokenizer'} has no end-of-sequence token")
    text, ended = without_end_marks(text, str(tokenizer.eos_token))
    encoding: Any = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return encoding["input_ids"] + [tokenizer.eos_token_id] * (finished or ended)


def encode_trace(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, finished: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of a rendered prompt and of the completion that continues it.

    The one encoding of texts for training, scoring and serving; see `encode_prompt`, `seam.continued` and
    `encode_completion`.
    """
    return (
        encode_prompt(tokenizer, prompt),
        encode_completion(tokenizer, continued(prompt, completion), finished),
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer that pads at the left and has a padding and an end-of-sequence token.

    Raises:
        InputError: it cannot be loaded, has tokens that the model's embedding lacks, or no end-of-sequence token.
    """
    from tracereward.modeling.loading import read_tokenizer

    tokenizer = read_tokenizer(name)
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
