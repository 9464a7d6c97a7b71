"""The documentation is correct: the tutorial and the examples run, and command lines, options and file names exist."""

import dataclasses
import json
import os
import pydoc
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from trl import GRPOConfig, ModelConfig, SFTConfig

from helpers.paths import ROOT
from tracereward.cli.app import app
from tracereward.cli.training_options import CONFIGS, parse, parse_fit
from tracereward.rewards.choices import GRANULARITIES, HEADS
from tracereward.runs.same_run import MAY_CHANGE
from tracereward.selection import METHODS
from tracereward.tasks.recipes import TASKS
from tracereward.training import option_rules
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.fit_options import FitOptions

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *(page for page in [ROOT / "README.md"] if page.is_file())]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of a page's fenced blocks in one of `languages`, in order."""
    return [(name, text) for name, text in BLOCK.findall(page.read_text(encoding="utf-8")) if name in languages]


def command_lines(page: Path) -> list[list[str]]:
    """Each ``tracereward ...`` command of a page's bash blocks, split into words, with continuation lines joined."""
    found = []
    for _, text in blocks(page, "bash", "console", "sh"):
        text = re.sub(r"<<'END'\n.*?^END$", "", text, flags=re.MULTILINE | re.DOTALL)  # content of a file
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            words = [re.sub(r"^.*/bin/", "", word) for word in words]
            if "tracereward" in words and "install" not in words:
                words = words[words.index("tracereward") + 1 :]
                ends = [i for i, word in enumerate(words) if word in ("|", ">", "&&", ";", "2>", "2>&1")]
                found.append(words[: min(ends, default=len(words))])
    return found


LINES = [(page, words) for page in PAGES for words in command_lines(page)]


def run_blocks(page: Path, tmp_path: Path, skipped: str = "never") -> Path:
    """Run a page's blocks in order in one folder, but for commands with the word `skipped`; returns the folder."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "tracereward").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tracereward "$@"\n')
    (commands / "tracereward").chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for language, text in blocks(page, "bash", "python"):
        if language == "bash" and skipped in text:
            continue
        argv = ["bash", "-e", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(argv, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr[-4000:]}"

    return work


def test_table_of_readme_is_up_to_date():
    """`python docs/make_results.py` writes it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(DOCS / "make_results.py"))["page"](text) == text


def test_first_lines_of_readme_run(capsys):
    """They distinguish the right trace from the wrong one, and its wrong line."""
    [(_, text)] = blocks(ROOT / "README.md", "python")[:1]
    exec(compile(text, "README.md", "exec"), {})
    right, wrong = (
        [float(x) for x in re.findall(r"-?\d+\.\d+", line)] for line in capsys.readouterr().out.splitlines()
    )
    assert right[0] > wrong[0]
    assert right[2] > wrong[2]


@pytest.mark.long
def test_fit_page_runs(tmp_path):
    """Run the example; the large models of the other commands are not there."""
    work = run_blocks(DOCS / "fit.md", tmp_path, skipped="SmolLM2")
    named = re.findall(r"^\| `([\w./-]+)` \|", (DOCS / "fit.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(named) == 6
    assert [name for name in named if not (work / "runs" / "fit" / name).exists()] == []
    assert len(read(work / "scored.jsonl")) == 400
    settings = json.loads((work / "runs" / "fit" / "reward_model" / "tracereward.json").read_text(encoding="utf-8"))
    assert settings["label_rule"] in (DOCS / "fit.md").read_text(encoding="utf-8")
    assert settings["calibration"] is not None


@pytest.mark.long
def test_tutorial_runs(tmp_path):
    """Run all blocks in order in one folder; then check the files that the page describes."""
    work = run_blocks(DOCS / "tutorial.md", tmp_path)
    run = work / "runs" / "irl"
    documented = re.findall(
        r"^\| `([\w./-]+)` \|", (DOCS / "tutorial.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert len(documented) == 13
    missing = [name for name in documented if not (run / name).exists()]
    assert not missing
    assert (run / "checkpoints" / "checkpoint-6" / "discriminator.pt").is_file()
    assert (work / "runs" / "sft" / "policy" / "config.json").is_file()
    metrics = read(run / "metrics.jsonl")
    assert [row["update"] for row in metrics if row["phase"] == "warmup"] == list(range(1, 11))
    assert [row["step"] for row in metrics if row["phase"] == "train"] == list(range(1, 7))
    samples, scores, chosen = (read(work / f"{name}.jsonl") for name in ("samples", "scores", "chosen"))
    fields = {"question", "prompt", "completion", "answer", "extracted", "correct", "finished", "length", "logprob"}
    assert all(row.keys() == fields for row in samples)
    assert len(samples) == len(scores) == 8 * len(chosen) == 8 * 40
    for sample, score in zip(samples, scores, strict=True):
        assert (sample["question"], sample["completion"]) == (score["question"], score["completion"])
        assert len(score["tokens"]) == len(score["offsets"]) == len(score["token_rewards"])
        assert isinstance(score["reward"], float)
        assert score["step_rewards"]
    assert chosen[0].keys() == {"question", "prompt", "completion", "answer", "reward", "extracted", "method", "of"}
    assert {(row["method"], row["of"]) for row in chosen} == {("vote", 8)}
    assert "<span" in (work / "heatmap.html").read_text(encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """Every line of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("page", ["gsm8k.md", "demonstrations.md", "method.md", "traces.md"])
def test_examples_run(page, capsys):
    """Run a page's Python blocks in one namespace; the page shows the tables that they print."""
    found = blocks(DOCS / page, "python")
    assert found
    names: dict[str, Any] = {}
    for _, text in found:
        exec(compile(text, page, "exec"), names)
    shown = (DOCS / page).read_text(encoding="utf-8").splitlines()
    assert [line for line in capsys.readouterr().out.splitlines() if line not in shown] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile(page):
    for _, text in blocks(page, "python"):
        compile(text, page.name, "exec")


@pytest.mark.parametrize(
    ("page", "words"), LINES, ids=lambda value: value.name if isinstance(value, Path) else " ".join(value)[:40]
)
def test_command_lines_parse(page, words, monkeypatch, tmp_path):
    """Options exist and their values are valid. Files written by an earlier command of the page need not exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(option_rules, "_check_installed", lambda config: None)  # vLLM, for example
    if words[0] == "plan":
        words = words[1:] if words[1] in CONFIGS else ["train", *words[1:]]
    kind = words[0]
    if kind == "fit" and "--help" not in words:
        parse_fit(words[1:])
        return
    if kind in CONFIGS and "--help" not in words:
        if "--config" in words:
            place = words.index("--config") + 1
            given = ROOT / words[place]
            if not given.is_file():  # created by a block of the page, or by the reader
                made = [text for _, text in blocks(page, "bash") if f"> {words[place]} <<" in text]
                given = tmp_path / words[place]
                text = re.search(r"<<'END'\n(.*?)^END$", "".join(made), flags=re.MULTILINE | re.DOTALL)
                given.write_text(text[1] if text else "{}\n")
            words = [*words[:place], str(given), *words[place + 1 :]]
        parse(kind, words[1:])
        return
    group = typer.main.get_command(app)
    if kind.startswith("--"):
        assert words == ["--help"] or words == ["--version"]
        return
    command = group.get_command(None, kind)
    assert command is not None, f"{page.name}: no command {kind!r}"
    if "--help" not in words:
        command.make_context(kind, words[1:])


def test_method_functions_exist():
    """The functions named in the table of docs/method.md exist."""
    rows = re.findall(r"`(tracereward\.[\w.]+)` \|$", (DOCS / "method.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 25
    for name in rows:
        assert pydoc.locate(name) is not None, name


def test_docs_show_every_command():
    assert {words[0] for _, words in LINES if not words[0].startswith("-")} >= {
        "sft",
        "train",
        "grpo",
        "sample",
        "score",
        "rerank",
        "export",
        "quickstart",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mentioned_files_exist(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:configs|examples|benchmarks|tests|src|docs)/[\w./-]*\w)", text))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
    links = re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", text)
    assert not [link for link in links if not (page.parent / link).is_file()]


def test_mentioned_options_exist():
    """Every ``--option`` in the text of a page belongs to some command."""
    group = typer.main.get_command(app)
    known = {"--config", "--resume", "--help", "--version", "--dry_run"}
    commands = [c for found in group.commands.values() for c in (found, *getattr(found, "commands", {}).values())]
    known |= {option for command in commands for p in command.params for option in p.opts}
    for cls in (*CONFIGS.values(), FitOptions, GRPOConfig, SFTConfig, ModelConfig):
        known |= {f"--{field.name}" for field in dataclasses.fields(cls)}
    known |= {f"--{field.name}" for field in dataclasses.fields(parse("sft", [])[0])}
    known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / "deploy" / "ray_train.py").read_text(encoding="utf-8")))
    for page in PAGES:
        spans = re.findall(r"`([^`\n]+)`", re.sub(BLOCK, "", page.read_text(encoding="utf-8")))
        spans = [span for span in spans if not span.startswith(("pip ", "uv ", "sphinx-", "ray "))]
        unknown = {name for span in spans for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)} - known
        assert not unknown, f"{page.name}: {unknown}"


def sections() -> dict[str, str]:
    """Text of each task section of demonstrations.md, by the name in backticks."""
    text = (DOCS / "demonstrations.md").read_text(encoding="utf-8")
    parts = re.split(r"^#{2,3} (.*)$", text, flags=re.MULTILINE)
    return {heading.strip("`"): body for heading, body in zip(parts[1::2], parts[2::2]) if heading.startswith("`")}


def test_every_task_is_documented():
    assert sections().keys() == TASKS.keys()


@pytest.mark.parametrize("name", sorted(TASKS))
def test_task_examples(name):
    """The row in the section yields exactly the prompt, trace and answer shown there."""
    text, task = sections()[name], TASKS[name]
    found = BLOCK.findall(text)
    row = json.loads(next(block for language, block in found if language == "json"))
    example = task.example(row)
    shown = next(block for language, block in found if language == "text")
    assert shown == f"{example['prompt']}{example['completion']}\n"
    assert f"Gold answer: `{example['answer']}`" in text
    assert task.verify(example["completion"], example["answer"])
    delimiter = "newline" if task.step_delimiter == "\n" else f"`{task.step_delimiter}`"
    assert f"Step delimiter: {delimiter}" in text
    if task.dataset is not None:
        assert f"`{task.dataset}`" in text


def test_lists_match_code():
    """Choices listed in the docs are those of the code."""
    method = (DOCS / "method.md").read_text(encoding="utf-8")
    for name in (*HEADS, *GRANULARITIES, *METHODS):
        assert f"`{name}`" in method, name
    options = (DOCS / "options.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in options for name in MAY_CHANGE)
    deviations = method.partition("## Deviations from the paper")[2].partition("\n## ")[0]
    for name, value in re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", deviations, flags=re.MULTILINE):
        default = {field.name: field.default for field in dataclasses.fields(AdversarialConfig)}[name]
        assert str(default) == value, name
