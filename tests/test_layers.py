"""Imports: no torch for the package and its help, no TRL where it is not needed (`make lint` checks layers)."""

import ast
import subprocess
import sys

import pytest

from helpers.paths import ROOT

SOURCES = sorted((ROOT / "src" / "tracereward").rglob("*.py"))
FLAT = {"__init__", "__main__", "console", "errors", "files", "messages", "metrics", "selection", "thinking", "verdict"}


def test_flat_modules_are_the_known_ones():
    assert {path.stem for path in (ROOT / "src" / "tracereward").glob("*.py")} == FLAT


def test_no_import_from_trl_experimental():
    for path in SOURCES:
        assert "trl.experimental" not in path.read_text(encoding="utf-8"), path.name


FOREIGN = {"zip", "loop.run_in_executor", "rows.add_row"}
"""Calls whose signature is another library's."""


@pytest.mark.parametrize("folder", ["src", "studies", "benchmarks"])
def test_no_call_passes_more_than_four_arguments_by_position(folder):
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and len(node.args) > 4 and ast.unparse(node.func) not in FOREIGN:
                found.append(f"{path}:{node.lineno}: {ast.unparse(node.func)}")
    assert not found


def loaded(code: str) -> set[str]:
    """Names of the modules that a new interpreter has loaded after `code`."""
    report = "import atexit, sys; atexit.register(lambda: print('LOADED', *sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", report + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOADED ")]
    return set(lines[0].split()[1:])


HEAVY = {"torch", "transformers", "trl", "datasets", "numpy", "scipy"}


def test_import_does_not_load_torch():
    modules = loaded("import tracereward; dir(tracereward)")
    assert "tracereward" in modules
    assert not modules & HEAVY


def test_help_does_not_load_torch():
    code = """
import runpy
sys.argv = ["tracereward", "--help"]
try:
    runpy.run_module("tracereward", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
"""
    modules = loaded(code)
    assert "tracereward.cli" in modules
    assert not modules & HEAVY


def test_evaluate_and_calibrate_do_not_load_trl():
    """The import contract checks direct imports; this checks transitive ones."""
    modules = loaded("import tracereward.evaluate.suites, tracereward.commands.score, tracereward.serving.app")
    assert "torch" in modules
    assert "trl" not in modules


@pytest.mark.parametrize("command", ["sft", "grpo", "train", "fit"])
def test_training_help_does_not_load_torch(command):
    code = f"""
from tracereward.cli import main
sys.argv = ["tracereward", "{command}", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert not loaded(code) & (HEAVY | {"peft", "accelerate"})


def test_public_names_exist():
    import tracereward

    for name in tracereward.__all__:
        assert getattr(tracereward, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        tracereward.Trainer  # noqa: B018
