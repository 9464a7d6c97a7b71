"""Columns of other tools: what each becomes is written here by hand; what has two readings is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from helpers.command_line import bench, command, refused  # noqa: F401
from tracereward.data.candidates import read_questions
from tracereward.data.columns import own_columns
from tracereward.data.demonstrations import load_demonstrations
from tracereward.data.trace_rows import candidate_rows
from tracereward.errors import InputError
from tracereward.evaluate.pool_data import read_pool
from tracereward.tasks.recipes import TASKS

Q, T = "1 + 2 = ?\n", "so\n#### 3"
USER, ASSISTANT = {"role": "user", "content": Q}, {"role": "assistant", "content": T}
THOUGHT = {"role": "assistant", "content": "#### 3", "reasoning_content": "so"}
SYSTEM = {"role": "system", "content": "Be brief."}

# Row, prompt, completion, gold answer.
SHAPES = {
    "messages": ({"messages": [USER, ASSISTANT]}, Q, T, None),
    "system": ({"messages": [SYSTEM, USER, ASSISTANT], "answer": "3"}, [SYSTEM, USER], T, "3"),
    "several turns": ({"messages": [USER, ASSISTANT, USER, THOUGHT]}, [USER, ASSISTANT, USER], [THOUGHT], None),
    "UltraChat": ({"prompt": "a title", "prompt_id": "7", "messages": [USER, ASSISTANT]}, Q, T, None),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": T, "weight": 1}], "system": ""},
        Q,
        T,
        None,
    ),
    "ShareGPT with a system": (
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": T}], "system": "Be brief."},
        [SYSTEM, USER],
        T,
        None,
    ),
    "Alpaca": ({"instruction": "Add.", "input": "1 + 2", "output": T}, "Add.\n\n1 + 2", T, None),
    "Alpaca without input": ({"instruction": Q, "input": "", "output": T}, Q, T, None),
    "Alpaca with history": (
        {"instruction": Q, "output": T, "history": [["Hi", "Hello"]], "system": "Be brief."},
        [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, USER],
        T,
        None,
    ),
    "Dolly": ({"instruction": "Add.", "context": "1 + 2", "response": T, "category": "qa"}, "Add.\n\n1 + 2", T, None),
    "question/response": ({"question": Q, "response": T, "answer": "3"}, Q, T, "3"),
    "question/answer": ({"question": Q, "answer": T}, Q, T, None),
    "problem/solution": ({"problem": Q, "solution": T, "answer": 3, "source": "x"}, Q, T, "3"),
    "prompt/response": ({"prompt": Q, "response": T}, Q, T, None),
    "prompt/solution": ({"prompt": [USER], "solution": T}, [USER], T, None),
    "query/response": ({"query": Q, "response": T, "type": "x"}, Q, T, None),
    "input/output": ({"input": Q, "output": T}, Q, T, None),
    "problem/generated_solution": (
        {"problem": Q, "generated_solution": T, "expected_answer": "3", "problem_source": "x"},
        Q,
        T,
        "3",
    ),
    "reasoning": ({"question": Q, "reasoning_content": "so", "response": "#### 3"}, Q, [THOUGHT], None),
}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", SHAPES)
def test_demonstrations_and_traces_to_score(tmp_path, capfd, name):
    row, prompt, completion, answer = SHAPES[name]
    source = write(tmp_path / "rows.jsonl", row, row)
    found = load_demonstrations(source, TASKS["generic"])
    assert [(f["prompt"], f["completion"], f["answer"]) for f in found] == [(prompt, completion, answer)] * 2
    (_, scored), _ = candidate_rows(source)
    assert (scored["prompt"], scored["completion"]) == (prompt, completion)
    assert str(scored.get("answer", None)) == str(answer)
    said = [line for line in capfd.readouterr().err.splitlines() if "reading" in line]
    assert len(said) == 1, said  # once, not once a row
    assert source in said[0]


PAIR = [{"role": "assistant", "content": "no"}]


@pytest.mark.parametrize(
    ("row", "completion", "answer", "said"),
    [
        (
            {"question": Q, "rationale": "so ", "answer": "3."},
            "so\nThe answer is 3.",
            "3.",
            "'rationale' and 'answer' as",
        ),
        ({"question": Q, "rationale": T, "answer": 3}, T, "3", "'rationale' as the completion, 'answer' as the gold"),
        (
            {"question": Q, "explanation": "so", "answer": True},
            "so\nThe answer is yes.",
            "yes",
            "'explanation' and 'ans",
        ),
        ({"prompt": Q, "reasoning": "so", "answer": "3"}, "so\nThe answer is 3.", "3", "'reasoning' and 'answer' as"),
        ({"prompt": Q, "chosen": T, "rejected": "no"}, T, None, "'rejected' as the worse trace, which is not read"),
        ({"prompt": Q, "chosen": [ASSISTANT], "rejected": PAIR}, [ASSISTANT], None, "'chosen' as the completion"),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [USER, *PAIR]},
            T,
            None,
            "'last message of chosen' as the completion",
        ),
    ],
)
def test_experts_in_rationales_and_in_pairs(tmp_path, capfd, row, completion, answer, said):
    """As traces to score they are refused: the answer may be the gold one, and a pair has two traces."""
    source = write(tmp_path / "rows.jsonl", row)
    (found,) = load_demonstrations(source, TASKS["generic"])
    assert (found["prompt"], found["completion"], found["answer"]) == (Q, completion, answer)
    assert said in capfd.readouterr().err
    with pytest.raises(InputError, match=r"rows.jsonl:1: "):
        list(candidate_rows(source))


@pytest.mark.parametrize(
    ("row", "prompt", "completion", "answer"),
    [
        ({"question": Q, "answer": "3"}, Q, None, "3"),
        ({"problem": Q, "answer": 3}, Q, None, "3"),
        ({"question": Q, "answer": T}, Q, T, None),  # a trace, which as a gold answer would match nothing
        ({"question": Q, "answer": "so #### 3"}, Q, "so #### 3", None),
        ({"messages": [SYSTEM, USER]}, [SYSTEM, USER], None, None),
        ({"messages": [USER, ASSISTANT]}, Q, T, None),
        ({"instruction": "Add.", "input": "1 + 2"}, "Add.\n\n1 + 2", None, None),
        ({"prompt": Q, "question": 4, "answer": "3"}, Q, None, "3"),
        ({"question": Q, "response": T, "answer": "3"}, Q, T, "3"),
    ],
)
def test_questions(tmp_path, row, prompt, completion, answer):
    source = write(tmp_path / "rows.jsonl", row)
    (found,) = load_demonstrations(source, TASKS["generic"], require_completion=False)
    assert (found["prompt"], found["completion"], found["answer"]) == (prompt, completion, answer)
    (known,) = read_questions(source, TASKS["generic"]).values()
    assert (known["prompt"], known["answer"]) == (prompt, answer)


@pytest.mark.parametrize("name", ["completions", "responses", "outputs", "samples", "generations"])
def test_lists_of_traces_are_candidates(tmp_path, name):
    """The gold answer next to them is never taken for the trace."""
    row = {"prompt": Q, name: [T, "no"], "answer": "3"}
    assert own_columns(row, "here", "x") == {**row, "candidates": [T, "no"]}
    for wrong in ([], [{"text": T}], [None]):
        with pytest.raises(InputError, match=f"here: field '{name}' must be a list of texts"):
            own_columns({"prompt": Q, name: wrong, "answer": "3"}, "here", "x")
    with pytest.raises(InputError, match="no completion"):
        load_demonstrations(write(tmp_path / "rows.jsonl", row), TASKS["generic"])


def test_rows_of_ours_stay_as_they_are():
    """Rows that `sample` wrote have an index as question; other columns of a row of ours mean nothing."""
    for row in (
        {"question": 0, "prompt": Q, "completion": T, "answer": "3", "options": ["a"]},
        {"prompt": Q, "candidates": [T], "messages": [USER]},
        {"prompt": Q, "steps": ["so"], "response": "a"},
        {"a": 1},
    ):
        assert own_columns(row, "here", "rows.jsonl") is row
    assert own_columns({"problem": Q, "steps": ["so"], "label": -1}, "here", "x")["steps"] == ["so"]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"question": Q, "response": T, "output": "no"}, ["'response', 'output' could each be the completion"]),
        ({"question": Q, "problem": "no", "response": T}, ["'question', 'problem' could each be the prompt"]),
        ({"question": Q, "context": "c", "response": T}, ["'context' would be lost"]),
        (
            {"question": Q, "reasoning": "so", "cot": "so", "answer": "3"},
            ["'cot', 'reasoning' would be lost", "'reasoning': 'completion'"],
        ),
        ({"question": Q, "rationale": "so", "answer": T}, ["'rationale' would be lost"]),
        ({"prompt": Q, "chosen": T, "rejected": "no", "response": "a"}, ["'chosen', 'rejected' would be lost"]),
        ({"messages": [USER, {"role": "tool", "content": "3"}]}, ["tool calls are not supported"]),
        ({"messages": [USER, ASSISTANT], "tools": [{"name": "sum"}]}, ["'tools' is not read"]),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"id": "1"}]}]}, ["tool_calls of a message is not read"]),
        ({"messages": [ASSISTANT]}, ["no message before the assistant's"]),
        ({"conversations": [{"from": "function_call", "value": "f"}]}, ["tool calls are not supported"]),
        ({"conversations": "Hi"}, ["'conversations' is str"]),
        ({"instruction": 3, "output": T}, ["'instruction' is int, not text"]),
        (
            {"question": "Q?", "options": ["a", "b"], "reasoning": "so", "answer": "B"},
            ["'options' would be lost", "--task medreason"],
        ),
        (
            {"problem": Q, "solution": T, "generations": [T], "answer": "3"},
            ["'generations' could each", "--task openr1"],
        ),
        ({"title": Q, "body": T}, ["rename_columns({'title': 'prompt', 'body': 'completion'})"]),
        ({"question": Q, "text": T}, ["no completion", "rename_columns({'text': 'completion'})"]),
        ({"prompt": Q, "text": T}, ["no completion", "rename_columns({'text': 'completion'})"]),
    ],
)
def test_what_is_not_read_is_refused_with_the_command_that_fits(tmp_path, row, parts):
    source = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(InputError) as caught:
        load_demonstrations(source, TASKS["generic"])
    assert str(caught.value).startswith(f"{source}:1: ")
    for part in parts:
        assert part in str(caught.value)


def test_the_command_in_the_message_works(tmp_path):
    """Run as printed, in a shell."""
    source = write(tmp_path / "rows.jsonl", {"title": Q, "body": T}, {"title": "2", "body": "3"})
    with pytest.raises(InputError) as caught:
        load_demonstrations(source, TASKS["generic"])
    line = str(caught.value).split("for example: ")[1].replace("python -c", f"{sys.executable} -c", 1)
    subprocess.run(line, shell=True, check=True, cwd=tmp_path, capture_output=True, timeout=120)
    found = load_demonstrations(str(tmp_path / "renamed.jsonl"), TASKS["generic"])
    assert [(row["prompt"], row["completion"]) for row in found] == [(Q, T), ("2", "3")]


def test_questions_with_options_name_the_task_that_reads_them(tmp_path):
    row = {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    source = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(InputError, match="'choices' would be lost; --task arc reads them"):
        load_demonstrations(source, TASKS["generic"], require_completion=False)


def test_another_task_names_the_one_that_fits(tmp_path):
    row = {"question": "Q?", "options": ["a", "b"], "reasoning": "so", "answer": "B"}
    source = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(InputError, match=r"field 'problem' is missing for task 'math'.*; --task medreason reads them"):
        load_demonstrations(source, TASKS["math"])


def test_pools(tmp_path):
    """With `response` the answer is the gold one; with `solution`, as before, it is the candidate's own."""
    shapes = [
        {"question": Q, "response": T, "correct": False, "answer": "4"},
        {"messages": [USER, THOUGHT], "correct": True},
        {"question": Q, "solution": "so", "answer": "3", "correct": True},
    ]
    rows = read_pool(write(tmp_path / "pool.jsonl", *shapes), TASKS["arithmetic"])
    assert [row.prompt for row in rows] == [Q] * 3
    assert [row.completion for row in rows] == [T, "<think>\nso\n</think>\n\n#### 3", "so\n#### 3"]
    assert [row.answer for row in rows] == ["3"] * 3
    (row,) = read_pool(
        write(tmp_path / "math.jsonl", {"question": "1?", "options": ["a"], "response": T, "correct": 1}),
        TASKS["gsm8k"],
    )
    assert (row.prompt, row.completion) == ("Question: 1?\nEnd with #### and the number.\nAnswer:\n", T)


def test_rewards_of_all_shapes_are_those_of_our_own_columns(command, bench, tmp_path):
    own = write(tmp_path / "own.jsonl", {"prompt": "1 + 2 = ?\n", "completion": "1 + 2 = 3\n#### 3"})
    expected = json.loads(command("score", bench.reward_model, own).out)["token_rewards"]
    for number, row in enumerate(
        [
            {"messages": [USER, {"role": "assistant", "content": "1 + 2 = 3\n#### 3"}]},
            {"instruction": Q, "input": "", "output": "1 + 2 = 3\n#### 3"},
            {"prompt": Q, "completion": [{"role": "assistant", "content": "1 + 2 = 3\n#### 3"}]},
        ]
    ):
        done = command("score", bench.reward_model, write(tmp_path / f"{number}.jsonl", row))
        scored = json.loads(done.out)
        assert scored["completion"] == "1 + 2 = 3\n#### 3"
        assert scored["token_rewards"] == expected
    table = Dataset.from_list([{"query": Q, "response": "1 + 2 = 3\n#### 3"}])
    table.to_csv(tmp_path / "rows.csv", index=False)
    done = command("score", bench.reward_model, tmp_path / "rows.csv")
    assert "reading 'query' as the prompt, 'response' as the completion" in done.err
    assert json.loads(done.out)["token_rewards"] == expected


@pytest.mark.parametrize("name", ["sft", "score", "rerank"])
def test_unknown_columns_on_the_command_line(command, bench, tmp_path, name):
    source = write(tmp_path / "rows.jsonl", {"title": Q, "body": T})
    words = [name, bench.bare_reward, source]
    if name == "sft":
        words = ["sft", "--dataset_name", source, "--model_name_or_path", bench.bare, "--output_dir", tmp_path / "run"]
    refused(command(*words), f"{source}:1: ", "rename_columns({'title': 'prompt', 'body': 'completion'})")
