"""The verdict, on outcomes counted by hand."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracereward.selection import Candidate
from tracereward.verdict import RELEVANT, Comparison, compared, questions_needed, verdict


def question(reward_right: bool, majority_right: bool, logprob: float | None = None) -> list[Candidate]:
    """Three candidates: two agree, and the reward prefers the third by far."""
    pair = [Candidate(text="a", answer="a", reward=-1.0, correct=majority_right, length=3, logprob=logprob)] * 2
    other = Candidate(text="b", answer="b", reward=9.0, correct=reward_right, length=9, logprob=logprob)
    return [*pair, other]


def equal(one: str, other: str) -> bool:
    return one == other


def of(gained: int, lost: int, same: int) -> list[list[Candidate]]:
    return [question(True, False)] * gained + [question(False, True)] * lost + [question(True, True)] * same


def test_interval_is_agresti_and_mins():
    # b = 12, c = 4, n = 100: (8 / 102) +- 1.959964 sqrt(17 - 64 / 102) / 102
    found = compared("majority", [1.0] * 12 + [0.0] * 4 + [1.0] * 84, [0.0] * 12 + [1.0] * 4 + [1.0] * 84)
    assert found.difference == pytest.approx(0.08)
    assert found.low == pytest.approx(8 / 102 - 1.959964 * math.sqrt(17 - 64 / 102) / 102, abs=1e-6)
    assert found.high == pytest.approx(8 / 102 + 1.959964 * math.sqrt(17 - 64 / 102) / 102, abs=1e-6)


def test_interval_covers_the_true_difference():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        cells = rng.choice(4, size=60, p=[0.6, 0.15, 0.1, 0.15])  # both right, first only, second only, none
        found = compared("majority", (cells <= 1).astype(float), np.isin(cells, (0, 2)).astype(float))
        covered += found.low <= 0.05 <= found.high
    assert 0.93 < covered / 2000 < 0.98


def test_better_than_every_baseline():
    found = verdict(of(gained=30, lost=5, same=265), equal)
    assert found.outcome == "better"
    assert found.decisive.difference == pytest.approx(25 / 300)
    assert found.line.startswith("worth using for reranking: better than majority (+8.3 points, ")


def test_one_strong_baseline_decides():
    # The log-prob is high where the reward is right too: the reward beats the majority, not the log-prob.
    rows = [
        [dataclasses.replace(c, logprob=-1.0 if c.correct else -2.0) for c in candidates]
        for candidates in of(gained=30, lost=0, same=370)
    ]
    found = verdict(rows, equal)
    assert found.decisive.baseline.startswith("logprob")
    assert found.outcome == "no better"


def test_no_better_needs_enough_questions():
    assert verdict(of(gained=3, lost=3, same=394), equal).outcome == "no better"
    assert verdict(of(gained=0, lost=0, same=6), equal).outcome == "unclear", "six equal questions show nothing"
    assert "cannot say: 6 questions" in verdict(of(gained=0, lost=0, same=6), equal).line


def test_worse():
    assert verdict(of(gained=2, lost=40, same=200), equal).outcome == "worse"


def test_nothing_to_choose():
    assert verdict([candidates[:1] for candidates in of(3, 3, 3)], equal) is None


def test_number_of_questions_that_decides():
    # A half-width of 0.12 at 50 questions is 0.06 at 200: as wide as the difference.
    assert questions_needed(Comparison(baseline="majority", difference=0.06, low=-0.06, high=0.18), 50) == 200
    # No difference: until a gain of RELEVANT is excluded, 50 * (0.12 / 0.03)^2.
    assert pytest.approx(0.03) == RELEVANT
    assert questions_needed(Comparison(baseline="majority", difference=0.0, low=-0.12, high=0.12), 50) == 800


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60),
)
def test_intervals_are_symmetric_and_hold_the_shrunk_difference(pairs):
    mine, other = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    found, swapped = compared("majority", mine, other), compared("majority", other, mine)
    assert found.low == pytest.approx(-swapped.high)
    assert found.low < found.difference * len(pairs) / (len(pairs) + 2) < found.high
