"""What is wrong with a model's folder, read from file names and the first bytes of files; no weights are loaded."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tracereward.errors import InputError, first_line
from tracereward.files import read_json

POLICY, REWARD_MODEL = "policy", "reward_model"
"""Subfolders of a run folder."""

SETTINGS_FILE = "tracereward.json"
"""Settings that this package stores in the folder of a model."""
VERDICT_FILE = "verdict.json"
"""Verdict on a reward model, in its folder; nothing that is loaded depends on it."""

_LFS = b"version https://git-lfs"
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_MERGE = (
    "python -c \"import peft, transformers as t; m = peft.AutoPeftModelForCausalLM.from_pretrained('{0}'); "
    "m.merge_and_unload().save_pretrained('{0}-merged'); "
    "t.AutoTokenizer.from_pretrained('{1}').save_pretrained('{0}-merged')\""
)


def check_folder(folder: Path, subfolder: str) -> None:
    """Refuse a folder that cannot hold a complete model.

    Args:
        folder: an existing folder.
        subfolder: what is wanted, `POLICY` or `REWARD_MODEL`; named if `folder` is a run folder.

    Raises:
        InputError: a run folder, an adapter, GGUF files only, or files that are missing, Git LFS pointers or cut short;
            names the file and the fix.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: {_without_config(folder, subfolder)}")
    if (folder / "adapter_config.json").is_file():
        raise InputError(adapter_message(str(folder), folder / "adapter_config.json"))
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != VERDICT_FILE and path.suffix in (".json", ".safetensors", ".bin", ".model"):
            check_file(path)
    for path in weight_files(folder):
        check_header(path)


def check_file(path: Path) -> None:
    """Refuse a file that cannot be read or that stands for one in Git LFS."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LFS))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if start == _LFS:
        raise InputError(
            f"{path}: is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent} or download it"
        )


def check_header(path: Path) -> None:
    """Refuse a safetensors file that is cut short or damaged."""
    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: is damaged or cut short ({first_line(error)}): download or copy it again") from error


def weight_files(folder: Path) -> list[Path]:
    """The files with a model's weights, in the order in which transformers looks for them.

    Raises:
        InputError: there are none, or one that an index lists is missing.
    """
    for name in _SINGLE:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        try:
            listed = sorted(set(read_json(index)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: is damaged ({first_line(error)}): download or copy it again") from error
        missing = [file for file in listed if not (folder / file).is_file()]
        if missing:
            raise InputError(
                f"{folder}: {missing[0]} is missing ({len(missing)} of the {len(listed)} files that {index.name} "
                "lists): download or copy it again"
            )
        return [folder / file for file in listed]
    raise InputError(f"{folder}: no weights: {_SINGLE[0]} is missing")


def dtypes(folder: Path) -> set[str]:
    """The types of the weights in a folder's safetensors files, such as ``F32``."""
    found = set()
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)
    return found


def adapter_message(name: str, adapter_config: str | Path) -> str:
    """What to do with a LoRA adapter instead of a model.

    Args:
        name: folder or Hub id.
        adapter_config: path of its ``adapter_config.json``.
    """
    try:
        base = read_json(adapter_config)["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        fix = "name its base model there as base_model_name_or_path, then merge it"
        return f"{name}: is a LoRA adapter, not a model, and {adapter_config} does not say of which model: {fix}"
    if base.startswith((".", "/", "~")) and not Path(base).expanduser().is_dir():
        fix = "name its base model there as base_model_name_or_path, then merge it"
        return f"{name}: is a LoRA adapter of {base}, which is not on this machine ({adapter_config}): {fix}"
    tokenizer = name if any(Path(name).glob("tokenizer*")) else base
    return f"{name}: is a LoRA adapter of {base}, not a model: merge it first: {_MERGE.format(name, tokenizer)}"


def damaged_json(folder: Path) -> str | None:
    """The first file of a folder that should be JSON and is not, with what is wrong; None if there is none."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            return f"{path} is damaged ({first_line(error)}): download or copy it again"
    return None


def _without_config(folder: Path, subfolder: str) -> str:
    """What a folder without ``config.json`` is instead of a model."""
    models = [name for name in (POLICY, REWARD_MODEL) if (folder / name / "config.json").is_file()]
    if subfolder in models:
        return f"is a run folder, not a model: give {folder / subfolder}"
    if models:
        return f"is a run folder without a {subfolder.replace('_', ' ')}: it only has {folder / models[0]}"
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        return "is the folder of a run that has not finished: resume it with --resume, then give its " + subfolder
    if (folder / "adapter_config.json").is_file():
        return adapter_message(str(folder), folder / "adapter_config.json").removeprefix(f"{folder}: ")
    if any(folder.glob("*.gguf")):
        return "has GGUF files only, which cannot be trained: give the safetensors checkpoint that they were made from"
    return "not a model folder, config.json is missing"
