"""Time and memory of scoring one long trace, by its length, and of a raw forward pass on the same ids.

    python benchmarks/long_traces.py [MODEL_FOLDER] [--json FILE]
    python benchmarks/long_traces.py --training [--lengths ...] [--json FILE]

Without a folder: a random Llama of 35 M parameters and 8,000 words. Each length is measured in a fresh process; "peak"
is the peak resident set size minus the resident set size with the model loaded (with CUDA the allocator's); times are
the median of three, or one of the longest. The raw
pass computes the hidden states of all tokens, and no logits. The exponents are of log-log fits over the lengths.

With `--training`: one update of the discriminator (granularity `interval`, gradient checkpointing), by objective, and
the states that `fit` reads for its read-out; a random Llama of 6 M parameters; as many tokens at each length,
in groups of a prompt with an expert and two rollouts of different lengths.
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

from tracereward.modeling.hidden_states import trace_states
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.records import ForwardOptions
from tracereward.rewards.settings import RewardSettings
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.discriminator import Discriminator
from tracereward.training.discriminator_batch import Expert, Rollout

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


TOTAL = 3 * 16384
"""Completion tokens of an update, and of what the read-out reads."""


def training_child(folder: str, part: str, length: int) -> None:
    """Print seconds and peak MiB of an update of the discriminator, or of the states for the read-out."""
    tokenizer = load_tokenizer(folder)
    model = TokenRewardModel.from_backbone(folder, RewardSettings(granularity="interval"), tokenizer)
    model.backbone.config.max_position_embeddings = length + PROMPT
    size = model.backbone.config.vocab_size

    def ids(seed: int, count: int) -> list[int]:
        return torch.randint(10, size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    groups = TOTAL // 3 // length
    experts = [Expert(ids(n, PROMPT), ids(groups + n, length)) for n in range(groups)]
    rollouts = [
        Rollout(n, ids(3 * groups + 2 * n + k, length - k * length // 8)) for n in range(groups) for k in (0, 1)
    ]
    if part == "fit":
        prompts = [experts[rollout.demonstration].prompt for rollout in rollouts]

        def work() -> None:
            for _ in trace_states(model.backbone, prompts, [rollout.ids for rollout in rollouts], 0):
                pass
    else:
        options = {"objective": part, "discriminator_prompts": groups, "discriminator_rollouts": 2}
        config = AdversarialConfig(
            output_dir=folder, report_to="none", use_cpu=True, perturbed_per_expert=0, granularity="interval", **options
        )
        discriminator = Discriminator(model, experts, config, seed=0)
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})

        def work() -> None:
            discriminator.update(rollouts)

    gc.collect()
    start = resident("VmRSS")
    reset_peak()
    began = common.now()
    work()
    print(common.now() - began, resident("VmHWM") - start)


def training(lengths: list[int], parts: list[str], json: Path | None) -> None:
    """Measure `training_child` in fresh processes."""
    rows = []
    with common.scratch() as scratch:
        folder = common.save_model(Path(scratch) / "model", Size(256, 4, 4, 8000))
        settings = {"model, M": common.millions(folder), "completion tokens": TOTAL, "prompt": PROMPT}
        for part in parts:
            for length in lengths:
                words = [sys.executable, __file__, "--training-child", folder, part, str(length)]
                seconds, peak = map(float, measured(words).splitlines()[-1].split())
                rows.append({"part": part, "tokens": length, "s": seconds, "peak, MiB": peak})
                print(rows[-1], flush=True)
    Result("long_training", settings, rows).write(json)


def measured(words: list[str]) -> str:
    """The output of a child process, which returns freed memory at once."""
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--training", action="store_true", help="updates and read-out instead of scoring")
    parser.add_argument("--parts", nargs="+", default=["bce", "pairwise", "fit"], help="of --training")
    args = parser.parse_args()
    if args.training:
        training(args.lengths or [1024, 4096, 16384], args.parts, args.json)
        return
    rows = []
    with common.scratch() as scratch:
        folder = args.model or common.save_model(Path(scratch) / "model", SIZE)
        settings = {"model, M": common.millions(folder), "prompt": PROMPT}
        for head in ("action", "token"):
            for length in args.lengths or LENGTHS:
                output = measured([sys.executable, __file__, "--child", folder, head, str(length)])
                (raw, raw_peak), (seconds, peak) = (map(float, line.split()) for line in output.splitlines()[-2:])
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
    elif sys.argv[1:2] == ["--training-child"]:
        training_child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
