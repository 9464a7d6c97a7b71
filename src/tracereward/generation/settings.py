"""The one place that sets how completions are sampled: the options of transformers' `generate`, vLLM and servers.

Left alone, `generate` takes whatever the model's ``generation_config.json`` recommends for chat (a repetition penalty,
min-p, suppressed tokens, ...), so that "greedy" is not argmax and samples are not the policy's. Here a call has our own
options, the tokens that end a trace, and nothing else. What the file recommends is used only when asked for.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tracereward.console import note
from tracereward.errors import InputError, RunFailed
from tracereward.generation.params import SamplingParams
from tracereward.modeling.loading import read_generation_config
from tracereward.modeling.tokenization import eos_ids, pad_id

NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "top_h": None,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": None,
    "guidance_scale": None,
    "num_beams": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "token_healing": False,
    "watermarking_config": None,
    "stop_strings": None,
    "max_time": None,
}
"""Settings of a generation config that change which tokens are chosen, each with the value that changes nothing."""

NOT_SAMPLING = tuple(NEUTRAL)[tuple(NEUTRAL).index("num_beams") :]
"""Those that are never used: they search, look back, or end a trace without an end token."""

OF_SAMPLING = ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Those that greedy decoding does not have."""

VLLM_NAMES = {
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
}
"""Settings of a generation config that vLLM has too, by its name for them."""

STANDARD: dict[str, Any] = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
OTHER: dict[str, Any] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Values that change nothing, of OpenAI's options and of those that vLLM, SGLang and llama.cpp add to them.

Servers have defaults of their own (llama.cpp's top-k is 40; vLLM reads the model's ``generation_config.json``), so that
they are sent. -1 is no limit to all three.
"""

NOT_FINITE = "the policy's token probabilities are not finite: its weights are damaged, or too large for its dtype"


def generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    sampling: SamplingParams | None = None,
    **options: Any,
) -> GenerationConfig:
    """A complete config: ours, with the end tokens of the tokenizer and of the model's own config.

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        max_new_tokens: length limit.
        sampling: how to sample; None, or temperature 0, is greedy decoding.
        **options: further fields.
    """
    fields: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": eos_ids(model, tokenizer),
        "pad_token_id": pad_id(tokenizer),
        "do_sample": False,
    }
    settings = {} if sampling is None else sampling.settings
    if sampling is not None and sampling.temperature:
        fields |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    else:
        settings = {name: value for name, value in settings.items() if name not in OF_SAMPLING}
    return GenerationConfig(**{**fields, **settings, **options})


def vllm_settings(sampling: SamplingParams) -> dict[str, Any]:
    """Fields of vLLM's ``SamplingParams`` that choose the tokens; its defaults for all others change nothing.

    Raises:
        InputError: `sampling` has a setting that vLLM lacks.
    """
    settings = dict(sampling.settings)
    if not sampling.temperature:
        settings = {name: value for name, value in settings.items() if name not in OF_SAMPLING}
    if unknown := [name for name in settings if name not in VLLM_NAMES]:
        raise InputError(
            f"--engine vllm does not have {', '.join(unknown)}, which the generation_config.json asks for: use "
            "--engine transformers, or leave out --use-generation-config"
        )
    given = {VLLM_NAMES[name]: value for name, value in settings.items()}
    top_p = sampling.top_p if sampling.temperature else 1.0
    return {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": top_p, **given}


def server_settings(sampling: SamplingParams) -> dict[str, Any]:
    """Fields of a request to a server that choose the tokens; all but `STANDARD` and `OTHER`, which are neutral."""
    given = {"top_p": sampling.top_p} if sampling.temperature and sampling.top_p < 1 else {}
    return {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, **given}


def run_generate(model: PreTrainedModel, config: GenerationConfig, **inputs: Any) -> Tensor:
    """`model.generate` with the options of `config` alone.

    Raises:
        RunFailed: the token probabilities are not finite.
    """
    try:
        with only(model, config):
            return model.generate(generation_config=config, **inputs)  # pyright: ignore[reportCallIssue, reportReturnType]
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):  # torch.multinomial
            raise
        raise RunFailed(NOT_FINITE) from error


@contextlib.contextmanager
def only(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Let `generate` find `config` as the model's own: it fills fields that are None from there.

    Says once a model what its ``generation_config.json`` recommends and is not used.
    """
    owner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = owner.generation_config
    if own is not None:
        ignored = {name: value for name, value in recommended(own).items() if getattr(config, name, None) != value}
        if ignored:
            _say_ignored(f"{owner.name_or_path or 'the model'}: {_listed(ignored)}")
    owner.generation_config = config
    try:
        yield
    finally:
        owner.generation_config = own


def recommended(config: GenerationConfig) -> dict[str, Any]:
    """The settings of a model's generation config that change which tokens are chosen."""
    values = config.to_dict()
    return {name: values[name] for name, neutral in NEUTRAL.items() if values.get(name) not in (None, neutral)}


def recommended_options(model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `SamplingParams` that a model's ``generation_config.json`` recommends; says which.

    Args:
        model: folder or Hub id of the policy.
        given: temperature and top_p where the user gave them, which then win.

    Raises:
        InputError: the model has no such file, or it asks for `NOT_SAMPLING`.
    """
    config = read_generation_config(model)
    if config is None:
        raise InputError(f"{model}: no generation_config.json to use")
    settings = recommended(config)
    if other := {name: value for name, value in settings.items() if name in NOT_SAMPLING}:
        raise InputError(f"{model}: its generation_config.json asks for {_listed(other)}, which sampling does not do")
    settings = {name: value for name, value in settings.items() if name not in given}
    if given.get("temperature") == 0:
        settings = {name: value for name, value in settings.items() if name not in OF_SAMPLING}
    note(f"generation_config.json of {model}: using {_listed(settings) or 'nothing, it recommends nothing else'}")
    own = {name: settings.pop(name) for name in ("temperature", "top_p") if name in settings}
    return {**own, "settings": settings}


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {str(value)[:40]}" for name, value in settings.items())


@functools.cache
def _say_ignored(what: str) -> None:
    note(f"generation_config.json of {what}: not used, only this command's own options are")
