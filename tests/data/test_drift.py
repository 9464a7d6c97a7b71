"""Drift: p-values against brute force and scipy, the level over many splits of one sample, and planted shifts."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from tracereward.data.drift import ALPHA, PROBE, Period, permutation_p, probe_scores, question_means, shifts
from tracereward.metrics import holm


def by_hand(before: dict, now: dict) -> float:
    """p over all swaps of shared questions and all assignments of the others, one after the other."""
    shared = [q for q in now if q in before]
    single = [q for q in (*before, *now) if q not in shared]
    new = [q for q in now if q not in shared]
    found = []
    for swaps in itertools.product((False, True), repeat=len(shared)):
        for chosen in itertools.combinations(single, len(new)):
            old_side, new_side = [], []
            for question, swap in zip(shared, swaps):
                pair = (before[question], now[question])
                old_side.append(pair[swap])
                new_side.append(pair[not swap])
            for question in single:
                (new_side if question in chosen else old_side).append({**before, **now}[question])
            found.append((not any(swaps) and set(chosen) == set(new), np.mean(new_side) - np.mean(old_side)))
    values = np.array([value for _, value in found])
    away = np.abs(values - values.mean())
    (observed,) = [distance for (mine, _), distance in zip(found, away) if mine]
    return float(np.mean(away >= observed - 1e-9))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"a": 1.0, "b": 2.5, "c": 0.5, "d": 4.0}, {"e": 3.0, "f": 5.5, "g": 2.0, "h": 6.0}),
        ({"a": 1.0, "b": 2.5, "c": 0.5, "d": 4.0, "e": 1.5}, {"a": 1.2, "b": 3.5, "c": 0.4, "d": 5.0, "e": 2.0}),
        ({"a": 1.0, "b": 2.5, "c": 0.5, "x": 2.0}, {"a": 1.5, "b": 3.5, "c": 0.9, "y": 5.0, "z": 6.0}),
        ({"a": 1.0, "b": 2.0}, {"a": 1.5, "b": 2.5, "y": 50.0}),  # the composition is not permuted
        ({"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0}),
    ],
)
def test_p_is_that_of_all_permutations(before, now):
    exact = by_hand(before, now)
    (found,) = permutation_p(*({q: np.array([v]) for q, v in one.items()} for one in (before, now)), 20_000)
    assert found == pytest.approx(exact, abs=0.012)  # three standard errors of 20,000 draws


def test_p_agrees_with_scipy():
    """Two designs: separate questions, and the same questions twice."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=14), rng.normal(0.6, 1, size=11)
    pairs = {"independent": (a, b), "samples": (a[:11], b)}
    for kind, (old, new) in pairs.items():
        expected = stats.permutation_test(
            (new, old),
            lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
            permutation_type=kind,
            n_resamples=19_999,
            vectorized=True,
            rng=0,
        ).pvalue
        names = [f"{i}" for i in range(14)], [f"{i}" if kind == "samples" else f"new {i}" for i in range(11)]
        means = [{q: np.array([v]) for q, v in zip(n, values)} for n, values in zip(names, (old, new))]
        assert permutation_p(*means, 19_999)[0] == pytest.approx(expected, abs=0.015)


def test_each_question_counts_once():
    means = question_means(["a", "b", "a", "a"], np.array([[1.0, 0.0], [10.0, 1.0], [2.0, 0.0], [3.0, 3.0]]))
    assert {question: values.tolist() for question, values in means.items()} == {"a": [2.0, 1.0], "b": [10.0, 1.0]}


def test_holm_by_hand():
    """0.01 x 4, 0.02 x 3, then 0.03 x 2 is not below 0.06, and 0.9 x 1."""
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def sample(rng: np.random.Generator, count: int, drift: float = 0.0, shift: float = 0.0) -> tuple[list[str], dict]:
    """Questions with one to five traces, whose features depend on the question and on one another."""
    questions, rows = [], []
    for n in range(count):
        level = rng.normal()
        for _ in range(rng.integers(1, 6)):
            own = level + rng.normal(size=6)
            questions.append(f"q{n}")
            rows.append([own[0] + drift, own[1], own[0] + own[2], float(own[3] > 1), own[4] ** 2, level])
    x = np.array(rows)
    x[:, 1] += shift
    x[:, 5] -= shift
    return questions, {f"f{i}": x[:, i] for i in range(6)} | {"constant": np.ones(len(x))}


def halves(questions: list[str], features: dict, rng: np.random.Generator, shared: bool) -> list[Period]:
    """Random halves: of the questions, or of the traces, so that most questions are in both."""
    unit = [f"{q} {i}" for i, q in enumerate(questions)] if shared else questions
    names = sorted(set(unit))
    first = set(rng.permutation(names)[: len(names) // 2].tolist())
    inside = np.array([one in first for one in unit])
    return [
        Period(
            questions=[q for q, one in zip(questions, mask) if one],
            features={name: values[mask] for name, values in features.items()},
        )
        for mask in (inside, ~inside)
    ]


@pytest.mark.parametrize("shared", [False, True])
def test_halves_of_one_sample_drift_in_one_of_twenty_comparisons(shared):
    """200 splits: at a level of 5 % more than 18 false alarms have a probability below 0.5 %."""
    rng = np.random.default_rng(7 + shared)
    alarms = 0
    for _ in range(200):
        before, now = halves(*sample(rng, 30), rng, shared)
        found, _ = shifts(before, now, ["f0", "f2", "f4"], permutations=299)
        assert [one.name for one in found] == [*now.features, PROBE]
        assert found[6].p_corrected == 1
        alarms += any(one.drifted for one in found)
    assert 1 <= alarms <= 18


def test_planted_shift_is_found_and_no_other():
    rng = np.random.default_rng(5)
    questions, features = sample(rng, 150)
    later, moved = sample(rng, 150, drift=1.0)
    before = Period(questions=questions, features=features)
    now = Period(questions=[f"later {q}" for q in later], features=moved)
    found, _ = shifts(before, now)
    assert [one.name for one in found if one.drifted] == ["f0"]
    (shift,) = (one for one in found if one.drifted)
    old, new = (
        np.array([np.mean([v for q, v in zip(names, values) if q == name]) for name in dict.fromkeys(names)])
        for names, values in ((questions, features["f0"]), (later, moved["f0"]))
    )
    assert (shift.before, shift.now) == pytest.approx((old.mean(), new.mean()))
    assert shift.size == pytest.approx((new.mean() - old.mean()) / np.concatenate([old, new]).std())
    assert shift.p_corrected == pytest.approx(6 * shift.p)  # six features vary


def test_shared_questions_remove_what_differs_between_questions():
    """A change of 0.3 is small between questions and certain within them."""
    rng = np.random.default_rng(2)
    levels = rng.normal(0, 3, size=60)
    old = {"x": levels + rng.normal(0, 0.2, size=60)}
    new = {"x": levels + 0.3 + rng.normal(0, 0.2, size=60)}
    names = [f"q{i}" for i in range(60)]
    (within,), _ = shifts(Period(questions=names, features=old), Period(questions=names, features=new))
    (between,), _ = shifts(
        Period(questions=names, features=old), Period(questions=[f"new {q}" for q in names], features=new)
    )
    assert within.p == 1e-4
    assert between.p > 0.2


def test_the_probe_sees_what_no_single_feature_shows():
    """The product of two signs is a shift of no mean; their sum and difference, which the probe weighs, is."""
    rng = np.random.default_rng(4)
    x, noise = rng.normal(size=400), rng.normal(0, 0.05, size=400)
    move = np.repeat([0.0, 0.15], 200)
    features = {"a": x + move, "b": x - move + noise}  # a - b moves by 0.3, six times its noise; each by 0.15 of 1
    names = [f"q{i}" for i in range(400)]
    before, now = (
        Period(questions=names[part], features={k: v[part] for k, v in features.items()})
        for part in (slice(200), slice(200, 400))
    )
    found, area = shifts(before, now, ["a", "b"])
    assert [one.name for one in found if one.drifted] == [PROBE]
    assert area > 0.99
    old, new, _ = probe_scores(before, now, ["a", "b"])
    assert (len(old), len(new)) == (100, 100)  # half of the questions, none of which was fitted on


def test_features_that_change_from_one_constant_to_another_drift():
    names = [f"q{i}" for i in range(20)]
    before, now = (Period(questions=names, features={"finished": [flag] * 20}) for flag in (1.0, 0.0))
    (shift,), area = shifts(before, now)
    assert (shift.before, shift.now, shift.size) == (1, 0, -2)
    assert shift.drifted
    assert shift.p <= 2 * ALPHA**2
    assert math.isnan(area)
