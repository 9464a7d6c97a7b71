"""First-error rules on hand-computed step scores."""

import math

from tracereward.rewards.first_error_rules import first_below, first_below_others, first_token_below, lowest_steps


def test_first_step_below_a_threshold():
    assert first_below([3.0, 1.0, 0.0], 2.0) == 1
    assert first_below([3.0, 2.0], 2.0) is None, "strictly below"
    assert first_below([1.0, 0.0], math.inf) == 0


def test_first_token_of_the_first_step_below_a_threshold():
    ends = [False, True, False, False, True, True]
    assert first_token_below([0.5, 0.2, -0.1], ends, 0.0) == 5
    assert first_token_below([0.5, 0.2, -0.1], ends, 0.3) == 2
    assert first_token_below([-0.5, 0.2, -0.1], ends, 0.0) == 0
    assert first_token_below([0.5, 0.2, 0.1], ends, 0.0) is None


def test_first_step_well_below_the_others():
    # means of the others: 1/3, 2/3, 1, 1; the steps are 5/3 and 1/3 above, and 1 and 1 below
    assert first_below_others([2.0, 1.0, 0.0, 0.0], margin=0.9) == 2
    assert first_below_others([2.0, 1.0, 0.0, 0.0], margin=1.0) is None
    assert first_below_others([-1.0, 3.0], margin=3.9) == 0
    assert first_below_others([3.0, -1.0], margin=3.9) == 1
    assert first_below_others([-4.0, -4.0, -4.0]) is None  # low, but no lower than the rest of the trace
    assert first_below_others([-4.0]) is None
    assert first_below_others([]) is None


def test_lowest_steps_returns_all_ties():
    assert lowest_steps([1.0, -1.0, 0.0]) == [1]
    assert lowest_steps([0.0, 2.0, 0.0]) == [0, 2]
