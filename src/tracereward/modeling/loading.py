"""Finding, checking and loading causal LMs, with clear errors."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tracereward.errors import InputError, first_line
from tracereward.files import nearest_path, sha256_of


def looks_local(name: str) -> bool:
    """Whether a model name is meant as a path: it exists, or is not `owner/name`."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1


def local_folder(name: str) -> Path:
    """The folder of a local model, or of a Hub model after downloading it.

    Raises:
        InputError: neither exists; suggests the nearest folder name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if looks_local(name):
        raise InputError(f"{name}: no such model folder{_suggestion(path)}.")
    try:
        return Path(snapshot_download(name))
    except Exception as error:  # the Hub client raises many kinds; each means the same to the user
        raise InputError(f"{name}: neither a local folder nor reachable on the Hub ({first_line(error)})") from error


def model_fingerprint(name: str | None) -> str | None:
    """SHA-256 of a local model's config and weight files, which change if it is trained again; a Hub model's commit.

    Raises:
        InputError: there is no such model.
    """
    if name is None:
        return None
    if not looks_local(name):
        try:
            return Path(hf_hub_download(name, "config.json")).parent.name
        except Exception as error:
            raise InputError(f"{name}: not reachable on the Hub ({first_line(error)})") from error
    total = hashlib.sha256()
    for path in sorted(local_folder(name).iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin"):
            total.update(f"{path.name} {sha256_of(path)}\n".encode())
    return total.hexdigest()


def check_model(name: str, revision: str = "main") -> None:
    """Read a causal LM's configuration, before anything slow starts.

    Raises:
        InputError: it cannot be read, or is of another class of model, which transformers would give a random LM head.
    """
    path = Path(name).expanduser()
    if looks_local(name) and not path.is_dir():
        raise InputError(
            f"{name}: no such model folder{_suggestion(path)}. Give a folder or a Hub id such as owner/name."
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{name}: not a model folder, config.json is missing")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except Exception as error:
        raise InputError(f"{name}: the model's configuration cannot be read ({first_line(error)})") from error
    kinds = config.architectures or []
    if kinds and not any(map(_is_causal, kinds)):
        raise InputError(f"{name}: is a {', '.join(kinds)}, and a causal language model is needed")


def _is_causal(architecture: str) -> bool:
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return architecture in known or architecture.endswith(("ForCausalLM", "LMHeadModel"))


def _suggestion(path: Path) -> str:
    near = nearest_path(path)
    return f" (did you mean {near}?)" if near else ""


def best_device() -> torch.device:
    """The accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def load_causal_lm(
    name: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | None = None, **kwargs: Any
) -> PreTrainedModel:
    """A causal LM in eval mode.

    Args:
        name: folder or Hub id.
        dtype: of its weights; ``auto`` for that of the checkpoint.
        device: where to put it; None leaves it where transformers loads it, as a trainer needs it.
        **kwargs: for `from_pretrained`, e.g. ``revision``.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)
    return model if device is None else model.to(device)  # pyright: ignore[reportArgumentType]
