"""4-bit and 8-bit base models: exact gradients, adapters merged into the original weights, refusals before loading."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import ModelConfig

from helpers.unloadable import unloadable
from tracereward.commands import train
from tracereward.commands.grpo import run_grpo
from tracereward.commands.sft import run_sft
from tracereward.errors import InputError
from tracereward.files import write_jsonl
from tracereward.modeling.adapters import AdapterView, merged
from tracereward.modeling.quantized import is_quantized, prepare_for_lora
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.synthetic.arithmetic import build_model, generate
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import RewardConfig, SupervisedConfig
from tracereward.training.options import DataArguments

pytest.importorskip("bitsandbytes")
RANK = 2
BITS = {
    "4": {"load_in_4bit": True},
    "nested": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"},
    "8": {"load_in_8bit": True},
}
SHORT = {
    "max_steps": 2,
    "save_steps": 1,
    "per_device_train_batch_size": 8,
    "max_completion_length": 24,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "disable_tqdm": True,
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A model with weights so large that each layer has its share of the gradient."""
    folder = tmp_path_factory.mktemp("quantized") / "model"
    model = build_model(tokenizer, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 8 if "proj" in name else 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lora(**options):
    return LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear", **options)


def randomise(model):
    """Fill trained parameters by their order."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def load(base, bits, **options):
    return AutoModelForCausalLM.from_pretrained(
        base, dtype="float32", quantization_config=BitsAndBytesConfig(**BITS[bits]), **options
    )


@pytest.mark.parametrize("bits", ["4", "nested"])
def test_gradients_pass_through_the_quantized_layers_after_evaluation(base, bits):
    """The reference is an ordinary model with the dequantized weights."""
    model = get_peft_model(prepare_for_lora(load(base, bits)), lora())
    reference = get_peft_model(load(base, bits).dequantize().float(), lora())
    ids = torch.arange(5, 21).reshape(2, 8)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    gradients = []
    for one in (model, reference):
        randomise(one)
        one.train()(input_ids=ids).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in one.parameters() if parameter.requires_grad])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("bits", BITS)
def test_adapter_is_merged_into_the_weights_before_quantization(base, bits):
    model = get_peft_model(prepare_for_lora(load(base, bits)), lora())
    randomise(model)
    factors = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    original = load_file(base / "model.safetensors")
    found = merged(model).state_dict()
    assert found.keys() == original.keys()
    for name, weight in original.items():
        if any(part in name for part in LINEAR):
            path = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (factors[f"{path}.lora_{which}.default.weight"] for which in "AB")
            weight = weight + 8 / RANK * b @ a
        torch.testing.assert_close(found[name], weight)
    assert is_quantized(model)


def test_classifier_keeps_its_head_and_is_saved_as_a_plain_checkpoint(base, tokenizer, tmp_path):
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    model = TokenRewardModel.from_backbone(
        str(base), RewardSettings(head="token"), tokenizer, lora(), dtype="bfloat16", quantization_config=quantization
    )
    assert model.head_weight.dtype == torch.float32
    assert not quantization.llm_int8_skip_modules  # the caller's
    randomise(model)
    model.save_pretrained(tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    saved = load_file(tmp_path / "rm" / "model.safetensors")
    torch.testing.assert_close(saved["score.weight"], model.head_weight.detach().bfloat16())
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    whole = TokenRewardModel.from_pretrained(str(tmp_path / "rm"), dtype="float32")
    assert not is_quantized(whole.backbone)
    ours, theirs = (m.token_rewards([[5, 6, 7]], [[8, 9, 10, 1]])[0] for m in (model, whole))
    torch.testing.assert_close(ours, theirs, atol=1.0, rtol=0.3)  # the difference is the quantization's
    assert not torch.equal(ours, theirs)


def test_quantized_backbone_needs_lora(base, tokenizer):
    with pytest.raises(InputError, match="peft_config"):
        TokenRewardModel.from_backbone(
            str(base), RewardSettings(), tokenizer, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


def model_options(base, **options):
    lora = {"use_peft": True, "lora_r": RANK, "lora_target_modules": ["all-linear"]}
    return ModelConfig(model_name_or_path=str(base), **lora, **options)


def data_options(folder):
    rows = [{**row, "source": str(index)} for index, row in enumerate(generate("misconception", 16, seed=5))]
    write_jsonl(folder / "experts.jsonl", rows)
    return DataArguments(task="arithmetic", dataset_name=str(folder / "experts.jsonl"))


def adversarial(folder, **options):
    given = {
        "discriminator_warmup_updates": 2,
        "discriminator_every": 1,
        "discriminator_learning_rate": 1e-2,
        "warmup_rollouts": 2,
        "reward_form": "logit",
        "num_generations": 4,
        "on_failure": "ignore",
    }
    return AdversarialConfig(output_dir=str(folder), **SHORT | given | options)


def changes(folder, base):
    """The trained part of each linear weight of a checkpoint; everything else must be as in the base model."""
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    original, found = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    gaps = {}
    for name in original.keys() & found.keys():
        if any(part in name for part in LINEAR):
            gaps[name] = found[name] - original[name]
        else:
            torch.testing.assert_close(found[name], original[name], msg=name)
    return gaps


def check_trained(folder, base):
    """Every linear layer has changed by a matrix of the adapter's rank: nothing of the quantization is left."""
    gaps = changes(folder, base)
    assert len(gaps) == 2 * len(LINEAR)
    for name, gap in gaps.items():
        values = torch.linalg.svdvals(gap)
        assert values[0] > 1e-4, name
        assert values[RANK] < 1e-4 * values[0] + 1e-5, name


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_sft_resumes_to_the_same_weights(base, tmp_path, bits):
    data, model = data_options(tmp_path), model_options(base, **{bits: True})
    runs = {}
    for name, steps in (("whole", [2]), ("resumed", [1, 2])):
        for step in steps:
            config = SupervisedConfig(output_dir=str(tmp_path / name), **SHORT | {"max_steps": step})
            shutil.rmtree(tmp_path / name / "policy", ignore_errors=True)
            (tmp_path / name / "report.html").unlink(missing_ok=True)
            runs[name] = run_sft(data, config, model, resume=step != steps[0])
    check_trained(runs["whole"] / "policy", base)
    one, other = (load_file(folder / "policy" / "model.safetensors") for folder in runs.values())
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [json.loads(line).get("loss") for line in (runs["whole"] / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < loss < 20 for loss in losses if loss is not None)


@pytest.mark.long
def test_train_resumes_to_the_same_weights(base, tmp_path):
    data, model = data_options(tmp_path), model_options(base, load_in_4bit=True)
    runs = {}
    for name, steps in (("whole", [3]), ("resumed", [2, 3])):
        for step in steps:
            for made in ("policy", "reward_model"):
                shutil.rmtree(tmp_path / name / made, ignore_errors=True)
            (tmp_path / name / "report.html").unlink(missing_ok=True)
            config = adversarial(tmp_path / name, max_steps=step)
            runs[name] = train.run_train(data, config, model, resume=step != steps[0])
    for part in ("policy", "reward_model"):
        check_trained(runs["whole"] / part, base)
        one, other = (load_file(folder / part / "model.safetensors") for folder in runs.values())
        assert all(torch.equal(one[name], other[name]) for name in one), part


@pytest.mark.parametrize(
    ("head", "bits", "options"),
    [
        pytest.param("token", "load_in_4bit", {}, marks=pytest.mark.long),
        pytest.param("airl", "load_in_8bit", {}, marks=pytest.mark.long),
        ("action", "load_in_4bit", {"reward_form": "logit_plus_logprob", "beta_clip": 100, "r1_penalty": 0.1}),
        pytest.param("implicit", "load_in_4bit", {"shared_base": True, "reward_form": "f"}, marks=pytest.mark.long),
        ("action", "load_in_8bit", {"shared_base": True}),
    ],
)
def test_policy_and_reward_model_are_trained(base, tmp_path, monkeypatch, head, bits, options):
    quantized = []

    def seen(run, trainer, *rest, **more):
        backbone = trainer.discriminator.model.backbone
        quantized.append(is_quantized(backbone.model if isinstance(backbone, AdapterView) else backbone))
        quantized.append(is_quantized(trainer.accelerator.unwrap_model(trainer.model)))
        report(run, trainer, *rest, **more)

    report = train.report_rewards
    monkeypatch.setattr(train, "report_rewards", seen)
    config = adversarial(tmp_path / "run", head=head, **options)
    folder = train.run_train(data_options(tmp_path), config, model_options(base, **{bits: True}))
    check_trained(folder / "policy", base)
    check_trained(folder / "reward_model", base)
    scores = TokenRewardModel.from_pretrained(str(folder / "reward_model")).score(["1 + 1 = "], ["2"])
    assert abs(scores[0].aggregate("mean")) < 5.01
    assert quantized == [True, True]
    assert (folder / "report.html").is_file()


def test_frozen_models_of_grpo_are_quantized(base, tmp_path):
    config = RewardConfig(output_dir=str(tmp_path / "run"), num_generations=4, reward="logprob", **SHORT)
    folder = run_grpo(data_options(tmp_path), config, model_options(base, load_in_8bit=True))
    check_trained(folder / "policy", base)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ({"load_in_4bit": True, "use_peft": False}, {}, "--use_peft true"),
        ({"load_in_8bit": True, "use_peft": False}, {}, "--use_peft true"),
        ({"load_in_4bit": True, "dtype": "auto"}, {}, "--dtype bfloat16"),
        ({"bnb_4bit_quant_type": "fp4"}, {}, "bnb_4bit_quant_type.*--load_in_4bit"),
        ({"load_in_4bit": True}, {"use_vllm": True}, "--use_vllm"),
        ({"load_in_4bit": True}, {"shard_discriminator": True}, "--shard_discriminator"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_loading(base, tmp_path, model, config, message):
    bare = unloadable(base, tmp_path / "bare")
    options = ModelConfig(**{**vars(model_options(bare)), **model})
    with pytest.raises(InputError, match=message):
        train.run_train(data_options(tmp_path), adversarial(tmp_path / "run", **config), options)
    assert not (tmp_path / "run").exists()


def test_missing_package_and_sharded_policy_are_refused(base, tmp_path, monkeypatch):
    data, options = data_options(tmp_path), model_options(base, load_in_4bit=True)
    with monkeypatch.context() as patch:
        patch.setattr("tracereward.training.quantization.is_bitsandbytes_available", lambda: False)
        with pytest.raises(InputError, match=r"tracereward\[quantization\]"):
            run_sft(data, SupervisedConfig(output_dir=str(tmp_path / "run"), **SHORT), options)
    config = SupervisedConfig(output_dir=str(tmp_path / "run"), **SHORT)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="FSDP"):
        run_sft(data, config, options)


def test_checkpoint_of_another_quantization_is_refused(base, tmp_path):
    other = tmp_path / "gptq"
    shutil.copytree(base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(InputError, match="gptq"):
        run_sft(data_options(tmp_path), SupervisedConfig(output_dir=str(tmp_path / "r"), **SHORT), model_options(other))


def test_checkpoint_that_is_quantized_ends_as_a_plain_one(base, tmp_path, tokenizer):
    """There are no other weights to merge into than the rounded ones."""
    load(base, "4").save_pretrained(tmp_path / "four")
    tokenizer.save_pretrained(tmp_path / "four")
    config = SupervisedConfig(output_dir=str(tmp_path / "run"), **SHORT)
    folder = run_sft(data_options(tmp_path), config, model_options(tmp_path / "four"))
    dequantized = load(base, "4").dequantize().state_dict()
    found = load_file(folder / "policy" / "model.safetensors")
    assert "quantization_config" not in json.loads((folder / "policy" / "config.json").read_text())
    for name, weight in found.items():
        if any(part in name for part in LINEAR):
            values = torch.linalg.svdvals(weight - dequantized[name].float())
            assert values[RANK] < 1e-4 * values[0] + 1e-5, name
