"""A GGUF file as an ordinary checkpoint, for the two scripts next to this one (`pip install gguf`)."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, target: Path, dtype: torch.dtype) -> None:
    """Write config, tokenizer and dequantised weights of a GGUF file to the folder `target`."""
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=dtype)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # transformers refuses to save a model loaded from GGUF
        del config.quantization_config
    model = type(loaded)(config).to(dtype)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
