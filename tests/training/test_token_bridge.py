"""A policy and a reward model with different tokenizers: projection of rewards, and a real run."""

import math

import pytest
import torch
from tokenizers import Regex as Pattern
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tracereward.errors import InputError
from tracereward.modeling.alignment import token_offsets
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.tasks.recipes import get_task
from tracereward.training import trainer as trainer_module
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.token_bridge import TokenBridge
from tracereward.training.trainer import AdversarialTrainer

BETA = 2.0


@pytest.fixture(scope="module")
def characters():
    """A tokenizer with one token for each character."""
    alphabet = "0123456789 +-*=?#\n"
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Pattern(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


@pytest.fixture(scope="module")
def character_model(characters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("characters") / "model"
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    characters.save_pretrained(folder)
    return folder


def reward_model(folder, tokenizer, granularity="dense", head="token") -> TokenRewardModel:
    torch.manual_seed(5)
    settings = RewardSettings(head=head, granularity=granularity, interval=4, beta_clip=BETA)
    model = TokenRewardModel.from_backbone(str(folder), settings, tokenizer, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


TEXTS = ["13 - 5 = 8\n#### 8", "21 + 12 = 33\n33 - 7 = 26\n#### 26", "#### 40"]


@pytest.mark.parametrize("granularity", ["sparse", "step", "interval", "dense"])
@pytest.mark.parametrize("ended", [True, False])
def test_rewards_go_to_the_token_that_contains_the_character(
    tokenizer, characters, character_model, granularity, ended
):
    """Characters to words: a word gets the sum over its supervised characters; other words are backfilled."""
    model = reward_model(character_model, characters, granularity)
    bridge = TokenBridge(tokenizer, model, [tokenizer.eos_token_id])
    assert not bridge.same
    for text in TEXTS:
        ids = encode_completion(tokenizer, text)[: None if ended else -1]
        reward_ids = bridge.completion(ids)
        assert reward_ids == encode_completion(characters, text)[: None if ended else -1]
        (rewards,) = model.token_rewards([bridge.prompt("13 - 5 = ?\n")], [reward_ids])
        moved = bridge.rewards(ids, reward_ids, rewards)
        supervised = model.to_scores(reward_ids, rewards).supervised
        _, offsets = token_offsets(tokenizer, ids)
        words = [(start, end) for start, end in offsets if end > start]
        sums: list[float | None] = []
        for start, end in words:
            inside = [float(rewards[c]) for c in range(start, end) if supervised[c]]
            sums.append(max(-BETA, min(BETA, sum(inside))) if inside else None)
        if ended:
            sums.append(float(rewards[-1]))
        expected = [next(value for value in sums[t:] if value is not None) for t in range(len(ids))]
        assert moved.tolist() == pytest.approx(expected, abs=1e-5)


def test_sums_are_clipped(tokenizer, characters, character_model):
    """ "33" has the sum of two digits, which each is within the clip."""
    bridge = TokenBridge(tokenizer, reward_model(character_model, characters), [tokenizer.eos_token_id])
    ids, reward_ids = encode_completion(tokenizer, "33\n4"), encode_completion(characters, "33\n4")
    for sign in (1, -1):
        rewards = sign * torch.tensor([1.5, 1.25, 0.5, 1.75, 1.0])
        assert bridge.rewards(ids, reward_ids, rewards).tolist() == [sign * BETA, sign * 0.5, sign * 1.75, sign * 1.0]


def test_equal_tokenizers_pass_ids_and_rewards_through(tokenizer, tiny_model_folder):
    """Without decoding: ids that re-encoding would change are unchanged."""
    model = reward_model(tiny_model_folder, tokenizer)
    bridge = TokenBridge(tokenizer, model, [tokenizer.eos_token_id])
    assert bridge.same
    ids = [7, 2, 2, 11, 5]  # with unknown words, which text would lose
    assert bridge.completion(ids) == ids
    rewards = torch.randn(5)
    assert bridge.rewards(ids, ids, rewards) is rewards


def test_every_end_of_a_rollout_is_the_experts(tokenizer, tiny_model_folder):
    """A policy with several end tokens would otherwise be known by the other ones."""
    eos = tokenizer.eos_token_id
    bridge = TokenBridge(tokenizer, reward_model(tiny_model_folder, tokenizer), [eos, 7])
    assert [bridge.completion(ids) for ids in ([5, 2, 7], [5, 2, eos], [7, 2], [7])] == [
        *[[5, 2, eos], [5, 2, eos], [7, 2], [eos]]
    ]


def test_prompts_are_rendered_for_the_reward_model(characters, character_model, tokenizer):
    bridge = TokenBridge(
        tokenizer, reward_model(character_model, characters), [tokenizer.eos_token_id], {"1 + 1 = ?\n": "# 1 + 1\n"}
    )
    assert bridge.prompt("1 + 1 = ?\n") == encode_prompt(characters, "# 1 + 1\n")
    assert bridge.prompt("2 + 1 = ?\n") == encode_prompt(characters, "2 + 1 = ?\n")


def make(tiny_model_folder, tokenizer, model, experts, folder, **options) -> AdversarialTrainer:
    config = AdversarialConfig(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": 12,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "head": model.settings.head,
            "discriminator_warmup_updates": 2,
            "warmup_rollouts": 4,
            "beta_clip": BETA,
            "monitor_every": 2,
            "discriminator_every": 1,
            **options,
        }
    )
    return AdversarialTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model_folder),
        reward_model=model,
        demonstrations=[dict(row) for row in experts],
        args=config,
        task=get_task("arithmetic"),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("advantages", ["trajectory", "token"])
def test_training_across_tokenizers(
    tiny_model_folder, tokenizer, characters, character_model, experts, tmp_path, advantages
):
    model = reward_model(character_model, characters)
    trainer = make(
        tiny_model_folder, tokenizer, model, experts, tmp_path, advantages=advantages, perturbed_per_expert=1
    )
    trainer.train()
    assert trainer.state.global_step == 3
    logged = trainer.state.log_history
    assert any("monitor/perturbation_auroc" in row for row in logged)
    assert all(math.isfinite(row["discriminator/loss"]) for row in logged if "discriminator/loss" in row)
    rollout = trainer.discriminator.replay.rollouts[-1]
    assert max(rollout.ids) < len(characters), "the discriminator reads its own tokens"
    assert len(trainer._rewards) == 16


def test_perturbation_auroc_matches_traces_scored_one_at_a_time(tiny_model_folder, tokenizer, experts, tmp_path):
    """Held-out experts are in several pairs, each with its own perturbed copy."""
    model = TokenRewardModel.from_backbone(str(tiny_model_folder), RewardSettings(head="action"), tokenizer)
    with torch.no_grad():
        model.head.w.normal_(generator=torch.Generator().manual_seed(0))
    trainer = make(tiny_model_folder, tokenizer, model, experts, tmp_path, held_out_fraction=0.5)
    pairs = trainer.perturbed_pairs
    prompts = {tuple(prompt) for prompt, _, _ in pairs}
    assert len(pairs) >= 2 * len(prompts) > 2
    margins = []
    for prompt, *both in pairs:
        expert, altered = (float(model.token_rewards([prompt], [ids])[0].mean()) for ids in both)
        margins.append(expert - altered)
    wins = sum(margin > 0 for margin in margins)
    assert 0 < wins < len(margins), "with margins of one sign, any pairing would give the same AUROC"
    assert trainer._perturbation() == {"perturbation_auroc": pytest.approx(wins / len(pairs))}


@pytest.mark.parametrize("sharded", [False, True])
def test_token_rewards_are_given_whether_models_are_sharded(
    tiny_model_folder, tokenizer, experts, tmp_path, monkeypatch, sharded
):
    """Otherwise processes with different numbers of passes would deadlock."""
    model = TokenRewardModel.from_backbone(str(tiny_model_folder), RewardSettings(head="action"), tokenizer)
    trainer = make(tiny_model_folder, tokenizer, model, experts, tmp_path)
    passed = []
    monkeypatch.setattr(model, "token_rewards", lambda *_, sharded, **__: passed.append(sharded))
    monkeypatch.setattr(trainer_module, "is_sharded", lambda _: sharded)
    trainer.token_rewards([[5]], [[6]])
    assert passed == [sharded]


@pytest.mark.parametrize(("head", "form"), [("implicit", None), ("airl", None), ("action", "logit_plus_logprob")])
def test_log_probs_need_equal_tokenizers(
    tiny_model_folder, tokenizer, characters, character_model, experts, tmp_path, head, form
):
    torch.manual_seed(0)
    settings = RewardSettings(head=head, reward_form=form or "")
    model = TokenRewardModel.from_backbone(str(character_model), settings, characters, dtype=torch.float32)
    with pytest.raises(InputError, match="both need the same tokenizer"):
        make(tiny_model_folder, tokenizer, model, experts, tmp_path)
