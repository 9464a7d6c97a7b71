"""Experts and perturbed copies of them, and the AUROC of a reward between the two; it needs no answers."""

import random
from collections.abc import Sequence

from tracereward import metrics
from tracereward.training.discriminator_batch import Expert, Perturber, traces_by_prompt

MONITORED = 64  # demonstrations in the perturbation AUROC
TracePair = tuple[list[int], list[int], list[int]]
"""Prompt, expert, and a perturbed copy, as token ids."""


def perturbed_pairs(
    experts: Sequence[Expert],
    held_out: Sequence[int],
    perturbed: Perturber,
    seed: int,
) -> list[TracePair]:
    """(prompt, expert, perturbed copy) for up to `MONITORED` demonstrations, fixed for the run.

    Held-out demonstrations if there are any, otherwise training demonstrations.
    """
    rng, known = random.Random(f"perturbed pairs {seed}"), traces_by_prompt(experts)
    pool = list(held_out) or [index for index, expert in enumerate(experts) if expert.completion]
    pairs = []
    for index in rng.sample(pool, min(MONITORED, len(pool))):
        # Several perturbations per trace, so that few demonstrations give enough pairs.
        for _ in range(max(1, min(8, MONITORED // len(pool)))):
            changed = perturbed(experts[index], rng)
            if changed is not None and changed[0] not in known[tuple(experts[index].prompt)]:
                pairs.append((experts[index].prompt, experts[index].completion, changed[0]))
    return pairs


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
