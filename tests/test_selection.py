"""Best-of-N selection, against values computed by hand and by brute force."""

import json
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracereward.commands.rerank import summary
from tracereward.metrics import bootstrap_interval
from tracereward.selection import (
    METHODS,
    TEMPERATURES,
    Candidate,
    choose,
    fit_vote_temperature,
    methods_for,
    model_scores,
    outcomes,
    ranking_aurocs,
    ranking_curves,
    ranking_table,
    vote_weights,
    weighted_vote,
)
from tracereward.tasks.recipes import get_task


def same(a: str, b: str) -> bool:
    return a == b


def candidates(*rows) -> list[Candidate]:
    """Candidates from rows (answer, reward, logprob, length, correct)."""
    return [Candidate(f"text {i}", *row) for i, row in enumerate(rows)]


# Rewards have mean 0.4 and std 3.262: a weighs 2 * exp(-0.4 / 3.262) = 1.77, b exp(1.6 / 3.262) = 1.63, c 0.19.
FIVE = candidates(
    ("a", 0.0, -0.5, 30, False),
    ("b", 2.0, -0.9, 20, True),
    ("a", 0.0, -0.4, 40, False),
    (None, 5.0, -0.1, 10, False),
    ("c", -5.0, -2.0, 50, True),
)


@pytest.mark.parametrize(
    ("method", "index"),
    [
        ("vote", 0),
        ("majority", 0),
        ("reward", 3),
        ("logprob", 3),
        ("logprob_vote", 2),
        ("reward_logprob", 3),
        ("shortest", 3),
    ],
)
def test_choices_by_hand(method, index):
    assert choose(FIVE, method, same) == index


def test_vote_is_weighted_by_reward():
    """Mean 0, std sqrt 2: two weak votes, 2 * exp(-0.71) = 0.99, lose to one of exp(1.41) = 4.1; the majority wins."""
    rows = candidates(("a", -1.0), ("a", -1.0), ("b", 2.0))
    assert choose(rows, "vote", same) == 2
    assert choose(rows, "majority", same) == 0


def test_winning_answer_returns_its_highest_reward_candidate():
    rows = candidates(("a", 0.1), ("b", 0.5), ("a", 0.9))
    assert choose(rows, "vote", same) == 2


def test_equivalent_answers_are_merged():
    """0.5 and 1/2 together outvote a third answer; as strings they would lose to it."""
    equal = get_task("math").equal
    rows = candidates(("0.5", 0.7), ("2", 0.8), ("1/2", 0.7), ("3", -2.0))
    assert choose(rows, "vote", equal) == 0
    assert choose(rows, "vote", same) == 1
    assert choose(candidates(("2", 0.0), ("0.5", 0.0), ("1/2", 0.0)), "majority", equal) == 1


def test_candidates_without_an_answer_do_not_vote():
    rows = candidates((None, 9.0), (None, 9.0), ("a", -3.0))
    assert choose(rows, "vote", same) == 2
    assert choose(rows, "majority", same) == 2


def test_without_answers_the_highest_reward_wins():
    rows = candidates((None, -1.0), (None, 2.0), (None, 1.0))
    assert choose(rows, "vote", same) == 1
    assert choose(rows, "majority", same) == 0


def test_every_method_picks_the_only_candidate():
    for method in METHODS.keys() - {"mean", "oracle", "model"}:
        assert choose(candidates((None, -800.0, -1.0, 3)), method, same, temperature=0.5) == 0


def test_random_choice_depends_only_on_seed_and_question():
    assert [choose(FIVE, "random", same, seed=1) for _ in range(3)] == [choose(FIVE, "random", same, seed=1)] * 3
    chosen = {choose(FIVE, "random", same, seed=seed) for seed in range(60)}
    assert chosen == set(range(5))


def test_invalid_choose_arguments_are_rejected():
    with pytest.raises(ValueError, match="unknown method 'best'"):
        choose(FIVE, "best", same)
    with pytest.raises(ValueError, match="`tracereward sample` writes one"):
        choose(candidates(("a", 1.0)), "logprob", same)
    with pytest.raises(ValueError, match="fit_vote_temperature gives one"):
        choose(FIVE, "softmax_vote", same)
    with pytest.raises(ValueError, match="unknown method 'model'"):
        choose(FIVE, "model", same)


def test_vote_weights_standardise_within_the_question():
    """The weights do not depend on the scale and offset of a question's rewards."""
    rewards = [0.3, -1.0, 2.5, 0.3]
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    expected = [math.exp((r - mean) / std) for r in rewards]
    assert vote_weights(rewards) == pytest.approx(expected)
    assert vote_weights([4.9 + 0.001 * r for r in rewards]) == pytest.approx(expected)
    assert vote_weights([5.0, 5.0]) == [1.0, 1.0]
    assert len(set(vote_weights([0.1, 0.1, 0.1]))) == 1


def test_reward_plus_log_prob_method():
    rows = candidates(("a", 1.0, -3.0), ("b", 0.0, -0.5), ("c", -1.0, -0.1))
    assert [choose(rows, m, same) for m in ("reward", "logprob", "reward_logprob")] == [0, 2, 1]


@given(rows=st.lists(st.tuples(st.sampled_from(["a", "A", "b", "c", None]), st.integers(1, 9)), min_size=1, max_size=8))
def test_weighted_vote_by_brute_force(rows):
    """An answer with the largest summed weight wins, represented by its candidate with the largest weight."""
    answers, weights = zip(*rows)
    index = weighted_vote([Candidate("", a, 0.0) for a in answers], weights, lambda a, b: a.lower() == b.lower())
    keys = [a and a.lower() for a in answers]
    sums = {key: sum(w for k, w in zip(keys, weights) if k == key) for key in keys if key is not None}
    if not sums:
        assert weights[index] == max(weights)
        return
    assert sums[keys[index]] == max(sums.values())
    assert weights[index] == max(w for k, w in zip(keys, weights) if k == keys[index])


def questions(count: int, n: int, with_logprob: bool = True, models: bool = False) -> list[list[Candidate]]:
    rng = random.Random(5)
    found = []
    for q in range(count):
        rows = []
        for k in range(n):
            answer = rng.choice(["1", "2", "3", None])
            log_prob = -rng.random() if with_logprob else None
            reward = rng.gauss(0, 2) + (1.5 if answer == "1" else 0)
            model = f"model {k}" if models else None
            rows.append(Candidate(f"{q} {k}", answer, reward, log_prob, rng.randrange(9), answer == "1", model))
        found.append(rows)
    return found


def vote(rows, weight):
    totals = {}
    for c in rows:
        if c.answer is not None:
            totals[c.answer] = totals.get(c.answer, 0.0) + weight(c)
    return max(totals, key=totals.get) == "1" if totals else False


def standardised(score, rows):
    values = [score(c) for c in rows]
    return lambda c: math.exp((score(c) - statistics.fmean(values)) / statistics.pstdev(values))


def test_ranking_table_by_brute_force():
    """Only answer 1 is correct, so accuracies follow from the selected answer."""
    asked = questions(40, 5)
    table = {row.method: row for row in ranking_table(asked, same, seed=2)}
    expected = {
        "mean": [sum(c.correct for c in rows) / 5 for rows in asked],
        "majority": [vote(rows, lambda c: 1.0) for rows in asked],
        "vote": [vote(rows, standardised(lambda c: c.reward, rows)) for rows in asked],
        "sigmoid_vote": [vote(rows, lambda c: 1 / (1 + math.exp(-c.reward))) for rows in asked],
        "logprob_vote": [vote(rows, standardised(lambda c: c.logprob, rows)) for rows in asked],
        "reward_logprob_vote": [vote(rows, standardised(lambda c: c.reward + c.logprob, rows)) for rows in asked],
        "reward": [sorted(rows, key=lambda c: c.reward)[-1].correct for rows in asked],
        "logprob": [sorted(rows, key=lambda c: c.logprob)[-1].correct for rows in asked],
        "reward_logprob": [sorted(rows, key=lambda c: c.reward + c.logprob)[-1].correct for rows in asked],
        "oracle": [any(c.correct for c in rows) for rows in asked],
    }
    for method, values in expected.items():
        assert table[method].accuracy == pytest.approx(sum(values) / 40), method
        low, high = bootstrap_interval([float(v) for v in values], 2)
        assert (table[method].low, table[method].high) == pytest.approx((low, high)), method
    shortest = sum(next(c for c in rows if c.length == min(d.length for d in rows)).correct for rows in asked) / 40
    assert table["shortest"].accuracy == pytest.approx(shortest)
    assert list(table) == [name for name in METHODS if name not in ("model", "softmax_vote")]
    assert table["reward"].label == "reward best-of-5"
    assert table["oracle"].accuracy >= max(row.accuracy for row in table.values())


def test_log_prob_methods_are_skipped_without_log_probs():
    asked = questions(3, 2, with_logprob=False)
    assert not {name for name in METHODS if "logprob" in name} & {row.method for row in ranking_table(asked, same)}
    assert set(ranking_aurocs(asked)) == {"reward_auroc", "reward_auroc_within_prompt"}


def test_aurocs_match_brute_force_pair_counts():
    asked = questions(12, 4)

    def pairs(rows, score):
        wins = [
            (score(a) > score(b)) + 0.5 * (score(a) == score(b))
            for a in rows
            for b in rows
            if a.correct and not b.correct
        ]
        return sum(wins) / len(wins) if wins else None

    result = ranking_aurocs(asked)
    scores = {
        "reward": lambda c: c.reward,
        "logprob": lambda c: c.logprob,
        "reward_logprob": lambda c: c.reward + c.logprob,
    }
    for name, score in scores.items():
        assert result[f"{name}_auroc"] == pytest.approx(pairs([c for rows in asked for c in rows], score))
        within = [value for rows in asked if (value := pairs(rows, score)) is not None]
        assert result[f"{name}_auroc_within_prompt"] == pytest.approx(sum(within) / len(within))


def test_aurocs_are_null_if_all_candidates_are_wrong():
    """JSON has no nan."""
    wrong = [[Candidate("x", "1", 0.5, -1.0, 1, False), Candidate("y", "2", 0.1, -2.0, 1, False)]]
    result = summary(wrong, get_task("arithmetic"))
    assert result is not None
    assert result["reward_auroc"] is None
    assert result["logprob_auroc_within_prompt"] is None
    assert "NaN" not in json.dumps(result)


# ---------- votes with a fixed scale ----------


def test_sigmoid_and_softmax_votes_by_hand():
    """sigmoid(0) = 1/2 twice beats sigmoid(2) = 0.88. Softmax: 2 exp(-2 / T) is 1 at T = 2 / ln 2 = 2.885."""
    rows = candidates(("a", 0.0), ("a", 0.0), ("b", 2.0))
    assert choose(rows, "sigmoid_vote", same) == 0
    assert choose(candidates(("a", -1.0), ("a", -1.0), ("b", 2.0)), "sigmoid_vote", same) == 2
    assert choose(rows, "softmax_vote", same, temperature=2.88) == 2
    assert choose(rows, "softmax_vote", same, temperature=2.89) == 0
    assert vote_weights([1.0, 3.0, 2.0], 0.5) == pytest.approx([math.exp(-4), 1.0, math.exp(-2)])
    assert vote_weights([900.0, -900.0], 0.004) == [1.0, 0.0]  # no overflow


def test_temperature_limits_are_best_reward_and_majority():
    for rows in questions(60, 5):
        stated = [c for c in rows if c.answer is not None]
        if stated:
            coldest = choose(rows, "softmax_vote", same, temperature=1e-3)
            assert rows[coldest] == max(stated, key=lambda c: c.reward)
            counts = {c.answer: sum(d.answer == c.answer for d in stated) for c in stated}
            hottest = choose(rows, "softmax_vote", same, temperature=1e9)
            assert counts[rows[hottest].answer] == max(counts.values())


def test_temperature_is_fitted_to_accuracy():
    """In a, one correct answer is 1 above two equal wrong ones: correct below T = 1 / ln 2 = 1.44. In b, two correct
    answers are 0.1 below a wrong one: correct above T = 0.1 / ln 2 = 0.144. Powers of two in between are 0.25 to 1; the
    highest is selected.
    """
    a = candidates(("x", 1.0, None, 0, True), ("y", 0.0, None, 0, False), ("y", 0.0, None, 0, False))
    b = candidates(("x", 0.1, None, 0, False), ("y", 0.0, None, 0, True), ("y", 0.0, None, 0, True))
    assert fit_vote_temperature([a, b], same) == 1.0
    assert fit_vote_temperature([b], same) == max(TEMPERATURES) == 8.0
    assert [t for t in TEMPERATURES if sum(outcomes([a, b], "softmax_vote", same, seed=0, temperature=t)) == 2] == [
        0.25,
        0.5,
        1.0,
    ]


def test_methods_with_missing_inputs_are_skipped():
    bare, full = questions(2, 3, with_logprob=False), questions(2, 3, models=True)
    without = {"mean", "random", "shortest", "majority", "reward", "vote", "sigmoid_vote", "oracle"}
    assert set(methods_for(bare)) == without
    assert set(methods_for(bare, 0.5)) == {*without, "softmax_vote"}
    assert methods_for(full, 0.5) == list(METHODS)
    one_short = [full[0], [*full[1][:2], Candidate("no model", "1", 0.0, -1.0, 3, True)]]
    assert set(METHODS) - set(methods_for(one_short, 0.5)) == {"model"}
    assert [row.method for row in ranking_table(full, same, temperature=0.5)] == list(METHODS)


# ---------- the model baseline ----------


def by_models(*rows) -> list[list[Candidate]]:
    """One row per question: (model, correct) of each candidate."""
    return [
        [Candidate(f"{q} {m} {k}", "1", 0.0, None, 0, c, m) for k, (m, c) in enumerate(row)]
        for q, row in enumerate(rows)
    ]


def test_model_score_excludes_the_question_itself():
    """a is correct in questions 1 and 2 but not 3; b only in 3; c has two answers to 1 and no others."""
    asked = by_models(
        [("a", True), ("b", False), ("c", True), ("c", False)],
        [("a", True), ("b", False)],
        [("b", True), ("a", False)],
    )
    assert model_scores(asked) == [[1 / 2, 1 / 2, 0.5, 0.5], [1 / 2, 1 / 2], [0.0, 1.0]]
    # Ties go to the first: a, a; in question 3 a, which is correct in both others, and wrong here.
    assert outcomes(asked, "model", same) == [1.0, 1.0, 0.0]


def test_model_score_ignores_the_models_own_answer():
    """Two models are correct in alternate questions: on the other questions, the wrong one has the higher accuracy."""
    asked = by_models(*[[("a", q % 2 == 0), ("b", q % 2 == 1)] for q in range(10)])
    assert all(min(row) == 4 / 9 and max(row) == 5 / 9 for row in model_scores(asked))
    assert outcomes(asked, "model", same) == [0.0] * 10


# ---------- accuracy over N ----------


def test_last_point_of_curves_equals_ranking_table():
    """With all nine candidates, each method equals the table, including ties."""
    asked = questions(30, 9, models=True)
    asked[4] = asked[4][:5]
    curves = ranking_curves(asked, same, seed=3, temperature=0.5)
    for row in ranking_table(asked, same, seed=3, temperature=0.5):
        points = curves[row.method]
        assert [point[0] for point in points] == [1, 2, 4, 8, 9]
        assert points[-1] == pytest.approx((9, row.accuracy, row.low, row.high)), row.method


def test_curves_at_one_candidate_equal_the_mean_sample():
    """8 subsets of 200 questions: the standard error of the mean is below sqrt(0.25 / 1600) = 0.0125."""
    asked = questions(200, 6)
    curves = ranking_curves(asked, same, temperature=0.5)
    mean = statistics.fmean(c.correct for rows in asked for c in rows)
    for method, points in curves.items():
        size, accuracy, low, high = points[0]
        assert size == 1
        assert accuracy == pytest.approx(mean, abs=4 * 0.0125), method
        assert low <= accuracy <= high
    assert len({points[0] for points in curves.values()}) == 1  # the same subsets for all


def test_intermediate_points_are_means_over_subsets():
    """The oracle with N of 6 is wrong only if all N are wrong: 1 - C(wrong, N) / C(6, N) on average."""
    asked = questions(150, 6)
    points = {size: accuracy for size, accuracy, *_ in ranking_curves(asked, same, draws=40)["oracle"]}
    for size in (1, 2, 4, 6):
        wrong = [sum(not c.correct for c in rows) for rows in asked]
        expected = statistics.fmean(1 - math.comb(w, size) / math.comb(6, size) for w in wrong)
        assert points[size] == pytest.approx(expected, abs=0.02)
    accuracies = [points[size] for size in (1, 2, 4, 6)]
    assert accuracies == sorted(accuracies)


def test_curves_of_single_candidate_questions_have_one_point():
    asked = [rows[:1] for rows in questions(5, 1)]
    assert [len(points) for points in ranking_curves(asked, same).values()] == [1] * len(methods_for(asked))
