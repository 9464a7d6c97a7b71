"""One update of the discriminator, cut up: what each trace weighs in the losses, and which traces a pass has."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tracereward.batching import token_budget_batches
from tracereward.negatives import Labelled
from tracereward.objectives import class_weights, pair_weights


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
