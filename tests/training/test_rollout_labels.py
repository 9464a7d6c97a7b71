"""Label rules in `train`: labels of rollouts, candidates as the warm-up's rollouts, and what is left out."""

import json
import math

import pytest
import torch

from helpers.trainers import build_trainer
from tracereward.cli.training_options import parse
from tracereward.commands.train import run_train
from tracereward.errors import InputError, RunFailed
from tracereward.files import write_jsonl
from tracereward.modeling.rendering import Rendering
from tracereward.modeling.tokenization import encode_completion
from tracereward.rewards.settings import read_settings
from tracereward.tasks.recipes import get_task
from tracereward.training.discriminator_batch import Rollout
from tracereward.training.rollout_labels import ENOUGH_COMPARED, RolloutLabels
from tracereward.training.token_probe import token_probe
from tracereward.training.warmup_candidates import rendered_candidates, warmup_candidates

ARITHMETIC = get_task("arithmetic")
ROWS = [
    {"prompt": "a", "completion": "#### 1", "answer": "7", "source": "d:1"},
    {"prompt": "b", "completion": "no idea", "answer": None, "source": "d:2"},
    {"prompt": "a", "completion": "#### 2", "answer": "7", "source": "d:3"},
]


def test_labels_use_the_answers_of_all_demonstrations_of_the_prompt():
    labels = RolloutLabels(ROWS, ARITHMETIC, "agreeing", "disagreeing")
    found = [labels.label(index, answer, finished=True) for index in range(3) for answer in ("1", "2", "7", None)]
    assert found == [True, True, False, None, None, None, None, None, True, True, False, None]
    assert labels.label(0, None, finished=False) is False
    assert (labels.agreed, labels.compared) == (4, 7)
    assert "2 of 3 demonstrations" in labels.said()
    assert RolloutLabels(ROWS, ARITHMETIC, "expert", "all").label(1, "1", finished=True) is False


def test_mixed_adds_the_right_ones_and_the_rule_decides_on_the_others():
    labels = RolloutLabels(ROWS, ARITHMETIC, "mixed", "disagreeing")
    assert labels.name == "mixed/disagreeing"
    assert [labels.label(0, answer, finished=True, right=answer == "7") for answer in ("7", "1", "3")] == [
        True, None, False,
    ]  # fmt: skip
    assert RolloutLabels(ROWS, ARITHMETIC, "agreeing", "all").label(0, "7", finished=True, right=True) is False


def test_a_rule_on_answers_needs_one_that_can_be_read():
    with pytest.raises(InputError, match="none of 1 demonstrations"):
        RolloutLabels(ROWS[1:2], ARITHMETIC, "expert", "disagreeing")
    RolloutLabels(ROWS[1:2], ARITHMETIC, "expert", "all")


def test_many_agreeing_negatives_are_remarked_once():
    for positives, negatives, agreeing, said in (
        ("expert", "all", ENOUGH_COMPARED // 2, True),
        ("expert", "all", ENOUGH_COMPARED // 2 - 1, False),
        ("expert", "disagreeing", ENOUGH_COMPARED, False),
    ):
        labels = RolloutLabels(ROWS, ARITHMETIC, positives, negatives)
        for n in range(ENOUGH_COMPARED):
            labels.label(0, "1" if n < agreeing else "9", finished=True)
        assert (labels.remark() is not None) == said
        assert labels.remark() is None


def test_a_rule_that_needs_no_answers_stops_comparing(monkeypatch):
    monkeypatch.setattr("tracereward.training.rollout_labels.MOST_COMPARED", 3)
    labels = RolloutLabels(ROWS, ARITHMETIC, "mixed", "all")
    assert [labels.label(0, "1", finished=True, right=n % 2 == 0) for n in range(5)] == [True, False, True, False, True]
    assert (labels.agreed, labels.compared) == (3, 3)
    labels = RolloutLabels(ROWS, ARITHMETIC, "expert", "disagreeing")
    assert [labels.label(0, "1", finished=True) for _ in range(5)] == [None] * 5


@pytest.fixture
def trainer(tiny_model_folder, tokenizer, experts, tmp_path):
    return build_trainer(tiny_model_folder, tokenizer, experts, tmp_path, positives="agreeing", negatives="disagreeing")


def test_the_trainer_labels_and_the_discriminator_leaves_out(trainer, tokenizer, experts):
    right, wrong = f"#### {experts[0]['answer']}", "#### 39"
    texts = [right, wrong, "1 + 1", "1 + 1"]
    ids = [encode_completion(tokenizer, text, finished) for text, finished in zip(texts, (True, True, True, False))]
    rollouts = trainer.as_rollouts([0] * 4, texts, ids, [math.nan] * 4)
    assert [rollout.label for rollout in rollouts] == [True, False, None, False]
    assert trainer.as_rollouts([-1], [right], ids[:1], [1.0]) == []  # of a prompt without a demonstration
    discriminator = trainer.discriminator
    discriminator.remember(rollouts)
    assert discriminator.replay.rollouts == [rollouts[0], rollouts[1], rollouts[3]]
    traces, _ = discriminator._draw(rollouts)
    classes = [(trace.completion, trace.is_expert) for trace in traces[1:]]
    expected = [(r.ids, bool(r.label)) for r in rollouts if r.label is not None]
    assert sorted(classes) == sorted(expected)
    # A batch in which nothing has a label is not learned from without replay.
    discriminator.options.replay_share = 0.0
    assert discriminator.learn([Rollout(0, ids[2], None)]) == {"updates": 0.0, "left_out_share": 1.0}


def test_held_out_accuracy_compares_experts_with_negatives_only(trainer):
    discriminator = trainer.discriminator
    discriminator.held_out = frozenset({0})
    discriminator.remember([Rollout(0, [7, 7], True), Rollout(0, [7, 8], None)])
    assert math.isnan(discriminator.held_out_accuracy())
    discriminator.remember([Rollout(0, [7, 9], False)])
    assert discriminator.held_out_accuracy() in (0.0, 1.0)


def test_the_surface_probe_ignores_what_is_left_out(trainer, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "tracereward.training.token_probe.surface_probe",
        lambda experts, others, special: seen.update(sizes=(len(experts), len(others))),
    )
    rollouts = [Rollout(0, [7], True), Rollout(0, [8], None), Rollout(1, [9], False)]
    token_probe(trainer.discriminator.experts, rollouts, trainer.tokenizer)
    assert seen["sizes"] == (2 + 1, 1)  # two demonstrations, and one that agrees


def test_a_warm_up_of_rollouts_without_labels_stops(trainer, monkeypatch):
    monkeypatch.setattr(trainer.warm_up, "_draw", lambda rows: [Rollout(0, [7, 8], None)])
    with pytest.raises(RunFailed, match="none of the warm-up's 1 rollouts"):
        trainer.warm_up.run()


# ---------- candidates instead of sampled rollouts ----------


def candidates_of(experts, folder) -> str:
    """Of the first two experts: one agrees, one differs, one states nothing, one is cut off, one is the expert's."""
    rows = []
    for expert in experts[:2]:
        for completion, finished in (
            (f"1 + 1\n#### {expert['answer']}", True),
            ("#### 39", True),
            ("1 + 1", True),
            ("1 + 1 + 1", False),
            (expert["completion"], True),
        ):
            rows.append({"prompt": expert["prompt"], "completion": completion, "finished": finished, "correct": True})
    rows.append({"prompt": "another question", "completion": "#### 1", "finished": True})
    file = folder / "candidates.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_candidates_are_matched_labelled_and_encoded_as_rollouts(
    tiny_model_folder, tokenizer, experts, tmp_path, capsys
):
    experts = [{**row, "source": f"d:{n}"} for n, row in enumerate(experts)]
    labels = RolloutLabels(experts, ARITHMETIC, "agreeing", "disagreeing")
    rows = warmup_candidates(candidates_of(experts, tmp_path), ARITHMETIC, experts, labels)
    said = capsys.readouterr().err
    for part in ("2 of 11 candidates equal", "2 join the experts, 4 are negatives and 2 are left out"):
        assert part in said
    rows = rendered_candidates(rows, tokenizer, Rendering(template="plain"), 12, on_long="refuse")
    assert [(row["demonstration"], row["label"]) for row in rows] == [
        (index, label) for index in (0, 1) for label in (True, False, None, False)
    ]
    given = [{**row, "candidates": [c for c in rows if c["demonstration"] == n]} for n, row in enumerate(experts)]
    trainer = build_trainer(
        tiny_model_folder, tokenizer, given, tmp_path / "run", positives="agreeing", negatives="disagreeing",
        discriminator_warmup_updates=2,
    )  # fmt: skip
    ends = [rollout.ids[-1] == tokenizer.eos_token_id for rollout in trainer.given]
    assert ends == [True, True, True, False] * 2
    assert trainer.given[1].ids == encode_completion(tokenizer, "#### 39")
    before = {name: p.clone() for name, p in trainer.discriminator.parameters.items()}
    trainer.warm_up._draw = lambda rows: pytest.fail("sampled")
    trainer.warm_up.run()
    assert trainer.discriminator.updates == 2
    assert len(trainer.discriminator.replay.rollouts) == 6  # without those that are left out
    assert any(not torch.equal(before[name], p) for name, p in trainer.discriminator.parameters.items())


def test_candidates_without_a_negative_or_too_long_are_refused(tokenizer, experts, tmp_path):
    experts = [{**row, "source": f"d:{n}"} for n, row in enumerate(experts)]
    file = tmp_path / "agreeing.jsonl"
    file.write_text(json.dumps({"prompt": experts[0]["prompt"], "completion": f"so\n#### {experts[0]['answer']}"}))
    labels = RolloutLabels(experts, ARITHMETIC, "expert", "disagreeing")
    with pytest.raises(InputError, match="one class only"):
        warmup_candidates(str(file), ARITHMETIC, experts, labels)
    rows = warmup_candidates(str(file), ARITHMETIC, experts, RolloutLabels(experts, ARITHMETIC, "expert", "all"))
    plain = Rendering(template="plain")
    with pytest.raises(InputError, match="1 of 1 rows are too long"):
        rendered_candidates(rows, tokenizer, plain, 2, on_long="refuse")
    cut = [{**rows[0], "completion": "1 + 1", "finished": False}]
    assert rendered_candidates(cut, tokenizer, plain, 3, on_long="refuse") == cut  # no end of sequence to count


def test_a_run_with_candidates_names_its_rule_everywhere(tiny_model_folder, experts, tmp_path, capfd):
    write_jsonl(tmp_path / "experts.jsonl", experts)
    options = {
        "task": "arithmetic", "dataset_name": tmp_path / "experts.jsonl", "model_name_or_path": tiny_model_folder,
        "output_dir": tmp_path / "run", "warmup_candidates": candidates_of(experts, tmp_path),
        "positives": "agreeing", "negatives": "disagreeing", "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 24, "max_steps": 1, "discriminator_warmup_updates": 1, "held_out_fraction": 0,
        "report_to": "none", "disable_tqdm": "true",
    }  # fmt: skip
    run = run_train(*parse("train", [word for name, value in options.items() for word in (f"--{name}", str(value))]))
    name = "agreeing/disagreeing"
    assert read_settings(run / "reward_model").label_rule == name
    for text in ((run / "reward_model/README.md"), (run / "report.html")):
        assert name in text.read_text()
    assert "positives: agreeing\nnegatives: disagreeing\n" in (run / "config.yaml").read_text()
    said = capfd.readouterr().err
    assert f"label rule {name}: answers can be read in {len(experts)} of {len(experts)} demonstrations" in said
    assert "2 join the experts, 4 are negatives and 2 are left out" in said
    assert not (run / "checkpoints/warmup/rollouts.jsonl").exists()  # nothing was sampled for the warm-up
