"""No traceback reaches a user: what is known has a cause and a fix, and anything else a file with the traceback."""

import errno
import re
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from helpers.command_line import bench, command, refused  # noqa: F401
from tracereward.cli import app
from tracereward.cli.unforeseen import explained
from tracereward.commands import score
from tracereward.files import write_jsonl

ROW = {"prompt": "1 + 2 = ?\n", "completion": "1 + 2 = 3\n#### 3", "answer": "3"}


def log_of(text: str) -> str:
    """The traceback in the file that a message names; the file is removed."""
    path = Path(re.search(r"traceback is in (\S+\.log)", text)[1])
    try:
        return path.read_text(encoding="utf-8")
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out"), ["out: ", "disk is full"]),
        (SafetensorError("I/O error: File too large (os error 27)"), ["disk is full", "os error 27"]),
        (PermissionError(errno.EACCES, "Permission denied", "rows"), ["rows: Permission denied", "may read"]),
        (OSError(errno.EMFILE, "Too many open files"), ["ulimit"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ["2 GiB", "smaller batches"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 64 bytes"), ["out of memory", "smaller batches"]),
        (MemoryError(), ["out of memory"]),
        (httpx.ConnectError("no route"), ["network", "no route", "HF_HUB_OFFLINE"]),
        (HfHubHTTPError("503", response=httpx.Response(503, request=httpx.Request("GET", "http://hub"))), ["network"]),
        (OfflineModeIsEnabled("offline"), ["network"]),
    ],
)  # fmt: skip
def test_known_causes_have_a_fix_and_no_file(error, parts):
    text = explained(error)
    assert "\n" not in text
    assert "traceback" not in text
    for part in parts:
        assert part in text


def test_refusals_of_libraries_name_the_library():
    with pytest.raises(ValueError, match="no-such-model") as caught:
        AutoConfig.for_model("no-such-model")
    text = explained(caught.value)
    assert text.startswith("transformers refused this: ")
    assert "for_model" in log_of(text)


def test_own_faults_are_written_to_a_file(command, bench, tmp_path, monkeypatch):
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [ROW])

    def broken(*_: object, **__: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(score, "candidate_rows", broken)
    done = command("score", bench.bare_reward, data)
    assert (done.code, done.out) == (1, "")
    assert "Traceback" not in done.err
    assert "this is a fault of tracereward: KeyError: 'a fault'" in done.err
    log = log_of(done.err)
    assert "in broken\n" in log
    assert "torch " in log
    assert str(data) not in log.splitlines()[0]


def test_interrupts_before_a_command_starts(monkeypatch, capsys):
    def pressed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        app.main(pressed)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\ntracereward: interrupted\n"


@pytest.mark.parametrize("temperature", [0, 1])
def test_weights_that_are_not_finite_stop_sampling(command, bench, tmp_path, temperature):
    """Greedy decoding alone would go on and write NaN, which is not JSON."""
    write_jsonl(tmp_path / "rows.jsonl", [ROW])
    broken = tmp_path / "broken"
    shutil.copytree(bench.model, broken)
    weights = load_file(broken / "model.safetensors")
    weights = {name: weight * float("nan") for name, weight in weights.items()}
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    words = ["--data", tmp_path / "rows.jsonl", "-n", 1, "--max-new-tokens", 4, "--temperature", temperature]
    done = command("sample", broken, *words)
    assert (done.code, done.out) == (1, "")
    assert "not finite" in done.err.splitlines()[-1]


TRIES = {
    "sample FILE --data ROWS": "is a file",
    "sample EMPTY --data ROWS": "config.json is missing",
    "sample POLICY --data EMPTY": "EMPTY",
    "sample POLICY --data ROWS --seed -1": "Invalid value for '--seed'",
    "sample POLICY --data ROWS --seed 99999999999999999999": "Invalid value for '--seed'",
    "sample POLICY --data ROWS --max_new_tokns 4": "--max-new-tokens",
    "sample POLICY --data ROWS --task arithmatic": "did you mean 'arithmetic'",
    "score FILE POLICY": "is a file",
    "score DAMAGED ROWS": "DAMAGED/tracereward.json: unknown head 'frob'",
    "calibrate MODEL ALLRIGHT": "cannot calibrate on 12 right and 0 wrong",
    "evaluate pool MODEL ROWS -o FILE": "is a file, not a folder",
    "evaluate pool MODEL ROWS -o FILE/new": "is a file, not a folder",
    "quickstart -o FILE": "is a file, not a folder",
    "quickstart --world exposre": "did you mean 'exposure'",
    "sft RUN --max_steps -5": "max_steps must be a whole number of at least -1",
    "sft RUN --save_steps 0": "save_steps must be more than 0",
    "sft RUN --neftune_noise_alpha nan": "neftune_noise_alpha must be at least 0, not nan",
    "sft RUN --dataloader_num_workers -1": "dataloader_num_workers",
    "sft RUN --adam_beta1 2": "adam_beta1",
    "sft RUN --max_demonstrations 0": "max_demonstrations",
    "sft RUN --max_completion_length 0": "max_completion_length",
    "sft RUN --lr_scheduler_kwargs {bad": "--lr_scheduler_kwargs {bad: not valid JSON",
    "sft RUN --deepspeed FILE": "--deepspeed FILE: not valid JSON",
    "sft RUN --fsdp full_shard": "accelerate launch",
    "train RUN --loss_type gpro": "did you mean 'grpo'",
    "grpo RUN --scale_rewards groups": "did you mean 'group'",
    "train RUN --step_delimiter=": "step_delimiter is empty",
    "sft RUN --use_peft true --lora_r 0": "lora_r must be a whole number of at least 1",
    "sft --config FILE": "FILE: not a YAML file",
    "sft --config EMPTY": "is a folder",
    "sft RUN --torch_dtype bfloat16": "did you mean 'dtype'",
    "sft ROWS": "--dataset_name ROWS",
    "train RUN --output_dir FILE/run --max_completion_length 24": "cannot be written",
}


@pytest.mark.parametrize("words", TRIES)
def test_mistakes_are_refused_before_a_model_loads(command, bench, tmp_path, words):
    """One sentence with what to change, on a line of its own; exit code 2."""
    (tmp_path / "file").write_text("{x\n")
    (tmp_path / "empty").mkdir()
    write_jsonl(tmp_path / "rows.jsonl", [ROW] * 12)
    write_jsonl(tmp_path / "right.jsonl", [{**ROW, "correct": True}] * 12)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in bench.bare_reward.iterdir():
        (damaged / path.name).symlink_to(path)
    (damaged / "tracereward.json").unlink()
    (damaged / "tracereward.json").write_text('{"head": "frob"}')
    names = {"FILE": tmp_path / "file", "EMPTY": tmp_path / "empty", "ROWS": tmp_path / "rows.jsonl"}
    names |= {
        "POLICY": bench.bare,
        "MODEL": bench.bare_reward,
        "DAMAGED": damaged,
        "ALLRIGHT": tmp_path / "right.jsonl",
    }

    def real(text: str) -> str:
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    run = f"--model_name_or_path {bench.bare} --dataset_name {bench.experts} --report_to none"
    if "--output_dir" not in words:
        run += f" --output_dir {tmp_path / 'run'}"
    done = command(*real(words.replace("RUN", run)).split())
    assert done.code == 2, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert real(TRIES[words]) in done.err.splitlines()[-1]
