"""A row's own label wins in every command; without one the answer is compared with the gold answer."""

import json
import random

import numpy as np
import pytest

from tracereward.commands.rerank import rerank_rows, summary
from tracereward.data.labels import Judgement, judge, judged_by, judgement_counts
from tracereward.evaluate.pool_data import read_pool
from tracereward.evaluate.suites import useless_fit
from tracereward.metrics import auroc, auroc_interval
from tracereward.rewards.calibration import Calibration, fit_calibration
from tracereward.selection import Candidate
from tracereward.tasks.recipes import get_task

GSM8K = get_task("gsm8k")


@pytest.mark.parametrize(
    ("row", "text", "gold", "expected"),
    [
        ({"correct": False}, "#### 9", "9", Judgement("9", False, labelled=True)),
        ({"correct": 1}, "#### 8", "9", Judgement("8", True, labelled=True)),
        ({"correct": True}, "no idea", None, Judgement(None, True, labelled=True)),
        ({"correct": None}, "#### 9", "9", Judgement("9", True)),
        ({}, "#### 8", "9", Judgement("8", False)),
        ({}, "no idea", "9", Judgement(None, False)),
        ({}, "#### 9", None, Judgement("9", None)),
        ({"extracted": "9"}, "nine, I would say", "9", Judgement("9", True)),
        ({"extracted": " "}, "#### 9", "9", Judgement("9", True)),
        ({"extracted": None, "correct": None}, "#### 9", "9", Judgement("9", True)),
    ],
)
def test_label_wins_then_the_gold_answer(row, text, gold, expected):
    assert judge(row, text, GSM8K, gold) == expected


def labelled_rows() -> list[dict]:
    """Labels that contradict the grading of every other row; the last question has none."""
    return [
        {"prompt": "3 tins?\n", "completion": "#### 8", "answer": "9", "correct": True},
        {"prompt": "3 tins?\n", "completion": "#### 9", "answer": "9", "correct": False},
        {"prompt": "4 tins?\n", "completion": "#### 12", "answer": "12"},
        {"prompt": "4 tins?\n", "completion": "#### 11", "answer": "12"},
    ]


def test_rerank_and_evaluate_call_the_same_candidates_right(tmp_path):
    rows = labelled_rows()
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = read_pool(str(file), GSM8K)
    _, questions = rerank_rows([{**row, "reward": 0.0} for row in rows], GSM8K, "majority")
    flat = [c for candidates in questions for c in candidates]
    assert [row.correct for row in pool] == [c.correct for c in flat] == [True, False, True, False]
    assert [row.labelled for row in pool] == [c.labelled for c in flat] == [True, True, False, False]
    table = summary(questions, GSM8K)
    assert table is not None
    assert table["judged"] == {"labelled": 2, "graded": 2, "unknown": 0}
    assert table["accuracy"]["oracle@2"][0] == 1
    said = judged_by(table["judged"])
    assert "2 by the rows' own label" in said
    assert "2 graded" in said


def test_unknown_candidates_are_counted():
    found = [Candidate("", "1", 0.0, correct=c, labelled=label) for c, label in [(True, True), (None, False)]]
    assert judgement_counts(found) == {"labelled": 1, "graded": 0, "unknown": 1}


def test_auroc_interval_covers_chance_for_noise_and_not_for_signal():
    rng = random.Random(0)
    correct = [rng.random() < 0.4 for _ in range(200)]
    prompts = [i // 4 for i in range(200)]
    noise = [rng.gauss(0, 1) for _ in correct]
    low, high = auroc_interval(noise, correct, prompts)
    assert low < 0.5 < high
    assert low < auroc(noise, correct) < high
    signal = [right + rng.gauss(0, 1) for right in correct]
    low, high = auroc_interval(signal, correct, prompts)
    assert 0.5 < low < auroc(signal, correct) < high


def test_auroc_interval_resamples_prompts():
    """Copies of a trace under its own prompt add no information: the interval stays as wide."""
    rng = random.Random(1)
    correct = [rng.random() < 0.5 for _ in range(40)]
    scores = [0.5 * right + rng.gauss(0, 1) for right in correct]
    once = auroc_interval(scores, correct, range(40))
    copied = auroc_interval(scores * 9, correct * 9, list(range(40)) * 9)
    assert np.allclose(once, copied)
    assert np.isnan(auroc_interval([1.0, 2.0], [True, True], [0, 1])).all()


def test_calibration_of_a_useless_reward_gives_its_reasons():
    rng = random.Random(2)
    correct = [rng.random() < 0.21 for _ in range(400)]
    flat = [rng.gauss(0, 0.3) for _ in correct]
    reasons = list(useless_fit(fit_calibration(flat, correct), flat, correct, range(400)))
    assert len(reasons) == 2
    good = [4 * right + rng.gauss(0, 1) for right in correct]
    assert not list(useless_fit(fit_calibration(good, correct), good, correct, range(400)))
    upside_down = Calibration("platt", slope=-1.0)
    assert list(useless_fit(upside_down, good, correct, range(400)))
