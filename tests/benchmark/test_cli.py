"""The command line: every mistake is one message and exit code 2; a YAML file says the same as flags."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import detente
from benchmark.command import run
from detente.benchmark import cli
from detente.benchmark.engines.local import Local
from detente.benchmark.job import Job

TINY = Path(__file__).with_name("tiny_problem.py")


def refused(*arguments: str | Path) -> str:
    """The one message of a command that must be an error of the user's."""
    outcome = run(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(re.findall(r"^(?:Error:|╭─ Error)", outcome.err, re.MULTILINE)) == 1
    assert "Traceback" not in outcome.err
    return " ".join(outcome.err.split())


class _Asked(Exception):
    """What a command would have trained."""

    def __init__(self, engine: Local, jobs: list[Job], root: Path, progress: Callable[..., None]) -> None:
        self.jobs, self.root, self.processes = jobs, root, engine.processes


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> _Asked:
    def capture(*given: Any) -> None:
        raise _Asked(*given)

    with monkeypatch.context() as patch:
        patch.setattr(cli.local.Local, "__call__", capture)
        with pytest.raises(_Asked) as caught:
            run("compare", *arguments)
    return caught.value


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("original") / "out"
    outcome = run("compare", TINY, "--methods", "mgda", "--seeds", "2", "--epochs", "2", "--out", out)
    assert outcome.code == 0, outcome.err
    return out


def test_the_module_is_a_command_with_subcommands():
    environment = {**os.environ, "PYTHONPATH": str(Path(detente.__file__).parents[1])}
    command = [sys.executable, "-m", "detente.benchmark", "report", "/nowhere"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "/nowhere" in done.stderr
    shown = run("--help")
    assert shown.code == 0
    assert all(name in shown.out for name in ("compare", "tune", "report", "methods", "problems"))


def test_methods_lists_every_method_with_what_it_does():
    outcome = run("methods")
    assert outcome.code == 0
    words = outcome.out.split()
    assert all(name in words for name in detente.list_methods())
    assert "losses" in words  # what some of them need
    for heading in ("paper", "kind", "needs", "backward passes", "extra state", "properties"):
        assert all(part in outcome.out for part in heading.split())
    assert max(map(len, outcome.out.splitlines())) <= 120


def test_methods_explains_one():
    outcome = run("methods", "Nash-MTL")
    assert outcome.code == 0
    assert "Navon et al. 2022" in outcome.out
    assert "G a = 1 / a" in outcome.out  # its formula
    assert "@inproceedings{navon2022multi" in outcome.out
    wrong = run("methods", "nsah_mtl")
    assert wrong.code == 2
    assert "Did you mean 'nash_mtl'" in wrong.err


def test_problems_lists_the_built_in_ones():
    outcome = run("problems")
    assert outcome.code == 0
    assert {"digits", "logic", "scenes", "toy"} <= set(outcome.out.split())


def test_a_comparison_prints_its_tables_and_where_it_wrote_them(original):
    outcome = run("compare", TINY, "--methods", "mgda", "--seeds", "2", "--epochs", "2", "--out", original)
    assert outcome.code == 0
    assert outcome.err == ""
    assert all(label in outcome.out.split() for label in ("single", "gd", "mgda"))
    assert "equal weights" in outcome.out
    assert str(original / "report.html") in outcome.out
    for name in ("results.csv", "results.md", "results.tex", "cost.csv", "cost.md", "cost.tex", "report.html"):
        assert (original / name).stat().st_size > 0


def test_report_builds_the_same_files_again(original, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(original, out)
    names = ["results.csv", "results.md", "results.tex", "cost.csv", "cost.md", "cost.tex"]
    runs = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*")}
    for name in [*names, "report.html"]:
        (out / name).unlink()
    outcome = run("report", out)
    assert outcome.code == 0, outcome.err
    for name in names:
        assert (out / name).read_bytes() == (original / name).read_bytes()
    assert "mgda" in (out / "report.html").read_text()
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*")} == runs


def test_report_of_a_directory_without_a_comparison_says_so(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        message = refused("report", directory)
        assert f"{directory}/comparison.json does not exist" in message
        assert "detente compare" in message


def test_report_before_any_run_is_finished_says_how_to_go_on(original, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(original, out)
    shutil.rmtree(out / "runs")
    message = refused("report", out)
    assert "has no finished run yet" in message
    assert "detente compare" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "which problem?"),
        (["compare", "digit"], "unknown problem 'digit'. Built in: celeba, cifar100"),
        (["compare", "./nowhere.py"], "no problem file './nowhere.py'"),
        (["compare", "./[odd].py"], "no problem file './[odd].py'"),
        (["compare", "a[/b]"], "no problem file 'a[/b]'"),
        (["compare", "logic", "--methods", "cagard"], "Did you mean 'cagrad'"),
        (["compare", "logic", "--methods", "cagrad(d=1)"], "no option 'd'"),
        (["compare", "logic", "--methods", "cagrad(c=-1)"], "c must be a finite number >= 0; got -1"),
        (["compare", "logic", "--methods", "cagrad(c=0.8"], "cannot read the methods"),
        (["compare", "logic", "--methods", "cagrad(0.8)"], "name every option"),
        (["compare", "logic", "--methods", "connection_strength(nonsense=1)"], "nonsense"),
        (["compare", "logic", "--steps", "5"], "has no setting 'steps'"),
        (["compare", "toy", "--epochs", "5"], "has no setting 'epochs'"),
        (["compare", "logic", "--lr", "-1"], "lr must be a positive number; got -1"),
        (["compare", "logic", "--lr", "nan"], "lr must be a positive number; got nan"),
        (["compare", "logic", "--seeds", "0"], "--seeds"),
        (["compare", "logic", "--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["compair", "logic"], "compair"),
    ],
)
def test_a_mistake_is_one_message(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.local.Local, "__call__", lambda *_: pytest.fail("training was started"))
    assert message in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_output_directory_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write to" in refused("compare", "logic", "--out", tmp_path / "file/below")


@pytest.mark.parametrize("text", ["def make_data(:\n", "import nowhere_to_be_found\n", "tasks = undefined\n"])
def test_a_problem_file_that_python_cannot_run_is_named(text, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    assert "mine.py" in refused("compare", tmp_path / "mine.py", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_yaml_file_says_the_same_as_flags(tmp_path, monkeypatch):
    (tmp_path / "all.yaml").write_text(
        f"""
        problem: {TINY}
        methods:
          - cagrad(c=0.8)
          - wpcgrad(priority=loss_power(gamma=2))
        seeds: 2
        jobs: 1
        out: {tmp_path}/written
        settings: {{epochs: 3, batch_size: 8, lr: 0.02}}
        """
    )
    written = asked(monkeypatch, "--config", tmp_path / "all.yaml")
    methods = "cagrad(c=0.8),wpcgrad(priority=loss_power(gamma=2))"
    options = ["--methods", methods, "--seeds", "2", "--jobs", "1", "--out", tmp_path / "given"]
    given = asked(monkeypatch, TINY, *options, "--epochs", "3", "--batch-size", "8", "--lr", "0.02")
    assert written.jobs == given.jobs
    assert [(job.name, job.seed) for job in written.jobs[:5]] == [
        ("single-sum", 0),
        ("single-sign", 0),
        ("gd", 0),
        ("cagrad(c=0.8)", 0),
        ("wpcgrad(priority=loss_power(gamma=2))", 0),
    ]
    settings = {"epochs": 3, "batch_size": 8, "lr": 0.02, "probe_every": 2}
    assert settings.items() <= written.jobs[0].settings.items()
    assert len(written.jobs) == 10
    assert (written.root, given.root) == (tmp_path / "written", tmp_path / "given")
    assert written.processes == given.processes == 1


def test_flags_go_before_the_yaml_file(tmp_path, monkeypatch):
    text = f"problem: {TINY}\nmethods: mgda\nseeds: 2\nsettings: {{epochs: 3, lr: 0.02}}\n"
    (tmp_path / "all.yaml").write_text(text)
    config = ["--config", tmp_path / "all.yaml", "--out", tmp_path / "out"]
    given = asked(monkeypatch, *config, "--epochs", "5", "--seeds", "1", "--methods", "edm")
    assert [job.name for job in given.jobs] == ["single-sum", "single-sign", "gd", "edm"]
    assert (given.jobs[0].settings["epochs"], given.jobs[0].settings["lr"]) == (5, 0.02)


def test_a_yaml_number_in_exponent_notation_is_a_number(tmp_path, monkeypatch):
    # YAML 1.1 reads 1e-3, without a point, as text
    (tmp_path / "all.yaml").write_text(f"problem: {TINY}\nout: {tmp_path}/out\nsettings: {{lr: 1e-3}}\n")
    assert asked(monkeypatch, "--config", tmp_path / "all.yaml").jobs[0].settings["lr"] == 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("problem: [tiny", "not valid YAML in line"),
        ("problem: tiny\n\tseeds: 3", "not valid YAML in line 2"),
        ("", "must be a mapping"),
        ("- logic", "must be a mapping"),
        ("problem: logic\nmethod: gd\n", "got ['method']"),
        ("problem: logic\n1: 2\nfoo: 3\n", "must be a mapping with the keys"),
        ("methods: gd\n", "which problem?"),
        ("problem: logic\nseeds: many\n", "seeds must be a positive whole number; got 'many'"),
        ("problem: logic\nseeds: 0\n", "seeds must be a positive whole number; got 0"),
        ("problem: logic\nseeds: yes\n", "seeds must be a positive whole number; got True"),
        ("problem: logic\njobs: none\n", "jobs"),
        ("problem: logic\nout: 5\n", "out"),
        ("problem: logic\nsettings: 3\n", "settings must be a mapping"),
        ("problem: logic\nsettings: {epoch: 3}\n", "has no setting 'epoch'"),
        ("problem: logic\nsettings: {epochs: many}\n", "epochs must be a positive whole number; got 'many'"),
        ("problem: logic\nsettings: {epochs: 2.5}\n", "epochs must be"),
        ("problem: logic\nmethods: [cagard]\n", "Did you mean 'cagrad'"),
        ("problem: logic\nmethods: {cagrad: 1}\n", "cannot read the method"),
    ],
)
def test_a_mistake_in_the_yaml_file_is_one_message(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.local.Local, "__call__", lambda *_: pytest.fail("training was started"))
    (tmp_path / "all.yaml").write_text(text)
    assert message in refused("compare", "--config", "all.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["all.yaml"]


@pytest.mark.parametrize("missing", ["rich", "plotly", "typer", "scipy"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import detente.benchmark.cli"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert missing in found.stderr
    assert "pip install 'detente[compare]'" in found.stderr
    assert "Traceback" not in found.stderr


def test_report_lays_another_comparison_beside(original, tmp_path):
    one, other = (shutil.copytree(original, tmp_path / name) for name in ("one", "other"))
    shown = run("report", one, other)
    assert shown.code == 0, shown.text
    page = (one / "report.html").read_text()
    assert f"Against {other}" in page
    assert f"Against {other}" not in (other / "report.html").read_text()


def test_comparisons_of_other_tasks_are_not_laid_side_by_side(original, tmp_path):
    other = shutil.copytree(original, tmp_path / "other")
    for path in [other / "comparison.json", *other.glob("runs/*/*/result.json")]:
        path.write_text(path.read_text().replace('"sum"', '"total"'))
    for path in list(other.glob("runs/single-sum")):
        path.rename(path.with_name("single-total"))
    assert "has other tasks or metrics" in refused("report", original, other)


def test_problems_are_listed_with_their_data_and_presets():
    shown = run("problems")
    assert shown.code == 0
    for word in ("nyuv2", "liu2021cagrad", "official files", "digits", "made", "--download-help"):
        assert word in shown.out


def test_a_device_that_is_not_there_is_told(tmp_path):
    message = refused("compare", TINY, "--device", "cuda:99", "--out", tmp_path / "out")
    assert "--device cuda:99: this PyTorch cannot use it" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "slurm"), "--engine must be local or ray; got 'slurm'"),
        (("--address", "auto"), "--address goes with --engine ray"),
        (("--engine", "ray", "--launch", "torchrun", "--nproc-per-node", "2"), "do not go together"),
        (("--set", "lr"), "--set wants name=value"),
        (("--set", "protocol=best"), "protocol must be one of val-selected"),
        (("--protocol", "best"), "protocol must be one of val-selected"),
        (("--preset", "author2020"), "has no preset 'author2020'"),
        (("--data", "somewhere"), "makes its own data"),
    ],
)
def test_options_that_cannot_be_are_one_message(tmp_path, options, message):
    assert message in refused("compare", TINY, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def broken(directory: Path, old: str, new: str) -> Path:
    """The tiny problem with a mistake in it."""
    text = TINY.read_text()
    assert old in text
    path = directory / "broken.py"
    path.write_text(text.replace(old, new))
    return path


def test_what_nobody_asked_for_and_the_model_cannot_do_is_left_out(tmp_path):
    """Connection strength is among the defaults, and needs norms."""
    problem = broken(tmp_path, "nn.BatchNorm1d(8), ", "")
    done = run("compare", problem, "--epochs", "1", "--seeds", "1", "--jobs", "1", "--out", tmp_path / "out")
    assert done.code == 0, done.text
    assert "connection_strength is left out: no shared layer with a task norm was found in the model." in done.out
    assert (tmp_path / "out/runs/cagrad").exists()
    asked = run("compare", problem, "--methods", "connection_strength", "--epochs", "1", "--seeds", "1", "--jobs", "1",
                "--out", tmp_path / "asked")  # fmt: skip
    assert asked.code == 1
    assert "failed connection_strength seed 0" in asked.out


def test_a_mistake_in_the_file_is_told_once_with_its_line(tmp_path):
    problem = broken(tmp_path, "return {task: (outputs", "return {task: 0 * model.nothing + (outputs")
    done = run("compare", problem, "--methods", "cagrad", "--epochs", "1", "--seeds", "1", "--jobs", "1",
               "--out", tmp_path / "out")  # fmt: skip
    assert done.code == 1
    assert done.out.count("has no attribute 'nothing'") == 1
    line = 1 + problem.read_text().partition("return {task: 0 * model.nothing")[0].count("\n")
    assert f"(broken.py, line {line}, in " in done.out
    assert "4 runs failed" in done.out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            ".square().mean() for",
            ".square() for",
            "must be a scalar tensor; it has shape (16,). Did you forget .mean()?",
        ),
        (
            ".square().mean() for",
            ".square().mean().item() for",
            "must be a scalar tensor; got float. Did you call .item()?",
        ),
    ],
)
def test_losses_that_are_none_are_told_in_every_run(old, new, message, tmp_path):
    problem = broken(tmp_path, old, new)
    done = run("compare", problem, "--methods", "cagrad", "--epochs", "1", "--seeds", "1", "--jobs", "1",
               "--out", tmp_path / "out")  # fmt: skip
    assert done.code == 1
    assert done.out.count(message) <= 2  # once for each task it is said of
    assert message in done.out


def test_tasks_without_figures_are_told(tmp_path):
    old = 'tasks = {"sum": {"mse": "min"}, "sign": {"accuracy": "max", "mse": "min"}}'
    done = run("compare", broken(tmp_path, old, 'tasks = ["sum", "sign"]'), "--out", tmp_path / "out")
    assert done.code == 2
    assert "tasks must say which way every figure is better" in done.err
