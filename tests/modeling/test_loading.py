"""Models that are not complete: each is refused by the check and by the loader, with the file and the fix."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from helpers.paths import ROOT
from helpers.unloadable import unloadable
from tracereward.errors import InputError
from tracereward.modeling.loading import (
    CLASSIFIER,
    check_model,
    load_causal_lm,
    load_model,
    new_classifier,
    read_generation_config,
)
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings, check_reward_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 455512\n"


def change_weights(folder, change):
    """Apply `change` to a dict of a folder's weights and write them back."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path, **changed):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shards(folder):
    """The weights in two files, of which the second is missing."""
    names = sorted(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{1 + (name == names[-1])}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def damaged_index(folder):
    shards(folder)
    cut(folder / "model.safetensors.index.json")


DAMAGE = {
    "git lfs": (lambda f: (f / "model.safetensors").write_text(POINTER), "model.safetensors: is a Git LFS pointer"),
    "git lfs tokenizer": (lambda f: (f / "tokenizer.json").write_text(POINTER), "tokenizer.json: is a Git LFS pointer"),
    "cut short": (lambda f: cut(f / "model.safetensors"), "model.safetensors: is damaged or cut short"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: is damaged or cut short"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights: model.safetensors is missing"),
    "missing shard": (shards, "model-00002-of-00002.safetensors is missing (1 of the 2 files"),
    "damaged index": (damaged_index, "model.safetensors.index.json: is damaged"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json"),
    "damaged configuration": (lambda f: cut(f / "config.json"), "config.json"),
    "missing weight": (
        lambda f: change_weights(f, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        "its weights lack model.layers.1.mlp.up_proj.weight",
    ),
    "other shape": (
        lambda f: change_json(f / "config.json", intermediate_size=8),
        "asks for (64, 8)",
    ),
    "fewer layers": (
        lambda f: change_json(f / "config.json", num_hidden_layers=1),
        "which config.json does not describe",
    ),
    "unmerged adapter": (
        lambda f: change_weights(f, lambda w: w.update({"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 2)})),
        "up_proj.lora_A.weight, which config.json does not describe",
    ),
    "package": (
        lambda f: change_json(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantised with gptq",
    ),
    "unknown package": (
        lambda f: change_json(f / "config.json", quantization_config={"quant_method": "pebbles"}),
        "is quantised with pebbles",
    ),
    "not quantised": (
        lambda f: change_json(
            f / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
        ),
        "and its weights are not",
    ),
}


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory, tiny_model_folder, tokenizer):
    """Reward models of a classifier and of a causal LM, next to their policy, as in a run folder."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(tiny_model_folder, folder / "policy")
    for head in ("token", "action"):
        made = TokenRewardModel.from_backbone(str(tiny_model_folder), RewardSettings(head=head), tokenizer)
        made.save_pretrained(folder / ("reward_model" if head == "token" else head))
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_incomplete_policies(tiny_model_folder, tmp_path, damage):
    """By the check, which loads no weights, and, for whatever concerns weights, by the loader too."""
    harm, message = DAMAGE[damage]
    folder = unloadable(tiny_model_folder, tmp_path / "model")
    harm(folder)
    with pytest.raises(InputError, match=re.escape(message)):
        check_model(str(folder))


@pytest.mark.parametrize("damage", ["missing weight", "other shape", "fewer layers", "unmerged adapter"])
def test_loader_checks_what_it_loaded(tiny_model_folder, tmp_path, damage):
    harm, message = DAMAGE[damage]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    harm(folder)
    with pytest.raises(InputError, match=re.escape(message)):
        load_causal_lm(folder)
    with pytest.raises(InputError, match=re.escape(message)):
        new_classifier(folder)


@pytest.mark.parametrize("damage", ["cut short", "no weights", "no configuration", "package", "missing shard"])
def test_errors_of_the_loader_name_the_model(tiny_model_folder, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    DAMAGE[damage][0](folder)
    with pytest.raises(InputError, match=re.escape(str(folder))):
        load_causal_lm(folder)


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in ("not quantised", "package")])
@pytest.mark.parametrize("kind", ["reward_model", "action"])
def test_incomplete_reward_models(reward_models, tmp_path, damage, kind):
    harm, message = DAMAGE[damage]
    folder = unloadable(reward_models / kind, tmp_path / "model")
    harm(folder)
    with pytest.raises(InputError, match=re.escape(message)):
        check_reward_model(str(folder))


def test_missing_head(reward_models, tmp_path):
    """A classifier's weight that another tool did not save would be random, and other in every call."""
    folder = tmp_path / "token"
    shutil.copytree(reward_models / "reward_model", folder)
    change_weights(folder, lambda weights: weights.pop("score.weight"))
    for check in (check_reward_model, TokenRewardModel.from_pretrained):
        with pytest.raises(InputError, match=r"token is not complete: its weights lack score\.weight"):
            check(str(folder))


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_text(POINTER),
        cut,
        lambda path: save_file({"a": torch.ones(())}, path),
        lambda path: save_file({**load_file(path), "w": torch.zeros(3)}, path),
    ],
    ids=["git lfs", "cut short", "other weights", "other shape"],
)
def test_damaged_head_file(reward_models, tmp_path, harm):
    folder = tmp_path / "action"
    shutil.copytree(reward_models / "action", folder)
    harm(folder / "head.safetensors")
    for check in (check_reward_model, TokenRewardModel.from_pretrained):
        with pytest.raises(InputError, match=r"head\.safetensors"):
            check(str(folder))


def test_complete_models_pass(reward_models, tiny_model_folder):
    check_model(str(tiny_model_folder))
    for kind in ("reward_model", "action"):
        check_reward_model(str(reward_models / kind))


def test_tied_weights_are_not_missing(tmp_path, capfd):
    """They are stored once. Neither the check nor the loader reports anything."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    made.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    transformers_logging.set_verbosity_warning()
    capfd.readouterr()
    check_model(str(tmp_path))
    loaded = load_causal_lm(tmp_path)
    assert torch.equal(loaded.lm_head.weight, made.lm_head.weight)
    assert capfd.readouterr().err == ""


def test_pickled_weights_are_read(tiny_model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    check_model(str(folder))
    assert torch.equal(load_causal_lm(folder).lm_head.weight, weights["lm_head.weight"])
    del weights["lm_head.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"lack lm_head\.weight"):
        check_model(str(folder))


def test_modules_beside_the_model_are_named_and_not_used(tiny_model_folder, tmp_path, capsys):
    """A value head of PPO, for example."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    change_weights(folder, lambda weights: weights.update({"v_head.summary.weight": torch.ones(1, 4)}))
    load_causal_lm(folder)
    assert "not used: v_head.summary.weight" in capsys.readouterr().err


def test_new_head_is_the_only_random_weight(tiny_model_folder):
    backbone = new_classifier(tiny_model_folder)
    plain = load_causal_lm(tiny_model_folder)
    torch.testing.assert_close(dict(backbone.model.named_parameters()), dict(plain.model.named_parameters()))
    with pytest.raises(InputError, match=r"lack score\.bias, score\.weight"):
        load_model(CLASSIFIER, tiny_model_folder)


def test_merge_command_of_an_adapter(tiny_model_folder, tmp_path, tokenizer):
    """The command in the message writes the model with the adapter's weights in it."""
    base = load_causal_lm(tiny_model_folder)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    assert not (tmp_path / "adapter" / "config.json").exists()
    with pytest.raises(InputError, match=r"is a LoRA adapter of .*merge it first") as refused:
        check_model(str(tmp_path / "adapter"))
    shutil.copy(tiny_model_folder / "config.json", tmp_path / "adapter")  # some tools store it with the adapter
    with pytest.raises(InputError, match="is a LoRA adapter"):
        check_model(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "config.json").unlink()
    command = re.search(r'python -c "(.*)"', str(refused.value))[1]
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)
    merged = tmp_path / "adapter-merged"
    check_model(str(merged))
    torch.testing.assert_close(load_causal_lm(merged).state_dict(), expected)
    assert load_tokenizer(str(merged)).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("base", "message"),
    [("/nowhere/base", "of /nowhere/base, which is not on this machine"), (None, "does not say of which model")],
)
def test_adapters_without_their_base(tmp_path, base, message):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    with pytest.raises(InputError, match=f"{message}.*base_model_name_or_path, then merge it"):
        check_model(str(tmp_path))


def test_a_file_in_place_of_a_model(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    for check in (check_model, check_reward_model):
        with pytest.raises(InputError, match=r"rows.jsonl: is a file, .*the model first"):
            check(str(tmp_path / "rows.jsonl"))


def test_damaged_generation_config(tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": ')
    with pytest.raises(InputError, match=r"generation_config.json is damaged"):
        read_generation_config(folder)
    (folder / "generation_config.json").unlink()
    assert read_generation_config(folder) is None


def test_nothing_is_loaded_around_the_loader():
    """Every `from_pretrained` of transformers and PEFT in the package is in the module that explains their errors."""
    call = re.compile(r"\b(Auto\w+|GenerationConfig|PeftModel\w*|PreTrained\w+)\.from_pretrained\(")
    found = {path.name for path in (ROOT / "src").rglob("*.py") if call.search(path.read_text(encoding="utf-8"))}
    assert found == {"loading.py", "model_folder.py", "cards.py"}  # the others print commands


def test_folders_of_runs(reward_models, tmp_path):
    """The message names the subfolder that fits."""
    with pytest.raises(InputError, match=re.escape(f"is a run folder, not a model: give {reward_models / 'policy'}")):
        check_model(str(reward_models))
    fix = re.escape(f"Give {reward_models / 'reward_model'}")
    for name in (reward_models, reward_models / "policy"):
        with pytest.raises(InputError, match=f"is not a reward model.*{fix}"):
            check_reward_model(str(name))
    for name in ("reward_model", "action"):
        with pytest.raises(InputError, match=rf"is a reward model.*give {re.escape(str(reward_models / 'policy'))}"):
            check_model(str(reward_models / name))
    sft = tmp_path / "sft"
    shutil.copytree(reward_models / "policy", sft / "policy")
    with pytest.raises(InputError, match="is not a reward model"):
        check_reward_model(str(sft))
    (tmp_path / "part" / "checkpoints").mkdir(parents=True)
    (tmp_path / "part" / "config.yaml").write_text("")
    with pytest.raises(InputError, match=r"has not finished.*--resume"):
        check_model(str(tmp_path / "part"))


def test_gguf_only(tmp_path):
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="GGUF files only"):
        check_model(str(tmp_path))


# Tokenizers


def test_tokenizer_larger_than_the_embedding(tiny_model_folder, tmp_path, tokenizer):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    larger = PreTrainedTokenizerFast.from_pretrained(folder)
    larger.add_tokens(["<think>"])
    larger.save_pretrained(folder)
    size = len(tokenizer)
    with pytest.raises(InputError, match=f"ids up to {size}, and the embedding has {size} rows"):
        load_tokenizer(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(size + 1)
    model.save_pretrained(folder)
    assert len(load_tokenizer(str(folder))) == size + 1


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: cut(f / "tokenizer.json"), "tokenizer.json is damaged"),
        (lambda f: cut(f / "tokenizer_config.json"), "tokenizer_config.json is damaged"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
        (lambda f: [path.unlink() for path in f.glob("tokenizer*")], "tokenizer"),
        (
            lambda f: (
                change_json(f / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
                or (f / "tokenizer.json").unlink()
            ),
            "tokenizer",
        ),
        (lambda f: (f / "tokenizer_config.json").unlink(), "no end-of-sequence token"),
    ],
    ids=["cut", "cut configuration", "no vocabulary", "nothing", "empty class", "no configuration"],
)
def test_incomplete_tokenizers(tiny_model_folder, tmp_path, harm, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    harm(folder)
    with pytest.raises(InputError, match=f"{folder.name}.*{message}"):
        load_tokenizer(str(folder))
