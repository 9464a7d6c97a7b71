"""Readers of step-labelled data sets: synthetic rows, and the real sets against their own metadata."""

import json
import re
import statistics

import pytest

from helpers.paths import SHARED
from tracereward.data.readers import read_rows
from tracereward.errors import InputError
from tracereward.evaluate.first_error import f1, outcomes, random_outcome, summarise
from tracereward.evaluate.step_data import ORIGINAL, StepTrace, prompt_of, read_step_traces, split_by_question
from tracereward.modeling.steps import StepRule
from tracereward.tasks.recipes import get_task

DATA = SHARED

PROCESSBENCH = {"problem": "1 + 1 + 1?", "steps": [" 1 + 1 = 2", "2 + 1 = 4\n"], "label": 1, "generator": "m"}
PRMBENCH = {
    "original_question": "q",
    "modified_question": "q, changed",
    "original_process": ["a", "b"],
    "modified_process": ["a", "x", "y"],
    "error_steps": [3, 2, 9],
    "classification": "circular",
}
MRBEN = {
    "Question": "Which?",
    "Options": "A: one \nB: two ",
    "Sampled_Model": "m",
    "Model_Solution_Steps": [
        "Here it is:",
        "Step 1: a",
        "",
        "- part",
        "Step 2: b",
        "Step 2.A: c",
        "Solution: Choice_A",
    ],
    "Model_Solution_Correctness": "incorrect",
    "Model_Solution_First_Error_Step": "2",
}
ROWS = {"processbench": PROCESSBENCH, "prmbench": PRMBENCH, "mrben": MRBEN}


def read(tmp_path, form, *rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return read_step_traces(str(path), form, **options)


def real(name: str) -> str:
    path = DATA / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the data set {name} is not in ../shared/data")
    return str(path)


# ---------- formats ----------


def test_processbench(tmp_path):
    traces = read(tmp_path, "processbench", PROCESSBENCH, {**PROCESSBENCH, "label": -1})
    where = str(tmp_path / "rows.jsonl")
    assert traces == [
        StepTrace(f"{where}:1", "1 + 1 + 1?", ["1 + 1 = 2", "2 + 1 = 4"], 1, "m"),
        StepTrace(f"{where}:2", "1 + 1 + 1?", ["1 + 1 = 2", "2 + 1 = 4"], None, "m"),
    ]


def test_prmbench_yields_modified_traces_and_each_original_once(tmp_path):
    free = {**PRMBENCH, "error_steps": [], "classification": "multi_solutions"}
    traces = read(tmp_path, "prmbench", PRMBENCH, free)
    assert [(t.question, t.steps, t.first_error, t.group) for t in traces] == [
        ("q", ["a", "b"], None, ORIGINAL),
        ("q, changed", ["a", "x", "y"], 1, "circular"),
        ("q, changed", ["a", "x", "y"], None, "multi_solutions"),
    ]
    assert traces[0].where.endswith(":1 (original_process)")


def test_mrben_counts_numbered_steps_not_lines(tmp_path):
    correct = {"Model_Solution_Correctness": "correct", "Model_Solution_First_Error_Step": "N/A"}
    answer = {"Model_Solution_First_Error_Step": "3"}
    traces = read(tmp_path, "mrben", MRBEN, {**MRBEN, **correct}, {**MRBEN, **answer})
    steps = ["Here it is:\nStep 1: a\n- part", "Step 2: b\nStep 2.A: c", "Solution: Choice_A"]
    assert [t.steps for t in traces] == [steps] * 3
    assert [t.first_error for t in traces] == [1, None, 2]
    assert {(t.options, t.group) for t in traces} == {("A: one \nB: two", "m")}


def test_mrben_with_restarting_step_numbers(tmp_path):
    lines = ["Step 1: a", "Step 2: b", "Step 1: c", "Step 2: d", "Step 3: e", "Solution: f"]
    rows = [{**MRBEN, "Model_Solution_Steps": lines, "Model_Solution_First_Error_Step": label} for label in "234"]
    traces = read(tmp_path, "mrben", *rows)
    assert [t.steps for t in traces] == [lines] * 3
    assert [t.first_error for t in traces] == [1, 4, 5]


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("processbench", {"label": 2}, "rows.jsonl:2: field 'label' is 2: give a step from 0 to 1, or -1"),
        ("processbench", {"label": -2}, "field 'label' is -2"),
        ("processbench", {"label": "1"}, "field 'label' holds '1': give whole numbers"),
        ("processbench", {"label": True}, "field 'label' holds True"),
        ("processbench", {"steps": []}, "field 'steps' is empty: give at least one step"),
        ("processbench", {"steps": ["a", " "]}, "field 'steps': step 1 .* is blank: remove it"),
        ("processbench", {"steps": "a"}, "field 'steps' must be a list of texts"),
        ("processbench", {"problem": " "}, "field 'problem' is empty: give a text"),
        ("processbench", {"generator": None}, "field 'generator' is NoneType"),
        ("prmbench", {"error_steps": [0]}, "field 'error_steps' starts with 0: give steps from 1 to 3"),
        ("prmbench", {"error_steps": [4]}, "field 'error_steps' starts with 4"),
        ("prmbench", {"error_steps": 2}, "field 'error_steps' is int: give a list"),
        ("prmbench", {"error_steps": ["2"]}, "field 'error_steps' holds '2'"),
        ("mrben", {"Model_Solution_First_Error_Step": "4"}, "is '4': the steps are 1, 2, 3"),
        ("mrben", {"Model_Solution_First_Error_Step": None}, "is None: the steps are 1, 2, 3"),
        ("mrben", {"Model_Solution_First_Error_Step": "N/A"}, "'N/A', but the solution is 'incorrect': give"),
        ("mrben", {"Model_Solution_Correctness": "correct"}, "'2', but the solution is 'correct'"),
        ("mrben", {"Model_Solution_Correctness": "yes"}, "'Model_Solution_Correctness' is 'yes': give 'correct' or"),
        ("mrben", {"Model_Solution_Steps": ["a", "b"]}, "has no line that starts with 'Step 1:'"),
        ("mrben", {"Options": ["a", "b"]}, "field 'Options' is list"),
    ],
)
def test_invalid_rows_raise_with_line_and_field(tmp_path, form, change, message):
    with pytest.raises(InputError, match=f"rows.jsonl:2: .*{message}" if "rows.jsonl" not in message else message):
        read(tmp_path, form, ROWS[form], {**ROWS[form], **change})


@pytest.mark.parametrize(("form", "row"), ROWS.items())
def test_missing_field_is_named(tmp_path, form, row):
    for field in row.keys() - {"Options"}:
        with pytest.raises(InputError, match=f"rows.jsonl:1: field '{field}' is missing for format '{form}'; fields: "):
            read(tmp_path, form, {name: value for name, value in row.items() if name != field})


def test_limit_and_unknown_format(tmp_path):
    ordered = [{**PROCESSBENCH, "label": label} for label in [1] * 20 + [-1] * 20]
    sampled = read(tmp_path, "processbench", *ordered, limit=15)
    assert len(sampled) == 15
    assert {trace.first_error for trace in sampled} == {1, None}, "a sample, not the first rows of a sorted file"
    assert sampled == read(tmp_path, "processbench", *ordered, limit=15)
    everything = read(tmp_path, "processbench", *ordered, limit=99)
    assert [t for t in everything if t in sampled] == sampled
    assert len(everything) == 40
    with pytest.raises(InputError, match="at least 1"):
        read(tmp_path, "processbench", PROCESSBENCH, limit=0)
    with pytest.raises(InputError, match="no rows"):
        read(tmp_path, "processbench")
    with pytest.raises(InputError, match="did you mean 'mrben'"):
        read(tmp_path, "mr-ben", MRBEN)


# ---------- text ----------


@pytest.mark.parametrize(
    ("delimiter", "steps", "text"),
    [
        ("\n", ["a.", "b\nc", "d"], "a.\nb\nc\nd"),
        ("\n\n", ["a", "b"], "a\n\nb"),
        (". ", ["A is b.", "So c", "d."], "A is b. So c. d."),
    ],
)
def test_join_steps(delimiter, steps, text):
    joined, spans = StepRule(delimiter).join(steps)
    assert joined == text
    assert [joined[start:end] for start, end in spans] == steps


def test_prompts_have_the_wording_of_the_task(tmp_path):
    [trace] = read(tmp_path, "mrben", MRBEN)
    assert prompt_of(trace, get_task("mmlu_pro")) == (
        "Question: Which?\nOptions:\nA. one\nB. two\nEnd with: The answer is (letter).\nAnswer:\n"
    )
    assert prompt_of(trace, get_task("generic")) == "Which?\nA: one \nB: two\n"
    [trace] = read(tmp_path, "processbench", PROCESSBENCH)
    assert prompt_of(trace, get_task("math")).startswith("Problem: 1 + 1 + 1?\nPut the final answer in")
    assert prompt_of(trace, get_task("gsm8k")).startswith("Question: 1 + 1 + 1?\nEnd with ####")
    with pytest.raises(InputError, match=r"rows.jsonl:1: field 'options' is missing for task 'mmlu_pro'"):
        prompt_of(trace, get_task("mmlu_pro"))


def test_split_shares_no_question():
    traces = [StepTrace("", f"q{i % 10}", ["a"], None, "") for i in range(30)]
    fit, rest = split_by_question(traces, 0.3, seed=1)
    assert {t.question for t in fit}.isdisjoint(t.question for t in rest)
    assert (len(fit), len(rest)) == (9, 21)
    assert split_by_question(traces, 0.3, seed=1) == (fit, rest)
    assert split_by_question(traces, 0.3, seed=2) != (fit, rest)


# ---------- the real sets ----------


def test_real_processbench_has_published_counts_and_trivial_baselines():
    """406 correct traces (arXiv 2412.06559, table 1). A trace with a wrong final answer always has a wrong step."""
    source = real("processbench/math")
    traces = read_step_traces(source, "processbench")
    assert sum(t.first_error is None for t in traces) == 406
    assert sum(t.first_error is not None for t in traces) == 594
    raw = [row for _, row in read_rows(source)]
    wrong_answers = [t for t, row in zip(traces, raw, strict=True) if not row["final_answer_correct"]]
    assert len(wrong_answers) == 500
    assert all(t.first_error is not None for t in wrong_answers)
    # Labels count from 0: both the first and the last step can be wrong.
    assert any(t.first_error == 0 for t in traces)
    assert any(t.first_error == len(t.steps) - 1 for t in traces)

    errors, questions = [t.first_error for t in traces], [t.question for t in traces]
    no_error = summarise(outcomes([[0.0] * len(t.steps) for t in traces], errors, 0.0), questions)
    assert (no_error["f1"], no_error["acc_error"], no_error["acc_correct"]) == (0.0, 0.0, 1.0)
    guess = summarise([random_outcome(len(t.steps), t.first_error) for t in traces], questions)
    by_kind = {
        kind: statistics.fmean(1 / (len(row["steps"]) + 1) for row in raw if (row["label"] >= 0) == kind)
        for kind in (True, False)
    }
    assert guess["acc_error"] == pytest.approx(by_kind[True])
    assert guess["acc_correct"] == pytest.approx(by_kind[False])
    assert guess["f1"] == pytest.approx(float(f1(by_kind[True], by_kind[False])))
    assert guess["hit_at_1_normalised"] == pytest.approx(0, abs=1e-12)


def test_real_prmbench_counts_error_steps_from_one():
    """If original and modified trace have equally many steps, the first error is the first step that differs."""
    source = real("prmbench/subset400")
    traces = read_step_traces(source, "prmbench")
    groups = [t.group for t in traces]
    assert groups.count("circular") == 48
    assert groups.count("multi_solutions") == 10
    assert len(traces) - groups.count(ORIGINAL) == 394
    assert sum(t.first_error is not None for t in traces) == 384
    assert all(t.first_error is None for t in traces if t.group in (ORIGINAL, "multi_solutions"))
    modified = iter([t for t in traces if t.group != ORIGINAL])
    shifts = []
    for (_, row), trace in zip(read_rows(source), modified, strict=True):
        original = [step.strip() for step in row["original_process"]]
        if trace.first_error is not None and len(original) == len(trace.steps):
            pairs = enumerate(zip(original, trace.steps))
            shifts.append(trace.first_error - next(i for i, (a, b) in pairs if a != b))
    assert len(shifts) == 197
    assert shifts.count(0) / len(shifts) > 0.8
    assert max(shifts.count(-1), shifts.count(1)) / len(shifts) < 0.1, "labels are shifted by one"


@pytest.mark.parametrize(("name", "erroneous", "correct"), [("biology", 418, 617), ("physics", 348, 319)])
def test_real_mrben_labels_are_step_numbers(name, erroneous, correct):
    """Annotators rewrote the first wrong step, mostly with its number, which must match the labelled step."""
    source = real(f"mrben/{name}")
    traces = read_step_traces(source, "mrben")
    assert sum(t.first_error is not None for t in traces) == erroneous
    assert sum(t.first_error is None for t in traces) == correct
    agree = by_line = several = 0
    for (_, row), trace in zip(read_rows(source), traces, strict=True):
        if trace.first_error is None:
            continue
        rewritten = row["Model_Solution_Rectified_First_Error_Step"]
        number = re.match(r"\s*[Ss]tep\s*\d+", rewritten[0] if isinstance(rewritten, list) else rewritten)
        if number is None:
            continue
        several += 1
        pattern = rf"(?:^|\n){re.sub(r'[Ss]tep *', r'Step *', number[0].strip())}\b"
        agree += bool(re.search(pattern, trace.steps[trace.first_error]))
        by_line += bool(re.match(pattern, row["Model_Solution_Steps"][int(row["Model_Solution_First_Error_Step"]) - 1]))
    assert several > 300
    assert agree / several > 0.98
    assert by_line / several < 0.95, "otherwise lines and numbers agree, and the test has no power"


@pytest.mark.parametrize("name", ["biology", "physics"])
def test_real_mrben_options_fit_a_choice_prompt(name):
    for trace in read_step_traces(real(f"mrben/{name}"), "mrben"):
        assert re.search(r"\nA\. .*\nB\. .*\nC\. .*\nD\. ", prompt_of(trace, get_task("mmlu_pro")), flags=re.DOTALL)
