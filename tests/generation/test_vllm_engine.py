"""Sampling with vLLM: what it is asked and how its outputs are read; with vLLM installed, what it samples (slow)."""

import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from helpers import served
from helpers.command_line import command, refused  # noqa: F401
from helpers.tiny import free_port, rows
from tracereward.files import write_jsonl
from tracereward.generation import vllm_engine
from tracereward.generation.params import SamplingParams
from tracereward.modeling.tokenization import encode_prompt
from tracereward.synthetic.arithmetic import build_model, generate

SHAPE = {"hidden_size": 64, "layers": 2, "heads": 2}  # vLLM's attention does not support a head size of 16
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def asked(tmp_path_factory, tokenizer):
    """A policy and questions."""
    folder = tmp_path_factory.mktemp("vllm")
    build_model(tokenizer, seed=0, **SHAPE).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    given = [{"prompt": row["prompt"], "answer": row["answer"]} for row in generate("misconception", 6, seed=2)]
    write_jsonl(folder / "questions.jsonl", given)
    return SimpleNamespace(policy=folder / "policy", data=folder / "questions.jsonl", rows=given)


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """A module `vllm`: a completion is a token by its seed and one by its index; the first of a prompt ends there."""
    made = SimpleNamespace(llm=None, calls=[], interrupt_at=None)

    class LLM:
        def __init__(self, model, **options):
            made.llm = (model, options)

        def generate(self, prompts, params, use_tqdm):
            assert use_tqdm is False
            made.calls.append((prompts, params))
            if len(made.calls) == made.interrupt_at:
                raise KeyboardInterrupt
            return [SimpleNamespace(outputs=[answer(one, index) for index in range(one.n)]) for one in params]

    def answer(one, index):
        ids = [one.seed % (len(tokenizer) - 4) + 4, 4 + index]
        ids += [tokenizer.eos_token_id] if index == 0 else []
        return SimpleNamespace(token_ids=tuple(ids), cumulative_logprob=-1.5 * len(ids))

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__spec__ = LLM, SimpleNamespace, ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return made


def test_requests_rows_and_resume(command, asked, scripted, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_engine, "COMPLETIONS", 8)  # four questions of two at once
    out = tmp_path / "out.jsonl"
    words = ["sample", asked.policy, "--task", "arithmetic", "--data", asked.data, "-n", 2, "--max-new-tokens", 5]
    words += ["--temperature", 0.5, "--top-p", 0.9, "--seed", 7, "--engine", "vllm", "-o", out]
    done = command(*words)
    assert done.code == 0, done.err
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in asked.rows]
    seeds = [SamplingParams(seed=7).seed_of(index) for index in range(6)]
    model, options = scripted.llm
    assert (model, options["max_model_len"]) == (str(asked.policy), max(map(len, prompts)) + 5)
    assert (options["enable_prefix_caching"], options["generation_config"]) == (True, "vllm")
    assert [len(given) for given, _ in scripted.calls] == [4, 2]
    assert [one["prompt_token_ids"] for given, _ in scripted.calls for one in given] == prompts
    requests = [one for _, given in scripted.calls for one in given]
    common = {"n": 2, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "logprobs": 0, "detokenize": False}
    common["stop_token_ids"] = [tokenizer.eos_token_id]
    assert [vars(one) for one in requests] == [{**common, "seed": seed} for seed in seeds]
    found = rows(out)
    for place, row in enumerate(found):
        question, index = divmod(place, 2)
        ids = [seeds[question] % (len(tokenizer) - 4) + 4, 4 + index]
        assert row["completion"] == tokenizer.decode(ids, skip_special_tokens=True)
        expected = {"question": question, "finished": index == 0, "length": 3 - index, "logprob": -1.5}
        assert {name: row[name] for name in expected} == expected
    assert f"vLLM: {sum(map(len, prompts))} prompt tokens, 30 completion tokens" in done.err

    text = out.read_text()
    del scripted.calls[:]
    scripted.interrupt_at = 2
    assert command(*words, "--overwrite").code == 130
    assert (tmp_path / "out.jsonl.part").read_text() == "".join(text.splitlines(keepends=True)[:8])
    del scripted.calls[:]
    out.unlink()
    assert command(*words, "--resume").code == 0
    assert [[one.seed for one in given] for _, given in scripted.calls] == [seeds[4:]]
    assert out.read_text() == text


def test_settings_that_vllm_lacks_are_refused(command, asked, scripted):
    config = asked.policy / "generation_config.json"
    before = config.read_text()
    words = ["sample", asked.policy, "--data", asked.data, "--engine", "vllm", "--use-generation-config", "-n", 1]
    words += ["--max-new-tokens", 9]
    try:
        config.write_text(json.dumps({**json.loads(before), "typical_p": 0.5}))
        refused(command(*words), "vllm does not have typical_p")
        assert scripted.llm is None
        config.write_text(json.dumps({**json.loads(before), "top_k": 7, "min_new_tokens": 2, "temperature": 0.3}))
        assert command(*words).code == 0
    finally:
        config.write_text(before)
    request = vars(scripted.calls[0][1][0])
    assert (request["top_k"], request["min_tokens"], request["temperature"]) == (7, 2, 0.3)


def test_vllm_must_be_installed(command, asked, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    refused(command("sample", asked.policy, "--data", asked.data, "--engine", "vllm"), "tracereward[vllm]")


def run(*argv, **more):
    environment = {**os.environ, **ENVIRONMENT, **more}
    words = [sys.executable, "-m", "tracereward", *map(str, argv)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_vllm_and_its_server_sample_as_transformers(asked, tmp_path, monkeypatch):
    """Greedy completions and their log-probs are equal; samples of one seed are equal in any batch, and differ."""
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install '.[vllm]')")
    words = ["sample", asked.policy, "--task", "arithmetic", "--data", asked.data, "--max-new-tokens", 8]
    greedy = [*words, "--temperature", 0, "-n", 1]
    expected = run(*greedy)
    offline = run(*greedy, "--engine", "vllm")
    sampled = run(*words, "-n", 4, "--engine", "vllm")
    again = run(*words, "-n", 4, "--engine", "vllm", "--limit", 2)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setitem(served.ENVIRONMENT, name, value)
    port = free_port()
    argv = [asked.policy, "--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager"]
    server = served.Process(tmp_path / "log.txt", "vllm.entrypoints.cli.main", "serve", *argv, "--max-model-len", 64)
    try:
        server.find("Application startup complete")
        there = ["--engine", f"http://127.0.0.1:{port}/v1"]
        served_greedy, served_sampled = run(*greedy, *there), run(*words, "-n", 4, *there)
    finally:
        server.end()
    for found in (offline, served_greedy):
        for row, other in zip(found, expected, strict=True):
            assert row.pop("logprob") == pytest.approx(other["logprob"], abs=1e-4)
            assert row == {name: value for name, value in other.items() if name != "logprob"}
    assert [row["completion"] for row in again] == [row["completion"] for row in sampled[:8]]
    for found in (sampled, served_sampled):
        assert len({row["completion"] for row in found}) > 12
        assert len(found) == 24
