"""Label rules against tables written by hand."""

import pytest

from tracereward.data.candidates import CandidateRow
from tracereward.data.matching import Question
from tracereward.errors import InputError
from tracereward.tasks.recipes import get_task
from tracereward.training.label_rules import (
    LabelRule,
    agreement,
    choose_rule,
    expert_answers,
    labels_of,
    remarks_on_labels,
)

GSM8K = get_task("gsm8k")
POSITIVE, NEGATIVE, OUT = True, False, None


def candidate(completion, *, answer="read", finished=True) -> CandidateRow:
    return CandidateRow(
        where="c", question="q", prompt="p", completion=completion, correct=True, labelled=True, model=None,
        answer=GSM8K.extract(completion) if answer == "read" else answer, logprob=None, finished=finished,
    )  # fmt: skip


def question(experts, candidates) -> Question:
    rows = [{"prompt": "p", "completion": text, "answer": answer} for text, answer in experts]
    return Question(where="q", prompt="p", demonstrations=rows, candidates=candidates)


CANDIDATES = [
    candidate("#### 9"),
    candidate("it is nine", answer="9.0"),  # its row says what it answers
    candidate("#### 8"),
    candidate("no idea"),
    candidate("no id", finished=False),
    candidate("#### 9", finished=False),
]
KNOWN = [("so #### 9", None)]


def test_demonstrations_that_state_different_answers_are_counted():
    alike = question([("#### 9", None), ("so #### 9.0", None)], CANDIDATES[:3])
    at_odds = question([("#### 9", None), ("#### 8", None)], CANDIDATES[:3])
    assert "different answers" not in choose_rule([alike], GSM8K)[1]
    assert "of 1 questions state different answers, the first at q" in choose_rule([alike, at_odds], GSM8K)[1]


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        ("expert", "all", [NEGATIVE] * 6),
        ("expert", "disagreeing", [OUT, OUT, NEGATIVE, OUT, NEGATIVE, OUT]),
        ("agreeing", "disagreeing", [POSITIVE, POSITIVE, NEGATIVE, OUT, NEGATIVE, POSITIVE]),
        ("agreeing", "all", [POSITIVE, POSITIVE, NEGATIVE, NEGATIVE, NEGATIVE, POSITIVE]),
    ],
)
def test_the_table_of_the_rules(positives, negatives, expected):
    rule = LabelRule(positives, negatives)
    assert rule.name == f"{positives}/{negatives}"
    assert labels_of(question(KNOWN, CANDIDATES), rule, GSM8K) == expected
    # Nothing is known to agree or differ without an answer of the experts.
    unknown = [NEGATIVE if negatives == "all" else OUT] * 6
    assert labels_of(question([], CANDIDATES), rule, GSM8K) == unknown
    assert labels_of(question([("no idea", None)], CANDIDATES), rule, GSM8K) == unknown


def test_the_gold_answer_of_a_candidate_is_not_used_and_the_experts_own_answer_comes_first():
    # Every candidate's row says that it is correct, whatever it answers: labels do not read it.
    stating = question([("#### 9", "8"), ("no idea", "7"), ("#### 9.0", None)], [])
    assert expert_answers(stating, GSM8K) == [
        "9", "7", "9.0",
    ]  # fmt: skip
    several = question([("#### 9", None), ("#### 8", None)], CANDIDATES)
    assert labels_of(several, LabelRule("agreeing", "disagreeing"), GSM8K)[:3] == [POSITIVE] * 3
    assert agreement("9", ["10", "9"], GSM8K) is True
    assert agreement("9", [], GSM8K, finished=False) is None


def readable_of(total: int, unread: int) -> Question:
    return question(KNOWN, [candidate("#### 8")] * (total - unread) + [candidate("no idea")] * unread)


def test_the_default_rule_needs_four_answers_of_five():
    rule, said = choose_rule([readable_of(10, 2)], GSM8K)
    assert rule == LabelRule("agreeing", "disagreeing")
    assert "8 of 10 candidates" in said
    rule, said = choose_rule([readable_of(10, 3)], GSM8K)
    assert rule == LabelRule("expert", "all")
    assert "7 of 10 candidates" in said
    assert "every candidate counts as wrong" in said
    rule, _ = choose_rule([readable_of(10, 2), question([("no idea", None)], [])], GSM8K)
    assert rule.name == "expert/all"  # one of two demonstrations
    assert choose_rule([readable_of(10, 2)], GSM8K, negatives="all")[0].name == "agreeing/all"
    assert choose_rule([readable_of(10, 9)], GSM8K, "agreeing", "disagreeing")[0].name == "agreeing/disagreeing"
    with pytest.raises(InputError, match="0 of 10 candidates"):
        choose_rule([readable_of(10, 10)], GSM8K, positives="agreeing")
    with pytest.raises(InputError, match="unknown positives"):
        choose_rule([readable_of(10, 2)], GSM8K, positives="agree")


def test_remarks_count_labels_and_refuse_one_class():
    rule = LabelRule("agreeing", "disagreeing")
    both, agreeing = question(KNOWN, CANDIDATES), question(KNOWN, CANDIDATES[:1])
    questions = [both, agreeing, question(KNOWN, [])]
    labels = [labels_of(found, rule, GSM8K) for found in questions]
    counts, no_negative = remarks_on_labels(questions, labels, rule.name)
    assert "of 7 candidates 4 join the experts, 2 are negatives and 1 are left out" in counts
    assert "1 of 3 questions have candidates but no negative" in no_negative
    with pytest.raises(InputError, match="one class only"):
        remarks_on_labels([agreeing], [[True]], rule.name)
