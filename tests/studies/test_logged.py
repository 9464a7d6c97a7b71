"""The study of logged traces: labels of an arm, no leak between folds, measures by brute force, and the page."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from helpers.paths import ROOT
from studies.measures import logged, logged_lora
from studies.measures.logged import Arm
from studies.pages.logged import write_page
from studies.setup.logged_pool import LoggedPool, load_pool
from tracereward.data.candidates import CandidateRow
from tracereward.files import read_jsonl, write_jsonl
from tracereward.synthetic.arithmetic import build_model, build_tokenizer, generate
from tracereward.tasks.recipes import get_task

SKILL = {"a": 0.9, "b": 0.7, "c": 0.5, "d": 0.4}


def pool_of(questions: int = 30, solutions: bool = True, seed: int = 0) -> LoggedPool:
    """Traces whose first feature tells right from wrong, with noise; wrong answers differ."""
    rng = np.random.default_rng(seed)
    rows, numbers, models, correct = [], [], [], []
    for question in range(questions):
        for model in [*SKILL, *([""] if solutions else [])]:
            right = not model or rng.random() < SKILL[model]
            answer = "1" if right else str(rng.integers(2, 4))
            rows.append(
                CandidateRow(
                    where=f"{question}",
                    question=str(question),
                    prompt=f"question {question}",
                    completion=f"{model} thinks\n#### {answer}",
                    answer=answer,
                    correct=right,
                    labelled=True,
                    model=model or None,
                    logprob=None,
                    finished=True,
                )
            )
            numbers.append(question)
            models.append(model)
            correct.append(right)
    states = rng.normal(size=(len(rows), 1, 5))
    states[:, 0, 0] += np.where(correct, 1.0, -1.0)
    return LoggedPool(
        task=get_task("gsm8k"),
        rows=rows,
        questions=np.array(numbers),
        models=np.array(models),
        correct=np.array(correct),
        lengths=rng.integers(5, 50, len(rows)),
        states=torch.tensor(states, dtype=torch.float32),
        layers=[1],
        log_probs=rng.normal(size=len(rows)),
        seconds=None,
        asked=questions,
    )


@pytest.mark.parametrize("experts", ["human", "strongest"])
def test_labels_of_an_arm_compare_with_the_experts_of_the_training_questions(experts):
    pool = pool_of()
    fold = logged.outer_folds(pool)[0]
    assert fold.ranked[0] == "a"
    expert = "" if experts == "human" else "a"
    others = fold.train & (pool.models != expert) & (pool.models != "")
    stated = {
        int(q): row.answer for row, q, m in zip(pool.rows, pool.questions, pool.models, strict=True) if m == expert
    }
    agrees = np.array([row.answer == stated[int(q)] for row, q in zip(pool.rows, pool.questions, strict=True)])
    own = fold.train & (pool.models == expert)
    for rule, positives, negatives in [
        ("expert/all", own, others),
        ("expert/disagreeing", own, others & ~agrees),
        ("agreeing/disagreeing", own | (others & agrees), others & ~agrees),
        (logged.GOLD, own | (others & pool.correct), others & ~pool.correct),
    ]:
        chosen, examples = logged.labelled(pool, fold, Arm(experts=experts, rule=rule))
        assert set(chosen[examples.labels]) == set(np.flatnonzero(positives)), rule
        assert set(chosen[~examples.labels]) == set(np.flatnonzero(negatives)), rule
    chosen, examples = logged.labelled(pool, fold, Arm(experts=experts, joined=False))
    assert set(chosen[examples.labels]) == set(np.flatnonzero(others & agrees))


def test_nothing_of_a_test_question_changes_its_scores():
    pool = pool_of()
    fold = logged.outer_folds(pool)[0]
    scores = logged.fit_fold(pool, fold, Arm()).scores
    flipped = [
        row if train else dataclasses.replace(row, answer="7", completion="#### 7", correct=not row.correct)
        for row, train in zip(pool.rows, fold.train, strict=True)
    ]
    other = dataclasses.replace(pool, rows=flipped, correct=np.where(fold.train, pool.correct, ~pool.correct))
    found = logged.fit_fold(other, logged.outer_folds(other)[0], Arm()).scores
    np.testing.assert_array_equal(scores, found)


def test_a_training_question_is_scored_by_a_head_that_has_not_seen_it():
    """Features without a signal: heads that saw a question would separate its traces."""
    pool = pool_of(questions=20)
    noise = torch.tensor(np.random.default_rng(1).normal(size=(len(pool.rows), 1, 60)), dtype=torch.float32)
    pool = dataclasses.replace(pool, states=noise, _values={})
    fold = logged.outer_folds(pool)[0]
    fitted = logged.fit_fold(pool, fold, Arm())
    members = fold.train & (pool.models != "")
    seen = pool.scores([1], fitted.readout.weight)
    gap = {
        name: values[members & pool.correct].mean() - values[members & ~pool.correct].mean()
        for name, values in {"seen": (seen - seen.mean()) / seen.std(), "unseen": fitted.scores}.items()
    }
    assert gap["seen"] > 1
    assert abs(gap["unseen"]) < 0.5


def test_an_arm_reads_one_layer_or_the_mean_of_all_or_the_better_of_both():
    """The second layer holds the first one's states mirrored, and the third one's are noise."""
    pool = pool_of()
    noise = torch.tensor(np.random.default_rng(2).normal(size=pool.states.shape), dtype=torch.float32)
    states = torch.cat([pool.states, pool.states.flip(2), noise], 1)
    pool = dataclasses.replace(pool, states=states, layers=[1, 2, 3], _values={})
    fold = logged.outer_folds(pool)[0]
    one, mean, best = (logged.fit_fold(pool, fold, Arm(layers=layers)) for layers in ("one", "mean", "any"))
    assert one.readout.layers in ((1,), (2,))
    assert mean.readout.layers == (1, 2, 3)
    assert best.readout.chosen.auroc == max(one.readout.chosen.auroc, mean.readout.chosen.auroc)
    values = sum(pool.states[:, place].numpy() @ row for place, row in enumerate(mean.readout.weight))
    assert pool.scores([1, 2, 3], mean.readout.weight) == pytest.approx(values, abs=1e-5)
    assert mean.readout.weight[1] == pytest.approx(mean.readout.weight[0][::-1], abs=1e-3)


def test_measures_are_those_of_a_brute_force():
    pool = pool_of()
    folds = logged.outer_folds(pool)
    free = logged.measure_free(pool, folds)
    row = logged.arm_row(pool, folds, free, Arm())
    aurocs, best, majority = {}, {}, {}
    for fold in folds:
        scores = logged.fit_fold(pool, fold, Arm()).scores
        for question in np.unique(pool.questions[fold.test]):
            here = np.flatnonzero(fold.test & (pool.questions == question))
            best[question] = pool.correct[here[scores[here].argmax()]]
            answers = [pool.rows[i].answer for i in here]
            majority[question] = max(answers, key=answers.count) == "1"  # ties: the first one given
            wins = [
                (scores[i] > scores[j]) + (scores[i] == scores[j]) / 2
                for i in here[pool.correct[here]]
                for j in here[~pool.correct[here]]
            ]
            if wins:
                aurocs[question] = np.mean(wins)
    found = row["pools"]["all"]["reward"]
    assert len(best) == 30
    assert found["auroc"][0] == pytest.approx(np.mean(list(aurocs.values())), abs=1e-5)
    assert found["best"][0] == pytest.approx(np.mean(list(best.values())), abs=1e-5)
    assert found["auroc"][0] > 0.8
    shares = logged.free_row(pool, folds, free)["pools"]["all"]
    assert shares["majority"]["best"][0] == pytest.approx(np.mean(list(majority.values())), abs=1e-5)
    expected = found["vote"][0] - shares["majority"]["best"][0]
    assert found["vote difference"][0] == pytest.approx(expected, abs=1e-5)
    assert shares["log-prob"]["auroc difference"] == [0, 0, 0]
    over = found["tuned vote"][0] - shares["log-prob"]["tuned vote"][0]
    assert found["tuned vote over log-prob's"][0] == pytest.approx(over, abs=2e-5)
    gap = found["auroc"][0] - shares["log-prob"]["auroc"][0]
    assert found["auroc difference"][0] == pytest.approx(gap, abs=2e-5)


def test_page_is_made_of_results_alone(tmp_path, monkeypatch):
    from studies.logged import run

    monkeypatch.setattr(logged, "SIZES", (8,))
    monkeypatch.setattr(logged, "REPEATS", 1)
    arms = logged.arms(False)[4:5]
    path = tmp_path / "logged.jsonl"
    run(pool_of(solutions=False), "tiny", path, arms, minutes=90)
    rows = read_jsonl(path)
    assert [row["arm"] for row in rows] == ["curves", "no reward", "strongest, agreeing/disagreeing, pairwise"]
    run(pool_of(solutions=False), "tiny", path, arms, minutes=90)
    assert read_jsonl(path) == rows  # stored arms are not run again
    write_page(tmp_path / "logged.md", rows)
    text = (tmp_path / "logged.md").read_text()
    assert "30 questions, 120 candidates" in text
    assert "took 90 minutes" in text
    auroc = 100 * rows[2]["pools"]["weaker"]["reward"]["auroc"][0]
    assert f"| strongest, agreeing/disagreeing, pairwise | {auroc:.1f} (" in text
    assert (tmp_path / "logged-gsm8k-tiny.png").exists()


def test_adapters_that_have_not_moved_score_as_the_read_out(tmp_path, monkeypatch):
    """Features that are computed and kept, and a model with adapters that reads the traces again: two ways."""
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    pool_file, questions_file = tmp_path / "pool.jsonl", tmp_path / "questions.jsonl"
    questions = list(generate("misconception", 15, seed=1))
    write_jsonl(questions_file, [{**row, "question_id": str(number)} for number, row in enumerate(questions)])
    candidates = []
    for number, row in enumerate(questions):
        for model, shift in (("a", 0), ("b", 1), ("c", number % 2)):
            stated = row["completion"].rpartition("#### ")[0] + f"#### {int(row['answer']) + shift}"
            candidates.append({"question_id": str(number), "model": model, "reasoning": stated, "correct": shift == 0})
    write_jsonl(pool_file, candidates)
    chosen = functools.partial(logged_lora.split, learn=9)
    files, task, cache = (str(pool_file), str(questions_file)), get_task("arithmetic"), tmp_path / "states"
    pool = load_pool(files, task, str(tmp_path / "tiny"), cache, template="plain", chosen=chosen)
    assert len(set(pool.questions.tolist())) == 3 + 9
    monkeypatch.setattr(logged_lora, "UPDATES", 1)
    monkeypatch.setattr(logged_lora, "RATE", 1e-12)
    arm = logged_lora.ARMS[0]
    row = logged_lora.lora_row(pool, arm, questions=files[1], model=str(tmp_path / "tiny"), states=cache)
    assert row["tested on"] == 3
    assert row["scores"]["LoRA"]["auroc minus read-out's"] == pytest.approx([0, 0, 0])
    train = logged.question_folds(15)[pool.questions] != 0
    accuracy = logged.accuracies(pool, train)
    assert accuracy == pytest.approx({"a": 1, "b": 0, "c": np.mean(pool.correct[train & (pool.models == "c")])})


def test_published_page_matches_results(tmp_path):
    published = ROOT / "docs" / "studies" / "logged.md"
    if not published.exists():
        pytest.skip("not published")
    write_page(tmp_path / "logged.md", read_jsonl(ROOT / "studies" / "results" / "logged.jsonl"))
    assert (tmp_path / "logged.md").read_text(encoding="utf-8") == published.read_text(encoding="utf-8")
