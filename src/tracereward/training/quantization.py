"""The options of 4-bit and 8-bit base models, checked before any model is loaded."""

import os
from typing import Any

from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, get_quantization_config

from tracereward.errors import InputError
from tracereward.modeling.hub import with_revision
from tracereward.modeling.loading import read_config
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import PolicyConfig, SupervisedConfig


def check_quantization(model: ModelConfig, config: SupervisedConfig | PolicyConfig) -> None:
    """Check that a quantized base model can be trained with these options.

    Raises:
        InputError: names the options that do not fit, or the package that is missing.
    """
    stored = _stored(model)
    method = stored.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise InputError(
            f"{model.model_name_or_path}: its weights are quantized ({method}) and cannot be trained; use the original "
            "model, which --load_in_4bit true quantizes while it is loaded"
        )
    if stored and (model.load_in_4bit or model.load_in_8bit):
        raise InputError(f"{model.model_name_or_path}: its weights are quantized already: remove --load_in_4bit/8bit")
    if not (stored or model.load_in_4bit or model.load_in_8bit):
        return
    bits = "a quantized model" if stored else f"--load_in_{'4' if model.load_in_4bit else '8'}bit"
    if not model.use_peft:
        raise InputError(f"{bits} needs --use_peft true: quantized weights are frozen, and LoRA adapters are trained")
    if not is_bitsandbytes_available():
        raise InputError(f"{bits} needs bitsandbytes: pip install 'tracereward[quantization]'")
    if model.load_in_4bit and model.dtype == "auto":
        raise InputError(f"{bits} needs --dtype bfloat16, float16 or float32, the precision of its computations")
    if _sharded(config):
        raise InputError(f"{bits} does not work with FSDP and DeepSpeed: use DDP (configs/accelerate/ddp.yaml)")
    if isinstance(config, PolicyConfig) and config.use_vllm:
        raise InputError(
            f"{bits} does not work with --use_vllm: TRL would merge the adapter into the quantized weights for each "
            "batch of rollouts, and rounding would change them"
        )
    if isinstance(config, PolicyConfig) and config.compile_rollouts:
        raise InputError(f"{bits} does not work with --compile_rollouts: remove one of them")
    if isinstance(config, AdversarialConfig) and config.shard_discriminator:
        raise InputError(f"{bits} does not work with --shard_discriminator: remove one of them")


def quantization(model: ModelConfig) -> dict[str, Any]:
    """The arguments of `from_pretrained` that quantize a model; None there would ignore how a checkpoint is stored."""
    config = get_quantization_config(model)
    return {} if config is None else {"quantization_config": config}


def _stored(model: ModelConfig) -> dict[str, Any]:
    """How the checkpoint's weights are quantized; empty if they are not."""
    config = read_config(with_revision(str(model.model_name_or_path), model.model_revision))
    return config.to_dict().get("quantization_config") or {}


def _sharded(config: SupervisedConfig | PolicyConfig) -> bool:
    launched = any(
        os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("FSDP", "DEEPSPEED")
    )
    return launched or bool(config.fsdp) or config.deepspeed is not None
