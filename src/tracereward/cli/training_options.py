"""Options of the training commands: a YAML file by ``--config``, overridden by ``--name value``."""

import dataclasses
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, TrlParser

from tracereward.errors import InputError, nearest
from tracereward.files import nearest_path
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import RETIRED, RewardConfig, SupervisedConfig
from tracereward.training.option_rules import check_job
from tracereward.training.options import DataArguments

CONFIGS = {"sft": SupervisedConfig, "train": AdversarialConfig, "grpo": RewardConfig}


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)  # argparse would print the usage of 200 options


def parse(kind: str, argv: list[str]) -> tuple[DataArguments, Any, ModelConfig, bool]:
    """Parse the arguments of a training command.

    Returns:
        Data options, training options, model options, and whether ``--resume`` was given.

    Raises:
        InputError: unknown option (the nearest is suggested), a value that does not fit, an unreadable file.
    """
    argv = [_with_underscores(word) for word in argv]
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    resume = "--resume" in argv
    if resume:
        argv.remove("--resume")
    config_class = CONFIGS[kind]
    classes: Any = (DataArguments, config_class, ModelConfig)
    known = {field.name for cls in classes for field in dataclasses.fields(cls) if field.init}
    for name in _given_names(argv):
        if name not in known | {"config"}:
            raise InputError(_unknown(f"option --{name}", name, known))
    argv = _with_config(argv, known)
    if not any(word.split("=")[0] == "--output_dir" for word in argv):
        argv += ["--output_dir", f"runs/{kind}"]
    try:
        data, config, model = _Parser(classes).parse_args_and_config(
            args=argv,
            fail_with_unknown_args=False,  # the remaining options are retired ones of a file, see `_with_config`
        )
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    check_job(kind, data, config, model)
    return data, config, model, resume


def _with_underscores(word: str) -> str:
    """``--output-dir`` as ``--output_dir``, as the parser does."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else word


def _given_names(argv: list[str]) -> list[str]:
    return [word[2:].split("=")[0] for word in argv if word.startswith("--") and len(word) > 2]


def _unknown(what: str, name: str, known: set[str]) -> str:
    near = nearest(name, known)
    return f"unknown {what}: " + (f"did you mean {near!r}?" if near else "see `tracereward COMMAND --help`")


def _with_config(argv: list[str], known: set[str]) -> list[str]:
    """Check the YAML file of ``--config``, and add its ``output_dir`` to the arguments."""
    if "--config" not in argv:
        return argv
    position = argv.index("--config")
    if position + 1 == len(argv):
        raise InputError("--config needs a file name")
    path = Path(argv[position + 1])
    if not path.is_file():
        near = nearest_path(path)
        raise InputError(f"{path}: no such file" + (f" (did you mean {near}?)" if near else ""))
    try:
        text = path.read_text(encoding="utf-8")
        options, tree = yaml.safe_load(text) or {}, yaml.compose(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(options, dict):
        raise InputError(f"{path}: must be a mapping of option names to values")
    seen: set[str] = set()
    for key, _ in tree.value if tree is not None else ():
        if key.value in seen:  # YAML silently takes the last one
            raise InputError(f"{path}:{key.start_mark.line + 1}: option {key.value!r} is given twice")
        seen.add(key.value)
    for name in options.keys() - known - {"env"}:
        if name in RETIRED and options[name] == RETIRED[name]:  # dropped by `parse`
            continue
        raise InputError(f"{path}: " + _unknown(f"option {name!r}", str(name), known))
    folder = options.get("output_dir", "runs")
    if not isinstance(folder, str) or not folder:
        raise InputError(f"{path}: output_dir must be the name of a folder, not {folder!r}")
    if "output_dir" in options and not any(word.split("=")[0] == "--output_dir" for word in argv):
        argv = [*argv, "--output_dir", folder]
    return argv
