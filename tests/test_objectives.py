"""Discriminator losses against float64 numpy, written from the formula."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tracereward.objectives import bce, class_weights


def bce_by_formula(logits, weights, is_expert, smoothing) -> np.ndarray:
    """-y log sigmoid(f) - (1 - y) log(1 - sigmoid(f)), weighted mean of each row, in float64."""
    losses = []
    for f, w, expert in zip(np.asarray(logits, np.float64), np.asarray(weights, np.float64), is_expert):
        y = 1 - smoothing if expert else smoothing
        total = norm = 0.0
        for value, weight in zip(f, w):
            if weight > 0:
                total += weight * (y * np.logaddexp(0, -value) + (1 - y) * np.logaddexp(0, value))
                norm += weight
        losses.append(total / norm if norm else 0.0)
    return np.array(losses)


@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    smoothing=st.sampled_from([0.0, 0.1, 0.3]),
)
def test_bce_is_the_formula(data, shape, smoothing):
    # Multiples of 1/8 are exact in float32; a weight under 1/8 would only test rounding.
    logits = data.draw(npst.arrays(np.float32, shape, elements=st.integers(-400, 400).map(lambda n: n / 8)))
    weights = data.draw(npst.arrays(np.float32, shape, elements=st.integers(0, 8).map(lambda n: n / 8)))
    is_expert = data.draw(npst.arrays(np.bool_, shape[0]))
    loss = bce(torch.tensor(logits), torch.tensor(weights), torch.tensor(is_expert), smoothing)
    np.testing.assert_allclose(loss, bce_by_formula(logits, weights, is_expert, smoothing), rtol=1e-5, atol=1e-6)


def test_bce_by_hand():
    """f = 0 costs log 2 for either label; f = log 3 is D = 3/4: log(4/3) for the expert and log 4 for the policy."""
    logits = torch.tensor([[0.0, np.log(3)], [0.0, np.log(3)]])
    weights = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    loss = bce(logits, weights, torch.tensor([True, False]))
    expected = [(np.log(2) + 3 * np.log(4 / 3)) / 4, (np.log(2) + 3 * np.log(4)) / 4]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_expert_is_high():
    """The gradient pushes the expert's logits up and the policy's down, and smoothing stops at D = 1 - s."""
    logits = torch.zeros(2, 3, requires_grad=True)
    bce(logits, torch.ones(2, 3), torch.tensor([True, False]), 0.1).sum().backward()
    # d loss / d f = (sigmoid(f) - y) / 3
    np.testing.assert_allclose(logits.grad, [[(0.5 - 0.9) / 3] * 3, [(0.5 - 0.1) / 3] * 3], rtol=1e-6)
    optimum = torch.full((1, 1), float(np.log(9)), requires_grad=True)  # sigmoid = 0.9
    bce(optimum, torch.ones(1, 1), torch.tensor([True]), 0.1).sum().backward()
    assert abs(float(optimum.grad)) < 1e-6


def test_smoothing_changes_the_target_not_the_mask():
    """Without supervised positions the loss is 0 whatever the smoothing, and smoothed labels leave weights alone."""
    logits = torch.tensor([[5.0, -5.0, 2.0]])
    for smoothing in (0.0, 0.1, 0.4):
        assert bce(logits, torch.zeros(1, 3), torch.tensor([False]), smoothing).tolist() == [0.0]
        one = bce(logits, torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([True]), smoothing)
        expected = bce_by_formula([[-5.0]], [[1.0]], [True], smoothing)
        np.testing.assert_allclose(one, expected, rtol=1e-6)


def test_padding_may_hold_anything():
    """Nan and infinity where the weight is 0 reach neither the loss nor the gradients of the real logits and below."""
    clean = torch.tensor([[0.5, -1.0], [2.0, 0.25]])
    garbage = torch.tensor([[torch.nan, torch.inf], [-torch.inf, torch.nan]])
    weights = torch.tensor([[1.0, 0.5, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    is_expert = torch.tensor([True, False])
    logits = torch.cat([clean, garbage], 1).requires_grad_()
    loss = bce(logits, weights, is_expert, 0.1)
    loss.sum().backward()
    real = clean.clone().requires_grad_()
    expected = bce(real, weights[:, :2], is_expert, 0.1)
    expected.sum().backward()
    assert torch.equal(loss, expected)
    assert torch.equal(logits.grad[:, :2], real.grad)
    assert torch.equal(logits.grad[:, 2:], torch.zeros(2, 2))


@given(is_expert=st.lists(st.booleans(), min_size=1, max_size=12), data=st.data())
def test_class_weights_give_the_mean_of_class_means(is_expert, data):
    counts = data.draw(st.lists(st.booleans(), min_size=len(is_expert), max_size=len(is_expert)))
    loss = data.draw(npst.arrays(np.float64, len(is_expert), elements=st.integers(-80, 80).map(lambda n: n / 8)))
    weights = class_weights(torch.tensor(is_expert), torch.tensor(counts)).numpy()
    means = []
    for kind in (True, False):
        members = [value for value, expert, counted in zip(loss, is_expert, counts) if counted and expert == kind]
        if members:
            means.append(sum(members) / len(members))
    expected = sum(means) / len(means) if means else 0.0
    assert float((weights * loss).sum()) == pytest.approx(expected, abs=1e-5)
    assert all(weight == 0 for weight, counted in zip(weights, counts) if not counted)


def test_one_expert_weighs_as_much_as_four_rollouts():
    weights = class_weights(torch.tensor([True, False, False, False, False]), torch.ones(5).bool())
    assert weights.tolist() == [0.5, 0.125, 0.125, 0.125, 0.125]


@pytest.mark.parametrize("sizes", [(1,) * 10, (3, 3, 4), (9, 1)])
def test_micro_batches_add_up_to_the_whole(sizes):
    """Summed weighted loss and gradients of any split equal those of the full batch."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(10, 7, 5, generator=generator)
    weights = (torch.rand(10, 7, generator=generator) > 0.4).float()
    is_expert = torch.rand(10, generator=generator) > 0.7
    per_sequence = class_weights(is_expert, weights.sum(1) > 0)

    def run(splits):
        layer = torch.nn.Linear(5, 1)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-1, 1, 5)[None])
            layer.bias.fill_(0.3)
        total = 0.0
        for part in torch.arange(10).split(splits):
            logits = layer(features[part]).squeeze(-1)
            loss = (bce(logits, weights[part], is_expert[part], 0.1) * per_sequence[part]).sum()
            loss.backward()
            total += loss.item()
        return total, layer.weight.grad, layer.bias.grad

    whole, split = run([10]), run(list(sizes))
    assert split[0] == pytest.approx(whole[0], abs=1e-6)
    torch.testing.assert_close(split[1], whole[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(split[2], whole[2], atol=1e-6, rtol=0)
