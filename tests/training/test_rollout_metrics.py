"""Batch metrics, by hand and by brute force."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tracereward.metrics import centred, pearson, perturbation_auroc
from tracereward.training.rollout_metrics import (
    RewardedRollout,
    distinct_share,
    repetition,
    rollout_metrics,
    token_noise,
)

NAN = math.nan


def rollout(prompt="a", ids=(1, 2), finished=True, rewards=(0.0, 0.0), reward=0.0, correct=NAN) -> RewardedRollout:
    return RewardedRollout(prompt=prompt, ids=ids, finished=finished, rewards=rewards, reward=reward, correct=correct)


BATCH = [
    rollout("a", (1, 2, 3), True, [1.0, 2.0, 3.0], 2.0, 1.0),
    rollout("a", [1, 2, 3], True, [0.0, 0.0, 3.0], 1.0, 0.0),
    rollout("b", (1, 2, 3, 4), False, [0.0, 4.0, 0.0, 4.0], 0.5, 1.0),
    rollout("b", (7, 7, 7, 7, 7, 7), False, [9.0, 9.0, 9.0, 9.0, 9.0, 0.0], -1.0, 0.0),
    rollout("c", (5,), True, [8.0], 5.0, NAN),
]


def test_metrics_by_hand():
    metrics = rollout_metrics(BATCH)
    assert metrics == pytest.approx(
        {
            "length": 17 / 5,
            "repetition": (2 / 3) / 5,  # one trace has three equal 4-grams
            "distinct_share": (1 / 2 + 2 / 2) / 2,  # "c" has one trace and is excluded
            "eos_rate": 3 / 5,
            "reward_std": math.sqrt(31.25 / 5 - 1.5**2),
            "token_noise": (2 / 3 + 4) / 2,  # the two correct traces
            "length_reward_r": stats.pearsonr([3, 3, 4, 6, 1], [2, 1, 0.5, -1, 5]).statistic,
            "length_reward_r_within": stats.pearsonr([0, 0, -1, 1, 0], [0.5, -0.5, 0.75, -0.75, 0]).statistic,
            "auroc": 3 / 4,
            "within_prompt_auroc": 1.0,
            "point_biserial_r": stats.pearsonr([2, 1, 0.5, -1], [1, 0, 1, 0]).statistic,
            "reward_correct": 1.25,
            "reward_wrong": 0.0,
        },
        abs=1e-12,
    )


def test_without_answers_correctness_is_omitted_and_noise_covers_all_traces():
    metrics = rollout_metrics([rollout(rewards=[0.0, 2.0]), rollout(rewards=[0.0, 4.0])])
    assert set(metrics) == {
        "length",
        "repetition",
        "distinct_share",
        "eos_rate",
        "reward_std",
        "token_noise",
        "length_reward_r",
        "length_reward_r_within",
    }
    assert metrics["token_noise"] == pytest.approx((1 + 4) / 2)


def test_undefined_metrics_are_nan():
    metrics = rollout_metrics([rollout(correct=0.0, ids=(1,), rewards=[3.0])])
    undefined = {name for name, value in metrics.items() if math.isnan(value)}
    assert undefined == {
        "distinct_share",
        "token_noise",
        "length_reward_r",
        "length_reward_r_within",
        "auroc",
        "within_prompt_auroc",
        "point_biserial_r",
        "reward_correct",
    }
    assert all(math.isnan(value) for value in rollout_metrics([]).values())


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], 0.0),
        ([1, 1, 1], 0.0),
        ([1, 1, 1, 1], 0.0),
        ([1, 1, 1, 1, 1], 1 / 2),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        ([1, 2, 3, 1, 2, 3, 1, 2, 4], 2 / 6),  # 1231 2312 3123 1231 2312 3124
    ],
)
def test_repetition_counts_repeated_4_grams(ids, expected):
    assert repetition(ids) == pytest.approx(expected)


@given(ids=st.lists(st.integers(0, 2), max_size=20), n=st.integers(1, 5))
def test_repetition_is_the_share_of_grams_seen_before(ids, n):
    seen, repeats, total = [], 0, 0
    for start in range(max(0, len(ids) - n + 1)):
        gram = [ids[start + offset] for offset in range(n)]
        repeats += gram in seen
        total += 1
        seen.append(gram)
    assert repetition(ids, n) == pytest.approx(repeats / total if total else 0)


def test_distinct_share_is_a_mean_over_groups():
    prompts = ["a", "b", "a", "a", "a", "b", "c"]
    assert distinct_share(prompts, [1, 1, 1, 1, 1, 2, 1]) == pytest.approx((1 / 4 + 1) / 2)
    assert math.isnan(distinct_share(["a", "b"], [1, 1]))
    with pytest.raises(ValueError, match="shorter"):
        distinct_share(["a", "b"], [1])


def test_token_noise_is_the_population_variance_and_skips_empty_traces():
    assert token_noise([[1.0, 3.0], [], [2.0]]) == 0.5
    assert math.isnan(token_noise([[]]))
    assert token_noise([np.array([0.0, 3.0, 0.0])]) == pytest.approx(2.0)


def test_centring_subtracts_the_prompt_mean_exactly():
    assert centred([1.0, 2.0, 5.0, 4.0], ["a", "b", "a", "b"]) == [-2.0, -1.0, 2.0, 1.0]
    assert centred([0.1] * 6, ["a"] * 6) == [0.0] * 6
    with pytest.raises(ValueError, match="shorter"):
        centred([1.0, 2.0], ["a"])


def test_length_and_reward_correlate_across_but_not_within_prompts():
    batch = [
        rollout(prompt, [0] * (base + length), reward=base + reward)
        for prompt, base in [("a", 10), ("b", 100)]
        for length, reward in [(0, 1), (1, -1), (2, -1), (3, 1)]
    ]
    metrics = rollout_metrics(batch)
    assert metrics["length_reward_r"] > 0.99
    assert metrics["length_reward_r_within"] == pytest.approx(0, abs=1e-12)


def test_pearson_of_a_constant_is_nan():
    assert pearson([1, 2, 4], [-2, -4, -8]) == pytest.approx(-1)
    assert pearson([0, 1, 1], [0, 1, 0]) == pytest.approx(0.5)
    assert math.isnan(pearson([1, 1], [1, 2]))
    assert math.isnan(pearson([1, 2], [1, 1]))
    assert math.isnan(pearson([1], [2]))
    assert math.isnan(pearson([], []))


def test_pearson_of_two_values():
    assert pearson([1, 2], [3, 5]) == pytest.approx(1)
    assert pearson([1, 2], [5, 3]) == pytest.approx(-1)


@given(pairs=st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=12))
def test_perturbation_auroc_counts_ties_as_half(pairs):
    experts, perturbed = zip(*pairs)
    signs = np.sign(np.array(experts) - np.array(perturbed))
    assert perturbation_auroc(experts, perturbed) == pytest.approx((signs.mean() + 1) / 2)


def test_perturbation_auroc_needs_pairs():
    assert perturbation_auroc([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 3.0, 4.0]) == 0.625
    assert math.isnan(perturbation_auroc([], []))
    with pytest.raises(ValueError, match="shorter"):
        perturbation_auroc([1.0, 2.0], [1.0])
