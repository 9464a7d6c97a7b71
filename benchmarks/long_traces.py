"""Time and memory of scoring one long trace, by its length, and of a raw forward pass on the same ids.

    python benchmarks/long_traces.py [MODEL_FOLDER] [--json FILE]

Without a folder: a random Llama of 35 M parameters and 8,000 words. Each length is measured in a fresh process; "peak"
is the peak resident set size minus the resident set size with the model loaded (with CUDA the allocator's); times are
the median of three, or one of the longest. The raw
pass computes the hidden states of all tokens, and no logits. The exponents are of log-log fits over the lengths.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

import common
import torch
from common import Result, Size
from memory import reset_peak, resident

from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.records import ForwardOptions
from tracereward.rewards.settings import RewardSettings

SIZE = Size(512, 8, 8, 8000)
LENGTHS = (1024, 4096, 16384, 32768)
PROMPT = 128


def child(folder: str, head: str, length: int) -> None:
    """Print seconds and peak MiB of the raw pass and of scoring."""
    tokenizer = load_tokenizer(folder)
    model = TokenRewardModel.from_backbone(folder, RewardSettings(head=head), tokenizer).eval()
    model.backbone.config.max_position_embeddings = max(LENGTHS) + PROMPT
    ids = torch.arange(length + PROMPT).mul(7919).remainder(model.backbone.config.vocab_size).tolist()
    prompt, completion = ids[:PROMPT], ids[PROMPT:]
    inputs = torch.tensor([ids], device=model.device)

    def raw() -> None:
        with torch.inference_mode():
            model.backbone.base_model(input_ids=inputs, use_cache=False)

    def score() -> None:
        model.compute_rewards([prompt], [completion], ForwardOptions())

    raw()
    for work in (raw, score):
        times, peaks = [], []
        for _ in range(3 if length <= 4096 else 1):
            gc.collect()
            start = resident("VmRSS")
            reset_peak()
            began = common.now()
            work()
            times.append(common.now() - began)
            peaks.append(resident("VmHWM") - start)
        print(common.median(times), max(peaks))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    args = parser.parse_args()
    environment = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    rows = []
    with common.scratch() as scratch:
        folder = args.model or common.save_model(Path(scratch) / "model", SIZE)
        settings = {"model, M": common.millions(folder), "prompt": PROMPT}
        for head in ("action", "token"):
            for length in args.lengths:
                words = [sys.executable, __file__, "--child", folder, head, str(length)]
                done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr)
                (raw, raw_peak), (seconds, peak) = (map(float, line.split()) for line in done.stdout.splitlines()[-2:])
                rows.append(
                    {
                        "head": head,
                        "tokens": length,
                        "raw, s": raw,
                        "score, s": seconds,
                        "ratio": seconds / raw,
                        "raw peak, MiB": raw_peak,
                        "score peak, MiB": peak,
                    }
                )
    for head in ("action", "token"):
        mine = [row for row in rows if row["head"] == head]
        tokens = [row["tokens"] for row in mine]
        for name in ("raw, s", "score, s", "raw peak, MiB", "score peak, MiB"):
            settings[f"exponent of {name}, {head}"] = common.exponent(tokens, [row[name] for row in mine])
    print(settings)
    Result("long_traces", settings, rows).write(args.json)


if __name__ == "__main__":
    common.quiet()
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
