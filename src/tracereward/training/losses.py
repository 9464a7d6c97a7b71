"""Discriminator losses: per sequence, unreduced. Label 1 is the expert; "expert is high" everywhere.

`bce` looks at tokens; `pairwise` and `wasserstein` look at a sequence's score s_i, the mean logit over its supervised
positions. `class_weights` and `pair_weights` weight sequences, so that a batch can be split into micro-batches or over
processes without changing the loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bce(logits: Tensor, weights: Tensor, is_expert: Tensor, smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy of the token logits, averaged over the supervised positions of each sequence.

    loss_i = sum_t w_it * [-y_it log sigmoid(f_it) - (1 - y_it) log(1 - sigmoid(f_it))] / sum_t w_it with y = 1 - s for
    the expert and s for the policy (label smoothing: Szegedy et al. 2016). Each sequence weighs the same whatever its
    length.

    Args:
        logits: (B, T) log-odds f_t.
        weights: (B, T) non-negative; the supervision mask, possibly times `after_first_difference`.
        is_expert: (B,) or, for traces that are the expert's only up to some token, (B, T); bool.
        smoothing: s in [0, 0.5).

    Returns:
        (B,); 0 where a sequence has no supervised position.
    """
    target = torch.where(is_expert, 1 - smoothing, smoothing).to(logits.dtype)
    target = target if target.dim() == 2 else target[:, None].expand_as(logits)
    # Padding may hold anything, also nan from a fully masked attention row. It is replaced before the loss, not after:
    # behind a `where` its gradient would be 0 * nan.
    logits = torch.where(weights > 0, logits, torch.zeros_like(logits))
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * weights).sum(1) / weights.sum(1).clamp(min=torch.finfo(logits.dtype).tiny)


def sequence_scores(logits: Tensor, weights: Tensor) -> Tensor:
    """s_i = sum_t w_it f_it / sum_t w_it, (B, T) -> (B,); 0 where a sequence has no supervised position."""
    logits = torch.where(weights > 0, logits, torch.zeros_like(logits))
    return (logits * weights).sum(1) / weights.sum(1).clamp(min=torch.finfo(logits.dtype).tiny)


def pairwise(scores: Tensor, is_expert: Tensor, group: Tensor) -> Tensor:
    """Prompt-matched Bradley-Terry loss (Bradley and Terry 1952; a relativistic GAN, Jolicoeur-Martineau 2019).

    loss_i = mean over the experts e of i's prompt of -log sigmoid(s_e - s_i), for a sequence i of the policy; experts
    themselves have 0. Only differences count, so the scores have no zero point: see `centre`.

    Args:
        scores: (B,) s_i.
        is_expert: (B,) bool.
        group: (B,) which prompt a sequence answers.

    Returns:
        (B,); 0 where a prompt has no expert here.
    """
    gap = scores[None, :] - scores[:, None]  # [i, e]: s_e - s_i
    return _mean_over_experts(-F.logsigmoid(gap), is_expert, group)


def centre(scores: Tensor, is_expert: Tensor, group: Tensor) -> Tensor:
    """(s_e + s_i)^2, averaged like `pairwise`: keeps the two sides of 0 in balance (Eisenstein et al. 2023).

    A common shift of all logits changes no ranking, but the clip and the accuracies have their zero at 0.
    """
    return _mean_over_experts((scores[None, :] + scores[:, None]).square(), is_expert, group)


def _mean_over_experts(values: Tensor, is_expert: Tensor, group: Tensor) -> Tensor:
    """(B, B) values [i, e] -> (B,): for each sequence of the policy the mean over its prompt's experts."""
    pairs = (~is_expert)[:, None] & is_expert[None, :] & (group[:, None] == group[None, :])
    total = torch.where(pairs, values, torch.zeros_like(values)).sum(1)
    return total / pairs.sum(1).clamp(min=1)


def wasserstein(scores: Tensor, is_expert: Tensor) -> Tensor:
    """-s_i of an expert, s_i of the policy, (B,): with the classes' means this is E[policy] - E[expert].

    Arjovsky et al. 2017. The critic must be kept Lipschitz, by `input_gradient_norms` or `limit_spectral_norm`:
    without it the loss has no lower bound and its scale no meaning.
    """
    return torch.where(is_expert, -scores, scores)


def input_gradient_norms(scores: Tensor, inputs: Tensor, mask: Tensor) -> Tensor:
    """||d s_i / d x_i||_2 over the real positions of each sequence's input, differentiable itself.

    Gradient penalty (Gulrajani et al. 2017): (norm - 1)^2 at points between an expert and a rollout. R1 penalty
    (Mescheder et al. 2018): norm^2 / 2 at the experts.

    Args:
        scores: (B,), computed from `inputs`; each from its own row only.
        inputs: (B, L, H), requires grad.
        mask: (B, L), 1 where an input is real.

    Returns:
        (B,).
    """
    (gradient,) = torch.autograd.grad(scores.sum(), inputs, create_graph=True)
    squares = (gradient * mask[..., None]).square().sum((1, 2))
    # sqrt has an infinite derivative at 0, where a fresh head of zeros starts: the floor makes it 0 instead.
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


@torch.no_grad()
def limit_spectral_norm(weight: Tensor, limit: float = 1.0) -> None:
    """Scale a linear map down, in place, until its largest singular value is at most `limit`.

    A projection after each step instead of Miyato et al.'s (2018) reparametrisation: it also holds for a head that
    starts at 0, and leaves a plain weight in the checkpoint. A vector's largest singular value is its length.
    """
    norm = torch.linalg.matrix_norm(weight.reshape(weight.shape[0] if weight.dim() > 1 else 1, -1).float(), 2)
    weight.mul_((limit / norm.clamp(min=limit)).to(weight.dtype))


def class_weights(is_expert: Tensor, counts: Tensor) -> Tensor:
    """Sequence weights with which `(weights * loss).sum()` is the mean of the two classes' means.

    Args:
        is_expert: (B,) bool.
        counts: (B,) bool, the sequences that count; those with no supervised position do not.

    Returns:
        (B,) float: 1 / (classes present * members of the class), 0 where a sequence does not count.
    """
    experts, policy = is_expert & counts, ~is_expert & counts
    classes = int(experts.any()) + int(policy.any())
    weights = torch.zeros(is_expert.shape, device=is_expert.device)
    for members in (experts, policy):
        if members.any():
            weights[members] = 1 / (classes * members.sum())
    return weights


def pair_weights(is_expert: Tensor, counts: Tensor, group: Tensor) -> Tensor:
    """Sequence weights with which `(weights * pairwise).sum()` is the mean over the policy's sequences in pairs.

    Args:
        is_expert: (B,) bool.
        counts: (B,) bool, the sequences that count.
        group: (B,) which prompt a sequence answers.

    Returns:
        (B,) float: 1 / pairs for a sequence of the policy whose prompt has an expert that counts, else 0.
    """
    matched = counts & is_expert
    paired = counts & ~is_expert & ((group[:, None] == group[None, :]) & matched[None, :]).any(1)
    return paired.float() / paired.sum().clamp(min=1)
