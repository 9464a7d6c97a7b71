"""Writes the tables of ``options.md`` from the source: ``python docs/make_options.py``; a test compares the page."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from tracereward.training.fit_options import FIT_GROUPS
from tracereward.training.option_rules import ALL_RULES
from tracereward.training.option_types import own_fields
from tracereward.training.options import GROUPS, ChosenOptions, DataArguments, PolicyOptions, SavingOptions
from tracereward.training.trl_options import COMMANDS, HONOURED, REFUSED, commands_with

PAGE = Path(__file__).with_name("options.md")
COMMON = (DataArguments, ChosenOptions, SavingOptions, PolicyOptions)


def code(text: str) -> str:
    """Text of a table's cell, with the names of options as code."""
    return re.sub(r"(?<!`)--\w+", lambda found: f"`{found[0]}`", text.replace("|", r"\|"))


def conditions(name: str, commands: Iterable[str]) -> str:
    """When an option is refused, since it would have no effect."""
    rules = [rule for rule in ALL_RULES if name in rule.options and {*commands} & {*rule.commands}]
    return "".join(f" *Refused if idle: {code(rule.why)}.*" for rule in rules)


def own_table(group: type, commands: Iterable[str]) -> str:
    """The options that a class itself declares: name, default, meaning."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for field in own_fields(group):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = "none" if value is None else f"`{value}`"
        lines.append(
            f"| `--{field.name}` | {default} | {code(field.metadata['help'])}{conditions(field.name, commands)} |"
        )
    return "\n".join(lines)


def own_tables(command: str) -> str:
    """The tables of a command's own options under their headings, but for those that all commands have."""
    groups = (GROUPS | {"fit": FIT_GROUPS})[command]
    groups = {heading: group for heading, group in groups.items() if group not in COMMON}
    return "\n\n".join(f"### {heading}\n\n{own_table(group, [command])}" for heading, group in groups.items())


def named(commands: Iterable[str]) -> str:
    """Commands in a cell."""
    commands = tuple(commands)
    return "all" if commands == COMMANDS else ", ".join(commands)


def honoured_tables() -> str:
    """TRL's options that reach TRL, by heading."""
    parts = []
    for heading, group in HONOURED.items():
        lines = [f"### {heading}", "", "| option | commands | what it does |", "|---|---|---|"]
        for name, text in group.items():
            commands = commands_with(name)
            lines.append(f"| `--{name}` | {named(commands)} | {code(text)}.{conditions(name, commands)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def refused_table() -> str:
    """TRL's options that a command refuses, with the reason."""
    lines = ["| option | refused by | why |", "|---|---|---|"]
    for name, refusals in sorted(REFUSED.items()):
        lines += [f"| `--{name}` | {named(one.commands)} | {code(one.why)} |" for one in refusals]
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """The generated parts of the page by name."""
    return {
        "data": own_table(DataArguments, COMMANDS),
        "chosen": own_table(ChosenOptions, COMMANDS),
        "saving": own_table(SavingOptions, COMMANDS),
        "sft": own_tables("sft"),
        "policy": own_table(PolicyOptions, COMMANDS),
        "grpo": own_tables("grpo"),
        "train": own_tables("train"),
        "fit": own_tables("fit"),
        "honoured": honoured_tables(),
        "refused": refused_table(),
    }


def page(text: str) -> str:
    """The page with its generated parts, between their comments, made again."""
    for name, table in tables().items():
        start, end = f"<!-- {name} -->\n\n", f"\n\n<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}{table}{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
