"""The loop of updates on stored traces: the warm-up of `train`, and all of `fit`'s fine-tuning."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate.utils import set_seed
from tqdm.auto import tqdm

from tracereward.modeling.distributed import broadcast_object, is_distributed
from tracereward.training.discriminator import Discriminator

SAVED_UPDATES = 20  # updates between two saves


@dataclass(frozen=True, kw_only=True)
class UpdateLoop:
    """Updates of a discriminator on the traces in its replay buffer, resumable exactly.

    Each update has a seed of its own, so that a loop resumes exactly whatever the random state was before.

    Attributes:
        discriminator: with its traces remembered, or loaded from a state that has them.
        seed: of the run.
        judged_every: updates between two held-out accuracies.
        stopped: whether to stop after this update. A collective call.
        log: called after each update with the number of updates and the update's metrics.
        save: called after every `saved_every`-th update and after the last.
        autocast: context of the forward and backward passes.
        saved_every: updates between two saves.
    """

    discriminator: Discriminator
    seed: int
    judged_every: int
    stopped: Callable[[], bool]
    log: Callable[[int, dict[str, float]], None]
    save: Callable[[], None]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    saved_every: int = SAVED_UPDATES

    def run(self, total: int, description: str, quiet: bool = False) -> None:
        """Update until the discriminator has had `total` updates, or a signal stops the run."""
        discriminator = self.discriminator
        progress = tqdm(total=total, initial=discriminator.updates, desc=description, disable=quiet, leave=False)
        while discriminator.updates < total and not self.stopped():
            # Dropout uses the global generator.
            set_seed(self.seed + 500_000 + discriminator.updates, device_specific=is_distributed())
            with self.autocast():
                row = discriminator.update([])
            done = discriminator.updates
            accuracy = self._accuracy()
            if accuracy is not None:
                row |= {"held_out_accuracy": accuracy, "held_out_pairs": float(discriminator.held_out_pairs)}
            progress.update()
            self.log(done, row)
            if done == total or self.stopped() or done % self.saved_every == 0:
                self.save()
        progress.close()

    def _accuracy(self) -> float | None:
        """The held-out accuracy, after every `judged_every`-th update."""
        discriminator = self.discriminator
        if not discriminator.held_out or discriminator.updates == 0:
            return None
        if discriminator.updates % self.judged_every:
            return None
        return broadcast_object(discriminator.held_out_accuracy())  # all processes must use the same number
