"""Competitions and traces of reasoning models: rows written by hand with the fields that the data sets have."""

import pytest

from tracereward.data.demonstrations import load_demonstrations
from tracereward.errors import InputError
from tracereward.tasks.recipes import TASKS

PROMPT = "Problem: 1 + 2?\nPut the final answer in \\boxed{}.\nSolution:\n"
AIME = "Problem: 1 + 2?\nPut the final answer, an integer from 0 to 999, in \\boxed{}.\nSolution:\n"
RIGHT, WRONG = "<think>\n1, 2, 3\n</think>\n\n\\boxed{3}", "<think>\n1 + 2 = 4\n</think>\n\n\\boxed{4}"


@pytest.mark.parametrize(
    ("row", "completion", "answer"),
    [
        ({"problem": "1 + 2?", "answer": "003"}, None, "3"),
        ({"problem": "1 + 2?", "answer": 3, "solution": "\\boxed{003}"}, "\\boxed{003}", "3"),
        ({"Problem": "1 + 2?", "Answer": 3, "Solution": "It is 3."}, "It is 3.\nThe answer is \\boxed{3}.", "3"),
        ({"problem": "1 + 2?", "solution": "\\boxed{3}"}, "\\boxed{3}", "3"),
        ({"problem": "1 + 2?"}, None, None),
    ],
)
def test_aime(row, completion, answer):
    task = TASKS["aime"]
    assert task.example(row) == {"prompt": AIME, "completion": completion, "answer": answer}
    if answer is not None:
        assert task.verify("so \\boxed{03}", answer)
        assert not task.verify("so \\boxed{30}", answer)


@pytest.mark.parametrize("answer", ["1000", "-1", "3.5", "x", True])
def test_aime_refuses_what_is_no_answer_of_the_contest(answer):
    with pytest.raises(ValueError, match=r"field 'answer' is .*not an integer from 0 to 999"):
        TASKS["aime"].example({"problem": "1 + 2?", "answer": answer})
    with pytest.raises(KeyError, match="problem"):
        TASKS["aime"].example({"question": "1 + 2?", "answer": "3"})


def openr1(**fields) -> dict:
    return TASKS["openr1"].example({"problem": "1 + 2?", "answer": "3", "solution": "It is 3.", **fields})


@pytest.mark.parametrize(
    ("marks", "completion"),
    [
        ({"correctness_math_verify": [False, True]}, RIGHT),
        ({"correctness_math_verify": [False, True], "is_reasoning_complete": [True, False]}, None),
        ({"correctness_math_verify": [True, True], "is_reasoning_complete": [False, True]}, RIGHT),
        ({"correctness_math_verify": [False, False], "correctness_llama": [False, True]}, RIGHT),
        ({"correctness_math_verify": [False, False], "correctness_llama": None}, None),
        ({"correctness_math_verify": [None, True]}, RIGHT),
        ({"correctness_math_verify": [True, False]}, WRONG),  # the marks are believed
        ({"correctness_math_verify": []}, RIGHT),  # no marks: by the gold answer
        ({}, RIGHT),
        ({"answer": "4"}, WRONG),
        ({"answer": "5"}, None),
    ],
)
def test_the_first_complete_and_correct_generation(marks, completion):
    found = openr1(generations=[WRONG, RIGHT], **marks)
    assert found == {"prompt": PROMPT, "completion": completion, "answer": marks.get("answer", "3")}


def test_other_traces_and_answers():
    chat = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": RIGHT}]
    from_value = [{"from": "human", "value": "1 + 2?"}, {"from": "gpt", "value": RIGHT}]
    for fields in (
        {"generations": [RIGHT]},
        {"generated_solution": RIGHT},
        {"messages": chat},
        {"conversations": from_value},
    ):
        assert openr1(**fields)["completion"] == RIGHT
        assert openr1(**fields, answer=None)["answer"] == "3"  # the box
    assert openr1()["completion"] is None  # the reference solution is read by the task math
    assert openr1(generated_solution=WRONG, answer=None, expected_answer="4")["answer"] == "4"
    assert openr1(messages=chat[:1])["completion"] is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generations": [RIGHT, WRONG], "answer": None}, "2 traces and no field says which are right"),
        ({"generations": [RIGHT], "correctness_math_verify": [True, True]}, "'correctness_math_verify' must have"),
        ({"generations": [RIGHT], "is_reasoning_complete": "yes"}, "'is_reasoning_complete' must have"),
        ({"generations": [3]}, "'generations' must be a list of texts"),
        (
            {"messages": [{"role": "user", "content": "?"}, *[{"role": "assistant", "content": "!"}] * 2]},
            "2 messages of",
        ),
        ({"messages": "hi"}, "field 'messages' is str"),
    ],
)
def test_unclear_rows_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        openr1(**fields)


def test_rows_without_a_right_generation_are_refused_as_demonstrations_and_read_as_questions():
    row = {"problem": "1 + 2?", "answer": "3", "generations": [WRONG + "</s>"], "correctness_math_verify": [False]}
    with pytest.raises(InputError, match=r"demonstrations\[0\]: no completion: field 'generations' gives none"):
        load_demonstrations([row], TASKS["openr1"])
    (found,) = load_demonstrations([row], TASKS["openr1"], require_completion=False)
    assert (found["completion"], found["answer"]) == (None, "3")
    (found,) = load_demonstrations([{**row, "answer": "4", "correctness_math_verify": None}], TASKS["openr1"])
    assert found["completion"] == WRONG  # without its end mark
