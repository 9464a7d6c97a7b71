"""The read-out's optimum, pairs, folds and choice of layer."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tracereward.errors import InputError
from tracereward.training.loss_weights import balance_weights
from tracereward.training.readout import (
    PAIRS,
    PENALTIES,
    Examples,
    cross_fit,
    fit_heads,
    fit_readout,
    fold_numbers,
    layers_to_try,
    pairs,
)


def examples(labels, questions) -> Examples:
    labels = np.asarray(labels, dtype=bool)
    return Examples(labels=labels, questions=np.asarray(questions), weights=np.ones(len(labels)))


def generated(questions: int, each: int, size: int, seed: int = 0):
    """Traces with a level of their question, along which labels do not differ, and a direction along which they do."""
    rng = np.random.default_rng(seed)
    question = np.repeat(np.arange(questions), each)
    level = rng.normal(size=questions)[question] * 5
    labels = rng.random(len(question)) < 0.6
    values = rng.normal(size=(len(question), size))
    values[:, 0] += level
    values[:, 1] += np.where(labels, 0.8, -0.8)
    return values, examples(labels, question)


def test_pairs_are_those_of_a_question_and_each_question_weighs_the_same():
    high, low, weights = pairs(examples([1, 1, 0, 0, 1, 1, 0], [7, 7, 7, 8, 9, 9, 9]), 0)
    assert sorted(zip(high.tolist(), low.tolist(), strict=True)) == [(0, 2), (1, 2), (4, 6), (5, 6)]
    assert weights == pytest.approx([0.25] * 4)
    high, low, weights = pairs(examples([1] * 20 + [0] * 20 + [1, 0], [0] * 40 + [1, 1]), 0)
    assert len(set(zip(high.tolist(), low.tolist(), strict=True))) == PAIRS + 1
    assert weights[:PAIRS].sum() == pytest.approx(0.5)
    assert weights[-1] == pytest.approx(0.5)


def test_pairwise_head_is_logistic_regression_on_differences():
    """scikit-learn's, on all pairs and their mirror images."""
    values, known = generated(40, 6, 5)
    head = fit_heads(values, known, "pairwise", penalties=[0.05])[0.05]
    high, low, weights = pairs(known, 0)
    scale = values.std(0) + 1e-6
    gaps = (values[high] - values[low]) / scale
    both = np.concatenate([gaps, -gaps])
    signs = np.concatenate([np.ones(len(gaps)), np.zeros(len(gaps))])
    reference = LogisticRegression(C=1 / 0.05, fit_intercept=False, tol=1e-10, max_iter=2000)
    reference.fit(both, signs, sample_weight=np.concatenate([weights, weights]) / 2)
    assert head * scale == pytest.approx(reference.coef_[0], abs=1e-4)


def test_bce_head_is_weighted_logistic_regression():
    values, known = generated(40, 6, 5)
    known = Examples(labels=known.labels, questions=known.questions, weights=np.linspace(0.1, 2, len(known.labels)))
    head = fit_heads(values, known, "bce", penalties=[0.05])[0.05]
    scale = values.std(0) + 1e-6
    reference = LogisticRegression(C=1 / 0.05, tol=1e-10, max_iter=2000)
    weights = known.weights / known.weights.sum()
    reference.fit((values - values.mean(0)) / scale, known.labels, sample_weight=weights)
    assert head * scale == pytest.approx(reference.coef_[0], abs=1e-4)


def test_folds_split_questions_and_the_scores_are_of_heads_that_did_not_see_them():
    values, known = generated(30, 5, 4)
    fold_of = fold_numbers(known, 5, 0)
    assert all(len(set(fold_of[known.questions == question])) == 1 for question in range(30))
    states = torch.tensor(values, dtype=torch.float32)[:, None]
    found = fit_readout(states, [1], known, seed=0)
    for fold in range(5):
        seen = fold_of != fold
        head = fit_heads(states[:, 0].numpy()[seen], known[seen], "pairwise", penalties=PENALTIES)[found.penalty]
        expected = states[:, 0].numpy()[~seen] @ head + found.bias
        assert found.scores[~seen] == pytest.approx(expected, abs=1e-4)
    assert found.weight == pytest.approx(found.folds.mean(0))


def test_the_layer_that_tells_them_apart_is_chosen_and_zero_is_between_the_classes():
    values, known = generated(60, 6, 8)
    noise = np.random.default_rng(5).normal(size=values.shape)
    states = torch.tensor(np.stack([noise, values, noise], 1), dtype=torch.float32)
    found = fit_readout(states, [1, 2, 3], known)
    assert found.layers == (2,)
    scores = found.score(states, [1, 2, 3])
    assert scores == pytest.approx(values @ found.weight[0] + found.bias, abs=1e-4)
    assert scores[known.labels].mean() == pytest.approx(-scores[~known.labels].mean(), abs=1e-6)
    assert found.chosen == max(found.table, key=lambda one: one.auroc)
    assert found.chosen.auroc > 0.8
    assert all(0.3 < one.auroc < 0.7 for one in found.table if one.layers in ((1,), (3,)))


def test_the_mean_of_layers_is_chosen_where_each_tells_a_part():
    """From heads fitted here: each layer's scores have the same standard deviation on the traces it has seen."""
    values, known = generated(100, 6, 8)
    rng = np.random.default_rng(5)
    several = np.stack([values + rng.normal(size=values.shape) * scale for scale in (1, 1.2, 1)], 1)
    several[:, 2] *= 100  # weighs no more
    states = torch.tensor(several, dtype=torch.float32)
    found = fit_readout(states, [4, 7, 9], known, folds=3)
    assert found.layers == (4, 7, 9)
    assert {one.layers for one in found.table} == {(4,), (7,), (9,), (4, 7, 9)}
    fold_of, heads = fold_numbers(known, 3, 0), []
    for fold in range(3):
        seen = fold_of != fold
        of_layers = [
            fit_heads(states[:, layer].numpy()[seen], known[seen], "pairwise", penalties=PENALTIES)[found.penalty]
            for layer in range(3)
        ]
        spreads = [float(np.std(several[seen, layer] @ head)) for layer, head in enumerate(of_layers)]
        standardised = np.stack([head / spread for head, spread in zip(of_layers, spreads, strict=True)])
        heads.append(np.mean(spreads) * standardised / 3)
        expected = np.einsum("nlh,lh->n", several[~seen], heads[-1]) + found.bias
        assert found.scores[~seen] == pytest.approx(expected, abs=1e-3)
    assert found.folds == pytest.approx(np.stack(heads), rel=1e-3, abs=1e-5)
    assert found.weight == pytest.approx(np.mean(heads, 0), rel=1e-3, abs=1e-5)
    scores = found.score(states.flip(1), [9, 7, 4])
    assert scores == pytest.approx(np.einsum("nlh,lh->n", several, np.mean(heads, 0)) + found.bias, abs=1e-3)
    assert scores[known.labels].mean() == pytest.approx(-scores[~known.labels].mean(), abs=1e-3)
    assert found.chosen.auroc == max(one.auroc for one in found.table)


def test_a_layer_that_says_nothing_has_no_part_in_the_mean():
    values, known = generated(20, 5, 4)
    states = torch.tensor(np.stack([values, np.zeros_like(values)], 1), dtype=torch.float32)
    (mean, *_) = (one for one in cross_fit(states, [1, 2], known) if len(one.layers) == 2)
    assert np.isfinite(mean.heads).all()
    assert not mean.heads[:, 1].any()


def test_layers_to_try_are_among_those_that_can_be_read():
    assert layers_to_try([24]) == [24]
    assert layers_to_try(range(1, 31)) == [10, 15, 18, 21, 24, 27, 30]
    assert set(layers_to_try([1, 2])) == {1, 2}


def test_one_question_with_both_classes_is_too_few():
    with pytest.raises(InputError, match="1 question"):
        fit_readout(torch.zeros(4, 1, 2), [1], examples([1, 0, 1, 1], [0, 0, 1, 1]))


def test_in_pairs_balanced_traces_weigh_what_they_weigh_themselves():
    """Question and model then say nothing about who is above in a pair, as for single traces."""
    rng = np.random.default_rng(0)
    questions, models = np.repeat(np.arange(30), 4), ["a", "b", "c", "c"] * 30
    labels = rng.random(120) < np.tile([0.8, 0.5, 0.3, 0.3], 30)
    weights = np.array(balance_weights(labels.tolist(), questions.tolist(), models, "model"))
    high, low, of_pairs = pairs(Examples(labels=labels, questions=questions, weights=weights), seed=0)
    totals = np.bincount(high, of_pairs, 120) + np.bincount(low, of_pairs, 120)
    np.testing.assert_allclose(totals, 2 * weights / weights.sum(), atol=1e-9)
