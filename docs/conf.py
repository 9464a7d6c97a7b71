"""Sphinx settings. The option tables of `options.md` are made here, from the dataclasses that the commands read."""

import dataclasses
import re

import tracereward
from tracereward.training.options import GROUPS, DataArguments, PolicyOptions, SavingOptions, own_fields

project = "tracereward"
author = "The tracereward authors"
release = version = tracereward.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"tracereward {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
napoleon_use_ivar = True  # an attribute is documented once, in its class's docstring

myst_enable_extensions = ["deflist", "substitution"]
myst_heading_anchors = 3


def option_table(group: type) -> str:
    """A Markdown table of the options that a class itself declares: name, default, help."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for field in own_fields(group):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = "none" if value is None else f"`{value}`"
        text = field.metadata["help"].replace("|", r"\|")
        text = re.sub(r"--\w+", lambda found: f"`{found[0]}`", text)
        lines.append(f"| `--{field.name}` | {default} | {text} |")
    return "\n".join(lines)


def option_tables(command: str) -> str:
    """The tables of a command's own options under their headings, but for those that all commands have."""
    groups = {heading: group for heading, group in GROUPS[command].items() if group not in COMMON}
    return "\n\n".join(f"### {heading}\n\n{option_table(group)}" for heading, group in groups.items())


COMMON = (DataArguments, SavingOptions, PolicyOptions)
myst_substitutions = {
    "data_options": option_table(DataArguments),
    "saving_options": option_table(SavingOptions),
    "policy_options": option_table(PolicyOptions),
    "sft_options": option_tables("sft"),
    "grpo_options": option_tables("grpo"),
    "train_options": option_tables("train"),
}
