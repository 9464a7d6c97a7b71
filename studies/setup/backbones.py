"""Backbones of several architectures, and one with another tokenizer, as alternatives to the worlds' own.

``neox`` is a GPT-NeoX (LayerNorm, biases, attention parallel to a plain MLP), ``qwen3`` a Qwen3 (normalised queries and
keys, grouped-query attention with two heads per group); their parameter counts are within 2 % of the Llama's.
``digits`` is the Llama with a tokenizer that splits numbers into digits. ``small`` is a Llama of one layer, half as
wide. The alternative to a pretrained model is another pretrained model.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from studies.setup.site import Site, make_world
from tracereward.files import atomic_folder
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.quickstart.worlds import World
from tracereward.synthetic.arithmetic import build_model, build_tokenizer

LABELS = {
    "llama": "Llama",
    "neox": "GPT-NeoX",
    "qwen3": "Qwen3",
    "digits": "Llama, digit by digit",
    "small": "Llama, 32 x 1",
    "smollm2": "SmolLM2 135M",
    "gemma3": "Gemma 3 270M",
}
"""Names of the backbones in tables."""
OWN_TOKENIZER = {"digits", "smollm2", "gemma3"}
"""Backbones that share their tokenizer with no other."""
COMPARED = ("llama", "neox", "qwen3", "digits")
"""Backbones of about the same size."""
PRETRAINED = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct", "gemma3": "google/gemma-3-270m-it"}
"""Hub ids of the pretrained backbones."""


def own(name: str) -> str | None:
    """The backbone as in `Site.backbone`: None for the world's own."""
    return None if name in ("llama", "smollm2") else name


def build_neox(tokenizer: PreTrainedTokenizerBase, seed: int) -> GPTNeoXForCausalLM:
    """Untrained GPT-NeoX as large as the worlds' Llama, on the CPU in float32."""
    config = GPTNeoXConfig(
        hidden_size=64,
        intermediate_size=280,  # two matrices where the Llama has three
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        # Usually rotary positions take a quarter of a head of 64 or more; a quarter of 16 did not learn.
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
        tie_word_embeddings=False,
        **_ids(tokenizer),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(config)


def build_qwen3(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3ForCausalLM:
    """Untrained Qwen3 as large as the worlds' Llama, on the CPU in float32."""
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=213,  # spends what grouped-query attention saves
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **_ids(tokenizer),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def _ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    vocabulary = tokenizer.get_vocab()
    special = {"pad_token_id": vocabulary["<pad>"], "bos_token_id": None, "eos_token_id": vocabulary["<eos>"]}
    return {"vocab_size": len(vocabulary), **special}


def _small(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    return build_model(tokenizer, seed, hidden_size=32, layers=1)


BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {
    "neox": build_neox,
    "qwen3": build_qwen3,
    "digits": build_model,
    "small": _small,
}


def world_of(backbone: str | None, world: World) -> World:
    """The world with the backbone's model; ``digits`` gets longer completions, since it splits numbers."""
    if backbone in PRETRAINED:
        return replace(world, model=PRETRAINED[backbone])
    return replace(world, completion=world.completion * 4 // 3) if backbone == "digits" else world


def write_untrained(backbone: str, seed: int, llama: Path, folder: Path) -> None:
    """Write an untrained backbone and its tokenizer, the Llama's unless the backbone is ``digits``."""
    tokenizer = build_tokenizer(digits=True) if backbone == "digits" else load_tokenizer(str(llama))
    with atomic_folder(folder) as target:
        BUILDERS[backbone](tokenizer, seed).save_pretrained(target)
        tokenizer.save_pretrained(target)


def make_site(site: Site) -> None:
    """Write a site's rows and its untrained model."""
    if site.backbone is not None and site.world.model is None:
        write_untrained(site.backbone, site.seed, replace(site, backbone=None).run("init"), site.run("init"))
    else:
        make_world(site)
