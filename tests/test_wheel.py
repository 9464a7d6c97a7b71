"""The wheel as pip installs it."""

import configparser
import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import tracereward
from helpers.paths import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the installed contents of the wheel."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed: it builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.long
def test_wheel_contains_only_package(site):
    (information,) = site.glob("*.dist-info")
    assert {path.name for path in site.iterdir()} == {"tracereward", information.name}
    names = {path.relative_to(site / "tracereward").as_posix() for path in (site / "tracereward").rglob("*")}
    page = {f"serving/page/{name}" for name in ("index.html", "page.js", "page.css")}
    assert {"__init__.py", "cli/__init__.py", "py.typed", *page} <= names
    assert not [name for name in names if name.split("/")[0] in ("studies", "tests") or "test_" in name]
    required = Parser().parsestr((information / "METADATA").read_text()).get_all("Requires-Dist", [])
    assert any(re.match(r"fastapi-offline\b.*extra == 'serve'", one) for one in required)  # the files of /docs
    entries = configparser.ConfigParser()
    entries.read(information / "entry_points.txt")
    assert dict(entries["console_scripts"]) == {"tracereward": "tracereward.cli:main"}


@pytest.mark.long
def test_exported_names_have_known_types(site, tmp_path):
    """Exported names and all symbols that their signatures and attributes reference."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    checked = subprocess.run(
        ["pyright", "--outputjson", "--verifytypes", "tracereward", "--ignoreexternal"],
        cwd=tmp_path,  # outside the source tree and its settings
        env={**os.environ, "PATH": path, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    report = json.loads(checked.stdout)["typeCompleteness"]
    assert report["pyTypedPath"] == str(site / "tracereward/py.typed")  # not the editable install
    symbols = report["symbols"]
    names = [symbol["name"] for symbol in symbols]
    # Pyright reports names in order, each with its references; `__getattr__` comes after the imports.
    exported = symbols[: names.index("tracereward.__getattr__")]
    assert {f"tracereward.{name}" for name in tracereward.__all__ if name != "__version__"} <= {
        symbol["name"] for symbol in exported
    }
    unknown = [symbol for symbol in exported if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]]
    assert not unknown, [(symbol["name"], [said["message"] for said in symbol["diagnostics"]]) for symbol in unknown]
