"""Encoding of prompts and completions, shared by training, sampling, scoring and serving."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

from tracereward.console import note
from tracereward.errors import InputError
from tracereward.modeling.rendering import Rendering, check_rendering, think_marks, turn_end
from tracereward.modeling.seam import continued, without_end_marks

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TAG = re.compile(
    r"(?:<\|?|\[|◁)/?(?:\w+:)?(?:(?:begin|start|end)_of_)?"
    r"(?:think|thinking|thoughts?|reason|reasoning|reflection|scratchpad|solution|answer)"
    r"(?:_(?:start|end))?(?:\|?>|\]|▷)",
    re.IGNORECASE,
)
"""Tokens that structure a trace, as reasoning models spell them: ``<think>``, ``[/THINK]``, ``<|end_of_thought|>``."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a rendered prompt: one beginning-of-sequence token if the tokenizer or the text has one, no end.

    The token stands once, whether the tokenizer adds it, or the text has it because a chat template or the user wrote
    it; so do other tokens that a tokenizer adds before every text. Tokens that it adds behind every text
    (``add_eos_token``) are left out: a completion follows.
    """
    encoded: Any = tokenizer(text=without_added(tokenizer, text))
    ids = list(encoded["input_ids"])
    return ids[: len(ids) - len(added_ids(tokenizer)[1])]


def without_added(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text without the special tokens at its start that the tokenizer adds itself; see `encode_prompt`."""
    before, _ = added_ids(tokenizer)
    added = "".join(tokenizer.convert_ids_to_tokens(before))
    while added and text.startswith(added):
        text = text.removeprefix(added)
    bos = tokenizer.bos_token
    if isinstance(bos, str) and bos and text.startswith(bos):
        while text.startswith(bos):
            text = text.removeprefix(bos)
        text = text if tokenizer.bos_token_id in before else bos + text
    return text


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

    End marks at the end of the text (see `seam.without_end_marks`) are that end, as are special tokens of the tokenizer
    that are spelled out there: they are taken off, and the trace is finished. Elsewhere a completion that spells a
    special token out (``<|im_start|>``) is encoded as ordinary text: by writing it, a policy must not be able to hide
    something from the reward model. Tokens that were added to the vocabulary but are not special, as ``<think>`` of
    reasoning models (see `load_tokenizer`), are one token, as in a rollout.

    Args:
        tokenizer: of the model that reads the ids.
        text: the completion.
        finished: whether the trace ended by itself; one cut off at a length limit has no end-of-sequence token.

    Raises:
        InputError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path or 'the tokenizer'} has no end-of-sequence token")
    text, ended = without_ends(tokenizer, text)
    encoding: Any = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return encoding["input_ids"] + [tokenizer.eos_token_id] * (finished or ended)


def without_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, bool]:
    """A completion without end marks, well-known ones and the tokenizer's own, and whether it had any.

    Its own are the special tokens that could end a text: all but the beginning of a sequence, unknown and padding.
    """
    special: list[str] = []
    if text.rstrip().endswith((">", "]")):  # hardly ever: the list is long
        others = (tokenizer.bos_token, tokenizer.unk_token, tokenizer.pad_token)
        added = tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special and token.content not in others]
    return without_end_marks(text, str(tokenizer.eos_token), *special)


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
    """A tokenizer that pads at the left, has a padding and an end-of-sequence token, and keeps reasoning tags.

    Raises:
        InputError: it cannot be loaded, has tokens that the model's embedding lacks, or no end-of-sequence token.
    """
    from tracereward.modeling.loading import read_tokenizer

    tokenizer = read_tokenizer(name)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{name}: the tokenizer has no end-of-sequence token, so traces could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    keep_tags(tokenizer)
    return tokenizer


def keep_tags(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make special tokens that structure a trace ordinary ones of the vocabulary.

    Some tokenizers declare ``<think>`` special. Decoding would then drop it from the text of a rollout, and encoding a
    trace would spell it out in letters: experts and rollouts would differ in their first token. Affected are reasoning
    tags and what the chat template writes around the reasoning, but never the tokens that end or pad a text.
    """
    kept = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special and token.content not in kept}
    tags = {content for content in special if _TAG.fullmatch(content)}
    if tokenizer.chat_template and special:
        around = "".join(think_marks(tokenizer, Rendering(template="chat")))
        tags |= {content for content in special if content in around}
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not tags or backend is None:
        return
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in tags
    tokenizer._tokenizer = type(backend).from_str(json.dumps(spec))
    extra = [token for token in tokenizer._extra_special_tokens if str(token) not in tags]
    tokenizer._extra_special_tokens = extra


def end_as(policy: PreTrainedTokenizerBase, reward_model: PreTrainedTokenizerBase, name: str) -> None:
    """Let a policy's tokenizer name the end-of-sequence token that the reward model knows, if the policy has it too.

    Args:
        policy: the policy's tokenizer, which is changed.
        reward_model: the reward model's.
        name: folder or Hub id of the policy, whose generation config lists its end tokens.
    """
    from tracereward.modeling.loading import end_ids

    if policy.eos_token_id == reward_model.eos_token_id or not same_vocabulary(policy, reward_model):
        return
    if reward_model.eos_token_id in end_ids(name):
        policy.eos_token = reward_model.eos_token


def without_tags(text: str) -> str:
    """A text without reasoning tags, which decoding drops where they are special tokens."""
    return _TAG.sub("", text)


def policy_tokenizer(name: str, rendering: Rendering) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy that is trained on rendered prompts; its end-of-sequence token is the one it writes.

    Under ``chat`` that is the token with which the template ends a turn (``<end_of_turn>``), where the model's
    generation config lists it as an end: its tokenizer may name another (``<eos>``), which only experts would have.

    Raises:
        InputError: see `load_tokenizer` and `check_rendering`.
    """
    from tracereward.modeling.loading import end_ids

    tokenizer = load_tokenizer(name)
    check_rendering(tokenizer, rendering)
    mark = turn_end(tokenizer, rendering)
    if mark is None or mark == tokenizer.eos_token:
        return tokenizer
    if tokenizer.convert_tokens_to_ids(mark) in end_ids(name):
        note(f"{name}: traces end with {mark}, as its chat template ends a turn, not with {tokenizer.eos_token}")
        tokenizer.eos_token = mark
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token's id; 0 if there is none, because padding is masked anyway."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0


def same_vocabulary(policy: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers agree on vocabulary and the encoding of a probe text: ids of one mean the same to both."""
    probe = "Step 1: 12,345 + 6.5 = 12,351.5\n\nSo the answer is (C). \\boxed{x^2}"
    return policy.get_vocab() == other.get_vocab() and policy(probe)["input_ids"] == other(probe)["input_ids"]


def same_tokenizer(policy: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """As `same_vocabulary`, and with the same end-of-sequence token."""
    return policy.eos_token_id == other.eos_token_id and same_vocabulary(policy, other)


def eos_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those of the model's generation config."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [declared] if isinstance(declared, int) else list(declared or [])
    assert isinstance(tokenizer.eos_token_id, int)
    return sorted({*ids, tokenizer.eos_token_id})


def with_own_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Container[int]) -> list[int]:
    """A rollout with the tokenizer's end-of-sequence token, whichever of `ends` the policy wrote.

    Texts are encoded with the tokenizer's: another one would mark a trace as the policy's.
    """
    assert isinstance(tokenizer.eos_token_id, int)
    return [*ids[:-1], tokenizer.eos_token_id] if ids and ids[-1] in ends else list(ids)
