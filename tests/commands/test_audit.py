"""`tracereward audit` from the command line: findings and scores in order, the page, marks that are dropped again."""

import json

import pytest

from helpers.command_line import command, refused  # noqa: F401
from helpers.tiny import rows
from tracereward.data.marks import fingerprint
from tracereward.files import write_jsonl
from tracereward.synthetic.arithmetic import generate


@pytest.fixture(scope="module")
def demonstrations():
    """Right rows, and behind them an equation that does not hold, a copy, another answer, and one without an answer."""
    found = [
        {"prompt": row["prompt"], "completion": row["completion"]} for row in generate("misconception", 30, seed=3)
    ]
    first, _, last = found[1]["completion"].rpartition("#### ")
    return [
        *found,
        {"prompt": "2 + 2 = ?\n", "completion": "2 + 2 = 5\n#### 5"},
        dict(found[0]),
        {"prompt": found[1]["prompt"], "completion": f"{first}#### {int(last) + 1}"},
        {"prompt": "3 + 2 = ?\n", "completion": "3 + 2 = 5\n5 + 0 = 5"},
    ]


def data_of(page) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def test_audit_orders_and_marks_are_dropped(command, demonstrations, tiny_model_folder, tmp_path):
    data, out = tmp_path / "experts.jsonl", tmp_path / "audit"
    write_jsonl(data, demonstrations)
    done = command("audit", data, "--task", "arithmetic", "--model", tiny_model_folder, "--output-dir", out)
    assert done.code == 0, done.err
    assert done.out.strip() == str(out / "audit.html")
    found = rows(out / "audit.jsonl")
    assert len(found) == len(demonstrations)
    kinds = {row["source"].rpartition(":")[2]: {one["kind"] for one in row["findings"]} for row in found}
    assert kinds["31"] == {"equation"}
    assert "duplicate prompt" in kinds["32"]
    assert "contradiction" in kinds["33"] & kinds["2"]
    assert kinds["34"] == {"unreadable"}
    wrong = [row for row in found if {"equation", "contradiction", "unreadable"} & {f["kind"] for f in row["findings"]}]
    assert found[: len(wrong)] == wrong  # first, what is wrong by its text
    rest = [row["suspicion"] for row in found[len(wrong) :]]
    assert rest == sorted(rest, reverse=True)
    for row in found:
        assert "".join(step["text"] for step in row["steps"]).strip() == row["completion"].strip()
        rewards = [step["reward"] for step in row["steps"]]
        assert row["lowest_step"] == rewards.index(min(rewards))
        assert row["reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-3)

    page = data_of(out / "audit.html")
    assert [row["id"] for row in page["rows"]] == [row["id"] for row in found]
    assert page["rows"][0]["export"] == {"prompt": found[0]["prompt"], "completion": found[0]["completion"]}
    refused(command("audit", data, "--task", "arithmetic", "--output-dir", out), "audit.jsonl exists", "--overwrite")

    marks = tmp_path / "marks.jsonl"
    dropped = [row["id"] for row in found[:2]]
    write_jsonl(marks, [{"id": name, "mark": "drop"} for name in dropped])
    logged = [{"prompt": row["prompt"], "completion": f"{row['completion']}0"} for row in demonstrations[:30]]
    write_jsonl(tmp_path / "logged.jsonl", logged)
    done = command(
        *("fit", "--demonstrations", data, "--candidates", tmp_path / "logged.jsonl", "--task", "arithmetic"),
        *("--model", tiny_model_folder, "--drop", marks, "--output_dir", tmp_path / "run"),
    )
    count = sum(fingerprint({**row, "completion": row["completion"]}) in dropped for row in demonstrations)
    assert count == 2
    assert f"2 of {len(demonstrations)} demonstrations dropped" in done.err, done.err


def test_without_a_model_only_the_text_is_checked(command, demonstrations, tmp_path):
    data, out = tmp_path / "experts.jsonl", tmp_path / "audit"
    hostile = "</script><script>alert(1)</script>\u202e"
    write_jsonl(data, [*demonstrations, {"prompt": hostile, "completion": f"{hostile}\n#### 1"}])
    candidates = [{"prompt": demonstrations[5]["prompt"], "completion": "#### 999"}] * 3
    write_jsonl(tmp_path / "logged.jsonl", candidates)
    done = command(
        *("audit", data, "--task", "arithmetic", "--candidates", tmp_path / "logged.jsonl", "--output-dir", out)
    )
    assert done.code == 0, done.err
    found = rows(out / "audit.jsonl")
    assert {one["kind"] for row in found for one in row["findings"]} >= {"outvoted", "equation", "unreadable"}
    assert all("reward" not in row for row in found)
    text = (out / "audit.html").read_text(encoding="utf-8")
    assert hostile not in text
    assert "alert(1)" in text  # as data


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--order", "lowest"], "did you mean"),
        (["--step-delimiter", ""], "empty"),
        (["--model", "nowhere/"], "nowhere"),
    ],
)
def test_bad_input_is_refused(command, words, part, demonstrations, tmp_path):
    write_jsonl(tmp_path / "experts.jsonl", demonstrations)
    refused(command("audit", tmp_path / "experts.jsonl", *words, "--output-dir", tmp_path / "out"), part)
