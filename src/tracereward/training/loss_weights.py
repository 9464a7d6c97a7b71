"""Loss weights of one discriminator update, and its division into micro-batches."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tracereward.modeling.batching import token_budget_batches
from tracereward.training.discriminator_batch import Labelled
from tracereward.training.losses import class_weights, pair_weights


class Weights(NamedTuple):
    """Classes, prompt groups and loss weights of the N traces of an update, each (N,).

    Attributes:
        is_expert: the class.
        groups: index of the demonstration whose prompt the trace answers.
        in_loss: weight of the trace's loss; the weighted sum over all traces is the objective.
        in_pairs: the same for losses of (expert, negative) pairs.
        of_experts: 1 / number of experts; 0 for negatives.
    """

    is_expert: Tensor
    groups: Tensor
    in_loss: Tensor
    in_pairs: Tensor
    of_experts: Tensor

    def of(self, rows: Sequence[int], device: torch.device) -> "Weights":
        """The weights of a subset of the traces."""
        return Weights(*(values[rows].to(device) for values in self))


def weigh(traces: Sequence[Labelled], objective: str) -> Weights:
    """Loss weights of an update's traces; 0 for a trace whose tokens all have weight 0."""
    is_expert = torch.tensor([trace.is_expert for trace in traces])
    counts = torch.tensor([trace.counts for trace in traces])
    groups = torch.tensor([trace.group for trace in traces])
    in_pairs = pair_weights(is_expert, counts, groups)
    in_loss = in_pairs if objective == "pairwise" else class_weights(is_expert, counts)
    if objective == "wgan":
        in_loss = 2 * in_loss  # E[policy] - E[expert], not its half
    of_experts = (is_expert & counts).float() / (is_expert & counts).sum().clamp(min=1)
    return Weights(is_expert=is_expert, groups=groups, in_loss=in_loss, in_pairs=in_pairs, of_experts=of_experts)


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
