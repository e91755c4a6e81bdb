"""What the documents promise runs, and what is generated is fresh."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import detente

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "README.md": 2,
    "docs/architectures.md": 6,
    "docs/frameworks.md": 3,
    "docs/reinforcement.md": 1,
    "docs/speed.md": 2,
}  # at least so many blocks
BLOCKS = [
    pytest.param(document, block, id=f"{document} {k}")
    for document in EXPECTED
    for k, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("document", "block"), BLOCKS)
# LazyLinear announces that it is experimental
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_blocks_run(document, block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for framework in re.findall(r"detente\.integrations\.(\w+)", block):
        pytest.importorskip(framework)
    exec(compile(block, document, "exec"), {"__name__": "document"})


@pytest.mark.parametrize("document", EXPECTED)
def test_there_are_blocks(document):
    assert sum(param.values[0] == document for param in BLOCKS) >= EXPECTED[document]


@pytest.mark.parametrize("document", [*EXPECTED, "docs/distributed.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_linked_files_exist(document):
    prose = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        if not target.startswith("http"):
            assert (ROOT / document).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("name", detente.list_methods())
def test_every_method_has_a_page_with_its_formula(name):
    page = (ROOT / f"docs/methods/{name}.md").read_text()
    cls = type(detente.get_method(name)) if name != "connection_strength" else detente.ConnectionStrength
    assert page.startswith(f"# {cls.__name__}\n")
    assert cls.paper.bibtex() in page
    assert "## Example" in page
    assert page.count("```") % 2 == 0
    formula = page.split("```text\n")[1].split("```")[0]
    assert "=" in formula
    assert f"methods/{name}.md" in (ROOT / "docs/methods.md").read_text()


def test_generated_files_are_fresh():
    found = subprocess.run(
        [sys.executable, str(ROOT / "scripts/generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


def test_example_problem_trains(tmp_path):
    from detente.benchmark.engines.local import Local
    from detente.benchmark.plan import Plan
    from detente.benchmark.problem import load_problem
    from detente.benchmark.specs import parse_methods

    problem = load_problem(str(ROOT / "examples/own_problem.py"))
    (jobs,) = Plan(problem, parse_methods("cagrad,connection_strength"), [0], problem.settle({"epochs": 1})).jobs()
    with Local(1) as run:
        assert run(jobs, tmp_path, lambda event: None) == {}
    assert len(list(tmp_path.glob("runs/*/seed-0/result.json"))) == 2 + 3
