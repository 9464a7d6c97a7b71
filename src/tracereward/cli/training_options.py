"""Options of the training commands and of `fit`: a YAML file by ``--config``, overridden by ``--name value``."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from trl import ModelConfig, TrlParser

from tracereward.data.readers import FORMATS
from tracereward.errors import InputError, nearest
from tracereward.files import nearest_path
from tracereward.training.adversarial_config import AdversarialConfig
from tracereward.training.config import MODEL_RANGES, RETIRED, RewardConfig, SupervisedConfig
from tracereward.training.fit_options import FitOptions
from tracereward.training.option_rules import check_fit, check_job, effective
from tracereward.training.option_types import check_options, option_defaults
from tracereward.training.options import DataArguments
from tracereward.training.trl_options import OTHER_NAMES, commands_with, honoured

CONFIGS = {"sft": SupervisedConfig, "train": AdversarialConfig, "grpo": RewardConfig}


class _Parser(TrlParser):
    def __init__(self, classes: Any):
        super().__init__(classes)
        hints = {name: get_args(hint) for cls in classes for name, hint in get_type_hints(cls).items()}
        for action in self._actions:  # for a mapping that may not be a text, argparse would call `dict` with the text
            kinds = hints.get(action.dest, ())
            if str not in kinds and any((get_origin(kind) or kind) is dict for kind in kinds):
                action.type = _mapping

    def error(self, message: str) -> NoReturn:
        raise InputError(message)  # argparse would print the usage of 200 options


def parse(kind: str, argv: list[str]) -> tuple[DataArguments, Any, ModelConfig, bool]:
    """Parse the arguments of a training command; see `read_options`.

    Returns:
        Data options, training options, model options, and whether ``--resume`` was given.
    """
    (data, config, model), resume = read_options(kind, (DataArguments, CONFIGS[kind], ModelConfig), argv)
    check_options(model, MODEL_RANGES)
    check_job(kind, data, config, model)
    return data, config, model, resume


def parse_fit(argv: list[str]) -> tuple[FitOptions, bool]:
    """Parse the arguments of `fit`; see `read_options`.

    Returns:
        Its options, and whether ``--resume`` was given.
    """
    (options,), resume = read_options("fit", (FitOptions,), argv)
    check_fit(options)
    return options, resume


def read_options(kind: str, classes: Any, argv: list[str]) -> tuple[Sequence[Any], bool]:
    """Parse the arguments of a command.

    With ``--resume`` and without ``--config``, the options are those in the run folder's ``config.yaml``, overridden by
    the command line.

    Args:
        kind: the command.
        classes: dataclasses of its options, the last of which has the model.
        argv: its arguments.

    Returns:
        The options as dataclasses, and whether ``--resume`` was given.

    Raises:
        InputError: unknown option (the nearest is suggested), a value that does not fit, an option that would be
            ignored, an unreadable file.
    """
    argv = [_with_underscores(word) for word in argv]
    resume = "--resume" in argv
    argv = [word for word in argv if word != "--resume"]
    known = set(option_defaults(*classes))
    if argv and not argv[0].startswith("-"):
        raise InputError(_stray(argv[0], known))
    for name in _given_names(argv):
        if name not in known | {"config"}:
            raise InputError(_unknown(f"option --{name}", name, known))
    if sum(word == "--config" or word.startswith("--config=") for word in argv) > 1:
        raise InputError("--config is given more than once: only one file is read, put all options into it")
    path, argv = _taken("config", argv)
    folder, _ = _taken("output_dir", argv)
    options: dict[str, Any] = {}
    if path is not None:
        options = _read_config(Path(path), known)
        _check_kinds(path, options, classes)
        folder = folder or options.get("output_dir")
    folder = folder or f"runs/{kind}"
    stored = Path(folder) / "config.yaml"
    if resume and path is None and stored.is_file():
        _check_kind(stored, kind)
        path, options = str(stored), _read_config(stored, known)
    if resume and path is not None and Path(path).absolute() == stored.absolute():
        options = effective(kind, options, option_defaults(*classes))
    parsed = _parsed(_Parser(classes), argv, {**options, "output_dir": folder}, known)
    of_model = parsed[-1]
    model = of_model.model if isinstance(of_model, FitOptions) else of_model.model_name_or_path
    if resume and path is None and model is None:
        raise InputError(f"{folder}: no run to resume, config.yaml is missing: check --output_dir, or start a run")
    return parsed, resume


def _mapping(text: str) -> dict[str, Any]:
    """A JSON object on the command line; argparse names the option if it is none."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(text)
    return found


def _parsed(parser: _Parser, argv: list[str], options: dict[str, Any], known: set[str]) -> Sequence[Any]:
    """The options of a file, overridden by those of the command line, as dataclasses."""
    for name, value in options.pop("env", {}).items():
        os.environ[name] = str(value)
    try:
        parser.set_defaults_with_config(**options)
        *parsed, stray = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    if stray:
        raise InputError(_stray(stray[0], known))
    return parsed


def _with_underscores(word: str) -> str:
    """``--output-dir`` as ``--output_dir``, as the parser does."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else word


def _given_names(argv: list[str]) -> list[str]:
    return [word[2:].split("=")[0] for word in argv if word.startswith("--") and len(word) > 2]


def _check_kinds(path: str, options: dict[str, Any], classes: Any) -> None:
    """Refuse values of a file that argparse would not look at: null, true or a list where a number belongs."""
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    for name, value in options.items():
        kinds = get_args(hints.get(name)) or (hints.get(name),)
        plain = {kind for kind in kinds if kind in (int, float, bool, str, type(None))}
        if len(plain) != len(kinds) or isinstance(value, str):
            continue
        number = {int, float} & plain
        fits = type(value) in plain or (isinstance(value, int) and not isinstance(value, bool) and float in plain)
        if not fits and (number or plain == {bool}) and not (type(value) is float and value.is_integer()):
            wanted = "a whole number" if number == {int} else "a number" if number else "true or false"
            raise InputError(
                f"{path}: option {name!r} must be {wanted}, not {json.dumps(value, default=str)}: change it, or remove "
                "the line"
            )


def _taken(name: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """The last value of an option, and the arguments without it."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        if word == f"--{name}":
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise InputError(f"--{name} needs a name")
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def _unknown(what: str, name: str, known: set[str]) -> str:
    ours = [other for other, theirs in OTHER_NAMES.items() if theirs == name and other in known]
    if ours:
        return f"unknown {what}: did you mean {ours[0]!r}?"
    if commands := [*commands_with(name)] if name in honoured() else []:
        return f"unknown {what}: it is one of tracereward {' and '.join(commands)}"
    near = OTHER_NAMES.get(name) or nearest(name, known)
    near = near if near in known else nearest(name, known)
    return f"unknown {what}: " + (f"did you mean {near!r}?" if near else "see `tracereward COMMAND --help`")


def _stray(word: str, known: set[str]) -> str:
    """The message about a word that belongs to no option."""
    if word.startswith("-"):
        return f"unknown option {word}: the names of options start with two hyphens"
    if word.removesuffix(".gz").endswith(FORMATS) or Path(word).exists() or "/" in word:
        name = "demonstrations" if "demonstrations" in known else "dataset_name"
        return f"{word}: no option before it; pass demonstrations as --{name} {word}"
    return f"{word!r}: no option before it; give every value behind its option, as --name {word}"


def _check_kind(path: Path, kind: str) -> None:
    """Refuse to resume the run of another command, which the first line of its ``config.yaml`` names."""
    found = re.match(r"# tracereward \S+ (\w+),", path.read_text(encoding="utf-8"))
    if found and found[1] != kind:
        raise InputError(f"{path.parent} has a run of `tracereward {found[1]}`; resume it with that command")


def _read_config(path: Path, known: set[str]) -> dict[str, Any]:
    """The options in a YAML file, without the retired ones."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, and --config needs a file")
    if not path.is_file():
        near = nearest_path(path)
        raise InputError(f"{path}: no such file" + (f" (did you mean {near}?)" if near else ""))
    try:
        text = path.read_text(encoding="utf-8")
        options, tree = yaml.safe_load(text) or {}, yaml.compose(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise InputError(f"{path}: must be a mapping of option names to values")
    seen: set[str] = set()
    for key, _ in tree.value if tree is not None else ():
        if key.value in seen:  # YAML silently takes the last one
            raise InputError(f"{path}:{key.start_mark.line + 1}: option {key.value!r} is given twice")
        seen.add(key.value)
    for name in options.keys() - known - {"env"}:
        if name not in RETIRED or options[name] != RETIRED[name]:
            raise InputError(f"{path}: " + _unknown(f"option {name!r}", str(name), known))
    folder = options.get("output_dir", "runs")
    if not isinstance(folder, str) or not folder:
        raise InputError(f"{path}: output_dir must be the name of a folder, not {folder!r}")
    if not isinstance(options.get("env", {}), dict):
        raise InputError(f"{path}: env must be a mapping of environment variables to values")
    return {name: value for name, value in options.items() if name in known | {"env"}}
