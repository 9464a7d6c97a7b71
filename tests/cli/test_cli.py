"""The command line: error messages for bad input, and the pipeline from samples to scores to a choice.

Bad input is given to `cli.main` in this process, with models that cannot be loaded: a command that checked its input
only after loading a model would fail with another error.
"""

import datetime
import json
import math
import shutil
import signal
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pyarrow
import pytest
import torch
from filelock import FileLock
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers.any_text import any_text  # noqa: F401
from helpers.command_line import bench, command, refused  # noqa: F401
from helpers.tiny import launcher, options, rows, trap
from helpers.unloadable import unloadable
from tracereward import __version__
from tracereward.commands import score
from tracereward.errors import InputError
from tracereward.files import write_jsonl
from tracereward.modeling.loading import check_model, context_length, read_config
from tracereward.rewards.calibration import Calibration
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings, write_fitted
from tracereward.selection import METHODS
from tracereward.tasks.recipes import get_task

TINY = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 24, "report_to": "none"}


@pytest.fixture(scope="module")
def token_reward_model(bench, tokenizer):
    """A reward model with a token-classification head."""
    folder = bench.folder / "token_reward_model"
    settings = RewardSettings(head="token", granularity="step", aggregate="min", task="arithmetic")
    torch.manual_seed(0)
    TokenRewardModel.from_backbone(str(bench.model), settings, tokenizer).save_pretrained(folder)
    return folder


def words(bench, output: Path, **changed: object) -> list[str]:
    given = {
        "task": "arithmetic",
        "dataset_name": bench.experts,
        "model_name_or_path": bench.bare,
        "output_dir": output,
        **TINY,
        **changed,
    }
    return [*options(**{name: value for name, value in given.items() if value is not None})]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"learning_rate": -1}, "learning_rate must be at least 0"),
        ({"learning_rate": "nan"}, "learning_rate must be at least 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a whole number"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a whole number"),
        ({"num_train_epochs": "nan"}, "num_train_epochs must be more than 0"),
        ({"num_train_epochs": 0}, "num_train_epochs must be more than 0"),
        ({"generation_kwargs": '{"tempreature": 1}'}, "'tempreature' is no option of transformers' generation"),
        ({"seed": -1}, "seed must be a whole number between 0 and"),
        ({"temperature": 0}, "temperature must be more than 0"),
        ({"top_p": 1.5}, "top_p must be more than 0 and at most 1"),
        ({"discriminator_learning_rate": -1}, "discriminator_learning_rate must be at least 0"),
        ({"discriminator_warmup_updates": -1}, "discriminator_warmup_updates must be at least 0"),
        ({"replay_size": -5}, "replay_size must be at least 1"),
        ({"discriminator_token_budget": 0}, "discriminator_token_budget must be at least 1"),
        ({"validation_dataset_name": "questions", "save_strategy": "no"}, "save_strategy no"),
    ],
)
def test_invalid_training_numbers_are_refused(command, bench, tmp_path, changed, named):
    if "validation_dataset_name" in changed:
        questions = [{"prompt": "1 + 1 + 1 + 1 = ?\n", "answer": "4"}]
        write_jsonl(tmp_path / "questions.jsonl", questions)
        changed = {**changed, "validation_dataset_name": tmp_path / "questions.jsonl"}
    refused(command("train", *words(bench, tmp_path / "run", **changed)), named)
    assert not (tmp_path / "run").exists()


def test_output_dir_accepts_hyphens_and_underscores(command, bench, tmp_path, monkeypatch):
    """Both are the same option, so that a run never goes to an unintended folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    given = words(bench, tmp_path / "taken")
    at = given.index("--output_dir")
    given[at : at + 2] = [f"--output-dir={tmp_path / 'taken'}"]
    refused(command("train", *given), "taken is a file, not a folder")
    for value in ("", "[a]", "3"):
        (tmp_path / "recipe.yaml").write_text(f"output_dir: {value}\n")
        refused(command("train", "--config", tmp_path / "recipe.yaml", *given[:at]), "output_dir must be the name")
    (tmp_path / "recipe.yaml").write_text("seed: 1\nlearning_rate: 0.1\nseed: 2\n")
    refused(command("train", "--config", tmp_path / "recipe.yaml"), "recipe.yaml:3: option 'seed' is given twice")
    for line, kind in (
        ("learning_rate: null", "a number, not null"),
        ("seed: true", "a whole number, not true"),
        ("seed: 1.5", "a whole number, not 1.5"),
        ("max_completion_length: [1]", "a whole number, not [1]"),
        ("gradient_checkpointing: 3", "true or false, not 3"),
    ):
        (tmp_path / "recipe.yaml").write_text(f"{line}\n")
        refused(command("train", "--config", tmp_path / "recipe.yaml"), "recipe.yaml: option ", kind)
    (tmp_path / "recipe.yaml").write_text("1: 2\n")
    refused(command("train", "--config", tmp_path / "recipe.yaml"), "unknown option 1")
    assert not (tmp_path / "runs").exists()


def test_folders_of_other_content_are_not_overwritten(command, bench, tmp_path):
    """Also with --resume. A run that failed before its first step can be restarted with other options."""
    folder = tmp_path / "run"
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / "mine.txt").write_text("dear")
    (folder / "checkpoints" / "checkpoint-500").mkdir(parents=True)
    for resume in ([], ["--resume"]):
        refused(command("train", *words(bench, folder), *resume), "policy", "not a run folder", "config.yaml")
    assert (folder / "policy" / "mine.txt").read_text() == "dear"
    assert (folder / "checkpoints" / "checkpoint-500").is_dir()

    (tmp_path / "failed" / "checkpoints").mkdir(parents=True)
    (tmp_path / "failed" / "config.yaml").write_text("learning_rate: 5.0\n")
    (tmp_path / "failed" / "checkpoints" / "batch.json").write_text('{"rows": 3}')
    refused(command("train", *words(bench, tmp_path / "failed")), "were to be loaded")

    finished = tmp_path / "finished"
    (finished / "policy").mkdir(parents=True)
    for name in ("report.html", "metrics.jsonl"):
        (finished / name).write_text("")
    shutil.copy(tmp_path / "failed" / "config.yaml", finished)
    done = command("train", *words(bench, finished), "--resume")
    refused(done, "is finished", "no checkpoint")


# Training: rows

GOOD = {"prompt": "1 + 2 = ?\n", "completion": "#### 3", "answer": "3"}


@pytest.mark.parametrize("kind", ["sft", "train", "grpo"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "#### 3"}, "prompt"),
        ({"prompt": "", "completion": "#### 3"}, "prompt"),
        ({"prompt": "1 + 2 = ?\n"}, "completion"),
        ({"prompt": "1 + 2 = ?\n", "completion": ""}, "completion"),
        ({"prompt": "1 + 2 = ?\n", "completion": 3}, "completion"),
        (["1 + 2 = ?\n", "#### 3"], "JSON array"),
    ],
    ids=["no prompt", "empty prompt", "no completion", "empty completion", "number", "array"],
)
def test_errors_in_rows_name_file_and_line(command, bench, tmp_path, kind, row, message):
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [GOOD, row, GOOD])
    changed = {"num_generations": None} if kind == "sft" else {}
    done = command(kind, *words(bench, tmp_path / "run", dataset_name=data, **changed))
    refused(done, f"{data}:2: ", message)
    assert not (tmp_path / "run").exists()


def test_verifier_reward_needs_answers(command, bench, tmp_path):
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [{**GOOD, "answer": None} if n == 3 else GOOD for n in range(12)])
    done = command("grpo", *words(bench, tmp_path / "run", task="generic", dataset_name=data))
    refused(done, f"{data}:4: ", "answer")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; did you mean"),
        (b"", "no rows"),
        (b'{"prompt": "1 + 2 = ?\\n", "completion"\n', ":1: not valid JSON"),
        (b'{"prompt": "\xff"}\n', "not UTF-8"),
    ],
    ids=["missing", "empty", "truncated", "bytes"],
)
def test_unreadable_files(command, bench, tmp_path, content, message):
    data = tmp_path / "experts.jsonl"
    if content is None:
        shutil.copy(bench.experts, tmp_path / "expert.jsonl")
    else:
        data.write_bytes(content)
    refused(command("train", *words(bench, tmp_path / "run", dataset_name=data)), data, message)


@pytest.mark.long
def test_completions_over_the_length_limit(command, bench, tmp_path, experts, tokenizer):
    lengths = [len(tokenizer(row["completion"])["input_ids"]) + 1 for row in experts]
    limit = sorted(lengths)[len(lengths) // 2]
    over = sum(length > limit for length in lengths)
    assert 0 < over < 8
    given = words(bench, tmp_path / "run", max_completion_length=limit, per_device_train_batch_size=4)
    done = command("train", *given)
    refused(done, f"{over} of {len(experts)} rows are too long", f"over {limit} tokens", "--on_long")
    given = words(bench, tmp_path / "run", model_name_or_path=bench.model, max_completion_length=limit, max_steps=1,
                  per_device_train_batch_size=4, num_generations=None)  # fmt: skip
    dropped = launcher()("sft", *given, "--on_long", "drop")
    assert dropped.code == 0, dropped.err
    assert f"{over} demonstrations dropped: longer than {limit} tokens" in dropped.err
    refused(command("train", *words(bench, tmp_path / "other", max_completion_length=2), "--on_long", "drop"),
            f"{len(experts)} of {len(experts)} rows are too long")  # fmt: skip


def test_fewer_demonstrations_than_a_batch(command, bench, tmp_path):
    given = words(bench, tmp_path / "run", per_device_train_batch_size=52)
    refused(command("train", *given), "12 demonstrations", "needs 13 prompts", "--per_device_train_batch_size")
    given = words(bench, tmp_path / "run", per_device_train_batch_size=13, num_generations=None)
    refused(command("sft", *given), "12 demonstrations", "needs 13 prompts", "--per_device_train_batch_size")


# Training: options


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"task": "arithmetics"}, ["'arithmetics'", "did you mean 'arithmetic'?"]),
        ({"granularity": "stpe"}, ["granularity 'stpe'", "did you mean 'step'?"]),
        ({"head": "tokn"}, ["head 'tokn'", "did you mean 'token'?"]),
        ({"advantages": "tokens"}, ["advantages 'tokens'", "did you mean 'token'?"]),
        ({"template": "chta"}, ["template 'chta'", "did you mean 'chat'?"]),
        ({"template": "chat"}, ["no chat template", "--template plain"]),
        ({"num_generations": 1}, ["num_generations must be at least 2"]),
        ({"save_total_limit": 1}, ["save_total_limit must be at least 2"]),
        ({"num_iterations": 2, "save_steps": 3}, ["save_steps 3", "--save_steps 2"]),
        (
            {"steps_per_generation": 6, "gradient_accumulation_steps": 4, "save_steps": 2},
            ["save_steps 2", "--save_steps 3"],
        ),
        ({"model_name_or_path": None}, ["--model_name_or_path"]),
        ({"granulrity": "step"}, ["unknown option --granulrity", "did you mean 'granularity'?"]),
        ({"max_steps": "many"}, ["max_steps", "many"]),
        ({"label_smoothing": 0.7}, ["label_smoothing", "0.7"]),
        ({"positives": "agree"}, ["positives 'agree'", "did you mean 'agreeing'?"]),
        ({"warmup_candidates": "no.jsonl"}, ["no.jsonl", "no such file"]),
        (
            {"warmup_candidates": "c.jsonl", "warmup_model": "other"},
            ["--warmup_model other has no effect", "--warmup_candidates"],
        ),
        (
            {"warmup_candidates": "c.jsonl", "discriminator_warmup_updates": 0},
            ["--warmup_candidates c.jsonl has no effect", "leaves the warm-up out"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(command, bench, tmp_path, changed, parts):
    refused(command("train", *words(bench, tmp_path / "run", **changed)), *parts)
    assert not (tmp_path / "run").exists()


def test_bad_candidates_of_the_warm_up(command, bench, tmp_path, experts):
    """The policy cannot be loaded: all of this is found before."""
    file = tmp_path / "c.jsonl"
    given = words(bench, tmp_path / "run", warmup_candidates=file)
    rows = [{"prompt": experts[0]["prompt"], "completion": f"1 + 1\n#### {n}"} for n in (37, 38, 39)]
    write_jsonl(file, [{**row, "prompt": f"{row['prompt']} "} for row in rows])
    refused(command("train", *given), "no candidate has the prompt of a demonstration", bench.experts, file)
    write_jsonl(file, [{**row, "completion": "1 + " * 500} for row in rows])
    refused(command("train", *given), "3 of 3 rows are too long", f"{file}:1")
    write_jsonl(file, rows)
    refused(command("train", *given, "--replay_size", 2), "3 rollouts", "use --replay_size 3")
    assert not (tmp_path / "run").exists()


def test_bad_models(command, bench, tmp_path, tokenizer):
    run = tmp_path / "run"
    missing = bench.folder / "bar"
    refused(command("train", *words(bench, run, model_name_or_path=missing)), missing, f"did you mean {bench.bare}")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(command("train", *words(bench, run, model_name_or_path=empty)), empty, "config.json is missing")
    foreign = tmp_path / "foreign"
    shutil.copytree(bench.bare, foreign)
    words_of = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    other = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*words_of[:-1], "new"])}, unk_token="<unk>"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<eos>").save_pretrained(foreign)
    refused(command("train", *words(bench, run, warmup_model=foreign)), "different tokenizers", bench.bare, foreign)
    taken = tmp_path / "taken"
    taken.write_text("a file")
    refused(command("train", *words(bench, taken)), taken, "not a folder")
    refused(command("train", *words(bench, foreign)), foreign, "is the folder of a model")
    assert not (foreign / "checkpoints").exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no such file", "did you mean"]),
        ("granulrity: step\n", ["unknown option 'granulrity'", "did you mean 'granularity'?"]),
        ("granularity: stpe\n", ["granularity 'stpe'", "did you mean 'step'?"]),
        ("head: tokn\n", ["head 'tokn'", "did you mean 'token'?"]),
        ("task: arithmetics\n", ["did you mean 'arithmetic'?"]),
        ("- granularity\n- step\n", ["must be a mapping"]),
        ("granularity: [step\n", ["not a YAML file"]),
    ],
    ids=["missing", "option", "granularity", "head", "task", "list", "broken"],
)
def test_bad_configuration_files(command, bench, tmp_path, content, parts):
    config = tmp_path / "options.yaml"
    if content is None:
        (tmp_path / "option.yaml").write_text("head: token\n")
    else:
        config.write_text(content)
    given = words(bench, tmp_path / "run", task=None)
    named = [config] if parts[0] in ("no such file", "must be a mapping") or "unknown option" in parts[0] else []
    refused(command("train", "--config", config, *given), *named, *parts)
    refused(command("train", *given, f"--config={config}"), *named, *parts)


def test_two_configuration_files_are_refused(command, bench, tmp_path):
    (tmp_path / "options.yaml").write_text("head: token\n")
    files = ["--config", tmp_path / "options.yaml", f"--config={tmp_path / 'options.yaml'}"]
    refused(command("train", *files, *words(bench, tmp_path / "run")), "--config is given more than once")


def test_command_line_overrides_the_file(command, bench, tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text("granularity: stpe\nhead: token\n")
    given = words(bench, tmp_path / "run", granularity="dense", max_completion_length=2)
    refused(command("train", "--config", config, *given), "rows are too long")  # so both were read


# Reward models


@pytest.mark.parametrize("name", ["score", "rerank"])
def test_invalid_reward_models_are_refused(command, bench, tmp_path, name):
    data = bench.experts
    refused(command(name, bench.folder / "reward_mode", data), "no such model folder", f"did you mean {bench.folder}")
    refused(command(name, bench.model, data), "not a reward model", "tracereward.json is missing")
    for missing in ("head.safetensors", "model.safetensors", "tokenizer.json", "config.json"):
        partial = tmp_path / missing
        shutil.copytree(bench.bare_reward, partial)
        (partial / missing).unlink()
        refused(command(name, partial, data), partial, missing, "missing")
    damaged = tmp_path / "damaged"
    shutil.copytree(bench.bare_reward, damaged)
    (damaged / "tracereward.json").write_text('{"head": ')
    refused(command(name, damaged, data), "tracereward.json is damaged")


@pytest.mark.parametrize("name", ["score", "rerank"])
@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"completion": "#### 3"}, [":2: ", "prompt"]),
        ({"prompt": "1 + 2 = ?\n"}, [":2: ", "completion"]),
        ({"prompt": "1 + 2 = ?\n", "completion": ""}, [":2: ", "not empty"]),
        ({"prompt": "1 + 2 = ?\n", "candidates": []}, [":2: ", "candidates"]),
        ({"prompt": "1 + 2 = ?\n", "candidates": ["#### 3", ""]}, [":2: ", "not empty"]),
        ({"prompt": "1 + 2 = ?\n", "candidates": "#### 3"}, [":2: ", "list of texts"]),
        ({"prompt": "1 + 2 = ?\n", "completion": ["#### 3"]}, [":2: ", "needs a completion"]),
        ({"prompt": "1 + 2 = ?\n", "steps": ["1 + 2 = 3", " "]}, [":2: ", "steps", "not empty"]),
        ({"prompt": "1 + 2 = ?\n", "steps": "1 + 2 = 3"}, [":2: ", "steps must be a list"]),
        ({**GOOD, "prompt": 7}, [":2: ", "'prompt' is int, neither text nor a list"]),
        ({**GOOD, "prompt": [{"role": "user"}]}, [":2: ", "'prompt': a message has no content"]),
        ({**GOOD, "prompt": [{"role": "user", "content": "1 + 2 = ?"}]}, [":2: ", "trained on plain texts"]),
        ({**GOOD, "finished": "false"}, [":2: ", "finished must be true or false"]),
        ({**GOOD, "finished": [True]}, [":2: ", "finished must be true or false"]),
        ({"prompt": "1", "candidates": ["2", "3"], "finished": [True]}, [":2: ", "for each of the 2 candidates"]),
        ({**GOOD, "note": "\ud800"}, [":2: ", "field 'note' has half of a surrogate pair"]),
        ({**GOOD, "a": {"b": [float("nan")]}}, [":2: ", "field 'a' does not fit in JSON", "Out of range"]),
    ],
    ids=["prompt", "completion", "empty", "no candidates", "empty candidate", "text", "list", "empty step", "no steps",
         "number", "message", "messages", "finished", "one finished", "finished of candidates", "surrogate", "nan"],
)  # fmt: skip
def test_invalid_rows_to_score(command, bench, tmp_path, name, row, parts):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [GOOD, row]))
    refused(command(name, bench.bare_reward, data), data, *parts)


def test_values_that_json_cannot_represent(command, bench, tmp_path):
    data = tmp_path / "rows.parquet"
    day = {"day": datetime.date(2024, 1, 2)}
    parquet.write_table(pyarrow.Table.from_pylist([{**GOOD, "day": None}, {**GOOD, **day}]), data)
    refused(command("score", bench.bare_reward, data), f"{data}:2: field 'day' does not fit in JSON", "date")
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps(GOOD) + '\n{"prompt": ' + "[" * 200_000 + "\n")
    refused(command("score", bench.bare_reward, lines), f"{lines}:2: not valid JSON: nested too deep")
    half = tmp_path / "half.jsonl"
    half.write_text(json.dumps({**GOOD, "prompt": "\ud800"}) + "\n")
    refused(command("sample", bench.bare, "--data", half), f"{half}:1: field 'prompt' has half of a surrogate pair")
    nested = tmp_path / "rows.json"
    nested.write_text("[" * 200_000)
    refused(command("score", bench.bare_reward, nested), f"{nested}: not valid JSON")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"correct": "false"}, "correct must be true or false, not 'false'"),
        ({"correct": 2}, "correct must be true or false, not 2"),
        ({"logprob": "-1"}, "logprob must be a finite number, not '-1'"),
        ({"logprob": True}, "logprob must be a finite number, not True"),
        ({"answer": ["3"]}, "answer must be a text or a number, not ['3']"),
    ],
)
def test_fields_of_the_wrong_type(command, bench, tmp_path, fields, message):
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [GOOD, {**GOOD, **fields}])
    refused(command("rerank", bench.bare_reward, data), f"{data}:2: {message}")
    refused(command("inspect", data, "--model", bench.bare_reward), f"{data}:2: {message}")
    refused(command("correct", bench.bare, data, "--reward-model", bench.bare_reward), f"{data}:2: {message}")


def test_invalid_input_of_rerank(command, bench, tmp_path):
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [{**GOOD, "logprob": -1.0}, GOOD])
    refused(command("rerank", bench.bare_reward, data, "--method", "logprob"), f"{data}:2: ", "logprob")
    refused(command("rerank", bench.bare_reward, data, "--method", "votes"), "method 'votes'", "did you mean 'vote'?")
    refused(command("rerank", bench.bare_reward, data, "--method", "softmax_vote"), "method 'softmax_vote'", "vote")
    refused(command("rerank", bench.bare_reward, data, "--aggregate", "men"), "aggregate 'men'", "did you mean 'mean'?")
    refused(command("rerank", bench.bare_reward, data, "--task", "arithmetics"), "did you mean 'arithmetic'?")
    write_jsonl(data, [{"prompt": "1 + 2 = ?\n", "steps": ["1 + 2 = 3", "#### 3"]}])
    refused(command("rerank", bench.bare_reward, data), f"{data}:1: ", "a completion in each row")
    data.write_text("")
    refused(command("rerank", bench.bare_reward, data), data, "no rows")
    refused(command("score", bench.bare_reward, data), data, "no rows")
    refused(command("score", bench.bare_reward, data, "--engine", "rai"), "'rai'", "Known: transformers, vllm, ray")


def test_unwritable_outputs(command, bench, tmp_path):
    """They are refused before a model is loaded, and no file is left behind."""
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [GOOD, {**GOOD, "prompt": "1 + 3 = ?\n"}])
    for given in (
        ["score", bench.bare_reward, data],
        ["rerank", bench.bare_reward, data],
        ["inspect", data, "--model", bench.bare_reward],
        ["correct", bench.bare, data, "--reward-model", bench.bare_reward],
        ["sample", bench.bare, "--task", "arithmetic", "--data", data],
    ):
        refused(command(*given, "-o", tmp_path / "no" / "such.jsonl"), "folder", "does not exist")
        refused(command(*given, "-o", tmp_path), "is a folder; name a file")
        refused(command(*given, "-o", "/proc/out"), "/proc/out: cannot be written")
    refused(command("export", bench.bare_reward, "--data", data, "-o", "/proc/no/out"), "/proc/no/out: ")
    refused(command("export", bench.bare_reward, "--data", data, "-o", "/proc/out"), "/proc/out: cannot be written")
    write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "1"}])
    refused(command("score", bench.bare_reward, tmp_path / "bad.jsonl", "-o", tmp_path / "out"), "needs a completion")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "bad.jsonl"}


def test_invalid_input_of_sample(command, bench, tmp_path):
    given = ["sample", bench.bare, "--task", "arithmetic", "--data"]
    refused(command(*given, tmp_path / "no.jsonl"), "no such file")
    refused(command(*given, bench.experts, "--temperature", 0, "-n", 2), "temperature 0")
    refused(command(*given, bench.experts, "--template", "chat"), "no chat template")
    refused(command(*given, bench.experts, "--resume"), "--output")
    refused(command("sample", bench.bare, "--task", "arithmetic"), "--data")
    refused(command("sample", bench.folder / "bar", *given[2:], bench.experts), f"did you mean {bench.bare}")


@pytest.mark.parametrize("option", ["--temperature", "--top-p"])
@pytest.mark.parametrize("value", [-1, "nan", "inf"])
def test_invalid_sampling_parameters_are_refused(command, bench, option, value):
    data = ["--task", "arithmetic", "--data", bench.experts, option, value]
    refused(command("sample", bench.bare, *data), f"{option} must be ", value)
    refused(command("sample", bench.bare, *data, "--guide", "tilt", "--reward-model", bench.bare_reward), option)
    given = ["--reward-model", bench.bare_reward, option, value]
    refused(command("correct", bench.bare, bench.experts, *given), f"{option} must be ")


def test_top_p_outside_its_range_is_refused(command, bench):
    given = ["sample", bench.bare, "--task", "arithmetic", "--data", bench.experts, "--top-p"]
    for value in (0, 2):
        refused(command(*given, value), "--top-p must be over 0 and at most 1", value)


def test_policy_and_reference_must_be_causal_lms(command, bench, token_reward_model, tmp_path):
    """A token classifier (for example a reward model with a token head) would be loaded with a random LM head."""
    bare = unloadable(token_reward_model, tmp_path / "bare")
    (bare / "tracereward.json").unlink()
    given, kind = ["--task", "arithmetic", "--data", bench.experts], f"{bare}: is a LlamaForTokenClassification"
    refused(command("sample", bare, *given), kind)
    refused(command("evaluate", "policy", bare, *given), kind)
    refused(command("correct", bare, bench.experts, "--reward-model", bench.bare_reward, "--threshold", "0"), kind)
    refused(command("score", bench.bare_reward, bench.experts, "--reference", bare), kind)
    headless = tmp_path / "headless"
    shutil.copytree(bench.bare, headless)
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    refused(command("sample", headless, *given), f"{headless}: is a LlamaModel")
    for kinds in (None, ["LlamaModel", "LlamaForCausalLM"], ["FSDPLlamaForCausalLM"]):
        (headless / "config.json").write_text(json.dumps({**config, "architectures": kinds}))
        check_model(str(headless))


# Usage


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "trian"),
        (["score"], "Missing argument"),
        (["rerank", "model"], "Missing argument"),
        (["score", "model", "data", "--no-such-option"], "--no-such-option"),
        (["sample", "model", "-n", "0"], "-n"),
        (["sample", "model", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["sample", "model", "--batch-size", "0"], "--batch-size"),
        (["sample", "model", "--limit", "0"], "--limit"),
        ([], "Usage"),
    ],
    ids=["command", "arguments", "argument", "option", "range", "length", "batch", "limit", "nothing"],
)
def test_wrong_usage(command, argv, message):
    done = command(*argv)
    assert done.code == 2
    assert message in done.err + (done.out if not argv else "")
    assert "Traceback" not in done.err
    if argv:
        assert done.out == ""


def test_help_and_version(command):
    shown = command("--help")
    assert shown.code == 0
    for name in ("sft", "train", "grpo", "sample", "score", "rerank", "inspect", "calibrate", "evaluate", "quickstart"):
        assert name in shown.out
    for suite in ("pool", "processbench", "prmbench", "mrben", "perturbation", "policy"):
        assert suite in command("evaluate", "--help").out
        assert "--output" in command("evaluate", suite, "--help").out
    assert command("--version").out == f"{__version__}\n"
    for kind, own in (("train", "--granularity"), ("grpo", "--reward"), ("sft", "--validation_fraction")):
        shown = command(kind, "--help")
        assert shown.code == 0
        assert own in shown.out
        assert "--resume" in shown.out
        assert shown.err == ""
    for name in ("sample", "score", "rerank", "quickstart"):
        shown = command(name, "--help")
        assert shown.code == 0
        assert "Usage" in shown.out


def test_help_needs_no_torch():
    program = """
import sys
from tracereward.cli import main
sys.argv = ["tracereward", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
print(sorted({"torch", "transformers", "trl", "datasets"} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "rerank" in done.stdout
    assert done.stderr == "[]\n"


# Samples, scores, choices


@pytest.fixture(scope="module")
def samples(bench):
    """Five questions with four samples each, as `sample` writes them to stdout."""
    done = launcher()(
        "sample", bench.model, "--task", "arithmetic", "--data", bench.experts, "-n", 4, "--limit", 5,
        "--max-new-tokens", 12,
    )  # fmt: skip
    assert done.code == 0, done.err
    found = [json.loads(line) for line in done.out.splitlines()]
    # An untrained model is never correct: give each question one expert trace.
    experts = rows(bench.experts)
    for row in found[::4]:
        row["completion"], row["correct"] = experts[row["question"]]["completion"], True
        row["finished"] = True
    path = bench.folder / "samples.jsonl"
    write_jsonl(path, found)
    return path


@pytest.fixture(scope="module")
def scored(bench, samples):
    """What `score` writes for them to stdout."""
    done = launcher()("score", bench.reward_model, samples)
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_sample_writes_rows_in_order(bench, samples, experts):
    found = rows(samples)
    assert [row["question"] for row in found] == [n for n in range(5) for _ in range(4)]
    assert [row["prompt"] for row in found] == [experts[row["question"]]["prompt"] for row in found]
    assert all(row["logprob"] < 0 and 1 <= row["length"] <= 12 for row in found)
    assert all(row["finished"] or row["length"] == 12 for row in found)


def test_score_writes_the_scores_of_the_model(bench, samples, scored):
    given = rows(samples)
    kept = given[0].keys()
    assert [{name: row[name] for name in kept} for row in scored] == [{n: row[n] for n in kept} for row in given]
    model = TokenRewardModel.from_pretrained(str(bench.reward_model))
    expected = model.score(*([row[name] for row in given] for name in ("prompt", "completion", "finished")))
    for row, scores in zip(scored, expected, strict=True):
        assert row["token_rewards"] == scores.rewards
        assert row["tokens"] == scores.tokens
        assert [tuple(pair) for pair in row["offsets"]] == scores.offsets
        assert row["step_rewards"] == scores.step_rewards()
        assert row["reward"] == pytest.approx(sum(scores.rewards) / len(scores.rewards))
    assert len({row["reward"] for row in scored}) > 5


def test_score_with_reference(bench, samples, scored):
    """With the sampling policy as reference, its log-prob is added to the rewards."""
    done = launcher()("score", bench.reward_model, samples, "--reference", bench.model)
    assert done.code == 0, done.err
    model = TokenRewardModel.from_pretrained(str(bench.reward_model))
    reference = AutoModelForCausalLM.from_pretrained(bench.model).eval()
    given = rows(samples)
    texts = ([row[name] for row in given] for name in ("prompt", "completion", "finished"))
    expected = model.score(*texts, reference=reference)
    found = [json.loads(line)["token_rewards"] for line in done.out.splitlines()]
    assert found != [row["token_rewards"] for row in scored]
    assert found == [scores.rewards for scores in expected]


def test_score_with_policy_subtracts_its_log_prob(command, bench, samples, tmp_path):
    """With reference and policy equal the two cancel; --policy is refused for heads other than airl and implicit."""
    for name in ("score", "inspect"):
        words = {"score": [bench.bare_reward, samples], "inspect": [samples, "--model", bench.bare_reward]}[name]
        refused(command(name, *words, "--policy", bench.model), "--policy is for the heads airl and implicit", "action")
    folder = tmp_path / "airl"
    settings = RewardSettings(head="airl", task="arithmetic", beta_clip=100.0)
    tokenizer = TokenRewardModel.from_pretrained(str(bench.reward_model)).tokenizer
    TokenRewardModel.from_backbone(str(bench.model), settings, tokenizer).save_pretrained(folder)
    given = ["score", folder, samples]
    alone, subtracted, both = (
        [json.loads(line)["token_rewards"] for line in command(*given, *models).out.splitlines()]
        for models in ([], ["--policy", bench.model], ["--reference", bench.model, "--policy", bench.model])
    )
    model = AutoModelForCausalLM.from_pretrained(bench.model)
    for without, with_policy, again, row in zip(alone, subtracted, both, rows(samples), strict=True):
        assert again == pytest.approx(without, abs=1e-4)
        prompt, trace = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        trace += [tokenizer.eos_token_id] * row["finished"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + trace])).logits[0].double()
        log_probs = logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(trace) - 1), trace]
        assert with_policy == pytest.approx((torch.tensor(without) - log_probs).tolist(), abs=1e-4)


def test_candidates_score_as_single_traces(bench, samples):
    given = rows(samples)
    grouped = [
        {"prompt": given[n]["prompt"], "candidates": [row["completion"] for row in given[n : n + 4]]}
        for n in range(0, len(given), 4)
    ]
    write_jsonl(bench.folder / "grouped.jsonl", grouped)
    single = [{"prompt": row["prompt"], "completion": row["completion"]} for row in given]
    write_jsonl(bench.folder / "single.jsonl", single)
    output = bench.folder / "scored.jsonl"
    done = launcher()("score", bench.reward_model, bench.folder / "grouped.jsonl", "-o", output)
    assert (done.code, done.out) == (0, ""), done.err
    together = [scores for row in rows(output) for scores in row["scores"]]
    alone = launcher()("score", bench.reward_model, bench.folder / "single.jsonl").out.splitlines()
    assert [row["candidates"] for row in rows(output)] == [row["candidates"] for row in grouped]
    for scores, line in zip(together, alone, strict=True):
        assert scores == {name: json.loads(line)[name] for name in scores}
    assert set(together[0]) == {
        "reward", "aggregates", "step_rewards", "tokens", "offsets", "token_rewards", "supervised", "step_ends",
    }  # fmt: skip


def test_empty_finished_trace_is_scored(bench, tmp_path, tokenizer):
    """A policy may end immediately, which `finished` records; without it an empty completion is refused."""
    row = {"prompt": "1 + 2 = ?\n", "completion": ""}
    write_jsonl(tmp_path / "ended.jsonl", [{**row, "finished": True}])
    done = launcher()("score", bench.reward_model, tmp_path / "ended.jsonl")
    assert done.code == 0, done.err
    (scored,) = [json.loads(line) for line in done.out.splitlines()]
    assert scored["tokens"] == [tokenizer.eos_token]
    assert scored["offsets"] == [[0, 0]]
    write_jsonl(tmp_path / "empty.jsonl", [row])
    assert launcher()("score", bench.reward_model, tmp_path / "empty.jsonl").code == 2


def test_run_folder_is_locked_by_one_process(command, bench, tmp_path):
    output = tmp_path / "run"
    (output / "checkpoints").mkdir(parents=True)
    with FileLock(output / "checkpoints" / ".lock"):
        refused(command("train", *words(bench, output)), "another process is running in", "--output_dir")
    assert not (output / "config.yaml").exists()


@pytest.mark.parametrize("method", ["reward", "vote", "sigmoid_vote", "logprob", "shortest", "majority", "random"])
def test_rerank_chooses_one_candidate_per_question(bench, samples, scored, method):
    output = bench.folder / f"{method}.jsonl"
    done = launcher()("rerank", bench.reward_model, samples, "--method", method, "--json", "-o", output)
    assert done.code == 0, done.err
    chosen = rows(output)
    assert [row["question"] for row in chosen] == [0, 1, 2, 3, 4]
    assert all(row["of"] == 4 and row["method"] == method for row in chosen)
    best = {
        "reward": lambda row: row["reward"],
        "logprob": lambda row: row["logprob"],
        "shortest": lambda row: -len(row["completion"]),
    }
    for row in chosen:
        group = [other for other in scored if other["question"] == row["question"]]
        assert row["completion"] in [other["completion"] for other in group]
        if method in best:
            assert row["completion"] == max(group, key=best[method])["completion"]
    right = sum(get_task("arithmetic").verify(row["completion"], row["answer"]) for row in chosen)
    (line,) = done.out.splitlines()
    accuracies = json.loads(line)["accuracy"]
    assert json.loads(line)["questions"] == len({row["question"] for row in scored})
    label = METHODS[method].format(n=4)
    assert accuracies[label][0] == right / 5
    assert json.loads(line)["chosen"] == label
    assert accuracies["oracle@4"][0] == 1.0


def test_rerank_prints_the_rows_or_the_table(bench, samples, tmp_path):
    words = ["rerank", bench.reward_model, samples, "--method", "vote"]
    both = launcher()(*words, "--json", "-o", tmp_path / "vote.jsonl")
    chosen, table = launcher()(*words), launcher()(*words, "--json")
    assert [both.code, chosen.code, table.code] == [0, 0, 0], both.err + chosen.err + table.err
    assert chosen.out == (tmp_path / "vote.jsonl").read_text()
    assert "oracle@4" in chosen.err
    assert table.out == both.out


def test_rerank_writes_the_verdict_of_the_chosen_rows(bench, samples, tmp_path):
    output = tmp_path / "chosen.jsonl"
    command = ["rerank", bench.reward_model, samples, "--method", "reward", "-o", output]
    done = launcher()(*command)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "chosen.verdict.json").read_text())
    right = [get_task("arithmetic").verify(row["completion"], row["answer"]) for row in rows(output)]
    first = [get_task("arithmetic").verify(row["completion"], row["answer"]) for row in rows(samples)[::4]]
    assert all(first), "the only right candidate of each question"
    majority = next(one for one in found["comparisons"] if one["baseline"] == "majority")
    other = launcher()("rerank", bench.reward_model, samples, "--method", "majority", "-o", tmp_path / "other.jsonl")
    assert other.code == 0, other.err
    by_majority = [
        get_task("arithmetic").verify(row["completion"], row["answer"]) for row in rows(tmp_path / "other.jsonl")
    ]
    assert majority["difference"] == (sum(right) - sum(by_majority)) / 5
    assert f"Verdict: {found['line']}" in done.err
    assert launcher()(*command).code == 2, "neither file is replaced"


def test_closed_pipe_is_not_an_error(bench, experts):
    """Of an endless stdin, as `yes` writes it: the command ends as soon as nobody reads its rows."""
    row = json.dumps({"prompt": experts[0]["prompt"], "completion": experts[0]["completion"]})
    command = [sys.executable, "-m", "tracereward", "score", str(bench.reward_model), "-"]
    with (
        subprocess.Popen(["yes", row], stdout=subprocess.PIPE) as endless,
        subprocess.Popen(
            command, stdin=endless.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        endless.stdout.close()
        first = process.stdout.readline()
        process.stdout.close()
        notes = process.stderr.read()
    assert json.loads(first)["prompt"] == experts[0]["prompt"]
    assert (process.returncode, endless.returncode) == (0, -signal.SIGPIPE)
    assert "Traceback" not in notes
    assert "BrokenPipe" not in notes


def test_score_with_a_token_head(token_reward_model, samples):
    done = launcher()("score", token_reward_model, samples)
    assert done.code == 0, done.err
    for line in done.out.splitlines():
        row = json.loads(line)
        assert row["reward"] == min(row["token_rewards"])


# Long scoring: interrupted, and with bad rows


@pytest.fixture(scope="module")
def many(bench, tokenizer):
    """Sixty rows: candidates, completions and steps mixed, some with shared prompts."""
    found = []
    for n, row in enumerate(rows(bench.experts) * 5):
        lines = row["completion"].split("\n")
        forms = [{"completion": row["completion"]}, {"steps": lines}, {"candidates": [*lines, row["completion"]][:3]}]
        found.append({"n": n, "prompt": row["prompt"], **forms[n % 3]})
    write_jsonl(bench.folder / "sixty.jsonl", found)
    return bench.folder / "sixty.jsonl"


@pytest.mark.parametrize("share", [0.1, 0.45, 0.9])
def test_killed_scoring_resumes_to_the_same_file(bench, many, tmp_path, share):
    """Killed within a line; the resumed output equals an uninterrupted one byte for byte."""
    full = tmp_path / "full.jsonl"
    assert launcher()("score", bench.reward_model, many, "-o", full).code == 0
    output = tmp_path / "scored.jsonl"
    size = int(share * full.stat().st_size)
    killed = launcher()("score", bench.reward_model, many, "-o", output, trap=trap("size", "", size))
    assert killed.code == -signal.SIGXFSZ
    part = tmp_path / "scored.jsonl.part"
    assert not output.exists()
    assert 0 < part.stat().st_size <= size
    assert not part.read_bytes().endswith(b"\n")
    finished = part.read_bytes().count(b"\n")
    done = launcher()("score", bench.reward_model, many, "-o", output, "--resume")
    assert done.code == 0, done.err
    assert f"resuming after {finished} rows" in done.err
    assert output.read_bytes() == full.read_bytes()
    assert not part.exists()
    again = launcher()("score", bench.reward_model, many, "-o", output, "--resume")
    assert (again.code, again.err) == (0, f"{output} is finished\n")


def test_scoring_resumes_from_every_row(command, bench, many, tmp_path, monkeypatch):
    """Chunks of seven with skipped rows: at the end of a chunk, inside one, and before the first row.

    A chunk is always scored completely: other batches would change the last digits of a reward.
    """
    monkeypatch.setattr(score, "CHUNK", 7)
    compute, scored = TokenRewardModel.compute_rewards, []

    def spy(model, prompts, completions, options):
        scored.append([tuple(ids) for ids in completions])
        return compute(model, prompts, completions, options)

    monkeypatch.setattr(TokenRewardModel, "compute_rewards", spy)
    given = rows(many)[:30]
    for n in (3, 4, 11, 20):
        given[n] = {"n": n, "prompt": "1 + 1 = ?\n", "completion": "\n" * 200}  # longer than 128 positions
    given.insert(9, {"n": -1, "prompt": "1 + 1 = ?\n"})
    write_jsonl(tmp_path / "rows.jsonl", given)
    words = ["score", bench.reward_model, tmp_path / "rows.jsonl", "--skip-bad", "-o"]
    killed = launcher()(*words, tmp_path / "full.jsonl", trap=trap("rename", "full.jsonl"))
    assert killed.code == -signal.SIGKILL
    made_of = (tmp_path / "full.jsonl.part.json").read_bytes()
    assert command(*words, tmp_path / "full.jsonl", "--overwrite").code == 0
    full = (tmp_path / "full.jsonl").read_bytes()
    lines = full.splitlines(keepends=True)
    assert len(lines) == 26
    chunks = list(scored)
    assert len(chunks) == 5
    assert not (tmp_path / "full.jsonl.part.json").exists()
    for finished in (0, 1, 5, 6, 12, 13, 25, 26):
        output = tmp_path / f"{finished}.jsonl"
        tail = b"" if finished == 26 else lines[finished][:20]
        output.with_name(output.name + ".part").write_bytes(b"".join(lines[:finished]) + tail)
        output.with_name(output.name + ".part.json").write_bytes(made_of)
        scored.clear()
        assert command(*words, output, "--resume").code == 0
        assert output.read_bytes() == full, finished
        assert scored == chunks[len(chunks) - len(scored) :], finished
        assert len(scored) == {0: 5, 1: 5, 5: 4, 6: 4, 12: 3, 13: 3, 25: 1, 26: 0}[finished]


@pytest.fixture
def cut_off(bench, tmp_path):
    """`cut_off(name, word, ...)` kills a command before its output is renamed; returns the words that resume it."""

    def kill(*argv: object) -> list[object]:
        words = [*argv, "-o", tmp_path / "out.jsonl"]
        assert launcher()(*words, trap=trap("rename", "out.jsonl")).code == -signal.SIGKILL
        return [*words, "--resume"]

    return kill


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        (["--temperature", 0.5], ["--temperature (1.0, now 0.5)"]),
        (["-n", 1], ["-n (2, now 1)"]),
        (["--seed", 1], ["--seed (0, now 1)"]),
        (["--max-new-tokens", 5, "--limit", 3], ["--max-new-tokens (4, now 5)", "--limit (none, now 3)"]),
        (["--batch-size", 2], ["--batch-size (64, now 2)"]),
        (["--top-p", 0.9], ["--top-p (1.0, now 0.9)"]),
        (["--template", "chat"], ["--template (plain, now chat)"]),
    ],
    ids=lambda value: value[0],
)
def test_resuming_samples_with_other_options_is_refused(command, bench, cut_off, tmp_path, changed, parts):
    words = ["sample", bench.model, "--task", "arithmetic", "--data", bench.experts, "-n", 2, "--max-new-tokens", 4]
    given = cut_off(*words)
    before = (tmp_path / "out.jsonl.part").read_bytes()
    refused(
        command(*given, *changed),
        tmp_path / "out.jsonl.part",
        *parts,
        "Give the same arguments, or start anew with --overwrite",
    )
    assert (tmp_path / "out.jsonl.part").read_bytes() == before
    assert not (tmp_path / "out.jsonl").exists()


def test_resuming_samples_with_other_models_or_data_is_refused(command, bench, cut_off, tmp_path):
    """Compared by content: a copy is equal; a model or file changed under the same name is not."""
    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(bench.model, model)
    shutil.copy(bench.experts, data)
    words = ["--task", "arithmetic", "-n", 1, "--max-new-tokens", 4]
    given = cut_off("sample", model, *words, "--data", data)
    other = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1
    other.save_pretrained(model)
    refused(command(*given), f"model ({model}: the same name, other content)")
    write_jsonl(data, rows(data)[1:])
    with_data = ["sample", bench.model, *words, "--data", data, "-o", tmp_path / "out.jsonl", "--resume"]
    refused(command(*with_data), f"data ({data}: the same name, other content)")
    with_data[with_data.index(data)] = bench.experts
    done = command(*with_data)
    assert (done.code, len(rows(tmp_path / "out.jsonl"))) == (0, 12), done.err


def test_resuming_scores_of_another_run_is_refused(command, bench, cut_off, tmp_path):
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [GOOD] * 3)
    given = cut_off("score", bench.reward_model, data)
    refused(command(*given, "--reference", bench.model), f"--reference (none, now {bench.model})")
    refused(command("score", bench.bare_reward, *given[2:]), f"model ({bench.reward_model}, now {bench.bare_reward})")
    part = tmp_path / "out.jsonl.part"
    written = part.read_bytes()
    for line in (b"garbage\n", b'{"a": 1}\n', b"[" * 200_000 + b"\n", b"\xff\n"):
        part.write_bytes(written.splitlines(keepends=True)[0] + line)
        refused(command(*given), f"{part}:2: not a row that this command wrote", "start anew")
    part.write_bytes(written)
    made_of = part.with_name(part.name + ".json")
    text = made_of.read_text()
    for damaged in ("", "{}", "[]", '{"model": 1}', "null"):
        made_of.write_text(damaged)
        refused(command(*given), part, "start anew")
    made_of.unlink()
    refused(command(*given), part, "out.jsonl.part.json is missing or damaged", "start anew")
    made_of.write_text(text)
    write_jsonl(data, [GOOD] * 4)
    refused(command(*given), "other content")
    write_jsonl(data, [GOOD] * 3)
    assert command(*given, "--skip-bad").code == 0  # keeps the existing rows
    assert len(rows(tmp_path / "out.jsonl")) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "rows.jsonl"}


def test_resuming_without_written_rows_starts_anew(command, bench, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    words = ["score", bench.reward_model, tmp_path / "rows.jsonl"]
    refused(command(*words, "--resume"), "--resume needs --output")
    assert command(*words, "-o", tmp_path / "out.jsonl", "--resume").code == 0
    (row,) = rows(tmp_path / "out.jsonl")
    assert row["completion"] == GOOD["completion"]


def test_skip_bad_reports_bad_rows_and_scores_the_others(command, bench, tmp_path):
    """Each is reported with its line. Without --skip-bad the first stops the command before the model is loaded."""
    bad = [
        ({"completion": "#### 3"}, "no prompt"),
        ({"prompt": "1 + 2 = ?\n"}, "needs a completion"),
        ({"prompt": "1 + 2 = ?\n", "steps": []}, "steps must be a list"),
        ({"prompt": "1 + 2 = ?\n", "completion": "\n" * 200}, "the reward model reads 128"),
        ({"prompt": [{"role": "user", "content": "1 + 2 = ?"}], "completion": "#### 3"}, "trained on plain texts"),
    ]
    given = []
    for n, (row, _) in enumerate(bad):
        given += [{"n": n, "prompt": f"{n} + 2 = ?\n", "completion": f"#### {n + 2}"}, row]
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, given)
    refused(command("score", bench.bare_reward, data), f"{data}:2: no prompt")
    done = command("score", bench.reward_model, data, "--skip-bad")
    assert done.code == 0, done.err
    assert [json.loads(line)["n"] for line in done.out.splitlines()] == list(range(5))
    skipped = [line for line in done.err.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == len(bad)
    for n, (_, message) in enumerate(bad):
        (line,) = [line for line in skipped if line.startswith(f"skipped: {data}:{2 * n + 2}: ")]
        assert message in line
    data.write_text(data.read_text() + '{"prompt": \n["a list"]\n')
    broken = command("score", bench.reward_model, data, "--skip-bad")
    assert broken.out == done.out
    assert f"skipped: {data}:11: not valid JSON" in broken.err
    assert f"skipped: {data}:12: a JSON array, not an object" in broken.err
    write_jsonl(data, [row for row, _ in bad[:2]])
    refused(
        command("score", bench.bare_reward, data, "--skip-bad"), "no rows that can be scored", f"{data}:1: no prompt"
    )


def test_finished_may_be_null_or_a_list_for_candidates(command, bench, tmp_path):
    """A truncated trace has no end-of-sequence token; a trace without the field has one."""
    rows_ = [{**GOOD, "finished": None}, GOOD, {**GOOD, "finished": False}, {"prompt": GOOD["prompt"],
             "candidates": [GOOD["completion"]] * 3, "finished": [True, False, None]}]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows_[:3]), tmp_path / "rows.parquet")
    write_jsonl(tmp_path / "rows.jsonl", rows_)
    flat = [
        json.loads(line) for line in command("score", bench.reward_model, tmp_path / "rows.parquet").out.splitlines()
    ]
    lines = [
        json.loads(line) for line in command("score", bench.reward_model, tmp_path / "rows.jsonl").out.splitlines()
    ]
    length = len(flat[1]["tokens"])
    assert [len(row["tokens"]) for row in flat] == [length, length, length - 1]
    assert [len(row["tokens"]) for row in lines[:3]] == [length, length, length - 1]
    assert [len(scores["tokens"]) for scores in lines[3]["scores"]] == [length, length - 1, length]


def test_non_finite_reward_stops_scoring(command, bench, tmp_path):
    model = TokenRewardModel.from_pretrained(str(bench.reward_model))
    with torch.no_grad():
        model.head.b.fill_(torch.nan)
    model.save_pretrained(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [GOOD])
    for name in ("score", "rerank"):
        done = command(name, tmp_path / "model", data)
        assert (done.code, done.out) == (1, "")
        assert f"{data}:1: the model gives a reward that is not finite" in done.err


def test_calibrated_probability_needs_the_plain_reward(command, bench, tmp_path):
    """The calibration was fitted without the log-probs of --reference and --policy."""
    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(bench.reward_model, model)
    write_fitted(model, calibration=Calibration("platt", slope=2.0, intercept=0.5, traces=12))
    write_jsonl(data, [GOOD])
    alone = command("score", model, data)
    (row,) = [json.loads(line) for line in alone.out.splitlines()]
    assert row["probability"] == pytest.approx(1 / (1 + math.exp(-2 * row["reward"] - 0.5)))
    assert "no probability" not in alone.err
    with_reference = command("score", model, data, "--reference", bench.model)
    (row,) = [json.loads(line) for line in with_reference.out.splitlines()]
    assert "probability" not in row
    assert with_reference.err.count("no probability: it was fitted for rewards without --reference") == 1


def test_steps_that_the_tokenizer_cannot_round_trip(command, bench, tmp_path):
    """An unknown character decodes to nothing, which shifts all later offsets by one."""
    data = tmp_path / "rows.jsonl"
    good = {"prompt": "1 + 2 = ?\n", "steps": ["1 + 2 = 3", "#### 3"]}
    write_jsonl(data, [good, {"prompt": "1 + 2 = ?\n", "steps": ["1 + 2 = 3", "é3 = 3", "#### 3"]}])
    refused(command("score", bench.reward_model, data, "-o", tmp_path / "out"), f"{data}:2: step 2: ", "'é3 = 3")
    done = command("score", bench.reward_model, data, "--skip-bad")
    assert len(done.out.splitlines()) == 1
    assert f"skipped: {data}:2: step 2: " in done.err
    with pytest.raises(InputError, match="trace 0: step 1: "):
        TokenRewardModel.from_pretrained(str(bench.reward_model)).score_steps(["1"], [["é"]])


def test_inspect_shows_scored_steps(command, bench, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "1 + 2 = ?\n", "steps": ["1 + 2 = 3", "#### 3"], "answer": 3}])
    assert command("score", bench.reward_model, tmp_path / "rows.jsonl", "-o", tmp_path / "scored.jsonl").code == 0
    (row,) = rows(tmp_path / "scored.jsonl")
    assert row["completion"] == "1 + 2 = 3\n#### 3"
    shown = command("inspect", tmp_path / "scored.jsonl", "--task", "arithmetic", "--colour", "never")
    assert shown.code == 0, shown.err
    assert "✓ right" in shown.out
    fresh = command("inspect", tmp_path / "rows.jsonl", "--model", bench.reward_model, "--colour", "never")
    assert fresh.out == shown.out


def test_inspect_checks_the_answers_of_candidates(command, bench, tmp_path):
    row = {"prompt": "1 + 2 = ?\n", "candidates": ["#### 3", "#### 4"], "answer": 3}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    assert command("score", bench.reward_model, tmp_path / "rows.jsonl", "-o", tmp_path / "scored.jsonl").code == 0
    shown = command("inspect", tmp_path / "scored.jsonl", "--task", "arithmetic", "--colour", "never")
    assert [line for line in shown.out.splitlines() if line.startswith("#1") or line.startswith("#2")] == [
        next(line for line in shown.out.splitlines() if "#1 of 2  ✓ right  answer 3" in line),
        next(line for line in shown.out.splitlines() if "#2 of 2  ✗ wrong  answer 4" in line),
    ]


@pytest.mark.parametrize(
    ("answer", "right", "wrong", "task"),
    [(3, "#### 3", "#### 4", "arithmetic"), (2.5, "#### 5/2", "#### 2", "arithmetic"),
     (True, "The answer is yes.", "The answer is no.", "strategyqa"),
     (False, "The answer is no.", "The answer is yes.", "strategyqa")],
)  # fmt: skip
def test_gold_answers_need_not_be_text(command, bench, tmp_path, answer, right, wrong, task):
    given = [{"prompt": "1?\n", "completion": text, "answer": answer} for text in (right, wrong)]
    write_jsonl(tmp_path / "rows.jsonl", given)
    done = command("rerank", bench.reward_model, tmp_path / "rows.jsonl", "--task", task, "--json")
    assert done.code == 0, done.err
    accuracy = json.loads(done.out)["accuracy"]
    assert (accuracy[METHODS["mean"]][0], accuracy["oracle@2"][0]) == (0.5, 1.0)


def test_rows_of_a_question_need_not_be_adjacent(command, bench, samples, tmp_path):
    given = rows(samples)
    write_jsonl(tmp_path / "mixed.jsonl", [row for n in range(4) for row in given[n::4]])
    words = ["--json"]
    apart = command("rerank", bench.reward_model, tmp_path / "mixed.jsonl", *words)
    together = command("rerank", bench.reward_model, samples, *words)
    assert json.loads(apart.out)["questions"] == 5
    assert json.loads(apart.out)["accuracy"]["oracle@4"] == json.loads(together.out)["accuracy"]["oracle@4"]


def test_steps_are_scored_as_the_joined_trace(bench, experts, tmp_path):
    """One reward per step, equal to the scores of the joined text."""
    given = [{"prompt": row["prompt"], "steps": row["completion"].split("\n")} for row in experts]
    for row in given[1::2]:  # a step of two lines contains the delimiter
        row["steps"] = ["\n".join(row["steps"][:2]), *row["steps"][2:]]
    write_jsonl(tmp_path / "steps.jsonl", given)
    done = launcher()("score", bench.reward_model, tmp_path / "steps.jsonl")
    assert done.code == 0, done.err
    model = TokenRewardModel.from_pretrained(str(bench.reward_model))
    expected = model.score([row["prompt"] for row in experts], [row["completion"] for row in experts])
    for line, row, scores in zip(done.out.splitlines(), given, expected, strict=True):
        scored = json.loads(line)
        assert scored["steps"] == row["steps"]
        assert scored["token_rewards"] == pytest.approx(scores.rewards, abs=1e-5)
        means, place = [], 0
        for step in row["steps"]:  # without the delimiter after it and the end of sequence
            own = [r for r, (a, b) in zip(scores.rewards, scores.offsets) if place <= a < b <= place + len(step)]
            means.append(sum(own) / len(own))
            place += len(step) + 1
        assert scored["step_rewards"] == pytest.approx(means, abs=1e-5)
        line_ends = [t for t, end in enumerate(scores.step_ends) if end]
        kept = {line_ends[count - 1] for count in accumulate(step.count("\n") + 1 for step in row["steps"])}
        assert scored["step_ends"] == [t in kept for t in range(len(scores.step_ends))]
        found = scored["token_rewards"]
        weights = [0.99**t for t in range(len(found))]
        assert scored["aggregates"] == {
            "mean": pytest.approx(sum(found) / len(found)),
            "min": min(found),
            "last": found[-1],
            "discounted": pytest.approx(sum(w * r for w, r in zip(weights, found)) / sum(weights)),
        }


def test_rerank_by_another_aggregate(bench, samples):
    scored = [json.loads(line) for line in launcher()("score", bench.reward_model, samples).out.splitlines()]
    chosen = {}
    for how in ("mean", "min", "last", "discounted"):
        words = ["rerank", bench.reward_model, samples, "--method", "reward", "--aggregate", how]
        done = launcher()(*words)
        assert done.code == 0, done.err
        chosen[how] = [json.loads(line) for line in done.out.splitlines()]
        for row in chosen[how]:
            group = [other for other in scored if other["question"] == row["question"]]
            best = max(other["aggregates"][how] for other in group)
            assert row["reward"] == pytest.approx(best, abs=1e-5)
            assert row["completion"] in [o["completion"] for o in group if abs(o["aggregates"][how] - best) < 1e-5]
    assert len({json.dumps([row["completion"] for row in rows_]) for rows_ in chosen.values()}) > 1


# Looking at traces, and the suites


def test_inspect_scores_rows_without_scores(bench, samples, tmp_path):
    scored = tmp_path / "scored.jsonl"
    assert launcher()("score", bench.reward_model, samples, "-o", scored).code == 0
    shown = launcher()("inspect", scored, "--task", "arithmetic", "--colour", "never", "--width", 80)
    assert shown.code == 0, shown.err
    fresh = launcher()("inspect", samples, "--model", bench.reward_model, "--colour", "never", "--width", 80)
    assert fresh.out == shown.out
    first = rows(samples)[0]
    assert first["completion"].split("\n")[0] in shown.out
    done = launcher()("inspect", samples, "--model", bench.reward_model, "-o", tmp_path / "page.html", "--limit", 3)
    assert done.code == 0, done.err
    assert "3 rows" in done.err
    assert "<html" in (tmp_path / "page.html").read_text()
    bare = launcher()("inspect", samples)
    assert bare.code == 2
    assert f"{samples}:1: no scores; pass --model" in bare.err
    idle = launcher()("inspect", scored, "--model", bench.reward_model)
    assert idle.code == 2
    assert "--model" in idle.err
    assert "no effect" in idle.err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_rewards": ["1", "2", "3"]}, "token_rewards must be a list of numbers"),
        ({"token_rewards": 1.0}, "token_rewards must be a list of numbers"),
        ({"token_rewards": [1.0]}, "3 tokens but 1 token_rewards"),
        ({"step_rewards": ["a"]}, "step_rewards must be a list of numbers"),
        ({"reward": "high"}, "reward must be a number"),
        ({"logprob": "-1"}, "logprob must be a number"),
        ({"correct": "false"}, "correct must be true or false"),
        ({"offsets": [[0, 1], [1, 2], [2]]}, "offsets must be a list of pairs of whole numbers"),
        ({"offsets": [[0, 1], [1, 2], ["2", 3]]}, "offsets must be a list of pairs of whole numbers"),
        ({"offsets": [[0, 1], [1, 2], [2, 9]]}, "its offsets do not fit its completion of 3 characters"),
        ({"supervised": "yes"}, "supervised must be a list of true and false"),
        ({"step_ends": [0, 0, 1]}, "step_ends must be a list of true and false"),
        ({"prompt": 7}, "prompt must be a text or a list of messages"),
        ({"prompt": [{"role": "user"}]}, "prompt must be a text or a list of messages"),
        ({"completion": 7}, "completion must be a text"),
        ({"tokens": [1, 2, 3]}, "tokens must be a list of texts"),
        ({"completion": None}, "no completion"),
        ({"candidates": ["abc"], "scores": 7}, "scores must be a list"),
        ({"candidates": ["abc", "d"], "scores": [{}]}, "scores must be a list"),
        ({"candidates": ["abc"], "scores": [{}]}, "no tokens"),
    ],
)
def test_invalid_scores_of_inspect(command, tmp_path, fields, message):
    data, spans = tmp_path / "rows.jsonl", [[0, 1], [1, 2], [2, 3]]
    good = {"prompt": "q", "completion": "abc", "tokens": [*"abc"], "offsets": spans, "token_rewards": [1.0, 2.0, 3.0]}
    write_jsonl(data, [good, {**good, **fields}])
    refused(command("inspect", data), f"{data}:2: {message}")
    refused(command("inspect", data, "--task", "arithmetic", "-o", tmp_path / "page.html"), f"{data}:2: {message}")
    assert command("inspect", data, "--limit", 1).code == 0
    refused(command("inspect", data, "--limit", 1, "--threshold", "nan"), "--threshold must be a finite number")


def step_rows(suite, experts) -> list[dict]:
    """Expert traces in a suite's format; every other one has a wrong step."""
    found = []
    for n, row in enumerate(experts):
        steps, wrong = row["completion"].split("\n"), n % 2 == 0
        right, at = list(steps), n % len(steps)
        steps[at] = steps[at] + "9" if wrong else steps[at]
        if suite == "processbench":
            found.append({"id": n, "generator": "g", "problem": row["prompt"].strip(), "steps": steps,
                          "final_answer_correct": not wrong, "label": at if wrong else -1})  # fmt: skip
        elif suite == "prmbench":
            found.append({"original_question": row["prompt"], "modified_question": row["prompt"],
                          "original_process": right, "modified_process": steps, "classification": "kind",
                          "error_steps": [at + 1] if wrong else []})  # fmt: skip
        else:
            found.append({"Question": row["prompt"], "Options": "", "Sampled_Model": "m",
                          "Model_Solution_Steps": [f"Step {k}: {step}" for k, step in enumerate(steps, 1)],
                          "Model_Solution_Correctness": "incorrect" if wrong else "correct",
                          "Model_Solution_First_Error_Step": at + 1 if wrong else "N/A"})  # fmt: skip
    return found


@pytest.mark.parametrize("suite", ["processbench", "prmbench", "mrben"])
def test_step_suite_writes_json_and_report(bench, experts, tmp_path, suite):
    write_jsonl(tmp_path / "rows.jsonl", step_rows(suite, experts))
    words = ["evaluate", suite, bench.reward_model, tmp_path / "rows.jsonl", "-o", tmp_path / "out"]
    done = launcher()(*words, "--policy", bench.model, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert json.loads((tmp_path / "out" / f"{suite}.json").read_text()) == result
    assert f"Evaluation: {suite}" in (tmp_path / "out" / f"{suite}.html").read_text()
    over = launcher()(*words)
    assert over.code == 2
    assert "--overwrite" in over.err
    printed = launcher()(*words, "--overwrite")
    assert printed.code == 0, printed.err
    assert "reward" in printed.out


def test_perturbation_suite_writes_json_and_report(bench, tmp_path):
    words = ["evaluate", "perturbation", bench.reward_model, bench.experts, "-o", tmp_path / "out", "--json"]
    done = launcher()(*words)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert json.loads((tmp_path / "out" / "perturbation.json").read_text()) == result
    assert result["traces"] == len(rows(bench.experts))
    assert "Evaluation: perturbation" in (tmp_path / "out" / "perturbation.html").read_text()


DISTRIBUTED = """
import atexit, sys, tempfile
import torch
from tracereward.cli.app import leave

class Late:
    def __del__(self):
        print("interpreter shut down")

atexit.register(lambda: print("at exit"))
late = Late()
sys.modules["kept"] = late
if sys.argv[1] == "distributed":
    torch.distributed.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
leave(3)
"""


@pytest.mark.parametrize(
    ("kind", "printed"), [("alone", ["at exit", "interpreter shut down"]), ("distributed", ["at exit"])]
)
def test_distributed_process_skips_interpreter_shutdown(kind, printed):
    done = subprocess.run([sys.executable, "-c", DISTRIBUTED, kind], stdout=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stdout.splitlines()) == (3, printed)


def test_completions_that_a_policy_cannot_read(command, bench):
    """Positions are checked before the model loads: the longest prompt and the limit together."""
    positions = context_length(read_config(bench.bare))
    words = ["sample", bench.bare, "--task", "arithmetic", "--data", bench.experts, "--limit", 1]
    refused(command(*words, "--max-new-tokens", positions), f"but {bench.bare} reads {positions}", "--max-new-tokens")
