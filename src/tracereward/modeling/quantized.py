"""Base models with 4-bit or 8-bit weights (bitsandbytes): prepared for LoRA, and loaded again without quantization."""

import copy
import logging
from typing import Any

from peft import PeftModel, prepare_model_for_kbit_training
from transformers import PreTrainedModel

from tracereward.modeling.loading import CAUSAL_LM, CLASSIFIER, NEW_HEAD, load_model, origin


def is_quantized(model: Any) -> bool:
    """Whether a model's weights are quantized; also of a PEFT model, by its base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(base, "hf_quantizer", None) is not None  # transformers deletes it when it dequantizes


def prepare_for_lora(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze a quantized model and hold its other weights (embeddings, norms, LM head) in float32, in place."""
    # It warns of each product in another precision than float16, which is all of them.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        # On some CPUs a 4-bit layer in evaluation mode packs its weights once and for all, in a layout that has no
        # backward pass: afterwards gradients would silently bypass the layer in training too.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the trainers enable it


def without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """The same pretrained model without quantization, on the CPU.

    Its weights are read again from where `model` was loaded, since quantized weights are rounded. Only a checkpoint
    that was itself quantized has no other weights: they are dequantized.
    """
    quantizer: Any = model.hf_quantizer
    plain: Any = copy.deepcopy(model.config)
    stored = plain.quantization_config.to_dict() if quantizer.pre_quantized else None
    del plain.quantization_config
    config = copy.deepcopy(plain)
    if stored is not None:
        config.quantization_config = stored
    auto, new = (CLASSIFIER, NEW_HEAD) if model.get_output_embeddings() is None else (CAUSAL_LM, ())
    name, revision = origin(model)
    options = {"config": config, "dtype": plain.dtype, "device_map": {"": "cpu"}}
    fresh = load_model(auto, name, new, revision=revision, **options)
    if stored is None:
        return fresh
    whole = type(model)._from_config(plain, dtype=plain.dtype)  # a dequantized model itself cannot be saved
    whole.load_state_dict(fresh.dequantize(dtype=plain.dtype).state_dict())
    return whole
