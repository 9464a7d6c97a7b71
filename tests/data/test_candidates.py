"""Reading candidates in every form, and matching them with demonstrations: expectations written by hand."""

import json

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from tracereward.data.candidates import CandidateRow, read_candidates
from tracereward.data.matching import match
from tracereward.errors import InputError
from tracereward.tasks.recipes import get_task

GSM8K, GENERIC = get_task("gsm8k"), get_task("generic")
SAMPLED = {
    "question": 0,
    "prompt": "3 tins of 3?\n",
    "completion": "3 * 3\n#### 8",
    "answer": "9",
    "extracted": "8",
    "correct": False,
    "finished": True,
    "length": 7,
    "logprob": -0.5,
}
POOL = {"qid": 4, "model": "m", "question": "3 tins of 3?", "reasoning": "It is 3 * 3.", "answer": "9"}


def rows_as(kind, rows, folder):
    if kind == "file":
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)
    return {"list": list, "table": pd.DataFrame, "dataset": Dataset.from_list}[kind](rows)


@pytest.mark.parametrize("kind", ["file", "list", "table", "dataset"])
def test_sampled_rows_and_pools_read_alike_from_every_source(tmp_path, kind):
    first, second = read_candidates(rows_as(kind, [SAMPLED, {**SAMPLED, "logprob": None}], tmp_path), GSM8K)
    assert (first.prompt, first.completion, first.answer, first.correct) == (
        SAMPLED["prompt"], SAMPLED["completion"], "8", False,
    )  # fmt: skip
    assert (first.logprob, second.logprob, first.finished, first.labelled) == (-0.5, None, True, True)
    assert first.where == (f"{tmp_path / 'rows.jsonl'}:1" if kind == "file" else "candidates[0]")
    # `answer` of a pool row is the candidate's own, and is appended where the trace states none.
    (row,) = read_candidates(rows_as(kind, [POOL], tmp_path), GSM8K)
    assert (row.answer, row.correct, row.model) == ("9", None, "m")
    assert row.completion == "It is 3 * 3.\n#### 9"
    assert row.prompt == "Question: 3 tins of 3?\nEnd with #### and the number.\nAnswer:\n"


def test_a_gold_answer_is_never_the_candidates_answer():
    (row,) = read_candidates([{"prompt": "p", "completion": "I do not know", "answer": "9"}], GSM8K)
    assert (row.answer, row.correct) == (None, False)


def test_an_end_mark_means_that_the_trace_is_finished():
    (row,) = read_candidates([{"prompt": "p", "completion": "#### 9<|im_end|>", "finished": False}], GSM8K)
    assert (row.completion, row.finished) == ("#### 9", True)


def test_a_row_of_several_candidates_is_one_for_each():
    row = {"prompt": "p", "candidates": ["#### 9", "#### 8"], "answer": "9", "finished": [True, False], "model": "m"}
    found = [(r.completion, r.answer, r.correct, r.finished, r.model) for r in read_candidates([row], GSM8K)]
    assert found == [("#### 9", "9", True, True, "m"), ("#### 8", "8", False, False, "m")]


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ([], "no rows"),
        (["text"], r"candidates\[0\] must be a dict"),
        ({"prompt": ["p"], "completion": ["c"]}, "not dict"),
        (DatasetDict(test=Dataset.from_list([SAMPLED])), "choose one of its splits"),
        ([SAMPLED, {"prompt": "p"}], r"candidates\[1\]: no trace"),
        ([{**SAMPLED, "completion": 5}], r"candidates\[0\]: field 'completion' is int, not text"),
        ([{**SAMPLED, "correct": "maybe"}], r"candidates\[0\]: correct must be true or false"),
        ([{**SAMPLED, "prompt": "half \ud800"}], r"candidates\[0\]: .*surrogate"),
        ([{"prompt": "p", "candidates": ["c", None]}], r"candidates\[0\]: candidates must be a list"),
        ([{"prompt": "p", "candidates": ["c"], "logprob": [0, 1]}], "1 candidates but 2 values in logprob"),
        (iter([SAMPLED]), "list_iterator"),
        (3, "not int"),
    ],
)
def test_refused_sources(source, named):
    with pytest.raises(InputError, match=named):
        read_candidates(source, GSM8K)


def demonstration(prompt, completion, answer=None, source="d:1"):
    return {"prompt": prompt, "completion": completion, "answer": answer, "source": source}


def candidate(prompt, completion, where="c:1", question=None) -> CandidateRow:
    return CandidateRow(
        where=where, question=question or str(prompt), prompt=prompt, completion=completion,
        answer=GSM8K.extract(completion), correct=None, labelled=False, model=None, logprob=None, finished=True,
    )  # fmt: skip


def test_match_groups_by_prompt_and_says_what_is_odd():
    asked = [{"role": "user", "content": "b"}]
    demonstrations = [
        demonstration("a", "#### 1"),
        demonstration("b", "#### 2", source="d:2"),
        demonstration("a", [{"role": "assistant", "content": "so #### 1"}], source="d:3"),
        demonstration("alone", "#### 3", source="d:4"),
        demonstration("only a prompt", None, source="d:5"),
    ]
    candidates = [
        candidate("a", "#### 1 ", "c:1", "7"),  # equals the first demonstration but for white space
        candidate("a", "#### 5", "c:2", "7"),
        candidate(asked, "#### 5", "c:3", "7"),  # rendered as the text "b" is
        candidate("other", "#### 5", "c:4", "9"),
        candidate("a", "so #### 1", "c:5", "7"),  # equals the second one, a message
        candidate("b", " \n", "c:6", "8"),
    ]
    questions, remarks = match(demonstrations, candidates)
    found = [(q.where, [d["source"] for d in q.demonstrations], [c.where for c in q.candidates]) for q in questions]
    assert found == [
        ("d:1", ["d:1", "d:3"], ["c:2"]),
        ("d:2", ["d:2"], ["c:3"]),
        ("d:4", ["d:4"], []),
        ("c:4", [], ["c:4"]),
    ]
    for said in (
        "1 of 6 candidates are empty and left out, the first at c:6",
        "2 of 5 candidates equal a demonstration",
        "1 of 2 question ids have several prompts, the first '7' at c:3",
        "1 of 4 questions have no demonstration, the first at c:4",
        "1 of 4 questions have no candidate to compare, the first at d:4",
        "3 of 4 questions have one candidate",
    ):
        assert sum(said in remark for remark in remarks) == 1, (said, remarks)
    assert len(remarks) == 6


def test_prompts_that_never_meet_are_shown_from_where_they_differ():
    demonstrations = [demonstration("Question: 3 tins of 3?\nEnd with ####.\n", "#### 9", source="d.jsonl:1")]
    candidates = [candidate("zzz", "#### 9", "c.jsonl:1"), candidate("Question: 3 tins of 3?\n", "#### 9", "c.jsonl:2")]
    with pytest.raises(InputError, match="no candidate has the prompt") as refusal:
        match(demonstrations, candidates)
    assert "d.jsonl:1" in str(refusal.value)
    assert "End with" in str(refusal.value)
    with pytest.raises(InputError, match="all 1 candidates equal a demonstration"):
        match([demonstration("a", "#### 1")], [candidate("a", "#### 1")])
    with pytest.raises(InputError, match="all 1 candidates are empty"):
        match([demonstration("a", "#### 1")], [candidate("a", " ")])
