"""A small world, `python -m studies` in this process, and pages of handwritten results."""

import dataclasses
import sys
from pathlib import Path

import pytest

from studies.__main__ import app
from studies.definitions import STUDIES
from studies.pages.page import write_page
from studies.setup.settings import WORLDS
from tracereward.cli.app import main

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


def folders(path: Path) -> list[str]:
    """Options that run a study in one process, with all output in a folder."""
    return [*(f"--{name}={path / name}" for name in ("pages", "results", "work")), "--jobs=1"]


def page_of(folder: Path, results: list[dict]) -> str:
    """The page of these results; its figures are ``x*.png`` in the folder."""
    write_page(folder / "x.md", STUDIES["recipe"], "python -m studies x", results, tried=0)
    return (folder / "x.md").read_text()
