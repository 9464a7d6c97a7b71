"""First-error metrics against brute force, enumerated chance and hand-computed values."""

import itertools
import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tracereward.evaluate.first_error import (
    Outcome,
    chance,
    f1,
    fit_threshold,
    hit,
    outcome,
    outcomes,
    random_outcome,
    step_values,
    summarise,
)

# Few distinct scores, so ties are common.
SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=6)


@st.composite
def labelled(draw):
    """Step scores of several traces, and their first errors."""
    scores = draw(st.lists(SCORES, min_size=1, max_size=12))
    errors = [draw(st.none() | st.integers(0, len(trace) - 1)) for trace in scores]
    return scores, errors


def f1_by_counting(scores, errors, threshold) -> float:
    right = {True: [], False: []}
    for trace, error in zip(scores, errors):
        predicted = None
        for step in range(len(trace) - 1, -1, -1):  # the first such step is assigned last
            if trace[step] < threshold:
                predicted = step
        right[error is not None].append(predicted == error)
    return statistics.harmonic_mean([statistics.fmean(right[True]), statistics.fmean(right[False])])


# ---------- thresholds ----------


@given(rows=labelled())
def test_fitted_threshold_is_optimal(rows):
    scores, errors = rows
    assume(0 < sum(error is not None for error in errors) < len(errors))
    seen = sorted({score for trace in scores for score in trace})
    threshold = fit_threshold(scores, errors)
    values = {t: f1_by_counting(scores, errors, t) for t in seen}
    assert threshold == min(t for t in seen if values[t] == pytest.approx(max(values.values())))
    between = [(a + b) / 2 for a, b in itertools.pairwise(seen)]
    others = [f1_by_counting(scores, errors, t) for t in [seen[0] - 1, *between, seen[-1] + 1]]
    assert max(others) <= values[threshold] + 1e-12


def test_threshold_by_hand():
    """At 0.4 and 0.5 both correct traces pass and two of three first errors are found: F1 = 2 (2/3) / (5/3) = 0.8.

    The third trace is always missed: one of its earlier steps is lower than the wrong one.
    """
    scores = [[0.9, 0.2, 0.8], [0.3, 0.9], [0.9, 0.1, 0.4], [0.6, 0.7], [0.5]]
    errors = [1, 0, 2, None, None]
    assert fit_threshold(scores, errors) == 0.4
    assert f1_by_counting(scores, errors, 0.4) == pytest.approx(0.8)
    assert fit_threshold([*scores, [0.45, 0.4]], [*errors, 1]) == 0.45, "only this threshold finds the fourth error"


@pytest.mark.parametrize("errors", [[None, None], [0, 0]])
def test_threshold_needs_both_classes(errors):
    with pytest.raises(ValueError, match="erroneous and correct"):
        fit_threshold([[1.0], [2.0]], errors)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_threshold_needs_finite_scores(bad):
    with pytest.raises(ValueError, match="finite"):
        fit_threshold([[1.0], [bad]], [0, None])


def test_infinite_scores_are_steps_that_no_threshold_marks():
    inf = math.inf
    assert fit_threshold([[inf, 1.0], [3.0, inf], [inf, 2.0]], [1, None, None]) == 2.0


@given(a=st.floats(0, 1), b=st.floats(0, 1))
def test_f1_is_the_harmonic_mean(a, b):
    assert float(f1(a, b)) == pytest.approx(statistics.harmonic_mean([a, b]), abs=1e-12)


# ---------- hits and chance ----------


@given(scores=SCORES, data=st.data(), within=st.integers(0, 2))
def test_hit_is_the_expectation_over_tie_breaks(scores, data, within):
    error = data.draw(st.integers(0, len(scores) - 1))
    # All orders of equal scores: the first step of an order is the lowest one.
    orders = [o for o in itertools.permutations(range(len(scores))) if [scores[i] for i in o] == sorted(scores)]
    expected = statistics.fmean(abs(order[0] - error) <= within for order in orders)
    assert hit(scores, error, within) == pytest.approx(expected)


@given(steps=st.integers(1, 9), data=st.data(), within=st.integers(0, 2))
def test_chance_is_the_mean_over_all_steps(steps, data, within):
    error = data.draw(st.integers(0, steps - 1))
    one_lowest = [[-1.0 if step == lowest else 0.0 for step in range(steps)] for lowest in range(steps)]
    assert chance(steps, error, within) == pytest.approx(
        statistics.fmean(hit(scores, error, within) for scores in one_lowest)
    )
    assert hit([0.7] * steps, error, within) == pytest.approx(chance(steps, error, within)), (
        "equal scores are at chance"
    )


@given(steps=st.integers(1, 8), data=st.data())
def test_random_guess_is_the_mean_over_all_guesses(steps, data):
    error = data.draw(st.none() | st.integers(0, steps - 1))
    guesses = [outcome([0.0] * steps, error, predicted) for predicted in [None, *range(steps)]]
    expected = random_outcome(steps, error)
    assert expected.found == pytest.approx(statistics.fmean(o.found for o in guesses))
    assert expected.is_error == (error is not None)
    assert (expected.hit, expected.hit_within_1) == (expected.chance, expected.chance_within_1)


def test_step_values_by_hand():
    values = [1.0, 9.0, 3.0, -2.0, 7.0]
    assert step_values(values, [[0, 2], [3], [3, 4]], "mean") == [2.0, -2.0, 2.5]
    assert step_values(values, [[0, 2], [3], [3, 4]], "min") == [1.0, -2.0, -2.0]


# ---------- summaries ----------


def test_summary_by_hand():
    """Three erroneous traces of 4, 2 and 5 steps and two correct ones; the threshold is 0."""
    scores = [[1.0, -2.0, 1.0, 1.0], [2.0, 1.0], [1.0, 1.0, -1.0, 1.0, 1.0], [1.0, 2.0], [-1.0]]
    errors = [1, 1, 3, None, None]
    result = summarise(outcomes(scores, errors, 0.0), questions=list("abcde"))
    assert result["acc_error"] == pytest.approx(
        1 / 3
    )  # no step of the second trace is low, and a wrong one of the third
    assert result["acc_correct"] == 0.5
    assert result["f1"] == pytest.approx(0.4)
    assert result["hit_at_1"] == pytest.approx(2 / 3)
    assert result["hit_within_1"] == 1.0
    mean_chance = (1 / 4 + 1 / 2 + 1 / 5) / 3
    assert result["hit_at_1_normalised"] == pytest.approx((2 / 3 - mean_chance) / (1 - mean_chance))
    mean_chance = (3 / 4 + 2 / 2 + 3 / 5) / 3
    assert result["hit_within_1_normalised"] == pytest.approx((1 - mean_chance) / (1 - mean_chance))
    # Wilson's interval of 1 of 3, from its closed form.
    z, p, n = statistics.NormalDist().inv_cdf(0.975), 1 / 3, 3
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]
    assert result["acc_error_interval"] == pytest.approx(expected)


@given(rows=labelled(), threshold=st.integers(-3, 4))
def test_summaries_are_valid_json_with_ordered_intervals(rows, threshold):
    scores, errors = rows
    result = summarise(outcomes(scores, errors, threshold), questions=range(len(scores)))
    json.dumps(result, allow_nan=False)
    missing = {name for name, value in result.items() if value is None and not name.endswith("_interval")}
    kinds = {error is not None for error in errors}
    assert ("acc_error" in missing) == (True not in kinds)
    assert ("acc_correct" in missing) == (False not in kinds)
    assert ("f1" in missing) == (len(kinds) < 2)
    assert ("hit_at_1" in missing) == (True not in kinds)
    for name in ("f1", "acc_error", "acc_correct", "hit_at_1", "hit_within_1"):
        if result[name] is not None:
            low, high = result[f"{name}_interval"]
            assert 0 <= low <= high <= 1
    if "f1" not in missing:
        assert result["f1"] == pytest.approx(f1_by_counting(scores, errors, threshold))


def test_constant_scores_are_exactly_at_chance():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 12, 200).tolist()
    errors = [int(rng.integers(0, max(1, n // 3))) for n in lengths]  # errors come early
    result = summarise(outcomes([[0.5] * n for n in lengths], errors, 0.0), questions=range(200))
    for name in ("hit_at_1_normalised", "hit_within_1_normalised"):
        assert result[name] == pytest.approx(0, abs=1e-12)
        assert result[f"{name}_interval"] == pytest.approx([0, 0], abs=1e-12)
    first = summarise(outcomes([[-1.0] + [0.0] * (n - 1) for n in lengths], errors, 0.0), questions=range(200))
    assert first["hit_at_1"] == pytest.approx(errors.count(0) / 200), (
        "errors come early, so the first step is a strong baseline"
    )


def test_intervals_resample_questions():
    """Two questions, one always hit and one never: half of the resamples have both, a quarter each only one."""
    hits = [Outcome(True, 1.0, hit=1.0, chance=0.5), Outcome(True, 0.0, hit=0.0, chance=0.5)]
    result = summarise(hits * 50, questions=["a", "b"] * 50)
    assert result["hit_at_1"] == 0.5
    assert result["hit_at_1_interval"] == [0.0, 1.0]
    assert result["hit_at_1_normalised_interval"] == [-1.0, 1.0]
    apart = summarise(hits * 50, questions=range(100))["hit_at_1_interval"]
    half = 1.96 * math.sqrt(0.25 / 100)  # normal approximation, if each trace has its own question
    assert apart == pytest.approx([0.5 - half, 0.5 + half], abs=0.02)
    assert summarise(hits * 50, questions=range(100))["hit_at_1_interval"] == apart, (
        "the same seed gives the same resamples"
    )
