"""Choosing among candidates, by hand and by brute force."""

import json
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracereward.metrics import bootstrap_interval
from tracereward.pool import summary
from tracereward.rerank import METHODS, Candidate, choose, ranking_aurocs, ranking_table, vote_weights, weighted_vote
from tracereward.tasks import get_task


def same(a: str, b: str) -> bool:
    return a == b


def candidates(*rows) -> list[Candidate]:
    """(answer, reward, logprob, length, correct) each."""
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


def test_the_vote_is_weighted_by_reward():
    """Mean 0, std sqrt 2: two weak votes, 2 * exp(-0.71) = 0.99, lose to one of exp(1.41) = 4.1; the majority wins."""
    rows = candidates(("a", -1.0), ("a", -1.0), ("b", 2.0))
    assert choose(rows, "vote", same) == 2
    assert choose(rows, "majority", same) == 0


def test_the_winner_is_represented_by_its_highest_reward():
    rows = candidates(("a", 0.1), ("b", 0.5), ("a", 0.9))
    assert choose(rows, "vote", same) == 2


def test_equal_answers_are_one_answer():
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


def test_without_any_answer_the_best_reward_is_taken():
    rows = candidates((None, -1.0), (None, 2.0), (None, 1.0))
    assert choose(rows, "vote", same) == 1
    assert choose(rows, "majority", same) == 0


def test_one_candidate_is_chosen_by_every_method():
    for method in METHODS.keys() - {"mean", "oracle"}:
        assert choose(candidates((None, -800.0, -1.0, 3)), method, same) == 0


def test_random_depends_on_the_seed_and_the_question_only():
    assert [choose(FIVE, "random", same, 1) for _ in range(3)] == [choose(FIVE, "random", same, 1)] * 3
    chosen = {choose(FIVE, "random", same, seed) for seed in range(60)}
    assert chosen == set(range(5))


def test_refusals():
    with pytest.raises(ValueError, match="unknown method 'best'"):
        choose(FIVE, "best", same)
    with pytest.raises(ValueError, match="`tracereward sample` writes one"):
        choose(candidates(("a", 1.0)), "logprob", same)


def test_vote_weights_standardise_within_the_question():
    """The scale and the offset of a question's rewards do not matter, only how its candidates stand to each other."""
    rewards = [0.3, -1.0, 2.5, 0.3]
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    expected = [math.exp((r - mean) / std) for r in rewards]
    assert vote_weights(rewards) == pytest.approx(expected)
    assert vote_weights([4.9 + 0.001 * r for r in rewards]) == pytest.approx(expected)
    assert vote_weights([5.0, 5.0]) == [1.0, 1.0]
    assert len(set(vote_weights([0.1, 0.1, 0.1]))) == 1


def test_the_sum_of_reward_and_log_prob_is_a_method_of_its_own():
    rows = candidates(("a", 1.0, -3.0), ("b", 0.0, -0.5), ("c", -1.0, -0.1))
    assert [choose(rows, m, same) for m in ("reward", "logprob", "reward_logprob")] == [0, 2, 1]


@given(rows=st.lists(st.tuples(st.sampled_from(["a", "A", "b", "c", None]), st.integers(1, 9)), min_size=1, max_size=8))
def test_weighted_vote_by_brute_force(rows):
    """Some answer with the largest summed weight wins, through its own largest weight."""
    answers, weights = zip(*rows)
    index = weighted_vote([Candidate("", a, 0.0) for a in answers], weights, lambda a, b: a.lower() == b.lower())
    keys = [a and a.lower() for a in answers]
    sums = {key: sum(w for k, w in zip(keys, weights) if k == key) for key in keys if key is not None}
    if not sums:
        assert weights[index] == max(weights)
        return
    assert sums[keys[index]] == max(sums.values())
    assert weights[index] == max(w for k, w in zip(keys, weights) if k == keys[index])


def questions(count: int, n: int, with_logprob: bool = True) -> list[list[Candidate]]:
    rng = random.Random(5)
    found = []
    for q in range(count):
        rows = []
        for k in range(n):
            answer = rng.choice(["1", "2", "3", None])
            log_prob = -rng.random() if with_logprob else None
            reward = rng.gauss(0, 2) + (1.5 if answer == "1" else 0)
            rows.append(Candidate(f"{q} {k}", answer, reward, log_prob, rng.randrange(9), answer == "1"))
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
    """Only answer 1 is right, so that accuracies need no index."""
    asked = questions(40, 5)
    table = {row.method: row for row in ranking_table(asked, same, seed=2)}
    expected = {
        "mean": [sum(c.correct for c in rows) / 5 for rows in asked],
        "majority": [vote(rows, lambda c: 1.0) for rows in asked],
        "vote": [vote(rows, standardised(lambda c: c.reward, rows)) for rows in asked],
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
    assert list(table) == list(METHODS)
    assert table["reward"].label == "reward best-of-5"
    assert table["oracle"].accuracy >= max(row.accuracy for row in table.values())


def test_log_prob_is_left_out_where_it_is_not_known():
    asked = questions(3, 2, with_logprob=False)
    assert not {name for name in METHODS if "logprob" in name} & {row.method for row in ranking_table(asked, same)}
    assert set(ranking_aurocs(asked)) == {"reward_auroc", "reward_auroc_within_prompt"}


def test_aurocs_by_counting_pairs():
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


def test_aurocs_are_null_where_all_candidates_are_wrong():
    """JSON has no nan."""
    wrong = [[Candidate("x", "1", 0.5, -1.0, 1, False), Candidate("y", "2", 0.1, -2.0, 1, False)]]
    result = summary(wrong, get_task("arithmetic"))
    assert result is not None
    assert result["reward_auroc"] is None
    assert result["logprob_auroc_within_prompt"] is None
    assert "NaN" not in json.dumps(result)
