"""The precision of models by processor, size and checkpoint: the rule, and what the commands do with it."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import joblib
import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.command_line import bench, command, refused  # noqa: F401 (fixtures)
from tracereward.commands.questions import with_precision
from tracereward.errors import InputError
from tracereward.files import write_jsonl
from tracereward.generation.params import SamplingParams
from tracereward.modeling import precision
from tracereward.modeling.loading import load_causal_lm
from tracereward.rewards.engines import load_scorer
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings, read_settings, write_fitted

CAN, CANNOT = {"avx512_bf16": True}, {"avx512_f": True}


@pytest.fixture
def processor(monkeypatch):
    """Sets what the CPU can do, and the size from which a model is large."""

    def use(capabilities, large=1):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        monkeypatch.setattr(precision, "LARGE", large)
        monkeypatch.setattr(precision, "best_device", lambda: torch.device("cpu"))

    return use


@pytest.fixture(scope="module")
def stored(tmp_path_factory, tiny_model_folder, tokenizer):
    """A tiny causal LM in both precisions, and a reward model with head token in float32."""
    folder = tmp_path_factory.mktemp("precision")
    for name in ("float32", "bfloat16"):
        load_causal_lm(tiny_model_folder, getattr(torch, name)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    torch.manual_seed(0)
    model = TokenRewardModel.from_backbone(
        str(tiny_model_folder), RewardSettings(head="token", task="arithmetic"), tokenizer, dtype=torch.float32
    )
    model.save_pretrained(folder / "reward")
    return folder


@pytest.mark.parametrize(
    ("checkpoint", "can", "large", "reads", "scores"),
    [
        ("float32", CAN, True, "bfloat16", "float32"),
        ("float32", CANNOT, True, "float32", "float32"),
        ("bfloat16", CAN, True, "bfloat16", "bfloat16"),
        ("bfloat16", CANNOT, True, "float32", "float32"),
        ("float32", CAN, False, "float32", "float32"),
        ("bfloat16", CANNOT, False, "bfloat16", "bfloat16"),
    ],
)
def test_rule(stored, processor, checkpoint, can, large, reads, scores):
    processor(can, 1 if large else 10**9)
    name = stored / checkpoint
    assert precision.reading_precision(name).name == reads
    assert precision.scoring_precision(name, "").name == scores
    assert precision.scoring_precision(name, "float32").name == "float32"
    fitted = "float32" if large and can is CANNOT else "bfloat16"
    assert precision.scoring_precision(name, "bfloat16").name == fitted
    assert precision.training_precision(name)[0] == (large and can is CAN)
    for given in ("float32", "bfloat16", "float16"):
        assert precision.reading_precision(name, given).name == given
        assert precision.scoring_precision(name, "", given).name == given
    with pytest.raises(InputError, match="float32"):
        precision.reading_precision(name, "float3")


def test_tiny_models_of_the_tests_are_small_and_counted_exactly(stored):
    model = load_causal_lm(stored / "bfloat16")
    assert precision.parameters(stored / "bfloat16") == (sum(p.numel() for p in model.parameters()), "bfloat16")
    assert precision.parameters(stored / "float32")[0] < precision.LARGE


def test_scores_in_16_bits_are_near_float32_with_the_stored_head(stored, processor, experts, capsys):
    """Within 5 % of the largest token reward, 1 % for a trace; the head's product has float32's digits."""
    processor(CAN)
    prompts, texts = [row["prompt"] for row in experts], [row["completion"] for row in experts]
    exact = load_scorer(str(stored / "reward")).score(prompts, texts)
    assert "float32: as it was fitted" in capsys.readouterr().err
    model = load_scorer(str(stored / "reward"), dtype="bfloat16")
    assert {p.dtype for name, p in model.backbone.named_parameters() if "score" not in name} == {torch.bfloat16}
    head = load_file(stored / "reward" / "model.safetensors")["score.weight"]
    assert torch.equal(model.head_weight, head)
    half = model.score(prompts, texts)
    largest = max(abs(value) for one in exact for value in one.rewards)
    for a, b in zip(half, exact, strict=True):
        assert a.rewards == pytest.approx(b.rewards, abs=0.05 * largest)
        assert a.aggregate("mean") == pytest.approx(b.aggregate("mean"), abs=0.01 * largest)
    values = torch.tensor([value for one in half for value in one.rewards])
    assert not torch.equal(values, values.bfloat16().float())


def test_calibration_stores_the_precision_that_scoring_then_uses(stored, processor, command, tmp_path, tokenizer):
    processor(CAN)
    folder = tmp_path / "rm"
    TokenRewardModel.from_pretrained(stored / "reward").save_pretrained(folder)
    rows = [
        {"prompt": f"{n} + 1 = ?\n", "completion": f"{n} + 1 = {n + 1 + wrong}\n#### {n + 1 + wrong}"}
        | {"correct": not wrong}
        for n in range(1, 13)
        for wrong in (0, 1)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    done = command("calibrate", folder, tmp_path / "rows.jsonl", "--dtype", "bfloat16")
    assert done.code == 0, done.err
    assert read_settings(folder).dtype == "bfloat16"
    assert load_scorer(str(folder)).backbone.dtype == torch.bfloat16
    processor(CANNOT)
    assert load_scorer(str(folder)).backbone.dtype == torch.float32
    write_fitted(folder, dtype="")
    assert load_scorer(str(folder)).backbone.dtype == torch.float32
    refused(command("score", folder, tmp_path / "rows.jsonl", "--dtype", "bfloat"), "dtype", "bfloat16")


def test_samples_know_their_precision_if_it_is_not_the_checkpoints(stored, processor):
    """It is an argument of an unfinished output, which another machine then refuses to continue in another one."""
    sampling = SamplingParams(seed=3)
    processor(CAN)
    assert with_precision(str(stored / "float32"), sampling) == replace(sampling, dtype="bfloat16")
    assert with_precision(str(stored / "bfloat16"), sampling) == sampling
    processor(CANNOT)
    assert with_precision(str(stored / "float32"), sampling) == sampling
    assert with_precision(str(stored / "bfloat16"), replace(sampling, dtype="auto")).dtype == "float32"
    assert with_precision(str(stored / "bfloat16"), replace(sampling, dtype="bfloat16")).dtype == "bfloat16"


def test_policy_samples_in_bfloat16(stored, processor, command, tmp_path):
    write_jsonl(tmp_path / "questions.jsonl", [{"prompt": f"{n} + 1 = ?\n", "answer": str(n + 1)} for n in range(2)])
    words = ["sample", stored / "float32", "--data", tmp_path / "questions.jsonl", "--task", "arithmetic", "-n", "1"]
    words += ["--max-new-tokens", "4"]
    processor(CAN)
    done = command(*words)
    assert (done.code, len(done.out.splitlines())) == (0, 2), done.err
    assert "samples in bfloat16" in done.err
    done = command(*words, "--dtype", "float32")
    assert (done.code, "samples in float32" in done.err) == (0, True)


def test_training_under_autocast_is_stored_and_kept_by_a_resumed_run(bench, processor, command, tmp_path):
    """The stored choice holds on a machine that would choose otherwise; the weights stay in float32."""
    words = ["sft", "--model_name_or_path", bench.model, "--dataset_name", bench.experts, "--task", "arithmetic"]
    words += ["--max_completion_length", "64", "--max_steps", "2", "--save_steps", "1", "--report_to", "none"]
    words += ["--lr_scheduler_type", "constant"]  # otherwise a step would depend on the number of steps
    words += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--output_dir"]

    def weights(folder):
        return load_file(folder / "policy" / "model.safetensors")

    processor(CAN)
    done = command(*words, tmp_path / "run")
    assert done.code == 0, done.err
    assert "under bfloat16 autocast" in done.err
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["bf16"] is True
    whole = weights(tmp_path / "run")
    assert {value.dtype for value in whole.values()} == {torch.float32}
    half = ["1" if word == "2" else word for word in words]
    assert command(*half, tmp_path / "half").code == 0
    processor(CANNOT)
    resumed = command("sft", "--output_dir", tmp_path / "half", "--max_steps", "2", "--resume")
    assert resumed.code == 0, resumed.err
    assert "bf16 True as the run began" in resumed.err
    assert yaml.safe_load((tmp_path / "half" / "config.yaml").read_text())["bf16"] is True
    again = weights(tmp_path / "half")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    refused(command(*words, tmp_path / "half", "--bf16", "false", "--resume"), "bf16", "True before, False now")
    done = command(*words, tmp_path / "plain")
    assert "in float32" in done.err
    assert yaml.safe_load((tmp_path / "plain" / "config.yaml").read_text())["bf16"] is False
    plain = weights(tmp_path / "plain")
    assert any(not torch.equal(plain[name], value) for name, value in whole.items())


def test_processes_of_one_machine_share_its_cores(stored):
    """Each has the cores divided by the processes; a limit that torch does not see counts too."""
    code = """
import json, os, sys, torch
from tracereward.modeling.loading import load_causal_lm
found = []
for given in ({"LOKY_MAX_CPU_COUNT": "1"}, {"LOCAL_WORLD_SIZE": "2"}, {"OMP_NUM_THREADS": "3"}):
    os.environ.update(given)
    torch.set_num_threads(6)
    load_causal_lm(sys.argv[1])
    found.append(torch.get_num_threads())
    for name in given:
        del os.environ[name]
print(json.dumps(found))
"""
    bare = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(stored / "float32")], env=bare, capture_output=True, check=True
    )
    of_two = max(1, min(6, joblib.cpu_count() // 2))
    assert json.loads(done.stdout) == [1, of_two, 6]  # with OMP_NUM_THREADS it is the user's affair
