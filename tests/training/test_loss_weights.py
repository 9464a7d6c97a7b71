"""Micro-batches of a discriminator update: each trace once, pairs together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracereward.training.discriminator_batch import Labelled
from tracereward.training.loss_weights import balance_weights, passes, weigh

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


def trace(group: int, is_expert: bool, counts: bool = True, weight: float = 1.0) -> Labelled:
    """Two tokens."""
    return Labelled(
        prompt=[1],
        completion=[2, 3],
        group=group,
        is_expert=is_expert,
        starts=[0 if counts else 2],
        switch=2 if is_expert else 0,
        weight=weight,
    )


def test_weights_by_hand():
    """Two experts, three negatives of the first and one of the second; a third expert has no supervised token."""
    traces = [trace(0, True), *[trace(0, False)] * 3, trace(1, True), trace(1, False), trace(2, True, counts=False)]
    halves = [1 / 4] + [1 / 8] * 3 + [1 / 4, 1 / 8, 0]  # the mean of the experts' mean and the negatives'
    assert weigh(traces, "bce").in_loss.tolist() == halves
    assert weigh(traces, "wgan").in_loss.tolist() == [2 * weight for weight in halves]
    assert weigh(traces, "bce").of_experts.tolist() == [1 / 2, 0, 0, 0, 1 / 2, 0, 0]
    assert weigh(traces, "pairwise").groups.tolist() == [0, 0, 0, 0, 1, 1, 2]


def test_weights_by_question():
    """Question 0 has one positive and three negatives, 1 two of each; 2 has no negative and 3 no positive.

    Four traces of weight 1 against one of weight 3 in question 1: 3/4 and 1/4 of the positives' share.
    """
    traces = [trace(0, True), *[trace(0, False)] * 3, trace(2, True), trace(3, False)]
    traces += [trace(1, True, weight=3.0), trace(1, True), trace(1, False), trace(1, False)]
    thirds, rest = [1 / 12] * 3, [0, 0]
    expected = [1 / 4, *thirds, *rest, 3 / 16, 1 / 16, 1 / 8, 1 / 8]
    assert weigh(traces, "bce", "question").in_loss.tolist() == pytest.approx(expected)
    pairs = [0, *[1 / 6] * 3, *rest, 0, 0, 1 / 4, 1 / 4]  # two questions, one half each
    assert weigh(traces, "pairwise_tokens", "question").in_loss.tolist() == pytest.approx(pairs)
    assert weigh(traces, "pairwise").in_loss.tolist() == pytest.approx([0, *[1 / 5] * 3, *rest, 0, 0, 1 / 5, 1 / 5])
    assert weigh(traces, "nnpu").of_experts.tolist() == pytest.approx([1 / 6, 0, 0, 0, 1 / 6, 0, 1 / 2, 1 / 6, 0, 0])


T, F = True, False


def test_balance_by_question_by_hand():
    """One against three, two against one, one side only, nothing labelled: 4 in all for the 8 with a label."""
    labels, questions = [T, F, F, F, T, T, F, T, None], [0, 0, 0, 0, 1, 1, 1, 2, 3]
    weights = balance_weights(labels, questions, [None] * 9, "question")
    assert weights == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3, 1, 1, 2, 0, 0])
    assert balance_weights(labels, questions, [None] * 9, "none") == [1.0] * 8 + [0.0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # a is right twice and wrong once, b the other way round: factors sqrt(1/2) and sqrt(2).
        ([(0, "a", T), (0, "b", F), (1, "a", T), (1, "b", F), (2, "a", F), (2, "b", T)], [0.75] * 4 + [1.5] * 2),
        # c is always right, so that question 0 has no positive that counts.
        ([(0, "c", T), (0, "a", F), (1, "a", T), (1, "b", F), (2, "a", F), (2, "b", T)], [0, 0] + [1.5] * 4),
        # a is wrong twice, against demonstrations, and right once: its factor is 2, and the questions' are its roots.
        ([(0, None, T), (0, "a", F), (1, None, T), (1, "a", F), (2, "a", T), (2, None, F)], [0.75] * 4 + [1.5] * 2),
        ([(0, "a", T), (0, "b", F), (1, "a", T), (1, "b", F)], [0] * 4),  # nothing but who wrote it
    ],
)
def test_balance_by_model_by_hand(rows, expected):
    questions, models, labels = zip(*rows, strict=True)
    np.testing.assert_allclose(balance_weights(labels, questions, models, "model"), expected, atol=1e-6)


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["a", "b", "c", None]), st.booleans()), max_size=60))
def test_balance_by_model_leaves_question_and_model_without_information(rows):
    """In each question and for each named model the positives weigh what the negatives weigh."""
    questions, models, labels = zip(*rows, strict=True) if rows else ((), (), ())
    weights = np.array(balance_weights(labels, questions, models, "model"))
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(len(rows) if weights.any() else 0)
    signed = np.where(labels, weights, -weights) if rows else weights
    for keys in (questions, models):
        for key in set(keys) - {None}:
            assert abs(signed[[k == key for k in keys]].sum()) < 2e-3 * max(1, len(rows))
