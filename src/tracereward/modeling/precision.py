"""In which precision models compute: every choice of a dtype or of autocast, from what the processor can do.

On a CPU with bfloat16 arithmetic (AVX512-BF16 or AMX) large models compute in bfloat16, on any other in float32, also
if their checkpoint is bfloat16: other CPUs emulate it, more slowly than float32. ``--dtype`` and ``--bf16`` override.
On an accelerator the checkpoint's own precision is kept, and TRL chooses the autocast of training.

Frozen models (sampling, log-probs, read-outs) are loaded in bfloat16. Trained models keep float32 weights under
bfloat16 autocast: rounded weights would lose updates smaller than 1/256 of a weight. A reward model scores in the
precision in which its calibration and its rule for the first error were fitted, see `scoring_precision`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tracereward.console import note
from tracereward.errors import check_choice
from tracereward.modeling.loading import best_device, local_folder, read_config
from tracereward.modeling.model_folder import POLICY, REWARD_MODEL, check_folder, weight_files

DTYPES = ("auto", "float32", "bfloat16", "float16")
LARGE = 10_000_000
"""Parameters from which a model computes in bfloat16 on a CPU that can.

Below, casts and the overhead of each operation eat the gain. Speed in bfloat16 over that in float32 of random Llamas on
one thread of an AVX512-BF16 CPU, 4 x 128 tokens:

    parameters     0.11 M    0.96 M    4.4 M
    forward          1.13      1.40     1.90
    decoding         0.62      0.79     1.11
    training step    0.88      1.13     1.39
"""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A choice.

    Attributes:
        dtype: for `from_pretrained`; ``auto`` is the checkpoint's.
        why: the reason; empty if the checkpoint's precision is kept and there is nothing to say.
        name: ``float32``, ``bfloat16`` or ``float16``; empty for a checkpoint whose weights are quantized.
        own: whether it is the checkpoint's.
    """

    dtype: torch.dtype | str
    why: str = ""
    name: str = ""
    own: bool = True

    def say(self, what: str) -> "Precision":
        """Print the choice as one line, if there is a reason; returns itself."""
        if self.why:
            note(f"{what} in {self.name or self.dtype}: {self.why}")
        return self


def bfloat16_unit(device: torch.device) -> str | None:
    """What multiplies matrices in bfloat16: GPUs, and CPUs with AMX or AVX512-BF16; None if nothing does."""
    if device.type == "cuda":
        return "the GPU" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        return "AMX" if can.get("amx_bf16") else "AVX512-BF16" if can.get("avx512_bf16") else None
    return None


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where matrices are multiplied in it, else float32."""
    return torch.float32 if bfloat16_unit(device) is None else torch.bfloat16


def parameters(folder: Path) -> tuple[int, str]:
    """The number of stored parameters of a checkpoint, and its dtype; reads names and shapes, not weights."""
    count, kinds = 0, set()
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    part = file.get_slice(name)
                    count += math.prod(part.get_shape())
                    kinds.add(part.get_dtype())
        else:
            count += path.stat().st_size // torch.float32.itemsize
    stored = getattr(read_config(folder), "dtype", None)
    only = {"F16": "float16", "BF16": "bfloat16"}.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"
    return count, str(stored).removeprefix("torch.") if stored is not None else only


def _is_quantized(folder: Path) -> bool:
    return read_config(folder).to_dict().get("quantization_config") is not None


def reading_precision(name: str | Path, given: str | None = None) -> Precision:
    """The precision of a frozen causal LM: for sampling, log-probs and the states of a read-out.

    Args:
        name: folder or Hub id.
        given: one of `DTYPES`, which overrides the choice; None: ``auto``.

    Raises:
        InputError: there is no such model, or `given` is unknown.
    """
    return _frozen(name, given, None)


def scoring_precision(name: str | Path, fitted: str, given: str | None = None) -> Precision:
    """The precision of a reward model that scores.

    That in which its calibration and its rule for the first error were fitted, else that of its checkpoint: rewards in
    another precision differ by its rounding (up to a few per cent of the largest token reward), and with them
    probabilities and marks, so that speed alone is no reason to leave it. The exception is a CPU that would emulate the
    16 bits of a large model: float32 differs there only by less rounding.

    Args:
        name: folder or Hub id.
        fitted: `RewardSettings.dtype`.
        given: as for `reading_precision`.

    Raises:
        InputError: as for `reading_precision`.
    """
    return _frozen(name, given, fitted)


def _frozen(name: str | Path, given: str | None, fitted: str | None) -> Precision:
    """See `reading_precision`, if `fitted` is None, and `scoring_precision`."""
    if given is not None:
        check_choice("dtype", given, DTYPES)
    folder, device = local_folder(name), best_device()
    check_folder(folder, POLICY if fitted is None else REWARD_MODEL)
    if _is_quantized(folder):
        return Precision(dtype="auto")
    count, stored = parameters(folder)
    kept, large = fitted or stored, count >= LARGE
    if given not in (None, "auto"):
        return _made(str(given), stored, "as --dtype says" + _not_fitted(str(given), fitted, stored))
    if device.type != "cpu" or not large:
        return _made(kept, stored, "" if kept == stored else "its calibration was fitted in it")
    unit, size = bfloat16_unit(device), f"{count / 1e6:,.0f} M parameters"
    if fitted is not None and (kept == "float32" or unit is not None):
        faster = " (--dtype bfloat16 is faster here)" if kept == "float32" and unit else ""
        return _made(kept, stored, f"as it was fitted{faster}")
    if unit is not None:
        return _made("bfloat16", stored, f"{size}, and this CPU has {unit}")
    return _made("float32", stored, f"{size}, and this CPU has no bfloat16 arithmetic" if stored != "float32" else "")


def _not_fitted(given: str, fitted: str | None, stored: str) -> str:
    before = fitted or stored
    return f"; it was fitted in {before}" if fitted is not None and before != given else ""


def _made(name: str, stored: str, why: str) -> Precision:
    return Precision(dtype=getattr(torch, name), why=why, name=name, own=name == stored)


def training_precision(name: str | Path) -> tuple[bool, str]:
    """Whether training a model on the CPU is faster under bfloat16 autocast, and why; no reason for a small model.

    Autocast over float32 weights, not bfloat16 weights, also under LoRA: see the module's docstring.

    Args:
        name: folder or Hub id of the model before training.

    Raises:
        InputError: there is no such model.
    """
    folder, unit = local_folder(name), bfloat16_unit(torch.device("cpu"))
    check_folder(folder, POLICY)
    if _is_quantized(folder):
        return False, "its weights are quantized"
    count = parameters(folder)[0]
    if count < LARGE:
        return False, ""
    size = f"{count / 1e6:,.0f} M parameters"
    return unit is not None, f"{size}, and this CPU has {unit or 'no bfloat16 arithmetic'}"


def keep_choice(stored: Any, chosen: Any, name: str) -> Any:
    """The value of an option in a run that is resumed: the stored one; says so if this machine would choose another."""
    if (stored or None) != (chosen or None):
        note(f"{name} {stored} as the run began; on this machine it would be {chosen}")
    return stored
