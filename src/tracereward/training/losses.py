"""Discriminator losses: per sequence, unreduced. Label 1 is the expert; "expert is high" everywhere.

`bce` looks at tokens; `pairwise`, `nnpu` and `wasserstein` look at a sequence's score s_i, the mean logit over its
supervised positions; `pairwise_tokens` at both. Their weights are in `loss_weights`, so that a batch can be split into
micro-batches or over processes without changing the loss.
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


def pairwise(scores: Tensor, is_expert: Tensor, group: Tensor, *, shares: Tensor | None = None) -> Tensor:
    """Prompt-matched Bradley-Terry loss (Bradley and Terry 1952; a relativistic GAN, Jolicoeur-Martineau 2019).

    loss_i = mean over the experts e of i's prompt of -log sigmoid(s_e - s_i), for a sequence i of the policy; experts
    themselves have 0. Only differences count, so the scores have no zero point: see `centre`.

    Args:
        scores: (B,) s_i.
        is_expert: (B,) bool.
        group: (B,) which prompt a sequence answers.
        shares: (B,) non-negative; what each expert weighs in that mean. Default: the same.

    Returns:
        (B,); 0 where a prompt has no expert here.
    """
    gap = scores[None, :] - scores[:, None]  # [i, e]: s_e - s_i
    return _mean_over_experts(-F.logsigmoid(gap), _pairs(is_expert, group), shares)


def pairwise_tokens(
    logits: Tensor, weights: Tensor, is_expert: Tensor, group: Tensor, *, shares: Tensor | None = None
) -> Tensor:
    """`pairwise` token by token: each token of one side against the score of the other.

    loss_i = mean over the experts e of i's prompt of half of the mean over i's tokens t of -log sigmoid(s_e - f_it)
    and half of the mean over e's tokens t of -log sigmoid(f_et - s_i), for a sequence i of the policy; experts
    themselves have 0. The means are weighted by w.

    A constant added to all logits of a prompt changes nothing: the prompt's own level is never learned. That also
    holds for the gradient, whose sum over a prompt's logits is 0, but only because it flows through the scores: with
    s_e and s_i held fixed it would not. By Jensen's inequality the loss is at least `pairwise`, and equal to it where
    the logits of each sequence are equal.

    Args:
        logits: (B, T) log-odds f_t.
        weights: (B, T) w, non-negative; 0 where a position is not supervised.
        is_expert: (B,) bool.
        group: (B,) which prompt a sequence answers.
        shares: (B,) as for `pairwise`.

    Returns:
        (B,); 0 where a prompt has no expert here.
    """
    scores = sequence_scores(logits, weights)
    logits = torch.where(weights > 0, logits, torch.zeros_like(logits))  # padding, as in `bce`
    pairs = _pairs(is_expert, group)
    i, e = pairs.nonzero(as_tuple=True)
    of_negative = sequence_scores(-F.logsigmoid(scores[e, None] - logits[i]), weights[i])
    of_expert = sequence_scores(-F.logsigmoid(logits[e] - scores[i, None]), weights[e])
    values = logits.new_zeros(pairs.shape).index_put((i, e), (of_negative + of_expert) / 2)
    return _mean_over_experts(values, pairs, shares)


def centre(scores: Tensor, is_expert: Tensor, group: Tensor, *, shares: Tensor | None = None) -> Tensor:
    """(s_e + s_i)^2, averaged like `pairwise`: keeps the two sides of 0 in balance (Eisenstein et al. 2023).

    A common shift of all logits changes no ranking, but the clip and the accuracies have their zero at 0.
    """
    total = scores[None, :] + scores[:, None]
    return _mean_over_experts(total.square(), _pairs(is_expert, group), shares)


def _pairs(is_expert: Tensor, group: Tensor) -> Tensor:
    """(B, B) bool [i, e]: a sequence i of the policy and an expert e of its prompt."""
    return (~is_expert)[:, None] & is_expert[None, :] & (group[:, None] == group[None, :])


def _mean_over_experts(values: Tensor, pairs: Tensor, shares: Tensor | None) -> Tensor:
    """(B, B) values [i, e] -> (B,): for each sequence of the policy the mean over its prompt's experts, by `shares`."""
    weights = pairs.to(values.dtype) if shares is None else torch.where(pairs, shares.to(values.dtype)[None, :], 0)
    total = torch.where(pairs, values * weights, torch.zeros_like(values)).sum(1)
    return total / weights.sum(1).clamp(min=torch.finfo(values.dtype).tiny)


def nnpu(scores: Tensor, is_expert: Tensor, prior: float, *, below: bool = False) -> Tensor:
    """Non-negative risk of learning from positive and unlabelled traces (Kiryo et al. 2017), with their sigmoid loss.

    Of the policy's traces an unknown share `prior` is as good as an expert's. With l(z) = sigmoid(-z), which is
    bounded as their theorems need it, P the mean over the experts and U that over the policy's traces:

        risk = prior * P[l(s)] + max(0, N),   N = U[l(-s)] - prior * P[l(-s)]

    N estimates the risk of the wrong traces, which cannot be negative: below 0 the model overfits the experts. There
    the gradient is that of -N alone, as in their algorithm 1 with beta 0 and gamma 1: it takes the overfitting back.

    Args:
        scores: (B,) s_i.
        is_expert: (B,) bool.
        prior: in (0, 1).
        below: whether N, over the complete update and not these sequences alone, is negative: see `nnpu_negative`.

    Returns:
        (B,), whose mean over the experts plus mean over the rest is the risk.
    """
    positive = torch.where(is_expert, prior * torch.sigmoid(-scores), torch.zeros_like(scores))
    negative = nnpu_negative(scores, is_expert, prior)
    # The value is that of the positive part, the gradient that of the other, reversed.
    return positive.detach() - (negative - negative.detach()) if below else positive + negative


def nnpu_negative(scores: Tensor, is_expert: Tensor, prior: float) -> Tensor:
    """Terms of N in `nnpu`, (B,): its mean over the experts plus its mean over the rest is N."""
    return torch.where(is_expert, -prior, 1.0) * torch.sigmoid(scores)


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
