"""Checks of demonstrations by their text: equations, near-duplicates by brute force, findings, wrong copies, marks."""

import random
import re

import pytest

from tracereward.data.candidates import read_candidates
from tracereward.data.demonstration_checks import check_rows, named_option, outvoted
from tracereward.data.equations import wrong_equations
from tracereward.data.marks import fingerprint, read_marks, without_dropped
from tracereward.data.near_duplicates import near_duplicates, near_groups
from tracereward.data.wrong_copies import other_answer, wrong_copy
from tracereward.errors import InputError
from tracereward.files import write_jsonl
from tracereward.tasks.recipes import get_task

GSM8K, MMLU, YES = get_task("gsm8k"), get_task("mmlu_pro"), get_task("strategyqa")

# ---------- equations ----------


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("So 12 + 5 = 18.", ["12 + 5 = 18"]),
        ("12 + 5 = 17 and 17 - 8 = 8", ["17 - 8 = 8"]),
        ("$1,200 x 3 = $3,600; 48/2 = 24", []),
        ("2 * (3 + 4) = 14 = 7 * 2 = 15", ["7 * 2 = 15"]),
        ("22 + 3 * 2 = 22 + 6 = 28", []),
        ("1/3 = 0.33, 2/3 = 0.66, 2/3 = 0.67, 2/3 = 0.6", []),
        ("2/3 = 0.5", ["2/3 = 0.5"]),
        ("100 - 15 = 85% and 60/100*100 = 60% and 1/4 = 25%", []),
        ("x = 5 + 3 = 8", []),
        ("2y + 3 = 7, y - 5 + 3 = 7, 20% of 50 + 3 = 13, f(2) + 3 = 9", []),  # continued at the left
        ("25 / 1/3 = 75, 4 / 0 = 1, 05 + 1 = 6", []),
        ("5 × 3 = 16 and 16 ÷ 4 = 4 and 7 − 2 = 4", ["5 × 3 = 16", "7 − 2 = 4"]),
        ("3 + 4 = 7x, 3 + 4 = 2^3, 3 + 4 = 2 (mod 5)", ["3 + 4 = 7x"][:0]),
    ],
)
def test_equations_that_do_not_hold(text, wrong):
    assert list(wrong_equations(text)) == wrong


# ---------- near-duplicates ----------


def words(rng, count):
    return [rng.choice("abcdefghij") * rng.randint(1, 3) for _ in range(count)]


def test_near_duplicates_are_those_of_all_pairs():
    rng = random.Random(1)
    texts = []
    for _ in range(25):
        base = words(rng, rng.randint(1, 90))
        for _ in range(3):
            copy = list(base)
            for _ in range(rng.randint(0, 2)):
                copy[rng.randrange(len(copy))] = rng.choice(words(rng, 5))
            texts.append("  ".join(copy).upper() if rng.random() < 0.5 else " ".join(copy) + ".")
    texts += ["", "..."]

    def triples(text):
        found = re.findall(r"\w+", text.lower())
        return {tuple(found[i : i + 3]) for i in range(max(1, len(found) - 2))} if found else set()

    sets = [triples(text) for text in texts]
    expected = {
        (i, j): len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
        if sets[i] and sets[j] and len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j])
    }
    assert {(i, j): index for i, j, index in near_duplicates(texts)} == expected
    assert len(expected) > 20
    groups = near_groups(texts)
    assert all(groups[i] == groups[j] for i, j in expected)
    assert len({*groups}) >= 25


# ---------- findings ----------


def row(prompt, completion, answer=None, source="a:1"):
    return {"prompt": prompt, "completion": completion, "answer": answer, "source": source}


def test_each_kind_of_finding():
    rows = [
        row("What is 1 + 2?", "1 + 2 = 3\n#### 3", source="a:1"),
        row("what is  1 + 2?", "It is four\n#### 4", source="a:2"),
        row("How many legs have two horses?", "2 * 4 = 9\n#### 8", answer="8"),
        row("Say it. #### 5", "Two and three make five\n#### 5"),
        row("No answer here", "I do not know"),
        row("Another gold", "One and one\n#### 2", answer="3"),
        row("Copy the hint: the third side has length five.", "The third side has length five.\n#### 9"),
    ]
    kinds = [sorted(finding.kind for finding in found) for found in check_rows(rows, GSM8K)]
    assert kinds == [
        ["contradiction"],
        ["contradiction", "duplicate prompt"],
        ["equation"],
        ["leak"],
        ["unreadable"],
        ["other answer"],
        ["leak"],
    ]
    [finding, *_] = check_rows(rows, GSM8K)[0]
    assert "a:2" in finding.text
    assert finding.others == (1,)


@pytest.mark.parametrize(
    ("completion", "named"),
    [
        ("Iron is stored in the Liver. The answer is (B).", "A"),
        ("Iron is stored in the liver. The answer is (A).", None),
        ("Neither the liver nor the spleen. The answer is (C).", None),  # two are named
        ("It is the red bone marrow. The answer is (B).", "D"),  # and not the bone marrow
        ("Nothing is named. The answer is (B).", None),
    ],
)
def test_an_option_that_is_named_and_not_answered(completion, named):
    prompt = "Question: Where?\nOptions:\nA. the liver\nB. the spleen\nC. bone marrow\nD. red bone marrow\nAnswer:\n"
    assert named_option(completion, prompt, str(MMLU.extract(completion))) == named


def test_a_majority_of_candidates_outvotes_a_demonstration():
    rows = [row("p", "#### 3"), row("q", "#### 4"), row("r", "#### 5")]
    answers = {"p": "3.0 3 3 7", "q": "5 5 5 4", "r": "5 6 6 7 8"}  # r: 6 has two votes of five
    candidates = [{"prompt": p, "completion": f"#### {a}"} for p, given in answers.items() for a in given.split()]
    found = list(outvoted(rows, read_candidates(candidates, GSM8K), GSM8K))
    assert [(index, finding.kind) for index, finding in found] == [(1, "outvoted")]
    assert "3 of 4" in found[0][1].text


# ---------- wrong copies ----------


def test_another_answer_changes_only_the_stated_one():
    prompt = "Question: A or B?\nOptions:\nA. one\nB. two\nC. three\nEnd with: The answer is (letter).\nAnswer:\n"
    text = "A is small. So B is right. The answer is (B)."
    seen = {other_answer(text, prompt, MMLU, random.Random(n)) for n in range(20)}
    assert seen == {"A is small. So B is right. The answer is (A).", "A is small. So B is right. The answer is (C)."}
    assert (
        other_answer("They can. The answer is yes.", "Can they?", YES, random.Random(0))
        == "They can. The answer is no."
    )
    assert other_answer("1 + 2 = 3\n#### 3", "What?", GSM8K, random.Random(0)) is None
    copies = [wrong_copy("1 + 2 = 3\n#### 3", "What?", GSM8K, random.Random(n)) for n in range(30)]
    assert {copy[1] for copy in copies if copy is not None} >= {"operator", "number", "nearby_number"}


# ---------- marks ----------


def test_marked_rows_are_dropped_unless_they_changed(tmp_path):
    rows = [row(f"p{n}", f"c{n}") for n in range(4)]
    marks = tmp_path / "marks.jsonl"
    write_jsonl(
        marks,
        [
            {"id": fingerprint(rows[0]), "mark": "drop"},
            {"id": fingerprint(rows[1]), "mark": "drop"},
            {"id": fingerprint(rows[1]), "mark": "keep"},  # the last one counts
            {"id": fingerprint(rows[2]), "mark": "fix"},
            {"id": fingerprint({**rows[3], "completion": "before it was changed"}), "mark": "drop"},
        ],
    )
    kept, said = without_dropped(rows, str(marks))
    assert [one["prompt"] for one in kept] == ["p1", "p2", "p3"]
    assert said.startswith("1 of 4 demonstrations dropped")
    assert "1 of its 2" in said
    assert without_dropped(rows, None) == (rows, "")


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ([{"id": "x", "mark": "delete"}], ":1: unknown mark 'delete'"),
        ([{"mark": "drop"}], ":1: no id"),
        ([], "no marks"),
    ],
)
def test_marks_that_cannot_be_read_are_named(given, part, tmp_path):
    write_jsonl(tmp_path / "marks.jsonl", given)
    with pytest.raises(InputError, match=part):
        read_marks(str(tmp_path / "marks.jsonl"))


def test_marks_that_leave_nothing_are_refused(tmp_path):
    write_jsonl(tmp_path / "marks.jsonl", [{"id": fingerprint(row("p", "c")), "mark": "drop"}])
    with pytest.raises(InputError, match="all 1 demonstrations"):
        without_dropped([row("p", "c")], str(tmp_path / "marks.jsonl"))
