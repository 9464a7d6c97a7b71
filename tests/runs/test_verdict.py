"""The verdict at the end of `train`, with rollouts whose outcomes are counted by hand."""

import json
import math
from types import SimpleNamespace

import pytest
from trl import ModelConfig

from tracereward.commands.train import run_train
from tracereward.reports.verdicts import read_verdict
from tracereward.rewards.token_scores import TokenScores
from tracereward.runs import report, verdict
from tracereward.runs.held_out import HeldOutQuestion
from tracereward.runs.verdict import FreshTrace, judged_questions
from tracereward.synthetic.arithmetic import generate
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.callbacks import MetricsFile
from tracereward.training.options import DataArguments


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trace(question: str, answer: str, gold: str | None, reward: float) -> FreshTrace:
    text = f"#### {answer}" + " or so" * (answer == gold)  # never the shortest
    scores = TokenScores([text], [(0, len(text))], [reward], [True], [True])
    correct = None if gold is None else answer == gold
    given = {"question": question, "completion": text, "scores": scores, "correct": correct, "answer": answer}
    return FreshTrace(**given, logprob=-1.0, finished=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_folder):
    """A run of one step with 8 of 16 prompts held out; its questions, and for each the traces that it "samples"."""
    folder = tmp_path_factory.mktemp("verdict")
    (folder / "experts.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in generate("misconception", 16, seed=5))
    )
    config = AdversarialConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=24,
        max_steps=1,
        report_to="none",
        disable_tqdm=True,
        discriminator_warmup_updates=2,
        warmup_rollouts=2,
        held_out_fraction=0.5,
        monitor_every=1,
        save_strategy="no",
        reward_form="logit",
    )
    asked = {}

    def fresh(trainer, model, reward_model, gold):
        asked.update(gold)
        held = {trainer.demonstration_rows[index]["prompt"] for index in trainer.discriminator.held_out}
        # Two wrong answers agree. The reward finds the right one in the held-out questions, and nowhere else.
        return [
            trace(question, answer, right, reward if question in held else -reward)
            for question, right in gold.items()
            for answer, reward in (("-1", -1.0), ("-1", -1.0), (right, 5.0), ("-2", -2.0))
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "fresh_traces", fresh)
        data = DataArguments(task="arithmetic", dataset_name=str(folder / "experts.jsonl"))
        run_train(data, config, ModelConfig(model_name_or_path=str(tiny_model_folder)))
    return SimpleNamespace(folder=folder / "run", asked=asked)


def test_verdict_is_on_the_held_out_questions_alone(run):
    assert len(run.asked) == 16, "eight held-out questions, and eight training prompts for the report"
    found = read_verdict(run.folder)
    assert (found.questions, found.outcome) == (8, "better")
    gains = {one.baseline: one.difference for one in found.comparisons}
    assert gains == dict.fromkeys(("majority", "logprob", "logprob_vote", "shortest"), 1.0)
    # b = 8, c = 0, n = 8: 8 / 10 +- 1.96 sqrt(9 - 64 / 10) / 10
    assert found.decisive.low == pytest.approx(0.8 - 1.959964 * math.sqrt(2.6) / 10)
    assert "each of 8 held-out questions" in found.about


def test_verdict_is_everywhere(run):
    found = read_verdict(run.folder)
    assert read_verdict(run.folder / "reward_model") == found
    card = (run.folder / "reward_model" / "README.md").read_text()
    assert f"**{found.line}**" in card
    assert "## Training" in card
    page = (run.folder / "report.html").read_text()
    assert page.index(found.line) < page.index("Discriminator loss")
    (row,) = [row for row in rows_of(run.folder) if row["phase"] == "verdict"]
    assert (row["step"], row["line"], row["outcome"]) == (1, found.line, found.outcome)
    assert row["low"] == found.decisive.low


def test_movement_is_logged(run):
    (row,) = [row for row in rows_of(run.folder) if row["phase"] == "movement"]
    assert row["discriminator_moved"] is False, "two updates"
    assert row["line"] in (run.folder / "report.html").read_text()
    warmup = [one for one in rows_of(run.folder) if one["phase"] == "warmup"]
    assert row["held_out_pairs"] == warmup[-1]["discriminator/held_out_pairs"]


def test_questions_that_the_verdict_is_on():
    rows = [HeldOutQuestion(prompt=f"q{i}", completion=None, answer=str(i) if i % 2 else None) for i in range(300)]
    assert judged_questions([rows[1], rows[2], rows[5], rows[1]]) == ({"q1": "1", "q5": "5"}, "")
    many, _ = judged_questions(rows)
    assert len(many) == verdict.QUESTIONS
    assert all(many[f"q{i}"] == str(i) for i in range(300) if f"q{i}" in many)
    assert set(many) != {f"q{i}" for i in range(1, 2 * verdict.QUESTIONS, 2)}, "a file may be sorted"
    gold, missing = judged_questions([])
    assert (gold, "--held_out_fraction" in missing) == ({}, True)
    gold, missing = judged_questions([rows[0], rows[2]])
    assert (gold, "the 2 held-out demonstrations have no answers" in missing) == ({}, True)


def test_resumed_run_has_one_end_only(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", "train")
    logged = [{"phase": "warmup", "update": 1}, {"phase": "train", "step": 1}, {"phase": "train", "step": 2}]
    for row in [*logged, {"phase": "choice", "step": 2}, {"phase": "verdict", "step": 2}]:
        file.append(row)
    file.rewind(2, 9)
    assert rows_of(tmp_path) == logged
