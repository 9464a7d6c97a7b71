"""The default quickstart end to end, in a smaller world: printed values match its files."""

import dataclasses
import json
import re
import sys

import pytest
from transformers import AutoModelForCausalLM

from tracereward import TokenRewardModel
from tracereward.cli.app import main
from tracereward.errors import InputError
from tracereward.files import read_jsonl
from tracereward.quickstart.report import BEST, print_results
from tracereward.quickstart.run import Quickstart, accuracy, copy_base, greedy
from tracereward.quickstart.shipped import BASE, FOLDER, REWARD_MODEL, ship
from tracereward.quickstart.worlds import WORLDS
from tracereward.reports.report import ScoredTrace
from tracereward.rewards.token_scores import TokenScores
from tracereward.runs.report import pick_traces


@pytest.fixture
def small(monkeypatch):
    """The default world with a few steps per stage."""
    world = WORLDS["exposure"]
    few = {"max_steps": 3, "warmup_steps": 0}
    smaller = dataclasses.replace(
        world,
        experts=12,
        unlabeled=24,
        validation=20,
        test=20,
        corpus=200,
        pretraining={**world.pretraining, **few, "max_steps": 25},
        sft={**world.sft, **few, "per_device_train_batch_size": 12},
        sft_grid=[{"learning_rate": 1e-4, "max_steps": 3}, {"learning_rate": 5e-4, "max_steps": 6}],
        grpo={**world.grpo, **few, "per_device_train_batch_size": 32, "save_steps": 3},
        adversarial={**world.adversarial, "discriminator_warmup_updates": 3, "warmup_rollouts": 4},
    )
    monkeypatch.setitem(WORLDS, "exposure", smaller)


def run(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tracereward", "quickstart", *words])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_quickstart(small, monkeypatch, capsys, tmp_path):
    output = tmp_path / "run"
    code, out, err = run(monkeypatch, capsys, "-o", str(output), "--json")
    assert code == 0, err
    results = json.loads(out)
    labels = [row["label"] for row in results["policies"]]
    assert labels == [
        "base (pretrained)",
        "SFT",
        "SFT continued (control)",
        "GRPO on own log-prob (control)",
        "IRL policy (tracereward)",
    ]
    # Recompute the ranking table independently from the samples.
    questions: dict[int, list[dict]] = {}
    for row in read_jsonl(output / "samples.jsonl"):
        said = re.search(r"#### (\d+)$", row["completion"])
        # From nonsense such as "#### 2 = 3 = 9" the task may extract more than a number.
        assert row["correct"] or said is None or said[1] != row["answer"], row["completion"]
        row["right"] = row["correct"]
        assert row["reward"] == pytest.approx(sum(row["token_rewards"]) / len(row["token_rewards"]))
        questions.setdefault(row["question"], []).append(row)
    assert [len(rows) for rows in questions.values()] == [8] * 20
    accuracy = results["ranking"]["accuracy"]
    mean = sum(row["right"] for rows in questions.values() for row in rows) / 160
    assert accuracy["mean sample"][0] == pytest.approx(mean)
    for label, key in (("reward best-of-8", "reward"), ("log-prob best-of-8", "logprob")):
        picked = [max(rows, key=lambda row: row[key])["right"] for rows in questions.values()]
        assert accuracy[label][0] == pytest.approx(sum(picked) / 20)
    assert accuracy["oracle@8"][0] == pytest.approx(
        sum(any(r["right"] for r in rows) for rows in questions.values()) / 20
    )
    shares = {row["label"]: row["accuracy"] for row in results["policies"]}
    assert [gain["baseline"] for gain in results["gains"]] == labels[:-1]
    for gain in results["gains"]:
        assert gain["difference"] == pytest.approx(shares[labels[-1]] - shares[gain["baseline"]])
        assert gain["low"] < gain["difference"] < gain["high"]
    test = {row["prompt"] for row in read_jsonl(output / "data" / "test.jsonl")}
    for part in ("experts", "unlabeled", "corpus"):
        assert not test & {row["prompt"] for row in read_jsonl(output / "data" / f"{part}.jsonl")}, part

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    code, again, err = run(monkeypatch, capsys, "-o", str(output), "--json")
    assert (code, again) == (2, "")
    assert "--resume" in err
    code, again, err = run(monkeypatch, capsys, "-o", str(output), "--json", "--resume")
    assert code == 0, err
    assert json.loads(again) == results
    assert err.count("already done") == 7
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    code, again, err = run(monkeypatch, capsys, "-o", str(output), "--json", "--resume", "--seed", "1")
    assert code == 2
    assert "other options" in err


def test_four_rows_and_what_they_say(capsys, tmp_path):
    row = {"low": 0.25, "high": 0.5, "no_answer": 0}
    policies = [{"label": label, "accuracy": value, **row} for label, value in zip("abcde", SHARES, strict=True)]
    gain = {"difference": 0.25, "low": 0.125, "high": 0.375}
    gains = [{**gain, "baseline": label} for label in "abcd"]
    ranking = {"accuracy": {BEST: [0.625, 0.5, 0.75]}, "verdict": {"line": "no better than majority"}}
    results = {"questions": 8, "policies": policies, "gains": gains, "ranking": ranking}
    print_results(tmp_path, results)
    out, err = capsys.readouterr()
    assert re.findall(r"│ +(\d+\.\d) │", out) == ["12.5", "25.0", "62.5", "50.0"]  # a, b, b with the reward, e
    assert "+25.0 points over b (+12.5 to +37.5); +25.0 points over d" in err
    assert "no better than majority" in err
    commands = [line.split()[1] for line in err.splitlines() if line.startswith("  tracereward ")]
    assert len(commands) == 3


SHARES = (0.125, 0.25, 0.26, 0.27, 0.5)


def test_report_traces_are_wrong_right_pairs():
    scores = TokenScores(["a"], [(0, 1)], [0.0], [True], [True])
    rows = [("q1", "x", False), ("q1", "y", False), ("q2", "x", False), ("q2", "x", False), ("q2", "y", True)]
    traces = [ScoredTrace(question, text, scores, correct, None) for question, text, correct in rows]
    shown = [(t.question, t.completion) for t in pick_traces(traces, 3)]
    assert shown == [("q1", "x"), ("q2", "x"), ("q2", "y")]
    assert len(pick_traces(traces, 5)) == 4


def test_shipped_models():
    """They are those that `ship` copies: plain checkpoints without a path of the run that made them."""
    policy = AutoModelForCausalLM.from_pretrained(BASE)
    assert sum(weight.numel() for weight in policy.parameters()) == 113_344
    reward_model = TokenRewardModel.from_pretrained(REWARD_MODEL)
    assert reward_model.settings.base_model == reward_model.settings.reference_model == ""
    assert reward_model.settings.first_error is not None


def test_only_a_finished_run_from_scratch_is_shipped(tmp_path):
    (tmp_path / "quickstart.json").write_text(json.dumps({"world": "exposure", "seed": 0, "fast": True}))
    with pytest.raises(InputError, match="from_scratch"):
        ship(tmp_path, tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
def test_shipped_models_are_what_the_quickstart_makes(monkeypatch, capsys, tmp_path):
    """About eight minutes. Other processors round differently: the policies need not be equal, but equally good."""
    output = tmp_path / "run"
    code, out, err = run(monkeypatch, capsys, "-o", str(output), "--json", "--from-scratch")
    assert code == 0, err
    ship(output, tmp_path / "models")
    for name in ("base", "reward_model"):
        made = {path.name for path in (tmp_path / "models" / name).iterdir()}
        assert made == {path.name for path in (FOLDER / name).iterdir()}
    made = json.loads(out)
    world, seed = WORLDS["exposure"], 0
    shipped = Quickstart(output, world, seed, fast=False, from_scratch=False)
    copy_base(shipped)
    again = accuracy(greedy(shipped, "base", "test"))
    assert again["accuracy"] == pytest.approx(made["policies"][0]["accuracy"], abs=0.06)
