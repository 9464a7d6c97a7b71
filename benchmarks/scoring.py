"""What scoring text costs beyond the forward pass: `TokenRewardModel.score` against the backbone alone, in one process.

    python benchmarks/scoring.py MODEL_FOLDER [TRACES [CANDIDATES]]

The raw forward sees the same token ids in the order they come, in batches of 16, padded to the longest of each: what a
plain loop over the model does. CANDIDATES traces in a row have the same prompt (default 1), of about 70 words if there
are several. Prints seconds of both, the ratio, traces and tokens a second, and the most memory that the process held.
"""

import random
import resource
import sys
import time

import torch

from tracereward.batching import pack
from tracereward.demonstrations import encode_completion, encode_prompt
from tracereward.models import load_tokenizer, pad_id
from tracereward.pool import best_device
from tracereward.reward_model import TokenRewardModel
from tracereward.reward_settings import RewardSettings


def main(folder: str, count: int, candidates: int) -> None:
    tokenizer = load_tokenizer(folder)
    model = TokenRewardModel.from_backbone(folder, RewardSettings(), tokenizer).to(best_device()).eval()
    rng = random.Random(0)
    story = " ".join(f"Box {n} holds {rng.randrange(99)} balls." for n in range(14 if candidates > 1 else 0))
    asked = [f"Question: {story} What is {rng.randrange(99)} + 7?\nAnswer:\n" for _ in range(0, count, candidates)]
    prompts = [prompt for prompt in asked for _ in range(candidates)][:count]
    texts = ["\n".join(f"{rng.randrange(99)} + 1 = 2" for _ in range(rng.randint(1, 20))) for _ in range(count)]

    def raw() -> None:
        with torch.no_grad():
            for start in range(0, count, 16):
                ids = [encode_prompt(tokenizer, p) for p in prompts[start : start + 16]]
                completions = [encode_completion(tokenizer, t) for t in texts[start : start + 16]]
                batch = pack(ids, completions, pad_id(tokenizer)).to(model.device)
                model.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

    times: dict[str, list[float]] = {"raw": [], "score": []}
    for turn in range(4):  # the first of each warms up
        for name, work in (("raw", raw), ("score", lambda: model.score(prompts, texts))):
            start = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - start)
    a, b = (sorted(times[name])[1] for name in ("raw", "score"))
    tokens = sum(
        len(encode_prompt(tokenizer, p)) + len(encode_completion(tokenizer, t)) for p, t in zip(prompts, texts)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"raw forward {a:.2f} s, score {b:.2f} s: ratio {b / a:.2f}; {count / b:.1f} traces and {tokens / b:.0f} "
        f"tokens a second ({count} traces, {tokens} tokens); peak {peak:.1f} GiB"
    )


if __name__ == "__main__":
    main(sys.argv[1], *(int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((2, 128), (3, 1))))
