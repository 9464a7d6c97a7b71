"""Shapes of traces from end to end: fit, score, inspect and serve cut, supervise and reward them alike."""

import itertools
import json

import pytest

from helpers.chat_models import OPENS, save_chat_model
from helpers.command_line import command, refused  # noqa: F401
from helpers.served import client_of, close, save_reward_model
from helpers.tiny import options
from tracereward import TokenRewardModel
from tracereward.files import write_jsonl
from tracereward.synthetic.arithmetic import generate


def logged(count: int) -> tuple[list[dict], list[dict]]:
    """Demonstrations, and for each its right working and one with another result."""
    experts = [{key: row[key] for key in ("prompt", "completion")} for row in generate("misconception", count, 5)]
    candidates = []
    for row in experts:
        working, _, value = row["completion"].rpartition("\n#### ")
        wrong = f"{working}\n#### {(int(value) + 1) % 40}"
        candidates += [{"prompt": row["prompt"], "completion": text} for text in (f"{row['completion']}", wrong)]
    return experts, candidates


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_model_folder):
    """Rows in files, and the options that every fit needs."""
    folder = tmp_path_factory.mktemp("traces")
    for name, rows in zip(("experts", "logged"), logged(20), strict=True):
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder, {
        "demonstrations": folder / "experts.jsonl",
        "candidates": folder / "logged.jsonl",
        "model": tiny_model_folder,
        "task": "arithmetic",
        "granularity": "step",
    }


@pytest.fixture(params=["made", pytest.param("fitted", marks=pytest.mark.long)])
def reward_model(request, given, tokenizer, command):
    """A reward model whose steps are the answer and all lines before it."""
    folder, shared = given
    if request.param == "made":
        return save_reward_model(folder / "made", tokenizer, steps=r"\n(?=####)", granularity="step")
    done = command("fit", *options(**shared, steps=r"\n(?=####)", output_dir=folder / "run"))
    assert done.code == 0, done.err
    return folder / "run" / "reward_model"


def test_steps_of_a_rule_from_end_to_end(reward_model, given, command):
    folder, _ = given
    assert json.loads((reward_model / "tracereward.json").read_text())["steps"] == r"\n(?=####)"

    done = command("score", reward_model, folder / "logged.jsonl", "-o", folder / "scored.jsonl")
    assert done.code == 0, done.err
    scored = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    for row in scored:
        cut = row["completion"].index("####")
        last = [end for (_, end), is_last in zip(row["offsets"], row["step_ends"], strict=True) if is_last]
        assert last == [cut, len(row["completion"])]
        assert row["supervised"] == row["step_ends"]
        assert len(row["step_rewards"]) == 2

    done = command("inspect", folder / "scored.jsonl", "--limit", 1)
    assert done.code == 0, done.err
    assert "#### " in done.out

    pytest.importorskip("fastapi_offline", reason="the packages of tracereward[serve] are not installed")
    row = scored[1]
    with client_of(TokenRewardModel.from_pretrained(reward_model)) as client:
        body = {"prompt": row["prompt"], "completion": row["completion"]}
        [one] = client.post("/v1/score", json=body).json()["results"]
        bounds = [0, row["completion"].index("####"), None]
        steps = [row["completion"][a:b].rstrip("\n") for a, b in itertools.pairwise(bounds)]
        [by_step] = client.post("/v1/score", json={"prompt": row["prompt"], "steps": steps}).json()["results"]
    assert one["step_ends"] == by_step["step_ends"] == row["step_ends"]
    assert one["step_rewards"] == close(row["step_rewards"])


def test_rules_without_a_cut_or_an_effect_are_refused(given, command, tmp_path):
    _, shared = given
    for more, message in (
        ({"steps": "numbered"}, "steps 'numbered' cuts none of the 20 demonstrations"),
        ({"steps": "lines"}, "did you mean 'line'"),
        ({"steps": "blank", "step_delimiter": ". "}, "--steps already says what ends a step"),
    ):
        refused(command("fit", *options(**shared, **more, output_dir=tmp_path / "run")), message)
        assert not (tmp_path / "run").exists()


THOUGHT = "<think>\n{}\n</think>\n{}"


def thinking_rows(rows: list[dict]) -> list[dict]:
    """Rows whose working is thinking and whose last line is the answer."""
    found = []
    for row in rows:
        working, _, value = row["completion"].rpartition("\n")
        found.append({**row, "completion": THOUGHT.format(working, value)})
    return found


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A tiny model over bytes whose chat template opens the thinking in the prompt."""
    return save_chat_model(tmp_path_factory.mktemp("thinker") / "policy", OPENS)


def test_thinking_and_answer_from_end_to_end(tmp_path, thinker, command):
    """The weights of both parts, whatever the length of each; an answer within the thinking does not count."""
    experts, candidates = map(thinking_rows, logged(12))
    write_jsonl(tmp_path / "experts.jsonl", experts)
    write_jsonl(tmp_path / "logged.jsonl", candidates)
    shared = {"demonstrations": tmp_path / "experts.jsonl", "candidates": tmp_path / "logged.jsonl"}
    shared |= {"model": thinker, "task": "arithmetic", "template": "chat"}
    done = command("fit", *options(**shared, thinking_weight=0.25, output_dir=tmp_path / "run"))
    assert done.code == 0, done.err
    reward_model = tmp_path / "run" / "reward_model"
    settings = json.loads((reward_model / "tracereward.json").read_text())
    assert (settings["thinking_weight"], settings["think_opened"]) == (0.25, True)

    row = candidates[0]
    cut_off = {**row, "completion": row["completion"].partition("</think>")[0] + "#### 1", "finished": False}
    write_jsonl(tmp_path / "rows.jsonl", [row, cut_off])
    done = command("score", reward_model, tmp_path / "rows.jsonl", "-o", tmp_path / "scored.jsonl")
    assert done.code == 0, done.err
    whole, open_end = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    start = whole["completion"].index("####")
    for name, inside in (("thinking", lambda at: at < start), ("answer", lambda at: at >= start)):
        rewards = [r for r, (at, _) in zip(whole["token_rewards"], whole["offsets"], strict=True) if inside(at)]
        assert whole["parts"][name] == pytest.approx(sum(rewards) / len(rewards))
    assert whole["reward"] == pytest.approx(0.25 * whole["parts"]["thinking"] + 0.75 * whole["parts"]["answer"])
    assert open_end["parts"] == {"thinking": pytest.approx(open_end["reward"])}

    done = command("inspect", tmp_path / "rows.jsonl", "--model", reward_model, "-o", tmp_path / "page.html")
    assert done.code == 0, done.err
    page = (tmp_path / "page.html").read_text()
    assert '"parts":{"thinking":' in page
    assert page.count('"answer":null') >= 1  # that of the trace that is cut off

    model = TokenRewardModel.from_pretrained(reward_model)
    with client_of(model) as client:
        body = {"prompt": [{"role": "user", "content": row["prompt"]}], "completion": row["completion"]}
        [one] = client.post("/v1/score", json=body).json()["results"]
    assert one["parts"] == close(whole["parts"])
    assert one["reward"] == close(whole["reward"])

    no_thinking = {**shared, "demonstrations": tmp_path / "plain.jsonl"}
    write_jsonl(tmp_path / "plain.jsonl", [{**experts[0], "completion": "1 + 2 = 3"}, *experts[1:]])
    refused(
        command("fit", *options(**no_thinking, thinking_weight=0.25, output_dir=tmp_path / "other")),
        "completion: the thinking is not closed",
    )
