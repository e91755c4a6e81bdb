"""What the documents promise runs, what they link to is there, and what is generated is fresh."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import shlex
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import yaml

import detente
import detente.diagnostics
from detente.benchmark import problem as problems

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
)
ELSEWHERE = ("docs/methods/", "docs/migration/", "docs/results/", "benchmarks/")
"""Where other tests run the blocks (doctests of the methods, the migration's own), or these say what was once run."""
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """The title and the text of a page's blocks."""
    found = BLOCK.findall((ROOT / page).read_text())
    return [("".join(re.findall(r'title="([^"]+)"', info)), text) for kind, info, text in found if kind == language]


def own(language: str) -> list[str]:
    return [page for page in PAGES if not page.startswith(ELSEWHERE) and blocks(page, language)]


@pytest.fixture
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "scripts/site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def processes(monkeypatch):
    """One process, as torchrun starts it; what a page leaves behind is let go of."""
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_pages_with_code_are_found():
    assert {"README.md", "docs/index.md", "docs/own_method.md", "docs/frameworks.md"} <= set(own("python"))


@pytest.mark.parametrize("page", own("python"))
# LazyLinear announces that it is experimental
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.usefixtures("processes")
def test_blocks_run(page, monkeypatch, tmp_path):
    """In order, in one namespace: a block may use what those above it define. Titled ones are files as well."""
    monkeypatch.chdir(tmp_path)
    namespace, missing = {"__name__": "document"}, []
    for k, (title, block) in enumerate(blocks(page, "python")):
        frameworks = re.findall(r"detente\.integrations\.(\w+)", block)
        absent = [name for name in frameworks if importlib.util.find_spec(name) is None]
        if absent:
            missing += absent
            continue
        if title:
            (tmp_path / title).parent.mkdir(exist_ok=True)
            (tmp_path / title).write_text(block)
        exec(compile(block, f"{page}, block {k + 1}", "exec"), namespace)
    namespace.clear()
    if missing:
        pytest.skip(f"ran all blocks but those that need {', '.join(missing)}, which is not installed")


@pytest.mark.parametrize("page", own("sh"))
def test_commands_exist(page):
    """Options and values of every ``detente`` command are those it has; so are extras and make's targets."""
    import typer

    from detente.benchmark.cli import app

    command = typer.main.get_command(app)
    makefile = (ROOT / "Makefile").read_text()
    extras = re.search(
        r"\[project\.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    for _, text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words[:1] == ["detente"]:
                check_command(command, words[1:])
            elif words[:1] == ["make"]:
                for target in words[1:]:
                    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), line
            elif words[:2] == ["pip", "install"]:
                for extra in re.findall(r"\[([\w,]+)\]", line):
                    assert all(re.search(rf"^{name} = ", extras[1], re.MULTILINE) for name in extra.split(",")), line


def check_command(command, words: list[str]) -> None:
    """Parse a command line as the program would, without running it."""
    from detente.benchmark.specs import parse_methods

    with command.make_context("detente", list(words)) as context:
        name, chosen, rest = command.resolve_command(context, words)
        with chosen.make_context(name, rest, parent=context) as inner:
            given = inner.params
    methods = given.get("methods")
    if methods and not {"even", "running"} & set(methods.split(",")):  # those of docs/own_method.md
        parse_methods(methods)
    if given.get("problem") and not given["problem"].endswith(".py"):
        loaded = problems.load_problem(given["problem"])
        loaded.settle(dict(each.split("=", 1) for each in given.get("set_") or ()), given.get("preset"))


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page, hooks):
    for path in hooks.linked((ROOT / page).read_text(), page):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_navigation(hooks):
    """Or named here, because something else leads to it."""
    shown = {hooks.origin(page) for page in hooks.named(hooks.expand(configuration()["nav"]))}
    pages = {page for page in PAGES if page.startswith("docs/")}
    assert pages <= shown, "add it to mkdocs.yml"
    gone = [page for page in shown - pages if not (ROOT / page).exists()]
    assert not gone, "mkdocs.yml names what is not there"


def test_every_example_is_listed(hooks):
    listed = set(hooks.linked((ROOT / "docs/examples.md").read_text(), "docs/examples.md"))
    assert {path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/*.py")} == listed


def configuration() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def public_names() -> set[str]:
    """Where each public object is defined; method classes have pages of their own."""
    from detente.method import registry

    methods = set(registry().values())
    places = {detente: detente.__all__, detente.nn: detente.nn.__all__}
    places |= {detente.diagnostics: detente.diagnostics.__all__, problems: problems.__all__}
    found = [getattr(module, name) for module, names in places.items() for name in names]
    return {f"{item.__module__}.{item.__qualname__}" for item in found if hasattr(item, "__qualname__")} - {
        f"{item.__module__}.{item.__qualname__}" for item in methods
    }


def test_every_public_name_is_in_the_reference():
    """By its own name, or by that of a module whose public names are all shown."""
    named = set()
    for page in (ROOT / "docs/reference").glob("*.md"):
        for target, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", page.read_text(), re.MULTILINE):
            parent, _, name = target.rpartition(".")
            item = getattr(importlib.import_module(parent), name, None)
            if item is None:
                framework = name if parent == "detente.integrations" else "detente"
                if importlib.util.find_spec(framework) is None:
                    continue
                item = importlib.import_module(target)
            if hasattr(item, "__qualname__"):
                named.add(f"{item.__module__}.{item.__qualname__}")
                continue
            members = re.search(r"members: \[(.*)\]", options)
            shown = members[1].split(", ") if members else item.__all__
            assert set(item.__all__) <= set(shown), f"{page.name}: {target} has more"
            named |= {f"{getattr(item, k).__module__}.{getattr(item, k).__qualname__}" for k in shown}
    assert public_names() <= named


@pytest.mark.slow
def test_site_builds(tmp_path):
    """Without a warning: every link and anchor leads somewhere; and no page needs anything from elsewhere."""
    pytest.importorskip("mkdocs", reason="needs make docs")
    pytest.importorskip("mkdocstrings_handlers.python", reason="needs make docs")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    documented = {line.split(" ")[0] for line in inventory.splitlines()}
    assert public_names() <= documented
    for page in site.rglob("*.html"):
        fetched = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]*)|<link[^>]* href="([^"]*)', page.read_text())
        outside = [address for pair in fetched for address in pair if re.match(r"(https?:)?//", address)]
        assert not outside, f"{page.relative_to(site)}: {outside}"


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


@pytest.mark.parametrize("script", ["generate.py", "pages.py"])
def test_generated_files_are_fresh(script):
    command = [sys.executable, str(ROOT / "scripts" / script), "--check"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


FILES = {"examples/own_problem.py": "cagrad,connection_strength"}
FILES |= {"docs/index.md": "cagrad,uw", "docs/own_problem.md": "cagrad,connection_strength"}


@pytest.mark.parametrize("place", FILES)
def test_problem_files_train(place, tmp_path):
    from detente.benchmark.engines.local import Local
    from detente.benchmark.plan import Plan
    from detente.benchmark.specs import parse_methods

    file = ROOT / place
    if file.suffix == ".md":
        ((name, text),) = [each for each in blocks(place, "python") if each[0]]
        file = tmp_path / name
        file.write_text(text)
    problem = problems.load_problem(str(file))
    (jobs,) = Plan(problem, parse_methods(FILES[place]), [0], problem.settle({"epochs": 1})).jobs()
    with Local(1) as run:
        assert run(jobs, tmp_path, lambda event: None) == {}
    assert len(list(tmp_path.glob("runs/*/seed-0/result.json"))) == 2 + 3


@pytest.mark.slow
def test_methods_of_the_page_conform(tmp_path):
    """The files of docs/own_method.md, under the command that the page gives."""
    for title, text in blocks("docs/own_method.md", "python"):
        if title:
            (tmp_path / Path(title).name).write_text(text)
    names = [path.stem for path in tmp_path.glob("*.py")]
    assert sorted(names) == ["even", "running"]
    command = [sys.executable, "-m", "pytest", "tests/methods/test_conformance.py", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [*command, "-k", " or ".join(f"-{name}" for name in names)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "DETENTE_METHODS": str(tmp_path)},
    )
    assert found.returncode == 0, found.stdout[-3000:]
    assert " passed" in found.stdout
