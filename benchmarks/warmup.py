"""Time saved by sampling the warm-up's rollouts once, compared with fresh rollouts for each update.

    python benchmarks/warmup.py [MODEL_FOLDER] [--updates 250] [--fresh 24] [--demonstrations 50 512] [--json FILE]

Without a folder: a random Llama of 0.9 M parameters, 218 M with CUDA. "once" is the warm-up of `tracereward train` with
its defaults: 8 rollouts for each of at most 512 demonstrations, then `--updates` updates with monitoring metrics and
saves. "fresh" generates new rollouts for each update, 16 demonstrations x 4, with the same engine and the same metrics;
`--fresh` updates are measured, half of them before and half after "once", and scaled to `--updates`. "whole steps" is a
run without a warm-up phase and with a fixed policy: each update belongs to a full step of 24 x 8 rollouts (32 x 8 with
CUDA), with rewards and the policy's loss. Every completion has 32 tokens on a CPU, 256 with CUDA.
"""

import random
import shutil
import statistics
from pathlib import Path

import common
from common import Clock, Result, adversarial_trainer, iqr, median
from training_step import HALF, SIZES

from tracereward.training.trainer import AdversarialTrainer


def once(trainer: AdversarialTrainer) -> tuple[float, float]:
    """Seconds of the full warm-up, and of its sampling."""
    warm_up = trainer.warm_up
    sample, sampling = warm_up._draw, []

    def timed(rows):
        start = common.now()
        pool = sample(rows)
        sampling.append(common.now() - start)
        return pool

    warm_up._draw = timed  # pyright: ignore[reportAttributeAccessIssue]
    start = common.now()
    warm_up.run()
    warm_up._draw = sample
    return common.now() - start, sampling[0]


def fresh(trainer: AdversarialTrainer, updates: int, rng: random.Random) -> list[tuple[float, float]]:
    """Seconds of each update on fresh rollouts, and of their sampling."""
    config, discriminator = trainer.config, trainer.discriminator
    rows = [row for row in trainer.demonstration_rows if row["demonstration"] not in discriminator.held_out]
    times = []
    for _ in range(updates):
        start = common.now()
        chosen = rng.sample(rows, config.discriminator_prompts)
        rollouts = trainer.collect([row for row in chosen for _ in range(config.discriminator_rollouts)])
        sampling = common.now() - start
        discriminator.remember(rollouts)
        discriminator.update(rollouts)
        if discriminator.updates % config.monitor_every == 0:
            discriminator.held_out_accuracy()
        times.append((common.now() - start, sampling))
    return times


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--updates", type=int, default=250)
    parser.add_argument("--fresh", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256 if common.GPU else 32, help="of each completion")
    parser.add_argument("--demonstrations", type=int, nargs="+", default=[50, 512])
    args = parser.parse_args()
    (prompts, group), tokens = (32, 8) if common.GPU else (24, 8), args.tokens
    result = Result("warmup", {"updates": args.updates, "fresh updates measured": args.fresh, "tokens": tokens})
    with common.scratch() as name:
        path = Path(name)
        folder = args.model or common.save_model(path / "policy", SIZES["gpu"] if common.GPU else HALF["small"])
        result.settings["policy, M"] = common.millions(folder)
        for count in args.demonstrations:
            options = {**common.trainer_options(prompts, group, tokens, path / "run"), "max_steps": 7}
            rows = common.expert_rows(count, lines=tokens // 12)
            trainer = adversarial_trainer(folder, rows, options, discriminator_warmup_updates=args.updates)
            trainer.config.replay_share = 0.0  # "fresh" uses only its own rollouts
            rng = random.Random(0)
            fresh(trainer, 1, rng)  # warms up, compiles
            times = fresh(trainer, args.fresh // 2, rng)
            trainer.config.replay_share, trainer.discriminator.updates = 0.5, 0
            total, sampling = once(trainer)
            assert trainer.discriminator.updates == args.updates
            trainer.config.replay_share = 0.0
            times += fresh(trainer, args.fresh - args.fresh // 2, rng)
            trainer.config.discriminator_warmup_updates = 0
            clock = Clock(trainer)
            trainer.train()
            steps = [step["step"] for step in clock.steps[1:]]  # every second one has metrics
            full_steps = statistics.mean(steps)
            pairs = list(zip(times[::2], times[1::2], strict=True))  # one update of each pair has metrics
            each = [(one[0] + two[0]) / 2 for one, two in pairs]
            samplings = [(one[1] + two[1]) / 2 for one, two in pairs]
            result.rows.append(
                {
                    "demonstrations": count,
                    "rollouts drawn once": 8 * count,
                    "once, s": total,
                    "of it drawing": sampling,
                    "an update": (total - sampling) / args.updates,
                    "fresh, s an update": median(each),
                    "IQR": iqr(each),
                    "of it drawing ": median(samplings),
                    "fresh, s (scaled)": args.updates * median(each),
                    "fresh / once": args.updates * median(each) / total,
                    "a whole step, s": full_steps,
                    "whole steps / once": args.updates * full_steps / total,
                }
            )
            shutil.rmtree(path / "run", ignore_errors=True)
        result.write(args.json)


if __name__ == "__main__":
    common.quiet()
    main()
