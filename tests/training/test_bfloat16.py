"""Training under bfloat16 autocast, on a CPU: every update reads the weights of the one before it."""

import contextlib

import pytest
import torch

from helpers.trainers import build_trainer
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.rewards.heads import ActionHead
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.discriminator import Discriminator
from tracereward.training.discriminator_batch import Expert, Rollout

UPDATES = 4


def autocast(**options):
    return torch.autocast("cpu", dtype=torch.bfloat16, **options)


@pytest.fixture
def learn(tiny_model_folder, tokenizer, experts, tmp_path):
    """Losses of several updates after one batch, and the reward of an expert afterwards, in a given context."""

    def run(context, head="action", **options):
        pairs = [
            Expert(encode_prompt(tokenizer, row["prompt"]), encode_completion(tokenizer, row["completion"]))
            for row in experts
        ]
        torch.manual_seed(0)
        model = TokenRewardModel.from_backbone(
            str(tiny_model_folder), RewardSettings(head=head), tokenizer, dtype=torch.float32
        )
        options = {
            "discriminator_updates": UPDATES,
            "discriminator_every": 1,
            "discriminator_online_learning_rate": 1e-2,
            "replay_share": 0.0,
            "perturbed_per_expert": 0,
            **options,
        }
        config = AdversarialConfig(output_dir=str(tmp_path), report_to="none", **options)
        discriminator = Discriminator(model, pairs, config, seed=0, held_out=[0, 1])
        losses, update = [], discriminator.update

        def recorded(fresh):
            losses.append(update(fresh)["loss"])
            return {}

        discriminator.update = recorded
        rollouts = [Rollout(i, [9 if e.completion[0] != 9 else 8, *e.completion[1:]]) for i, e in enumerate(pairs)]
        with context:
            accuracy = discriminator.learn(rollouts)["held_out_accuracy"]
            after = discriminator.held_out_accuracy()
            with discriminator.averaged() as averaged:
                reward = averaged.token_rewards([pairs[0].prompt], [pairs[0].completion])[0]
            live = discriminator.model.token_rewards([pairs[0].prompt], [pairs[0].completion])[0]
        return losses, accuracy, after, reward.tolist(), live.tolist()

    return run


@pytest.mark.parametrize(
    ("head", "options"), [("action", {}), ("token", {"spectral_norm": True}), ("action", {"discriminator_ema": 0.5})]
)
def test_updates_in_one_context_are_those_without_autocasts_cache(learn, head, options):
    """Autocast keeps its casts of weights until its outermost context ends; updates change the weights."""
    cached = learn(autocast(), head, **options)
    assert cached == learn(autocast(cache_enabled=False), head, **options)
    full = learn(contextlib.nullcontext(), head, **options)
    assert cached[0] != full[0], "not bfloat16"
    assert cached[0] == pytest.approx(full[0], abs=0.1)
    assert len(set(cached[0])) == UPDATES
    if "discriminator_ema" in options:
        assert cached[3] != cached[4]


def test_trainer_learns_and_rewards_under_autocast(tiny_model_folder, tokenizer, experts, tmp_path, monkeypatch):
    """Warm-up, updates and rewards alike; weights, optimiser and reward model stay in float32."""
    seen = []
    forward = TokenRewardModel.values_and_log_probs

    def recorded(self, *args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *args)

    monkeypatch.setattr(TokenRewardModel, "values_and_log_probs", recorded)
    rewarded, compute = [], TokenRewardModel.compute_rewards

    def recorded_rewards(self, *args):
        rewarded.append(torch.is_autocast_enabled("cpu"))
        return compute(self, *args)

    monkeypatch.setattr(TokenRewardModel, "compute_rewards", recorded_rewards)

    def run(folder, **options):
        trainer = build_trainer(
            tiny_model_folder, tokenizer, experts, tmp_path / folder, bf16=True, discriminator_updates=2
        )
        if options:
            trainer.accelerator.autocast = lambda: autocast(**options)
        assert trainer.half is not None  # samples the rollouts
        trainer.train()
        rows = [row for row in trainer.state.log_history if "discriminator/loss" in row]
        losses = [row["discriminator/loss"] for row in rows]
        weights = {name: p.detach().clone() for name, p in trainer.discriminator.parameters.items()}
        return trainer, losses, weights

    trainer, losses, weights = run("cached")
    assert len(losses) == 2
    assert seen
    assert all(seen)
    assert len(rewarded) == 2
    assert all(rewarded)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    _, uncached, expected = run("uncached", cache_enabled=False)
    assert losses == uncached
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_heads_multiply_in_float32_under_autocast():
    """`score` has no autocast: the head's product would be rounded to 8 bits in training alone."""
    torch.manual_seed(0)
    head = ActionHead(64)
    head.w.data.normal_()
    states, log_probs = torch.randn(1, 50, 64), -torch.rand(1, 50)
    with autocast():
        found = head(log_probs, states).detach()
    exact = head.a.data.double() * log_probs.double() + states.double() @ head.w.data.double()
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)


def test_token_classifier_multiplies_in_float32_under_autocast(tiny_model_folder, tokenizer):
    torch.manual_seed(0)
    model = TokenRewardModel.from_backbone(
        str(tiny_model_folder), RewardSettings(head="token"), tokenizer, dtype=torch.float32
    ).eval()
    assert model.head_weight is not None
    with torch.no_grad():
        model.head_weight.normal_()
    states = []
    handle = model.backbone.score.register_forward_hook(lambda module, args, output: states.append(args[0]))
    with torch.no_grad(), autocast():
        found = model(model.pack([[5, 6, 7]], [[8, 9, 10, 1]]))
    handle.remove()
    exact = states[0][:, -4:].double() @ model.head_weight[0].detach().double()
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("head", ["token", "action"])
def test_scores_in_bfloat16_are_near_those_in_float32(tiny_model_folder, tokenizer, experts, tmp_path, head):
    torch.manual_seed(0)
    model = TokenRewardModel.from_backbone(
        str(tiny_model_folder), RewardSettings(head=head), tokenizer, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "reward")
    prompts, texts = [row["prompt"] for row in experts], [row["completion"] for row in experts]
    exact = TokenRewardModel.from_pretrained(str(tmp_path / "reward")).score(prompts, texts)
    half = TokenRewardModel.from_pretrained(str(tmp_path / "reward"), dtype=torch.bfloat16)
    assert next(half.backbone.parameters()).dtype == torch.bfloat16
    for a, b in zip(half.score(prompts, texts), exact, strict=True):
        assert a.rewards != b.rewards
        assert a.rewards == pytest.approx(b.rewards, abs=0.05 * max(1.0, *map(abs, b.rewards)))
