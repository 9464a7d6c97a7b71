"""Decoding guided by a reward model: step-level beam search, early rejection and tilted sampling.

Every method counts all sampled tokens, dropped ones included, so that methods can be compared at equal budgets.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tracereward.generation.guide import Guide, Guided


def beam(
    guide: Guide,
    prompts: Sequence[str],
    *,
    width: int = 4,
    expansions: int = 4,
    lookahead: int = 0,
    distinct: bool = True,
) -> list[list[Guided]]:
    """Beam search over steps: each partial trace is expanded, each expansion is scored, the best `width` are kept.

    Ended traces stay in the beam while they are among the best. The first step has width * expansions samples, as later
    ones have.

    Args:
        guide: policy and reward model.
        prompts: rendered.
        width: partial traces kept.
        expansions: next steps sampled from each.
        lookahead: greedy steps added to an expansion for scoring only.
        distinct: drop expansions whose text repeats another's.

    Returns:
        For each prompt at most `width` finished traces, highest reward first.
    """
    encoded = guide.encode(prompts)
    sampled = [0] * len(prompts)
    beams: list[list[list[int]]] = [[[]] * width for _ in prompts]
    step = 0
    while open_beams := [owner for owner, traces in enumerate(beams) if not all(map(guide.ended, traces))]:
        owners, traces, streams = [], [], []
        for owner in open_beams:
            children = [t for t in beams[owner] for _ in range(1 if guide.ended(t) else expansions)]
            traces += children
            owners += [owner] * len(children)
            # The name includes the step: traces of a beam differ in length and must not share random numbers.
            streams += [f"{step} {child}" for child in range(len(children))]
        traces, counts = guide.grow([encoded[owner] for owner in owners], traces, streams)
        add_up(sampled, owners, counts)
        if distinct:
            texts = guide.tokenizer.batch_decode(traces, skip_special_tokens=False)
            first = {key: row for row, key in reversed(list(enumerate(zip(owners, texts, strict=True))))}
            rows = sorted(first.values())
            owners, traces = [owners[row] for row in rows], [traces[row] for row in rows]
        row_prompts, ahead = [encoded[owner] for owner in owners], traces
        for _ in range(lookahead):
            ahead, counts = guide.grow(row_prompts, ahead, [""] * len(ahead), greedy=True)
            add_up(sampled, owners, counts)
        rewards = guide.rewards(row_prompts, ahead)
        for owner in open_beams:
            rows = [row for row, other in enumerate(owners) if other == owner]
            beams[owner] = [traces[row] for row in best(rewards, rows, width)]
        step += 1
    return guide.results(encoded, beams, sampled)


def reject(guide: Guide, prompts: Sequence[str], *, n: int = 8, keep: int = 1, every: int = 1) -> list[list[Guided]]:
    """Best-of-N with early rejection: every `every` steps, drop the lower half of each prompt's traces by reward.

    Of m traces max(keep, ceil(m / 2)) survive; ended traces are compared by their full reward. The tokens of trace i do
    not depend on which others are dropped.

    Args:
        guide: policy and reward model.
        prompts: rendered.
        n: traces at the start.
        keep: traces at the end.
        every: steps between rejections.

    Returns:
        For each prompt the survivors, highest reward first.
    """
    encoded = guide.encode(prompts)
    sampled = [0] * len(prompts)
    alive: list[dict[int, list[int]]] = [{i: [] for i in range(n)} for _ in prompts]  # by sample index
    step = 0
    while growing := [owner for owner, traces in enumerate(alive) if not all(map(guide.ended, traces.values()))]:
        rows = [(owner, i) for owner in growing for i in alive[owner]]
        owners = [owner for owner, _ in rows]
        row_prompts = [encoded[owner] for owner in owners]
        traces, counts = guide.grow(row_prompts, [alive[owner][i] for owner, i in rows], [str(i) for _, i in rows])
        add_up(sampled, owners, counts)
        for (owner, i), trace in zip(rows, traces, strict=True):
            alive[owner][i] = trace
        step += 1
        if step % every:
            continue
        rewards = dict(zip(rows, guide.rewards(row_prompts, traces), strict=True))
        for owner, found in enumerate(alive):
            if owner in growing:
                order = sorted(found, key=lambda i, owner=owner: -rewards[owner, i])
                kept = order[: max(keep, -(-len(order) // 2))]
                alive[owner] = {i: trace for i, trace in found.items() if i in kept}
    survivors = guide.results(encoded, [list(found.values()) for found in alive], sampled)
    return [found[:keep] for found in survivors]


def add_up(totals: list[int], owners: Sequence[int], counts: Sequence[int]) -> None:
    """Add each row's count to its owner's total."""
    for owner, count in zip(owners, counts, strict=True):
        totals[owner] += count


def best(rewards: Sequence[float], rows: Sequence[int], count: int) -> list[int]:
    """The `count` of `rows` with the highest rewards, highest first; ties keep their order."""
    return sorted(rows, key=lambda row: -rewards[row])[:count]


def tilt(guide: Guide, prompts: Sequence[str], *, n: int = 1, alpha: float = 1.0, top_k: int = 8) -> list[list[Guided]]:
    """Sample each token from the policy's distribution, tilted by the reward of that token.

    q(y) is proportional to p(y) exp(alpha r(y)) for the `top_k` most probable y, and 0 elsewhere. p is the policy at
    the guide's temperature, r(y) the reward of y as the next token. With alpha 0 this is top-k sampling; with
    temperature 0 it takes the y with the largest log p(y) + alpha r(y).

    Args:
        guide: policy and reward model.
        prompts: rendered.
        n: traces per prompt.
        alpha: weight of the reward, in nats per log-odds.
        top_k: candidates scored for each token.

    Returns:
        For each prompt `n` traces, highest reward first. Only tokens of the traces count as sampled, not the candidates
        that the reward model scores.
    """
    encoded = guide.encode(prompts)
    owners = [owner for owner in range(len(prompts)) for _ in range(n)]
    streams = [str(row % n) for row in range(len(owners))]
    # The tilt is applied before the division by the temperature.
    weight = alpha * (guide.sampling.temperature or 1.0)
    grown, counts = guide.grow(
        [encoded[owner] for owner in owners],
        [[]] * len(owners),
        streams,
        by_step=False,
        tilt=lambda contexts, logits: tilted(guide, contexts, logits, weight=weight, top_k=top_k),
    )
    traces = [grown[start : start + n] for start in range(0, len(grown), n)]
    return guide.results(encoded, traces, [sum(counts[start : start + n]) for start in range(0, len(counts), n)])


def tilted(guide: Guide, contexts: Sequence[Sequence[int]], logits: Tensor, *, weight: float, top_k: int) -> Tensor:
    """logits + weight * reward for the `top_k` most probable tokens, minus infinity for the others.

    Args:
        guide: provides the reward model.
        contexts: R token sequences, prompt and trace.
        logits: (R, V) next-token logits.
        weight: weight of the reward.
        top_k: tokens to score.

    Returns:
        (R, V).
    """
    values, tokens = logits.topk(min(top_k, logits.size(1)))
    if weight:
        # A trace's last token is always supervised, so its reward does not depend on where the completion begins. With
        # one-token completions, all candidates share the forward pass over their context.
        rows = [(context, [token]) for context, row in zip(contexts, tokens.tolist(), strict=True) for token in row]
        prompts, completions = [context for context, _ in rows], [guide.for_scorer(token) for _, token in rows]
        rewards = guide.scorer.token_rewards(prompts, completions, reference=guide.reference)
        values = values + weight * torch.cat(rewards).view(values.shape).to(values)
    return torch.full_like(logits, -torch.inf).scatter(1, tokens, values)
