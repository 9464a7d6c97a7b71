"""Values of options that are not given, by the size of the model and the demonstrations.

docs/recipe.md has the source of every value. The functions are pure; `commands.choosing` applies them.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from tracereward.training.trl_options import SFT, TRAIN


class Rates(NamedTuple):
    """Learning rates, with all weights trained, of models up to a number of parameters."""

    parameters: float
    sft: float
    policy: float
    discriminator: float


RATES = (
    Rates(10e6, sft=3e-4, policy=1e-4, discriminator=1e-3),
    Rates(1e9, sft=1e-4, policy=3e-6, discriminator=3e-5),
    Rates(math.inf, sft=2e-5, policy=1e-6, discriminator=1e-5),
)
LORA = 10.0
"""Learning rate of LoRA adapters over that of all weights."""
LORA_HIGHEST = 5e-4
ONLINE = 0.2
"""The discriminator's learning rate after the warm-up over that of the warm-up."""
WARMUP = 0.1
BATCH = 8
"""Demonstrations of an SFT step, and rollouts of a micro-batch."""
PROMPTS = 8
"""Prompts of a step of GRPO, over all processes."""
STEPS = 100
EPOCHS, MOST_EPOCHS = 3, 15
MOST_EPOCHS_OF_SFT = 5
"""Of a pretrained language model: more passes over few traces take from it what they do not show."""
LONGEST = 1024
ROOM = 1.5
"""Length limit of rollouts over the longest demonstration."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the values depend on.

    Attributes:
        parameters: of the policy.
        lora: whether adapters are trained instead of all weights.
        prompts: demonstrations and unlabeled prompts.
        longest_prompt: tokens of the longest prompt.
        longest_completion: tokens of the longest demonstration, with its end.
        context: tokens that the policy reads.
        processes: of the run.
        group: rollouts of a prompt; 1 for SFT.
    """

    parameters: int
    lora: bool
    prompts: int
    longest_prompt: int
    longest_completion: int
    context: float = math.inf
    processes: int = 1
    group: int = 1


def learning_rates(parameters: float, lora: bool) -> Rates:
    """The learning rates of a model.

    Args:
        parameters: number of its weights.
        lora: whether adapters are trained; their rates are `LORA` times as high, at most `LORA_HIGHEST`.
    """
    rates = next(rates for rates in RATES if parameters < rates.parameters)
    if not lora:
        return rates
    low, high = (Rates(rates.parameters, *(scale * rate for rate in rates[1:])) for scale in (1.0, LORA))
    return Rates(rates.parameters, *(max(a, min(b, LORA_HIGHEST)) for a, b in zip(low[1:], high[1:])))


def completion_length(size: Size) -> int:
    """`ROOM` times the longest demonstration in whole 16s, in what the model and `LONGEST` leave."""
    wanted = 16 * math.ceil(ROOM * size.longest_completion / 16)
    left = size.context - size.longest_prompt
    return min(LONGEST, max(size.longest_completion, int(min(wanted, left))))


def batch(size: Size) -> tuple[int, int]:
    """Rows of a micro-batch on a process, and micro-batches of a step.

    SFT has one micro-batch of up to `BATCH` demonstrations on each process; GRPO `PROMPTS` prompts over all processes
    with a group of rollouts each, or as many as there are.
    """
    if size.group == 1:
        return max(1, min(BATCH, size.prompts // size.processes)), 1
    rows = BATCH
    while rows * size.processes % size.group:  # a batch of rollouts has complete groups
        rows += 1
    prompts = max(1, min(PROMPTS, size.prompts))
    return rows, max(1, prompts * size.group // (rows * size.processes))


def epochs(size: Size, rows_of_step: int) -> int:
    """`EPOCHS`, or as many as `STEPS` steps take, at most `MOST_EPOCHS` or `MOST_EPOCHS_OF_SFT`.

    Args:
        size: of the model and the data.
        rows_of_step: prompts of an optimiser step.
    """
    pretrained = size.parameters >= RATES[0].parameters
    most = MOST_EPOCHS_OF_SFT if size.group == 1 and pretrained else MOST_EPOCHS
    return max(EPOCHS, min(most, math.ceil(STEPS * rows_of_step / size.prompts)))


def chosen_values(command: str, size: Size, given: dict[str, Any]) -> dict[str, Any]:
    """The values of a training command that are not given.

    Args:
        command: ``sft``, ``grpo`` or ``train``.
        size: of the model and the data.
        given: values by name; None where nothing is given.
    """

    def missing(*names: str) -> bool:
        return all(given.get(name) is None for name in names)

    rates = learning_rates(size.parameters, size.lora)
    values: dict[str, Any] = {"learning_rate": rates.sft if command == SFT else rates.policy}
    values |= {"warmup_steps": WARMUP, "max_completion_length": completion_length(size)}
    rows, passes = given.get("per_device_train_batch_size"), given.get("gradient_accumulation_steps")
    if missing("per_device_train_batch_size", "gradient_accumulation_steps", *OTHER_BATCH):
        rows, passes = batch(size)
    rows, passes = rows or BATCH, passes or 1
    values |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}
    rows_of_step = max(1, rows * passes * size.processes // size.group)
    values["num_train_epochs"] = epochs(size, rows_of_step)
    if command == TRAIN:
        values["discriminator_learning_rate"] = rates.discriminator
        if missing("discriminator_learning_rate") and given.get("discriminator_warmup_updates"):
            values["discriminator_online_learning_rate"] = ONLINE * rates.discriminator
    return {name: value for name, value in values.items() if missing(name)}


OTHER_BATCH = ("generation_batch_size", "steps_per_generation")
"""Options of TRL that say how many rollouts are sampled together."""
