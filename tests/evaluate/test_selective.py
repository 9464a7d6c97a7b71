"""Risk over coverage: against all orders of equal scores, and the tables of a small pool by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracereward.evaluate.figures import risk_figure
from tracereward.evaluate.selective import confidences, evaluate_selective, selective_tables
from tracereward.metrics import risk_coverage, risk_coverage_area
from tracereward.selection import Candidate


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_risk_is_the_mean_over_the_orders_of_equal_scores(rows):
    curves = []
    for order in itertools.permutations(range(len(rows))):
        if all(rows[a][0] >= rows[b][0] for a, b in itertools.pairwise(order)):
            wrong = np.cumsum([not rows[i][1] for i in order])
            curves.append(wrong / np.arange(1, len(rows) + 1))
    scores, correct = zip(*rows, strict=True)
    found = risk_coverage(scores, correct)
    assert [risk for _, risk in found] == pytest.approx(np.mean(curves, axis=0).tolist())
    assert [coverage for coverage, _ in found] == pytest.approx([k / len(rows) for k in range(1, len(rows) + 1)])
    assert risk_coverage_area(scores, correct) == pytest.approx(np.mean(curves))


def question(*candidates) -> list[Candidate]:
    return [Candidate("", answer, reward, log_prob, correct=right) for answer, reward, log_prob, right in candidates]


POOL = [
    question(("1", 3.0, -2.0, True), ("1", 1.0, -1.0, True), ("2", 0.0, -3.0, False)),
    question(("1", 2.0, -1.5, False), ("2", 1.0, -4.0, True), ("3", 0.5, -4.0, False)),
    question(("5", -1.0, -0.5, True), ("5", -2.0, -5.0, True), ("5", -3.0, -5.0, True)),
]


def same(a: str, b: str) -> bool:
    return a == b


def test_confidence_is_of_the_chosen_candidate():
    found = confidences(POOL, same)
    assert found["reward"] == ([3.0, 2.0, -1.0], [True, False, True])
    assert found["logprob"] == ([-1.0, -1.5, -0.5], [True, False, True])
    scores, correct = found["majority"]
    assert scores == pytest.approx([2 / 3, 1 / 3, 1.0])
    assert correct == [True, False, True]
    assert "logprob" not in confidences([[Candidate("", "1", 0.0, correct=True)]], same)


def test_tables_of_a_small_pool():
    result = evaluate_selective(POOL, POOL * 3, same)
    # By reward: right, wrong, right; by log-prob and by votes: right, right, wrong.
    assert result["curves"]["reward"]["area"] == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert result["curves"]["logprob"]["area"] == pytest.approx((0 + 0 + 1 / 3) / 3)
    assert result["curves"]["majority"]["area"] == pytest.approx((0 + 0 + 1 / 3) / 3)
    assert result["curves"]["reward"]["points"] == [
        (pytest.approx(k / 3), pytest.approx(r)) for k, r in [(1, 0), (2, 1 / 2), (3, 1 / 3)]
    ]
    # Nine questions, three of them wrong with reward 2: the 9th score of 10 (risk .1) and the 8th (.2) are 2.
    by_reward = [row for row in result["abstaining"] if row["method"] == "reward"]
    assert [(row["risk"], row["answered"], row["answered_wrongly"]) for row in by_reward] == [
        (0.1, pytest.approx(1 / 3), 0.0),
        (0.2, pytest.approx(1 / 3), 0.0),
    ]
    curves, abstaining = selective_tables(result)
    assert curves.rows[0][1] == pytest.approx(100 * 5 / 18)
    assert len(abstaining.rows) == len(result["abstaining"])
    assert "<svg" in risk_figure(result["curves"])
