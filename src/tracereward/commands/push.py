"""`tracereward push`: upload a policy, a reward model, or both of a run folder to the Hugging Face Hub."""

from dataclasses import replace
from pathlib import Path

from tracereward.console import say
from tracereward.errors import InputError, RunFailed
from tracereward.modeling.hub import check_repository_name
from tracereward.runs.upload import Repository, check_complete, models_in, names_for, open_repositories, upload


def run_push(folder: Path, to: Repository, message: str | None = None) -> dict[str, str]:
    """Upload the models of a folder.

    Args:
        folder: a policy, a reward model, or a run folder with one or both.
        to: repository of the policy or of the only model; with a policy, the reward model goes to ``name-reward``.
        message: of the commit.

    Returns:
        The address of each model, by its kind.

    Raises:
        InputError: no finished model, or a repository that cannot be written to; nothing is uploaded then.
        RunFailed: an upload failed; with the command that repeats it.
    """
    folder = folder.expanduser()
    found = models_in(folder)
    for kind, path in found.items():
        check_complete(kind, path)
    names = names_for(list(found), to.name)
    if "/" in to.name:
        for name in names.values():
            check_repository_name(name)
    repositories = open_repositories(names, replace(to, name=""))
    addresses = {}
    for kind, repository in repositories.items():
        say(f"{found[kind]}: {kind.replace('_', ' ')}, to {repository.name}")
        try:
            addresses[kind] = upload(found[kind], repository, message)
        except InputError as error:
            raise RunFailed(f"{error}. To repeat: {repository.command(found[kind])}") from error
    return addresses
