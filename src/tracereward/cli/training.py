"""The commands whose options are those of `cli.training_options`; they import lazily, so that ``--help`` is fast."""

import dataclasses
from typing import Any

import typer

from tracereward.console import is_main_process, print_json, say
from tracereward.errors import InputError
from tracereward.files import without_nan


def _training(kind: str, argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        from tracereward.cli.training_help import help_text

        print(help_text(kind))
        return
    from tracereward.cli.training_options import parse

    argv = ["--dry_run" if word == "--dry-run" else word for word in argv]
    dry, as_json = "--dry_run" in argv, "--json" in argv
    if dry:
        argv = [word for word in argv if word not in ("--dry_run", "--json")]
    data, config, model, resume = parse(kind, argv)
    if dry:
        _plan(kind, argv, as_json, data=data, config=config, model=model)
        return
    from tracereward.commands.grpo import run_grpo
    from tracereward.commands.sft import run_sft
    from tracereward.commands.train import run_train

    folder = {"sft": run_sft, "train": run_train, "grpo": run_grpo}[kind](data, config, model, resume)
    if not is_main_process():
        return
    from tracereward.runs.verdict import ending

    say(ending(folder))
    for part in ("policy", "reward_model", "report.html"):
        if (folder / part).exists():
            print(folder / part)


def _plan(kind: str, argv: list[str], as_json: bool, *, data: Any, config: Any, model: Any) -> None:
    from tracereward.commands.plan import make_plan
    from tracereward.reports.plan_text import plan_text

    plan = make_plan(kind, data, config, model, argv=argv)
    if as_json:
        print_json(without_nan(dataclasses.asdict(plan)))
    else:
        print(plan_text(plan))


def plan(ctx: typer.Context) -> None:
    """What a run would take and do: the same as train --dry_run, or sft --dry_run with the word sft first."""
    kind, *rest = ctx.args if ctx.args[:1] and not ctx.args[0].startswith("-") else ["train", *ctx.args]
    if kind not in ("train", "sft"):
        raise InputError(f"a plan is of train or sft, not of {kind!r}: tracereward plan train --dataset_name FILE ...")
    _training(kind, [*rest, "--dry_run"])


def sft(ctx: typer.Context) -> None:
    """Fine-tune a model on expert traces (options: tracereward sft --help)."""
    _training("sft", ctx.args)


def train(ctx: typer.Context) -> None:
    """Learn a reward model from expert traces and train the policy on it."""
    _training("train", ctx.args)


def grpo(ctx: typer.Context) -> None:
    """Train a policy on a given reward: the verifier, or its own log-prob."""
    _training("grpo", ctx.args)


def fit(ctx: typer.Context) -> None:
    """Learn a reward model from expert traces and logged traces, without a policy."""
    if "--help" in ctx.args or "-h" in ctx.args:
        from tracereward.cli.training_help import help_text

        print(help_text("fit"))
        return
    from tracereward.cli.training_options import parse_fit

    options, resume = parse_fit(ctx.args)
    from tracereward.commands.fit import run_fit
    from tracereward.runs.verdict import ending

    folder = run_fit(options, resume).folder
    assert folder is not None  # the command has one
    say(ending(folder))
    for part in ("reward_model", "verdict.json", "report.html"):
        if (folder / part).exists():
            print(folder / part)
