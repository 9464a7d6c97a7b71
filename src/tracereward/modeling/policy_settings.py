"""What a policy remembers of its training: ``tracereward.json`` next to its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from tracereward import __version__
from tracereward.console import note
from tracereward.errors import InputError
from tracereward.files import atomic_write_json, read_json
from tracereward.modeling.hub import looks_local, split_name
from tracereward.modeling.model_folder import POLICY, SETTINGS_FILE
from tracereward.modeling.rendering import Rendering


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """How the prompts of a policy's training were made, which sampling and evaluation follow.

    Attributes:
        task: name of the task.
        template: ``plain`` or ``chat``.
        chat_template_kwargs: variables of the chat template, see `Rendering`.
        date: the day that a chat template which reads the clock wrote, see `Rendering`.
        think: the texts that open and close the thinking, if they are not recognised.
    """

    task: str = "generic"
    template: str = "plain"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""
    think: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "think", tuple(self.think))  # JSON has lists

    @property
    def rendering(self) -> Rendering:
        """How prompts become text."""
        return Rendering(template=self.template, chat_template_kwargs=self.chat_template_kwargs, date=self.date)

    def write(self, folder: str | Path) -> None:
        """Write ``tracereward.json`` into the policy's folder."""
        stored = {"kind": POLICY, "tracereward_version": __version__, **asdict(self)}
        atomic_write_json(Path(folder) / SETTINGS_FILE, stored)


def remembered(name: str) -> PolicySettings | None:
    """The settings that a policy's folder or Hub repository has; None without any.

    A model that cannot be had is none of its business: `loading.check_model` names it.

    Raises:
        InputError: the file is damaged.
    """
    path = _settings_path(name)
    if path is None:
        return None
    try:
        stored = read_json(path)
        if stored.get("kind") != POLICY:
            return None
        known = {one.name for one in fields(PolicySettings)}
        settings = PolicySettings(**{key: value for key, value in stored.items() if key in known})
        settings.rendering  # noqa: B018 (checks the values)
    except (ValueError, AttributeError, TypeError, InputError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    return settings


def inherited(name: str, template: str | None, kwargs: Mapping[str, Any] | None) -> tuple[str, dict[str, Any] | None]:
    """The template and its variables where they are not given: as the model was trained, else plain; says so.

    Args:
        name: folder or Hub id of the model.
        template: as given.
        kwargs: variables of the chat template, as given.
    """
    stored = remembered(name)
    if template is None:
        template = "plain" if stored is None else stored.template
        if stored is not None and stored.template != "plain":
            note(f"{name} was trained with --template {stored.template}: it is used here too")
    elif stored is not None and stored.template != template:
        note(f"--template {template}, and {name} was trained with {stored.template}")
    given = None if kwargs is None else dict(kwargs)
    if stored is None or stored.template != template:
        return template, given
    own = dict(stored.chat_template_kwargs)
    if given is None and own:
        note(f"{name} was trained with --chat_template_kwargs '{json.dumps(own)}': used here too")
        return template, own
    if given not in (None, own):
        note(f"--chat_template_kwargs, and {name} was trained with '{json.dumps(own)}'")
    return template, given


def _settings_path(name: str) -> Path | None:
    """The file of a model's settings; of a Hub model this file alone is downloaded."""
    if looks_local(name):
        path = Path(name).expanduser() / SETTINGS_FILE
        return path if path.is_file() else None
    repository, revision = split_name(name)
    try:
        return Path(hf_hub_download(repository, SETTINGS_FILE, revision=revision))
    except Exception:  # huggingface_hub and its HTTP client raise many kinds; models of others have no such file
        return None
