"""What the discriminator learns from in one update: experts, each beside what is not its own.

Negatives are rollouts of the same prompt, fresh or from a replay buffer, and perturbed copies of the expert's trace.
All of a demonstration's negatives answer its own prompt, by construction: they are looked up by its index.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tracereward.alignment import token_offsets
from tracereward.demonstrations import encode_completion
from tracereward.masks import first_changed_token, first_difference
from tracereward.perturb import KINDS, perturb

MONITORED = 64  # demonstrations whose perturbed copies are scored for the perturbation AUROC


class Expert(NamedTuple):
    """A demonstration: token ids of the reward model, and the completion's text, which perturbations start from."""

    prompt: list[int]
    completion: list[int]
    text: str = ""


class Rollout(NamedTuple):
    """A policy's completion of a demonstration's prompt; `verified` if a verifier found it right and may say so."""

    demonstration: int
    ids: list[int]
    verified: bool = False


@dataclass(frozen=True)
class Labelled:
    """A trace with its labels.

    Attributes:
        prompt: token ids.
        completion: token ids.
        group: index of the demonstration whose prompt it answers.
        is_expert: the class it belongs to.
        starts: first differences; the weight of token t is the share of them at or before t.
        switch: first token whose label is the policy's: 0 for a rollout, the length for an expert, in between for a
            perturbed expert.
        is_perturbed: whether it is a perturbed expert.
    """

    prompt: list[int]
    completion: list[int]
    group: int
    is_expert: bool
    starts: list[int]
    switch: int
    is_perturbed: bool = False

    @property
    def counts(self) -> bool:
        """Whether any of its tokens has a weight."""
        return any(start < len(self.completion) for start in self.starts)


class ReplayBuffer:
    """The newest `size` rollouts, by demonstration."""

    def __init__(self, size: int):
        self.size = size
        self.rollouts: list[Rollout] = []

    def add(self, rollouts: Iterable[Rollout]) -> None:
        """Take rollouts in; the oldest leave first."""
        self.rollouts = [*self.rollouts, *rollouts][-self.size :]

    def by_demonstration(self) -> dict[int, list[Rollout]]:
        """Rollouts of each demonstration that has any."""
        return by_demonstration(self.rollouts)

    def state(self) -> list[tuple]:
        """Plain tuples, oldest first."""
        return [tuple(rollout) for rollout in self.rollouts]

    def load(self, state: list[tuple]) -> None:
        """Put `state` in the place of what is held."""
        self.rollouts = [Rollout(index, list(ids), verified) for index, ids, verified in state]


def by_demonstration(rollouts: Iterable[Rollout]) -> dict[int, list[Rollout]]:
    """Rollouts of each demonstration that has any."""
    found: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.demonstration, []).append(rollout)
    return found


def perturber(
    tokenizer: Any, delimiter: str, kinds: Sequence[str] = KINDS
) -> Callable[[Expert, random.Random], tuple[list[int], int] | None]:
    """A function that perturbs an expert: token ids, and the first token that holds a changed character.

    It gives None where no perturbation applies, or where the changed text has the same tokens: never the original.
    """

    def perturbed(expert: Expert, rng: random.Random) -> tuple[list[int], int] | None:
        changed = perturb(expert.text, rng, kinds, delimiter)
        if changed is None:
            return None
        ids = encode_completion(tokenizer, changed.text)
        if ids == expert.completion:
            return None
        text, offsets = token_offsets(tokenizer, ids)
        # Where the tokenizer changes the text (an unknown word), the first token that differs is all that is known.
        same = text == changed.text
        return ids, first_changed_token(offsets, changed.first_change) if same else first_difference(
            ids, expert.completion
        )

    return perturbed


def perturbed_pairs(
    experts: Sequence[Expert],
    held_out: Sequence[int],
    perturbed: Callable[[Expert, random.Random], tuple[list[int], int] | None],
    seed: int,
) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, expert, its perturbed copy) of up to `MONITORED` demonstrations, the same throughout a run.

    Of held-out demonstrations where there are any; without, the discriminator is asked about what it learned from.
    """
    rng = random.Random(f"perturbed pairs {seed}")
    pool = list(held_out) or list(range(len(experts)))
    pairs = []
    for index in rng.sample(pool, min(MONITORED, len(pool))):
        # Some of a trace's perturbations: few demonstrations must still give enough pairs.
        for _ in range(max(1, min(8, MONITORED // len(pool)))):
            changed = perturbed(experts[index], rng)
            if changed is not None:
                pairs.append((experts[index].prompt, experts[index].completion, changed[0]))
    return pairs


@dataclass(frozen=True)
class Recipe:
    """How an update's batch is put together.

    Attributes:
        prompts: demonstrations in it.
        rollouts: rollouts beside each.
        replay_share: share of the demonstrations whose rollouts come from the replay buffer; more where there are too
            few fresh ones, none for 0.
        perturbed: perturbed copies beside each.
        first_difference: whose shared beginnings are left out: ``rollouts``, ``both`` or ``none``.
    """

    prompts: int
    rollouts: int
    replay_share: float
    perturbed: int
    first_difference: str


def draw(
    experts: Sequence[Expert],
    fresh: Sequence[Rollout],
    replay: ReplayBuffer,
    recipe: Recipe,
    rng: random.Random,
    perturbed: Callable[[Expert, random.Random], tuple[list[int], int] | None] | None = None,
) -> tuple[list[Labelled], dict[str, float]]:
    """One update's traces: for each chosen demonstration the expert, then its negatives.

    Rollouts that equal the expert's trace token for token would carry both labels: they are left out. Verified rollouts
    are further positives.

    Returns:
        The traces, and `identical_share` (of the rollouts chosen), `verified_share` if there is any, and
        `perturbed_missing_share` (of the perturbations asked for) if any was asked for.
    """
    old, new = replay.by_demonstration(), by_demonstration(fresh)
    size = min(recipe.prompts, len(old.keys() | new.keys()))
    from_fresh = rng.sample(sorted(new), min(round(size * (1 - recipe.replay_share)), len(new)))
    # Few fresh rollouts are filled up with older ones, unless none are wanted; a warm-up has only older ones.
    others = [] if fresh and not recipe.replay_share else sorted(old.keys() - set(from_fresh))
    from_replay = rng.sample(others, min(size - len(from_fresh), len(others)))
    pairs = [(index, new[index]) for index in from_fresh] + [(index, old[index]) for index in from_replay]

    traces: list[Labelled] = []
    seen = identical = verified = missing = 0
    where = recipe.first_difference
    for index, candidates in pairs:
        expert = experts[index]
        chosen = rng.sample(candidates, min(recipe.rollouts, len(candidates)))
        different = [rollout for rollout in chosen if rollout.ids != expert.completion]
        seen, identical = seen + len(chosen), identical + len(chosen) - len(different)
        negatives: list[Labelled] = []
        positives: list[Labelled] = []
        for rollout in different:
            if rollout.verified:
                positives.append(Labelled(expert.prompt, rollout.ids, index, True, [0], len(rollout.ids)))
                continue
            start = 0 if where == "none" else first_difference(rollout.ids, expert.completion)
            negatives.append(Labelled(expert.prompt, rollout.ids, index, False, [start], 0))
        for _ in range(recipe.perturbed):
            changed = None if perturbed is None else perturbed(expert, rng)
            if changed is None:
                missing += 1
                continue
            ids, switch = changed
            negatives.append(
                Labelled(expert.prompt, ids, index, False, [0 if where == "none" else switch], switch, True)
            )
        verified += len(positives)
        # Without a negative there is nothing to tell the expert from: no start, so that it does not count.
        starts = [trace.starts[0] for trace in negatives] if where == "both" else [0][: len(negatives)]
        positives = positives if negatives else []
        traces.append(Labelled(expert.prompt, expert.completion, index, True, starts, len(expert.completion)))
        traces += positives + negatives
    shares = {"identical_share": identical / max(1, seen)}
    if verified:
        shares["verified_share"] = verified / seen
    if recipe.perturbed:
        shares["perturbed_missing_share"] = missing / max(1, recipe.perturbed * len(pairs))
    return traces, shares
