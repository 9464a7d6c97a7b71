"""Calibrations against scipy's optimiser and the min-max formula, calibration errors by hand, and storage."""

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from tracereward.errors import InputError
from tracereward.rewards.calibration import (
    METHODS,
    MIN_TRACES,
    Calibration,
    brier_score,
    expected_calibration_error,
    fit_calibration,
    log_loss,
    reliability,
)
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings, read_settings, write_fitted


def sampled(n, slope, intercept, mean=0.0, std=1.0, seed=0):
    """Rewards, and labels that are true with probability sigmoid(slope z + intercept), z the standardised reward."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n)
    return mean + std * z, rng.random(n) < expit(slope * z + intercept)


LABELLED = st.lists(st.tuples(st.integers(-8, 8), st.booleans()), min_size=MIN_TRACES, max_size=60)


def split(rows):
    rewards, correct = zip(*rows)
    assume(len(set(correct)) == 2)
    return [float(r) for r in rewards], list(correct)


# ---------- fits ----------


@pytest.mark.parametrize(("slope", "intercept"), [(1.5, -0.7), (0.4, 1.0), (-1.0, 0.2)])
def test_platt_recovers_the_sigmoid_of_the_labels(slope, intercept):
    """Standard errors of 20,000 samples are below 0.03."""
    found = fit_calibration(*sampled(20_000, slope, intercept))
    assert found.slope == pytest.approx(slope, abs=0.1)
    assert found.intercept == pytest.approx(intercept, abs=0.1)
    assert found.traces == 20_000


def test_temperature_recovers_the_slope_of_a_sigmoid_through_zero():
    found = fit_calibration(*sampled(20_000, 0.35, 0.0), "temperature")
    assert found.slope == pytest.approx(0.35, abs=0.05)
    assert found.intercept == 0.0


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (-3, 0.1), (4.9, 1e-4), (100, 0.01), (0, 1e6)])
def test_platt_is_the_optimum_for_any_location_and_scale(mean, std):
    """Another optimiser on the standardised rewards, whose mean may be far from zero and deviation small."""
    rewards, correct = sampled(400, 2.0, -0.5, mean, std)
    found = fit_calibration(rewards, correct)
    z, right = (rewards - mean) / std, correct.sum()
    target = np.where(correct, (right + 1) / (right + 2), 1 / (len(z) - right + 2))

    def loss(weights):
        logits = weights[0] * z + weights[1]
        return float(np.mean(np.logaddexp(0, logits) - target * logits))

    slope, intercept = minimize(loss, [0.0, 0.0], tol=1e-12).x
    assert found.slope * std == pytest.approx(slope, abs=1e-3)
    assert found.intercept + found.slope * mean == pytest.approx(intercept, abs=1e-3)


@given(gap=st.floats(0.01, 100), right=st.integers(1, 20), wrong=st.integers(9, 20))
def test_platt_is_finite_on_separable_traces(gap, right, wrong):
    """Without smoothing it diverges. With two distinct rewards each probability is exactly its smoothed target."""
    found = fit_calibration([gap] * right + [-gap] * wrong, [True] * right + [False] * wrong)
    assert math.isfinite(found.slope)
    assert found.probability(gap) == pytest.approx((right + 1) / (right + 2), abs=1e-4)
    assert found.probability(-gap) == pytest.approx(1 / (wrong + 2), abs=1e-4)


@given(rows=LABELLED)
def test_fitted_temperature_minimises_the_loss(rows):
    rewards, correct = split(rows)
    best = log_loss(fit_calibration(rewards, correct, "temperature").probabilities(rewards), correct)
    for log_slope in np.linspace(-8, 8, 161):
        assert best <= log_loss(expit(math.exp(log_slope) * np.array(rewards)), correct) + 1e-6


def pooled(rewards, correct) -> dict[float, float]:
    """Isotonic regression by the min-max formula: max over a <= x of min over b >= x of the mean of [a, b]."""
    values = sorted(set(rewards))
    mean = {
        (a, b): np.mean([c for r, c in zip(rewards, correct) if a <= r <= b])
        for i, a in enumerate(values)
        for b in values[i:]
    }
    return {x: max(min(mean[a, b] for b in values if b >= x) for a in values if a <= x) for x in values}


@given(rows=LABELLED)
def test_isotonic_is_monotone_and_the_min_max_formula(rows):
    rewards, correct = split(rows)
    found = fit_calibration(rewards, correct, "isotonic")
    for value, probability in pooled(rewards, correct).items():
        assert found.probability(value) == pytest.approx(probability, abs=1e-6)
    fine = found.probabilities(np.linspace(-12, 12, 401))
    assert (np.diff(fine) >= 0).all()
    assert fine.min() >= 0
    assert fine.max() <= 1
    assert found.probability(-1e9) == found.probability(min(rewards))  # constant outside the observed range
    assert found.probability(1e9) == found.probability(max(rewards))


def test_equal_rewards_give_the_share_of_correct_traces():
    """The rewards are uninformative: Platt's probability is the mean of the smoothed targets."""
    correct = [True] * 9 + [False] * 3
    assert fit_calibration([0.5] * 12, correct, "isotonic").probability(3.0) == pytest.approx(9 / 12)
    target = (9 * 10 / 11 + 3 * 1 / 5) / 12
    assert fit_calibration([0.5] * 12, correct).probability(0.5) == pytest.approx(target, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_traces_raise(method):
    with pytest.raises(InputError, match="0 right and 12 wrong traces"):
        fit_calibration(range(12), [False] * 12, method)
    with pytest.raises(InputError, match="12 right and 0 wrong traces"):
        fit_calibration(range(12), [True] * 12, method)
    with pytest.raises(InputError, match="1 right and 8 wrong traces: it needs 10 or more"):
        fit_calibration(range(9), [True] + [False] * 8, method)


def test_unknown_methods_and_misplaced_knots_raise():
    with pytest.raises(InputError, match="did you mean 'platt'"):
        fit_calibration(range(12), [True, False] * 6, "plat")
    with pytest.raises(InputError, match="isotonic needs knots"):
        Calibration("isotonic")
    with pytest.raises(InputError, match="platt has no knots"):
        Calibration("platt", knots=((0.0, 0.5),))


# ---------- errors ----------


def test_errors_by_hand():
    """Bins [0, .1), [.7, .8) and [.9, 1]: |0 - .05| of 1, |1/2 - .75| of 2, |1/1 - 1.0| of 1."""
    p, correct = [0.05, 0.72, 0.78, 1.0], [False, True, False, True]
    assert expected_calibration_error(p, correct) == pytest.approx((0.05 + 2 * 0.25 + 0.0) / 4)
    assert brier_score(p, correct) == pytest.approx((0.05**2 + 0.28**2 + 0.78**2) / 4)
    expected = -(math.log(0.95) + math.log(0.72) + math.log(0.22) + math.log(1 - 1e-12)) / 4
    assert log_loss(p, correct) == pytest.approx(expected)
    found = [(b.probability, b.accuracy, b.count) for b in reliability(p, correct)]
    assert found == [(0.05, 0.0, 1), (pytest.approx(0.75), 0.5, 2), (1.0, 1.0, 1)]
    assert expected_calibration_error(p, correct, bins=1) == pytest.approx(abs(0.5 - sum(p) / 4))


def test_log_loss_of_certain_and_wrong_is_finite():
    assert log_loss([0.0, 1.0], [True, False]) == pytest.approx(-math.log(1e-12), rel=1e-4)


@given(
    rows=st.lists(st.tuples(st.integers(0, 100), st.booleans()), min_size=1, max_size=40),
    bins=st.integers(1, 12),
)
def test_calibration_error_by_brute_force(rows, bins):
    p, correct = [n / 101 for n, _ in rows], [c for _, c in rows]
    total = 0.0
    for b in range(bins):
        inside = [k for k, value in enumerate(p) if b / bins <= value < (b + 1) / bins]
        if inside:
            mean, accuracy = sum(p[k] for k in inside) / len(inside), sum(correct[k] for k in inside) / len(inside)
            total += len(inside) / len(p) * abs(mean - accuracy)
    assert expected_calibration_error(p, correct, bins) == pytest.approx(total)


def test_perfect_calibration_has_zero_error_and_brier_score_of_the_variance():
    p = np.repeat([0.25, 0.75], 400)
    correct = [k % 4 == 0 for k in range(400)] + [k % 4 != 0 for k in range(400)]
    assert expected_calibration_error(p, correct) == pytest.approx(0.0)
    assert brier_score(p, correct) == pytest.approx(0.25 * 0.75)


# ---------- storage ----------


@pytest.fixture
def folder(tiny_model_folder, tokenizer, tmp_path):
    settings = RewardSettings(head="token", aggregate="min", task="arithmetic")
    TokenRewardModel.from_backbone(str(tiny_model_folder), settings, tokenizer).save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


@pytest.mark.parametrize("method", METHODS)
def test_calibration_round_trips_through_the_folder(folder, method):
    """Other fields are kept, even unknown ones; saving and loading the model keeps the calibration."""
    path = folder / "tracereward.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "something_new": 1}))
    before = json.loads(path.read_text())
    assert before["calibration"] is None
    found = fit_calibration(*sampled(300, 1.0, 0.5), method)
    write_fitted(folder, calibration=found)
    assert read_settings(folder).calibration == found
    after = json.loads(path.read_text())
    assert {**after, "calibration": None} == before
    model = TokenRewardModel.from_pretrained(str(folder))
    model.save_pretrained(folder.parent / "again")
    assert read_settings(folder.parent / "again") == model.settings
    rewards = np.linspace(-4, 4, 17)
    again = read_settings(folder.parent / "again").calibration
    assert again.probabilities(rewards).tolist() == found.probabilities(rewards).tolist()


def test_settings_without_a_calibration_field_are_read(folder):
    path = folder / "tracereward.json"
    stored = json.loads(path.read_text())
    del stored["calibration"]
    path.write_text(json.dumps(stored))
    settings = TokenRewardModel.from_pretrained(str(folder)).settings
    assert settings.calibration is None
    assert (settings.head, settings.aggregate, settings.task) == ("token", "min", "arithmetic")


@pytest.mark.parametrize(
    "calibration", [5, {"method": "platt", "slop": 1}, {"method": "isotonic", "knots": [[1.0]]}, {"slope": 1.0}]
)
def test_damaged_calibration_is_named(folder, calibration):
    path = folder / "tracereward.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "calibration": calibration}))
    with pytest.raises(InputError, match=r"tracereward\.json is damaged"):
        read_settings(folder)
