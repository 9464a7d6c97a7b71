"""The traces of one discriminator update: experts, each with negatives of the same prompt.

Negatives are rollouts, fresh or from a replay buffer, and perturbed copies of the expert's trace. They are looked up by
the demonstration's index, so that they always answer its own prompt.
"""

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tracereward.data.perturbations import KINDS, perturb
from tracereward.modeling.steps import StepRule
from tracereward.modeling.tokenization import encode_completion
from tracereward.training.first_difference import first_difference
from tracereward.training.options import ExampleOptions


class Expert(NamedTuple):
    """A demonstration in the reward model's token ids, the completion's text, which is perturbed, and its weight.

    Without a completion: a prompt without a demonstration, whose rollouts are negatives alone.
    """

    prompt: list[int]
    completion: list[int]
    text: str = ""
    weight: float = 1.0


class Rollout(NamedTuple):
    """A completion of a demonstration's prompt by the policy.

    `label`: True for a further positive, False for a negative, None for one that is left out, see `label_rules`.
    `weight` is what it weighs in its class, see `loss_weights.balance_weights`; with 0 it is not trained on.
    """

    demonstration: int
    ids: list[int]
    label: bool | None = False
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A trace with its labels.

    Attributes:
        prompt: token ids.
        completion: token ids.
        group: index of the demonstration whose prompt it answers.
        is_expert: the trace's class.
        starts: first differences; the weight of token t is the share of them at or before t.
        switch: first token labelled as the policy's: 0 for a rollout, the length for an expert, in between for a
            perturbed expert.
        is_perturbed: whether it is a perturbed expert.
        weight: non-negative; what it weighs among the traces of its class.
    """

    prompt: list[int]
    completion: list[int]
    group: int
    is_expert: bool
    starts: list[int]
    switch: int
    is_perturbed: bool = False
    weight: float = 1.0

    @property
    def counts(self) -> bool:
        """Whether any token has a non-zero weight."""
        return self.weight > 0 and any(start < len(self.completion) for start in self.starts)


_IDS: dict[int, int] = {}


def shared_ids(ids: Iterable[int]) -> list[int]:
    """Token ids of which equal ones are one object: 8 bytes a token in memory, not 36."""
    return [_IDS.setdefault(token, token) for token in ids]


class ReplayBuffer:
    """The newest `size` rollouts, by demonstration."""

    def __init__(self, size: int):
        self.size = size
        self.rollouts: list[Rollout] = []

    def add(self, rollouts: Iterable[Rollout]) -> None:
        """Append rollouts and drop the oldest."""
        new = [rollout._replace(ids=shared_ids(rollout.ids)) for rollout in rollouts]
        self.rollouts = [*self.rollouts, *new][-self.size :]

    def by_demonstration(self) -> dict[int, list[Rollout]]:
        """Rollouts by demonstration, for those that have any."""
        return by_demonstration(self.rollouts)

    def state(self) -> list[tuple[Any, ...]]:
        """Plain tuples, oldest first."""
        return [tuple(rollout) for rollout in self.rollouts]

    def load(self, state: list[tuple[Any, ...]]) -> None:
        """Replace the contents by `state`."""
        self.rollouts = [Rollout(index, shared_ids(ids), *more) for index, ids, *more in state]


def by_demonstration(rollouts: Iterable[Rollout]) -> dict[int, list[Rollout]]:
    """Rollouts by demonstration, for those that have any."""
    found: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.demonstration, []).append(rollout)
    return found


TracesByPrompt = Mapping[tuple[int, ...], Sequence[list[int]]]
"""Completions of the demonstrations of each prompt."""


def traces_by_prompt(experts: Iterable[Expert]) -> dict[tuple[int, ...], list[list[int]]]:
    """All expert completions of each prompt: a prompt may have several demonstrations, or none."""
    found: dict[tuple[int, ...], list[list[int]]] = {}
    for expert in experts:
        found.setdefault(tuple(expert.prompt), []).extend([expert.completion] if expert.completion else [])
    return found


Perturber = Callable[[Expert, random.Random], tuple[list[int], int] | None]


def perturber(tokenizer: Any, rule: StepRule, kinds: Sequence[str] = KINDS) -> Perturber:
    """A function that perturbs an expert and returns token ids and the first that differs from the expert's.

    The latter may be before the token that completes the first changed character: tokens may hold parts of a
    character, or be cut in other places. The function returns None if no perturbation applies or if the changed text
    has the same tokens; never the original.
    """

    def perturbed(expert: Expert, rng: random.Random) -> tuple[list[int], int] | None:
        changed = perturb(expert.text, rng, kinds, rule)
        if changed is None:
            return None
        ids = encode_completion(tokenizer, changed.text)
        if ids == expert.completion:
            return None
        return ids, first_difference(ids, expert.completion)

    return perturbed


def draw(
    experts: Sequence[Expert],
    fresh: Sequence[Rollout],
    replay: ReplayBuffer,
    options: ExampleOptions,
    *,
    rng: random.Random,
    perturbed: Perturber | None = None,
    known: TracesByPrompt | None = None,
) -> tuple[list[Labelled], dict[str, float]]:
    """Sample one update's traces: for each chosen demonstration the expert, then its negatives.

    If the replay buffer has rollouts of prompts without a demonstration, some of these prompts are chosen in addition:
    as large a share as of the demonstrations, but no more of them.

    Rollouts that equal an expert trace of their prompt token for token would carry both labels and are dropped; so are
    such perturbed copies. Tokens that a rollout shares with any expert trace of its prompt count as shared. Rollouts
    with a positive label are additional positives.

    Args:
        experts: all demonstrations.
        fresh: the newest rollouts, none left out.
        replay: earlier rollouts, used for `replay_share` of the demonstrations and where fresh ones are too few; and
            all rollouts of prompts without a demonstration.
        options: number of demonstrations, rollouts and perturbed copies, and the rule for shared beginnings.
        rng: source of all random choices.
        perturbed: makes the perturbed copies; without it all are missing.
        known: `traces_by_prompt` of the experts; computed here if None.

    Returns:
        The traces, and shares: `identical_share` (of the sampled rollouts), `positive_share` if some are
        positives, and `perturbed_missing_share` (of the requested copies) if copies were requested.
    """
    known = traces_by_prompt(experts) if known is None else known
    stored, new = replay.by_demonstration(), by_demonstration(fresh)
    old = {index: rollouts for index, rollouts in stored.items() if experts[index].completion}
    alone = sorted(stored.keys() - old.keys())
    size = min(options.discriminator_prompts, len(old.keys() | new.keys()))
    from_fresh = rng.sample(sorted(new), min(round(size * (1 - options.replay_share)), len(new)))
    # Too few fresh rollouts are filled up with older ones unless replay is off; the warm-up has only older ones.
    others = [] if fresh and not options.replay_share else sorted(old.keys() - set(from_fresh))
    from_replay = rng.sample(others, min(size - len(from_fresh), len(others)))
    pairs = [(index, new[index]) for index in from_fresh] + [(index, old[index]) for index in from_replay]
    demonstrated = len(pairs)
    if alone:
        further_prompts = math.ceil(demonstrated * min(1, len(alone) / max(1, len(old))))
        pairs += [(index, stored[index]) for index in rng.sample(alone, min(further_prompts, len(alone)))]

    traces: list[Labelled] = []
    seen = identical = further = missing = 0
    keep_shared = options.first_difference == "none"
    for index, candidates in pairs:
        expert = experts[index]
        labelled = functools.partial(Labelled, prompt=expert.prompt, group=index)
        chosen = rng.sample(candidates, min(options.discriminator_rollouts, len(candidates)))
        own = known[tuple(expert.prompt)]
        different = [rollout for rollout in chosen if rollout.ids not in own]
        seen, identical = seen + len(chosen), identical + len(chosen) - len(different)
        negatives: list[Labelled] = []
        positives: list[Labelled] = []
        left: list[int] = []  # where each negative leaves this expert's trace
        for rollout in different:
            if rollout.label:
                length = len(rollout.ids)
                positives.append(
                    labelled(completion=rollout.ids, is_expert=True, starts=[0], switch=length, weight=rollout.weight)
                )
                continue
            start = 0 if keep_shared else max((first_difference(rollout.ids, trace) for trace in own), default=0)
            left.append(first_difference(rollout.ids, expert.completion))
            negatives.append(
                labelled(completion=rollout.ids, is_expert=False, starts=[start], switch=0, weight=rollout.weight)
            )
        if not expert.completion:
            traces += negatives
            continue
        for _ in range(options.perturbed_per_expert):
            changed = None if perturbed is None else perturbed(expert, rng)
            if changed is None or changed[0] in own:
                missing += 1
                continue
            ids = changed[0]
            left.append(changed[1])
            switch = max(first_difference(ids, trace) for trace in own)
            starts = [0 if keep_shared else switch]
            copy = labelled(completion=ids, is_expert=False, starts=starts, switch=switch, weight=expert.weight)
            negatives.append(dataclasses.replace(copy, is_perturbed=True))
        further += len(positives)
        # Without a negative the expert has nothing to be compared with: no start, so that its weight is 0.
        starts = left if options.first_difference == "both" else [0][: len(negatives)]
        positives = positives if negatives else []
        length = len(expert.completion)
        traces.append(
            labelled(completion=expert.completion, is_expert=True, starts=starts, switch=length, weight=expert.weight)
        )
        traces += positives + negatives
    shares = {"identical_share": identical / max(1, seen)}
    if further:
        shares["positive_share"] = further / seen
    if options.perturbed_per_expert:
        shares["perturbed_missing_share"] = missing / max(1, options.perturbed_per_expert * demonstrated)
    return traces, shares
