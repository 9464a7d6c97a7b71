"""Micro-batches of a discriminator update: each trace once, pairs together."""

from hypothesis import given
from hypothesis import strategies as st

from tracereward.training.discriminator_batch import Labelled
from tracereward.training.loss_weights import passes, weigh

TRACES = st.lists(
    st.tuples(st.integers(0, 4), st.booleans(), st.integers(1, 9), st.booleans()), min_size=1, max_size=25
).map(
    lambda rows: [
        Labelled(
            prompt=[1] * 3,
            completion=[2] * length,
            group=group,
            is_expert=is_expert,
            starts=[0 if counts else length],
            switch=length if is_expert else 0,
        )
        for group, is_expert, length, counts in rows
    ]
)


@given(TRACES, st.booleans(), st.integers(12, 60), st.integers(1, 3))
def test_each_counted_trace_is_in_one_pass_of_one_process(traces, paired, budget, world):
    of_ranks = [passes(traces, paired, budget, rank=rank, world=world) for rank in range(world)]
    everything = sorted(index for of_rank in of_ranks for rows in of_rank for index in rows)
    assert everything == [index for index, trace in enumerate(traces) if trace.starts[0] == 0]
    for rows in (rows for of_rank in of_ranks for rows in of_rank):
        groups = {traces[index].group for index in rows}
        padded = len(rows) * (3 + max(len(traces[index].completion) for index in rows))
        assert padded <= budget or len(groups if paired else rows) == 1
    if paired:
        homes = [{traces[i].group for i in rows} for of_rank in of_ranks for rows in of_rank]
        assert sum(map(len, homes)) == len(set().union(*homes))


def test_weights_by_hand():
    """Two experts, three negatives of the first and one of the second; a third expert has no supervised token."""

    def trace(group: int, is_expert: bool, counts: bool = True) -> Labelled:
        starts, switch = [0 if counts else 2], 2 if is_expert else 0
        return Labelled(prompt=[1], completion=[2, 3], group=group, is_expert=is_expert, starts=starts, switch=switch)

    traces = [trace(0, True), *[trace(0, False)] * 3, trace(1, True), trace(1, False), trace(2, True, counts=False)]
    halves = [1 / 4] + [1 / 8] * 3 + [1 / 4, 1 / 8, 0]  # the mean of the experts' mean and the negatives'
    assert weigh(traces, "bce").in_loss.tolist() == halves
    assert weigh(traces, "wgan").in_loss.tolist() == [2 * weight for weight in halves]
    assert weigh(traces, "bce").of_experts.tolist() == [1 / 2, 0, 0, 0, 1 / 2, 0, 0]
    assert weigh(traces, "pairwise").groups.tolist() == [0, 0, 0, 0, 1, 1, 2]
