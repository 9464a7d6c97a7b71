"""Features of traces under a frozen model: values, truncation, and the cache."""

import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tracereward.modeling.hidden_states import StateCache, readable_layers, trace_states, truncated
from tracereward.modeling.log_probs import mean_log_probs
from tracereward.rewards.heads import LinearHead
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
MODELS = {
    "llama": lambda size: LlamaForCausalLM(LlamaConfig(vocab_size=size, num_key_value_heads=1, **SMALL)),
    "qwen2": lambda size: Qwen2ForCausalLM(Qwen2Config(vocab_size=size, num_key_value_heads=1, **SMALL)),
    "gpt2": lambda size: GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=3, n_head=2)),
}


def pool(seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Four prompts with three completions each, as token ids."""
    rng = random.Random(seed)
    rows = []
    for _ in range(4):
        prompt = [rng.randrange(4, 30) for _ in range(rng.randrange(1, 6))]
        rows += [(prompt, [rng.randrange(4, 30) for _ in range(rng.randrange(1, 9))]) for _ in range(3)]
    rng.shuffle(rows)
    return [prompt for prompt, _ in rows], [completion for _, completion in rows]


def saved(kind, tokenizer, folder):
    torch.manual_seed(3)
    model = MODELS[kind](len(tokenizer))
    with torch.no_grad():  # a norm that is not the identity
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln" in name:
                parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def test_prompts_that_are_not_shared_give_the_same_states(tokenizer, tmp_path):
    """A prompt of its own for each completion, read in one pass, against the same traces one by one."""
    model = saved("qwen2", tokenizer, tmp_path / "lm")
    prompts, completions = pool()
    prompts = [[*prompt, 4 + row] for row, prompt in enumerate(prompts)]
    together, log_probs = all_states(model, prompts, completions, token_budget=60)
    for row, pair in enumerate(zip(prompts, completions, strict=True)):
        alone, (log_prob,) = all_states(model, pair[:1], pair[1:])
        torch.testing.assert_close(together[row], alone[0], atol=0.02, rtol=0.02)  # kept in bfloat16
        assert log_probs[row] == pytest.approx(log_prob, abs=1e-5)
        with torch.no_grad():
            output = model(torch.tensor([[*pair[0], *pair[1]]]), output_hidden_states=True).hidden_states
        expected = model.model.norm(output[2])[0, len(pair[0]) :].mean(0)
        torch.testing.assert_close(together[row, 1], expected, atol=0.02, rtol=0.02)


def all_states(model, prompts, completions, **options):
    states = [None] * len(prompts)
    log_probs = [None] * len(prompts)
    for rows, found in trace_states(model, prompts, completions, 0, **options):
        for index, one, value in zip(rows, found.states, found.log_probs, strict=True):
            states[index], log_probs[index] = one, float(value)
    return torch.stack(states).float(), log_probs


@pytest.mark.parametrize("kind", MODELS)
def test_head_on_states_is_the_mean_reward_of_the_truncated_model(kind, tokenizer, tmp_path):
    """For each layer, by a model that is saved, loaded and scores each trace on its own."""
    model = saved(kind, tokenizer, tmp_path / "lm")
    prompts, completions = pool()
    states, log_probs = all_states(model, prompts, completions, token_budget=40)
    assert readable_layers(model) == (1, 2, 3)
    assert log_probs == pytest.approx(mean_log_probs(model, prompts, completions, 0), abs=1e-5)
    weight = torch.randn(32, generator=torch.Generator().manual_seed(1))
    settings = RewardSettings(head="token", beta_clip=1e6)
    for layer in (1, 2, 3):
        head = LinearHead(layers=(layer,), weight=weight[None], bias=0.25)
        made = TokenRewardModel.from_readout(str(tmp_path / "lm"), head, settings, tokenizer, dtype=torch.float32)
        made.save_pretrained(tmp_path / f"reward{layer}")
        loaded = TokenRewardModel.from_pretrained(tmp_path / f"reward{layer}")
        assert loaded.backbone.config.num_hidden_layers == layer
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            reward = float(loaded.score_ids([prompt], [completion])[0].aggregate("mean"))
            expected = float(states[index, layer - 1] @ weight) + 0.25
            assert reward == pytest.approx(expected, abs=0.05)  # the states are kept in bfloat16


def test_truncation_keeps_the_states_of_the_layers_that_are_left(tokenizer, tmp_path):
    model = saved("qwen2", tokenizer, tmp_path / "lm")
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        whole = model(ids, output_hidden_states=True).hidden_states
        cut = truncated(model, 2)(ids, output_hidden_states=True).hidden_states
    assert len(cut) == 3
    torch.testing.assert_close(cut[1], whole[1])
    torch.testing.assert_close(cut[2], model.model.norm(whole[2]))
    assert len(model.config.layer_types) == 2


def test_cache_gives_back_what_was_written_and_computes_a_damaged_file_again(tokenizer, tmp_path):
    model = saved("llama", tokenizer, tmp_path / "lm")
    prompts, completions = pool()
    cache = StateCache(tmp_path / "cache", "model", "mean")
    keys = [cache.key(*pair) for pair in zip(prompts, completions, strict=True)]
    found = dict(enumerate(trace_states(model, prompts, completions, 0, token_budget=40)))
    for rows, states in found.values():
        cache.write([keys[i] for i in rows], states)
    again = StateCache(tmp_path / "cache", "model", "mean")
    assert again.known.keys() == set(keys)
    read = again.read(keys)
    for rows, states in found.values():
        torch.testing.assert_close(read.states[rows], states.states)
        torch.testing.assert_close(read.log_probs[rows], states.log_probs)
    assert StateCache(tmp_path / "cache", "another", "mean").key(prompts[0], completions[0]) not in again.known
    damaged = sorted((tmp_path / "cache").glob("*.safetensors"))[0]
    lost = len(load_file(damaged)["log_probs"])
    damaged.write_bytes(damaged.read_bytes()[:50])
    assert len(StateCache(tmp_path / "cache", "model", "mean").known) == len(again.known) - lost
