"""Abstaining: thresholds against a sorted list, the guarantee by leaving out each question, and storage."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracereward.errors import InputError
from tracereward.rewards.abstention import Abstention, fit_abstention, threshold_of
from tracereward.rewards.calibration import Calibration
from tracereward.rewards.settings import RewardSettings
from tracereward.selection import Candidate

QUESTIONS = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=4, max_size=25)
RISKS = st.sampled_from([0.04, 0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.9])


def record(rows) -> Abstention:
    return Abstention(method="reward", questions=len(rows), wrong=tuple(r for r, right in rows if not right))


@given(QUESTIONS, RISKS)
def test_threshold_is_the_conformal_quantile(rows, risk):
    scores = np.sort([-math.inf if right else reward for reward, right in rows])
    place = next(k for k in range(1, len(rows) + 2) if k >= (len(rows) + 1) * (1 - risk) - 1e-9)
    if place > len(rows):
        with pytest.raises(InputError, match=str(math.ceil(1 / risk - 1e-9) - 1)):
            record(rows).threshold(risk)
    else:
        assert record(rows).threshold(risk) == scores[place - 1]


@given(QUESTIONS, RISKS)
def test_each_question_left_out_in_turn_is_answered_wrongly_at_most_as_often_as_the_risk(rows, risk):
    """Exchangeability says no more than this: the new question is as likely any of the n + 1."""
    if risk < 1 / len(rows):
        return
    wrong = 0
    for new, (reward, right) in enumerate(rows):
        wrong += not right and reward > record(rows[:new] + rows[new + 1 :]).threshold(risk)
    assert wrong / len(rows) <= risk + 1e-9


def test_nothing_wrong_answers_everything():
    assert Abstention(method="vote", questions=9, wrong=()).threshold(0.1) == -math.inf
    assert Abstention(method="vote", questions=9, wrong=(2.0, 1.0)).threshold(0.1) == 2.0
    assert Abstention(method="vote", questions=19, wrong=(2.0, 1.0)).threshold(0.1) == 1.0


def test_records_are_of_the_chosen_candidates():
    def candidate(answer, reward, correct):
        return Candidate("", answer, reward, correct=correct)

    questions = [
        [candidate("1", 0.5, False), *(candidate("2", reward, True) for reward in (0.49, 0.49, 0.0))],
        [candidate("3", -0.5, False), candidate("4", -0.6, True)],
    ]
    vote, reward = fit_abstention(questions, lambda a, b: a == b)
    assert (vote.method, vote.questions, vote.wrong) == ("vote", 2, (-0.5,))
    assert (reward.method, reward.questions, reward.wrong) == ("reward", 2, (-0.5, 0.5))
    with pytest.raises(InputError, match="vote, reward"):
        threshold_of((vote, reward), "majority", 0.5)
    with pytest.raises(InputError, match="calibrate"):
        threshold_of((), "vote", 0.5)


def test_the_reason_has_probabilities_where_the_model_is_calibrated():
    found = (Abstention(method="reward", questions=4, wrong=(0.0, 1.0)),)
    bare = RewardSettings(abstention=found)
    assert bare.why_not("reward", 1.0, None) is None
    assert bare.why_not("reward", 1.1, 0.2) is None
    assert "1.000" in str(bare.why_not("reward", 1.0, 0.2))
    calibrated = RewardSettings(abstention=found, calibration=Calibration("platt", slope=2.0, intercept=-2.0))
    assert "p = 0.269 is not above 0.500" in str(calibrated.why_not("reward", 0.5, 0.2))  # sigmoid(-1), sigmoid(0)
