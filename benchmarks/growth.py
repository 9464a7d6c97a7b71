"""Scaling of the step time with completion length, group size and discriminator size, with fitted exponents.

    python benchmarks/growth.py [MODEL_FOLDER] [--repeat 2] [--json FILE]

Without a folder: a random Llama of 3.4 M parameters, 218 M with CUDA. The base case is 4 prompts (8 with CUDA) x 8
completions of 64 tokens (256). One dimension is varied at a time: completions of 32 to 256 tokens (128 to 1,024),
groups of 4 to 32, and discriminators from a sixteenth of the policy's width to the full width. Demonstrations grow with
the completions. A discriminator update has 4 demonstrations, each with 4 rollouts and a perturbed copy; every second
step computes the monitoring metrics. Each point is the median of `--repeat` pairs of steps after one warm-up step. An
exponent is the slope of log seconds over log x; 1 is linear. The same is reported for the parts and, except for the
discriminator's size, for plain GRPO.
"""

from pathlib import Path
from typing import Any

import common
from common import Clock, Result, Size, adversarial_trainer, exponent, iqr, median, plain_trainer
from training_step import PARTS, SIZES

LENGTHS = (128, 256, 512, 1024) if common.GPU else (32, 64, 128, 256)
GROUPS = (4, 8, 16, 32)
PROMPTS, GROUP, LENGTH = (8, 8, 256) if common.GPU else (4, 8, 64)
UPDATE: dict[str, Any] = {"discriminator_prompts": 4, "discriminator_rollouts": 4}


def pairs(trainer: Any, repeat: int) -> list[dict[str, float]]:
    """Mean seconds of pairs of steps, one with monitoring metrics and one without; the first step is excluded."""
    clock = Clock(trainer)
    trainer.train()
    steps = clock.steps[1 : 1 + 2 * repeat]
    keys = dict.fromkeys(key for step in steps for key in step)
    found = []
    for one, two in zip(steps[::2], steps[1::2], strict=True):
        found.append({key: (one.get(key, 0.0) + two.get(key, 0.0)) / 2 for key in keys})
    return found


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    result = Result("growth", {"prompts": PROMPTS, "group": GROUP, "tokens": LENGTH, "pairs": args.repeat})
    with common.scratch() as name:
        path = Path(name)
        size = SIZES["gpu" if common.GPU else "small"]
        folder = args.model or common.save_model(path / "policy", size)
        result.settings["policy, M"] = common.millions(folder)
        smaller = {}
        for part in (16, 8, 4, 2, 1) if not args.model else ():
            heads = max(1, size.heads // part)
            saved = common.save_model(path / f"part{part}", Size(size.hidden // part, size.layers, heads))
            smaller[common.millions(saved)] = saved

        def measure(
            what: str, x: float, *, group: int = GROUP, length: int = LENGTH, discriminator: str | None = None
        ) -> None:
            rows = common.expert_rows(64, lines=length // 12)
            options = common.trainer_options(PROMPTS, group, length, path / "run")
            options["max_steps"] = 1 + 2 * args.repeat
            row: dict[str, Any] = {"what": what, "x": x}
            adversarial = pairs(
                adversarial_trainer(folder, rows, options, discriminator=discriminator, **UPDATE), args.repeat
            )
            steps = [p["step"] for p in adversarial]
            row |= {"s a step": median(steps), "IQR": iqr(steps)}
            if discriminator is None:
                plain = pairs(plain_trainer(folder, rows, options), args.repeat)
                row["plain GRPO"] = median([p["step"] for p in plain])
            row |= {part: median([p.get(part, 0.0) for p in adversarial]) for part in PARTS}
            result.rows.append(row)

        for length in LENGTHS:
            measure("tokens of a completion", length, length=length)
        for group in GROUPS:
            measure("completions of a prompt", group, group=group)
        for parameters, saved in sorted(smaller.items()):
            measure("discriminator, M parameters", parameters, discriminator=saved)
        exponents = []
        for what in dict.fromkeys(row["what"] for row in result.rows):
            points = [row for row in result.rows if row["what"] == what]
            fits = {}
            for key in ("s a step", "plain GRPO", *PARTS):
                known = [(row["x"], row[key]) for row in points if row.get(key)]
                fits[key] = exponent(*zip(*known)) if len(known) > 2 else None
            exponents.append({"exponent over": what, **fits})
        Result("growth", {}, exponents).print()
        result.more["exponents"] = exponents
        result.write(args.json)


if __name__ == "__main__":
    common.quiet()
    main()
