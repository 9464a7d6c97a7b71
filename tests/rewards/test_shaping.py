"""Rewards and advantages against loops and O(T^2) sums in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tracereward.errors import InputError
from tracereward.rewards.shaping import aggregate, backfill, log_odds, masked_mean, masked_min, token_rewards
from tracereward.training.advantages import (
    EPSILON,
    batch_statistics,
    discounted_return_to_go,
    group_moments,
    moments_to_statistics,
    token_advantages,
    whiten,
)

NUMBERS = st.integers(-80, 80).map(lambda n: n / 8)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 12))


def test_epsilon_is_trls():
    assert EPSILON == 0.0001


# Near 1 a float64 D determines f only up to 2^-53 / (1 - D) = 2^-53 e^f; near 0 f is exact.
@given(f=st.floats(-700, 30))
def test_log_odds_of_the_sigmoid_is_the_logit(f):
    recovered = float(log_odds(torch.sigmoid(torch.tensor(f, dtype=torch.float64))))
    assert recovered == pytest.approx(f, rel=1e-14, abs=4e-16 * (1 + np.exp(max(f, 0))))


@given(p=st.floats(2.0**-126, 1 - 2.0**-24, width=32))
def test_log_odds_in_float32_are_accurate_at_both_ends(p):
    value = log_odds(torch.tensor(p, dtype=torch.float32))
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(np.log(p) - np.log1p(-p), rel=3e-7, abs=2e-7)


def test_log_odds_by_hand():
    """Odds 3 : 1, 1 : 1, 1 : 3; the nearest float32 below 1 is 1 - 2^-24; certainty is infinite."""
    values = log_odds(torch.tensor([0.75, 0.5, 0.25, 1 - 2.0**-24, 2.0**-126]))
    expected = [np.log(3), 0, -np.log(3), 24 * np.log(2), -126 * np.log(2)]
    np.testing.assert_allclose(values, expected, rtol=2e-7, atol=1e-7)
    assert log_odds(torch.tensor([0.0, 1.0])).tolist() == [-np.inf, np.inf]


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


def test_backfill_ignores_unsupervised_values():
    values = torch.tensor([[torch.nan, 1.0, torch.inf, -2.0, torch.nan]])
    supervised = torch.tensor([[False, True, False, True, False]])
    assert backfill(values, supervised).tolist() == [[1.0, 1.0, -2.0, -2.0, 0.0]]


@given(data=st.data(), shape=SHAPES, beta=st.sampled_from([0.5, 2.0, 5.0]))
def test_token_rewards_clip_and_backfill(data, shape, beta):
    logits = data.draw(npst.arrays(np.float32, shape, elements=NUMBERS))
    supervised = data.draw(npst.arrays(np.bool_, shape))
    rewards = token_rewards(torch.tensor(logits), torch.tensor(supervised), beta)
    np.testing.assert_array_equal(rewards, backfill_by_loop(np.clip(logits, -beta, beta), supervised))


def test_temperature_divides_before_the_clip():
    """8 / 4 = 2 stays; 8 / 0.5 = 16 is clipped to 3; by default nothing is divided."""
    logits, supervised = torch.tensor([[8.0, -8.0, 1.0]]), torch.tensor([[True, True, True]])
    assert token_rewards(logits, supervised, 3.0, temperature=4.0).tolist() == [[2.0, -2.0, 0.25]]
    assert token_rewards(logits, supervised, 3.0, temperature=0.5).tolist() == [[3.0, -3.0, 2.0]]
    assert token_rewards(logits, supervised, 3.0).tolist() == [[3.0, -3.0, 1.0]]


@given(data=st.data(), shape=SHAPES, garbage=st.sampled_from([0.0, torch.nan, -torch.inf, torch.inf]))
def test_trace_rewards_are_means_and_minima_of_unpadded_tokens(data, shape, garbage):
    values = torch.full(shape, garbage)
    mask = torch.zeros(shape)
    for row in range(shape[0]):
        real = data.draw(st.lists(NUMBERS, max_size=shape[1]))
        values[row, : len(real)] = torch.tensor(real)
        mask[row, : len(real)] = 1
        for how, function in (("mean", np.mean), ("min", np.min)):
            trace = aggregate(values, mask, how)[row]
            expected = function(real) if real else np.nan
            assert float(trace) == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert aggregate(values, mask).tolist() == pytest.approx(
        aggregate(values, mask.bool(), "mean").tolist(), nan_ok=True
    )


def test_mean_does_not_depend_on_length():
    """A sum would be twice as high for the longer trace."""
    values, mask = (
        torch.tensor([[1.0, 3.0, 0.0, 0.0], [1.0, 3.0, 1.0, 3.0]]),
        torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
    )
    assert aggregate(values, mask, "mean").tolist() == masked_mean(values, mask).tolist() == [2.0, 2.0]
    assert aggregate(values, mask, "min").tolist() == masked_min(values, mask).tolist() == [1.0, 1.0]


def test_sum_is_not_an_aggregate():
    with pytest.raises(InputError, match="unknown reward_aggregate 'sum': Known: mean, min"):
        aggregate(torch.ones(1, 2), torch.ones(1, 2), "sum")


def return_to_go_by_sums(rewards, mask, gamma):
    """G_t = sum_{k >= t} gamma^(k - t) r_k over real tokens, each t by its own sum, in float64."""
    rewards = np.where(mask, np.asarray(rewards, np.float64), 0)
    width = rewards.shape[1]
    powers = np.array([float(gamma) ** n for n in range(width)])
    returns = np.stack([rewards[:, t:] @ powers[: width - t] for t in range(width)], 1)
    return np.where(mask, returns, 0)


@given(data=st.data(), shape=SHAPES, gamma=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_return_to_go_is_the_sum(data, shape, gamma):
    """A masked token between others has no return, but still adds one discount step to earlier tokens."""
    rewards = data.draw(npst.arrays(np.float32, shape, elements=NUMBERS))
    mask = data.draw(npst.arrays(np.bool_, shape))
    returns = discounted_return_to_go(torch.tensor(rewards), torch.tensor(mask), gamma)
    np.testing.assert_allclose(returns, return_to_go_by_sums(rewards, mask, gamma), rtol=1e-5, atol=1e-4)


# The scan has log2(4096) = 12 rounds, each with a rounding error of 2^-24: at most 7e-7 of the largest return.
@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.9, 0.0])
def test_return_to_go_of_4096_tokens_in_float32(gamma):
    rewards = 0.5 + torch.randn(3, 4096, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 4096)
    mask[1, 3000:] = 0
    mask[2, 1:] = 0
    rewards[mask == 0] = torch.nan
    returns = discounted_return_to_go(rewards, mask, gamma)
    assert returns.dtype == torch.float32
    expected = return_to_go_by_sums(rewards.numpy(), mask.numpy() > 0, gamma)
    for row in range(3):
        np.testing.assert_allclose(returns[row], expected[row], atol=1e-6 * np.abs(expected[row]).max(), rtol=0)


def test_division_by_the_discount_overflows_where_the_scan_does_not():
    """1 / 0.9^t overflows float32 at t = 842: a cumulative sum divided by gamma^t is not finite from there."""
    rewards = torch.ones(1, 4096)
    discount = torch.tensor(0.9) ** torch.arange(4096)
    naive = (rewards * discount).flip(1).cumsum(1).flip(1) / discount
    assert naive[:, :800].isfinite().all()
    assert not naive[:, 1000:].isfinite().any()
    assert (1 / discount)[841].isfinite()
    assert (1 / discount)[843].isinf()
    returns = discounted_return_to_go(rewards, torch.ones(1, 4096), 0.9)
    remaining = 4096 - np.arange(4096)
    np.testing.assert_allclose(returns[0], (1 - 0.9**remaining) / 0.1, rtol=1e-6)


@st.composite
def groups(draw):
    """Rewards of prompt groups, with lengths of at least 1 and arbitrary padding."""
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
def test_group_statistics_match_numpy(batch):
    group, _, width, rewards = batch
    mean, std = moments_to_statistics(group_moments(*padded(rewards, width, torch.nan)), group)
    for row in range(len(rewards)):
        first = row // group * group
        tokens = np.concatenate([np.array(r, np.float64) for r in rewards[first : first + group]])
        assert float(mean[row]) == pytest.approx(tokens.mean(), abs=1e-5)
        assert float(std[row]) == pytest.approx(tokens.std(), abs=1e-5)


@given(batch=groups(), gamma=st.sampled_from([0.0, 0.5, 1.0]), garbage=st.sampled_from([0.0, torch.nan, 1e30]))
def test_token_advantages_match_numpy(batch, gamma, garbage):
    """Standardised over the unpadded tokens of the group, then summed by definition; padding has no effect."""
    group, _, width, rewards = batch
    values, mask = padded(rewards, width, garbage)
    mean, std = moments_to_statistics(group_moments(values, mask), group)
    advantages = token_advantages(values, mask, mean, std, gamma=gamma)
    for row, real in enumerate(rewards):
        first = row // group * group
        tokens = np.concatenate([np.array(r, np.float64) for r in rewards[first : first + group]])
        if tokens.std() == 0:  # equal rewards have no advantage
            assert advantages[row].abs().max() < 1e-3
            continue
        standardised = (np.array(real) - tokens.mean()) / (tokens.std() + EPSILON)
        for t in range(width):
            expected = sum(gamma ** (k - t) * standardised[k] for k in range(t, len(real))) if t < len(real) else 0.0
            assert float(advantages[row, t]) == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_zero_rewards_are_not_padding():
    """Rewards 0 and 4 of two one-token completions: mean 2, std 2; and zeros inside a completion are kept."""
    mean, std = moments_to_statistics(group_moments(torch.tensor([[0.0], [4.0]]), torch.ones(2, 1)), 2)
    assert mean.tolist() == [2.0, 2.0]
    assert std.tolist() == [2.0, 2.0]
    rewards, mask = torch.tensor([[0.0, 0.0, 6.0], [0.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    mean, std = moments_to_statistics(group_moments(rewards, mask), 2)
    assert mean[0] == 1.5
    assert float(std[0]) == pytest.approx(np.std([0, 0, 6, 0]))
    advantages = token_advantages(rewards, mask, mean, std, gamma=1.0)
    unit = np.std([0, 0, 6, 0]) + EPSILON
    np.testing.assert_allclose(advantages, [[1.5 / unit, 3 / unit, 4.5 / unit], [-1.5 / unit, 0, 0]], rtol=1e-6)


def test_statistics_of_large_offsets_keep_their_digits():
    """The variance is a difference of large sums: float32 would lose this standard deviation of 0.01."""
    values = 4.9 + 0.01 * torch.randn(4, 2000, generator=torch.Generator().manual_seed(0))
    _, std = moments_to_statistics(group_moments(values, torch.ones(4, 2000)), 4)
    assert float(std[0]) == pytest.approx(values.double().numpy().std(), rel=1e-6)


def test_groups_do_not_mix():
    """Rows i*G ... i*G + G - 1 share a prompt; the rewards of other prompts have no effect on them."""
    rewards, mask = torch.arange(12.0).view(4, 3), torch.ones(4, 3)
    mean, std = moments_to_statistics(group_moments(rewards, mask), 2)
    changed = rewards.clone()
    changed[2:] *= -7
    other_mean, other_std = moments_to_statistics(group_moments(changed, mask), 2)
    assert torch.equal(mean[:2], other_mean[:2])
    assert torch.equal(std[:2], other_std[:2])
    assert mean.tolist() == [2.5, 2.5, 8.5, 8.5]


def test_fully_masked_group_has_zero_advantages():
    """TRL can mask truncated completions: a group without tokens must not give NaN."""
    rewards, mask = torch.ones(2, 3), torch.zeros(2, 3)
    mean, std = moments_to_statistics(group_moments(rewards, mask), 2)
    assert torch.equal(token_advantages(rewards, mask, mean, std, gamma=1.0), torch.zeros(2, 3))


def padded_again(rewards, width, garbage):
    """Like `padded`, with a mask of supervised positions: the even ones and the last."""
    values, mask = padded(rewards, width, garbage)
    supervised = torch.zeros(values.shape, dtype=torch.bool)
    for row, real in enumerate(rewards):
        supervised[row, : len(real) : 2] = True
        supervised[row, len(real) - 1] = True
    return values, mask, supervised


@given(
    batch=groups(),
    more=st.integers(0, 9),
    garbage=st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30, 7.0]),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
)
def test_advantages_do_not_depend_on_padding(batch, more, garbage, gamma):
    """From logits to token advantages and whitened trace rewards."""
    group, _, width, logits = batch

    def advantages(width, garbage):
        values, mask, supervised = padded_again(logits, width, garbage)
        rewards = token_rewards(values, supervised, 5.0, 2.0)
        rewards = torch.where(mask.bool(), rewards, garbage)
        moments = group_moments(rewards, mask)
        mean, std = moments_to_statistics(moments, group)
        of_tokens = token_advantages(rewards, mask, mean, std, gamma=gamma)
        white = whiten(rewards, *batch_statistics(moments))
        assert not of_tokens[mask == 0].any()
        return of_tokens, aggregate(white, mask, "mean")

    of_tokens, of_traces = advantages(width, 0.0)
    wide_of_tokens, wide_of_traces = advantages(width + more, garbage)
    scale = max(1.0, float(of_tokens.abs().max()))
    np.testing.assert_allclose(wide_of_tokens[:, :width], of_tokens, atol=1e-6 * scale, rtol=0)
    np.testing.assert_allclose(wide_of_traces, of_traces, atol=1e-5, rtol=1e-5)


def test_deviation_of_equal_rewards_is_zero_despite_rounding():
    """The difference of the sums can be -1e-17, whose square root is NaN."""
    differences = []
    for count in range(1, 60):
        moments = group_moments(torch.full((2, count), 0.1), torch.ones(2, count))
        number, total, squares = moments.sum(0).tolist()
        differences.append(squares / number - (total / number) ** 2)
        for std in (moments_to_statistics(moments, 2)[1], batch_statistics(moments)[1]):
            assert float(std.max()) < 1e-7
            assert float(std.min()) >= 0
    assert min(differences) < 0


def test_statistics_over_no_tokens_are_zero():
    """The first group has no tokens; in the second only one trace has."""
    rewards = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    moments = group_moments(rewards, torch.tensor([[0], [0], [1], [0]]))
    mean, std = moments_to_statistics(moments, 2)
    assert mean.tolist() == [0, 0, 3, 3]
    assert std.tolist() == [0, 0, 0, 0]
    assert [float(value) for value in batch_statistics(moments)] == [3, 0]
    assert [float(value) for value in batch_statistics(moments[:2])] == [0, 0]


@given(batch=groups(), cut=st.integers(0, 12), garbage=st.sampled_from([0.0, torch.nan, torch.inf]))
def test_whitening_uses_the_tokens_of_all_processes(batch, cut, garbage):
    """Two processes pad to different widths and exchange moments: the statistics are those of all tokens."""
    *_, rewards = batch
    parts = [part for part in (rewards[:cut], rewards[cut:]) if part]
    local = [padded(part, max(map(len, part)), garbage) for part in parts]
    mean, std = batch_statistics(torch.cat([group_moments(*tensors) for tensors in local]))
    assert mean.shape == std.shape == ()
    assert mean.dtype == std.dtype == torch.float32
    tokens = np.concatenate([np.array(real, np.float64) for real in rewards])
    assert float(mean) == pytest.approx(tokens.mean(), abs=1e-5)
    assert float(std) == pytest.approx(tokens.std(), abs=1e-5)
    white = torch.cat([whiten(values[mask > 0], mean, std) for values, mask in local])
    expected = (tokens - tokens.mean()) / (tokens.std() + 1e-4)
    np.testing.assert_allclose(white, expected, rtol=1e-4, atol=1e-4 if tokens.std() else 0.1)


def test_whitening_by_hand():
    """Rewards 1, 1, 5, 5: mean 3, deviation 2."""
    rewards = torch.tensor([[1.0, 1.0], [5.0, 5.0]])
    mean, std = batch_statistics(group_moments(rewards, torch.ones(2, 2)))
    assert (float(mean), float(std)) == (3.0, 2.0)
    assert whiten(rewards, mean, std).flatten().tolist() == pytest.approx(
        [-2 / 2.0001] * 2 + [2 / 2.0001] * 2, rel=1e-6
    )
