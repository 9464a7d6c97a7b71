"""Imports go down only, and the package and its help start without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "tracereward"

# From the bottom up; a module may import from its own layer and from those below.
LAYERS = [
    ("maths", "errors masks objectives shaping perturb metrics calibration rerank scores files estimate"),
    (
        "models and data",
        "adapters alignment batching demonstrations drawing guide heads log_probs reading models reward_func "
        "reward_model reward_settings sampling scorer sharding shared_prompts surface tasks traces vllm_scorer",
    ),
    (
        "training",
        "adversarial_config bridge config callbacks checkpoints discriminator failures micro_batches monitor negatives "
        "penalties rollouts trainer update_plan validation warmup watch",
    ),
    (
        "applications",
        "correct decode distill evaluate guided_rows outcome outputs run run_folder run_report inspection "
        "inspection_terminal pool report plots quickstart score_ray scored_rows shards serving studies tables "
        "arguments",
    ),
    ("command line", "cli cli_evaluate cli_reward cli_serve __main__"),
]
# The package itself holds only the version and names that load on first use.
RANK = {"__init__": 0} | {name: rank for rank, (_, names) in enumerate(LAYERS) for name in names.split()}


def module_of(path: Path) -> str:
    """First part of a module's name below the package: tasks/answers.py belongs to tasks."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module below the package) of each import, also those inside functions and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import; write the full name"
            names = [node.module or ""]
            if node.module == "tracereward":
                submodules = [alias.name for alias in node.names if alias.name in RANK]
                names = [f"tracereward.{name}" for name in submodules]
        for name in names:
            parts = name.split(".")
            if parts[0] == "tracereward" and len(parts) > 1:
                found.append((node.lineno, parts[1]))
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_a_layer():
    assert {module_of(path) for path in SOURCES} == RANK.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    module = module_of(path)
    if module == "__init__":
        return
    for line, imported in imports(path):
        assert RANK[imported] <= RANK[module], (
            f"{path.name}:{line}: {module} ({LAYERS[RANK[module]][0]}) imports {imported} "
            f"({LAYERS[RANK[imported]][0]}), which is above it"
        )


def test_no_cycles():
    """Within a layer too: following imports never comes back."""
    below = {}
    for path in SOURCES:
        module = module_of(path)
        if module != "__init__":
            below.setdefault(module, set()).update(name for _, name in imports(path) if name != module)

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail, module])
        for name in below.get(module, ()):
            visit(name, [*trail, module])

    for module in below:
        visit(module, [])


def test_maths_know_no_models():
    """Pure functions on tensors and lists: no transformers, no TRL, no data sets."""
    for name in LAYERS[0][1].split():
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for imported in names:
                assert imported.split(".")[0] not in {"transformers", "trl", "peft", "datasets", "accelerate"}, name


def test_nothing_is_taken_from_trls_experimental_part():
    for path in SOURCES:
        assert "trl.experimental" not in path.read_text(encoding="utf-8"), path.name


def loaded(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after `code`."""
    report = "import atexit, sys; atexit.register(lambda: print('LOADED', *sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", report + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOADED ")]
    return set(lines[0].split()[1:])


HEAVY = {"torch", "transformers", "trl", "datasets", "numpy", "scipy"}


def test_importing_the_package_loads_no_torch():
    modules = loaded("import tracereward; dir(tracereward)")
    assert "tracereward" in modules
    assert not modules & HEAVY


def test_help_answers_without_torch():
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


def test_public_names_are_all_there():
    import tracereward

    for name in tracereward.__all__:
        assert getattr(tracereward, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        tracereward.Trainer  # noqa: B018
