"""Rewards and advantages against loops and O(T^2) sums in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tracereward.shaping import (
    EPSILON,
    backfill,
    discounted_return_to_go,
    group_moments,
    moments_to_statistics,
    token_advantages,
    token_rewards,
)

NUMBERS = st.integers(-80, 80).map(lambda n: n / 8)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 12))


def backfill_by_loop(values, supervised):
    filled = np.zeros(values.shape)
    for row in range(values.shape[0]):
        for t in range(values.shape[1]):
            following = [k for k in range(t, values.shape[1]) if supervised[row, k]]
            filled[row, t] = values[row, min(following)] if following else 0.0
    return filled


@given(data=st.data(), shape=SHAPES)
def test_backfill_is_the_next_supervised_value(data, shape):
    values = data.draw(npst.arrays(np.float32, shape, elements=NUMBERS))
    supervised = data.draw(npst.arrays(np.bool_, shape))
    filled = backfill(torch.tensor(values), torch.tensor(supervised))
    np.testing.assert_array_equal(filled, backfill_by_loop(values, supervised))


def test_backfill_ignores_what_is_not_supervised():
    values = torch.tensor([[torch.nan, 1.0, torch.inf, -2.0, torch.nan]])
    supervised = torch.tensor([[False, True, False, True, False]])
    assert backfill(values, supervised).tolist() == [[1.0, 1.0, -2.0, -2.0, 0.0]]


@given(data=st.data(), shape=SHAPES, beta=st.sampled_from([0.5, 2.0, 5.0]))
def test_token_rewards_clip_and_backfill(data, shape, beta):
    logits = data.draw(npst.arrays(np.float32, shape, elements=NUMBERS))
    supervised = data.draw(npst.arrays(np.bool_, shape))
    rewards = token_rewards(torch.tensor(logits), torch.tensor(supervised), beta)
    np.testing.assert_array_equal(rewards, backfill_by_loop(np.clip(logits, -beta, beta), supervised))


def return_to_go_by_sums(rewards, mask, gamma):
    """G_t = sum_{k >= t} gamma^(k - t) r_k over real tokens, each t by its own sum, in float64."""
    rewards = np.where(mask, np.asarray(rewards, np.float64), 0)
    width = rewards.shape[1]
    power = np.arange(width)[None, :] - np.arange(width)[:, None]  # [t, k]
    kernel = np.where(power >= 0, np.power(float(gamma), np.maximum(power, 0)), 0.0)
    return np.where(mask, rewards @ kernel.T, 0)


@given(data=st.data(), shape=SHAPES, gamma=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_return_to_go_is_the_sum(data, shape, gamma):
    rewards = data.draw(npst.arrays(np.float32, shape, elements=NUMBERS))
    lengths = [data.draw(st.integers(0, shape[1])) for _ in range(shape[0])]
    mask = np.arange(shape[1])[None] < np.array(lengths)[:, None]
    returns = discounted_return_to_go(torch.tensor(rewards), torch.tensor(mask), gamma)
    np.testing.assert_allclose(returns, return_to_go_by_sums(rewards, mask, gamma), rtol=1e-5, atol=1e-4)


# Float32 rounding: with gamma 0.9 about ten terms matter; with 1.0 up to 4096 terms of size 1 are added one by one
# to a sum of at most a few hundred, each rounding by 2^-24 of it: at worst 4096 * 200 * 6e-8 = 0.05, as roundings
# go either way about 64 times less.
@pytest.mark.parametrize(("gamma", "tolerance"), [(0.9, 5e-6), (1.0, 5e-3)])
def test_return_to_go_of_4096_tokens_in_float32(gamma, tolerance):
    """gamma^t underflows float32 near t = 800; a scan that divides by it would give nan or infinity here."""
    rewards = torch.randn(2, 4096, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 4096)
    mask[1, 3000:] = 0
    returns = discounted_return_to_go(rewards, mask, gamma)
    assert returns.dtype == torch.float32
    expected = return_to_go_by_sums(rewards.numpy(), mask.numpy() > 0, gamma)
    np.testing.assert_allclose(returns, expected, atol=tolerance, rtol=0)


@st.composite
def groups(draw):
    """Rewards of prompt groups, lengths of at least 1, and padding full of garbage."""
    group, count = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    lengths = [draw(st.integers(1, 8)) for _ in range(group * count)]
    width = max(lengths) + draw(st.integers(0, 3))
    rewards = [draw(st.lists(NUMBERS, min_size=n, max_size=n)) for n in lengths]
    return group, lengths, width, rewards


def padded(rewards, width, garbage):
    values = torch.full((len(rewards), width), garbage)
    mask = torch.zeros(len(rewards), width)
    for row, real in enumerate(rewards):
        values[row, : len(real)] = torch.tensor(real)
        mask[row, : len(real)] = 1
    return values, mask


@given(batch=groups())
def test_group_statistics_are_numpys(batch):
    group, _, width, rewards = batch
    mean, std = moments_to_statistics(group_moments(*padded(rewards, width, torch.nan)), group)
    for row in range(len(rewards)):
        first = row // group * group
        tokens = np.concatenate([np.array(r, np.float64) for r in rewards[first : first + group]])
        assert float(mean[row]) == pytest.approx(tokens.mean(), abs=1e-5)
        assert float(std[row]) == pytest.approx(tokens.std(), abs=1e-5)


@given(batch=groups(), gamma=st.sampled_from([0.0, 0.5, 1.0]), garbage=st.sampled_from([0.0, torch.nan, 1e30]))
def test_token_advantages_are_numpys(batch, gamma, garbage):
    """Standardised within the prompt's group over real tokens, then summed by definition; padding does not matter."""
    group, _, width, rewards = batch
    values, mask = padded(rewards, width, garbage)
    mean, std = moments_to_statistics(group_moments(values, mask), group)
    advantages = token_advantages(values, mask, mean, std, gamma)
    for row, real in enumerate(rewards):
        first = row // group * group
        tokens = np.concatenate([np.array(r, np.float64) for r in rewards[first : first + group]])
        if tokens.std() == 0:  # equal rewards: nothing to prefer
            assert advantages[row].abs().max() < 1e-3
            continue
        standardised = (np.array(real) - tokens.mean()) / (tokens.std() + EPSILON)
        for t in range(width):
            expected = sum(gamma ** (k - t) * standardised[k] for k in range(t, len(real))) if t < len(real) else 0.0
            assert float(advantages[row, t]) == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_true_zero_rewards_are_not_padding():
    """Rewards 0 and 4 of two one-token completions: mean 2, std 2; and zeros in the middle keep their place."""
    mean, std = moments_to_statistics(group_moments(torch.tensor([[0.0], [4.0]]), torch.ones(2, 1)), 2)
    assert mean.tolist() == [2.0, 2.0]
    assert std.tolist() == [2.0, 2.0]
    rewards, mask = torch.tensor([[0.0, 0.0, 6.0], [0.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    mean, std = moments_to_statistics(group_moments(rewards, mask), 2)
    assert mean[0] == 1.5
    assert float(std[0]) == pytest.approx(np.std([0, 0, 6, 0]))
    advantages = token_advantages(rewards, mask, mean, std, 1.0)
    unit = np.std([0, 0, 6, 0]) + EPSILON
    np.testing.assert_allclose(advantages, [[1.5 / unit, 3 / unit, 4.5 / unit], [-1.5 / unit, 0, 0]], rtol=1e-6)


def test_statistics_of_large_offsets_keep_their_digits():
    """The variance is a difference of large sums: in float32 this standard deviation of 0.01 would be lost."""
    values = 4.9 + 0.01 * torch.randn(4, 2000, generator=torch.Generator().manual_seed(0))
    _, std = moments_to_statistics(group_moments(values, torch.ones(4, 2000)), 4)
    assert float(std[0]) == pytest.approx(values.double().numpy().std(), rel=1e-6)


def test_groups_do_not_mix():
    """Rows i*G ... i*G + G - 1 are one prompt's: changing another prompt's rewards changes nothing here."""
    rewards, mask = torch.arange(12.0).view(4, 3), torch.ones(4, 3)
    mean, std = moments_to_statistics(group_moments(rewards, mask), 2)
    changed = rewards.clone()
    changed[2:] *= -7
    other_mean, other_std = moments_to_statistics(group_moments(changed, mask), 2)
    assert torch.equal(mean[:2], other_mean[:2])
    assert torch.equal(std[:2], other_std[:2])
    assert mean.tolist() == [2.5, 2.5, 8.5, 8.5]


def test_a_wholly_masked_group_has_no_advantages():
    """TRL can mask truncated completions: a group without real tokens has no statistics, and must not give nan."""
    rewards, mask = torch.ones(2, 3), torch.zeros(2, 3)
    mean, std = moments_to_statistics(group_moments(rewards, mask), 2)
    assert torch.equal(token_advantages(rewards, mask, mean, std, 1.0), torch.zeros(2, 3))
