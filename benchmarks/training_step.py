"""Cost of the discriminator: steps of `AdversarialTrainer` and of plain `trl.GRPOTrainer`, alternating in one process.

    python benchmarks/training_step.py [MODEL_FOLDER] [--size tiny|small|gpu] [--json FILE]

Without a folder: a random Llama of 0.1, 3.4 or 218 M parameters ("small" on a CPU, "gpu" with CUDA). A step has 24
prompts x 8 completions of 32 tokens on a CPU, 32 x 8 of 256 with CUDA. The discriminator uses the defaults of
`tracereward train` (every fourth step, an update on 16 demonstrations, each with 4 rollouts and a perturbed copy, and
the monitoring metrics). The policy's learning rate is 0, so that all variants generate the same rollouts; buffers are
filled as after a warm-up. Trainers alternate in turns of five steps: the first step is excluded, the mean of the others
is one measurement.

Prints for each variant the median and the interquartile range of its turns, its ratio to plain GRPO (with LoRA if the
variant has LoRA), with and without the monitoring metrics, and the medians of its parts, timed by wrapping methods:
"rollouts", "policy" (loss, backward pass, optimiser), three parts of the discriminator, and the rest.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import common
from common import Clock, Result, Size, adversarial_trainer, iqr, median, plain_trainer

from tracereward.training.adversarial_config import AdversarialConfig

SIZES = {"tiny": Size(64, 2, 4), "small": Size(256, 4, 4), "gpu": Size(1024, 16, 16)}
HALF = {"tiny": Size(32, 2, 4), "small": Size(128, 4, 4), "gpu": Size(512, 8, 8)}
MONITORS = "discriminator: monitors"
PARTS = (
    "rollouts",
    "policy",
    "discriminator: update",
    "discriminator: rewards",
    MONITORS,
    "rest",
)
TURN = 5  # steps; one of the four measured steps has an update and monitoring metrics
PLAIN, PLAIN_LORA = "plain GRPO", "plain GRPO, LoRA"
COMPILED = "plain GRPO, --compile_rollouts"
SAME = "same-size discriminator"
SMALLER, LESS = "sparse, smaller discriminator", "same-size, reward logit, 8 demonstrations"
# The sparse variant is the paper's: a token head on each trace's last token, whose logit alone is the reward.
SPARSE: dict[str, Any] = {"granularity": "sparse", "head": "token", "reward_form": "logit"}
# No pass of the starting policy over the rollouts, and half as many traces in an update.
LEAN: dict[str, Any] = {"reward_form": "logit", "discriminator_prompts": 8}


def variants(smaller: str) -> dict[str, dict[str, Any] | None]:
    """Discriminator options of each variant; None for plain GRPO, which precedes the variants compared with it."""
    found: dict[str, dict[str, Any] | None] = {
        PLAIN: None,
        **({COMPILED: None} if common.GPU else {}),
        SAME: {},
        LESS: LEAN,
        SMALLER: {**SPARSE, "discriminator": smaller},
        PLAIN_LORA: None,
        "LoRA, same-size discriminator": {"peft": True},
    }
    if "shared_base" in {field.name for field in dataclasses.fields(AdversarialConfig)}:
        found["LoRA, shared base"] = {"peft": True, "shared_base": True}
    return found


def baseline(name: str) -> str:
    return PLAIN_LORA if "LoRA" in name else PLAIN


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="gpu" if common.GPU else "small")
    parser.add_argument("--discriminator", help="folder of the smaller discriminator, with a model folder")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256 if common.GPU else 32, help="of each completion")
    parser.add_argument("--only", nargs="+", choices=list(variants("")), help="variants")
    args = parser.parse_args()
    (prompts, group), tokens = (32, 8) if common.GPU else (24, 8), args.tokens
    with common.scratch() as name:
        path = Path(name)
        folder = args.model or common.save_model(path / "policy", SIZES[args.size])
        smaller = args.discriminator or folder
        if not args.model:
            smaller = common.save_model(path / "smaller", HALF[args.size])
        rows = common.expert_rows(256, lines=tokens // 12)
        options = {**common.trainer_options(prompts, group, tokens, path / "run"), "max_steps": TURN}
        chosen = {name: more for name, more in variants(smaller).items() if not args.only or name in args.only}
        trainers, clocks = {}, {}
        for name, more in chosen.items():
            if more is None:
                trainers[name] = plain_trainer(
                    folder, rows, options, peft=name == PLAIN_LORA, compiled=name == COMPILED
                )
            else:
                trainers[name] = adversarial_trainer(folder, rows, options, **more)
            clocks[name] = Clock(trainers[name])
        for _ in range(args.turns):
            for trainer in trainers.values():
                trainer.train()
        prompt, demonstration = common.token_lengths(folder, rows)
        settings = {
            "policy, M": common.millions(folder),
            "smaller discriminator, M": common.millions(smaller),
            "prompts": prompts,
            "group": group,
            "tokens": tokens,
            "prompt tokens": prompt,
            "demonstration tokens": demonstration,
            "turns": args.turns,
        }
        print(settings)
        result = Result("training_step", settings)
        medians: dict[str, float] = {}
        for name, clock in clocks.items():
            turns = [clock.steps[start + 1 : start + TURN] for start in range(0, len(clock.steps), TURN)]
            means = {
                part: [statistics.mean(step.get(part, 0.0) for step in steps) for steps in turns]
                for part in ("step", *PARTS)
            }
            medians[name] = median(means["step"])
            row = {"variant": name, "s a step": medians[name], "IQR": iqr(means["step"])}
            if (plain := medians.get(baseline(name))) is not None:
                row["ratio"] = medians[name] / plain
                row["without monitors"] = (medians[name] - median(means[MONITORS])) / plain
            result.rows.append({**row, **{part: median(means[part]) for part in PARTS}})
        result.write(args.json)


if __name__ == "__main__":
    common.quiet()
    main()
