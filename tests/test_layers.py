"""Dependencies point one way: the arrows of ARCHITECTURE.md, read from the import statements."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import detente

ROOT = Path(detente.__file__).parent

# part of the library -> the other parts of it that it may import
ARROWS: dict[str, set[str]] = {
    "compiled": set(),  # loaded by gramian where it can be
    "gramian": set(),
    "solvers": set(),
    "nn": set(),
    "method": {"gramian", "solvers"},
    "methods": {"method", "solvers", "gramian", "nn"},
    "engine": {"gramian"},
    "losses": set(),
    "history": set(),
    "resolve": {"engine", "losses", "method", "gramian"},
    "watch": {"engine", "method"},
    "backward": {"engine", "losses", "method", "resolve", "watch"},
    "aggregate": {"engine", "method", "resolve"},
    "step": {"backward", "engine", "losses", "method", "watch"},
    "__init__": {"aggregate", "backward", "diagnostics", "engine.source", "history", "method", "methods", "nn", "step"},
}
ABOVE = {"benchmark", "diagnostics", "integrations"}  # on top: they may import anything of the library
LIBRARIES = {"torch", "numpy"} | sys.stdlib_module_names
EXTRAS = {"compiled": {"numba"}}  # of a part of the core that the rest can do without


def part(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, also inside functions and under TYPE_CHECKING."""
    package = ["detente", *path.relative_to(ROOT).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else str(node.module)
            submodules = [f"{base}.{alias.name}" for alias in node.names if is_module(f"{base}.{alias.name}")]
            names |= set(submodules) or {base}
    return names


def is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def within(names: set[str]) -> set[str]:
    """The parts of the library among imported names: ``engine.source`` for ``detente.engine.source``."""
    return {name.partition(".")[2] for name in names if name.split(".")[0] == "detente"}


FILES = sorted(ROOT.rglob("*.py"))
CORE = [path for path in FILES if part(path) not in ABOVE]


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_keeps_to_its_arrows(path):
    here = part(path)
    assert here in ARROWS, f"say in ARROWS what {here} may import"
    for target in within(imports(path)):
        allowed = target.split(".")[0] == here or any(target == a or target.startswith(f"{a}.") for a in ARROWS[here])
        assert allowed, f"{path.relative_to(ROOT)} must not import detente.{target}"


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_needs_torch_and_numpy_only(path):
    foreign = {name.split(".")[0] for name in imports(path)} - LIBRARIES - {"detente"} - EXTRAS.get(part(path), set())
    assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_outside_imports_the_benchmark(path):
    if part(path) != "benchmark":
        assert not {t for t in within(imports(path)) if t.split(".")[0] == "benchmark"}


def test_engine_and_methods_do_not_know_each_other():
    for path in CORE:
        targets = {t.split(".")[0] for t in within(imports(path))}
        if part(path) == "methods":
            assert not targets & {"engine", "backward", "step"}
            assert not {n for n in imports(path) if n.startswith(("torch.autograd", "torch.distributed"))}
        if part(path) == "engine":
            assert not targets & {"method", "methods", "nn", "solvers"}


def test_importing_detente_loads_no_optional_library():
    """In a fresh interpreter: neither the comparison tool nor what it needs is loaded."""
    optional = "typer rich plotly sklearn scipy jinja2 matplotlib yaml filelock pandas tensorboard numba"
    optional += " lightning accelerate transformers"
    code = (
        "import sys, torch; before = set(sys.modules); import detente; new = set(sys.modules) - before; "
        f"loaded = {{m.split('.')[0] for m in new}} & set('{optional}'.split()); assert not loaded, loaded; "
        "assert not [m for m in new if m.startswith('detente.benchmark')]"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT.parent), "OMP_NUM_THREADS": "1"}
    )
