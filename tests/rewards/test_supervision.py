"""Supervision masks against their definition as plain Python loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tracereward.rewards.choices import GRANULARITIES
from tracereward.rewards.supervision import supervision_mask
from tracereward.training.first_difference import (
    after_first_difference,
    first_difference,
    labels_from,
)


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
    # Step ends on padding are arbitrary and must have no effect.
    ends = [draw(st.lists(st.booleans(), min_size=width, max_size=width)) for _ in lengths]
    return lengths, width, ends


def tensors(lengths, width, ends):
    completion_mask = torch.tensor([[int(t < n) for t in range(width)] for n in lengths]).view(len(lengths), width)
    return completion_mask, torch.tensor(ends).view(len(lengths), width)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(batch=batches(), interval=st.integers(1, 17))
def test_masks_match_their_definition(granularity, batch, interval):
    lengths, width, ends = batch
    mask = supervision_mask(*tensors(*batch), granularity, interval)
    assert mask.dtype == torch.bool
    expected = [by_definition(n, e, granularity, interval, width) for n, e in zip(lengths, ends)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(batch=batches(), more=st.integers(1, 9))
def test_masks_do_not_depend_on_padding(granularity, batch, more):
    lengths, width, ends = batch
    narrow = supervision_mask(*tensors(lengths, width, ends), granularity, 3)
    wide = supervision_mask(*tensors(lengths, width + more, [e + [True] * more for e in ends]), granularity, 3)
    assert torch.equal(wide[:, :width], narrow)
    assert not wide[:, width:].any()


def test_interval_of_15_by_hand():
    """Tokens 15, 30 and the last (33), counted from 1 at the completion's first token; nothing else."""
    mask = supervision_mask(torch.ones(1, 33), torch.zeros(1, 33), "interval")
    assert mask[0].nonzero().flatten().tolist() == [14, 29, 32]


def test_empty_completion_has_no_supervised_token():
    for granularity in GRANULARITIES:
        assert not supervision_mask(torch.zeros(2, 4), torch.ones(2, 4), granularity).any()


def test_integer_and_boolean_masks_are_equivalent():
    lengths, width, ends = [3, 5], 6, [[True] * 6] * 2
    integers, flags = tensors(lengths, width, ends)
    for granularity in GRANULARITIES:
        expected = supervision_mask(integers, flags, granularity, 2)
        assert torch.equal(supervision_mask(integers.bool(), flags.float(), granularity, 2), expected)


def test_unknown_granularity_raises():
    with pytest.raises(ValueError, match=r"^unknown granularity 'token'; known: sparse, step, interval, dense$"):
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
def test_weights_are_the_share_of_diverged_rollouts(rows, padding):
    width = max(n for n, _ in rows) + padding
    weights = after_first_difference([n for n, _ in rows], [starts for _, starts in rows], width)
    assert weights.shape == (len(rows), width)
    for row, (length, starts) in enumerate(rows):
        for t in range(width):
            left = sum(start <= t for start in starts) / len(starts) if starts and t < length else 0.0
            assert float(weights[row, t]) == pytest.approx(left, abs=1e-6)


def test_missing_starts_raise():
    with pytest.raises(ValueError, match="shorter"):
        after_first_difference([4, 4], [[0]], 5)


def test_interval_1_is_dense_and_a_long_interval_is_sparse():
    """The last token counts once, even if the interval ends on it (k = 5), one before (4) or one after it (6)."""
    completion, ends = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]), torch.ones(1, 7)
    supervised = {
        k: supervision_mask(completion, ends, "interval", k)[0].nonzero().flatten().tolist() for k in range(1, 7)
    }
    assert supervised == {1: [0, 1, 2, 3, 4], 2: [1, 3, 4], 3: [2, 4], 4: [3, 4], 5: [4], 6: [4]}


def test_rollout_and_expert_weights_by_hand():
    """Expert 1 2 3 9; rollouts 1 2 4 9 (diverges at 2) and 5 9 (diverges at 0)."""
    expert, one, two = [1, 2, 3, 9], [1, 2, 4, 9], [5, 9]
    starts = [first_difference(rollout, expert) for rollout in (one, two)]
    assert starts == [2, 0]
    weights = after_first_difference([4, 4, 2], [starts, starts[:1], starts[1:]], 5)
    assert weights.tolist() == [[0.5, 0.5, 1, 1, 0], [0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]


@given(starts=st.lists(st.integers(0, 12), max_size=5), width=st.integers(0, 9))
def test_labels_are_expert_before_the_first_change(starts, width):
    labels = labels_from(starts, width)
    assert labels.shape == (len(starts), width)
    assert labels.dtype == torch.float32
    assert labels.tolist() == [[1.0 if t < start else 0.0 for t in range(width)] for start in starts]


def test_labels_of_a_rollout_a_perturbed_and_an_expert_trace():
    assert labels_from([0, 2, 4], 4).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_supervised_tokens_from_the_change_on_are_negative():
    """Steps end at 1, 3, 5; the change is in token 2: the first step is labelled expert, the changed one is not."""
    supervised = supervision_mask(torch.ones(1, 6), torch.tensor([[0, 1, 0, 1, 0, 1]]), "step")
    assert labels_from([2], 6)[supervised].tolist() == [1, 0, 0]
    assert labels_from([4], 6)[supervised].tolist() == [1, 1, 0]
