"""Decoding that a reward model guides: step-level beam search, early rejection and tilted sampling.

Every method counts the tokens that it draws, the dropped ones too, so that methods are compared at equal budgets.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tracereward.generation.guide import Guide, Guided

GUIDES = ("beam", "reject", "tilt")


def beam(
    guide: Guide,
    prompts: Sequence[str],
    width: int = 4,
    expansions: int = 4,
    lookahead: int = 0,
    distinct: bool = True,
) -> list[list[Guided]]:
    """Beam search over steps: each partial trace is expanded, each expansion is scored, the best `width` go on.

    Traces that have ended stay in the beam as long as they are among the best. The first step draws
    width * expansions times, as a full beam does.

    Args:
        guide: policy and reward model.
        prompts: rendered.
        width: partial traces kept.
        expansions: next steps drawn of each.
        lookahead: steps that are added greedily before an expansion is scored, and dropped then.
        distinct: keep one of the expansions whose texts are the same.

    Returns:
        For each prompt its at most `width` finished traces, by reward from the highest.
    """
    encoded = guide.encode(prompts)
    drawn = [0] * len(prompts)
    beams: list[list[list[int]]] = [[[]] * width for _ in prompts]
    step = 0
    while open_beams := [owner for owner, traces in enumerate(beams) if not all(map(guide.ended, traces))]:
        owners, traces, streams = [], [], []
        for owner in open_beams:
            children = [t for t in beams[owner] for _ in range(1 if guide.ended(t) else expansions)]
            traces += children
            owners += [owner] * len(children)
            # The step is in the name: two traces of one beam stand at different tokens, and must share no number.
            streams += [f"{step} {child}" for child in range(len(children))]
        traces, counts = guide.grow([encoded[owner] for owner in owners], traces, streams)
        add_up(drawn, owners, counts)
        if distinct:
            texts = guide.tokenizer.batch_decode(traces, skip_special_tokens=False)
            first = {key: row for row, key in reversed(list(enumerate(zip(owners, texts, strict=True))))}
            rows = sorted(first.values())
            owners, traces = [owners[row] for row in rows], [traces[row] for row in rows]
        asked, ahead = [encoded[owner] for owner in owners], traces
        for _ in range(lookahead):
            ahead, counts = guide.grow(asked, ahead, [""] * len(ahead), greedy=True)
            add_up(drawn, owners, counts)
        rewards = guide.rewards(asked, ahead)
        for owner in open_beams:
            rows = [row for row, other in enumerate(owners) if other == owner]
            beams[owner] = [traces[row] for row in best(rewards, rows, width)]
        step += 1
    return guide.results(encoded, beams, drawn)


def reject(guide: Guide, prompts: Sequence[str], n: int = 8, keep: int = 1, every: int = 1) -> list[list[Guided]]:
    """Best-of-N that drops traces early: after every `every` steps the better half of a prompt's traces goes on.

    Of m traces ceil(m / 2) survive a check, and never fewer than `keep`; traces that have ended compete with the reward
    of their whole. Trace i is drawn as if it were alone, whatever else is dropped.

    Args:
        guide: policy and reward model.
        prompts: rendered.
        n: traces at the start.
        keep: traces at the end.
        every: steps between two checks.

    Returns:
        For each prompt the survivors, by reward from the highest.
    """
    encoded = guide.encode(prompts)
    drawn = [0] * len(prompts)
    alive: list[dict[int, list[int]]] = [{draw: [] for draw in range(n)} for _ in prompts]  # by number of the draw
    step = 0
    while growing := [owner for owner, traces in enumerate(alive) if not all(map(guide.ended, traces.values()))]:
        rows = [(owner, draw) for owner in growing for draw in alive[owner]]
        owners = [owner for owner, _ in rows]
        asked = [encoded[owner] for owner in owners]
        traces, counts = guide.grow(asked, [alive[o][draw] for o, draw in rows], [str(draw) for _, draw in rows])
        add_up(drawn, owners, counts)
        for (owner, draw), trace in zip(rows, traces, strict=True):
            alive[owner][draw] = trace
        step += 1
        if step % every:
            continue
        rewards = dict(zip(rows, guide.rewards(asked, traces), strict=True))
        for owner, found in enumerate(alive):
            if owner in growing:
                order = sorted(found, key=lambda draw, owner=owner: -rewards[owner, draw])
                kept = order[: max(keep, -(-len(order) // 2))]
                alive[owner] = {draw: trace for draw, trace in found.items() if draw in kept}
    survivors = guide.results(encoded, [list(found.values()) for found in alive], drawn)
    return [found[:keep] for found in survivors]


def add_up(totals: list[int], owners: Sequence[int], counts: Sequence[int]) -> None:
    """Add each row's count to its owner's total."""
    for owner, count in zip(owners, counts, strict=True):
        totals[owner] += count


def best(rewards: Sequence[float], rows: Sequence[int], count: int) -> list[int]:
    """The `count` of `rows` with the highest rewards, from the highest; of equals the first."""
    return sorted(rows, key=lambda row: -rewards[row])[:count]


def tilt(guide: Guide, prompts: Sequence[str], n: int = 1, alpha: float = 1.0, top_k: int = 8) -> list[list[Guided]]:
    """Sample each token from the policy's distribution, tilted by the reward of that token.

    q(y) is proportional to p(y) exp(alpha r(y)) for the `top_k` likeliest y, and 0 elsewhere; p is the policy at the
    guide's temperature, r(y) the reward model's reward of y as the next token. With alpha 0 it is top-k sampling. With
    temperature 0 the y of the largest log p(y) + alpha r(y) is taken.

    Args:
        guide: policy and reward model.
        prompts: rendered.
        n: traces of each.
        alpha: how much the reward counts, in nats per log-odds.
        top_k: candidates of each token that are scored.

    Returns:
        For each prompt `n` traces, by reward from the highest. Only tokens of traces count as drawn: the candidates are
        read by the reward model, not sampled.
    """
    encoded = guide.encode(prompts)
    owners = [owner for owner in range(len(prompts)) for _ in range(n)]
    streams = [str(row % n) for row in range(len(owners))]
    # A tilt comes before the division by the temperature.
    weight = alpha * (guide.temperature or 1.0)
    grown, counts = guide.grow(
        [encoded[owner] for owner in owners],
        [[]] * len(owners),
        streams,
        by_step=False,
        tilt=lambda contexts, logits: tilted(guide, contexts, logits, weight, top_k),
    )
    traces = [grown[start : start + n] for start in range(0, len(grown), n)]
    return guide.results(encoded, traces, [sum(counts[start : start + n]) for start in range(0, len(counts), n)])


def tilted(guide: Guide, contexts: Sequence[Sequence[int]], logits: Tensor, weight: float, top_k: int) -> Tensor:
    """logits + weight * reward of the `top_k` likeliest tokens, minus infinity for the others.

    Args:
        guide: its reward model scores.
        contexts: R token sequences, prompt and trace.
        logits: (R, V) of the next token.
        weight: of the reward.
        top_k: tokens to score.

    Returns:
        (R, V).
    """
    values, tokens = logits.topk(min(top_k, logits.size(1)))
    if weight:
        # The reward of the last token is the same wherever the completion is said to begin: a trace's last token is
        # always supervised. With a completion of that one token, the context is read once for all candidates.
        rows = [(context, [token]) for context, row in zip(contexts, tokens.tolist(), strict=True) for token in row]
        prompts, completions = [context for context, _ in rows], [token for _, token in rows]
        rewards = guide.scorer.token_rewards(prompts, completions, reference=guide.reference)
        values = values + weight * torch.cat(rewards).view(values.shape).to(values)
    return torch.full_like(logits, -torch.inf).scatter(1, tokens, values)
