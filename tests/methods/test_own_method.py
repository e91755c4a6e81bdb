"""Adding a method is one new file: in any folder it is in the registry, on the command line and under test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import detente

TESTS = Path(__file__).parents[1]

TOY = '''"""A method of a user."""

from detente.method import GramianMethod, Paper
from detente.solvers import unit


class Toy(GramianMethod):
    """Toy: the mean of the unit gradients (Nobody 2026).

    Example:
        >>> Toy().name
        'toy'
    """

    name = "toy"
    paper = Paper("nobody2026toy", "A Toy", "Nobody, Ada", "Nowhere", 2026)
    homogeneity = 0.0
    row_scale = ("invariant",)

    def rule(self, gramian, context):
        norms, _ = unit(gramian)
        return 1 / norms / context.alive.sum(-1, keepdims=True).clip(1)
'''


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DETENTE_METHODS": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=TESTS.parent
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    return tmp_path


def test_registry(folder):
    code = (
        "import detente, torch; assert 'toy' in detente.list_methods(); method = detente.get_method('toy'); "
        "assert detente.Toy is type(method); print(detente.aggregate(torch.eye(2) * 4, method).tolist()); "
        "print(detente.cite('toy'))"
    )
    found = command(folder, "-c", code)
    assert found.returncode == 0, found.stderr
    assert "[0.5, 0.5]" in found.stdout
    assert "@inproceedings{nobody2026toy" in found.stdout
    assert "toy" not in detente.list_methods()  # without the folder it is not there


def test_command_line(folder, tmp_path):
    listed = command(folder, "-m", "detente.benchmark", "methods")
    assert listed.returncode == 0, listed.stderr
    assert "Nobody 2026" in listed.stdout
    own = str(TESTS / "benchmark/tiny_problem.py")
    arguments = ("compare", own, "--methods", "toy", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path / "out"))
    run = command(folder, "-m", "detente.benchmark", *arguments)
    assert run.returncode == 0, run.stderr + run.stdout
    assert "toy" in (tmp_path / "out/results.csv").read_text()


LIES = {  # too much and too little: both must be found
    "nonconflicting": ("    homogeneity = 0.0\n", "    homogeneity = 0.0\n    nonconflicting = True\n"),
    "common_scale": ("    homogeneity = 0.0\n", "    homogeneity = None\n"),
    "row_scale": ('    row_scale = ("invariant",)\n', ""),
    "permutation": ("return 1 / norms", "return [1.0, 2.0, *[1.0] * 60][: norms.shape[-1]] / norms"),
}


def test_conformance_suite(folder):
    """Every check runs for a new method, and each false declaration fails the check that it concerns."""
    for k, (check, (honest, false)) in enumerate(LIES.items()):
        assert honest in TOY
        text = TOY.replace(honest, false).replace("Toy", f"Liar{k}").replace("toy", f"liar{k}_{check}")
        (folder / f"liar{k}.py").write_text(text)
    found = command(
        folder, "-m", "pytest", "tests/methods/test_conformance.py", "-q", "-p", "no:cacheprovider", "-k", "toy or liar"
    )
    failed = {line.split("[")[1].split("]")[0] for line in found.stdout.splitlines() if line.startswith("FAILED")}
    assert failed >= {f"{check}-liar{k}_{check}" for k, check in enumerate(LIES)}, found.stdout[-3000:]
    assert not any(item.endswith("-toy") for item in failed), found.stdout[-3000:]
    passed = int(found.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed + len(failed) >= 20 * (1 + len(LIES))
    assert "skipped" not in found.stdout.splitlines()[-1]


def test_errors(folder, tmp_path):
    (folder / "again.py").write_text(TOY)
    twice = command(folder, "-c", "import detente")
    assert "two methods are called 'toy'" in twice.stderr
    gone = command(tmp_path / "nothing", "-c", "import detente")
    assert "does not exist" in gone.stderr
