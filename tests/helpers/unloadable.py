"""Models that pass every check but cannot be loaded: a command that checks its input too late fails otherwise."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

MARKER = "cannot-be-loaded"


def unloadable(model: Path, folder: Path) -> Path:
    """Copy a model with other weights; loading those of the copy, or of a copy of it, fails."""
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})
    (folder / MARKER).touch()
    return folder


def guard_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make transformers refuse to load marked models; on the meta device it reads no weights."""
    load = PreTrainedModel.from_pretrained.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def guarded(cls: type[PreTrainedModel], name: Any, *args: Any, **options: Any) -> Any:
        if options.get("device_map") != "meta" and (Path(str(name)) / MARKER).exists():
            raise RuntimeError(f"the weights of {name} were to be loaded")
        return load(cls, name, *args, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(guarded))
