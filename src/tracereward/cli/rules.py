"""Options that do nothing next to others are refused, for all commands but the training ones (see `option_rules`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import typer
import typer.core

from tracereward.data.readers import has_splits
from tracereward.errors import InputError

Given = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Options that have no effect next to the values of others.

    Attributes:
        commands: the commands that have them.
        options: names of their parameters.
        when: whether they have no effect, from all values by name of the parameter.
        why: a sentence with the fix.
    """

    commands: tuple[str, ...]
    options: tuple[str, ...]
    when: Callable[[Given], bool]
    why: str


STEP_SUITES = ("processbench", "prmbench", "mrben")


RULES: tuple[Rule, ...] = (
    Rule(
        commands=("sample", "score", *STEP_SUITES, "perturbation", "policy", "guided"),
        options=("split",),
        when=lambda o: not has_splits(o["data"]),
        why="the data has no splits",
    ),
    Rule(
        commands=("sample", "correct", "policy", "guided"),
        options=("top_p",),
        when=lambda o: o["temperature"] == 0,
        why="--temperature 0 always takes the most likely token",
    ),
    Rule(
        commands=("sample",),
        options=("seed",),
        when=lambda o: o["temperature"] == 0,
        why="--temperature 0 uses no random numbers",
    ),
    Rule(
        commands=("sample", "policy"),
        options=("api", "concurrency"),
        when=lambda o: "://" not in o["engine"],
        why="it is for a server: it needs --engine URL",
    ),
    Rule(
        commands=("sample", "policy"),
        options=("batch_size",),
        when=lambda o: o["engine"] != "transformers",
        why="vLLM and servers form their batches themselves",
    ),
    Rule(
        commands=("sample", "policy"),
        options=("dtype",),
        when=lambda o: "://" in o["engine"],
        why="a server loads its model itself: give it there",
    ),
    Rule(
        commands=("sample",),
        options=("engine",),
        when=lambda o: o["guide"] is not None,
        why="--guide decodes with transformers",
    ),
    Rule(
        commands=("sample",),
        options=("use_generation_config",),
        when=lambda o: "://" in o["engine"],
        why="a server has its own defaults: give --temperature and --top-p",
    ),
    Rule(
        commands=("select",),
        options=("margin", "answers"),
        when=lambda o: o["form"] == "sft",
        why="they are about pairs: use --format dpo or kto",
    ),
    Rule(
        commands=("select",),
        options=("threshold", "share"),
        when=lambda o: o["form"] != "sft",
        why="they are about single traces: for pairs use --margin",
    ),
    Rule(
        commands=("policy",),
        options=("temperature",),
        when=lambda o: o["n"] == 0,
        why="-n 0 decodes greedily only",
    ),
    Rule(
        commands=("inspect",),
        options=("title",),
        when=lambda o: o["output"] is None,
        why="it is the heading of the page: it needs --output",
    ),
    Rule(
        commands=("inspect",),
        options=("colour", "width"),
        when=lambda o: o["output"] is not None,
        why="it is for the terminal: remove it or --output",
    ),
    Rule(
        commands=("inspect",),
        options=("reference", "policy"),
        when=lambda o: o["model"] is None,
        why="rows are scored with --model only",
    ),
    Rule(
        commands=("pool",),
        options=("fit_share",),
        when=lambda o: o["fit"] is not None,
        why="--fit names the candidates to fit on: remove one of the two",
    ),
    Rule(
        commands=STEP_SUITES,
        options=("fit_split",),
        when=lambda o: o["fit"] is None or not has_splits(o["fit"]),
        why="it is the split of a Hub set in --fit",
    ),
    Rule(
        commands=("serve",),
        options=("upstream_key_file", "upstream_seconds", "max_upstream", "samples"),
        when=lambda o: o["upstream"] is None,
        why="it needs --upstream",
    ),
)


class CheckedCommand(typer.core.TyperCommand):
    """A command that refuses options which would be ignored, before its own code runs."""

    def invoke(self, ctx: Any) -> Any:
        """Check the options and run the command."""
        spelt = {parameter.name: max(parameter.opts, key=len) for parameter in self.params}
        defaults = {parameter.name: parameter.get_default(ctx) for parameter in self.params}
        for rule in RULES:
            names = [name for name in rule.options if name in ctx.params and self.name in rule.commands]
            if names and rule.when(ctx.params):
                for name in names:
                    if _is_given(ctx, name) and ctx.params[name] != defaults[name]:
                        raise InputError(f"{spelt[name]} {ctx.params[name]} has no effect: {rule.why}")
        return super().invoke(ctx)


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


class CheckedTyper(typer.Typer):
    """A group of `CheckedCommand`."""

    def command(
        self, name: str | None = None, *, cls: type[typer.core.TyperCommand] | None = None, **given: Any
    ) -> Any:
        """Register a command, as in typer."""
        return super().command(name, cls=cls or CheckedCommand, **given)


def with_hyphens(word: str) -> str:
    """``max_new_tokens`` as ``max-new-tokens``: names of options and commands take both."""
    return word if word.startswith("_") else word.replace("_", "-")
