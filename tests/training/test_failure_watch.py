"""A run that triggers a failure rule stops, restores its best checkpoint and reports why."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trl import ModelConfig

from helpers.trainers import build_trainer
from tracereward.commands.train import run_train
from tracereward.rewards.model import TokenRewardModel
from tracereward.runs import report
from tracereward.synthetic.arithmetic import generate
from tracereward.training import callbacks
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.checkpoints import COMPLETE, better_than_start, score_of, score_of_checkpoint
from tracereward.training.failures import Failure
from tracereward.training.options import DataArguments

CORRECT, PERTURBATION = "rewards/correct/mean", "monitor/perturbation_auroc"


def test_checkpoint_score_is_correctness_or_perturbation_auroc():
    rows = [{CORRECT: 0.2, PERTURBATION: 0.9}, {CORRECT: 0.4}, {PERTURBATION: 0.7}]
    assert score_of(rows) == pytest.approx(0.3)
    assert score_of(rows[2:]) == pytest.approx(0.7)
    assert score_of([{CORRECT: None, PERTURBATION: math.nan}, {PERTURBATION: 0.5}]) == 0.5
    assert math.isnan(score_of([]))
    assert math.isnan(score_of([{"reward": 1.0}]))


def test_checkpoint_is_scored_by_the_rollouts_of_its_own_policies():
    """The rollouts of row t + 1 are the first of the policy of step t; the discriminator of row t is that of step t."""
    rows = [{"step": step, CORRECT: step / 10, PERTURBATION: step / 100} for step in range(1, 7)]
    assert score_of_checkpoint(rows, 2, 4) == pytest.approx((0.4 + 0.5) / 2)
    assert score_of_checkpoint(rows, 0, 2) == pytest.approx((0.2 + 0.3) / 2)
    assert score_of_checkpoint(rows, 5, 6) == pytest.approx(0.06)  # no rollouts of its policy: the discriminator's
    unknown = [{**row, CORRECT: None} for row in rows]
    assert score_of_checkpoint(unknown, 2, 4) == pytest.approx((0.03 + 0.04) / 2)
    averaged = [{"step": 10, CORRECT: 0.1}, {"step": 20, CORRECT: 0.2}, {"step": 30, CORRECT: 0.3}]
    assert score_of_checkpoint(averaged, 0, 15) == pytest.approx(0.2)
    assert math.isnan(score_of_checkpoint(rows, 0, 0))


def test_checkpoint_clearly_worse_than_the_start_is_not_restored():
    history = [{CORRECT: 0.5}, {CORRECT: 0.6}, {CORRECT: 0.7}, {CORRECT: 0.0}]  # 0.6 at the start, less 0.05
    assert better_than_start(0.56, history)
    assert not better_than_start(0.54, history)
    assert not better_than_start(None, history)
    assert better_than_start(0.1, [{"reward": 1.0}])  # no score to compare with


@pytest.fixture
def run(tmp_path, tiny_model_folder, monkeypatch):
    def go(fail_at: int, correct: list[float], **options):
        data = tmp_path / "experts.jsonl"
        rows = generate("misconception", 16, seed=5)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

        def detect(history):
            for row, value in zip(history, correct):
                row[CORRECT] = value  # an untrained policy is never right
            return Failure("decoupling", fail_at, "as scripted") if history[-1]["step"] == fail_at else None

        monkeypatch.setattr(callbacks, "detect", detect)
        config = AdversarialConfig(
            **{
                "output_dir": str(tmp_path / "run"),
                "per_device_train_batch_size": 16,
                "num_generations": 4,
                "max_completion_length": 24,
                "max_steps": 6,
                "save_steps": 1,
                "learning_rate": 1e-3,
                "report_to": "none",
                "disable_tqdm": True,
                "discriminator_warmup_updates": 2,
                "discriminator_every": 1,
                "discriminator_learning_rate": 1e-3,
                "warmup_rollouts": 2,
                "reward_form": "logit",  # an untrained policy's log-probs lie beyond the clip
                **options,
            }
        )
        model = ModelConfig(model_name_or_path=str(tiny_model_folder))
        return run_train(DataArguments(task="arithmetic", dataset_name=str(data)), config, model)

    return go


def weights(path):
    return load_file(path / "model.safetensors")


def test_report_is_written_last_and_without_heatmaps_if_out_of_memory(run, capsys, monkeypatch):
    """All results are saved before the report loads the full models onto one process's accelerator."""
    folders, own = [], []

    @contextlib.contextmanager
    def gathered():  # under ZeRO-3, `generate` outside this context waits for the other processes
        own.append(True)
        yield
        own.pop()

    def fails(trainer, left, reward_model, gold):
        assert own
        folder = Path(left.model_name_or_path).parent
        folders.append({path.name for path in [*folder.glob("*/*.safetensors"), *folder.iterdir()]})
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(report, "zero3_disabled", gathered)
    monkeypatch.setattr(report, "fresh_traces", fails)
    folder = run(2, [0.3, 0.3])
    assert folders[0] >= {"policy", "reward_model", "model.safetensors", "head.safetensors"}
    assert "did not fit" in capsys.readouterr().err
    assert "No rewards and heatmaps" in (folder / "report.html").read_text()


def test_best_checkpoint_is_restored(run, capsys):
    """Step 2 of 4 is the best: its policy's rollouts are those of step 3. It is kept at `save_total_limit` 2."""
    folder = run(4, [0.3, 0.4, 0.9, 0.2], save_total_limit=2)
    stderr = capsys.readouterr().err
    assert "decoupling at step 4: as scripted" in stderr
    assert "Restored: checkpoint-2." in stderr
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert next(row for row in logged if row["phase"] == "failure") == {
        "phase": "failure",
        "step": 4,
        "failure": "decoupling",
        "reason": "as scripted",
        "restored": "checkpoint-2",
    }
    assert max(row["step"] for row in logged if row["phase"] == "train") == 4
    best, last = weights(folder / "checkpoints" / "checkpoint-2"), weights(folder / "checkpoints" / "checkpoint-4")
    final = weights(folder / "policy")
    assert all(torch.equal(final[name], best[name]) for name in best)
    assert any(not torch.equal(final[name], last[name]) for name in last)
    state = torch.load(folder / "checkpoints" / "checkpoint-2" / "discriminator.pt", weights_only=True)["parameters"]
    restored = dict(TokenRewardModel.from_pretrained(str(folder / "reward_model")).named_parameters())
    assert all(torch.equal(restored[name], value) for name, value in state.items())
    assert "Stopped at step 4 by the rule decoupling: as scripted." in (folder / "report.html").read_text()


def test_run_that_fails_immediately_restores_the_starting_policy(run, tiny_model_folder, capsys):
    folder = run(2, [0.9, 0.1], save_steps=6)
    assert "Restored: the starting policy, and the discriminator as it was" in capsys.readouterr().err
    start, final = weights(tiny_model_folder), weights(folder / "policy")
    assert all(torch.equal(final[name], start[name]) for name in start)
    state = torch.load(folder / "checkpoints" / "warmup" / "discriminator.pt", weights_only=True)["parameters"]
    restored = dict(TokenRewardModel.from_pretrained(str(folder / "reward_model")).named_parameters())
    assert all(torch.equal(restored[name], value) for name, value in state.items())


def test_without_a_warm_up_the_starting_discriminator_is_restored(tiny_model_folder, tokenizer, experts, tmp_path):
    options = {
        "discriminator_warmup_updates": 0,
        "discriminator_learning_rate": None,
        "warmup_rollouts": None,
        "warmup_prompts": None,
        "discriminator_online_learning_rate": 1e-2,
    }
    trainer = build_trainer(tiny_model_folder, tokenizer, experts, tmp_path, **options)
    parameters = trainer.discriminator.parameters
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    trainer.train()
    assert any(not torch.equal(parameters[name], value) for name, value in start.items())
    assert trainer.restore_best() is None
    assert all(torch.equal(parameters[name], value) for name, value in start.items())
    assert trainer.discriminator.updates == 0


def test_steps_of_the_last_two_checkpoints_survive_a_resume(tiny_model_folder, tokenizer, experts, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    first = build_trainer(tiny_model_folder, tokenizer, experts, tmp_path, **options)
    first.train()
    assert first.saved == (1, 2)
    second = build_trainer(tiny_model_folder, tokenizer, experts, tmp_path, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # no step is left
    assert second.saved == (1, 2)
    markers = [json.loads((tmp_path / f"checkpoint-{step}" / COMPLETE).read_text()) for step in (1, 2)]
    assert [marker["since"] for marker in markers] == [0, 1]


def test_warning_does_not_stop_the_run(run, capsys):
    folder = run(3, [0.9, 0.1, 0.1], on_failure="warn", save_strategy="no", save_steps=500)
    assert "decoupling at step 3: as scripted" in capsys.readouterr().err
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in logged if row["phase"] == "train") == 6
    assert not any(row["phase"] == "failure" for row in logged)


def test_ignored_rules_are_not_evaluated(run, capsys):
    run(3, [0.9, 0.1, 0.1], on_failure="ignore", save_strategy="no", save_steps=500)
    assert "decoupling" not in capsys.readouterr().err
