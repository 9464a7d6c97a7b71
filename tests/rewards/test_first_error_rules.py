"""The rule for the first error: marks and thresholds by hand, by brute force and on exchangeable data."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta

from tracereward.errors import InputError
from tracereward.rewards.first_error_rules import (
    CONFIDENCE,
    RATE,
    FirstErrorRule,
    LevelRule,
    RatedTrace,
    differences,
    first_below,
    fit_rule,
    lowest_steps,
    lowest_window,
    new_lows,
    safe_threshold,
    suspicions,
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


def test_lowest_window_equals_a_convolution():
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 8, 9, 50):
        values = rng.normal(size=count)
        width = min(8, count)
        means = np.convolve(values, np.ones(width) / width, mode="valid")
        assert lowest_window(values.tolist()) == pytest.approx(means.min())


def test_marks_by_hand():
    """Ends 3, 5, 0 and .5, less the lowest before: 0, 2, -3, .5. Eight tokens have the sum 11 or 10.5."""
    steps = [[1.0, 3.0], [2.0, -4.0, 5.0], [0.0], [2.0, 2.0, 0.5]]
    assert suspicions(steps) == [math.inf, math.inf, pytest.approx(10.5 / 8), math.inf]
    assert FirstErrorRule(threshold=1.32).mark(steps) == 2
    assert FirstErrorRule(threshold=1.31).mark(steps) is None
    assert LevelRule(1.45).mark(steps) == 1, "means 2, 1, 0 and 1.5"
    assert suspicions([[1.0, 2.0], [2.0], [3.0]]) == [2.0, math.inf, math.inf], "no new low: the first step"
    assert suspicions([[-1.0]]) == [-1.0]


def test_noise_of_a_token_is_no_error_and_later_steps_are_not_marked():
    """One token of a right trace is low; behind an error all tokens are, and the step where it starts is marked."""
    right = [[1.0] * 6 for _ in range(5)]
    right[2][5] = -5.0
    wrong = [[1.0] * 6, [1.0] * 5 + [-2.0], *([[-1.5] * 6] * 3)]
    rule = FirstErrorRule(threshold=0.0)
    assert (rule.mark(right), rule.mark(wrong)) == (None, 1)


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
    """Right and wrong traces of four steps of three tokens; rewards are `fall` lower from the end of the wrong step on.

    That end is lower by twice as much.
    """
    found = []
    for number in range(count):
        for right in (True, False):
            values = rng.normal(size=12)
            if not right:
                end = 3 * at + 2
                values[end:] -= fall
                values[end] -= fall
            given = {"steps": values.reshape(4, 3).tolist(), "question": start + number, "right": right}
            first_error = at if located and not right else None
            found.append(RatedTrace(**given, source=source, first_error=first_error))
    return found


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("located", [True, False])
def test_fit_finds_errors_and_spares_right_traces(located, at):
    given = traces(np.random.default_rng(2), 200, fall=3.0, at=at, located=located)
    rule = fit_rule(given)
    lowest = [np.convolve(np.ravel(t.steps), np.ones(8) / 8, mode="valid").min() for t in given if t.right]
    assert (rule.threshold, rule.traces) == (pytest.approx(safe_threshold(lowest)), 200)
    assert (rule.hit_rate is None, rule.marked_wrong is None) == (not located, located)
    fresh = traces(np.random.default_rng(3), 2000, fall=3.0, at=at)
    hits = np.mean([rule.mark(t.steps) == at for t in fresh if not t.right])
    assert rule.hit_rate == (pytest.approx(hits, abs=0.05) if located else None)
    assert hits > 0.9
    assert np.mean([rule.mark(t.steps) is not None for t in fresh if t.right]) <= RATE


def test_wrong_traces_decide_rather_than_inserted_errors():
    """Real errors do not show here: from 20 known wrong traces on there is no rule."""
    rng = np.random.default_rng(6)
    inserted = traces(rng, 100, fall=3.0)
    wrong = [replace(t, question=1000 + n) for n, t in enumerate(traces(rng, 40, located=False)) if not t.right]
    rule = fit_rule([*inserted, *wrong[:19]])
    assert (rule.marked_wrong, rule.hit_rate) == (None, pytest.approx(1.0, abs=0.1))
    with pytest.raises(InputError, match=r"^it would mark \d of 20 wrong traces$"):
        fit_rule([*inserted, *wrong[:20]])


def test_each_source_of_right_traces_is_spared():
    """The experts' rewards are 3 higher: a threshold for both together would mark 10 % of the others."""
    rng = np.random.default_rng(4)
    others = traces(rng, 100, fall=4.0, source="rollout")
    experts = [
        replace(trace, steps=[[reward + 3 for reward in step] for step in trace.steps], source="expert")
        for trace in traces(rng, 100, start=100)
        if trace.right
    ]
    rule = fit_rule([*experts, *others])
    assert rule.threshold == safe_threshold([min(suspicions(trace.steps)) for trace in others if trace.right])


@pytest.mark.parametrize(
    ("count", "fall", "reason"),
    [
        (200, 0.0, "it would mark .* of 200 wrong traces, .* at the first wrong step"),
        (59, 3.0, "59 right traces, one for each question, and 60 are needed"),
    ],
)
def test_no_rule_without_enough_traces_or_errors_that_show(count, fall, reason):
    with pytest.raises(InputError, match=reason):
        fit_rule(traces(np.random.default_rng(5), count, fall=fall))
