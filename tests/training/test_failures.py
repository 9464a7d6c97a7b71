"""Failure rules on scripted runs: detected within two windows, and never in healthy runs."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tracereward.training import failures
from tracereward.training.failures import Failure, autocorrelation, decoupling, detect, mode_collapse, token_noise

REWARD, CORRECT = "reward", "rewards/correct/mean"
WITHIN, PERTURBATION = "monitor/within_prompt_auroc", "monitor/perturbation_auroc"
DISTINCT, NOISE, SPREAD = "monitor/distinct_share", "monitor/token_noise", "monitor/reward_std"
SD = {REWARD: 0.15, CORRECT: 0.05, WITHIN: 0.05, PERTURBATION: 0.05, DISTINCT: 0.03, NOISE: 0.05, SPREAD: 0.05}
HEALTHY = {REWARD: 0.0, CORRECT: 0.5, WITHIN: 0.7, PERTURBATION: 0.85, DISTINCT: 0.9, NOISE: 0.5, SPREAD: 0.5}


def run(steps: int = 200, seed: int = 0, without=(), **means) -> list[dict]:
    """Rows with white noise around `means` (a number or a function of the step); other metrics are healthy and flat."""
    names = {"reward": REWARD, "correct": CORRECT, "within": WITHIN, "perturbation": PERTURBATION}
    names |= {"distinct": DISTINCT, "noise": NOISE, "spread": SPREAD}
    levels = HEALTHY | {names[name]: level for name, level in means.items()}
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, steps + 1):
        row: dict = {"step": step}
        for key, level in levels.items():
            value = (level(step) if callable(level) else level) + SD[key] * rng.normal()
            if key not in without:
                row[key] = value
        rows.append(row)
    return rows


def move(low: float, high: float, start: int, end: int):
    """Linear from `low` to `high` between two steps."""
    return lambda step: float(np.interp(step, [start, end], [low, high]))


def two_levels(before: dict, after: dict, n: int = 20) -> list[dict]:
    """n rows near `before`, then n near `after`: 0.001 above and below in turn, without autocorrelation."""
    rows = []
    for index in range(2 * n):
        wiggle = 0.001 if index % 2 else -0.001
        levels = before if index < n else after
        rows.append({"step": index + 1, **{key: value + wiggle for key, value in levels.items()}})
    return rows


def two_constants(before: dict, after: dict, n: int = 20) -> list[dict]:
    """n rows of `before`, then n of `after`: without variance any fall is significant, so only its size matters."""
    return [{"step": index + 1, **(before if index < n else after)} for index in range(2 * n)]


def first_alarm(rows: list[dict]) -> Failure | None:
    return next(filter(None, (detect(rows[:end]) for end in range(1, len(rows) + 1))), None)


COLLAPSES = {
    "mode_collapse": {"distinct": move(0.9, 0.2, 100, 120), "reward": move(0, 1, 100, 120)},
    "mode_collapse with falling accuracy": {
        "distinct": move(0.9, 0.2, 100, 120),
        "reward": move(0, 1, 100, 120),
        "correct": move(0.5, 0.46, 100, 120),
    },
    "decoupling": {"within": move(0.7, 0.5, 100, 120), "reward": move(0, 1, 0, 200)},
    "decoupling of accuracy": {"correct": move(0.6, 0.3, 100, 120), "reward": move(0, 1, 100, 120)},
    "token_noise": {"noise": move(0.5, 5, 100, 120)},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", COLLAPSES)
def test_failures_are_detected_within_forty_steps(case, seed):
    failure = first_alarm(run(150, seed, **COLLAPSES[case]))
    assert failure is not None
    assert failure.name == case.split()[0]
    assert 100 < failure.step <= 140


@pytest.mark.parametrize("seed", range(3))
def test_without_answers_the_perturbation_auroc_detects_decoupling(seed):
    rows = run(150, seed, without=(CORRECT, WITHIN), perturbation=move(0.85, 0.55, 100, 120))
    failure = first_alarm(rows)
    assert failure is not None
    assert failure.name == "decoupling"
    assert 100 < failure.step <= 140
    assert "copies" in failure.reason


HEALTHY_RUNS = {
    "flat": {},
    "reward and accuracy rise": {"reward": move(0, 1, 0, 200), "correct": move(0.3, 0.7, 0, 200)},
    "accuracy falls with the reward": {"reward": move(1, 0, 0, 200), "correct": move(0.7, 0.45, 0, 200)},
    "convergence": {
        "reward": move(0, 1, 0, 200),
        "correct": move(0.3, 0.85, 0, 200),
        "distinct": move(0.95, 0.5, 0, 200),
        "within": move(0.8, 0.55, 0, 200),
    },
    "mastered": {
        "reward": move(0, 1, 0, 200),
        "correct": 0.95,
        "distinct": move(0.95, 0.3, 0, 200),
        "within": move(0.8, 0.5, 0, 200),
    },
    "fewer distinct traces, reward flat": {"distinct": move(0.9, 0.2, 0, 200)},
    "twice the scale": {"noise": move(0.5, 2.2, 0, 200), "spread": move(0.5, 1.2, 0, 200)},
    "noise with a better reward": {"noise": move(0.5, 5, 0, 200), "within": move(0.55, 0.8, 0, 200)},
}


@pytest.mark.parametrize("case", HEALTHY_RUNS)
def test_healthy_run_raises_no_alarm(case):
    rows = run(200, seed=5, **HEALTHY_RUNS[case])
    assert [detect(rows[:end]) for end in range(1, 201, 3)] == [None] * 67


BASE = {REWARD: 0.0, CORRECT: 0.5, WITHIN: 0.7, DISTINCT: 0.9, NOISE: 0.5}


@pytest.mark.parametrize(
    ("before", "after", "alarm"),
    [
        (0.9, 0.64, True),  # a fall of a quarter
        (0.9, 0.66, False),
        (0.4, 0.19, True),  # half
        (0.4, 0.21, False),
    ],
)
def test_diversity_threshold(before, after, alarm):
    rows = two_levels(BASE | {DISTINCT: before}, BASE | {DISTINCT: after, REWARD: 1.0})
    assert (mode_collapse(rows) is not None) == alarm


@pytest.mark.parametrize(("after", "alarm"), [(0.44, True), (0.46, False)])
def test_diversity_threshold_without_answers(after, alarm):
    known = {DISTINCT: 0.9, REWARD: 0.0}
    rows = two_levels(known, known | {DISTINCT: after, REWARD: 1.0})
    assert (mode_collapse(rows) is not None) == alarm


@pytest.mark.parametrize(
    ("reward", "correct", "alarm"),
    [(1.0, 0.5, True), (0.0, 0.5, False), (-1.0, 0.5, False), (1.0, 0.51, False), (1.0, 0.4, True)],
)
def test_mode_collapse_requires_rising_reward_and_no_accuracy_gain(reward, correct, alarm):
    rows = two_levels(BASE, BASE | {DISTINCT: 0.3, REWARD: reward, CORRECT: correct})
    assert (mode_collapse(rows) is not None) == alarm


@pytest.mark.parametrize(("correct", "alarm"), [(0.89, True), (0.91, False)])
def test_ninety_percent_accuracy_excuses_low_diversity_and_auroc(correct, alarm):
    before, after = BASE | {CORRECT: correct}, BASE | {CORRECT: correct, DISTINCT: 0.3, REWARD: 1.0, WITHIN: 0.5}
    assert (mode_collapse(two_levels(before, after)) is not None) == alarm
    assert (decoupling(two_levels(before, after)) is not None) == alarm


@pytest.mark.parametrize(
    ("before", "after", "alarm"),
    [
        (0.9, 0.69, True),  # half of 0.4
        (0.9, 0.71, False),
        (0.56, 0.5, True),  # at least 0.05
        (0.56, 0.52, False),
        (0.5, 0.44, True),
        (0.4, 0.34, True),
        (0.4, 0.36, False),
    ],
)
@pytest.mark.parametrize("labels", [True, False])
def test_auroc_threshold(before, after, alarm, labels):
    key, known = (WITHIN, {CORRECT: 0.5}) if labels else (PERTURBATION, {})
    rows = two_levels({key: before, **known}, {key: after, **known})
    assert (decoupling(rows) is not None) == alarm


def test_rising_accuracy_excuses_a_falling_auroc():
    assert decoupling(two_levels(BASE, BASE | {WITHIN: 0.5, CORRECT: 0.51})) is None
    assert decoupling(two_levels(BASE, BASE | {WITHIN: 0.5, CORRECT: 0.5})) is not None


def test_perturbation_auroc_is_ignored_with_answers():
    rows = two_levels(BASE | {PERTURBATION: 0.9}, BASE | {PERTURBATION: 0.5})
    assert decoupling(rows) is None


@pytest.mark.parametrize(
    ("reward", "correct", "alarm"),
    [(1.0, 0.39, True), (1.0, 0.41, False), (0.0, 0.39, False), (-1.0, 0.39, False), (1.0, 0.61, False)],
)
def test_accuracy_falls_while_the_reward_rises(reward, correct, alarm):
    assert (decoupling(two_levels(BASE, BASE | {REWARD: reward, CORRECT: correct})) is not None) == alarm


@pytest.mark.parametrize(
    ("reward", "correct", "alarm"), [(0.0, 0.24, True), (-1.0, 0.24, True), (0.0, 0.26, False), (-1.0, 0.26, False)]
)
def test_accuracy_halves_whatever_the_reward(reward, correct, alarm):
    """From 0.5. Seen in a run whose policy learned to end early: accuracy from .65 to .04, reward from .73 to .68."""
    assert (decoupling(two_levels(BASE, BASE | {REWARD: reward, CORRECT: correct})) is not None) == alarm


@pytest.mark.parametrize(
    ("before", "after", "auroc", "alarm"),
    [
        (0.5, 2.1, 0.7, True),
        (0.5, 1.9, 0.7, False),
        (0.5, 2.1, 0.71, False),  # a better reward
        (0.5, 2.1, 0.6, True),
        (0.0015, 0.012, 0.7, True),
        (0.0015, 0.009, 0.7, False),  # too little to steer
    ],
)
def test_token_noise_threshold(before, after, auroc, alarm):
    rows = two_levels(BASE | {NOISE: before}, BASE | {NOISE: after, WITHIN: auroc})
    assert (token_noise(rows) is not None) == alarm


@pytest.mark.parametrize(("spread", "alarm"), [(0.5, True), (0.1, True), (0.7, True), (0.8, False)])
def test_token_noise_threshold_scales_with_the_reward(spread, alarm):
    """Noise grows ninefold: more than 4 (0.7 / 0.5)^2, less than 4 (0.8 / 0.5)^2."""
    rows = two_levels(BASE | {NOISE: 0.5, SPREAD: 0.5}, BASE | {NOISE: 4.5, SPREAD: spread})
    assert (token_noise(rows) is not None) == alarm


@pytest.mark.parametrize(("after", "alarm"), [(1.9, False), (2.1, True)])
def test_token_noise_threshold_does_not_shrink_with_the_reward(after, alarm):
    rows = two_levels(BASE | {NOISE: 0.5, SPREAD: 0.5}, BASE | {NOISE: after, SPREAD: 0.3})
    assert (token_noise(rows) is not None) == alarm


@pytest.mark.parametrize(("before", "after", "alarm"), [(0.75, 0.5, False), (0.75, 0.499, True), (0.25, 0.125, False)])
def test_diversity_bounds_are_exclusive(before, after, alarm):
    """The bounds, max(0.75 - 0.25, 0.375) and max(0, 0.125), are exact in binary."""
    rows = two_constants({DISTINCT: before, CORRECT: 0.5, REWARD: 0.0}, {DISTINCT: after, CORRECT: 0.5, REWARD: 1.0})
    assert (mode_collapse(rows) is not None) == alarm


@pytest.mark.parametrize(("after", "alarm"), [(0.75, False), (0.749, True)])
def test_auroc_bound_is_exclusive(after, alarm):
    rows = two_constants({WITHIN: 1.0, CORRECT: 0.5}, {WITHIN: after, CORRECT: 0.5})
    assert (decoupling(rows) is not None) == alarm


@pytest.mark.parametrize(("correct", "alarm"), [(0.9, False), (0.899, True)])
def test_accuracy_bound_is_inclusive(correct, alarm):
    """The mean of eight equal values is exact."""
    rows = two_constants({WITHIN: 0.75, CORRECT: correct}, {WITHIN: 0.5, CORRECT: correct}, 8)
    assert (decoupling(rows) is not None) == alarm


@pytest.mark.parametrize(("after", "alarm"), [(0.009, False), (0.011, True)])
def test_noise_below_the_floor_is_no_failure(after, alarm):
    """It grows sixfold and more than sevenfold, with no variance in either window."""
    assert (token_noise(two_constants({NOISE: 0.0015}, {NOISE: after})) is not None) == alarm


@pytest.mark.parametrize(("spread", "alarm"), [(1.0, False), (0.998, True)])
def test_noise_growth_bound_is_exclusive(spread, alarm):
    """8 / 1^2 equals 4 * 0.5 / 0.5^2 exactly."""
    rows = two_constants({NOISE: 0.5, SPREAD: 0.5}, {NOISE: 8.0, SPREAD: spread})
    assert (token_noise(rows) is not None) == alarm


def test_noise_rule_without_answers_needs_no_auroc():
    assert token_noise(two_levels({NOISE: 0.5}, {NOISE: 3.0})) is not None
    assert token_noise(two_levels({NOISE: 3.0}, {NOISE: 0.5})) is None


def test_significance_is_welchs_t_test():
    """The smallest alarming fall of a noisy AUROC is t(1e-5, 19) standard errors, to within two thousandths."""
    noise = np.random.default_rng(3).normal(size=40) * 0.3

    def falls(by: float) -> bool:
        values = 0.9 + noise - by * (np.arange(40) >= 20)
        return decoupling([{"step": i + 1, CORRECT: 0.5, WITHIN: value} for i, value in enumerate(values)]) is not None

    def expected(by: float) -> bool:
        values = 0.9 + noise - by * (np.arange(40) >= 20)
        old, new = values[:20], values[20:]
        d = np.diff(values)
        r = min(max(1 + 2 * sum(a * b for a, b in pairwise(d)) / sum(d**2), 0), 0.9)
        error = math.sqrt((1 + r) / (1 - r) * (old.var(ddof=1) / 20 + new.var(ddof=1) / 20))
        return old.mean() - new.mean() > stats.t.isf(1e-5, 19) * error

    grid = np.arange(0.3, 1.0, 0.002)
    assert [falls(by) for by in grid] == [expected(by) for by in grid]
    assert not falls(grid[0])
    assert falls(grid[-1])


@pytest.mark.parametrize(("key", "level"), [(REWARD, 0.01), (CORRECT, 0.05)])
def test_significance_levels_of_rising_reward_and_accuracy(key, level):
    """A rise of the reward is required, a rise of the accuracy excuses. Both are one-sided Welch tests."""
    noise = np.random.default_rng(4).normal(size=40) * 0.03
    old, new = noise[:20], noise[20:]
    needed = stats.t.isf(level, 19) * math.sqrt(old.var(ddof=1) / 20 + new.var(ddof=1) / 20) - new.mean() + old.mean()
    for margin, rose in [(1e-6, True), (-1e-6, False)]:
        rows = two_levels(BASE, BASE | {DISTINCT: 0.3, REWARD: 1.0})
        for index, row in enumerate(rows):
            row[key] = 0.5 + noise[index] + (needed + margin) * (index >= 20)
        assert (mode_collapse(rows) is not None) == (rose if key == REWARD else not rose)


@pytest.mark.parametrize(("values", "alarm"), [(1, True), (2, False)])
@pytest.mark.filterwarnings("error")
def test_accuracy_excuse_needs_two_values_in_a_window(values, alarm):
    rows = two_levels(BASE, BASE | {WITHIN: 0.5, CORRECT: 0.7})
    for index, row in enumerate(rows):
        if index % 20 >= values:
            del row[CORRECT]
    assert (decoupling(rows) is not None) == alarm


@pytest.mark.parametrize("known", [[0, 7, *range(20, 40)], [*range(20), 20, 31]], ids=["earlier", "recent"])
def test_unequal_windows_use_the_smaller_degrees_of_freedom(known):
    """Two values against twenty: the quantile of one degree of freedom is 6.3, not 1.7."""
    rows = two_constants({WITHIN: 0.75}, {WITHIN: 0.5})
    noise = np.random.default_rng(6).normal(size=40) * 0.01
    old, new = [noise[i] for i in known if i < 20], [noise[i] for i in known if i >= 20]
    error = math.sqrt(np.var(old, ddof=1) / len(old) + np.var(new, ddof=1) / len(new))
    needed = stats.t.isf(0.05, 1) * error - np.mean(new) + np.mean(old)
    for margin, alarm in [(-1e-6, True), (1e-6, False)]:
        for i in known:
            rows[i][CORRECT] = 0.5 + noise[i] + (needed + margin) * (i >= 20)
        assert (decoupling(rows) is not None) == alarm


@pytest.mark.parametrize("known", [range(20), range(20, 40)], ids=["earlier", "recent"])
def test_accuracy_known_in_one_window_only_is_not_reported(known):
    rows = two_constants({WITHIN: 0.75}, {WITHIN: 0.5})
    for index in known:
        rows[index][CORRECT] = 0.5
    failure = decoupling(rows)
    assert failure is not None
    assert failure.reason == "AUROC within a prompt fell from 0.75 (steps 1 to 20) to 0.5 (steps 21 to 40)"


@pytest.mark.parametrize("n", [8, 10, 20])
def test_detection_needs_sixteen_rows(n):
    rows = two_levels(BASE, BASE | {WITHIN: 0.5}, n)
    assert detect(rows) is not None
    if n == 8:
        assert detect(rows[1:]) is None
        assert detect([]) is None


def test_only_a_fall_in_the_last_window_counts():
    rows = two_levels(BASE, BASE | {WITHIN: 0.5}) + [
        {**row, "step": row["step"] + 40} for row in two_levels(BASE, BASE)
    ]
    assert detect(rows[:40]) is not None
    assert detect(rows) is None


def test_any_earlier_window_may_be_the_reference():
    """The AUROC starts low; the reference window is in the middle of the run."""
    low, high = BASE | {WITHIN: 0.55}, BASE | {WITHIN: 0.8}
    rows = two_levels(low, high, 20) + two_levels(high, low, 20)
    failure = detect([{**row, "step": index + 1} for index, row in enumerate(rows)])
    assert failure is not None
    assert "0.8 (steps " in failure.reason
    assert "0.55 (steps 61 to 80)" in failure.reason


def test_deepest_fall_is_reported():
    """0.65 to 0.55 is a failure too, but 0.8 to 0.55 is deeper."""
    levels = [0.65] * 20 + [0.8] * 20 + [0.55] * 20
    failure = decoupling([{"step": index + 1, CORRECT: 0.5, WITHIN: level} for index, level in enumerate(levels)])
    assert failure is not None
    assert "from 0.8 (steps 21 to 40) to 0.55 (steps 41 to 60)" in failure.reason


def test_last_window_ends_at_the_last_value_of_its_series():
    """A later row without an AUROC is not in the window, so its accuracy (0) is not counted."""
    rows = [*two_constants({WITHIN: 0.75, CORRECT: 0.5}, {WITHIN: 0.5, CORRECT: 0.5}), {"step": 41, CORRECT: 0.0}]
    assert decoupling(rows) == Failure(
        "decoupling",
        41,
        "AUROC within a prompt fell from 0.75 (steps 1 to 20) to 0.5 (steps 21 to 40); correct answers went from 0.5 "
        "to 0.5",
    )


def test_windows_do_not_overlap():
    """Of 40 values only steps 1 to 20 precede the last 20, although steps 2 to 21 have a higher mean."""
    levels = [0.7] + [0.8] * 20 + [0.5] * 19
    rows = [
        {"step": index + 1, CORRECT: 0.5, WITHIN: level + (0.03 if index % 2 else -0.03)}
        for index, level in enumerate(levels)
    ]
    failure = detect(rows)
    assert failure is not None
    assert "(steps 1 to 20)" in failure.reason
    assert "(steps 21 to 40)" in failure.reason


def test_odd_number_of_values_drops_one_from_the_windows():
    failure = detect(two_levels(BASE, BASE | {WITHIN: 0.5})[:39])
    assert failure is not None
    assert "(steps 21 to 39)" in failure.reason


def test_window_has_at_most_the_requested_length():
    rows = two_levels(BASE, BASE | {WITHIN: 0.5})
    failure = detect(rows, window=10)
    assert failure is not None
    assert "(steps 31 to 40)" in failure.reason
    assert detect(rows[:20] + two_levels(BASE, BASE | {WITHIN: 0.5})[20:29], window=8) is not None


def test_failure_reason_reports_the_values():
    rows = two_levels(BASE, BASE | {DISTINCT: 0.3, REWARD: 1.5, CORRECT: 0.45})
    assert detect(rows) == Failure(
        "mode_collapse",
        40,
        "distinct completions of a prompt fell from 0.9 (steps 1 to 20) to 0.3 (steps 21 to 40), while the reward rose "
        "from 0 to 1.5; correct answers went from 0.5 to 0.45",
    )
    rows = two_levels(BASE, BASE | {WITHIN: 0.5})
    assert detect(rows) == Failure(
        "decoupling",
        40,
        "AUROC within a prompt fell from 0.7 (steps 1 to 20) to 0.5 (steps 21 to 40); correct answers went from 0.5 to "
        "0.5",
    )
    rows = two_levels(BASE, BASE | {CORRECT: 0.25, REWARD: 1.0})
    assert detect(rows) == Failure(
        "decoupling",
        40,
        "correct answers fell from 0.5 (steps 1 to 20) to 0.25 (steps 21 to 40), while the reward rose from 0 to 1",
    )
    rows = two_levels({NOISE: 0.5}, {NOISE: 4.0})
    assert detect(rows) == Failure(
        "token_noise",
        40,
        "the variance of token rewards inside correct traces rose from 0.5 (steps 1 to 20) to 4 (steps 21 to 40)",
    )


def test_constant_series_raise_no_alarm():
    rows = [{"step": step, **dict.fromkeys(HEALTHY, 0.5)} for step in range(60)]
    assert detect(rows) is None
    assert detect([{"step": step, **dict.fromkeys(HEALTHY, 0.0)} for step in range(60)]) is None


def test_step_between_constants_raises_an_alarm():
    rows = [{"step": step, CORRECT: 0.5, WITHIN: 0.7 if step < 20 else 0.5} for step in range(40)]
    assert detect(rows) is not None


def test_missing_null_and_non_finite_values_are_skipped():
    rows = run(150, 1, **COLLAPSES["decoupling"])
    padded = []
    for index, row in enumerate(rows):
        nothing = [{}, dict.fromkeys(HEALTHY), dict.fromkeys(HEALTHY, math.nan), dict.fromkeys(HEALTHY, math.inf)]
        padded += [{**row, "step": 2 * row["step"]}, {"step": 2 * row["step"] + 1, **nothing[index % 4]}]
    expected, failure = detect(rows), detect(padded)
    assert expected is not None
    assert failure is not None
    assert (failure.name, failure.step) == (expected.name, 301)


def test_sparsely_logged_series_has_longer_windows():
    rows = run(200, 2, without=(CORRECT, WITHIN), perturbation=move(0.9, 0.5, 100, 101))
    for row in rows:
        if row["step"] % 5:
            del row[PERTURBATION]
    failure = detect(rows)
    assert failure is not None
    assert "(steps 105 to 200)" in failure.reason


def test_rows_of_a_step_are_merged_and_rows_without_a_step_are_ignored():
    rows = two_levels(BASE, BASE | {WITHIN: 0.5})
    split = [{"phase": "warmup", "update": 1, WITHIN: 0.0}]
    for row in rows:
        rest = {key: value for key, value in row.items() if key != WITHIN}
        split += [rest, {"step": row["step"], WITHIN: row[WITHIN]}]
    assert detect(split) == detect(rows)


def test_resumed_run_replaces_the_rows_after_its_checkpoint():
    """The first attempt decoupled after step 20 and was resumed from there: only the second attempt counts."""
    first, second = two_levels(BASE, BASE | {WITHIN: 0.5}), two_levels(BASE, BASE)
    assert detect(first) is not None
    assert detect(first + second[20:]) is None
    assert detect(second + first[20:]) == detect(first)
    assert detect(second + first[20:39]) == detect(first[:39])


def test_detection_is_stateless():
    rows = run(150, 0, **COLLAPSES["token_noise"])
    copy = [dict(row) for row in rows]
    assert detect(rows) == detect(rows)
    assert rows == copy


@given(values=st.lists(st.integers(-5, 5), min_size=1, max_size=30))
def test_autocorrelation_matches_the_clipped_formula(values):
    d = [b - a for a, b in pairwise(values)]
    power = sum(x * x for x in d)
    products = sum(d[index] * d[index + 1] for index in range(len(d) - 1))
    expected = min(max(1 + 2 * products / power, 0), 0.9) if power else 0.0
    assert autocorrelation(np.array(values, dtype=float)) == pytest.approx(expected)


@pytest.mark.parametrize("r", [0.0, 0.5, 0.8])
def test_autocorrelation_recovers_an_autoregression_under_a_trend(r):
    rng = np.random.default_rng(0)
    values = [0.0]
    for _ in range(20_000):
        values.append(r * values[-1] + rng.normal())
    assert autocorrelation(np.array(values)) == pytest.approx(r, abs=0.03)
    assert autocorrelation(np.array(values) + 0.001 * np.arange(20_001)) == pytest.approx(r, abs=0.03)


def test_autocorrelated_series_needs_a_deeper_fall():
    """The same values in another order: when neighbours are alike, the effective sample size is smaller."""
    values = np.linspace(-0.1, 0.1, 20)
    mixed = values[[0, 19, 2, 17, 4, 15, 6, 13, 8, 11, 9, 10, 7, 12, 5, 14, 3, 16, 1, 18]]
    wave = np.concatenate([values[::2], values[::-2]])

    def rows(order):
        levels = [*(0.8 + order), *(0.62 + order)]
        return [{"step": index + 1, CORRECT: 0.5, WITHIN: level} for index, level in enumerate(levels)]

    assert autocorrelation(np.array([row[WITHIN] for row in rows(mixed)])) == 0
    assert autocorrelation(np.array([row[WITHIN] for row in rows(wave)])) > 0.5
    assert decoupling(rows(mixed)) is not None
    assert decoupling(rows(wave)) is None


def test_thresholds_match_the_documentation():
    assert (failures.MAX_AUTOCORRELATION, failures.NOISE_FLOOR) == (0.9, 0.01)
    assert (failures.WINDOW, failures.MIN_VALUES) == (20, 8)
    assert (failures.ALARM_LEVEL, failures.RISE_LEVEL, failures.EXCUSE_LEVEL) == (1e-5, 0.01, 0.05)
