"""Sharing a prompt's forward pass among its completions gives the results of separate sequences."""

import functools
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tracereward.modeling import log_probs
from tracereward.modeling.batching import prompt_groups
from tracereward.modeling.log_probs import (
    can_share_prompts,
    completion_log_probs,
    shared_classifier_logits,
    shared_log_probs,
    states_and_log_probs,
)
from tracereward.rewards import model as module
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings

LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def build(folder, tokenizer, head, peft=None) -> TokenRewardModel:
    """A reward model in which every trainable weight affects the output."""
    settings = RewardSettings(head=head, beta_clip=1e9)
    model = TokenRewardModel.from_backbone(str(folder), settings, tokenizer, peft, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def pool(groups) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts with `groups` completions each, in mixed order."""
    rng = random.Random(3)
    rows = []
    for count in groups:
        prompt = [rng.randrange(4, 50) for _ in range(rng.randrange(1, 9))]
        rows += [(prompt, [rng.randrange(4, 50) for _ in range(rng.randrange(1, 14))]) for _ in range(count)]
    rng.shuffle(rows)
    return [prompt for prompt, _ in rows], [completion for _, completion in rows]


MIXED = pool([5, 1, 3, 1, 2, 7])


def one_by_one(model, prompts, completions) -> list[torch.Tensor]:
    """Each sequence alone, unpadded, in one pass."""
    with torch.no_grad():
        return [model(model.pack([p], [c]))[0] for p, c in zip(prompts, completions, strict=True)]


@pytest.fixture
def shared(monkeypatch):
    """The group sizes that prompts are shared with."""
    sizes = []

    def spy(function, model, batch, given):
        sizes.append(list(given))
        return function(model, batch, given)

    for function in (shared_log_probs, shared_classifier_logits):
        monkeypatch.setattr(module, function.__name__, functools.partial(spy, function))
    return sizes


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", [1, 3, 2048])
@pytest.mark.parametrize(
    ("head", "peft"), [("action", None), ("action", LORA), ("implicit", None), ("token", None), ("airl", LORA)]
)
def test_rewards_match_one_pass_per_sequence(tiny_model_folder, tokenizer, shared, head, peft, *, part, monkeypatch):
    """Prompts of different lengths, groups of one to seven, in one batch and in many, read whole and in parts."""
    monkeypatch.setattr(log_probs, "PART", part)
    model = build(tiny_model_folder, tokenizer, head, peft)
    for budget in (10_000, 60, 1):
        shared.clear()
        rewards = model.token_rewards(*MIXED, token_budget=budget)
        assert [len(row) for row in rewards] == [len(completion) for completion in MIXED[1]]
        together = sum(map(sum, shared))
        assert together == 19 if budget == 10_000 else (together > 0) == (budget > 1)
        assert_close(rewards, one_by_one(model, *MIXED))


@pytest.mark.parametrize("head", ["action", "token"])
def test_learned_positions_start_at_the_prompt(tokenizer, shared, head, tmp_path):
    """Unlike rotary positions, GPT-2's are not invariant to a shift by padding."""
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    config.initializer_range = 0.5
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = build(tmp_path / "gpt2", tokenizer, head)
    rewards = model.token_rewards(*MIXED)
    assert shared
    assert_close(rewards, one_by_one(model, *MIXED))


@pytest.mark.parametrize("part", [1, 4, 2048])
def test_shared_log_probs_and_states_match_the_unshared_pass(tiny_model_folder, tokenizer, part, monkeypatch):
    """The first token's log-prob is from the prompt's last state, later ones are from the previous token's."""
    monkeypatch.setattr(log_probs, "PART", part)
    model = build(tiny_model_folder, tokenizer, "action")
    prompts, completions = zip(*sorted(zip(*MIXED)))
    batch = model.pack(prompts, completions)
    sizes = list(Counter(map(tuple, prompts)).values())
    assert sorted(sizes) == [1, 1, 2, 3, 5, 7]
    with torch.no_grad():
        expected, hidden = completion_log_probs(model.backbone, batch)
        found, states = shared_log_probs(model.backbone, batch, sizes)
        layers, again = states_and_log_probs(model.backbone, batch)
        in_parts, _ = states_and_log_probs(model.backbone, batch, sizes)
    real = batch.completion_mask.bool()
    assert_close([found[real], states[real], again[real]], [expected[real], hidden[real], expected[real]])
    assert_close([states[real] for states in in_parts], [states[real] for states in layers])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("other", ["reference", "policy"])
def test_reference_and_policy_share_prompts_unless_sharded(tiny_model_folder, tokenizer, shared, other, sharded):
    model = build(tiny_model_folder, tokenizer, "token")
    lm = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    rewards = model.token_rewards(*MIXED, **{other: lm}, sharded=sharded)
    assert [sorted(sizes) for sizes in shared] == ([] if sharded else [[1, 1, 2, 3, 5, 7]] * 2)
    sign = 1 if other == "reference" else -1
    for prompt, completion, reward, value in zip(*MIXED, rewards, one_by_one(model, *MIXED), strict=True):
        with torch.no_grad():
            log_probs = lm(torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
        added = torch.stack([log_probs[len(prompt) + t - 1, token] for t, token in enumerate(completion)])
        assert_close([reward], [value + sign * added])


def test_sharded_models_make_equally_many_passes_on_each_process(tiny_model_folder, tokenizer, monkeypatch):
    """A process with fewer batches repeats its last, since every pass gathers weights from all processes."""
    model = build(tiny_model_folder, tokenizer, "action")
    lm = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    passes = []
    lm.register_forward_pre_hook(lambda *_: passes.append(1))
    alone = model.token_rewards(*MIXED, reference=lm, sharded=True, token_budget=60)
    own = len(passes)
    monkeypatch.setattr(module, "all_reduce_max", lambda count: count + 2)
    again = model.token_rewards(*MIXED, reference=lm, sharded=True, token_budget=60)
    assert len(passes) == own + own + 2
    assert_close(again, alone)


# ---------- which models ----------


def models(vocab) -> dict[str, tuple[torch.nn.Module, bool]]:
    small = {**SMALL, "vocab_size": vocab, "num_key_value_heads": 2}
    gemma = {**small, "head_dim": 16}
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return {
        "llama": (LlamaForCausalLM(LlamaConfig(**small)), True),
        "mistral": (MistralForCausalLM(MistralConfig(**small, sliding_window=4)), False),
        "mistral without windows": (MistralForCausalLM(MistralConfig(**small, sliding_window=None)), True),
        "gemma": (Gemma3ForCausalLM(Gemma3TextConfig(**gemma, sliding_window=4)), False),
        "qwen": (Qwen2ForCausalLM(Qwen2Config(**small)), True),
        "qwen with a windowed layer": (Qwen2ForCausalLM(Qwen2Config(**small, **sliding)), False),
        "mamba": (MambaForCausalLM(MambaConfig(vocab_size=vocab, hidden_size=32, num_hidden_layers=2)), False),
    }


def test_prompts_are_shared_only_under_full_attention(tokenizer):
    for name, (model, plain) in models(len(tokenizer)).items():
        assert can_share_prompts(model) == plain, name


@pytest.mark.parametrize("name", ["mistral", "gemma", "qwen"])
def test_rewards_are_right_with_and_without_windows(tokenizer, shared, tmp_path, name):
    """Windows of four tokens are shorter than prompts and completions: a copied cache would lack tokens."""
    torch.manual_seed(0)
    lm, plain = models(len(tokenizer))[name]
    lm.save_pretrained(tmp_path / "lm")
    model = build(tmp_path / "lm", tokenizer, "action")
    rewards = model.token_rewards(*MIXED)
    assert bool(shared) == plain
    assert_close(rewards, one_by_one(model, *MIXED))


# ---------- groups ----------


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=20),
    budget=st.integers(1, 120),
    share=st.booleans(),
)
def test_groups_contain_each_row_once_one_prompt_within_the_budget(rows, budget, share):
    prompts, completions = [[p] * (p + 1) for p, _ in rows], [[7] * n for _, n in rows]
    groups = prompt_groups(prompts, completions, budget, share)
    assert sorted(index for group in groups for index in group) == list(range(len(rows)))
    for group in groups:
        assert len({tuple(prompts[index]) for index in group}) == 1
        padded = len(group) * (len(prompts[group[0]]) + max(len(completions[index]) for index in group))
        assert padded <= budget or len(group) == 1
    if not share:
        assert all(len(group) == 1 for group in groups)
    elif budget == 120 and len(rows) <= 9:  # all rows of a prompt fit
        assert len(groups) == len({p for p, _ in rows})
