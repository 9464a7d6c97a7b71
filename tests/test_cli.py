"""The command line: what it refuses and how it says so, and the path from samples over scores to a choice.

Bad input is given to `cli.main` in this process; models in it have no weights, so that a command that looked at its
input too late would fail to load them.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tiny import launcher, options, rows
from tracereward import __version__, cli
from tracereward.files import write_jsonl
from tracereward.rerank import METHODS
from tracereward.reward_model import TokenRewardModel
from tracereward.reward_settings import RewardSettings
from tracereward.tasks import get_task

TINY = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 24, "report_to": "none"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_model_folder, tokenizer, experts):
    """Rows, a policy and a reward model without weights, and a reward model with them."""
    folder = tmp_path_factory.mktemp("cli")
    write_jsonl(folder / "experts.jsonl", experts)
    bare = folder / "bare"
    shutil.copytree(tiny_model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    reward_model = TokenRewardModel.from_backbone(str(tiny_model_folder), RewardSettings(task="arithmetic"), tokenizer)
    with torch.no_grad():
        reward_model.head.w.copy_(torch.linspace(-1, 1, len(reward_model.head.w)))  # else it is only the log-prob
    reward_model.save_pretrained(folder / "reward_model")
    bare_reward = folder / "bare_reward_model"
    shutil.copytree(folder / "reward_model", bare_reward)
    (bare_reward / "model.safetensors").write_bytes(b"")  # cannot be loaded
    return SimpleNamespace(
        folder=folder,
        model=tiny_model_folder,
        experts=folder / "experts.jsonl",
        bare=bare,
        reward_model=folder / "reward_model",
        bare_reward=bare_reward,
    )


@pytest.fixture
def command(monkeypatch, capsys):
    """`command(word, ...)` runs the command line in this process: exit code, stdout and stderr."""

    def run(*argv: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["tracereward", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=captured.out, err=captured.err)

    return run


def refused(done: SimpleNamespace, *parts: object) -> None:
    """Exit 2, nothing on stdout, and one sentence on stderr that contains `parts`."""
    assert done.code == 2, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    said = [line for line in done.err.splitlines() if line.startswith("tracereward: ")]
    assert len(said) == 1, done.err
    for part in parts:
        assert str(part) in said[0]


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
    ids=["no prompt", "empty prompt", "no completion", "empty completion", "number", "no object"],
)
def test_bad_rows_are_named_by_file_and_line(command, bench, tmp_path, kind, row, message):
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [GOOD, row, GOOD])
    changed = {"num_generations": None} if kind == "sft" else {}
    done = command(kind, *words(bench, tmp_path / "run", dataset_name=data, **changed))
    refused(done, f"{data}:2: ", message)
    assert not (tmp_path / "run").exists()


def test_the_verifier_needs_answers(command, bench, tmp_path):
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
    ids=["missing", "empty", "cut", "bytes"],
)
def test_unreadable_files(command, bench, tmp_path, content, message):
    data = tmp_path / "experts.jsonl"
    if content is None:
        shutil.copy(bench.experts, tmp_path / "expert.jsonl")
    else:
        data.write_bytes(content)
    refused(command("train", *words(bench, tmp_path / "run", dataset_name=data)), data, message)


def test_completions_over_the_limit(command, bench, tmp_path, experts, tokenizer):
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
    assert f"{over} demonstrations left out: longer than {limit} tokens" in dropped.err
    refused(command("train", *words(bench, tmp_path / "other", max_completion_length=2), "--on_long", "drop"),
            f"{len(experts)} of {len(experts)} rows are too long")  # fmt: skip


def test_fewer_demonstrations_than_a_batch(command, bench, tmp_path):
    given = words(bench, tmp_path / "run", per_device_train_batch_size=52)
    refused(command("train", *given), "12 demonstrations, 13 prompts needed", "--per_device_train_batch_size")
    given = words(bench, tmp_path / "run", per_device_train_batch_size=13, num_generations=None)
    refused(command("sft", *given), "12 demonstrations, 13", "--per_device_train_batch_size")


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
        ({"num_generations": 1}, ["at least 2 completions"]),
        ({"save_total_limit": 1}, ["save_total_limit must be at least 2"]),
        ({"num_iterations": 2, "save_steps": 3}, ["save_steps 3", "--save_steps 2"]),
        ({"model_name_or_path": None}, ["--model_name_or_path"]),
        ({"granulrity": "step"}, ["unknown option --granulrity", "did you mean 'granularity'?"]),
        ({"max_steps": "many"}, ["max_steps", "many"]),
        ({"label_smoothing": 0.7}, ["label_smoothing", "0.7"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(command, bench, tmp_path, changed, parts):
    refused(command("train", *words(bench, tmp_path / "run", **changed)), *parts)
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
    other = Tokenizer(models.WordLevel({**tokenizer.get_vocab(), "new": len(tokenizer)}, unk_token="<unk>"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<eos>").save_pretrained(foreign)
    refused(command("train", *words(bench, run, warmup_model=foreign)), "different tokenizers", bench.bare, foreign)
    taken = tmp_path / "taken"
    taken.write_text("a file")
    refused(command("train", *words(bench, taken)), taken, "not a folder")


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


def test_the_command_line_overrides_the_file(command, bench, tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text("granularity: stpe\nhead: token\n")
    given = words(bench, tmp_path / "run", granularity="dense", max_completion_length=2)
    refused(command("train", "--config", config, *given), "rows are too long")  # so both were read


# Reward models


@pytest.mark.parametrize("name", ["score", "rerank"])
def test_what_is_not_a_reward_model(command, bench, tmp_path, name):
    data = bench.experts
    refused(command(name, bench.folder / "reward_mode", data), "no such model folder", f"did you mean {bench.folder}")
    refused(command(name, bench.model, data), "not a reward model", "tracereward.json is missing")
    for missing in ("head.safetensors", "model.safetensors", "tokenizer.json", "config.json"):
        partial = tmp_path / missing
        shutil.copytree(bench.bare_reward, partial)
        (partial / missing).unlink()
        refused(command(name, partial, data), "not a complete reward model", f"{missing} missing")
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
    ],
    ids=["prompt", "completion", "empty", "no candidates", "empty candidate"],
)
def test_rows_that_cannot_be_scored(command, bench, tmp_path, name, row, parts):
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [GOOD, row])
    refused(command(name, bench.bare_reward, data), data, *parts)


def test_rerank_says_what_it_needs(command, bench, tmp_path):
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [{**GOOD, "logprob": -1.0}, GOOD])
    refused(command("rerank", bench.bare_reward, data, "--method", "logprob"), f"{data}:2: ", "logprob")
    refused(command("rerank", bench.bare_reward, data, "--method", "votes"), "method 'votes'", "did you mean 'vote'?")
    refused(command("rerank", bench.bare_reward, data, "--task", "arithmetics"), "did you mean 'arithmetic'?")
    write_jsonl(data, [{"prompt": "1 + 2 = ?\n", "candidates": ["#### 3"]}])
    refused(command("rerank", bench.bare_reward, data), f"{data}:1: ", "a completion in each row")
    data.write_text("")
    refused(command("rerank", bench.bare_reward, data), data, "no rows")
    refused(command("score", bench.bare_reward, data), data, "no rows")


def test_bad_output_files(command, bench, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    for name in ("score", "rerank"):
        given = [name, bench.reward_model, tmp_path / "rows.jsonl", "-o"]
        refused(command(*given, tmp_path / "no" / "such.jsonl"), "folder", "does not exist")
        refused(command(*given, tmp_path), "is a folder")


def test_bad_sampling(command, bench, tmp_path):
    given = ["sample", bench.bare, "--task", "arithmetic", "--data"]
    refused(command(*given, tmp_path / "no.jsonl"), "no such file")
    refused(command(*given, bench.experts, "--temperature", 0, "-n", 2), "temperature 0")
    refused(command(*given, bench.experts, "--template", "chat"), "no chat template")
    refused(command(*given, bench.experts, "--resume"), "--output")
    refused(command("sample", bench.bare, "--task", "arithmetic"), "--data")
    refused(command("sample", bench.folder / "bar", *given[2:], bench.experts), f"did you mean {bench.bare}")


# Usage


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "trian"),
        (["score"], "Missing argument"),
        (["rerank", "model"], "Missing argument"),
        (["score", "model", "data", "--no-such-option"], "--no-such-option"),
        (["sample", "model", "-n", "0"], "-n"),
        ([], "Usage"),
    ],
    ids=["command", "arguments", "argument", "option", "range", "nothing"],
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
    for name in ("sft", "train", "grpo", "sample", "score", "rerank", "quickstart"):
        assert name in shown.out
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
    # An untrained model is never right: give each question one expert trace.
    experts = rows(bench.experts)
    for row in found[::4]:
        row["completion"], row["correct"] = experts[row["question"]]["completion"], True
        row["finished"] = True
    path = bench.folder / "samples.jsonl"
    write_jsonl(path, found)
    return path


def test_sample_writes_rows_in_order(bench, samples, experts):
    found = rows(samples)
    assert [row["question"] for row in found] == [n for n in range(5) for _ in range(4)]
    assert [row["prompt"] for row in found] == [experts[row["question"]]["prompt"] for row in found]
    assert all(row["logprob"] < 0 and 1 <= row["length"] <= 12 for row in found)
    assert all(row["finished"] or row["length"] == 12 for row in found)


def test_scores_are_those_of_the_model(bench, samples):
    done = launcher()("score", bench.reward_model, samples)
    assert done.code == 0, done.err
    scored = [json.loads(line) for line in done.out.splitlines()]
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


def test_scores_with_the_models_that_a_reward_form_needs(bench, samples, tokenizer):
    """The policy of the samples as reference: its mean log-prob, which `sample` wrote, is added where nothing clips."""
    alone = launcher()("score", bench.reward_model, samples)
    done = launcher()("score", bench.reward_model, samples, "--reference", bench.model)
    assert done.code == 0, done.err
    model = TokenRewardModel.from_pretrained(str(bench.reward_model))
    reference = AutoModelForCausalLM.from_pretrained(bench.model).eval()
    given = rows(samples)
    texts = ([row[name] for row in given] for name in ("prompt", "completion", "finished"))
    expected = model.score(*texts, reference=reference)
    assert alone.out != done.out
    for line, scores in zip(done.out.splitlines(), expected, strict=True):
        assert json.loads(line)["token_rewards"] == scores.rewards
    both = launcher()("score", bench.reward_model, samples, "--reference", bench.model, "--policy", bench.model)
    for line, before in zip(both.out.splitlines(), alone.out.splitlines(), strict=True):  # what is added is taken off
        assert json.loads(line)["token_rewards"] == pytest.approx(json.loads(before)["token_rewards"], abs=1e-4)


def test_candidates_are_scored_like_single_traces(bench, samples):
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
    assert set(together[0]) == {"reward", "step_rewards", "tokens", "offsets", "token_rewards"}


def test_a_trace_of_nothing_but_its_end_is_scored(bench, tmp_path, tokenizer):
    """A policy may end at once; `sample` says so with `finished`. Without that, an empty completion is a mistake."""
    row = {"prompt": "1 + 2 = ?\n", "completion": ""}
    write_jsonl(tmp_path / "ended.jsonl", [{**row, "finished": True}])
    done = launcher()("score", bench.reward_model, tmp_path / "ended.jsonl")
    assert done.code == 0, done.err
    (scored,) = [json.loads(line) for line in done.out.splitlines()]
    assert scored["tokens"] == [tokenizer.eos_token]
    assert scored["offsets"] == [[0, 0]]
    write_jsonl(tmp_path / "empty.jsonl", [row])
    assert launcher()("score", bench.reward_model, tmp_path / "empty.jsonl").code == 2


def test_a_run_folder_is_one_process_alone(command, bench, tmp_path):
    output = tmp_path / "run"
    (output / "checkpoints").mkdir(parents=True)
    with FileLock(output / "checkpoints" / ".lock"):
        refused(command("train", *words(bench, output)), "another process is running in", "--output_dir")
    assert not (output / "config.yaml").exists()


@pytest.mark.parametrize("method", ["reward", "vote", "logprob", "shortest", "majority", "random"])
def test_rerank_chooses_one_of_each_question(bench, samples, method):
    done = launcher()("rerank", bench.reward_model, samples, "--method", method)
    assert done.code == 0, done.err
    chosen = [json.loads(line) for line in done.out.splitlines()]
    assert [row["question"] for row in chosen] == [0, 1, 2, 3, 4]
    assert all(row["of"] == 4 and row["method"] == method for row in chosen)
    given, scored = rows(samples), launcher()("score", bench.reward_model, samples).out.splitlines()
    best = {
        "reward": lambda row: row["reward"],
        "logprob": lambda row: row["logprob"],
        "shortest": lambda row: -len(row["completion"]),
    }
    for row in chosen:
        group = [json.loads(line) for line in scored if json.loads(line)["question"] == row["question"]]
        assert row["completion"] in [other["completion"] for other in group]
        if method in best:
            assert row["completion"] == max(group, key=best[method])["completion"]
    right = sum(get_task("arithmetic").verify(row["completion"], row["answer"]) for row in chosen)
    table = launcher()("rerank", bench.reward_model, samples, "--method", method, "--json")
    assert table.code == 0, table.err
    (line,) = table.out.splitlines()
    accuracies = json.loads(line)["accuracy"]
    assert json.loads(line)["questions"] == len({row["question"] for row in given})
    label = METHODS[method].format(n=4)
    assert accuracies[label][0] == right / 5
    assert accuracies["oracle@4"][0] == 1.0
    assert "oracle@4" in done.err


def test_a_closed_pipe_is_no_error(bench, experts):
    many = bench.folder / "many.jsonl"
    write_jsonl(many, [{"prompt": row["prompt"], "completion": row["completion"]} for row in experts] * 40)
    command = [sys.executable, "-m", "tracereward", "score", str(bench.reward_model), str(many)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        process.stdout.close()
        notes = process.stderr.read()
    assert json.loads(first)["prompt"] == experts[0]["prompt"]
    assert process.returncode == 0
    assert "Traceback" not in notes
    assert "BrokenPipe" not in notes


def test_a_token_head_scores_too(bench, tokenizer, samples):
    folder = bench.folder / "token_reward_model"
    settings = RewardSettings(head="token", granularity="step", aggregate="min", task="arithmetic")
    torch.manual_seed(0)
    TokenRewardModel.from_backbone(str(bench.model), settings, tokenizer).save_pretrained(folder)
    done = launcher()("score", folder, samples)
    assert done.code == 0, done.err
    for line in done.out.splitlines():
        row = json.loads(line)
        assert row["reward"] == min(row["token_rewards"])
