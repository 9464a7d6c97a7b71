"""Statistics against brute force, scipy and formulas computed by hand."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from tracereward.metrics import (
    auprc,
    auroc,
    bootstrap_interval,
    length_matched_auroc,
    point_biserial,
    spearman,
    wilson_interval,
    within_prompt_auroc,
)

SCORED = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=25)


def auroc_by_pairs(scores, correct) -> float:
    wins = [
        1.0 if right > wrong else 0.5 if right == wrong else 0.0
        for right, is_right in zip(scores, correct)
        if is_right
        for wrong, is_also_right in zip(scores, correct)
        if not is_also_right
    ]
    return sum(wins) / len(wins) if wins else math.nan


@given(rows=SCORED)
def test_auroc_counts_pairs_and_half_ties(rows):
    scores, correct = zip(*rows)
    assert auroc(scores, correct) == pytest.approx(auroc_by_pairs(scores, correct), nan_ok=True)


def test_auroc_polarity_and_missing_class():
    assert auroc([1, 2, 3], [False, False, True]) == 1.0
    assert auroc([1, 2, 3], [True, False, False]) == 0.0
    assert auroc([1, 1, 1], [True, False, True]) == 0.5
    assert math.isnan(auroc([1, 2], [True, True]))


@given(rows=st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30))
def test_within_prompt_auroc_averages_prompts_with_both_classes(rows):
    scores, correct, prompts = zip(*rows)
    values = []
    for prompt in set(prompts):
        own = [(s, c) for s, c, p in rows if p == prompt]
        value = auroc_by_pairs(*zip(*own))
        if not math.isnan(value):
            values.append(value)
    expected = sum(values) / len(values) if values else math.nan
    assert within_prompt_auroc(scores, correct, prompts) == pytest.approx(expected, nan_ok=True)


def test_pooled_auroc_reflects_difficulty_but_within_prompt_does_not():
    """Prompt a is easy and scores high, b is hard and scores low; inside each the order is wrong."""
    scores = [9, 8, 10, 1, 2, 2]
    correct = [True, True, False, True, False, False]
    prompts = ["a", "a", "a", "b", "b", "b"]
    assert within_prompt_auroc(scores, correct, prompts) == 0.0
    assert auroc(scores, correct) == pytest.approx(auroc_by_pairs(scores, correct))
    assert auroc(scores, correct) > 0.4


@given(rows=st.lists(st.tuples(st.integers(-30, 30), st.booleans()), min_size=3, max_size=25))
def test_point_biserial_matches_scipy(rows):
    scores, correct = zip(*rows)
    assume(len(set(scores)) > 1)
    assume(len(set(correct)) > 1)
    assert point_biserial(scores, correct) == pytest.approx(stats.pointbiserialr(correct, scores).statistic, abs=1e-9)


def test_spearman_by_hand():
    """1 - 6 sum d^2 / (n (n^2 - 1)); ranks 1 2 3 4 5 and 1 2 4 3 5 differ by 1 twice."""
    assert spearman([1, 2, 3, 4, 9], [0.1, 5, 70, 6, 800]) == pytest.approx(0.9)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(spearman([1], [2]))


def test_point_biserial_of_constants_is_nan():
    assert math.isnan(point_biserial([1, 1], [True, False]))
    assert math.isnan(point_biserial([1, 2], [True, True]))
    assert math.isnan(point_biserial([1], [True]))


@given(total=st.integers(1, 500), data=st.data())
def test_wilson_interval_matches_formula(total, data):
    successes = data.draw(st.integers(0, total))
    z, p = 1.959963984540054, successes / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    low, high = wilson_interval(successes, total)
    assert low == pytest.approx(max(0, centre - half), abs=1e-9)
    assert high == pytest.approx(min(1, centre + half), abs=1e-9)


def test_bootstrap_is_repeatable_and_near_the_normal_interval():
    values = [1.0] * 120 + [0.0] * 180
    interval = bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) == interval
    assert bootstrap_interval(values, seed=4) != interval
    mean, error = np.mean(values), np.std(values) / math.sqrt(len(values))
    assert interval[0] == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert interval[1] == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_undefined_statistics_are_nan_without_a_warning():
    """Undefined statistics are common in small batches: the libraries' warnings would appear at every step."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one_kind in ([True, True], [False, False]):
            assert math.isnan(auroc([1, 2], one_kind))
            assert math.isnan(within_prompt_auroc([1, 2], one_kind, ["a", "a"]))
            assert math.isnan(point_biserial([1, 2], one_kind))
        assert math.isnan(within_prompt_auroc([1, 2], [True, False], ["a", "b"]))
        assert math.isnan(point_biserial([1, 1], [True, False]))
        assert math.isnan(point_biserial([1], [True]))
        assert math.isnan(auroc([], []))
        assert math.isnan(within_prompt_auroc([], [], []))
        assert math.isnan(point_biserial([], []))


def test_statistics_of_two_traces_are_defined():
    """Two scores, 1 apart, do not count as constant."""
    assert auroc([2, 1], [True, False]) == 1.0
    assert point_biserial([1, 2], [False, True]) == pytest.approx(1.0)
    assert point_biserial([1, 2], [True, False]) == pytest.approx(-1.0)


def test_missing_prompt_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        within_prompt_auroc([1, 2], [True, False], ["a"])


def test_wilson_interval_by_hand():
    """0 and 4 of 4: one end is exact, the other is z^2 / (n + z^2) away. 2 of 4: (n/2 +- ...) is symmetric."""
    squared = 1.959963984540054**2
    assert wilson_interval(0, 4) == pytest.approx((0.0, squared / (4 + squared)), abs=1e-12)
    assert wilson_interval(4, 4) == pytest.approx((4 / (4 + squared), 1.0), abs=1e-12)
    half = 0.5 * math.sqrt(squared / (4 + squared))
    assert wilson_interval(2, 4) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)


def test_bootstrap_interval_is_percentiles_of_2000_resampled_means():
    """Seed 0 by default; 2.5 % of the means lie below the interval and 2.5 % above."""
    values = np.random.default_rng(5).normal(size=40)
    for options, seed, resamples in (({}, 0, 2000), ({"seed": 7}, 7, 2000), ({"seed": 7, "resamples": 300}, 7, 300)):
        rows = np.random.default_rng(seed).integers(0, 40, (resamples, 40))
        expected = np.percentile(values[rows].mean(1), [2.5, 97.5])
        assert bootstrap_interval(list(values), **options) == pytest.approx(tuple(expected), abs=1e-12)


def test_bootstrap_of_equal_values_is_a_point():
    assert bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert bootstrap_interval([1.0]) == (1.0, 1.0)


@given(rows=SCORED)
def test_auprc_is_mean_precision_at_correct_traces(rows):
    """Sum over thresholds of (recall gained) x (precision there); equal scores share a threshold."""
    scores, correct = zip(*rows)
    if not any(correct):
        assert math.isnan(auprc(scores, correct))
        return
    expected = 0.0
    for threshold in set(scores):
        gained = sum(c for s, c in rows if s == threshold)
        taken = [c for s, c in rows if s >= threshold]
        expected += gained / sum(correct) * sum(taken) / len(taken)
    assert auprc(scores, correct) == pytest.approx(expected)


def test_auprc_by_hand():
    """Correct at ranks 1 and 3 of 4: (1/1 + 2/3) / 2. With equal scores it is the share of correct traces."""
    assert auprc([4, 3, 2, 1], [True, False, True, False]) == pytest.approx((1 + 2 / 3) / 2)
    assert auprc([1, 1, 1, 1], [True, False, False, False]) == pytest.approx(0.25)


def test_score_of_length_alone_has_length_matched_auroc_of_chance():
    """Correct traces are short, so length separates the classes; within bins of one length it does not."""
    lengths = [10] * 8 + [20] * 8
    correct = [True] * 6 + [False] * 2 + [True] * 2 + [False] * 6
    shortest = [-length for length in lengths]
    assert auroc(shortest, correct) == pytest.approx((6 * 6 + 0.5 * (6 * 2 + 2 * 6)) / 64)
    assert length_matched_auroc(shortest, correct, lengths, bins=2) == pytest.approx(0.5)
    assert length_matched_auroc([float(c) for c in correct], correct, lengths, bins=2) == 1.0


def test_length_bins_are_weighted_by_their_pairs():
    """Two bins with 3 and 4 pairs."""
    scores = [2, 1, 0, 0, 1, 2, 3, 4]
    correct = [True, False, True, True, True, True, False, False]
    lengths = [1, 1, 1, 1, 9, 9, 9, 9]
    # Length 1: correct 2, 0, 0 against wrong 1: 1 of 3 pairs in order. Length 9: none of 4.
    assert length_matched_auroc(scores, correct, lengths, bins=2) == pytest.approx(1 / 7)
    assert math.isnan(length_matched_auroc([1, 2], [True, False], [1, 9], bins=2))


@given(
    rows=st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(1, 12)), min_size=2, max_size=40),
    bins=st.integers(1, 6),
)
def test_length_matched_auroc_counts_pairs_within_bins(rows, bins):
    """A trace's bin is the number of quantiles of the lengths that it reaches."""
    lengths = [length for *_, length in rows]
    edges = [np.quantile(lengths, k / bins) for k in range(1, bins)]
    wins = pairs = 0.0
    for s, c, length in rows:
        for t, d, other in rows:
            same_bin = sum(length >= edge for edge in edges) == sum(other >= edge for edge in edges)
            if c and not d and same_bin:
                pairs += 1
                wins += (s > t) + 0.5 * (s == t)
    expected = wins / pairs if pairs else math.nan
    scores, correct, _ = zip(*rows)
    assert length_matched_auroc(scores, correct, lengths, bins) == pytest.approx(expected, nan_ok=True)
