"""Accuracy, pass@k and failures of a policy: by enumeration, by hand and on the command line."""

import json
import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny import launcher
from tracereward.cli import app
from tracereward.evaluate.policy import evaluate_policy, pass_at_k, policy_tables
from tracereward.files import write_jsonl
from tracereward.metrics import bootstrap_interval
from tracereward.tasks.recipes import get_task


@given(right=st.lists(st.booleans(), min_size=1, max_size=9), data=st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_trace(right, data):
    k = data.draw(st.integers(1, len(right)))
    passed = [any(subset) for subset in combinations(right, k)]
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(passed) / len(passed))


def row(question, kind) -> dict:
    """A trace: correct (R), wrong (W), without an answer (N), or truncated without one (C) or with a wrong one (D)."""
    return {
        "question": question,
        "correct": kind == "R",
        "finished": kind not in "CD",
        "extracted": {"R": "1", "W": "2", "N": None, "C": None, "D": "2"}[kind],
    }


def test_accuracies_and_failures_by_hand():
    """A correct trace that was truncated counts as correct."""
    greedy = [row(q, kind) for q, kind in enumerate("RWNCR")]
    greedy[0]["finished"] = False
    sampled = [row(q, kind) for q, kinds in enumerate(["RRW", "WWD", "NCR", "CCC", "RRR"]) for kind in kinds]
    result = evaluate_policy(greedy, sampled, seed=4)
    assert result["questions"] == 5
    found = result["greedy"]
    low, high = found.pop("interval")
    assert found == {"traces": 5, "accuracy": 0.4, "wrong_answer": 0.2, "no_answer": 0.2, "cut_off": 0.2}
    z, p = 1.959963984540054, 0.4  # Wilson
    centre, half = p + z * z / 10, z * math.sqrt(p * (1 - p) / 5 + z * z / 100)
    assert low == pytest.approx((centre - half) / (1 + z * z / 5))
    assert high == pytest.approx((centre + half) / (1 + z * z / 5))

    found = result["sampled"]
    shares = [2 / 3, 0.0, 1 / 3, 0.0, 1.0]
    assert found.pop("interval") == list(bootstrap_interval(shares, 4))
    expected = {"accuracy": 6 / 15, "wrong_answer": 3 / 15, "no_answer": 1 / 15, "cut_off": 5 / 15}
    assert found == {"traces": 15, **{name: pytest.approx(value) for name, value in expected.items()}}

    # Of three samples: two correct, none, one, none, all. pass@2 of one right is 1 - C(2, 2) / C(3, 2).
    by_k = {"1": shares, "2": [1.0, 0.0, 2 / 3, 0.0, 1.0], "3": [1.0, 0.0, 1.0, 0.0, 1.0]}
    assert result["pass_at_k"].keys() == by_k.keys()
    for k, values in by_k.items():
        assert result["pass_at_k"][k] == pytest.approx([sum(values) / 5, *bootstrap_interval(values, 4)]), k


@pytest.mark.parametrize(("n", "ks"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_k_doubles_up_to_n(n, ks):
    sampled = [row(q, "R" if k <= q else "W") for q in range(3) for k in range(n)]
    result = evaluate_policy([row(q, "R") for q in range(3)], sampled)
    assert [int(k) for k in result["pass_at_k"]] == ks
    assert result["pass_at_k"]["1"][0] == pytest.approx(result["sampled"]["accuracy"])


def test_greedy_only_has_no_pass_at_k():
    result = evaluate_policy([row(0, "R"), row(1, "W")], [])
    assert "sampled" not in result
    assert "pass_at_k" not in result
    (table,) = policy_tables(result)
    assert table.rows[0][:3] == ["greedy", 2, 50.0]


def test_tables_show_percentages():
    result = evaluate_policy([row(0, "R"), row(1, "N")], [row(q, kind) for q in (0, 1) for kind in "RC"])
    accuracy, passed = policy_tables(result)
    assert accuracy.rows[0][:3] == ["greedy", 2, 50.0]
    assert accuracy.rows[0][-3:] == [0.0, 50.0, 0.0]
    assert accuracy.rows[1][:3] == ["sampled", 4, 50.0]
    assert accuracy.rows[1][-3:] == [0.0, 0.0, 50.0]
    assert [cells[:2] for cells in passed.rows] == [[1, 50.0], [2, 100.0]]


# ---------- command line ----------


@pytest.fixture(scope="module")
def data(tmp_path_factory, experts):
    path = tmp_path_factory.mktemp("policy") / "questions.jsonl"
    write_jsonl(path, [{"prompt": r["prompt"], "answer": r["answer"]} for r in experts])
    return path


def test_evaluate_policy_matches_the_traces_of_sample(tiny_model_folder, data, tmp_path):
    """The same seed gives the samples of `tracereward sample`; accuracies by hand."""
    common = ["--task", "arithmetic", "--data", data, "--limit", 5, "--max-new-tokens", 8]
    done = launcher()(
        "evaluate", "policy", tiny_model_folder, *common, "-n", 3, "--seed", 3, "-o", tmp_path / "out", "--json"
    )
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert json.loads((tmp_path / "out" / "policy.json").read_text()) == result
    page = (tmp_path / "out" / "policy.html").read_text()
    assert "pass@k, unbiased estimate" in page
    assert f"{tiny_model_folder} on {data}" in page

    verify, extract = get_task("arithmetic").verify, get_task("arithmetic").extract
    for name, options in (("greedy", ["-n", 1, "--temperature", 0]), ("sampled", ["-n", 3])):
        seed = [] if name == "greedy" else ["--seed", 3]
        done = launcher()("sample", tiny_model_folder, *common, *options, *seed)
        rows = [json.loads(line) for line in done.out.splitlines()]
        right = [verify(r["completion"], r["answer"]) for r in rows]
        assert result[name]["traces"] == len(rows)
        assert result[name]["accuracy"] == sum(right) / len(rows)
        assert result[name]["cut_off"] == sum(not ok and r["length"] == 8 for ok, r in zip(right, rows)) / len(rows)
        none = sum(r["finished"] and extract(r["completion"]) is None for r in rows)
        assert result[name]["no_answer"] == none / len(rows)


def test_tables_are_printed_without_json(tiny_model_folder, data, tmp_path):
    words = ["evaluate", "policy", tiny_model_folder, "--task", "arithmetic", "--data", data, "--limit", 2, "-n", 0]
    done = launcher()(*words, "--max-new-tokens", 4, "-o", tmp_path)
    assert done.code == 0, done.err
    assert "Accuracy on 2 questions" in done.out
    assert "greedy" in done.out
    assert "pass@k" not in done.out


def test_invalid_arguments_of_evaluate_policy(tiny_model_folder, data, tmp_path, monkeypatch, capsys):
    def run(*argv):
        monkeypatch.setattr("sys.argv", ["tracereward", "evaluate", "policy", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    base = [tiny_model_folder, "--task", "arithmetic", "-o", tmp_path / "out", "--max-new-tokens", 2]
    assert "at temperature 0 all samples" in run(*base, "--data", data, "--temperature", 0)
    unknown = tmp_path / "unknown.jsonl"
    write_jsonl(unknown, [{"prompt": "1 + 1 = ?\n", "answer": "2"}, {"prompt": "1 + 2 = ?\n"}])
    assert f"{unknown}:2: no gold answer" in run(*base, "--data", unknown)
    for option, value in (("--temperature", -1), ("--temperature", "nan"), ("--temperature", "inf"), ("--seed", -1)):
        assert option in run(*base, "--data", data, option, value)
    assert "--max-new-tokens" in run(tiny_model_folder, "--data", data, "--max-new-tokens", 0)
    assert "no such model folder" in run(tmp_path / "none", "--data", data)
    assert not (tmp_path / "out").exists()
