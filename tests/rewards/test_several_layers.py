"""A token head on several layers: values and gradients against the formula, adapters, and the artefact."""

import contextlib
import json
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForTokenClassification, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from tracereward.errors import InputError
from tracereward.files import read_json
from tracereward.rewards.distillation import Example, distill
from tracereward.rewards.heads import LinearHead
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.records import ForwardOptions
from tracereward.rewards.settings import RewardSettings, check_reward_model
from tracereward.rewards.vllm_scorer import check_vllm

SIZE, LAYERS = 32, (1, 2, 4)
WEIGHT, BIAS = np.random.default_rng(7).normal(size=(len(LAYERS), SIZE)) / 4, 0.25
MODELS = {  # of five layers
    "qwen2": lambda size: Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=size,
            hidden_size=SIZE,
            intermediate_size=48,
            num_hidden_layers=5,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ),
    "gpt2": lambda size: GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_embd=SIZE, n_layer=5, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def language_model(request, tokenizer, tmp_path_factory):
    """Folder of a model whose norms are not the identity, and the model."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    model = MODELS[request.param](len(tokenizer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln" in name:
                parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model.eval()


@pytest.fixture
def made(language_model, tokenizer) -> TokenRewardModel:
    settings = RewardSettings(head="token", beta_clip=1e6)
    head = LinearHead(layers=LAYERS, weight=WEIGHT, bias=BIAS)
    return TokenRewardModel.from_readout(str(language_model[0]), head, settings, tokenizer, dtype=torch.float32)


@pytest.fixture(scope="module")
def traces() -> tuple[list[list[int]], list[list[int]]]:
    """Three prompts of different lengths with three completions each."""
    rng = random.Random(0)
    prompts = [[rng.randrange(4, 30) for _ in range(length)] for length in (1, 4, 6) for _ in range(3)]
    prompts = [prompts[3 * (row // 3)] for row in range(9)]
    return prompts, [[rng.randrange(4, 30) for _ in range(rng.randrange(1, 9))] for _ in range(9)]


def by_hand(model, prompt, completion) -> np.ndarray:
    """(T,) sum over layers of w_l . norm(h_l) + b in float64, from the states before any norm."""
    with torch.no_grad():
        states = model(torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states
    base = model.base_model
    norm = base.norm if hasattr(base, "norm") else base.ln_f
    scale = norm.weight.detach().double().numpy()
    values = np.full(len(completion), BIAS)
    for layer, weight in zip(LAYERS, WEIGHT, strict=True):
        x = states[layer][0, len(prompt) :].double().numpy()
        if hasattr(base, "norm"):
            normed = x / np.sqrt((x**2).mean(1, keepdims=True) + norm.variance_epsilon) * scale
        else:
            shift = norm.bias.detach().double().numpy()
            normed = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + norm.eps) * scale + shift
        values += normed @ weight
    return values


def rewards(model, traces, **options) -> list[np.ndarray]:
    return [values.numpy() for values in model.compute_rewards(*traces, ForwardOptions(**options))]


def test_rewards_are_those_of_the_formula_also_from_disk(language_model, made, traces, tmp_path):
    expected = [by_hand(language_model[1], *trace) for trace in zip(*traces, strict=True)]
    made.save_pretrained(tmp_path / "reward")
    loaded = TokenRewardModel.from_pretrained(tmp_path / "reward")
    assert loaded.settings.layers == LAYERS
    assert loaded.backbone.config.num_hidden_layers == 4
    assert check_reward_model(str(tmp_path / "reward")) == loaded.settings
    card = (tmp_path / "reward" / "README.md").read_text()
    assert "layers 1, 2, 4" in card
    for model in (made, loaded):
        for budget in (8, 10_000):  # alone and in batches, with shared prompts
            for found, value in zip(rewards(model, traces, token_budget=budget), expected, strict=True):
                np.testing.assert_allclose(found, value, atol=1e-5)
        batch = model.pack(*traces)  # with gradients, without shared prompts
        for row, value in zip(model(batch).detach().numpy(), expected, strict=True):
            np.testing.assert_allclose(row[: len(value)], value, atol=1e-5)
    assert not any(module._forward_hooks for module in made.backbone.modules())


def formula(model: TokenRewardModel, batch) -> torch.Tensor:
    """(B, T) values by the formula, with gradients, from the states that transformers returns."""
    core = model.backbone.get_base_model() if hasattr(model.backbone, "peft_config") else model.backbone
    states = core.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        output_hidden_states=True,
    ).hidden_states
    base = core.base_model
    norm = base.norm if hasattr(base, "norm") else base.ln_f
    linear = core.score if hasattr(core, "score") else core.classifier
    linear = linear.modules_to_save["default"] if hasattr(linear, "modules_to_save") else linear
    parts = [states[4] if layer == 4 else norm(states[layer]) for layer in LAYERS]
    with torch.autocast("cpu", enabled=False):
        values = sum(part.float() @ row for part, row in zip(parts, linear.weight, strict=True)) + linear.bias.sum()
    return values[:, -batch.completion_mask.size(1) :]


@pytest.mark.parametrize("way", ["full", "lora", "checkpointing", "autocast"])
def test_gradients_are_those_of_the_formula(made, traces, way):
    if way == "lora":
        made.add_lora(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    batch = made.pack(*traces)
    weights = torch.randn(batch.completion_mask.shape, generator=torch.Generator().manual_seed(2))
    weights *= batch.completion_mask
    rounded = torch.autocast("cpu", torch.bfloat16) if way == "autocast" else contextlib.nullcontext()
    with rounded:
        expected = formula(made, batch)
        loss = (expected * weights).sum()
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    if way == "checkpointing":
        made.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    made.train()
    with rounded:
        values = made(batch)
        loss = (values * weights).sum()
    torch.testing.assert_close(values * batch.completion_mask, expected * batch.completion_mask)
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    assert sum(gradient is not None for gradient in found) > 20
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_adapters_are_merged_into_the_artefact(made, traces, tmp_path):
    made.add_lora(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
    with torch.no_grad():
        made.head_weight.add_(torch.randn(made.head_weight.shape, generator=torch.Generator().manual_seed(5)))
    expected = rewards(made, traces)
    made.save_pretrained(tmp_path / "reward")
    assert not (tmp_path / "reward" / "adapter_config.json").exists()
    for found, value in zip(rewards(TokenRewardModel.from_pretrained(tmp_path / "reward"), traces), expected):
        np.testing.assert_allclose(found, value, atol=1e-4)


def changed(folder, **fields) -> None:
    path = folder / "tracereward.json"
    path.write_text(json.dumps({k: v for k, v in {**read_json(path), **fields}.items() if v != "without"}))


def test_an_artefact_of_one_layer_without_the_field_is_read_as_before(language_model, tokenizer, traces, tmp_path):
    head = LinearHead(layers=(4,), weight=WEIGHT[:1], bias=BIAS)
    settings = RewardSettings(head="token", beta_clip=1e6)
    made = TokenRewardModel.from_readout(str(language_model[0]), head, settings, tokenizer, dtype=torch.float32)
    made.save_pretrained(tmp_path / "reward")
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "reward")
    assert plain.config.num_labels == 1
    changed(tmp_path / "reward", layers="without")
    old = TokenRewardModel.from_pretrained(tmp_path / "reward")
    for prompt, completion, found in zip(*traces, rewards(old, traces), strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([[*prompt, *completion]])).logits
        np.testing.assert_allclose(found, logits[0, len(prompt) :, 0].numpy(), atol=1e-5)


def test_settings_of_another_model_are_refused(made, tmp_path):
    """Its labels would be read wrongly, unnoticed."""
    made.save_pretrained(tmp_path / "reward")
    for layers, message in [
        ("without", r"reads the states of layers 4, and config.json has 4 layers and 3 labels"),
        ([1, 2, 3], "layers 1, 2, 3, and config.json has 4"),
        ([1, 4], "3 labels"),
        ([1, 4, 2], "increasing"),
        ([4], "two or more"),
        (3, "two or more"),
        ([0, 2, 4], "from 1"),
        (["1", "2", "4"], "increasing numbers"),
    ]:
        changed(tmp_path / "reward", layers=layers)
        with pytest.raises(InputError, match=message):
            check_reward_model(str(tmp_path / "reward"))
    with pytest.raises(InputError, match="for head token"):
        RewardSettings(head="airl", layers=(1, 2))


def test_export_gives_one_that_reads_one_layer(made, traces, tmp_path):
    made.save_pretrained(tmp_path / "reward")
    with pytest.raises(InputError, match="reads 3 layers: distil it first with `tracereward export"):
        check_vllm(str(tmp_path / "reward"))
    examples = [
        Example(where="", prompt=tuple(p), completion=tuple(c), correct=None) for p, c in zip(*traces, strict=True)
    ]
    student, _ = distill(made, tmp_path / "reward", examples, epochs=2, token_budget=200)
    assert student.settings.layers == ()
    student.save_pretrained(tmp_path / "student")
    assert check_reward_model(str(tmp_path / "student")).is_classifier
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "student")
    for prompt, completion, found in zip(*traces, rewards(student, traces), strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([[*prompt, *completion]])).logits
        np.testing.assert_allclose(found, logits[0, len(prompt) :, 0].numpy(), atol=1e-5)
