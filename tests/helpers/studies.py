"""A small world, and `python -m studies` in this process."""

import dataclasses
import sys

import pytest

from studies.__main__ import app
from tracereward.cli.app import main
from tracereward.quickstart.worlds import WORLDS

WORLD = dataclasses.replace(
    WORLDS["misconception"],
    experts=12,
    unlabeled=24,
    corpus=200,
    validation=10,
    test=12,
    pretraining={**WORLDS["misconception"].pretraining, "max_steps": 25, "warmup_steps": 0},
    sft={**WORLDS["misconception"].sft, "warmup_steps": 0, "per_device_train_batch_size": 12},
    sft_grid=[{"learning_rate": 1e-4, "max_steps": 2}, {"learning_rate": 5e-4, "max_steps": 3}],
    grpo={**WORLDS["misconception"].grpo, "max_steps": 3, "warmup_steps": 0, "per_device_train_batch_size": 32},
    adversarial={**WORLDS["misconception"].adversarial, "discriminator_warmup_updates": 3, "warmup_rollouts": 4},
)


def command(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["studies", *words])
    with pytest.raises(SystemExit) as end:
        main(app)
    return int(end.value.code or 0), capsys.readouterr().err
