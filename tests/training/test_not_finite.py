"""A reward that is not finite stops the run and names the trace: TRL would count it as 0."""

import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from helpers.trainers import build_trainer
from tracereward import metrics
from tracereward.errors import RunFailed
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.training.config import PolicyConfig
from tracereward.training.rollout_metrics import RewardedRollout, rollout_metrics
from tracereward.training.rollout_trainer import RolloutTrainer


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"whiten_rewards": True, "scale_rewards": "none"}, {"reward_aggregate": "min"}]
)
def test_one_reward_stops_the_run(tiny_model_folder, tokenizer, experts, tmp_path, value, options):
    """With known answers correctness is finite, and a sum over reward functions would hide the nan."""
    trainer = build_trainer(tiny_model_folder, tokenizer, experts, tmp_path, **options)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    token_rewards, seen = trainer.token_rewards, []

    def damaged(prompts, completions):
        rewards = token_rewards(prompts, completions)
        seen.append((prompts[5], completions[5]))
        rewards[5] = rewards[5].clone()
        rewards[5][-1] = value
        return rewards

    trainer.token_rewards = damaged
    with pytest.raises(RunFailed, match="at step 1"):
        trainer.train()
    found = json.loads((tmp_path / "not_finite.json").read_text())
    assert found["step"] == 1
    assert tokenizer(found["prompt"])["input_ids"] == seen[0][0]
    assert found["completion_ids"] == seen[0][1]
    assert [row for row, text in enumerate(found["rewards"]) if not math.isfinite(float(text))] == [len(seen[0][1]) - 1]
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("answers", [True, False])
def test_damaged_weights_stop_the_run(tiny_model_folder, tokenizer, experts, tmp_path, answers):
    """A frozen discriminator has no loss that would show them."""
    rows = [row if answers else {**row, "answer": None} for row in experts]
    trainer = build_trainer(
        tiny_model_folder, tokenizer, rows, tmp_path, discriminator_updates=0, discriminator_every=4
    )
    run = trainer.warm_up.run

    def damage():
        run()
        trainer.discriminator.model.head.w.data.fill_(math.nan)

    trainer.warm_up.run = damage
    with pytest.raises(RunFailed, match="a reward is not finite at step 1"):
        trainer.train()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_fixed_reward_stops_the_run(tiny_model_folder, tokenizer, experts, tmp_path, value):
    """At the second step; a reward of weight 0 may be unknown."""
    config = PolicyConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        reward_weights=[1.0, 0.0],
    )
    calls = []

    def reward(completions, **_):
        calls.append(completions)
        return [float(row) if len(calls) < 2 or row != 2 else value for row in range(len(completions))]

    def unknown(completions, **_):
        return [math.nan] * len(completions)

    trainer = RolloutTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32),
        reward_funcs=[reward, unknown],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in experts]),
        processing_class=tokenizer,
    )
    with pytest.raises(RunFailed, match="at step 2"):
        trainer.train()
    assert json.loads((tmp_path / "not_finite.json").read_text())["completion"] == calls[1][2]


def test_scores_that_are_not_finite_are_refused(tiny_model_folder, tokenizer):
    model = TokenRewardModel.from_backbone(
        str(tiny_model_folder), RewardSettings(head="action"), tokenizer, dtype=torch.float32
    ).eval()
    model.head.b.data.fill_(math.nan)
    for call in (
        lambda: model.score(["1 + 1 = ?\n"], ["1 + 1 = 2"]),
        lambda: model.score_ids([[5, 6]], [[7, 1]]),
        lambda: model.rerank("1 + 1 = ?\n", ["1 + 1 = 2", "3"]),
        lambda: model.first_error("1 + 1 = ?\n", ["1 + 1 = 2"], threshold=0.0),
    ):
        with pytest.raises(RunFailed, match="not finite"):
            call()


def test_monitors_of_a_reward_that_is_nan_are_undefined():
    traces = [
        RewardedRollout(prompt="p", ids=[1, 2], finished=True, rewards=[0.0, 0.0], reward=reward, correct=correct)
        for reward, correct in ((math.nan, 1.0), (-1.0, 0.0), (-2.0, 0.0), (-3.0, 1.0))
    ]
    found = rollout_metrics(traces)
    for name in ("auroc", "within_prompt_auroc", "point_biserial_r", "length_reward_r"):
        assert math.isnan(found[name]), name
    assert found["length"] == 2
    assert math.isnan(metrics.perturbation_auroc([1.0, math.nan], [0.0, 0.0]))
    assert math.isnan(metrics.auprc([math.nan, 1.0], [True, False]))
