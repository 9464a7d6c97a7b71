"""What the discriminator learns from in one update: experts, each beside what is not its own.

Negatives are rollouts of the same prompt, fresh or from a replay buffer, and perturbed copies of the expert's trace.
All of a demonstration's negatives answer its own prompt, by construction: they are looked up by its index.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracereward.data.perturbations import KINDS, perturb
from tracereward.modeling.alignment import token_offsets
from tracereward.modeling.batching import token_budget_batches
from tracereward.modeling.tokenization import encode_completion
from tracereward.training.losses import class_weights, pair_weights

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

    def state(self) -> list[tuple[Any, ...]]:
        """Plain tuples, oldest first."""
        return [tuple(rollout) for rollout in self.rollouts]

    def load(self, state: list[tuple[Any, ...]]) -> None:
        """Put `state` in the place of what is held."""
        self.rollouts = [Rollout(index, list(ids), verified) for index, ids, verified in state]


def by_demonstration(rollouts: Iterable[Rollout]) -> dict[int, list[Rollout]]:
    """Rollouts of each demonstration that has any."""
    found: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.demonstration, []).append(rollout)
    return found


Perturber = Callable[[Expert, random.Random], tuple[list[int], int] | None]


def perturber(tokenizer: Any, delimiter: str, kinds: Sequence[str] = KINDS) -> Perturber:
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
    perturbed: Perturber,
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


def first_difference(completion: Sequence[int], expert: Sequence[int]) -> int:
    """Index of the first token in which a rollout leaves the expert trace of its prompt.

    The shorter length where one is a prefix of the other; the common length where they are equal.
    """
    for index, (a, b) in enumerate(zip(completion, expert)):
        if a != b:
            return index
    return min(len(completion), len(expert))


def after_first_difference(lengths: Sequence[int], starts: Sequence[Sequence[int]], width: int) -> Tensor:
    """Weights that leave out the tokens which a rollout shares with the expert trace: they say nothing about either.

    A rollout has one start: its weight is 0 before it and 1 from it on. An expert trace that is compared with each of
    its rollouts has theirs, and its weight at t is the share of them that have left it by t.

    Args:
        lengths: B completion lengths.
        starts: for each of the B completions, the first differences that apply to it.
        width: T.

    Returns:
        (B, T) float in [0, 1], 0 on padding.
    """
    weights = torch.zeros(len(lengths), width)
    for row, (length, row_starts) in enumerate(zip(lengths, starts, strict=True)):
        for start in row_starts:
            weights[row, start:length] += 1 / len(row_starts)
    return weights


def first_changed_token(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """Index of the token that holds a character: the first that ends after it.

    Args:
        offsets: T >= 1 character spans (start, end) in order; special tokens have an empty span.
        character: index into the text, e.g. the first that a perturbation changed.

    Returns:
        The last token's index if no token ends after the character: a text that was cut short has changed where it
        ends, and the end-of-sequence token says so.
    """
    return next((index for index, (_, end) in enumerate(offsets) if end > character), len(offsets) - 1)


def labels_from(first_change: Sequence[int], width: int) -> Tensor:
    """Token labels: 1, the expert's, before the first changed token, and 0, the policy's, from it on.

    With `step`, `interval` and `dense` supervision the tokens before a perturbation are still the expert's.

    Args:
        first_change: for each of B traces its first changed token: 0 for a rollout, its length or more for an expert.
        width: T.

    Returns:
        (B, T) float.
    """
    starts = torch.tensor(first_change, dtype=torch.long)
    return (torch.arange(width) < starts[:, None]).float()


class Weights(NamedTuple):
    """Of each trace of an update, (N,).

    Attributes:
        is_expert: its class.
        groups: the demonstration whose prompt it answers.
        in_loss: what its loss is multiplied with, so that the sum over all traces is the objective.
        in_pairs: the same of losses of pairs of an expert and a negative.
        of_experts: one over the number of experts, 0 for negatives.
    """

    is_expert: Tensor
    groups: Tensor
    in_loss: Tensor
    in_pairs: Tensor
    of_experts: Tensor

    def of(self, rows: Sequence[int], device: torch.device) -> "Weights":
        """Of some traces."""
        return Weights(*(values[rows].to(device) for values in self))


def weigh(traces: Sequence[Labelled], objective: str) -> Weights:
    """What each trace of an update weighs; one without a token that counts weighs nothing."""
    is_expert = torch.tensor([trace.is_expert for trace in traces])
    counts = torch.tensor([trace.counts for trace in traces])
    groups = torch.tensor([trace.group for trace in traces])
    in_pairs = pair_weights(is_expert, counts, groups)
    in_loss = in_pairs if objective == "pairwise" else class_weights(is_expert, counts)
    if objective == "wgan":
        in_loss = 2 * in_loss  # E[policy] - E[expert], not its half
    of_experts = (is_expert & counts).float() / (is_expert & counts).sum().clamp(min=1)
    return Weights(is_expert, groups, in_loss, in_pairs, of_experts)


def passes(
    traces: Sequence[Labelled], paired: bool, token_budget: int, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """Indices of the traces of each forward and backward pass that one process makes; those that do not count in none.

    Args:
        traces: of one update, the same on all processes.
        paired: whether the loss compares an expert with its negatives: then they stay in one pass, and on one process.
        token_budget: padded tokens of a pass.
        rank: this process, which has every `world`-th trace or pair.
        world: processes.
    """
    units: dict[int, list[int]] = {}
    for index, trace in enumerate(traces):
        if trace.counts:
            units.setdefault(trace.group if paired else index, []).append(index)
    mine = list(units.values())[rank::world]
    longest = [max(len(traces[i].prompt) + len(traces[i].completion) for i in unit) for unit in mine]
    batches = token_budget_batches(longest, token_budget, [len(unit) for unit in mine])
    return [[index for unit in batch for index in mine[unit]] for batch in batches]
