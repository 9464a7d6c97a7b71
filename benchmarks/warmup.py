"""What it saves that the warm-up draws its rollouts once: against fresh rollouts for each update, in one run.

    python benchmarks/warmup.py [MODEL_FOLDER] [--updates 250] [--fresh 24] [--demonstrations 50 512] [--json FILE]

Without a folder: a random Llama of 0.9 M parameters, of 218 M with CUDA. "once" is the warm-up of `tracereward train`
with its defaults, 8 rollouts of each of at most 512 demonstrations, then `--updates` updates with their monitors and
saves. "fresh" draws as many rollouts for each update as it reads, 16 demonstrations x 4, by the same engine, and
updates on them, with the same monitors; `--fresh` updates are measured, half of them before and half after "once", and
scaled to `--updates`. "whole steps" is a run without a warm-up phase, whose policy stands still meanwhile: each update
belongs to a step of 24 x 8 rollouts (32 x 8 with CUDA), with rewards and the policy's loss. Every completion has 32
tokens on a CPU, 256 with CUDA.
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
    """Seconds of the whole warm-up, and of its drawing."""
    warm_up = trainer.warm_up
    draw, drawing = warm_up._draw, []

    def timed(rows):
        start = common.now()
        pool = draw(rows)
        drawing.append(common.now() - start)
        return pool

    warm_up._draw = timed  # pyright: ignore[reportAttributeAccessIssue]
    start = common.now()
    warm_up.run()
    warm_up._draw = draw
    return common.now() - start, drawing[0]


def fresh(trainer: AdversarialTrainer, updates: int, rng: random.Random) -> list[tuple[float, float]]:
    """Seconds of each update on rollouts of its own, and of their drawing."""
    config, discriminator = trainer.config, trainer.discriminator
    rows = [row for row in trainer.demonstration_rows if row["demonstration"] not in discriminator.held_out]
    times = []
    for _ in range(updates):
        start = common.now()
        chosen = rng.sample(rows, config.discriminator_prompts)
        drawn = trainer.collect([row for row in chosen for _ in range(config.discriminator_rollouts)])
        drawing = common.now() - start
        discriminator.remember(drawn)
        discriminator.update(drawn)
        trainer.warm_up._accuracy()
        times.append((common.now() - start, drawing))
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
            trainer.config.replay_share = 0.0  # "fresh" reads what it drew
            rng = random.Random(0)
            fresh(trainer, 1, rng)  # warms up, compiles
            times = fresh(trainer, args.fresh // 2, rng)
            trainer.config.replay_share, trainer.discriminator.updates = 0.5, 0
            whole, drawing = once(trainer)
            assert trainer.discriminator.updates == args.updates
            trainer.config.replay_share = 0.0
            times += fresh(trainer, args.fresh - args.fresh // 2, rng)
            trainer.config.discriminator_warmup_updates = 0
            clock = Clock(trainer)
            trainer.train()
            steps = [step["step"] for step in clock.steps[1:]]  # every second one has monitors
            whole_steps = statistics.mean(steps)
            pairs = list(zip(times[::2], times[1::2], strict=True))  # of which one update has monitors
            each = [(one[0] + two[0]) / 2 for one, two in pairs]
            drawn = [(one[1] + two[1]) / 2 for one, two in pairs]
            result.rows.append(
                {
                    "demonstrations": count,
                    "rollouts drawn once": 8 * count,
                    "once, s": whole,
                    "of it drawing": drawing,
                    "an update": (whole - drawing) / args.updates,
                    "fresh, s an update": median(each),
                    "IQR": iqr(each),
                    "of it drawing ": median(drawn),
                    "fresh, s (scaled)": args.updates * median(each),
                    "fresh / once": args.updates * median(each) / whole,
                    "a whole step, s": whole_steps,
                    "whole steps / once": args.updates * whole_steps / whole,
                }
            )
            shutil.rmtree(path / "run", ignore_errors=True)
        result.write(args.json)


if __name__ == "__main__":
    common.quiet()
    main()
