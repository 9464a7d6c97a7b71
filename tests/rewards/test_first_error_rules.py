"""The rule for the first error: signals, marks and thresholds by hand, by brute force and on exchangeable data."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta

from tracereward.errors import InputError
from tracereward.rewards.first_error_rules import (
    CONFIDENCE,
    RATE,
    SIGNALS,
    FirstErrorRule,
    RatedTrace,
    differences,
    first_below,
    fit_rule,
    LevelRule,
    lowest_steps,
    new_lows,
    safe_threshold,
)


def test_first_step_below_a_threshold():
    assert first_below([3.0, 1.0, 0.0], 2.0) == 1
    assert first_below([3.0, 2.0], 2.0) is None, "strictly below"
    assert first_below([1.0, 0.0], math.inf) == 0


def test_lowest_steps_returns_all_ties():
    assert lowest_steps([1.0, -1.0, 0.0]) == [1]
    assert lowest_steps([0.0, 2.0, 0.0]) == [0, 2]


def test_differences_and_new_lows_start_at_zero():
    assert differences([2.0, 5.0, 1.0, 0.5]) == [0.0, 3.0, -4.0, -0.5]
    assert new_lows([2.0, 5.0, 1.0, 1.5, 0.5]) == [0.0, 3.0, -1.0, 0.5, -0.5], "less 2, 2, 1, 1"
    assert differences([]) == new_lows([]) == []


STEPS = [[1.0, 3.0], [2.0, -4.0, 5.0], [0.0]]
"""Means 2, 1, 0; minima 1, -4, 0; ends 3, 5, 0."""


@pytest.mark.parametrize(
    ("signal", "values"),
    [
        ("level", [2.0, 1.0, 0.0]),
        ("minimum", [1.0, -4.0, 0.0]),
        ("fall", [0.0, -1.0, -1.0]),
        ("end_low", [0.0, 2.0, -3.0]),
    ],
)
def test_signals_and_their_marks_by_hand(signal, values):
    assert SIGNALS[signal](STEPS) == values
    for threshold in (-5.0, -4.5, -1.0, -0.5, 0.5, 1.5, 9.0):
        marked = FirstErrorRule(signal=signal, threshold=threshold).mark(STEPS)
        assert marked == next((step for step, value in enumerate(values) if value < threshold), None)
    assert LevelRule(1.5).mark(STEPS) == 1
    with pytest.raises(InputError, match="did you mean 'level'"):
        FirstErrorRule(signal="levl", threshold=0.0)


def test_threshold_is_the_highest_order_statistic_that_keeps_the_rate():
    """Against the distribution of the share under the k-th of n values, Beta(k, n + 1 - k), for every k."""
    for n in (10, 44, 45, 76, 77, 300, 1563):
        values = np.random.default_rng(n).permutation(n).astype(float)  # the k-th lowest is k - 1
        kept = [k for k in range(1, n + 1) if beta.cdf(RATE, k, n + 1 - k) >= CONFIDENCE]
        assert safe_threshold(values.tolist()) == (max(kept) - 1 if kept else None)
    assert safe_threshold([0.0] * 44) is None, "0.95^44 is over a tenth"
    assert safe_threshold([0.0] * 45) == 0.0


@pytest.mark.parametrize("values", ["normal", "exponential", "few"])
def test_new_right_traces_are_marked_in_at_most_the_rate(values):
    """1,500 times: fit on n exchangeable traces, then judge other ones. Nothing depends on the distribution."""
    rng = np.random.default_rng(1)
    for n in (45, 100, 250):
        fits = []
        for _ in range(1500):
            drawn = rng.integers(0, 30, n + 50) if values == "few" else getattr(rng, values)(size=n + 50)
            threshold = safe_threshold(drawn[:n].tolist())
            fits.append(np.mean(drawn[n:] < threshold))
        assert np.mean(fits) <= RATE
        if values == "normal":
            # the rule is not needlessly strict: k / (n + 1) for the k above, 1 / 46, 2 / 101 and 8 / 251
            assert np.mean(fits) == pytest.approx({45: 1 / 46, 100: 2 / 101, 250: 8 / 251}[n], rel=0.08)


def traces(rng, count, *, fall=0.0, at=1, source="", start=0, located=True):
    """Right and wrong traces of four steps of three tokens: the middle token of the wrong step is lower by `fall`."""
    found = []
    for number in range(count):
        for right in (True, False):
            steps = [rng.normal(size=3).tolist() for _ in range(4)]
            if not right:
                steps[at][1] -= fall
            first_error = at if located and not right else None
            given = {"steps": steps, "question": start + number, "right": right, "source": source}
            found.append(RatedTrace(**given, first_error=first_error))
    return found


@pytest.mark.parametrize("located", [True, False])
def test_fit_finds_the_signal_that_shows_the_error(located):
    """One token of the first step is 6 lower: so is its minimum, its mean only 2, and no step comes before it."""
    given = traces(np.random.default_rng(2), 200, fall=6.0, at=0, located=located)
    rule = fit_rule(given)
    lowest = [min(map(min, t.steps)) for t in given if t.right]
    assert (rule.signal, rule.threshold, rule.traces) == ("minimum", safe_threshold(lowest), 200)
    assert (rule.hit_rate is None, rule.marked_wrong is None) == (not located, located)
    fresh = traces(np.random.default_rng(3), 2000, fall=6.0, at=0)
    hits = np.mean([rule.mark(t.steps) == 0 for t in fresh if not t.right])
    assert rule.hit_rate == (pytest.approx(hits, abs=0.05) if located else None)
    assert hits > 0.9
    assert np.mean([rule.mark(t.steps) is not None for t in fresh if t.right]) <= RATE


def test_wrong_traces_decide_rather_than_inserted_errors():
    """Inserted errors show in the middle of a step, real ones at its end: from 20 known wrong traces on these count."""
    rng = np.random.default_rng(6)
    inserted = traces(rng, 100, fall=6.0)
    wrong = [replace(t, first_error=None) for t in traces(rng, 20) if not t.right]
    for trace in wrong:
        trace.steps[2][-1] -= 6.0
    for count, signals in ((19, {"minimum"}), (20, {"end_low", "minimum"})):
        rule = fit_rule([*inserted, *wrong[:count]])
        assert rule.signal in signals
        assert (rule.marked_wrong is None) == (count == 19)
    quiet = [replace(t, question=1000 + n) for n, t in enumerate(traces(rng, 40, located=False)) if not t.right]
    with pytest.raises(InputError, match=r"the best signal, the .* of 40 wrong traces$"):
        fit_rule([*inserted, *quiet])


def test_each_source_of_right_traces_is_spared():
    """The experts' rewards are 3 higher: a threshold for both together would mark 10 % of the others."""
    rng = np.random.default_rng(4)
    others = traces(rng, 100, fall=8.0, source="rollout")
    experts = [
        replace(trace, steps=[[reward + 3 for reward in step] for step in trace.steps], source="expert")
        for trace in traces(rng, 100, start=100)
        if trace.right
    ]
    rule = fit_rule([*experts, *others])
    lowest = [min(SIGNALS[rule.signal](trace.steps)) for trace in others if trace.right]
    assert rule.threshold == safe_threshold(lowest)


@pytest.mark.parametrize(
    ("count", "fall", "reason"),
    [
        (200, 0.0, "the best signal, the .* of 200 wrong traces, .* at the first wrong step"),
        (59, 6.0, "59 right traces, one for each question, and 60 are needed"),
    ],
)
def test_no_rule_without_enough_traces_or_a_signal(count, fall, reason):
    with pytest.raises(InputError, match=reason):
        fit_rule(traces(np.random.default_rng(5), count, fall=fall))
