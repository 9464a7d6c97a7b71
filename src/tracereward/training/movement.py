"""Did anything move? Whether the discriminator, and the policy, learned at all, from the rows of ``metrics.jsonl``.

The discriminator's held-out accuracy is at chance if it is below 0.5 + 1.96 sqrt(0.25 / n), n pairs; the pairs of a
prompt share an expert, so that the interval is rather too short than too long. A loss fell if the mean of the second
half of its values is lower than that of the first, by `LOSS_FALL` of its size and significantly (Welch's test, one
sided, 5 %). Both are read in the warm-up and in the training: a policy that reaches its experts brings the accuracy
back to chance, which is success.

The policy's movement is the KL to its start per token. Where it is not logged: the sum of the learning rates, which
bounds the change of a weight under Adam. A policy that imitates moved if its loss fell.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy import stats

from tracereward.metrics import mean

FEWEST = 4  # losses of which two halves can be compared
LOSS_FALL = 0.01
KL_FLOOR = 1e-4  # nats per token; the rounding of bfloat16 alone gives nearly as much
CHANGE_FLOOR = 1e-5  # of a weight: weights of transformers are about 0.02
RAISE = "raise --discriminator_learning_rate or --discriminator_warmup_updates"

ACCURACY, PAIRS, LOSS = "discriminator/held_out_accuracy", "discriminator/held_out_pairs", "discriminator/loss"
KLS = ("kl", "monitor/kl")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Movement:
    """Whether a model moved (None: unknown), the sentence that says so, and the figures in it."""

    moved: bool | None
    line: str
    figures: dict[str, float] = field(default_factory=dict)


def discriminator_movement(rows: Sequence[Row], advice: str = RAISE) -> Movement | None:
    """Whether the discriminator learned; None if it was never updated.

    Args:
        rows: of one run, in order; those of the warm-up have ``phase`` ``warmup``.
        advice: what to do if it is at chance.
    """
    parts = [[row for row in rows if (row.get("phase") == "warmup") == warmup] for warmup in (True, False)]
    losses = [found for found in (_values(part, LOSS) for part in parts) if found]
    if not losses:
        return None
    falling = next((found for found in losses if fell(found)), None)
    ends = falling or losses[0]
    figures = {"loss_first": _ends(ends)[0], "loss_last": _ends(ends)[1]}
    change = "{loss_first:.3g} to {loss_last:.3g}".format(**figures)
    judged = [found for found in map(_accuracy, parts) if found is not None]
    if not judged:
        if falling is None and max(map(len, losses)) < FEWEST:
            total = sum(map(len, losses))
            few = "1 update of the discriminator is" if total == 1 else f"{total} updates of the discriminator are"
            line = f"{few} too few to see whether it moves: {advice}"
            return Movement(None, line, figures)
        if falling is None:
            return Movement(False, f"the discriminator's loss did not fall clearly ({change}): {advice}", figures)
        return Movement(True, f"the discriminator moved (loss {change})", figures)
    accuracy, pairs = max(judged)
    figures |= {"held_out_accuracy": accuracy, "held_out_pairs": pairs}
    shown = f"held-out accuracy {accuracy:.2f} on {pairs:.0f} pair{'s' * (pairs != 1)}"
    if accuracy > 0.5 + 1.96 * math.sqrt(0.25 / pairs):
        return Movement(True, f"the discriminator moved ({shown})", figures)
    if falling is None:
        return Movement(False, f"the discriminator is at chance ({shown}): {advice}", figures)
    line = f"the discriminator fits its own demonstrations (loss {change}) but no others ({shown}): add demonstrations"
    return Movement(True, line, figures)


def policy_movement(rows: Sequence[Row]) -> Movement | None:
    """Whether the policy moved away from its start; None if it had no step.

    Args:
        rows: of the training, in order, without those of a warm-up.
    """
    steps = [row for row in rows if row.get("phase") != "warmup" and _number(row.get("learning_rate")) is not None]
    if not steps:
        return None
    found = next((kl for kl in (_values(steps, name) for name in KLS) if kl), None)
    norms = _values(steps, "grad_norm")
    if found:
        figures, moved, shown = {"kl_to_start": found[-1]}, found[-1] >= KL_FLOOR, f"KL to its start {found[-1]:.2g}"
    else:
        total = _summed_rates(steps)
        figures, moved, shown = {"learning_rates": total}, total >= CHANGE_FLOOR, f"learning rates sum to {total:.2g}"
    if norms and not any(norms):
        line = f"the policy did not move (every gradient is 0, {shown}): the rewards of a prompt's rollouts are equal"
        return Movement(False, line, figures)
    if moved:
        return Movement(True, f"the policy moved ({shown})", figures)
    return Movement(False, f"the policy did not move ({shown}): raise --learning_rate", figures)


def imitation_movement(rows: Sequence[Row]) -> Movement | None:
    """Whether a policy learned its demonstrations in SFT; None if it had too few steps to tell.

    The figures are the mean losses of the first and the second half of the steps.

    Args:
        rows: of the run, in order, with ``loss``.
    """
    losses = _values(rows, "loss")
    if len(losses) < FEWEST:
        return None
    half = len(losses) // 2
    first, last = mean(losses[:half]), mean(losses[-half:])
    figures, shown = {"loss_first": first, "loss_last": last}, f"loss {first:.3g} to {last:.3g}"
    if fell(losses):
        return Movement(True, f"the policy learned its demonstrations ({shown})", figures)
    return Movement(
        False, f"the policy's loss did not fall ({shown}): raise --learning_rate or --num_train_epochs", figures
    )


def movement_row(discriminator: Movement | None, policy: Movement | None = None) -> dict[str, Any]:
    """The row of ``metrics.jsonl`` on both, without its phase and step; ``line`` is the sentence on both."""
    named = {"discriminator": discriminator, "policy": policy}
    known = {name: one for name, one in named.items() if one is not None}
    if not known:
        return {}
    line = "; ".join(one.line for one in known.values())
    moved = {f"{name}_moved": one.moved for name, one in known.items()}
    figures = {key: value for one in known.values() for key, value in one.figures.items()}
    return {"line": line[0].upper() + line[1:], **moved, **figures}


def fell(values: Sequence[float]) -> bool:
    """Whether a series fell; see the module's docstring. False with fewer than `FEWEST` values."""
    half = len(values) // 2
    if len(values) < FEWEST:
        return False
    first, second = values[:half], values[-half:]
    fall = mean(first) - mean(second)
    if fall <= LOSS_FALL * abs(mean(first)):
        return False
    if len({*first}) == len({*second}) == 1:
        return True  # Welch's statistic is infinite
    _, p = stats.ttest_ind(first, second, equal_var=False, alternative="greater")
    return float(p) < 0.05  # pyright: ignore[reportArgumentType]


def _accuracy(rows: Iterable[Row]) -> tuple[float, float] | None:
    """The mean of the better half of the held-out accuracies, and the number of pairs of the last."""
    found = [(_number(row.get(ACCURACY)), _number(row.get(PAIRS))) for row in rows]
    known = [(accuracy, pairs) for accuracy, pairs in found if accuracy is not None and pairs]
    if not known:
        return None
    values = [accuracy for accuracy, _ in known]
    half = -(-len(values) // 2)
    return max(mean(values[:half]), mean(values[-half:])), known[-1][1]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last tenth."""
    size = max(1, len(values) // 10)
    return mean(values[:size]), mean(values[-size:])


def _summed_rates(rows: Sequence[Row]) -> float:
    """Sum of the learning rate over all steps: a logged one holds since the row before."""
    total, last = 0.0, 0.0
    for row in rows:
        step = _number(row.get("step")) or 0.0
        total += row["learning_rate"] * max(0.0, step - last)
        last = max(last, step)
    return total


def _values(rows: Iterable[Row], key: str) -> list[float]:
    found = [_number(row.get(key)) for row in rows]
    return [value for value in found if value is not None]


def _number(value: object) -> float | None:
    """A finite number, else None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
