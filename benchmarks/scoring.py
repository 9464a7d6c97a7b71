"""Overhead of scoring text: `TokenRewardModel.score` compared with the backbone's forward pass alone, in one process.

    python benchmarks/scoring.py [MODEL_FOLDER] [--data FILE --task gsm8k] [--traces 128] [--candidates 1] [--bf16]

Without a folder: a random Llama of 22 M parameters and 8,000 words, 234 M with CUDA. The raw forward pass processes the
same token ids in input order, in batches of 16, padded to the longest of each batch, like a plain loop over the model.
Traces are the first rows of `--data`, or generated ones of 1 to 20 lines; `--candidates` consecutive traces share a
prompt (about 70 words if there are several). Runs three times; prints the median seconds of both, their range, the
ratio, traces and tokens per second, and the peak memory of the process.
"""

import argparse
import random
import resource
from pathlib import Path

import common
import torch
from common import Result, Size, median

from tracereward.data.demonstrations import load_demonstrations
from tracereward.modeling.batching import pack
from tracereward.modeling.loading import best_device
from tracereward.modeling.tokenization import encode_completion, encode_prompt, load_tokenizer, pad_id
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.tasks.recipes import get_task


def generated(count: int, candidates: int) -> tuple[list[str], list[str]]:
    rng = random.Random(0)
    story = " ".join(f"Box {n} holds {rng.randrange(99)} balls." for n in range(14 if candidates > 1 else 0))
    asked = [f"Question: {story} What is {rng.randrange(99)} + 7?\nAnswer:\n" for _ in range(0, count, candidates)]
    texts = ["\n".join(f"{rng.randrange(99)} + 1 = 2" for _ in range(rng.randint(1, 20))) for _ in range(count)]
    return [prompt for prompt in asked for _ in range(candidates)][:count], texts


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data")
    parser.add_argument("--task", default="generic")
    parser.add_argument("--traces", type=int, default=128)
    parser.add_argument("--candidates", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    with common.scratch() as name:
        size = Size(1024, 16, 16, 8000) if common.GPU else Size(384, 8, 6, 8000)
        measure(args, args.model or common.save_model(Path(name), size))


def measure(args: argparse.Namespace, folder: str) -> None:
    if args.data:
        rows = load_demonstrations(args.data, get_task(args.task), limit=args.traces)
        prompts, texts = ([row[name] for row in rows] for name in ("prompt", "completion"))
    else:
        prompts, texts = generated(args.traces, args.candidates)
    tokenizer = load_tokenizer(folder)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = TokenRewardModel.from_backbone(folder, RewardSettings(), tokenizer, dtype=dtype)
    model = model.to(best_device()).eval()

    def raw() -> None:
        with torch.no_grad():
            for start in range(0, len(texts), 16):
                ids = [encode_prompt(tokenizer, p) for p in prompts[start : start + 16]]
                completions = [encode_completion(tokenizer, t) for t in texts[start : start + 16]]
                batch = pack(ids, completions, pad_id(tokenizer)).to(model.device)
                model.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

    times: dict[str, list[float]] = {"raw": [], "score": []}
    for turn in range(4):  # the first is a warm-up
        for name, work in (("raw", raw), ("score", lambda: model.score(prompts, texts))):
            start = common.now()
            work()
            if turn:
                times[name].append(common.now() - start)
    raw_seconds, seconds = median(times["raw"]), median(times["score"])
    tokens = sum(
        len(encode_prompt(tokenizer, p)) + len(encode_completion(tokenizer, t)) for p, t in zip(prompts, texts)
    )
    settings = {
        "model, M": common.millions(folder),
        "dtype": str(dtype),
        "traces": len(texts),
        "tokens": tokens,
        "candidates": args.candidates,
    }
    print(settings)
    row = {
        "raw forward, s": raw_seconds,
        "range": max(times["raw"]) - min(times["raw"]),
        "score, s": seconds,
        "range ": max(times["score"]) - min(times["score"]),
        "ratio": seconds / raw_seconds,
        "traces/s": len(texts) / seconds,
        "tokens/s": tokens / seconds,
        "peak, GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    Result("scoring", settings, [row]).write(args.json)


if __name__ == "__main__":
    common.quiet()
    main()
