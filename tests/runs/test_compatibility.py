"""Reward models and run folders of an earlier version, see `fixtures/compat/README.md`."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.paths import ROOT
from tracereward import RewardModel
from tracereward.cli.app import main
from tracereward.cli.training_options import parse
from tracereward.errors import InputError
from tracereward.runs.same_run import check_same_run
from tracereward.training.config import RETIRED

FIXTURE = ROOT / "tests/fixtures/compat"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", EXPECTED["scores"])
def test_old_reward_models_give_same_rewards(name):
    model = RewardModel.from_pretrained(FIXTURE / name)
    traces, calibration = EXPECTED["traces"], model.settings.calibration
    scores = model.score([trace["prompt"] for trace in traces], [trace["completion"] for trace in traces])
    for one, expected in zip(scores, EXPECTED["scores"][name], strict=True):
        assert one.rewards == pytest.approx(expected["rewards"], rel=0, abs=1e-5)
        for exact in ("tokens", "supervised", "step_ends"):
            assert getattr(one, exact) == expected[exact]
        assert [[*pair] for pair in one.offsets] == expected["offsets"]
        reward = one.aggregate(model.settings.aggregate)
        assert reward == pytest.approx(expected["reward"], rel=0, abs=1e-5)
        if expected["probability"] is None:
            assert calibration is None
        else:
            assert calibration.probability(reward) == pytest.approx(expected["probability"], rel=0, abs=1e-5)


def same_random_numbers() -> bool:
    """Whether this machine can reproduce the rollouts of the fixture."""
    drawn = torch.multinomial(torch.ones(8, 50), 4, generator=torch.Generator().manual_seed(0))
    return drawn.flatten().tolist() == EXPECTED["draws"]


@pytest.mark.parametrize(
    ("name", "left"),
    [("sft", "checkpoint-2"), ("grpo", "checkpoint-2"), ("train", "checkpoint-2"), ("train", "warmup")],
)
def test_old_run_folders_resume(name, left, tmp_path, monkeypatch):
    """From a checkpoint or from the last warm-up state, by the command in the report."""
    for part in (name, "model"):
        shutil.copytree(FIXTURE / part, tmp_path / part)
    shutil.copy(FIXTURE / "experts.jsonl", tmp_path)
    if left == "warmup":
        shutil.rmtree(tmp_path / name / "checkpoints/checkpoint-2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tracereward", name, "--config", f"{name}/config.yaml", "--resume"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code

    lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    expected = EXPECTED["runs"][name]
    logged = {row["phase"] for row in expected["rows"]}  # the rows of a run's end came later
    rows = [row for row in map(json.loads, lines) if row["phase"] in logged]
    assert [(row["phase"], row.get("step")) for row in rows] == [
        (row["phase"], row.get("step")) for row in expected["rows"]
    ]
    if name != "sft" and not same_random_numbers():
        pytest.skip("torch draws other random numbers on this kind of CPU: the rollouts are others")
    for row, wanted in zip(rows, expected["rows"], strict=True):
        for key, value in wanted.items():
            exact = not isinstance(value, float)
            assert row[key] == (value if exact else pytest.approx(value, rel=1e-3, abs=1e-3)), (row, key)
    assert greedy(tmp_path / name / "policy", [*expected["greedy"]]) == expected["greedy"]
    assert (tmp_path / name / "report.html").is_file()
    if name == "train":
        RewardModel.from_pretrained(tmp_path / name / "reward_model")


def greedy(policy: Path, prompts: list[str]) -> dict[str, str]:
    """Greedy answers of a policy, as in `make.py`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    answers = {}
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(ids, do_sample=False, max_new_tokens=24)
        answers[prompt] = tokenizer.decode(made[0, ids.size(1) :], skip_special_tokens=True)
    return answers


def same_run(stored: dict[str, Any], given: dict[str, Any], defaults: dict[str, Any]) -> bool:
    """Whether `check_same_run` allows resuming."""
    try:
        check_same_run(stored, given, defaults, Path("run"))
    except InputError:
        return False
    return True


def test_retired_option_is_ignored_at_neutral_value(monkeypatch):
    monkeypatch.setitem(RETIRED, "gone", 20)
    assert same_run({"gone": 20}, {}, {})
    assert not same_run({"gone": 21}, {}, {})
    assert not same_run({"never_known": 20}, {}, {})
    assert same_run({"gone": 20}, {"gone": 20}, {"gone": 5})  # reintroduced: a normal option
    assert not same_run({"gone": 20}, {"gone": 5}, {"gone": 5})


def test_missing_stored_option_means_default():
    assert same_run({}, {"new": 5}, {"new": 5})
    assert not same_run({}, {"new": 6}, {"new": 5})
    assert same_run({"new": 6}, {"new": 6}, {"new": 5})
    assert not same_run({"new": 6}, {}, {"new": 5})


def test_config_file_accepts_retired_option(tmp_path, monkeypatch):
    """So that a run's own config.yaml can be passed to ``--config``."""
    config = tmp_path / "config.yaml"
    config.write_text("task: arithmetic\ngone: false\n", encoding="utf-8")
    with pytest.raises(InputError, match="gone"):
        parse("sft", ["--config", str(config)])
    monkeypatch.setitem(RETIRED, "gone", False)
    data, *_ = parse("sft", ["--config", str(config)])
    assert data.task == "arithmetic"
    monkeypatch.setitem(RETIRED, "gone", True)
    with pytest.raises(InputError, match="gone"):
        parse("sft", ["--config", str(config)])
