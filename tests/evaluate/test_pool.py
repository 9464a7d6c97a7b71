"""Pools of candidates: reading several formats, scoring, evaluation against independent counts, and the command."""

import gzip
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from helpers.paths import SHARED
from helpers.tiny import launcher
from tracereward.cli import app
from tracereward.data.candidates import read_questions
from tracereward.errors import InputError, RunFailed
from tracereward.evaluate.figures import curve_figure, pool_figures
from tracereward.evaluate.pool import evaluate_pool, pool_tables, score_pool, split_questions
from tracereward.evaluate.pool_data import by_question, read_pool
from tracereward.files import write_jsonl
from tracereward.metrics import bootstrap_interval
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings, read_settings
from tracereward.selection import TEMPERATURES, Candidate, fit_vote_temperature, outcomes, ranking_table
from tracereward.synthetic.arithmetic import generate
from tracereward.tasks.recipes import get_task

GSM8K, MMLU, ARITHMETIC = get_task("gsm8k"), get_task("mmlu_pro"), get_task("arithmetic")


def same(a: str, b: str) -> bool:
    return a == b


def written(path: Path, rows: list) -> str:
    write_jsonl(path, rows)
    return str(path)


# ---------- rows ----------

QUESTIONS = [
    {
        "question": f"Tom has {n} apples and buys {n + 1}. How many?",
        "answer": f"{n} + {n + 1} = {2 * n + 1}\n#### {2 * n + 1}",
    }
    for n in range(4)
]


def test_rows_with_an_id_are_joined_to_the_question_at_that_position(tmp_path):
    """Fields qid, model, reasoning, answer, correct; the questions have no ids, so positions from 0 are used."""
    rows = [
        {"qid": 2, "model": "a", "reasoning": "2 and 3 are 5.", "answer": "5", "correct": True},
        {"qid": 0, "model": "a", "reasoning": "It is 2.\n", "answer": "2", "correct": False},
        {"qid": 2, "model": "b", "reasoning": "Six.\n#### 6", "answer": "6", "correct": False},
        {"qid": 0, "model": "b", "reasoning": "I do not know.", "answer": "", "correct": False},
    ]
    questions = written(tmp_path / "questions.jsonl", QUESTIONS)
    pool = read_pool(written(tmp_path / "pool.jsonl", rows), GSM8K, questions)
    assert [row.question for row in pool] == ["2", "0", "2", "0"]
    assert pool[0].prompt == GSM8K.example(QUESTIONS[2])["prompt"]
    assert "Tom has 2 apples" in pool[0].prompt
    # Reward models are trained on traces that end with an answer: a missing one is appended from the row.
    assert [row.completion for row in pool] == [
        "2 and 3 are 5.\n#### 5",
        "It is 2.\n#### 2",
        "Six.\n#### 6",
        "I do not know.",
    ]
    assert [row.answer for row in pool] == ["5", "2", "6", None]
    assert [row.correct for row in pool] == [True, False, False, False]
    assert [row.model for row in pool] == ["a", "a", "b", "b"]
    assert [[row.where[-1] for row in group] for group in by_question(pool)] == [["1", "3"], ["2", "4"]]


def test_answers_are_verified_against_gold_answers_if_correct_is_missing(tmp_path):
    """1,001 equals 1001, and 3.0 equals 3."""
    questions = written(tmp_path / "questions.jsonl", [{"question": "How many?", "answer": "#### 1,001"}, QUESTIONS[1]])
    rows = [
        {"qid": 0, "reasoning": "x", "answer": "1001"},
        {"qid": 0, "reasoning": "x", "answer": "1010"},
        {"qid": 1, "reasoning": "x", "answer": "3.0"},
        {"qid": 1, "reasoning": "x", "answer": None},
    ]
    pool = read_pool(written(tmp_path / "pool.jsonl", rows), GSM8K, questions)
    assert [row.correct for row in pool] == [True, False, True, False]


def test_multiple_choice_rows_with_their_own_letter(tmp_path):
    """Fields question_id, model, solution, pred, correct; the questions have the ids in another order."""
    questions = [
        {"question_id": 70, "question": "Which?", "options": ["one", "two", "three"], "answer": "B"},
        {"question_id": 12, "question": "What?", "options": ["red", "blue"], "answer": "A"},
    ]
    rows = [
        {"question_id": 12, "model": "m", "solution": "Red is right.", "pred": "A", "correct": True},
        {"question_id": 70, "model": "m", "solution": "So the answer is (C).", "pred": "C", "correct": False},
        {"question_id": 70, "model": "n", "solution": "It goes on and", "pred": None, "correct": False},
    ]
    path = written(tmp_path / "questions.jsonl", questions)
    assert list(read_questions(path, MMLU)) == ["70", "12"]
    pool = read_pool(written(tmp_path / "pool.jsonl", rows), MMLU, path)
    assert pool[0].prompt.startswith("Question: What?\nOptions:\nA. red\nB. blue\n")
    assert pool[0].completion == "Red is right.\nThe answer is (A)."
    assert pool[1].completion == "So the answer is (C)."
    assert (pool[2].completion, pool[2].answer) == ("It goes on and", None)
    assert [MMLU.extract(row.completion) for row in pool] == [row.answer for row in pool]


def test_rows_that_sample_writes(tmp_path):
    """`answer` is the gold answer; the candidate's own is extracted from the trace."""
    base = {"question": 4, "prompt": "1 + 2 = ?\n", "answer": "3", "finished": True, "logprob": -0.5}
    rows = [
        {**base, "completion": "1 + 2 = 3\n#### 3", "extracted": "3", "correct": True},
        {**base, "completion": "1 + 2 = 4\n#### 4", "extracted": "4"},
        {**base, "completion": "1 + 2", "extracted": None, "finished": False, "logprob": -1.5},
    ]
    pool = read_pool(written(tmp_path / "pool.jsonl", rows), ARITHMETIC)
    assert [row.question for row in pool] == ["4"] * 3
    assert [row.correct for row in pool] == [True, False, False]
    assert [row.answer for row in pool] == ["3", "4", None]
    assert [row.completion for row in pool] == [row["completion"] for row in rows]  # never the gold answer
    assert [row.logprob for row in pool] == [-0.5, -0.5, -1.5]
    assert [row.finished for row in pool] == [True, True, False]


def test_id_is_ignored_if_the_row_has_a_prompt(tmp_path):
    """Many data sets number their rows: used as the question's id, it would put each candidate in its own group."""
    rows = [
        {"id": n, "prompt": f"{n // 2} + 1 = ?\n", "completion": "#### 1", "answer": f"{n // 2 + 1}"} for n in range(4)
    ]
    assert [len(group) for group in by_question(read_pool(written(tmp_path / "a.jsonl", rows), ARITHMETIC))] == [2, 2]
    rows = [{**row, "question_id": row["id"] % 2} for row in rows]
    assert [row.question for row in read_pool(written(tmp_path / "b.jsonl", rows), ARITHMETIC)] == ["0", "1", "0", "1"]
    rows = [
        {"id": n, "question": "What?", "options": ["a", "b"], "solution": "x", "pred": "A", "correct": True}
        for n in (1, 2)
    ]
    assert [len(group) for group in by_question(read_pool(written(tmp_path / "c.jsonl", rows), MMLU))] == [2]


def test_equal_ids_with_different_prompts_are_different_questions(tmp_path):
    """Rows 0, 1 of one file and 0, 1 of another are four questions, in any row order."""
    one, two = (
        [{"question": q, "prompt": f"{q} + {n} = ?\n", "completion": "#### 1", "answer": "1"} for q in (0, 1)]
        for n in (5, 6)
    )
    pool = read_pool(written(tmp_path / "a.jsonl", [*one, *two, *one]), ARITHMETIC)
    groups = [[int(row.where.rpartition(":")[2]) for row in group] for group in by_question(pool)]
    assert groups == [[1, 5], [2, 6], [3], [4]]


def test_null_question_is_treated_as_missing(tmp_path):
    rows = [{"question": None, "prompt": f"{n} + 1 = ?\n", "completion": "#### 1", "answer": "1"} for n in (0, 1, 0, 2)]
    pool = read_pool(written(tmp_path / "a.jsonl", rows), ARITHMETIC)
    assert [len(group) for group in by_question(pool)] == [2, 1, 1]
    assert "None" not in {row.question for row in pool}


def test_correct_may_be_0_or_1(tmp_path):
    rows = [{"prompt": "1 + 1 = ?\n", "completion": "#### 2", "correct": value} for value in (1, 0.0, True, False)]
    pool = read_pool(written(tmp_path / "a.jsonl", rows), ARITHMETIC)
    assert [row.correct for row in pool] == [True, False, True, False]
    assert {type(row.correct) for row in pool} == {bool}


def test_trailing_white_space_of_a_trace_is_kept(tmp_path):
    """`score` and `rerank` keep it too; it is stripped only before an appended answer."""
    rows = [{"prompt": "1 + 1 = ?\n", "completion": text, "answer": "2"} for text in ("#### 2\n\n", "two \n")]
    rows[1]["extracted"] = "2"
    pool = read_pool(written(tmp_path / "a.jsonl", rows), ARITHMETIC)
    assert [row.completion for row in pool] == ["#### 2\n\n", "two\n#### 2"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"qid": 1, "answer": "3", "correct": True},
            "no trace; put it in one of the fields completion, candidate, reasoning",
        ),
        ({"qid": 9, "reasoning": "x", "answer": "3"}, "question '9' is not in --questions"),
        ({"reasoning": "x", "answer": "3"}, "question None is not in --questions; ids are read from question_id"),
    ],
)
def test_invalid_rows_with_questions_are_located(tmp_path, row, message):
    questions = written(tmp_path / "questions.jsonl", QUESTIONS)
    good = {"qid": 1, "reasoning": "x", "answer": "3", "correct": True}
    data = written(tmp_path / "pool.jsonl", [good, row])
    with pytest.raises(InputError) as caught:
        read_pool(data, GSM8K, questions)
    assert str(caught.value).startswith(f"{data}:2: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"qid": 1, "reasoning": "x", "answer": "3"}, "no prompt or question; pass --questions"),
        ({"prompt": "1 + 2 = ?\n", "completion": "#### 3"}, "neither correct (true or false) nor a gold answer"),
        ({"prompt": "1 + 2 = ?\n", "reasoning": "x", "answer": "3"}, "neither correct (true or false) nor a gold"),
        ({"question": "1?", "solution": "x", "correct": True}, "is missing for task 'mmlu_pro'"),
        ({"prompt": 5, "completion": "x", "correct": True}, "field 'prompt' is int, neither text nor a list"),
        ({"prompt": " ", "completion": "x", "correct": True}, "field 'prompt' is empty"),
        ({"prompt": "1?", "completion": "x", "answer": {"a": 1}}, "field 'answer' is dict, not text"),
        ({"prompt": "1?", "completion": "x", "answer": "", "correct": None}, "neither correct (true or false)"),
        (
            {"prompt": "1?", "completion": "x", "answer": "1", "correct": "no"},
            "correct must be true or false, not",
        ),
        ({"prompt": "1?", "completion": "x", "answer": "1", "finished": 0}, "finished must be true or false, not 0"),
        (
            {"prompt": "1?", "completion": "x", "answer": "1", "logprob": "low"},
            "logprob must be a finite number",
        ),
        (
            {"prompt": "1?", "completion": "x", "answer": "1", "logprob": math.nan},
            "logprob must be a finite number",
        ),
    ],
)
def test_invalid_rows_are_located(tmp_path, row, message):
    task = MMLU if "question" in row else GSM8K
    data = tmp_path / "pool.jsonl"
    data.write_text("\n" + json.dumps(row) + "\n")  # blank lines count
    with pytest.raises(InputError) as caught:
        read_pool(str(data), task)
    assert str(caught.value).startswith(f"{data}:2: ")
    assert message in str(caught.value)
    data.write_text("")
    with pytest.raises(InputError, match="no rows"):
        read_pool(str(data), task)


def test_limit_counts_rows(tmp_path):
    rows = [{"prompt": "1 + 2 = ?\n", "completion": f"#### {n}", "answer": "3"} for n in range(5)]
    assert [row.answer for row in read_pool(written(tmp_path / "p.jsonl", rows), ARITHMETIC, limit=2)] == ["0", "1"]


# ---------- scores ----------


def arithmetic_pool(count: int, seed: int) -> list[dict]:
    """Four candidates of each problem, some correct: two full ones, one only an answer, one without."""
    rows = []
    for q, row in enumerate(generate("misconception", count, seed=seed)):
        wrong = str(int(row["answer"]) + 1)
        lines = row["completion"].split("\n")
        texts = [
            row["completion"],
            "\n".join([*lines[:-1], f"#### {wrong}"]),
            f"#### {row['answer'] if q % 2 else wrong}",
            lines[0],
        ]
        for model, text in zip("abcd", texts, strict=True):
            rows.append(
                {"question": q, "prompt": row["prompt"], "completion": text, "answer": row["answer"], "model": model}
            )
    return rows


@pytest.fixture(scope="module")
def reward_model(tiny_model_folder, tokenizer):
    settings = RewardSettings(head="action", aggregate="min", beta_clip=50.0, task="arithmetic")
    model = TokenRewardModel.from_backbone(str(tiny_model_folder), settings, tokenizer)
    with torch.no_grad():
        model.head.w.copy_(torch.linspace(-1, 1, len(model.head.w)))
    return model.eval()


def test_candidate_rewards_equal_those_of_score(tmp_path, reward_model, tokenizer, tiny_model_folder):
    """Grouped by question in file order; log-probs match a plain forward pass of the policy in float64."""
    rows = arithmetic_pool(6, seed=1)
    rows = [*rows[::2], *rows[1::2]]
    pool = read_pool(written(tmp_path / "pool.jsonl", rows), ARITHMETIC)
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    questions, left_out = score_pool(reward_model, pool, policy)
    assert left_out == 0
    order = [row for q in range(6) for row in rows if row["question"] == q]
    flat = [c for candidates in questions for c in candidates]
    assert [len(candidates) for candidates in questions] == [4] * 6
    assert [(c.text, c.model) for c in flat] == [(row["completion"], row["model"]) for row in order]
    expected = reward_model.score([row["prompt"] for row in order], [row["completion"] for row in order])
    assert [c.reward for c in flat] == pytest.approx([min(scores.rewards) for scores in expected], abs=1e-4)
    assert [c.length for c in flat] == [len(row["completion"]) for row in order]  # as `rerank` counts
    for c, row in zip(flat, order, strict=True):
        prompt, ids = encode_prompt(tokenizer, row["prompt"]), encode_completion(tokenizer, row["completion"])
        with torch.no_grad():
            log_probs = policy(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
        mean = np.mean([float(log_probs[len(prompt) + t - 1, token]) for t, token in enumerate(ids)])
        assert c.logprob == pytest.approx(mean, abs=1e-5)
    assert all(c.logprob is None for q in score_pool(reward_model, pool)[0] for c in q)


def test_long_and_empty_traces_are_skipped_and_counted(tmp_path, reward_model):
    """128 positions. A question without remaining candidates is dropped; the order is kept."""
    rows = arithmetic_pool(3, seed=2)
    for index in (1, 4, 5, 6, 7):
        rows[index]["completion"] = "\n" * 140 + "#### 1"
    rows[9] = {**rows[9], "completion": "", "finished": False}  # nothing to score
    pool = read_pool(written(tmp_path / "pool.jsonl", rows), ARITHMETIC)
    questions, left_out = score_pool(reward_model, pool)
    assert left_out == 6
    kept = [[rows[i]["completion"] for i in group] for group in ((0, 2, 3), (8, 10, 11))]
    assert [[c.text for c in candidates] for candidates in questions] == kept


def test_other_encoding_errors_are_not_suppressed(tmp_path, reward_model, monkeypatch):
    def fail(trace, limit):
        raise InputError(f"{trace.where}: another error")

    pool = read_pool(written(tmp_path / "pool.jsonl", arithmetic_pool(1, seed=2)), ARITHMETIC)
    monkeypatch.setattr(reward_model, "encode", fail)
    with pytest.raises(InputError, match=r":1: another error"):
        score_pool(reward_model, pool)


def test_shorter_context_of_the_policy_sets_the_limit(tmp_path, reward_model, tiny_model_folder):
    pool = read_pool(written(tmp_path / "pool.jsonl", arithmetic_pool(3, seed=2)), ARITHMETIC)
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    sizes = [len(encode_prompt(reward_model.tokenizer, row.prompt)) for row in pool]
    sizes = [n + len(encode_completion(reward_model.tokenizer, row.completion)) for n, row in zip(sizes, pool)]
    policy.config.max_position_embeddings = sorted(sizes)[5]
    assert score_pool(reward_model, pool, policy)[1] == sum(size > sorted(sizes)[5] for size in sizes) > 0


def test_nan_rewards_and_log_probs_raise(tmp_path, reward_model, tiny_model_folder):
    rows = arithmetic_pool(2, seed=2)
    data = written(tmp_path / "pool.jsonl", rows)
    pool = read_pool(data, ARITHMETIC)
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    broken = TokenRewardModel(policy, reward_model.tokenizer, reward_model.settings)
    broken.head.w.data[0] = math.nan
    with pytest.raises(RunFailed, match=f"{data}:1: the model gives a reward that is not finite"):
        score_pool(broken.eval(), pool)
    policy.lm_head.weight.data[0] = math.nan
    with pytest.raises(RunFailed, match=f"{data}:1: the model gives a log-prob that is not finite"):
        score_pool(reward_model, pool, policy)


def test_share_of_the_questions_is_used_for_fitting():
    questions = [[Candidate(str(n), None, 0.0)] for n in range(11)]
    for share, count in ((0.5, round(5.5)), (0.3, 3), (0.9, 10)):
        fit, rest = split_questions(questions, share, seed=1)
        assert len(fit) == count
        assert sorted(int(q[0].text) for q in [*fit, *rest]) == list(range(11))
        assert fit == sorted(fit, key=lambda q: int(q[0].text))
    assert split_questions(questions, 0.5, 1) == split_questions(questions, 0.5, 1)
    assert len({str(split_questions(questions, 0.5, seed)) for seed in range(5)}) > 1


# ---------- the result ----------


def made(count: int, seed: int, n: int = 6) -> list[list[Candidate]]:
    """Candidates whose log-odds of being correct are twice their reward minus 0.5; models differ in accuracy."""
    rng = np.random.default_rng(seed)
    found = []
    for q in range(count):
        rows = []
        for k in range(n):
            reward = float(rng.normal(0.4 * k - 1, 1))
            right = bool(rng.random() < 1 / (1 + math.exp(0.5 - 2 * reward)))
            answer = "1" if right else str(rng.integers(2, 4))
            rows.append(
                Candidate(f"{q} {k}", answer, reward, -float(rng.random()), int(rng.integers(5, 60)), right, f"m{k}")
            )
        found.append(rows)
    return found


def test_result_matches_independent_computations():
    judged, fit = made(80, 1), made(60, 2)
    result = evaluate_pool(judged, fit, same, seed=5)
    flat = [c for candidates in judged for c in candidates]
    rewards, correct = np.array([c.reward for c in flat]), np.array([c.correct for c in flat])
    assert (result["questions"], result["candidates"], result["fit_questions"]) == (80, 480, 60)
    assert result["correct"] == pytest.approx(correct.mean())
    temperature = fit_vote_temperature(fit, same)
    assert result["vote_temperature"] == temperature
    assert [row["accuracy"] for row in result["ranking"]] == [
        row.accuracy for row in ranking_table(judged, same, 5, temperature)
    ]
    for row in result["ranking"]:
        last = [6, row["accuracy"], row["low"], row["high"]]
        assert result["curves"][row["method"]][-1] == pytest.approx(last)

    found = result["discrimination"]
    assert list(found) == ["reward", "log-prob", "reward + log-prob", "shortest", "which model"]
    u = stats.mannwhitneyu(rewards[correct], rewards[~correct]).statistic
    assert found["reward"]["auroc"] == pytest.approx(u / (correct.sum() * (~correct).sum()))
    lengths = np.array([c.length for c in flat])
    u = stats.mannwhitneyu(-lengths[correct], -lengths[~correct]).statistic
    assert found["shortest"]["auroc"] == pytest.approx(u / (correct.sum() * (~correct).sum()))
    assert found["which model"]["auroc"] > 0.6  # later models are better
    assert result["reward_length"]["pearson"] == pytest.approx(np.corrcoef(rewards, lengths)[0, 1])
    ranks = np.corrcoef(stats.rankdata(rewards), stats.rankdata(lengths))[0, 1]
    assert result["reward_length"]["spearman"] == pytest.approx(ranks)
    assert sorted(result["rewards"]["correct"]) == pytest.approx(sorted(rewards[correct]))
    assert sorted(result["rewards"]["wrong"]) == pytest.approx(sorted(rewards[~correct]))


def test_calibration_fitted_on_other_questions_reduces_errors():
    """The sigmoid of the reward is too flat; the true calibration has slope 2 and intercept -0.5."""
    result = evaluate_pool(made(200, 1), made(300, 2), same)["calibration"]
    assert list(result) == ["none", "platt", "temperature", "isotonic"]
    assert result["platt"]["ece"] < 0.05 < result["none"]["ece"]
    assert result["platt"]["brier"] < result["none"]["brier"]
    assert result["platt"]["log_loss"] < result["temperature"]["log_loss"] < result["none"]["log_loss"]
    flat = [c for candidates in made(200, 1) for c in candidates]
    p = [1 / (1 + math.exp(-c.reward)) for c in flat]
    brier = np.mean([(a - c.correct) ** 2 for a, c in zip(p, flat, strict=True)])
    assert result["none"]["brier"] == pytest.approx(brier)
    assert sum(b["count"] for b in result["isotonic"]["bins"]) == len(flat)


def test_undefined_metrics_are_null_and_large_rewards_are_accepted():
    """No log-probs or model names, equal lengths, all evaluated traces wrong, and rewards of a large clip."""
    fit = made(20, 3)
    wrong = [
        [replace(c, correct=False, logprob=None, model=None, length=7, reward=1e4 * c.reward) for c in candidates]
        for candidates in made(10, 4)
    ]
    result = evaluate_pool(wrong, fit, same)
    assert list(result["discrimination"]) == ["reward", "shortest"]
    assert set(result["discrimination"]["reward"].values()) == {None}
    assert result["reward_length"] == {"pearson": None, "spearman": None}
    assert "NaN" not in json.dumps(result)
    tables = pool_tables(result)
    assert "undefined" in tables[1].note
    assert tables[0].rows[0][1] == 0.0


def test_fit_set_of_one_class_skips_only_the_calibrations():
    """The other results do not change; the temperature of the vote is the highest, for lack of information."""
    judged, fit = made(30, 1), made(20, 2)
    full = evaluate_pool(judged, fit, same)
    assert full["uncalibrated"] is None
    for right, message in ((False, "0 right and 120 wrong"), (True, "120 right and 0 wrong")):
        one_kind = [[replace(c, correct=right) for c in candidates] for candidates in fit]
        result = evaluate_pool(judged, one_kind, same)
        assert message in result["uncalibrated"]
        assert result["calibration"] == {"none": full["calibration"]["none"]}
        assert result["vote_temperature"] == max(TEMPERATURES)
        for part in ("correct", "discrimination", "reward_length", "rewards"):
            assert result[part] == full[part]
        *_, table = pool_tables(result)
        assert [row[0] for row in table.rows] == ["sigmoid of the reward"]
        assert message in table.note
        assert [figure["title"] for figure in pool_figures(result)][-1] == "Reliability"


def test_flat_and_single_point_curves_can_be_plotted():
    """All methods always correct, and one candidate per question: figures without warnings."""
    right = [[replace(c, correct=True) for c in candidates] for candidates in made(12, 1)]
    for judged in (right, [candidates[:1] for candidates in right]):
        for figure in pool_figures(evaluate_pool(judged, made(20, 2), same)):
            assert "<svg" in figure["svg"]
    lines = {f"method {k}": [(n, 0.5 + 1e-4 * k, 0.4, 0.6) for n in (1, 2)] for k in range(12)}
    assert "<svg" in curve_figure(lines)  # labels need more room than the lines


def test_curves_at_one_candidate_equal_the_mean_accuracy():
    """Exactly the mean over questions of their share of correct candidates; questions have unequal sizes."""
    judged = [rows[: 2 + q % 5] for q, rows in enumerate(made(40, 1))]
    shares = [np.mean([c.correct for c in rows]) for rows in judged]
    curves = evaluate_pool(judged, made(20, 2), same, seed=3)["curves"]
    assert len(curves) > 10
    for points in curves.values():
        assert [point[0] for point in points] == [1, 2, 4, 6]
        assert points[0] == pytest.approx([1, np.mean(shares), *bootstrap_interval(shares, 3)], abs=1e-12)


# ---------- the command ----------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, reward_model):
    found = tmp_path_factory.mktemp("pool")
    reward_model.save_pretrained(found / "rm")
    write_jsonl(found / "pool.jsonl", arithmetic_pool(16, seed=5))
    write_jsonl(found / "fit.jsonl", arithmetic_pool(8, seed=6))
    return found


def test_command_writes_json_and_a_report(folder, tiny_model_folder, tmp_path):
    words = ["evaluate", "pool", folder / "rm", folder / "pool.jsonl", "--policy", tiny_model_folder, "--seed", 2]
    done = launcher()(*words, "--fit", folder / "fit.jsonl", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert json.loads((tmp_path / "out" / "pool.json").read_text()) == result
    assert (result["questions"], result["candidates"], result["fit_questions"]) == (16, 64, 8)
    # a is always correct, b and d never, c in every other question.
    accuracy = {row["method"]: row["accuracy"] for row in result["ranking"]}
    assert accuracy["mean"] == result["correct"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert accuracy["oracle"] == accuracy["model"] == 1.0
    assert accuracy["majority"] == 0.5
    assert result["no_answer"] == 16
    page = (tmp_path / "out" / "pool.html").read_text()
    for text in ("Choosing one of the candidates", "Accuracy over the number of candidates", "Reliability", "<svg"):
        assert text in page


def test_command_splits_the_questions(folder, tmp_path):
    done = launcher()("evaluate", "pool", folder / "rm", folder / "pool.jsonl", "--fit-share", 0.25, "-o", tmp_path)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "pool.json").read_text())
    assert (result["questions"], result["fit_questions"]) == (12, 4)
    assert "12 questions, 48 candidates" in done.out
    assert "log-prob" not in result["discrimination"]


def test_command_reports_that_it_cannot_calibrate(folder, tmp_path):
    right = [{**row, "correct": True} for row in arithmetic_pool(8, seed=6)]
    data = written(tmp_path / "right.jsonl", right)
    done = launcher()("evaluate", "pool", folder / "rm", data, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    message = "cannot calibrate on 16 right and 0 wrong traces"
    assert f"{data}: no calibrations: {message}" in done.err
    assert message in (tmp_path / "out" / "pool.html").read_text()


@pytest.mark.parametrize("method", ["platt", "temperature", "isotonic"])
def test_calibrate_warns_if_wrong_traces_have_higher_rewards(folder, tmp_path, reward_model, method):
    """The lower half of the rewards is labelled correct, except one trace at the top; the AUROC is computed by hand."""
    reward_model.save_pretrained(tmp_path / "rm")
    rows = arithmetic_pool(16, seed=5)
    scores = reward_model.score([row["prompt"] for row in rows], [row["completion"] for row in rows])
    order = np.argsort([min(one.rewards) for one in scores])
    for rank, index in enumerate(order):
        rows[index]["correct"] = bool(rank < 31 or rank == 63)
    data = written(tmp_path / "labelled.jsonl", rows)
    done = launcher()("calibrate", tmp_path / "rm", data, "--method", method)
    assert done.code == 0, done.err
    fitted = json.loads(done.out)
    assert f"warning: {data}: the reward does not rise with correctness beyond chance (AUROC" in done.err
    assert f"{32 / (32 * 32):.3f} of 32 right and 32 wrong traces" in done.err
    assert (f"slope {fitted['slope']:.3g}" in done.err) == (method != "isotonic")
    for row in rows:
        row["correct"] = not row["correct"]
    done = launcher()(
        "calibrate", tmp_path / "rm", written(tmp_path / "other.jsonl", rows), "--method", method, "--overwrite"
    )
    assert done.code == 0, done.err
    assert "warning" not in done.err


def test_score_uses_the_stored_calibration(folder, tmp_path, reward_model):
    """The probability of each trace is the fitted sigmoid of its reward; the rest of the output does not change."""
    reward_model.save_pretrained(tmp_path / "rm")
    before = launcher()("score", tmp_path / "rm", folder / "pool.jsonl")
    done = launcher()("calibrate", tmp_path / "rm", folder / "pool.jsonl")
    assert done.code == 0, done.err
    assert "No rule for the first error, so no step is marked: " in done.err
    printed = json.loads(done.out)
    stored = read_settings(tmp_path / "rm").calibration
    assert (printed["method"], printed["traces"], printed["slope"]) == ("platt", 64, stored.slope)
    after = launcher()("score", tmp_path / "rm", folder / "pool.jsonl")
    for old, new in zip(before.out.splitlines(), after.out.splitlines(), strict=True):
        row = json.loads(new)
        probability = row.pop("probability")
        assert row == json.loads(old)
        assert probability == pytest.approx(
            1 / (1 + math.exp(-printed["slope"] * row["reward"] - printed["intercept"]))
        )


def test_commands_reject_invalid_input(folder, tmp_path, monkeypatch, capsys):
    def run(*argv):
        monkeypatch.setattr("sys.argv", ["tracereward", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    model, pool = folder / "rm", folder / "pool.jsonl"
    out = ["-o", tmp_path / "out"]
    assert "did you mean 'platt'" in run("calibrate", model, pool, "--method", "plat")
    assert "did you mean 'arithmetic'" in run("evaluate", "pool", model, pool, "--task", "arithmetics")
    assert "no such file" in run("evaluate", "pool", model, pool, "--questions", tmp_path / "none.jsonl")
    assert "not a reward model" in run("evaluate", "pool", tmp_path, pool)
    one = written(tmp_path / "one.jsonl", arithmetic_pool(1, seed=1))
    assert "too few questions, 1," in run("evaluate", "pool", model, one, *out)
    found = run("evaluate", "pool", model, pool, "--fit", pool, *out)
    assert f"{pool}:1: its question is judged too, in {pool}:" in found
    long = [{**row, "completion": "\n" * 140 + "#### 1"} for row in arithmetic_pool(4, seed=2)]
    long = written(tmp_path / "long.jsonl", long)
    for command in (["evaluate", "pool"], ["calibrate"]):
        found = run(*command, model, long, *(out if "pool" in command else []))
        assert f"{long}:1: from here on none of 16 traces can be scored" in found
        assert "128 positions" in found
    asked = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in arithmetic_pool(1, seed=2)]
    listed = written(tmp_path / "listed.jsonl", asked)
    found = run("evaluate", "pool", model, listed, *out)
    assert f"\ntracereward: {listed}:1: the prompt is a list of messages" in f"\n{found}"
    for option, value in (("--fit-share", "nan"), ("--seed", -1), ("--limit", 0)):
        assert option in run("evaluate", "pool", model, pool, option, value, *out)
    assert f"{one}: is a file, not a folder" in run("evaluate", "pool", model, pool, "-o", Path(one) / "out")
    assert f"{one}: cannot calibrate on 1 right and 3 wrong traces" in run("calibrate", model, one)
    assert not (tmp_path / "out").exists()


# ---------- real pools ----------


def vote_counts(rows, right) -> float:
    """Share of questions whose most frequent answer is correct; the mean over ties."""
    total = 0.0
    questions: dict = {}
    for question, answer, correct in rows:
        questions.setdefault(question, []).append((answer, correct))
    for given in questions.values():
        counts = Counter(answer for answer, _ in given if answer is not None)
        most = max(counts.values(), default=0)
        winners = [answer for answer, count in counts.items() if count == most]
        total += sum(right(given, answer) for answer in winners) / len(winners) if winners else 0.0
    return total / len(questions)


def accuracies(pool, task) -> tuple[float, int]:
    questions = [
        [Candidate(r.completion, r.answer, 0.0, None, 0, r.correct, r.model) for r in group]
        for group in by_question(pool)
    ]
    values = outcomes(questions, "majority", task.equal)
    return sum(values) / len(values), len(values)


@pytest.mark.long
def test_majority_vote_of_sixteen_models_on_gsm8k():
    """Plain counting agrees up to ties and numbers with two spellings ("5" and "5.0")."""
    source, questions = SHARED / "zeroeval_gsm8k" / "pool_even.jsonl.gz", SHARED / "gsm8k" / "test.jsonl.gz"
    if not (source.exists() and questions.exists()):
        pytest.skip(f"needs the shared data sets {source} and {questions}")
    pool = read_pool(str(source), GSM8K, str(questions))
    with gzip.open(source, "rt") as lines:
        raw = [json.loads(line) for line in lines]
    assert len(pool) == len(raw)
    assert [row.correct for row in pool] == [row["correct"] for row in raw]
    assert {len(group) for group in by_question(pool)} == {16}
    plain = [(r["qid"], str(r["answer"]).replace(",", "").strip() or None, r["correct"]) for r in raw]
    expected = vote_counts(plain, lambda given, answer: any(c for a, c in given if a == answer))
    found, count = accuracies(pool, GSM8K)
    assert count == len({r["qid"] for r in raw})
    assert found == pytest.approx(expected, abs=0.02)
    assert found > np.mean([r["correct"] for r in raw])
    # Each trace now states its row's answer in the task's form, except sentences such as "There is not enough
    # information", which are no answers.
    stated = sum(GSM8K.extract(row.completion) is not None for row in pool)
    answered = sum(row.answer is not None for row in pool)
    assert 0.99 * answered < stated <= answered


def test_majority_vote_of_ten_models_on_mmlu_pro():
    """Letters are exact: only ties can differ, which go to the first in the file or count as a mean."""
    source, questions = SHARED / "mmlu_pro" / "solutions_10_models.jsonl.gz", SHARED / "mmlu_pro" / "questions.jsonl.gz"
    if not (source.exists() and questions.exists()):
        pytest.skip(f"needs the shared data sets {source} and {questions}")
    pool = read_pool(str(source), MMLU, str(questions))
    with gzip.open(source, "rt") as lines:
        raw = [json.loads(line) for line in lines]
    with gzip.open(questions, "rt") as lines:
        gold = {row["question_id"]: row["answer"] for row in map(json.loads, lines)}
    # A trace may state a letter although its row has no pred; the row's pred has priority.
    plain = [(r["question_id"], r["pred"] or p.answer, None) for r, p in zip(raw, pool, strict=True)]
    assert [p.answer for p in pool] == [answer for _, answer, _ in plain]
    by_id: dict = {}
    for question, answer, _ in plain:
        by_id.setdefault(question, []).append(answer)
    low = high = first = 0
    for question, given in by_id.items():
        counts = Counter(answer for answer in given if answer is not None)
        winners = [answer for answer, count in counts.items() if count == max(counts.values())]
        low += winners == [gold[question]]
        high += gold[question] in winners
        first += bool(winners) and winners[0] == gold[question]  # a Counter keeps insertion order
    found, count = accuracies(pool, MMLU)
    assert count == len(by_id) == len(gold)
    assert low <= found * count <= high
    assert found == pytest.approx(first / count)
