"""Tests with vLLM: rollouts through TRL during training, and scoring (pytest -m slow -n 0 tests/rewards)."""

import dataclasses
import json
import os
import subprocess
import sys

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import served
from helpers.served import save_reward_model, traces
from helpers.tiny import free_port
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.vllm_scorer import VllmScorer
from tracereward.synthetic.arithmetic import build_model, build_tokenizer, generate

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason="vLLM is not installed (pip install '.[vllm]')")

# On CPUs vLLM repacks linear weights for oneDNN and drops the originals, after which TRL cannot load new ones into it.
RUN = """
import torch
if not torch.cuda.is_available():
    import vllm._custom_ops
    vllm._custom_ops._supports_onednn = False
from tracereward.cli import main
main()
"""

SHAPE = {"hidden_size": 64, "layers": 2, "heads": 2}  # vLLM's attention does not support a head size of 16
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}


# Weights are sent to a vLLM server over NCCL, which needs a GPU. Here only the names are recorded.
RUN_WITHOUT_NCCL = """
import json, sys
from trl.generation.vllm_client import VLLMClient
sent = []
def update(self, metadata, named_params):
    sent.append([name for name, _ in named_params])
    open(sys.argv[sys.argv.index("--output_dir") + 1] + ".sent", "w").write(json.dumps(sent))
VLLMClient.init_communicator = lambda self, device: None
VLLMClient.update_named_params = update
from tracereward.cli import main
main()
"""


def save_policy(tmp_path):
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0, **SHAPE).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")


def train(tmp_path, script, **more):
    """Run the warm-up and two steps with vLLM rollouts; return the logged steps."""
    save_policy(tmp_path)
    rows = tmp_path / "experts.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in generate("misconception", 16, seed=1)))
    options = {
        "task": "arithmetic",
        "dataset_name": rows,
        "model_name_or_path": tmp_path / "tiny",
        "output_dir": tmp_path / "run",
        "use_vllm": "true",
        "max_completion_length": 32,
        "per_device_train_batch_size": 32,
        "num_generations": 4,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "save_strategy": "no",
        "gradient_checkpointing": "false",
        "discriminator_warmup_updates": 4,
        "warmup_prompts": 8,
        "warmup_rollouts": 4,
        **more,
    }
    argv = ["train", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    done = subprocess.run(
        [sys.executable, "-c", script, *argv], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in logged if row["phase"] == "warmup"] == [1, 2, 3, 4]
    steps = [row for row in logged if row["phase"] == "train"]
    assert [row["step"] for row in steps] == [1, 2]
    assert (tmp_path / "run" / "reward_model" / "tracereward.json").is_file()
    return steps


def test_training_with_vllm_rollouts(tmp_path):
    """vLLM's log-probs of its samples agree with the policy's, so it has the policy's weights."""
    options = {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1, "vllm_max_model_length": 64}
    steps = train(tmp_path, RUN, **options)
    assert all(row["sampling/sampling_logp_difference/mean"] < 0.01 for row in steps)


def test_training_with_a_vllm_server(tmp_path, monkeypatch):
    """A real server samples the rollouts; the learning rate is 0, so its initial weights are current; all are sent."""
    save_policy(tmp_path)
    for name, value in (ENVIRONMENT | {"VLLM_SERVER_DEV_MODE": "1"}).items():
        monkeypatch.setitem(served.ENVIRONMENT, name, value)
    port = free_port()
    argv = [tmp_path / "tiny", "--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager"]
    argv += ["--max-model-len", 64, "--logprobs-mode", "processed_logprobs"]
    server = served.Process(tmp_path / "log.txt", "vllm.entrypoints.cli.main", "serve", *argv)
    try:
        server.find("Application startup complete")
        options = {"vllm_mode": "server", "vllm_server_base_url": f"http://127.0.0.1:{port}", "learning_rate": 0.0}
        steps = train(tmp_path, RUN_WITHOUT_NCCL, **options)
    finally:
        server.end()
    assert all(row["sampling/sampling_logp_difference/mean"] < 0.01 for row in steps)
    sent = json.loads((tmp_path / "run.sent").read_text())
    parameters = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").named_parameters())
    assert sent
    assert all(set(names) == set(parameters) for names in sent)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A token classifier with clearly different rewards."""
    return save_reward_model(tmp_path_factory.mktemp("vllm") / "rm", build_tokenizer(), SHAPE, head="token")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_scores_agree_with_transformers(reward_model, dtype, tolerance, monkeypatch):
    """Trace rewards within a relative tolerance; 16-bit token rewards are as accurate as those of transformers."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    prompts, completions = zip(*traces(24), strict=True)
    exact = TokenRewardModel.from_pretrained(str(reward_model), dtype=torch.float32)
    rounded = TokenRewardModel.from_pretrained(str(reward_model), dtype=getattr(torch, dtype))
    scorer = VllmScorer(str(reward_model), dtype)
    for granularity in ("dense", "step", "sparse"):
        settings = dataclasses.replace(scorer.settings, granularity=granularity)
        exact.settings = rounded.settings = scorer.settings = settings
        expected, own, found = (model.score(prompts, completions) for model in (exact, rounded, scorer))
        largest = max(abs(reward) for scores in expected for reward in scores.rewards)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.tokens, ours.supervised) == (theirs.tokens, theirs.supervised)
            if granularity == "dense":
                assert ours.aggregate() == pytest.approx(theirs.aggregate(), abs=tolerance * largest)
        allowed = max(tolerance, 1.5 * rms_difference(own, expected))
        assert rms_difference(found, expected) <= allowed


def rms_difference(found, expected):
    """Root mean square difference of token rewards."""
    a, b = (torch.tensor([reward for scores in each for reward in scores.rewards]) for each in (found, expected))
    return float((a - b).square().mean().sqrt())


def test_command_and_server(reward_model, tmp_path, monkeypatch):
    pairs = traces(8)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    environment = {**os.environ, **ENVIRONMENT}
    argv = [sys.executable, "-m", "tracereward", "score", reward_model, rows, "--engine"]
    outputs = [
        subprocess.run([*map(str, argv), engine], env=environment, capture_output=True, text=True, check=True).stdout
        for engine in ("transformers", "vllm")
    ]
    expected, found = ([json.loads(line) for line in text.splitlines() if line[0] == "{"] for text in outputs)
    assert [row["reward"] for row in found] == pytest.approx([row["reward"] for row in expected], abs=1e-4)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setitem(served.ENVIRONMENT, name, value)
    with served.serving(tmp_path / "log.txt", reward_model, "--engine", "vllm") as server:
        body = {"prompt": pairs[0][0], "completion": pairs[0][1]}
        answer = httpx.post(f"{server.url}/v1/score", json=body, timeout=60).json()
    assert answer["results"][0]["reward"] == pytest.approx(expected[0]["reward"], abs=1e-4)
