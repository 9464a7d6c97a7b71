"""Finding, checking and loading models, with clear errors: every `from_pretrained` of a model, configuration or
tokenizer.

`load_model` is strict: transformers fills weights that a checkpoint lacks with random numbers and only logs it. The
checks load the model on the meta device, which reads names and shapes of weights, not the weights.
"""

import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from tracereward.console import note
from tracereward.errors import InputError, Interrupted, first_line
from tracereward.files import nearest_path, read_json, sha256_of
from tracereward.modeling.distributed import share_cores, zero3_disabled
from tracereward.modeling.hub import download, looks_local, with_revision
from tracereward.modeling.model_folder import POLICY, SETTINGS_FILE, check_folder, damaged_json, dtypes, weight_files

BackboneClass = type[AutoModelForCausalLM] | type[AutoModelForTokenClassification]
CAUSAL_LM = AutoModelForCausalLM
CLASSIFIER = AutoModelForTokenClassification
NEW_HEAD = ("score", "classifier")
"""Names of a token classifier's head, which a causal LM's checkpoint does not have."""


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a local model, or of a Hub model after downloading it; an existing folder comes before the Hub.

    Args:
        name: folder, or ``owner/name`` or ``owner/name@revision`` on the Hub.
        revision: branch, tag or commit of a Hub model.

    Raises:
        InputError: there is no such model, or it cannot be downloaded; suggests the nearest folder name.
    """
    if not isinstance(name, (str, Path)) or not str(name):
        raise InputError(f"a model must be a folder or a Hub id, not {name!r:.80}")
    name = with_revision(str(name), revision)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if looks_local(name):
        folder, _, inside = name.rpartition("@")
        if folder and Path(folder).expanduser().is_dir():
            raise InputError(f"{name}: {folder} is a folder, which has no revision: leave out @{inside}")
        raise InputError(f"{_no_folder(name, path)} Give a folder or a Hub id such as owner/name.")
    return download(name)


def model_fingerprint(name: str | None) -> str | None:
    """SHA-256 of a local model's config and weight files, which change if it is trained again; a Hub model's commit.

    Raises:
        InputError: there is no such model.
    """
    if name is None:
        return None
    if not looks_local(name):
        return local_folder(name).name
    total = hashlib.sha256()
    for path in sorted(local_folder(name).iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin"):
            total.update(f"{path.name} {sha256_of(path)}\n".encode())
    return total.hexdigest()


def check_model(name: str) -> None:
    """Check a causal LM's files, its configuration and the names and shapes of its weights; loads no weights.

    A model on the Hub is downloaded before.

    Raises:
        InputError: a file is missing or damaged, the folder is not a causal LM's, or weights do not fit the model.
    """
    folder = local_folder(name)
    with called(name, folder):
        check_folder(folder, POLICY)
        _check_is_policy(folder)
        kinds = read_config(folder).architectures or []
        if kinds and not any(map(_is_causal, kinds)):
            raise InputError(f"{folder}: is a {', '.join(kinds)}, and a causal language model is needed")
        check_weights(folder, CAUSAL_LM)


@contextlib.contextmanager
def called(name: str | Path, folder: Path) -> Iterator[None]:
    """Errors about the folder of a model call it by its name, not by its place in the cache."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(folder), str(name))) from error


def context_length(config: Any) -> float:
    """Longest text that a model reads, in tokens; infinity if its configuration has no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def read_config(name: str | Path, revision: str | None = None) -> Any:
    """The configuration of a model.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit of a Hub model.

    Raises:
        InputError: it cannot be read.
    """
    folder = local_folder(name, revision)
    with _explained(name, folder, "the model's configuration cannot be read"):
        return AutoConfig.from_pretrained(folder)


def check_weights(folder: Path, auto: BackboneClass) -> None:
    """Check that a local checkpoint has every weight of its model, in its shape; reads no weights.

    Args:
        folder: the checkpoint.
        auto: `CAUSAL_LM` or `CLASSIFIER`.

    Raises:
        InputError: names the weights; or the package of a quantised model is not installed.
    """
    quantised = read_config(folder).to_dict().get("quantization_config")
    if quantised is None:
        with zero3_disabled():
            load_model(auto, folder, device_map="meta")
        return
    method = quantised.get("quant_method", "an unknown method")
    with _explained(folder, folder, f"is quantised with {method}"):
        AutoHfQuantizer.from_config(quantised, pre_quantized=True).validate_environment(device_map=None)
    if method == "bitsandbytes" and not {"U8", "I8"} & dtypes(folder):
        raise InputError(f"{folder}: config.json says that it is quantised with {method}, and its weights are not")


def _check_is_policy(folder: Path) -> None:
    """Refuse a reward model, whose causal LM would pass for a policy."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return
    try:
        kind = read_json(path).get("kind")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if kind != POLICY:
        beside = folder.parent / POLICY
        fix = f"; give {beside}" if (beside / "config.json").is_file() else ""
        raise InputError(f"{folder}: is a reward model, and a causal language model such as a policy is needed{fix}")


def _is_causal(architecture: str) -> bool:
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return architecture in known or architecture.endswith(("ForCausalLM", "LMHeadModel"))


def _no_folder(name: str, path: Path) -> str:
    if path.exists():
        return f"{name}: is a file, and a model's folder is needed here (commands take the model first, then the data)."
    near = nearest_path(path)
    return f"{name}: no such model folder{f' (did you mean {near}?)' if near else ''}."


def best_device() -> torch.device:
    """The accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def load_model(
    auto: BackboneClass,
    name: str | Path,
    new: Collection[str] = (),
    *,
    revision: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A model in eval mode, with every weight from its checkpoint.

    Args:
        auto: `CAUSAL_LM` or `CLASSIFIER`.
        name: folder or Hub id.
        new: names of modules that start at random on purpose, whether the checkpoint has them or not.
        revision: branch, tag or commit of a Hub model.
        **kwargs: for `from_pretrained`.

    Raises:
        InputError: it cannot be loaded, or weights are missing, of another shape or of layers that the model lacks.
    """
    folder = local_folder(name, revision)
    share_cores()
    with _explained(name, folder, "the model cannot be loaded"), _quiet():
        model, found = auto.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    if missing := sorted(key for key in found["missing_keys"] if key.split(".")[0] not in new):
        raise InputError(
            f"{name} is not complete: its weights lack {_listed(missing)}: download it again, or save it as "
            f"{type(model).__name__}"
        )
    if wrong := sorted(one for one in found["mismatched_keys"] if one[0].split(".")[0] not in new):
        key, stored, needed = wrong[0]
        raise InputError(
            f"{name}: {key} has shape {tuple(stored)} in its weights, and config.json asks for {tuple(needed)}"
            f"{f' ({len(wrong)} weights in all)' if len(wrong) > 1 else ''}: config and weights are of two models"
        )
    modules = {name for name, _ in model.named_modules()}
    unexpected = sorted(key for key in found["unexpected_keys"] if key.split(".")[0] not in new)
    unused = {key: ".".join(key.split(".")[:2]) in modules for key in unexpected}
    if inner := [key for key, inside in unused.items() if inside]:
        raise InputError(
            f"{name}: its weights have {_listed(inner)}, which config.json does not describe: config and weights are "
            "of two models"
        )
    if unused and not new:  # modules next to the model, such as a value head or the tower of an image model
        note(f"{name}: weights that are not used: {_listed(list(unused))}")
    return model


def _listed(names: list[str]) -> str:
    """Up to three names and how many there are."""
    return ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "")


def load_causal_lm(
    name: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | None = None, **kwargs: Any
) -> PreTrainedModel:
    """A causal LM in eval mode.

    Args:
        name: folder or Hub id.
        dtype: of its weights; ``auto`` for that of the checkpoint.
        device: where to put it; None leaves it where transformers loads it, as a trainer needs it.
        **kwargs: for `from_pretrained`, e.g. ``revision``.

    Raises:
        InputError: see `load_model`.
    """
    model = load_model(CAUSAL_LM, name, dtype=dtype, **kwargs)
    if device is None:
        return model
    with _explained(name, None, "the model does not fit on the device"):
        return model.to(device)  # pyright: ignore[reportArgumentType]


def new_classifier(
    name: str | Path, *, revision: str | None = None, bias: bool = False, labels: int = 1, **kwargs: Any
) -> PreTrainedModel:
    """A token classifier: the backbone of a causal LM, or of a token classifier, under a new random head.

    Args:
        name: folder or Hub id of the model.
        revision: branch, tag or commit of a Hub model.
        bias: whether the head has one.
        labels: logits of a token.
        **kwargs: for `from_pretrained`.

    Raises:
        InputError: see `load_model`; or transformers has no classifier of this architecture.
    """
    config = read_config(name, revision)
    config.num_labels = labels
    config.classifier_dropout = 0.0  # the default of 0.1 would make rewards random in training
    config.token_classification_bias = bias
    quantization = copy.copy(kwargs.pop("quantization_config", None))
    if quantization is not None:
        quantization.llm_int8_skip_modules = list(NEW_HEAD)  # in 4 bits too, despite its name
        kwargs["quantization_config"] = quantization
    if config.model_type not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES:
        raise InputError(
            f"{name}: transformers has no token-classification class for this architecture; use --head action"
        )
    return load_model(CLASSIFIER, name, NEW_HEAD, config=config, revision=revision, **kwargs)


def exact_head(model: PreTrainedModel, name: str | Path) -> PreTrainedModel:
    """Give the head of a token classifier in 16 bits its stored values in float32, for scoring.

    Of 16-bit products many would be equal, and traces with them. The head reads float32, see
    `exact_classifier`.

    Args:
        model: as `load_model` made it, in any precision; changed in place.
        name: the folder or Hub id that it was loaded from.
    """
    heads = {key: layer for key, layer in model.named_children() if key in NEW_HEAD and type(layer) is nn.Linear}
    if not heads or model.dtype == torch.float32:
        return model
    for layer in heads.values():
        layer.float()
    for path in weight_files(local_folder(name)):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    if key.split(".")[0] in heads:
                        model.get_parameter(key).data.copy_(file.get_tensor(key))
    return model


def read_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer that pads at the left, checked to fit the embedding of the model that it is stored with.

    Raises:
        InputError: it cannot be loaded, or has ids that the embedding lacks.
    """
    folder = local_folder(name)
    with _explained(name, folder, "the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    files = type(tokenizer).vocab_files_names.values()
    if not any((folder / file).is_file() for file in (*files, "tokenizer.json")):
        raise InputError(f"{name}: no tokenizer: tokenizer.json is missing")
    if not (folder / "config.json").is_file():
        return tokenizer
    rows = read_config(folder).get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise InputError(
            f"{name}: its tokenizer has ids up to {largest}, and the embedding has {rows} rows: call "
            "resize_token_embeddings(len(tokenizer)) on the model and save it again, or use the tokenizer it was "
            "trained with"
        )
    return tokenizer


def read_generation_config(name: str | Path) -> GenerationConfig | None:
    """The generation config of a model; None if it has none.

    Raises:
        InputError: the file is damaged.
    """
    folder = local_folder(name)
    if not (folder / "generation_config.json").is_file():
        return None
    with _explained(name, folder, "generation_config.json cannot be read"):
        return GenerationConfig.from_pretrained(folder)


def end_ids(name: str | Path) -> set[int]:
    """The tokens that end a completion by a model's ``generation_config.json``; empty if it has none."""
    config = read_generation_config(name)
    declared = None if config is None else config.eos_token_id
    return {declared} if isinstance(declared, int) else {*(declared or ())}


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A full, frozen copy of a model that was just loaded, for its log-probs."""
    if deepspeed.is_deepspeed_zero3_enabled():
        name, revision = origin(model)
        with zero3_disabled():
            other = load_causal_lm(name, model.dtype, revision=revision)
    else:
        other = copy.deepcopy(model)
    return other.eval().requires_grad_(False)


def origin(model: PreTrainedModel) -> tuple[str, str | None]:
    """Where a model was loaded from: a folder and None, or a Hub id and a commit."""
    config: Any = model.config
    name = config._name_or_path
    return name, None if Path(name).is_dir() else vars(config).get("_commit_hash")


@contextlib.contextmanager
def _explained(name: str | Path, folder: Path | None, what: str) -> Iterator[None]:
    """Re-raise whatever transformers raises about a model as `InputError` with its name.

    transformers, tokenizers, safetensors, torch and the packages of quantised models raise many kinds of errors; all
    are about this model.
    """
    try:
        yield
    except (InputError, Interrupted):
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise InputError(f"{name}: too large for the memory of this machine ({first_line(error)})") from error
    except Exception as error:
        damaged = damaged_json(folder) if folder and isinstance(error, (json.JSONDecodeError, OSError)) else None
        raise InputError(damaged or f"{name}: {what} ({first_line(error)})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No load report and progress bar of transformers: `load_model` checks the report, downloads have their own bar."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
