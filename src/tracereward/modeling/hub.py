"""Models on the Hugging Face Hub: their names, downloads, and what is wrong when one cannot be had."""

import contextlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm, validate_repo_id

from tracereward.errors import InputError, first_line

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@.+)?")
_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.md", "tokenizer*", "vocab*", "*.safetensors"]
_OTHER_FORMATS = ["*/*.safetensors", "consolidated*.safetensors"]
"""Weights that other programs read: those of the model are in its top folder."""

_seen: set[str] = set()
"""Names looked up by this process: later the same files are in the cache, and a progress bar would only be noise."""


class _Silent(tqdm):
    """No progress bar."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "disable": True})


def looks_local(name: str) -> bool:
    """Whether a model name is meant as a path: it exists, or is not ``owner/name`` or ``owner/name@revision``."""
    return Path(name).expanduser().exists() or name.startswith(".") or _NAME.fullmatch(name) is None


def split_name(name: str) -> tuple[str, str | None]:
    """Repository and revision of ``owner/name`` or ``owner/name@revision``."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def with_revision(name: str, revision: str | None) -> str:
    """The name of a model with a revision: ``owner/name@revision``; unchanged for the main branch.

    Args:
        name: folder, ``owner/name`` or ``owner/name@revision``.
        revision: branch, tag or commit; None is the one in the name, or the main branch.

    Raises:
        InputError: it is a folder, or has another revision.
    """
    if revision in (None, constants.DEFAULT_REVISION):
        return name
    if looks_local(name):
        raise InputError(f"{name}: a folder has no revision {revision}: remove it, or give owner/name on the Hub")
    repository, inside = split_name(name)
    if inside not in (None, revision):
        raise InputError(f"{name}: its revision is {inside}, and {revision} is given too: remove one of the two")
    return f"{repository}@{revision}"


def check_repository_name(name: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        InputError: with the rule that it breaks.
    """
    if "@" in name:
        raise InputError(f"{name}: not a name of a repository on the Hub: give the branch with --revision, without @")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{name}: not a name of a repository on the Hub: {first_line(error)}") from error
    if name.count("/") != 1:
        raise InputError(f"{name}: not a name of a repository on the Hub: give owner/name")


def download(name: str) -> Path:
    """The folder of a Hub model, in the cache of huggingface_hub, with its configuration, tokenizer and weights.

    Args:
        name: ``owner/name`` or ``owner/name@revision``.

    Raises:
        InputError: it does not exist, cannot be accessed or downloaded; with the fix.
    """
    repository, revision = split_name(name)
    check_repository_name(repository)
    options: Any = {"revision": revision, "tqdm_class": _Silent if name in _seen else None}
    _seen.add(name)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=_FILES, ignore_patterns=_OTHER_FORMATS, **options))
        if not any((*folder.glob("*.safetensors"), *folder.glob("adapter_config.json"))):
            snapshot_download(repository, allow_patterns=["pytorch_model*.bin"], **options)
    except Exception as error:  # huggingface_hub and its HTTP client raise many kinds
        raise InputError(f"{name}: {hub_problem(error, repository, revision)}") from error
    return folder


def hub_problem(error: Exception, repository: str, revision: str | None = None) -> str:
    """What an error of huggingface_hub means to a user, and the fix."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and isinstance(cause, Exception):
        causes.append(cause)
    if any(isinstance(one, OfflineModeIsEnabled) for one in causes):
        return "not in the local cache, and HF_HUB_OFFLINE forbids downloads: unset it, or give a local folder"
    status = next((one.response.status_code for one in causes if isinstance(one, HfHubHTTPError)), None)
    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, GatedRepoError):
        return f"its authors decide who may download it: ask for access at {page}, then log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r} on the Hub{_revisions(repository)}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "neither a local folder nor a model on the Hub that you have access to: check the name; if it is private, "
            "log in with `hf auth login`"
        )
    if status in (401, 403):
        return f"the Hub refuses access ({first_line(error)}): log in with `hf auth login`, with a token that may"
    if status is not None and status >= 500:
        return f"the Hub answers with an error ({status}) and it is not in the local cache: try again later"
    if isinstance(error, LocalEntryNotFoundError | ConnectionError) or _is_http_error(error):
        why = first_line(causes[-1])
        return f"not in the local cache, and the Hub cannot be reached at {constants.ENDPOINT} ({why})"
    return f"cannot be downloaded ({first_line(error)})"


def card_metadata(base: str, **fields: Any) -> str:
    """The metadata of a model card, as YAML.

    A model that was trained from a folder has the base model and the license that the card of the folder names; the
    Hub takes no paths as base models.

    Args:
        base: folder or Hub id that the model was trained from; empty if unknown.
        **fields: of `huggingface_hub.ModelCardData`.
    """
    known: dict[str, Any] = {}
    card = Path(base).expanduser() / "README.md"
    if base and not looks_local(base):
        repository, revision = split_name(base)
        known["base_model"] = repository
        card = try_to_load_from_cache(repository, "README.md", revision=revision)
    if isinstance(card, str | Path) and base and Path(card).is_file():
        with contextlib.suppress(Exception):  # another tool's file; only a courtesy
            stated = ModelCard.load(card).data.to_dict()
            known = {name: stated.get(name) for name in ("license", "base_model")} | known
    return ModelCardData(**{**known, **fields}).to_yaml().strip()


def _is_http_error(error: Exception) -> bool:
    """Whether an error is of the HTTP client, whichever huggingface_hub has."""
    return type(error).__module__.split(".")[0].startswith("httpx")


def _revisions(repository: str) -> str:
    """The branches and tags of a repository, for a message; empty if they cannot be had."""
    try:
        refs = HfApi().list_repo_refs(repository)
    except Exception:  # only a hint
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return f": it has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
