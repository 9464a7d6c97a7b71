"""The loop of updates on stored traces: the warm-up of `train`, and all of `fit`'s fine-tuning."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import set_seed
from tqdm.auto import tqdm

from tracereward import metrics
from tracereward.console import warn
from tracereward.data.surface_probe import TraceText, leak_warning, surface_probe
from tracereward.modeling.distributed import broadcast_object, is_distributed
from tracereward.training.discriminator import Discriminator
from tracereward.training.discriminator_batch import Expert, Rollout

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


def surface_leaks(
    experts: Sequence[Expert], rollouts: Sequence[Rollout], tokenizer: Any, others: str = "rollouts"
) -> dict[str, Any]:
    """Warn if surface features, or single tokens, alone distinguish the positives from the negatives.

    Args:
        experts: the demonstrations.
        rollouts: further traces of their prompts; those without a label are ignored.
        tokenizer: the reward model's.
        others: what the warning calls the negatives.

    Returns:
        `surface/auroc`, and the most predictive features.
    """
    rollouts = [rollout for rollout in rollouts if rollout.label is not None]
    texts = tokenizer.batch_decode([rollout.ids for rollout in rollouts], skip_special_tokens=True)
    names = tokenizer.convert_ids_to_tokens

    def trace(index: int, text: str, ids: list[int]) -> TraceText:
        return TraceText(str(index), text, ids[-1:] == [tokenizer.eos_token_id], names(ids))

    used = sorted({rollout.demonstration for rollout in rollouts})
    sides: dict[bool, list[TraceText]] = {True: [], False: []}
    sides[True] += [trace(i, experts[i].text, experts[i].completion) for i in used]
    for rollout, text in zip(rollouts, texts, strict=True):
        sides[bool(rollout.label)].append(trace(rollout.demonstration, text, rollout.ids))
    probe = surface_probe(sides[True], sides[False], names(list(tokenizer.added_tokens_decoder)))
    warning = leak_warning(probe, others)
    if warning is not None:
        warn(warning)
    return {"surface/auroc": probe.auroc, "surface/features": [feature.name for feature in probe.features]}


TracePair = tuple[list[int], list[int], list[int]]
"""Prompt, expert, and a perturbed copy, as token ids."""


def pair_traces(pairs: Sequence[TracePair]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of the distinct traces in pairs: with few demonstrations an expert is in several."""
    keys = [((*prompt,), (*ids,)) for prompt, *both in pairs for ids in both]
    traces = list(dict.fromkeys(keys))
    return [list(prompt) for prompt, _ in traces], [list(ids) for _, ids in traces]


def pair_auroc(pairs: Sequence[TracePair], rewards: Sequence[float]) -> float:
    """AUROC of experts against their perturbed copies; needs no answers.

    Args:
        pairs: see `TracePair`.
        rewards: of the traces of `pair_traces`.
    """
    prompts, completions = pair_traces(pairs)
    keys = [((*prompt,), (*ids,)) for prompt, ids in zip(prompts, completions, strict=True)]
    scores = dict(zip(keys, rewards, strict=True))
    experts = [scores[(*prompt,), (*expert,)] for prompt, expert, _ in pairs]
    altered = [scores[(*prompt,), (*changed,)] for prompt, _, changed in pairs]
    return metrics.perturbation_auroc(experts, altered)
