"""The learning curve: AUROCs by hand, and the extrapolation of a curve that is known."""

import numpy as np
import pytest
import torch

from tracereward.training.learning_curve import extrapolated, learning_curve, within_questions
from tracereward.training.readout import Examples


def examples(labels, questions) -> Examples:
    labels = np.asarray(labels, dtype=bool)
    return Examples(labels=labels, questions=np.asarray(questions), weights=np.ones(len(labels)))


def test_auroc_of_each_question():
    known = examples([1, 0, 0, 1, 0, 1], [3, 3, 3, 5, 5, 7])
    assert within_questions(np.array([2.0, 1.0, 3.0, 4.0, 4.0, 0.0]), known).tolist() == [0.5, 0.5]


def test_extrapolation_of_a_known_curve():
    """Values of 0.9 - 0.8 / sqrt(n) plus noise of held-out questions, which is the same at all sizes."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 200)
    values = {n: (0.9 - 0.8 / np.sqrt(n) + noise - noise.mean())[None] for n in (16, 25, 64, 100)}
    found = extrapolated(values, 400, seed=0)
    assert found.value == pytest.approx(0.9 - 0.8 / 20)
    half = 1.96 * 0.1 / np.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)


def generated(questions: int, seed: int):
    """States of two layers, of which only the second tells right from wrong, weakly, in one of 12 directions."""
    rng = np.random.default_rng(seed)
    question = np.repeat(np.arange(questions), 6)
    labels = rng.random(len(question)) < 0.5
    labels[::6] = True  # the demonstrations
    values = rng.normal(size=(len(question), 2, 12))
    values[:, 1, 0] += np.where(labels, 0.7, -0.7)
    return torch.tensor(values).float(), examples(labels, question)


def test_more_questions_are_better_and_the_curve_says_by_how_much():
    states, known = generated(60, 0)
    held_states, held = generated(80, 1)
    curve = learning_curve(
        (states, held_states), [1, 2], known, held, objective="pairwise", judged=lambda scores: None, seed=0
    )
    assert [one.questions for one in curve.measured] == [6, 12, 24, 42, 60]
    assert curve.measured[-1].value > curve.measured[0].value + 0.05
    assert all(one.low <= one.value <= one.high for one in curve.measured[-1:])
    assert [one.questions for one in curve.beyond] == [120, 240]
    # Along the best direction two traces differ by N(1.4, sqrt 2): P(right above wrong) = Phi(0.99) = 0.839.
    assert curve.beyond[-1].value == pytest.approx(0.839, abs=0.05)
    assert abs(curve.check - curve.measured[-1].value) < 0.05
    assert "240" in curve.line


def test_questions_without_a_positive_are_in_every_share():
    """They weigh on the heads, not on the number of questions: 30 of them have the same states as experts elsewhere."""
    states, known = generated(60, 0)
    alone = known.questions >= 30
    known = examples(np.where(alone, False, known.labels), known.questions)
    held_states, held = generated(20, 1)
    curves = [
        learning_curve(
            (states[kept], held_states), [1, 2], known[kept], held, objective="bce", judged=lambda scores: None, seed=0
        )
        for kept in (np.arange(360), np.flatnonzero(~alone))
    ]
    for curve in curves:
        assert [one.questions for one in curve.measured] == [3, 6, 12, 21, 30]
    assert all(a.value != b.value for a, b in zip(*(curve.measured for curve in curves), strict=True))
