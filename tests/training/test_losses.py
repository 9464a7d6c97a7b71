"""Discriminator losses against their formulas in float64 numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tracereward.training.loss_weights import class_weights, pair_weights
from tracereward.training.losses import (
    bce,
    centre,
    input_gradient_norms,
    limit_spectral_norm,
    nnpu,
    nnpu_negative,
    pairwise,
    pairwise_tokens,
    sequence_scores,
    wasserstein,
)

EIGHTHS = st.integers(-80, 80).map(lambda n: n / 8)  # exact in float32


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
def test_bce_matches_the_formula(data, shape, smoothing):
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


def test_bce_raises_expert_logits():
    """The gradient pushes the expert's logits up and the policy's down, and smoothing stops at D = 1 - s."""
    logits = torch.zeros(2, 3, requires_grad=True)
    bce(logits, torch.ones(2, 3), torch.tensor([True, False]), 0.1).sum().backward()
    # d loss / d f = (sigmoid(f) - y) / 3
    np.testing.assert_allclose(logits.grad, [[(0.5 - 0.9) / 3] * 3, [(0.5 - 0.1) / 3] * 3], rtol=1e-6)
    optimum = torch.full((1, 1), float(np.log(9)), requires_grad=True)  # sigmoid = 0.9
    bce(optimum, torch.ones(1, 1), torch.tensor([True]), 0.1).sum().backward()
    assert abs(float(optimum.grad)) < 1e-6


def test_smoothing_changes_targets_but_not_weights():
    """Without supervised positions the loss is 0 for any smoothing; weights are unchanged."""
    logits = torch.tensor([[5.0, -5.0, 2.0]])
    for smoothing in (0.0, 0.1, 0.4):
        assert bce(logits, torch.zeros(1, 3), torch.tensor([False]), smoothing).tolist() == [0.0]
        one = bce(logits, torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([True]), smoothing)
        expected = bce_by_formula([[-5.0]], [[1.0]], [True], smoothing)
        np.testing.assert_allclose(one, expected, rtol=1e-6)


def test_padding_may_hold_any_value():
    """NaN and infinity at weight 0 affect neither the loss nor the gradients of the real logits and their inputs."""
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
    weights = class_weights(torch.tensor(is_expert), torch.tensor(counts).float()).numpy()
    means = []
    for kind in (True, False):
        members = [value for value, expert, counted in zip(loss, is_expert, counts) if counted and expert == kind]
        if members:
            means.append(sum(members) / len(members))
    expected = sum(means) / len(means) if means else 0.0
    assert float((weights * loss).sum()) == pytest.approx(expected, abs=1e-5)
    assert all(weight == 0 for weight, counted in zip(weights, counts) if not counted)


def test_classes_weigh_the_same_whatever_their_counts():
    weights = class_weights(torch.tensor([True, False, False, False, False]), torch.ones(5))
    assert weights.tolist() == [0.5, 0.125, 0.125, 0.125, 0.125]


@pytest.mark.parametrize("sizes", [(1,) * 10, (3, 3, 4), (9, 1)])
def test_micro_batches_sum_to_the_full_batch(sizes):
    """The summed weighted losses and gradients of any split equal those of the full batch."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(10, 7, 5, generator=generator)
    weights = (torch.rand(10, 7, generator=generator) > 0.4).float()
    is_expert = torch.rand(10, generator=generator) > 0.7
    per_sequence = class_weights(is_expert, (weights.sum(1) > 0).float())

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

    full, split = run([10]), run(list(sizes))
    assert split[0] == pytest.approx(full[0], abs=1e-6)
    torch.testing.assert_close(split[1], full[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(split[2], full[2], atol=1e-6, rtol=0)


# ---------- labels that change within a trace ----------


@given(data=st.data(), shape=st.tuples(st.integers(1, 4), st.integers(1, 7)), smoothing=st.sampled_from([0.0, 0.1]))
def test_bce_with_per_token_labels_matches_the_formula(data, shape, smoothing):
    logits = data.draw(npst.arrays(np.float32, shape, elements=EIGHTHS))
    weights = data.draw(npst.arrays(np.float32, shape, elements=st.integers(0, 8).map(lambda n: n / 8)))
    labels = data.draw(npst.arrays(np.bool_, shape))
    expected = np.zeros(shape[0])
    for i in range(shape[0]):
        total = 0.0
        for t in range(shape[1]):
            y = 1 - smoothing if labels[i, t] else smoothing
            f = float(logits[i, t])
            total += float(weights[i, t]) * (y * np.logaddexp(0, -f) + (1 - y) * np.logaddexp(0, f))
        if weights[i].sum():
            expected[i] = total / float(weights[i].sum())
    loss = bce(torch.tensor(logits), torch.tensor(weights), torch.tensor(labels), smoothing)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)


def test_bce_labels_are_hard_by_default():
    """The default s is 0: a logit of 100 costs nothing for the expert and 100 for the policy."""
    logits = torch.tensor([[100.0], [100.0]])
    loss = bce(logits, torch.ones(2, 1), torch.tensor([True, False]))
    np.testing.assert_allclose(loss, [0, 100], atol=1e-30)


# ---------- scores and pairs ----------


@given(data=st.data(), shape=st.tuples(st.integers(1, 4), st.integers(1, 7)))
def test_sequence_scores_are_weighted_means(data, shape):
    logits = data.draw(npst.arrays(np.float32, shape, elements=EIGHTHS))
    weights = data.draw(npst.arrays(np.float32, shape, elements=st.integers(0, 8).map(lambda n: n / 8)))
    expected = [
        sum(float(w) * float(f) for w, f in zip(ws, fs)) / float(sum(ws)) if sum(ws) else 0.0
        for ws, fs in zip(weights, logits)
    ]
    np.testing.assert_allclose(sequence_scores(torch.tensor(logits), torch.tensor(weights)), expected, atol=1e-5)


@st.composite
def sequences(draw):
    """Scores, labels and prompts of up to eight sequences of three prompts."""
    size = draw(st.integers(1, 8))
    scores = draw(npst.arrays(np.float32, size, elements=EIGHTHS))
    is_expert = draw(npst.arrays(np.bool_, size))
    group = draw(npst.arrays(np.int64, size, elements=st.integers(0, 2)))
    return scores, is_expert, group


def over_experts(value, scores, is_expert, group) -> list[float]:
    """For each sequence of the policy the mean of value(s_e, s_i) over the experts of its prompt; else 0."""
    found = []
    for i, score in enumerate(scores):
        own = [float(scores[e]) for e in range(len(scores)) if is_expert[e] and group[e] == group[i]]
        found.append(0.0 if is_expert[i] or not own else sum(value(e, float(score)) for e in own) / len(own))
    return found


@given(sequences())
def test_pairwise_is_bradley_terry_over_experts_of_the_prompt(batch):
    loss = pairwise(*map(torch.tensor, batch))
    expected = over_experts(lambda expert, policy: np.logaddexp(0, -(expert - policy)), *batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)


@given(sequences())
def test_centre_is_the_square_of_the_sum(batch):
    expected = over_experts(lambda expert, policy: (expert + policy) ** 2, *batch)
    np.testing.assert_allclose(centre(*map(torch.tensor, batch)), expected, rtol=1e-5, atol=1e-6)


@given(sequences(), EIGHTHS)
def test_common_shift_changes_centre_but_not_pairwise(batch, shift):
    scores, is_expert, group = map(torch.tensor, batch)
    torch.testing.assert_close(
        pairwise(scores + shift, is_expert, group), pairwise(scores, is_expert, group), atol=1e-5, rtol=1e-5
    )
    expected = over_experts(lambda e, i: (e + i + 2 * shift) ** 2, *batch)
    np.testing.assert_allclose(centre(scores + shift, is_expert, group), expected, rtol=1e-5, atol=1e-5)


def test_pairs_by_hand():
    """Gap log 3: sigmoid is 3/4. The rollout of another prompt has no expert, and experts have no loss themselves."""
    scores = torch.tensor([float(np.log(3)), 0.0, 5.0], requires_grad=True)
    is_expert, group = torch.tensor([True, False, False]), torch.tensor([4, 4, 9])
    loss = pairwise(scores, is_expert, group)
    np.testing.assert_allclose(loss.detach(), [0, np.log(4 / 3), 0], atol=1e-6)
    loss.sum().backward()
    np.testing.assert_allclose(scores.grad, [-0.25, 0.25, 0], atol=1e-6)  # up with the expert, down with the rollout
    np.testing.assert_allclose(centre(scores, is_expert, group).detach(), [0, np.log(3) ** 2, 0], rtol=1e-6)


@st.composite
def token_sequences(draw):
    """Logits, weights, labels, prompts and shares of up to six sequences of two prompts, in float64."""
    size, length = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    numbers = npst.arrays(np.float64, (size, length), elements=EIGHTHS)
    weights = draw(npst.arrays(np.float64, (size, length), elements=st.sampled_from([0, 0.5, 1])))
    shares = draw(npst.arrays(np.float64, size, elements=st.sampled_from([0.5, 1, 2])))
    of_each = draw(npst.arrays(np.bool_, size)), draw(npst.arrays(np.int64, size, elements=st.integers(0, 1)))
    return *map(torch.tensor, (draw(numbers), weights, *of_each)), torch.tensor(shares)


@given(token_sequences())
def test_pairwise_tokens_compares_each_token_with_the_other_sides_mean(batch):
    logits, weights, is_expert, group, shares = (part.numpy() for part in batch)

    def mean(values, w):
        return sum(values * w) / sum(w) if sum(w) else 0.0

    def cost(gap):
        return np.logaddexp(0, -gap)

    expected, bound = np.zeros(len(logits)), np.zeros(len(logits))
    for i in np.flatnonzero(~is_expert):
        experts = [e for e in np.flatnonzero(is_expert) if group[e] == group[i]]
        for e in experts:
            s_e, s_i = mean(logits[e], weights[e]), mean(logits[i], weights[i])
            halves = mean(cost(s_e - logits[i]), weights[i]) + mean(cost(logits[e] - s_i), weights[e])
            expected[i] += shares[e] * halves / 2 / sum(shares[experts])
            both = int(sum(weights[e]) > 0) + int(sum(weights[i]) > 0)  # a sequence without positions has no half
            bound[i] += shares[e] * cost(s_e - s_i) * both / 2 / sum(shares[experts])
    loss = pairwise_tokens(*batch[:4], shares=batch[4]).numpy()
    np.testing.assert_allclose(loss, expected, atol=1e-12)
    assert (loss >= bound - 1e-12).all()  # Jensen: at least the pairwise loss of the means
    scores = sequence_scores(*batch[:2])
    if (weights.sum(1) > 0).all():
        np.testing.assert_allclose(pairwise(scores, *batch[2:4], shares=batch[4]), bound, atol=1e-12)


@given(token_sequences(), EIGHTHS, EIGHTHS)
def test_a_questions_level_changes_neither_pairwise_tokens_nor_its_gradient(batch, one, two):
    """Logits of prompt 0 are moved by `one`, those of prompt 1 by `two`; the sum of a prompt's gradients is 0."""
    logits, weights, is_expert, group, shares = batch
    weights = weights.clamp(min=0.25)  # a sequence without positions has no level
    results = []
    for shift in (torch.zeros(2).double(), torch.tensor([one, two]).double()):
        moved = (logits + shift[group][:, None]).requires_grad_()
        loss = pairwise_tokens(moved, weights, is_expert, group, shares=shares)
        loss.sum().backward()
        results.append((loss.detach(), moved.grad))
        sums = torch.zeros(2).double().index_add(0, group, moved.grad.sum(1))
        np.testing.assert_allclose(sums, [0, 0], atol=1e-12)
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(before, after, atol=1e-9, rtol=0)


def test_pairwise_tokens_by_hand():
    """Expert log 3 twice, rollout log 3 and -log 3 (mean 0), then masked NaN.

    The rollout's tokens have the gaps 0 and 2 log 3 to the expert's mean, which cost log 2 and log(1 + 1/9); each of
    the expert's has log 3 to the rollout's mean, log(4/3).
    """
    three, nan = float(np.log(3)), float("nan")
    logits = torch.tensor([[three, three, nan], [three, -three, nan]], requires_grad=True)
    weights = torch.tensor([[1.0, 1, 0], [1, 1, 0]])
    loss = pairwise_tokens(logits, weights, torch.tensor([True, False]), torch.tensor([5, 5]))
    expected = (np.log(2) + np.log(10 / 9)) / 4 + np.log(4 / 3) / 2
    np.testing.assert_allclose(loss.detach(), [0, expected], rtol=1e-6)
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:, 2].any()
    assert (logits.grad[0, :2] < 0).all()
    assert (logits.grad[1, :2] > 0).all()


def test_experts_of_a_pair_weigh_by_their_shares():
    """Experts 0 and 2 of weight 3 and 1 against a rollout at 0: (3 log 2 + log(1 + e^-2)) / 4."""
    scores, is_expert = torch.tensor([0.0, 2.0, 0.0]), torch.tensor([True, True, False])
    group, shares = torch.zeros(3), torch.tensor([3.0, 1, 7])
    loss = pairwise(scores, is_expert, group, shares=shares)
    np.testing.assert_allclose(loss, [0, 0, (3 * np.log(2) + np.logaddexp(0, -2)) / 4], rtol=1e-6)
    np.testing.assert_allclose(centre(scores, is_expert, group, shares=shares), [0, 0, 1], rtol=1e-6)


@given(
    npst.arrays(np.float64, 3, elements=EIGHTHS),
    npst.arrays(np.float64, 4, elements=EIGHTHS),
    st.sampled_from([0.2, 0.5, 0.9]),
)
def test_nnpu_is_the_non_negative_risk_and_takes_overfitting_back(experts, rollouts, prior):
    """Value: prior P[l(s)] + max(0, N). Gradient, by hand: of all of it, or of -N alone where N is negative."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def slope(x):
        return sigmoid(x) * sigmoid(-x)

    n = sigmoid(rollouts).mean() - prior * sigmoid(experts).mean()
    scores = torch.tensor([*experts, *rollouts], requires_grad=True)
    is_expert = torch.tensor([True] * 3 + [False] * 4)
    means = torch.tensor([1 / 3] * 3 + [1 / 4] * 4)
    assert (nnpu_negative(scores, is_expert, prior) * means).sum().item() == pytest.approx(n, abs=1e-6)
    loss = (nnpu(scores, is_expert, prior, below=bool(n < 0)) * means).sum()
    assert loss.item() == pytest.approx(prior * sigmoid(-experts).mean() + max(0, n), abs=1e-6)
    loss.backward()
    of_experts, of_rollouts = -2 * prior * slope(experts) / 3, slope(rollouts) / 4
    if n < 0:
        of_experts, of_rollouts = prior * slope(experts) / 3, -of_rollouts
    np.testing.assert_allclose(scores.grad, [*of_experts, *of_rollouts], atol=1e-7)


def test_nnpu_finds_the_boundary_that_unlabelled_as_negative_misses():
    """Positives around 1 and negatives around -1 on a line, 300 and 600 unlabelled of which 70 % are positive.

    Right is the sign. With the prior known nearly all are right; as if the unlabelled were negative, most positives
    are on the wrong side, because more than half of the points around 1 are unlabelled.
    """
    rng = np.random.default_rng(0)
    is_positive = np.array([True] * 300 + [True] * 420 + [False] * 180)
    x = torch.tensor(np.where(is_positive, 1, -1) + rng.normal(0, 0.5, 900))
    is_expert = torch.arange(900) < 300
    weights = 2 * class_weights(is_expert, torch.ones(900))
    right = {}
    for name in ("nnpu", "bce"):
        line = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([line], lr=0.05)
        for _ in range(300):
            scores = line[0] * x + line[1]
            if name == "nnpu":
                negative = (nnpu_negative(scores, is_expert, 0.7) * weights).sum()
                losses = nnpu(scores, is_expert, 0.7, below=bool(negative < 0))
            else:
                losses = bce(scores[:, None], torch.ones(900, 1), is_expert)
            optimiser.zero_grad()
            (weights * losses if name == "nnpu" else losses).sum().backward()
            optimiser.step()
        found = (line.detach()[0] * x + line.detach()[1]) > 0
        right[name] = (found.numpy() == is_positive)[300:].mean()
    assert right["nnpu"] > 0.95
    assert right["bce"] < 0.6


@given(sequences())
def test_wasserstein_is_policy_minus_expert(batch):
    scores, is_expert, _ = batch
    loss = wasserstein(torch.tensor(scores), torch.tensor(is_expert))
    assert loss.tolist() == [-float(s) if expert else float(s) for s, expert in zip(scores, is_expert)]
    if is_expert.any() and not is_expert.all():
        weights = 2 * class_weights(torch.tensor(is_expert), torch.ones(len(scores)))
        expected = scores[~is_expert].astype(np.float64).mean() - scores[is_expert].astype(np.float64).mean()
        assert float((weights * loss).sum()) == pytest.approx(expected, abs=1e-5)


@given(sequences(), st.data())
def test_pair_weights_give_the_mean_over_sequences_in_pairs(batch, data):
    _, is_expert, group = batch
    counts = data.draw(npst.arrays(np.bool_, len(group)))
    matched = [
        counts[i]
        and not is_expert[i]
        and any(counts[e] and is_expert[e] and group[e] == group[i] for e in range(len(group)))
        for i in range(len(group))
    ]
    expected = [m / sum(matched) if m else 0.0 for m in matched]
    weights = pair_weights(torch.tensor(is_expert), torch.tensor(counts).float(), torch.tensor(group))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


@given(sequences(), st.data())
def test_pair_losses_sum_over_micro_batches_of_complete_groups(batch, data):
    scores, is_expert, group = map(torch.tensor, batch)
    part_of = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=3, max_size=3)))[group]
    counts = torch.ones(len(group))
    in_pairs, classes = pair_weights(is_expert, counts, group), class_weights(is_expert, counts)

    def losses(p):
        return torch.stack(
            [
                (in_pairs[p] * pairwise(scores[p], is_expert[p], group[p])).sum(),
                (in_pairs[p] * centre(scores[p], is_expert[p], group[p])).sum(),
                (classes[p] * wasserstein(scores[p], is_expert[p])).sum(),
            ]
        )

    split = losses(part_of == 0) + losses(part_of == 1)
    torch.testing.assert_close(split, losses(counts > 0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 3])
def test_padding_does_not_change_losses_of_scores(columns):
    """Extra NaN columns affect neither scores, nor losses, nor gradients of the real logits."""
    clean = torch.tensor([[0.5, -1.0], [2.0, 0.25], [-3.0, 1.5]])
    weights = torch.tensor([[1.0, 0.5], [1.0, 1.0], [0.0, 0.0]])
    is_expert, group = torch.tensor([True, False, False]), torch.tensor([0, 0, 0])
    results = []
    for extra in (0, columns):
        logits = torch.cat([clean, torch.full((3, extra), torch.nan)], 1).requires_grad_()
        scores = sequence_scores(logits, torch.cat([weights, torch.zeros(3, extra)], 1))
        losses = pairwise(scores, is_expert, group) + centre(scores, is_expert, group) + wasserstein(scores, is_expert)
        losses.sum().backward()
        results.append((scores.detach(), losses.detach(), logits.grad[:, :2]))
        assert torch.equal(logits.grad[:, 2:], torch.zeros(3, extra))
    for one, two in zip(*results):
        assert torch.equal(one, two)
    np.testing.assert_allclose(results[0][0], [0, 1.125, 0])  # (0.5 - 0.5) / 1.5, (2 + 0.25) / 2, none


# ---------- Lipschitz ----------


@given(data=st.data())
def test_gradient_of_a_linear_critic_is_its_weights(data):
    """s(x) = sum_t w_t a . x_t has the gradient w_t a: norm |a| sqrt(sum_t m_t w_t^2), whatever x is."""
    rows, length, size = 3, 4, 2
    w = data.draw(npst.arrays(np.float64, (rows, length), elements=EIGHTHS))
    a = data.draw(npst.arrays(np.float64, size, elements=EIGHTHS))
    mask = data.draw(npst.arrays(np.int64, (rows, length), elements=st.integers(0, 1)))
    x = torch.tensor(data.draw(npst.arrays(np.float64, (rows, length, size), elements=EIGHTHS)), requires_grad=True)
    scores = (torch.tensor(w) * (x @ torch.tensor(a))).sum(1)
    norms = input_gradient_norms(scores, x, torch.tensor(mask)).detach()
    expected = [np.sqrt((a**2).sum()) * np.sqrt(sum(w_t**2 for w_t, m in zip(ws, ms) if m)) for ws, ms in zip(w, mask)]
    np.testing.assert_allclose(norms, expected, atol=1e-9)


def test_penalty_gradients_match_finite_differences():
    """s = x' A x / 2 has the gradient A x; (|A x| - 1)^2 and |A x|^2 / 2 are differentiated with respect to A."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 1, 3, generator=generator, dtype=torch.float64)
    symmetric = (half + half.T).numpy()
    for penalty in (lambda norm: (norm - 1) ** 2, lambda norm: norm**2 / 2):
        matrix = torch.tensor(symmetric, requires_grad=True)
        inputs = x.clone().requires_grad_()
        scores = 0.5 * torch.einsum("bti,ij,btj->b", inputs, matrix, inputs)
        penalty(input_gradient_norms(scores, inputs, torch.ones(2, 1))).sum().backward()

        def by_hand(a, penalty=penalty):
            # The derivative of x' A x / 2 for any A, symmetric or not.
            return sum(penalty(np.linalg.norm((a + a.T) / 2 @ row)) for row in x[:, 0].numpy())

        for i in range(3):
            for j in range(3):
                step = np.zeros((3, 3))
                step[i, j] = 1e-6
                slope = (by_hand(symmetric + step) - by_hand(symmetric - step)) / 2e-6
                assert float(matrix.grad[i, j]) == pytest.approx(slope, rel=1e-6, abs=1e-7)


def test_constant_critic_has_a_finite_penalty():
    """A zero head: the derivative of sqrt is infinite at 0, and 0 * inf would be NaN."""
    weight = torch.zeros(3, requires_grad=True)
    inputs = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    norms = input_gradient_norms((inputs @ weight).sum(1), inputs, torch.ones(2, 4))
    assert float(norms.detach().max()) < 1e-15
    (norms - 1).square().sum().backward()
    assert weight.grad.tolist() == [0.0] * 3


@given(
    data=st.data(),
    shape=st.one_of(st.tuples(st.integers(1, 5)), st.tuples(st.integers(1, 4), st.integers(1, 4))),
    limit=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_spectral_norm_is_at_most_the_limit(data, shape, limit):
    weight = data.draw(npst.arrays(np.float32, shape, elements=st.integers(-16, 16).map(lambda n: n / 8)))
    largest = np.linalg.svd(np.atleast_2d(weight).astype(np.float64), compute_uv=False)[0]
    expected = weight * min(1.0, limit / largest) if largest else weight
    limited = torch.nn.Parameter(torch.tensor(weight))
    limit_spectral_norm(limited, limit)
    np.testing.assert_allclose(limited.detach(), expected, rtol=1e-5, atol=1e-7)
    if largest < limit:
        assert torch.equal(limited.detach(), torch.tensor(weight))


def test_spectral_limit_is_1_by_default():
    weight = torch.tensor([3.0, 4.0])
    limit_spectral_norm(weight)
    np.testing.assert_allclose(weight, [0.6, 0.8], rtol=1e-6)
    limit_spectral_norm(small := torch.tensor([[0.3, 0.0], [0.0, 0.9]]))
    assert torch.equal(small, torch.tensor([[0.3, 0.0], [0.0, 0.9]]))


def test_rollout_without_expert_is_in_no_pair():
    """Prompt 0 has an expert and a rollout, 1 a rollout only, 2 an expert only, 3 an expert that does not count."""
    is_expert = torch.tensor([True, False, False, True, True, False])
    counts = torch.tensor([1.0, 1, 1, 1, 0, 1])
    weights = pair_weights(is_expert, counts, torch.tensor([0, 0, 1, 2, 3, 3]))
    assert weights.tolist() == [0, 1, 0, 0, 0, 0]
