"""Fixtures of the command line: commands in this process, and tiny models with and without weights."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from tracereward.cli import app
from tracereward.files import write_jsonl
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_model_folder, tokenizer, experts):
    """Rows, a policy and a reward model without weights, and a reward model with weights."""
    folder = tmp_path_factory.mktemp("cli")
    write_jsonl(folder / "experts.jsonl", experts)
    bare = folder / "bare"
    shutil.copytree(tiny_model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    reward_model = TokenRewardModel.from_backbone(str(tiny_model_folder), RewardSettings(task="arithmetic"), tokenizer)
    with torch.no_grad():
        reward_model.head.w.copy_(
            torch.linspace(-1, 1, len(reward_model.head.w))
        )  # otherwise the reward is only the log-prob
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
    """`command(word, ...)` runs the command line in this process and returns its exit code, stdout and stderr."""

    def run(*argv: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["tracereward", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app.main()
        captured = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=captured.out, err=captured.err)

    return run


def refused(done: SimpleNamespace, *parts: object) -> None:
    """Check for exit code 2, an empty stdout and one error line on stderr that contains `parts`."""
    assert done.code == 2, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    errors = [line for line in done.err.splitlines() if line.startswith("tracereward: ")]
    assert len(errors) == 1, done.err
    for part in parts:
        assert str(part) in errors[0]
