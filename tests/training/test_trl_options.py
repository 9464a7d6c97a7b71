"""Every option of TRL's configs is sorted: honoured ones reach the trainer's config, the others are refused."""

import dataclasses
import importlib.util
import json
from typing import Any

import pytest
import yaml
from trl import GRPOConfig, ModelConfig, SFTConfig, get_peft_config

from helpers.paths import ROOT
from tracereward.cli.training_help import help_text
from tracereward.cli.training_options import CONFIGS, parse
from tracereward.errors import InputError
from tracereward.runs import finish
from tracereward.training import option_rules
from tracereward.training.option_types import option_defaults
from tracereward.training.options import DataArguments
from tracereward.training.trackers import PACKAGES
from tracereward.training.trl_options import (
    COMMANDS,
    HONOURED,
    INTERNAL,
    REFUSED,
    ROLLOUTS,
    SFT_ONLY,
    commands_with,
    honoured,
    refusal,
    unsorted,
)

TRL = {"sft": SFTConfig, "grpo": GRPOConfig, "train": GRPOConfig}
FIELDS = {command: {*option_defaults(config), *option_defaults(ModelConfig)} for command, config in TRL.items()}

# Values that are not the default where its type does not say one, as words of the command line and as parsed.
VALUES: dict[str, Any] = {
    "accelerator_config": {"split_batches": True},
    "adam_beta1": 0.8,
    "adam_beta2": 0.98,
    "attn_implementation": "eager",
    "bf16": False,
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4",
    "cache_implementation": "static",
    "data_seed": 3,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_prefetch_factor": 3,
    "ddp_bucket_cap_mb": 20,
    "debug": "underflow_overflow",
    "delta": 2.0,
    "disable_tqdm": True,
    "dtype": "bfloat16",
    "epsilon_high": 0.3,
    "eval_delay": 2.0,
    "generation_batch_size": 16,
    "hub_model_id": "user/name",
    "hub_revision": "next",
    "gradient_accumulation_steps": 2,
    "hub_token": "secret",
    "importance_sampling_level": "sequence",
    "include_num_input_tokens_seen": True,
    "learning_rate": 3e-5,
    "log_completions_hub_repo": "user/name",
    "log_level": "error",
    "log_level_replica": "error",
    "logging_strategy": "epoch",
    "lora_modules_to_save": ["lm_head", "embed_tokens"],
    "lora_target_modules": ["q_proj", "v_proj"],
    "lora_target_parameters": ["a", "b"],
    "lr_scheduler_type": "cosine",
    "max_completion_length": 65,
    "max_steps": 7,
    "min_p": 0.1,
    "model_name_or_path": "folder",
    "model_revision": "next",
    "neftune_noise_alpha": 5.0,
    "num_completions_to_print": 2,
    "num_train_epochs": 2.0,
    "off_policy_mask_threshold": 0.5,
    "optim": "adafactor",
    "optim_args": "a=1",
    "optim_target_modules": "all-linear",
    "output_dir": "elsewhere",
    "pad_to_multiple_of": 8,
    "per_device_train_batch_size": 9,
    "project": "mine",
    "repetition_penalty": 1.1,
    "report_to": ["all"],
    "router_aux_loss_coef": 0.01,
    "run_name": "first",
    "save_strategy": "epoch",
    "scale_rewards": "batch",
    "steps_per_generation": 2,
    "top_p": 0.9,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "torch_empty_cache_steps": 5,
    "trackio_bucket_id": "bucket",
    "trackio_space_id": "user/space",
    "trackio_static_space_id": "user/static",
    "train_sampling_strategy": "sequential",
    "vllm_importance_sampling_clip_min": 0.1,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_max_model_length": 64,
    "vllm_mode": "server",
    "vllm_model_impl": "transformers",
    "vllm_server_base_url": "http://localhost:1",
    "vllm_server_host": "localhost",
    "vllm_structured_outputs_regex": "a+",
    "warmup_steps": 3.0,
}
LOSSES = {"sft": "dft", "grpo": "grpo", "train": "grpo"}

# What an option needs to have an effect.
WITH: dict[str, dict[str, Any]] = {
    "bnb_4bit_quant_type": {"load_in_4bit": True},
    "bnb_4bit_quant_storage": {"load_in_4bit": True},
    "use_bnb_nested_quant": {"load_in_4bit": True},
    "chat_template_kwargs": {"template": "chat"},
    "dataloader_persistent_workers": {"dataloader_num_workers": 2},
    "dataloader_in_order": {"dataloader_num_workers": 2},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 2},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 2},
    "eval_delay": {"validation_fraction": 0.1},
    "eval_on_start": {"validation_fraction": 0.1},
    "per_device_eval_batch_size": {"validation_fraction": 0.1},
    "fsdp_config": {"fsdp": True},
    "hub_model_id": {"push_to_hub": True},
    "hub_private_repo": {"push_to_hub": True},
    "hub_revision": {"push_to_hub": True},
    "hub_token": {"push_to_hub": True},
    "importance_sampling_level": {"loss_type": "grpo"},
    "liger_kernel_config": {"use_liger_kernel": True},
    "log_completions_hub_repo": {"log_completions": True},
    "log_unique_prompts": {"log_completions": True},
    "num_completions_to_print": {"log_completions": True},
    "logging_steps": {},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine"},
    "num_generations": {"per_device_train_batch_size": 9},
    "optim_target_modules": {"optim": "galore_adamw"},
    "padding_free": {"attn_implementation": "flash_attention_2"},
    "per_device_train_batch_size": {"num_generations": 3},
    "project": {"report_to": ["trackio"]},
    "ref_model_mixup_alpha": {"beta": 0.1, "sync_ref_model": True},
    "ref_model_sync_steps": {"beta": 0.1, "sync_ref_model": True},
    "run_name": {"report_to": ["trackio"]},
    "sync_ref_model": {"beta": 0.1},
    "trackio_bucket_id": {"report_to": ["trackio"]},
    "trackio_space_id": {"report_to": ["trackio"]},
    "trackio_static_space_id": {"report_to": ["trackio"]},
    "transformers_continuous_batching_config": {"use_transformers_continuous_batching": True},
    "use_bias_correction_kl": {"beta": 0.1},
    "vllm_importance_sampling_clip_max": {"use_vllm": True},
}
WITH |= {
    name: {"use_peft": True} for name in honoured() if name.startswith("lora_") or name in ("use_dora", "use_rslora")
}
WITH |= {
    name: {"use_adaptive_entropy": True} for name in honoured() if name.startswith(("entropy_coef_", "entropy_target"))
}
WITH |= {name: {"loss_type": name.split("_")[0]} for name in honoured() if name.startswith(("sapo_", "vespo_"))}
WITH |= {name: {"use_vllm": True} for name in HONOURED["vLLM"] if name != "use_vllm"}
WITH |= {
    name: {"use_vllm": True, "vllm_mode": "server"}
    for name in HONOURED["vLLM"]
    if name.startswith("vllm_server") or name == "vllm_group_port"
}

# Needs hardware or a package, or is derived from others; tested where it is used.
ELSEWHERE = {"bf16", "fp16", "tf32", "deepspeed", "fsdp", "fsdp_config", "ddp_backend"}
TESTED = [
    (command, name)
    for name in honoured()
    for command in commands_with(name)
    if name in FIELDS[command] and name not in ELSEWHERE
]


@pytest.fixture(autouse=True)
def everything_installed(monkeypatch):
    """Optional packages are not needed to parse the options that use them."""
    monkeypatch.setattr(option_rules, "_check_installed", lambda config: None)


def value_of(command: str, name: str) -> Any:
    """A value that is not the default."""
    if name == "loss_type":
        return LOSSES[command]
    if name in VALUES:
        return VALUES[name]
    default = option_defaults(CONFIGS[command], ModelConfig)[name]
    if name.endswith(("_kwargs", "_config")):
        return {"a": 1}
    if isinstance(default, bool) or default is None:
        return not default
    return default + 1 if isinstance(default, int) else default * 0.5 + 0.01


def as_words(options: dict[str, Any]) -> list[str]:
    """Options as the command line has them."""
    found = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        found += [f"--{name}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]
    return found


def plain(value: Any) -> Any:
    """Without the enumerations of transformers."""
    return [plain(one) for one in value] if isinstance(value, list) else getattr(value, "value", value)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_sorted_once(command):
    """A field of a newer TRL or transformers must be put into a table, or it would pass unseen."""
    assert not unsorted(FIELDS[command])
    for name in FIELDS[command]:
        states = [command in commands_with(name) and name in honoured(), refusal(command, name) is not None]
        assert sum(states) == 1, name
    assert not INTERNAL.keys() & (honoured().keys() | REFUSED.keys())


def test_commands_of_options_are_those_of_trl():
    for name in honoured():
        has = [command for command in COMMANDS if name in FIELDS[command]]
        assert [c for c in has if refusal(c, name) is None] == [*commands_with(name)], name
    assert {*SFT_ONLY} <= FIELDS["sft"]
    for name, refusals in REFUSED.items():
        assert not [c for one in refusals for c in one.commands if name not in FIELDS[c]], name


@pytest.mark.parametrize(("command", "name"), TESTED, ids=lambda value: value)
def test_honoured_options_reach_the_trainer(command, name, monkeypatch):
    """The value on the command line is in the config that the trainer gets, after TRL has derived others from it."""
    monkeypatch.setitem(PACKAGES, "trackio", (lambda: True, ""))
    value, defaults = value_of(command, name), option_defaults(CONFIGS[command], DataArguments, ModelConfig)
    needed = {other: given for other, given in WITH.get(name, {}).items() if other in defaults}
    _, config, model, _ = parse(command, as_words({**needed, name: value}))
    owner = model if name in option_defaults(ModelConfig) else config
    found = plain(getattr(owner, name))
    if name == "push_to_hub":  # see `runs.upload`: TRL would push each checkpoint
        assert (found, config.given[name]) == (False, True)
    elif name in ("report_to", "debug"):  # lists, the trackers resolved
        assert isinstance(found, list)
        assert found or name == "report_to"
    elif name == "accelerator_config":
        assert found.split_batches
    elif name == "include_num_input_tokens_seen":
        assert found == "all"
    else:
        assert found == (pytest.approx(value) if isinstance(value, float) else value)
    assert value != defaults[name]


REFUSED_IN = [(c, name) for c in COMMANDS for name in sorted(FIELDS[c]) if refusal(c, name)]


@pytest.mark.parametrize(("command", "name"), REFUSED_IN, ids=lambda value: value)
def test_refused_options_name_the_reason(command, name):
    """In Python as on the command line; the default is accepted."""
    config = ModelConfig if name in option_defaults(ModelConfig) else CONFIGS[command]
    default = option_defaults(config)[name]
    refused = refusal(command, name)
    assert refused is not None
    other = next(one for one in (True, "else", 3) if one != default and one not in refused.also)
    if config is ModelConfig:
        data, training, model, _ = parse(command, [])
        with pytest.raises(InputError, match=f"--{name} is not available in tracereward {command}"):
            option_rules.check_job(command, data, training, dataclasses.replace(model, **{name: other}))
    else:
        with pytest.raises(InputError) as caught:
            config(output_dir="x", **{name: other})
        assert f"--{name} " in str(caught.value)
        assert refused.why in str(caught.value)
        config(output_dir="x", report_to="none", **{name: default})


@pytest.mark.parametrize("command", COMMANDS)
def test_all_defaults_in_a_file_are_accepted(command, tmp_path):
    """So is a run's own config.yaml of an earlier version, which may have any option at its default."""
    defaults = option_defaults(*(type(one) for one in parse(command, [])[:3]))
    kept = {name: value for name, value in defaults.items() if value not in (None, "") and name != "output_dir"}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(kept))
    parse(command, ["--config", str(tmp_path / "options.yaml")])


@pytest.mark.parametrize(
    ("command", "words"),
    [("sft", ["--max_length", "512"]), ("train", ["--reward_weights", "1", "2"]), ("grpo", ["--packing", "true"])],
)
def test_refused_on_the_command_line_and_in_a_file(command, words, tmp_path):
    with pytest.raises(InputError, match=words[0]):
        parse(command, words)
    value = words[1] if len(words) == 2 else words[1:]
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({words[0][2:]: value}))
    with pytest.raises(InputError, match=words[0][2:]):
        parse(command, ["--config", str(tmp_path / "options.yaml")])


def test_overridden_options_of_sft_are_in_force():
    """TRL truncates at 1024 tokens by default, and trains on prompts if they are not marked."""
    _, config, *_ = parse("sft", [])
    assert config.max_length is None
    assert config.completion_only_loss is True


def test_lora_options_reach_peft():
    words = [
        "--use_peft",
        "true",
        "--lora_r",
        "4",
        "--lora_alpha",
        "7",
        "--lora_dropout",
        "0.2",
        "--lora_target_modules",
        "q_proj",
        "v_proj",
    ]
    _, _, model, _ = parse(
        "train", [*words, "--use_dora", "true", "--use_rslora", "true", "--lora_modules_to_save", "a"]
    )
    lora = get_peft_config(model)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (4, 7, 0.2)
    assert {*lora.target_modules} == {"q_proj", "v_proj"}
    assert (lora.use_dora, lora.use_rslora, lora.modules_to_save) == (True, True, ["a"])


def test_model_options_reach_the_policy(monkeypatch):
    words = [
        "--model_name_or_path",
        "owner/m",
        "--model_revision",
        "next",
        "--dtype",
        "bfloat16",
        "--attn_implementation",
        "eager",
    ]
    _, _, model, _ = parse("sft", words)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(finish, "load_causal_lm", lambda name, **given: seen.update(given, name=name))
    finish.load_policy(model)
    wanted = {"name": "owner/m@next", "dtype": "bfloat16", "attn_implementation": "eager"}
    assert {name: seen[name] for name in wanted} == wanted


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_what_is_honoured(command):
    shown = {word.split(":")[0].strip(",") for word in help_text(command).split() if word.startswith("--")}
    assert {f"--{name}" for name in FIELDS[command] if refusal(command, name) is None} <= shown
    hidden = {f"--{name}" for name in FIELDS[command] if refusal(command, name) is not None}
    listed = help_text(command).partition("Options of trl.")[2].split()
    assert not hidden & {*listed}


def test_page_of_options_is_up_to_date():
    """`python docs/make_options.py` writes it."""
    path = ROOT / "docs" / "make_options.py"
    spec = importlib.util.spec_from_file_location("make_options", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert module.page(text) == text
    assert all(f"<!-- {name} -->" in text for name in module.tables())
    assert {*ROLLOUTS} < {*COMMANDS}
