"""Which sequences share a forward pass, and which tokens are hidden in it."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tracereward.batching import hide_tokens, pack, token_budget_batches

# ---------- batches ----------


@given(
    groups=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 4)), max_size=12),
    budget=st.integers(1, 120),
)
def test_batches_hold_each_group_once_and_keep_to_the_budget(groups, budget):
    """Padded tokens are the longest times the sequences of all groups; only a group alone may exceed the budget."""
    lengths, sizes = [length for length, _ in groups], [size for _, size in groups]
    batches = list(token_budget_batches(lengths, budget, sizes))
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(groups)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)

    def padded(batch):
        return max(lengths[i] for i in batch) * sum(sizes[i] for i in batch)

    assert all(padded(batch) <= budget or len(batch) == 1 for batch in batches)
    # No batch was closed too early: the next group would not have fitted.
    assert all(padded([*one, two[0]]) > budget for one, two in itertools.pairwise(batches))


def test_batches_by_hand():
    """10 * (1 + 2) = 30 fits exactly; with sizes of 1 the third fits too; equal lengths keep their order."""
    assert list(token_budget_batches([4, 10, 9], 30, [1, 1, 2])) == [[1, 2], [0]]
    assert list(token_budget_batches([4, 10, 9], 29, [1, 1, 2])) == [[1], [2, 0]]
    assert list(token_budget_batches([4, 10, 9], 30)) == [[1, 2, 0]]
    assert list(token_budget_batches([5, 5, 50, 5], 10)) == [[2], [0, 1], [3]]
    assert list(token_budget_batches([], 10)) == []


# ---------- token dropout ----------


@pytest.fixture(scope="module")
def batch():
    """Two rows with prompts of 2 and 1 and completions of 3 and 200 tokens."""
    return pack([[5, 6], [7]], [[8, 9, 10], list(range(11, 211))], pad_id=0)


def test_only_completion_tokens_are_hidden_and_only_from_the_others(batch):
    before = batch.attention_mask.clone()
    shown = hide_tokens(batch, 0.5, [3, 4])
    hidden = before - shown.attention_mask
    assert hidden[:, :2].tolist() == [[0, 0], [0, 0]]  # the prompts, and the padding before the second
    assert bool((hidden >= 0).all())  # no padding comes to be seen
    assert not hidden[0, 5:].any()
    assert 70 < int(hidden[1].sum()) < 130  # half of 200, five standard deviations either way
    assert torch.equal(batch.attention_mask, before)
    for name in ("input_ids", "position_ids", "completion_mask", "step_ends"):
        assert torch.equal(getattr(shown, name), getattr(batch, name))


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0, 0), (0.1, 3, 45), (0.9, 155, 197)])
def test_the_rate_is_the_share_hidden(batch, rate, low, high):
    hidden = batch.attention_mask - hide_tokens(batch, rate, [0, 1]).attention_mask
    assert low <= int(hidden[1].sum()) <= high


def test_what_is_hidden_depends_on_the_rows_seed_alone(batch):
    """Not on its neighbours, nor on the padding that they cause."""
    both = hide_tokens(batch, 0.5, [3, 4]).attention_mask
    alone = hide_tokens(pack([[7]], [list(range(11, 211))], pad_id=0), 0.5, [4]).attention_mask
    assert torch.equal(both[1, 2:], alone[0, 1:])
    assert not torch.equal(both, hide_tokens(batch, 0.5, [3, 5]).attention_mask)
    assert torch.equal(both, hide_tokens(batch, 0.5, [3, 4]).attention_mask)
