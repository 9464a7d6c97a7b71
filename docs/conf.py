"""Sphinx settings. The option tables of `options.md` are made here, from the dataclasses that the commands read."""

import dataclasses
import re

import tracereward
from tracereward.training.adversarial_config import DiscriminatorOptions, MonitorOptions, ShapingOptions
from tracereward.training.config import DataArguments, PolicyConfig, RewardConfig, SupervisedConfig

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


def option_table(cls: type) -> str:
    """A Markdown table of the options that `cls` itself declares: name, default, help."""
    own = vars(cls)["__annotations__"]
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.name in own:
            value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = "none" if value is None else f"`{value}`"
            text = field.metadata["help"].replace("|", r"\|")
            text = re.sub(r"--\w+", lambda found: f"`{found[0]}`", text)
            lines.append(f"| `--{field.name}` | {default} | {text} |")
    return "\n".join(lines)


myst_substitutions = {
    "data_options": option_table(DataArguments),
    "sft_options": option_table(SupervisedConfig),
    "policy_options": option_table(PolicyConfig),
    "grpo_options": option_table(RewardConfig),
    "discriminator_options": option_table(DiscriminatorOptions),
    "shaping_options": option_table(ShapingOptions),
    "monitor_options": option_table(MonitorOptions),
}
