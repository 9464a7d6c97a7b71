"""Multiple choice: rows of each data set, written by hand with the fields that its files have."""

import itertools
import string

import pytest

from helpers.paths import real_rows
from tracereward.data.demonstrations import load_demonstrations
from tracereward.errors import InputError
from tracereward.tasks.recipes import TASKS

OPTIONS = ["the sky", "blood", "a gull", "milk"]
LISTED = "Options:\nA. the sky\nB. blood\nC. a gull\nD. milk\nEnd with: The answer is (letter).\nAnswer:\n"
ASKED = {"question": "Which is red?"}
PROMPT = f"Question: Which is red?\n{LISTED}"
HELD = "Context: As in Holm v. Lind (<HOLDING>).\nQuestion: Which holding belongs in the place of <HOLDING>?\n"

# Task, row without a trace, its gold field with a value for each option in order, and a value out of range.
ROWS = {
    "mmlu_pro": ("mmlu_pro", {**ASKED, "options": OPTIONS}, "answer", "ABCD", "E"),
    "medreason": ("medreason", {**ASKED, "options": OPTIONS}, "answer", OPTIONS, "E"),
    "medqa": ("medqa", {**ASKED, "options": dict(zip("ABCD", OPTIONS))}, "answer_idx", "ABCD", "E"),
    "medqa of a table": (
        "medqa",
        {**ASKED, "options": {**dict(zip("ABCD", OPTIONS)), "E": None}},
        "answer_idx",
        "ABCD",
        "E",
    ),
    "medqa of pairs": (
        "medqa",
        {**ASKED, "options": [{"key": key, "value": value} for key, value in zip("ABCD", OPTIONS)]},
        "answer",
        OPTIONS,
        "a crow",
    ),
    "medmcqa": ("medmcqa", {**ASKED, **dict(zip(("opa", "opb", "opc", "opd"), OPTIONS))}, "cop", [0, 1, 2, 3], 4),
    "medmcqa from 1": (
        "medmcqa_from_1",
        {**ASKED, **dict(zip(("opa", "opb", "opc", "opd"), OPTIONS))},
        "cop",
        [1, 2, 3, 4],
        0,
    ),
    "casehold": (
        "casehold",
        {"context": "As in Holm v. Lind (<HOLDING>).", "endings": OPTIONS},
        "label",
        [0, 1, 2, 3],
        4,
    ),
    "casehold as text": (
        "casehold",
        {"context": "As in Holm v. Lind (<HOLDING>).", "endings": OPTIONS},
        "label",
        "0123",
        "-1",
    ),
    "arc": ("arc", {**ASKED, "choices": {"text": OPTIONS, "label": list("ABCD")}}, "answerKey", "ABCD", "E"),
    "arc in numbers": ("arc", {**ASKED, "choices": {"text": OPTIONS, "label": list("1234")}}, "answerKey", "1234", "A"),
}
TRACES = {"medreason": "reasoning", "medmcqa": "exp", "medmcqa_from_1": "exp"}


@pytest.mark.parametrize("name", ROWS)
def test_every_option_as_the_answer(name):
    """The prompt lists all options with letters; the letter of the gold one, however it is given, ends the trace."""
    task, raw, field, golds, beyond = ROWS[name]
    task = TASKS[task]
    copy = dict(raw)
    prompt = HELD + LISTED if task.name == "casehold" else PROMPT
    for letter, gold in zip("ABCD", golds, strict=True):
        assert task.example({**raw, field: gold}) == {"prompt": prompt, "completion": None, "answer": letter}
        row = task.example({**raw, field: gold, TRACES.get(task.name, "trace"): " Think.\nSo it is. "})
        assert row["completion"] == f"Think.\nSo it is.\nThe answer is ({letter})."
        for other in "ABCD":
            for text in (f"The answer is ({other}).", f"The answer is {other}. {OPTIONS[0]}", f"\\boxed{{{other}}}"):
                assert task.verify(f"Hm.\n{text}", letter) == (other == letter), (text, letter)
    assert task.example(raw)["answer"] is None  # as in a test set
    assert raw == copy
    with pytest.raises(ValueError, match=f"field '{field}'.*{beyond}"):
        task.example({**raw, field: beyond})


def test_a_trace_that_states_its_answer_gets_no_second_one():
    row = {**ASKED, "options": dict(zip("ABCD", OPTIONS)), "answer_idx": "B", "trace": "It is. The answer is (B)."}
    assert TASKS["medqa"].example(row)["completion"] == "It is. The answer is (B)."


def test_hub_and_authors_count_from_different_numbers():
    """Nothing in a row tells them apart but 0 and 4, so a file with either of them is refused by the wrong task."""
    row = {**ASKED, **dict(zip(("opa", "opb", "opc", "opd"), OPTIONS)), "exp": "So."}
    rows = [{**row, "cop": number} for number in (1, 2, 4)]
    with pytest.raises(
        InputError, match=r"demonstrations\[2\]: field 'cop' is 4, not a number from 0 to 3.*medmcqa_from_1"
    ):
        load_demonstrations(rows, TASKS["medmcqa"])
    found = load_demonstrations(rows, TASKS["medmcqa_from_1"])
    assert [one["answer"] for one in found] == ["A", "B", "D"]
    assert TASKS["medmcqa"].example({**row, "cop": -1})["answer"] is None  # the Hub's test set
    assert TASKS["medmcqa"].example({**row, "cop": -1})["completion"] == "So."
    for cop in (-1, True, 1.5, "a"):
        with pytest.raises(ValueError, match="not a number from 1 to 4"):
            TASKS["medmcqa_from_1"].example({**row, "cop": cop})


def test_casehold_of_the_authors():
    """Their columns; CSV files have the label as text."""
    row = {"citing_prompt": "As in Holm v. Lind (<HOLDING>).", "label": "2"}
    row |= {f"holding_{n}": text for n, text in enumerate([*OPTIONS, "dusk"])}
    found = TASKS["casehold"].example(row)
    assert found["prompt"] == HELD + LISTED.replace("D. milk\n", "D. milk\nE. dusk\n")
    assert found["answer"] == "C"


def test_gpqa_order_depends_on_the_content_alone():
    """Shuffled columns, a trace or none: the same prompt; over many questions each letter is right equally often."""
    names = ["Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))]
    example = TASKS["gpqa"].example
    prompts = set()
    for wrong in itertools.permutations([option for option in OPTIONS if option != "blood"]):
        row = {"Question": " Which is red?", **dict(zip(names, ["blood", *wrong]))}
        found = example({**row, "Explanation": "It is."})
        assert found["completion"] == f"It is.\nThe answer is ({found['answer']})."
        assert f"\n{found['answer']}. blood\n" in found["prompt"]
        assert example(row) == {**found, "completion": None}
        prompts.add(found["prompt"])
    (prompt,) = prompts
    assert sorted(line[3:] for line in prompt.split("\n")[2:6]) == sorted(OPTIONS)
    letters = [example({"Question": f"{n}?", **dict(zip(names, OPTIONS))})["answer"] for n in range(400)]
    assert all(70 < letters.count(letter) < 130 for letter in "ABCD")  # 100 each, a standard deviation of 8.7
    with pytest.raises(KeyError, match="Incorrect Answer 2"):
        example({"Question": "q", "Correct Answer": "a", "Incorrect Answer 1": "b"})


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("arc", {**ASKED, "choices": {"text": ["a", "b"], "label": ["A"]}}, "a label for each text"),
        ("arc", {**ASKED, "choices": ["a", "b"]}, "field 'choices' must be"),
        ("arc", {**ASKED, "choices": {"text": ["a"], "label": ["A"]}}, "must hold 2 to 10 options"),
        ("casehold", {"context": "c", "endings": "A. x\nC. y"}, "field 'endings' has letters that do not run"),
        ("medqa", {**ASKED, "options": {"A": "x", "C": "y"}}, "letters that do not run A, B, C"),
        ("medqa", {**ASKED, "options": 3}, "field 'options' must hold"),
        ("medmcqa", {**ASKED, "opa": "x", "opb": "", "opc": "y", "opd": "z"}, "field 'opb' is empty"),
    ],
)
def test_incomplete_options_are_refused(task, row, message):
    with pytest.raises(ValueError, match=message):
        TASKS[task].example(row)


def test_ten_options_have_ten_letters():
    row = {**ASKED, "options": list(string.digits)}
    assert TASKS["medqa"].example(row)["prompt"].count("\n") == 14
    assert "\nJ. 9\nEnd with" in TASKS["medqa"].example(row)["prompt"]


def test_real_explanations_end_with_their_gold_answer():
    """MedMCQA's authors count from 1; few explanations state a letter in a form that is read, and none another one."""
    rows = real_rows("medmcqa/train")
    task = TASKS["medmcqa_from_1"]
    for raw in rows:
        row = task.example(raw)
        assert task.verify(row["completion"], row["answer"])
        right = raw[f"op{row['answer'].lower()}"].strip()
        assert f"\n{row['answer']}. {right}\n" in row["prompt"]
    with pytest.raises(ValueError, match="medmcqa_from_1"):
        [TASKS["medmcqa"].example(raw) for raw in rows]
