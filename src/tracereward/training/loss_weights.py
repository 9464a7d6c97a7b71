"""Loss weights of one discriminator update, and its division into micro-batches."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tracereward.modeling.batching import token_budget_batches
from tracereward.training.discriminator_batch import Labelled

PAIRED = ("pairwise", "pairwise_tokens")  # objectives that compare an expert with each negative of its prompt
ROUNDS, SETTLED = 1000, 1e-9  # of `balance_weights`; the second is the largest change, relative to the largest weight


class Weights(NamedTuple):
    """Classes, prompt groups and loss weights of the N traces of an update, each (N,).

    Attributes:
        is_expert: the class.
        groups: index of the demonstration whose prompt the trace answers.
        shares: the trace's own weight, in means over a prompt's experts.
        in_loss: weight of the trace's loss; the weighted sum over all traces is the objective.
        in_pairs: the same for losses of (expert, negative) pairs.
        of_experts: 1 / number of experts; 0 for negatives.
    """

    is_expert: Tensor
    groups: Tensor
    shares: Tensor
    in_loss: Tensor
    in_pairs: Tensor
    of_experts: Tensor

    def of(self, rows: Sequence[int], device: torch.device) -> "Weights":
        """The weights of a subset of the traces."""
        return Weights(*(values[rows].to(device) for values in self))


def weigh(traces: Sequence[Labelled], objective: str, balance: str = "none") -> Weights:
    """Loss weights of an update's traces; 0 for a trace that does not count.

    Args:
        traces: of one update.
        objective: name of the loss.
        balance: question: every question with both classes weighs the same; otherwise every trace by its own weight.
    """
    is_expert = torch.tensor([trace.is_expert for trace in traces])
    shares = torch.tensor([trace.weight if trace.counts else 0.0 for trace in traces])
    groups = torch.tensor([trace.group for trace in traces])
    by_question = groups if balance == "question" else None
    in_pairs = pair_weights(is_expert, shares, groups, by_question=by_question is not None)
    in_loss = in_pairs if objective in PAIRED else class_weights(is_expert, shares, by_question)
    if objective in ("wgan", "nnpu"):
        in_loss = 2 * in_loss  # the sum of the classes' means, not its half
    of_experts = class_weights(is_expert, shares * is_expert)
    return Weights(
        is_expert=is_expert, groups=groups, shares=shares, in_loss=in_loss, in_pairs=in_pairs, of_experts=of_experts
    )


def class_weights(is_expert: Tensor, shares: Tensor, group: Tensor | None = None) -> Tensor:
    """Sequence weights with which `(weights * loss).sum()` is the mean of the two classes' means.

    Args:
        is_expert: (B,) bool.
        shares: (B,) non-negative, what a sequence weighs in its class; 0 for those that do not count.
        group: (B,) question of each sequence. If given, the sum is the mean of that over the questions with both
            classes; the others weigh 0.

    Returns:
        (B,) float, which sums to 1 unless nothing counts.
    """
    whole = torch.zeros_like(is_expert, dtype=torch.long) if group is None else group
    same = (whole[:, None] == whole[None, :]).to(shares.dtype)
    totals = [same @ torch.where(members, shares, 0) for members in (is_expert, ~is_expert)]  # of each one's question
    weights = shares / torch.where(is_expert, *totals).clamp(min=torch.finfo(shares.dtype).tiny)
    if group is not None:
        weights = torch.where((totals[0] > 0) & (totals[1] > 0), weights, 0)
    cells = (2 * whole + is_expert)[weights > 0].unique()  # (question, class)
    return weights / max(1, len(cells))


def pair_weights(is_expert: Tensor, shares: Tensor, group: Tensor, *, by_question: bool = False) -> Tensor:
    """Sequence weights with which `(weights * pairwise).sum()` is the mean over the policy's sequences in pairs.

    Args:
        is_expert: (B,) bool.
        shares: (B,) non-negative, what a sequence weighs in that mean; 0 for those that do not count.
        group: (B,) which prompt a sequence answers.
        by_question: the mean of each prompt's mean instead, so that one with many pairs weighs no more.

    Returns:
        (B,) float: 0 for an expert, and where the prompt has no expert that counts.
    """
    same = group[:, None] == group[None, :]
    matched = (same & (is_expert & (shares > 0))[None, :]).any(1)
    weights = torch.where(matched & ~is_expert, shares, 0)
    if by_question:
        weights = weights / (same.to(shares.dtype) @ weights).clamp(min=torch.finfo(shares.dtype).tiny)
    return weights / weights.sum().clamp(min=torch.finfo(shares.dtype).tiny)


def balance_weights(
    labels: Sequence[bool | None], questions: Sequence[Hashable], models: Sequence[str | None], how: str
) -> list[float]:
    """Weights of labelled candidates with which a nuisance says nothing about the label.

    - none: 1.
    - question: every question with both classes weighs the same, and in it positives the same as negatives.
    - model: from there, each positive of question q and model m is multiplied by a_q b_m, each negative divided by it.
      The factors are such that in every question, and for every named model, positives and negatives have the same
      total: the weighted label is then uncorrelated with each question and each model, so that neither is worth
      learning. They are unique up to scale and solve min_ab sum_i w_i (a_q b_m)^(y_i), y = +-1, a convex problem in
      their logarithms (matrix balancing, Osborne 1960; the weights boosting would leave after fitting both, Freund
      and Schapire 1997). It is solved question by question, then model by model, until nothing changes. As the
      totals agree within each question, they also hold for pairs.

    A question, or a named model, all of whose candidates are on one side cannot be balanced and weighs 0; where that
    leaves another with one side only, so does that. Demonstrations and other candidates without a model (None) are
    balanced by question alone.

    Args:
        labels: True for a positive, False for a negative, None for a candidate that is left out and weighs 0.
        questions: which question each candidate answers.
        models: which model wrote it.
        how: none, question or model.

    Returns:
        One weight for each candidate; those with a label have the mean 1, unless nothing can be balanced: all 0.
    """
    sign = np.array([0 if label is None else 1 if label else -1 for label in labels])
    weights = np.abs(sign).astype(float)
    by_question = _codes(questions)
    if how != "none":
        up, down = _totals(weights, sign, by_question)
        weights *= np.divide(1.0, np.where(sign > 0, up, down), where=(up > 0) & (down > 0), out=np.zeros_like(weights))
    if how == "model":
        by_model, named = _codes(models), np.array([model is not None for model in models])
        for _ in range(ROUNDS):
            before = weights
            for codes, balanced in ((by_question, True), (by_model, named)):
                up, down = _totals(weights, sign, codes)
                both = (up > 0) & (down > 0)
                ratio = np.divide(down, up, where=both, out=np.ones_like(weights))
                weights = np.where(balanced, weights * both * np.sqrt(ratio) ** sign, weights)
            if np.abs(weights - before).max(initial=0) <= SETTLED * weights.max(initial=0):
                break
    return (weights * np.count_nonzero(sign) / max(weights.sum(), np.finfo(float).tiny)).tolist()


def _codes(keys: Sequence[Hashable]) -> np.ndarray:
    """0, 1, ... for each key, in order of appearance."""
    order = {key: code for code, key in enumerate(dict.fromkeys(keys))}
    return np.array([order[key] for key in keys], int)


def _totals(weights: np.ndarray, sign: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each candidate the total weight of the positives, and of the negatives, with its code."""
    up, down = (np.bincount(codes, np.where(sign == side, weights, 0.0))[codes] for side in (1, -1))
    return up, down


def passes(
    traces: Sequence[Labelled], paired: bool, token_budget: int, *, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """Trace indices of each forward-backward pass of one process; traces whose tokens all have weight 0 are skipped.

    Args:
        traces: one update's traces, the same on all processes.
        paired: whether the loss compares an expert with its negatives, which then share a pass and a process.
        token_budget: padded tokens in a pass.
        rank: index of this process, which takes every `world`-th trace or pair.
        world: number of processes.
    """
    units: dict[int, list[int]] = {}
    for index, trace in enumerate(traces):
        if trace.counts:
            units.setdefault(trace.group if paired else index, []).append(index)
    mine = list(units.values())[rank::world]
    longest = [max(len(traces[i].prompt) + len(traces[i].completion) for i in unit) for unit in mine]
    batches = token_budget_batches(longest, token_budget, [len(unit) for unit in mine])
    return [[index for unit in batch for index in mine[unit]] for batch in batches]
