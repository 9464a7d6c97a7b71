"""Peak memory of adversarial steps compared with plain GRPO, each in a fresh process, by micro-batch size.

    python benchmarks/memory.py [MODEL_FOLDER] [--json FILE]

Without a folder: a random Llama of 35 M parameters and 8,000 words, 234 M with CUDA. A step has 16 rollouts of 64
tokens (64 of 256 with CUDA) in micro-batches of `--rows` each, and a discriminator update on 4 demonstrations, each
with 3 rollouts and a perturbed copy; a forward pass of the discriminator has as many tokens as a micro-batch. Two steps
are run, so that all optimiser states exist. No gradient checkpointing; float32 on a CPU.

On a CPU, "peak" is the peak resident set size (VmHWM) minus the resident set size after imports, before a model is
loaded. Tensors of 64 KiB or more are allocated by mmap (`MALLOC_MMAP_THRESHOLD_`) and returned when freed, so that the
resident set follows them. With CUDA it is the allocator's peak. The slope is from a least-squares fit of the peak over
a micro-batch's tokens, for the numbers of rows in `--fit`.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import torch
from common import Result, Size, adversarial_trainer, line, plain_trainer
from training_step import PLAIN, PLAIN_LORA, SAME, baseline, variants

SIZE = Size(1024, 16, 16, 8000) if common.GPU else Size(512, 8, 8, 8000)
HALF = Size(512, 8, 8, 8000) if common.GPU else Size(256, 4, 4, 8000)
PROMPTS, GROUP, TOKENS = (8, 8, 256) if common.GPU else (4, 4, 64)
PROMPT_TOKENS = 12
MIB = 2**20


def resident(name: str) -> float:
    """MiB of VmRSS or of its peak, VmHWM; with CUDA, of the allocator."""
    if common.GPU:
        held = torch.cuda.max_memory_allocated() if name == "VmHWM" else torch.cuda.memory_allocated()
        return held / MIB
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def reset_peak() -> None:
    if common.GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def child(folder: str, smaller: str, name: str, *, rows: int, output: str) -> None:
    """Run two steps of a variant and print its peak memory."""
    total = PROMPTS * GROUP
    options = {
        **common.trainer_options(PROMPTS, GROUP, TOKENS, Path(output)),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": total // rows,
        "max_steps": 2,
    }
    demonstrations = common.expert_rows(64, lines=TOKENS // 12)
    more = variants(smaller)[name]
    warm = torch.nn.Linear(8, 8)  # load lazily imported libraries before the baseline
    torch.optim.AdamW(warm.parameters()).step()
    gc.collect()
    start = resident("VmRSS")
    reset_peak()
    trainer: Any
    if more is None:
        trainer = plain_trainer(folder, demonstrations, options, peft=name == PLAIN_LORA)
    else:
        more = {"discriminator_prompts": 4, "discriminator_rollouts": 3, **more}
        budget = rows * (PROMPT_TOKENS + TOKENS)
        trainer = adversarial_trainer(folder, demonstrations, options, discriminator_token_budget=budget, **more)
    trainer.train()
    print(resident("VmHWM") - start)


def measure(folder: str, smaller: str, name: str, *, rows: int, output: Path) -> float:
    """Peak memory of one variant in MiB, measured in a fresh process."""
    words = [sys.executable, __file__, "--child", folder, smaller, name, str(rows), str(output)]
    memory = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(words, env={**os.environ, **memory}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=16 if common.GPU else 8)
    parser.add_argument("--fit", type=int, nargs="+", default=[8, 16, 32, 64] if common.GPU else [2, 4, 8, 16])
    parser.add_argument("--discriminator", help="folder of the smaller discriminator, with a model folder")
    parser.add_argument("--repeat", type=int, default=1, help="processes of each variant (within 1 MiB)")
    args = parser.parse_args()
    with common.scratch() as scratch:
        path = Path(scratch)
        folder = args.model or common.save_model(path / "policy", SIZE)
        smaller = args.discriminator or folder
        if not args.model:
            smaller = common.save_model(path / "smaller", HALF)
        settings = {
            "policy, M": common.millions(folder),
            "smaller discriminator, M": common.millions(smaller),
            "weights, MiB": 4 * common.millions(folder) * 1e6 / MIB,
            "rollouts": PROMPTS * GROUP,
            "rows of a micro-batch": args.rows,
            "tokens of a row": PROMPT_TOKENS + TOKENS,
        }
        result = Result("memory", settings)
        peaks = {}
        for name in variants(smaller):
            values = [measure(folder, smaller, name, rows=args.rows, output=path / "run") for _ in range(args.repeat)]
            peaks[name] = sum(values) / len(values)
            result.rows.append(
                {
                    "variant": name,
                    "peak, MiB": peaks[name],
                    "ratio": peaks[name] / peaks[baseline(name)],
                    "more than plain, MiB": peaks[name] - peaks[baseline(name)],
                }
            )
        growth = []
        for name in (PLAIN, SAME):
            tokens = [rows * (PROMPT_TOKENS + TOKENS) for rows in args.fit]
            values = [measure(folder, smaller, name, rows=rows, output=path / "run") for rows in args.fit]
            slope, intercept = line(tokens, values)
            fitted = [slope * x + intercept for x in tokens]
            growth.append(
                {
                    "variant": name,
                    **{f"{count} tokens": value for count, value in zip(tokens, values, strict=True)},
                    "KiB a token": 1024 * slope,
                    "at 0, MiB": intercept,
                    "largest residual, MiB": max(abs(y - f) for y, f in zip(values, fitted, strict=True)),
                }
            )
        Result("memory", {}, growth).print()
        result.more["growth"] = growth
        print(settings)
        result.write(args.json)


if __name__ == "__main__":
    common.quiet()
    if sys.argv[1:2] == ["--child"]:
        _, _, policy, discriminator, variant, count, output = sys.argv
        child(policy, discriminator, variant, rows=int(count), output=output)
    else:
        main()
