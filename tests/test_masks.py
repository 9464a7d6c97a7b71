"""Supervision masks against their definition written as plain Python loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tracereward.masks import GRANULARITIES, after_first_difference, first_difference, supervision_mask


def by_definition(length: int, ends: list[bool], granularity: str, interval: int, width: int) -> list[bool]:
    """m_t of one completion, position by position."""
    mask = []
    for t in range(width):
        if t >= length:
            mask.append(False)
        elif t == length - 1 or granularity == "dense":
            mask.append(True)
        elif granularity == "step":
            mask.append(ends[t])
        elif granularity == "interval":
            mask.append((t + 1) % interval == 0)  # the completion's first token is number 1
        else:
            mask.append(False)
    return mask


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    width = max(lengths) + draw(st.integers(0, 7))
    # Step ends on padding are garbage that must not matter.
    ends = [draw(st.lists(st.booleans(), min_size=width, max_size=width)) for _ in lengths]
    return lengths, width, ends


def tensors(lengths, width, ends):
    completion_mask = torch.tensor([[int(t < n) for t in range(width)] for n in lengths]).view(len(lengths), width)
    return completion_mask, torch.tensor(ends).view(len(lengths), width)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(batch=batches(), interval=st.integers(1, 17))
def test_every_granularity_is_its_definition(granularity, batch, interval):
    lengths, width, ends = batch
    mask = supervision_mask(*tensors(*batch), granularity, interval)
    assert mask.dtype == torch.bool
    expected = [by_definition(n, e, granularity, interval, width) for n, e in zip(lengths, ends)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(batch=batches(), more=st.integers(1, 9))
def test_more_padding_changes_nothing(granularity, batch, more):
    lengths, width, ends = batch
    narrow = supervision_mask(*tensors(lengths, width, ends), granularity, 3)
    wide = supervision_mask(*tensors(lengths, width + more, [e + [True] * more for e in ends]), granularity, 3)
    assert torch.equal(wide[:, :width], narrow)
    assert not wide[:, width:].any()


def test_interval_of_15_written_out():
    """Tokens 15, 30 and the last (33), counted from 1 at the completion's first token; nothing else."""
    mask = supervision_mask(torch.ones(1, 33), torch.zeros(1, 33), "interval")
    assert mask[0].nonzero().flatten().tolist() == [14, 29, 32]


def test_an_empty_completion_has_no_supervised_token():
    for granularity in GRANULARITIES:
        assert not supervision_mask(torch.zeros(2, 4), torch.ones(2, 4), granularity).any()


def test_integer_and_boolean_masks_are_the_same():
    lengths, width, ends = [3, 5], 6, [[True] * 6] * 2
    integers, flags = tensors(lengths, width, ends)
    for granularity in GRANULARITIES:
        expected = supervision_mask(integers, flags, granularity, 2)
        assert torch.equal(supervision_mask(integers.bool(), flags.float(), granularity, 2), expected)


def test_an_unknown_granularity_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown granularity 'token'; known: sparse, step, interval, dense"):
        supervision_mask(torch.ones(1, 2), torch.ones(1, 2), "token")


SHORT = st.lists(st.integers(0, 2), max_size=8)


@given(a=SHORT, b=SHORT)
def test_first_difference_is_the_common_prefix(a, b):
    shared = max(n for n in range(min(len(a), len(b)) + 1) if a[:n] == b[:n])
    assert first_difference(a, b) == shared
    assert first_difference(b, a) == shared


@given(
    rows=st.lists(
        st.integers(0, 9).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n), max_size=4))),
        min_size=1,
        max_size=4,
    ),
    padding=st.integers(0, 3),
)
def test_weights_are_the_share_of_rollouts_that_have_left(rows, padding):
    width = max(n for n, _ in rows) + padding
    weights = after_first_difference([n for n, _ in rows], [starts for _, starts in rows], width)
    assert weights.shape == (len(rows), width)
    for row, (length, starts) in enumerate(rows):
        for t in range(width):
            left = sum(start <= t for start in starts) / len(starts) if starts and t < length else 0.0
            assert float(weights[row, t]) == pytest.approx(left, abs=1e-6)


def test_rollout_and_expert_weights_written_out():
    """Expert 1 2 3 9; rollouts 1 2 4 9 (leaves at 2) and 5 9 (leaves at 0)."""
    expert, one, two = [1, 2, 3, 9], [1, 2, 4, 9], [5, 9]
    starts = [first_difference(rollout, expert) for rollout in (one, two)]
    assert starts == [2, 0]
    weights = after_first_difference([4, 4, 2], [starts, starts[:1], starts[1:]], 5)
    assert weights.tolist() == [[0.5, 0.5, 1, 1, 0], [0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]
