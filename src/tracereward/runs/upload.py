"""Uploading finished models to the Hugging Face Hub: checks before a run, one commit for each model after it."""

import fnmatch
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from tracereward import __version__
from tracereward.console import is_main_process, note
from tracereward.errors import InputError, RunFailed, first_line
from tracereward.files import read_json
from tracereward.modeling.distributed import broadcast_object
from tracereward.modeling.hub import check_repository_name, hub_problem
from tracereward.modeling.loading import check_model
from tracereward.modeling.model_folder import (
    POLICY,
    REWARD_MODEL,
    SETTINGS_FILE,
    VERDICT_FILE,
    check_folder,
    weight_files,
)
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards.settings import HEAD_FILE, check_reward_model
from tracereward.runs.cards import PLAIN_CARD
from tracereward.runs.folder import Run
from tracereward.training.option_rules import values_of

CARD = "README.md"
REWARD_SUFFIX = "-reward"
"""What the reward model's repository is called after the policy's."""

_FILES = (
    *(CARD, SETTINGS_FILE, VERDICT_FILE, HEAD_FILE, "config.json", "generation_config.json"),
    *("tokenizer*", "vocab*", "merges*", "*.model", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("LICENSE*", "NOTICE*"),
)
"""The files of a model besides its weights: no optimizer states, no checkpoints, no data."""
_STALE = ("model*.safetensors", "pytorch_model*.bin", "*.index.json", HEAD_FILE, VERDICT_FILE)
"""Files of an earlier upload that would be loaded instead of, or with, the new weights, or that are about the old."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository of the Hub that exists and can be written to.

    Attributes:
        name: ``owner/name``.
        revision: branch; None is the main one.
        private: as asked for.
        token: of the account; None is that of ``hf auth login`` or ``HF_TOKEN``.
    """

    name: str
    revision: str | None = None
    private: bool | None = None
    token: str | None = None

    def command(self, folder: Path) -> str:
        """The command that uploads a folder to it."""
        private = " --private" if self.private else ""
        revision = f" --revision {shlex.quote(self.revision)}" if self.revision else ""
        return f"tracereward push {shlex.quote(str(folder))} {self.name}{private}{revision}"


def models_in(folder: Path) -> dict[str, Path]:
    """The finished models of a folder: of a run folder one or two, else the folder itself; each by its kind.

    Raises:
        InputError: there is none; with what it is instead.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a run folder, a policy or a reward model")
    if (folder / "config.json").is_file():
        return {_kind(folder): folder}
    found = {kind: folder / kind for kind in (POLICY, REWARD_MODEL) if (folder / kind / "config.json").is_file()}
    if not found:
        check_folder(folder, POLICY)
    return found


def _kind(folder: Path) -> str:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return POLICY
    try:
        return str(read_json(path).get("kind", REWARD_MODEL))
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}") from error


def check_complete(kind: str, folder: Path) -> None:
    """Check that a model would load; reads no weights.

    Raises:
        InputError: a file or weights are missing or damaged.
    """
    if kind == REWARD_MODEL:
        check_reward_model(str(folder))
    else:
        check_model(str(folder))
        load_tokenizer(str(folder))


def names_for(kinds: list[str], name: str) -> dict[str, str]:
    """The repository of each model: `name`, and with a policy ``name-reward`` for the reward model."""
    return {kind: name + REWARD_SUFFIX if kind == REWARD_MODEL and len(kinds) > 1 else name for kind in kinds}


def open_repositories(names: dict[str, str], like: Repository) -> dict[str, Repository]:
    """Create the repositories that do not exist, and check that they can be written to.

    Args:
        names: by kind of model; ``name`` alone is one of the token's owner.
        like: branch, visibility and token of all.

    Raises:
        InputError: without a valid token, or with a name or a repository that cannot be written to; with the fix.
    """
    api = HfApi(token=like.token, library_name="tracereward", library_version=__version__)
    with _explained(next(iter(names.values()))):
        user = api.whoami()["name"]
    full = {kind: name if "/" in name else f"{user}/{name}" for kind, name in names.items()}
    for name in full.values():
        check_repository_name(name)
    for name in full.values():
        with _explained(name):
            api.create_repo(name, private=like.private, exist_ok=True)
            api.auth_check(name, write=True)
            if like.private and not api.model_info(name).private:
                raise InputError(f"{name} exists and is public: make it private in its settings, or use another name")
            if like.revision is not None:
                api.create_branch(name, branch=like.revision, exist_ok=True)
    return {
        kind: Repository(name=name, revision=like.revision, private=like.private, token=like.token)
        for kind, name in full.items()
    }


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Re-raise what huggingface_hub raises before or during an upload as `InputError` with the fix."""
    try:
        yield
    except InputError:
        raise
    except LocalTokenNotFoundError as error:
        raise InputError(
            f"{name}: uploading needs a token with write access: log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            fix = f"the token is not valid ({first_line(error)}): log in with `hf auth login`, or set HF_TOKEN"
        elif status == 403:
            fix = (
                f"the token may not write there ({first_line(error)}): use another owner, or a token with write access"
            )
        elif status >= 500:
            fix = f"the Hub answers with an error ({status}): try again later"
        else:
            fix = f"the Hub refuses ({first_line(error)})"
        raise InputError(f"{name}: {fix}") from error
    except OfflineModeIsEnabled as error:
        raise InputError(f"{name}: HF_HUB_OFFLINE forbids uploads: unset it") from error
    except ValueError as error:
        fix = f"; edit {CARD}" if CARD in str(error) else ""  # its metadata
        raise InputError(f"{name}: {' '.join(str(error).split()).rstrip('.')}{fix}") from error
    except Exception as error:  # of the connection
        raise InputError(f"{name}: {hub_problem(error, name).removeprefix('not in the local cache, and ')}") from error


def files_of(folder: Path) -> list[Path]:
    """The files of a model that are uploaded: configuration, tokenizer, weights, settings and card."""
    weights = weight_files(folder)
    indices = [path for path in folder.glob("*.index.json") if len(weights) > 1]
    rest = [path for path in folder.iterdir() if any(fnmatch.fnmatch(path.name, pattern) for pattern in _FILES)]
    return sorted(path for path in {*weights, *indices, *rest} if path.is_file())


def upload(folder: Path, repository: Repository, message: str | None = None) -> str:
    """Upload a model in one commit, which also removes the weights of an earlier upload; returns its address.

    Raises:
        InputError: it failed; with the fix.
    """
    api = HfApi(token=repository.token, library_name="tracereward", library_version=__version__)
    files = {path.name: path for path in files_of(folder)}
    with _explained(repository.name):
        present = api.list_repo_files(repository.name, revision=repository.revision)
        stale = [
            name
            for name in present
            if "/" not in name and name not in files and any(fnmatch.fnmatch(name, pattern) for pattern in _STALE)
        ]
        api.create_commit(
            repository.name,
            [
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, _content(path, repository)) for name, path in files.items()),
                *([] if CARD in {*files, *present} else [CommitOperationAdd(CARD, PLAIN_CARD.encode())]),
            ],
            commit_message=message or f"Upload a {folder.name.replace('_', ' ')} of tracereward {__version__}",
            revision=repository.revision,
        )
    place = f"/tree/{repository.revision}" if repository.revision else ""
    return f"{api.endpoint}/{repository.name}{place}"


def _content(path: Path, repository: Repository) -> str | bytes:
    """What to upload for a file: the file, but a card whose example loads the model by its name on the Hub."""
    if path.name != CARD:
        return str(path)
    text, name = path.read_text(encoding="utf-8"), repository.name
    for kind in (POLICY, REWARD_MODEL):
        text = text.replace(f'from_pretrained("{kind}")', f'from_pretrained("{name}")')
    return text.encode()


def repositories_of(run: Run, kinds: list[str]) -> dict[str, Repository]:
    """The repositories of a run's models, checked; none without ``--push_to_hub``.

    Called before any model is loaded, so that a run does not fail at its end. A collective call.

    Raises:
        InputError: see `open_repositories`.
    """
    given = values_of(*run.job.options)
    if not given.push_to_hub:
        return {}
    found: dict[str, Repository] | InputError = {}
    if is_main_process():
        like = Repository(
            name="", revision=given.hub_revision, private=given.hub_private_repo, token=given.hub_token or None
        )
        try:
            found = open_repositories(names_for(kinds, given.hub_model_id or run.folder.name), like)
        except InputError as error:
            found = InputError(f"--push_to_hub: {error}")
    found = broadcast_object(found)
    if isinstance(found, InputError):
        raise found
    return found


def upload_all(run: Run, repositories: dict[str, Repository]) -> None:
    """Upload a finished run's models.

    Raises:
        RunFailed: an upload failed, after the others were tried: with the command that repeats it. The run is complete.
    """
    failed = []
    for kind, repository in repositories.items() if is_main_process() else ():
        folder = run.folder / kind
        try:
            note(f"{kind.replace('_', ' ')}: {upload(folder, repository)}")
        except InputError as error:
            failed.append(f"{error}. To repeat: {repository.command(folder)}")
    if failed:
        raise RunFailed(f"the run is complete in {run.folder}, but its upload failed: " + "\n".join(failed))
