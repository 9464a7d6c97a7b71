"""Gradient penalties of the discriminator, with respect to the embeddings of completions.

The critic is s, the mean of f_t over supervised positions, as a function of the backbone's input embeddings. Both
penalties need second derivatives, which fused attention kernels do not support.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tracereward.modeling.batching import Batch, token_budget_batches
from tracereward.rewards.model import TokenRewardModel
from tracereward.training.discriminator_batch import Labelled
from tracereward.training.losses import input_gradient_norms, sequence_scores


def interpolate(
    model: TokenRewardModel, pairs: Sequence[tuple[Labelled, Labelled]], points: Sequence[float]
) -> tuple[Batch, Tensor]:
    """Interpolate each expert e and a rollout r of its prompt: embeddings point * e + (1 - point) * r per token.

    Beyond the end of the shorter one, both are the longer one. Heads that use log-probs use the tokens of the nearer
    of the two.

    Returns:
        A batch, and its embeddings (B, P + T, H), which require grad.
    """
    prompts = [expert.prompt for expert, _ in pairs]
    experts = [[*e.completion, *r.completion[len(e.completion) :]] for e, r in pairs]
    rollouts = [[*r.completion, *e.completion[len(r.completion) :]] for e, r in pairs]
    embed = model.backbone.get_input_embeddings()
    of_experts, of_rollouts = (embed(model.pack(prompts, ids).input_ids).detach() for ids in (experts, rollouts))
    share = torch.tensor(points, dtype=of_experts.dtype, device=of_experts.device)[:, None, None]
    embeddings = torch.lerp(of_rollouts, of_experts, share).requires_grad_()
    nearer = [e if point >= 0.5 else r for e, r, point in zip(experts, rollouts, points, strict=True)]
    return model.pack(prompts, nearer), embeddings


def gradient_norms(model: TokenRewardModel, batch: Batch, embeddings: Tensor) -> Tensor:
    """||d s / d completion embeddings||_2 per sequence, (B,); differentiable."""
    with sdpa_kernel(SDPBackend.MATH):
        values, _ = model.values_and_log_probs(batch, embeddings)
        scores = sequence_scores(values, model.position_weights(batch))
        mask = batch.attention_mask.clone()
        mask[:, : -batch.completion_mask.size(1)] = 0
        return input_gradient_norms(scores, embeddings, mask)


def gradient_penalties(
    model: TokenRewardModel,
    traces: Sequence[Labelled],
    points: Sequence[float],
    token_budget: int,
    *,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Tensor]:
    """Mean of (norm - 1)^2 at a point between each expert and its first negative (Gulrajani et al. 2017).

    Each process has every `world`-th pair; the terms of all processes sum to the mean.

    Args:
        model: the critic.
        traces: the traces of one update.
        points: in [0, 1], at least as many as experts.
        token_budget: padded tokens in a micro-batch.
        rank: index of this process.
        world: number of processes.

    Yields:
        One term per micro-batch.
    """
    pairs = []
    for expert in traces:
        negatives = [t for t in traces if t.group == expert.group and not t.is_expert]
        pairs += [(expert, negatives[0])] if expert.is_expert and negatives else []
    mine = list(zip(pairs, points))[rank::world]
    lengths = [len(e.prompt) + max(len(e.completion), len(r.completion)) for (e, r), _ in mine]
    for rows in token_budget_batches(lengths, token_budget):
        batch, embeddings = interpolate(model, [mine[i][0] for i in rows], [mine[i][1] for i in rows])
        yield (gradient_norms(model, batch, embeddings) - 1).square().sum() / len(pairs)


def r1_penalties(
    model: TokenRewardModel, traces: Sequence[Labelled], token_budget: int, *, rank: int = 0, world: int = 1
) -> Iterator[Tensor]:
    """Mean of norm^2 / 2 at the experts (Mescheder et al. 2018); arguments as for `gradient_penalties`."""
    experts = [t for t in traces if t.is_expert]
    mine = experts[rank::world]
    for rows in token_budget_batches([len(t.prompt) + len(t.completion) for t in mine], token_budget):
        batch = model.pack([mine[i].prompt for i in rows], [mine[i].completion for i in rows])
        embeddings = model.backbone.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        yield gradient_norms(model, batch, embeddings).square().sum() / (2 * len(experts))
