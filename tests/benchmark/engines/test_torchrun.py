"""Runs on several processes: the table of one process, whatever the batch brings them and whenever they are killed."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmark.command import PATIENCE, alive, children, results, run, started, until
from detente.benchmark import training as trained
from detente.benchmark.division import Division
from detente.benchmark.job import Job
from detente.benchmark.problem import load_problem

TINY = Path(__file__).parents[1] / "tiny_problem.py"
LAUNCH = ("--launch", "torchrun", "--nproc-per-node", "2")

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")


def written(path: Path, *replaced: tuple[str, str]) -> Path:
    """A problem file like tests/benchmark/tiny_problem.py, with some of its text replaced."""
    text = TINY.read_text()
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


# rounding (another order of the same sums) stays far below every figure
EXACT = ("--set", "precision=float64")

# dropout's draws depend on how many samples a process has
STILL = ((", nn.Dropout(0.1)", ""),)

# "sign" is known for every sixth sample, "sum" for all others, and the trunk has no statistics of a batch
PARTLY = (
    *STILL,
    ("nn.BatchNorm1d(8)", "nn.LayerNorm(8)"),
    (
        "def losses(model, batch, tasks):",
        """def counts(batch, tasks):
    known = batch[0].sum(1).mul(100).long() % 6 == 0
    return {t: int((known if t == "sign" else ~known).sum()) for t in tasks}


def losses(model, batch, tasks):
    known = batch[0].sum(1).mul(100).long() % 6 == 0
    outputs = model(batch[0])
    return {
        t: (outputs[t] - batch[2])[known].square().mean()
        if t == "sign"
        else (outputs[t] - batch[1])[~known].square().mean()
        for t in tasks
    }


def unused(model, batch, tasks):""",
    ),
    ("losses(model, batch, tasks).items()", "unused(model, batch, tasks).items()"),
)


def same(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """The same nested content, numbers up to rounding."""
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key, value in expected.items():
            same(found[key], value, tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other, tolerance)
    else:
        assert found == (pytest.approx(expected, rel=tolerance, abs=tolerance) if type(expected) is float else expected)


def alike(problem: Path, folder: Path, *options: str) -> None:
    """One process and two give the same tables and the same result files."""
    one = run("compare", problem, *options, *EXACT, "--jobs", "1", "--out", folder / "one")
    two = run("compare", problem, *options, *EXACT, *LAUNCH, "--out", folder / "two")
    assert (one.code, two.code) == (0, 0), one.text + two.text
    same(results(folder / "two"), results(folder / "one"))
    assert results(folder / "one")
    for name in ("results.md", "results.tex"):
        assert (folder / "two" / name).read_text() == (folder / "one" / name).read_text()
    left = {p.name for p in (folder / "two").rglob("*") if p.is_file()}
    assert left == {p.name for p in (folder / "one").rglob("*") if p.is_file()}


@pytest.mark.slow
def test_two_processes_give_the_table_of_one_with_a_batch_that_does_not_divide(tmp_path):
    # BatchNorm, task norms, schedules, losses after the step, virtual steps, whole rows, random draws, DTP's metrics
    methods = "connection_strength,famo,auto_lambda,moco,wpcgrad(priority=dtp)"
    alike(written(tmp_path / "still.py", *STILL), tmp_path, "--methods", methods, "--seeds", "1",
          "--epochs", "4", "--batch-size", "15")  # fmt: skip


@pytest.mark.slow
def test_a_process_may_have_no_samples_of_a_task(tmp_path):
    problem = written(tmp_path / "partly.py", *PARTLY)
    alike(problem, tmp_path, "--methods", "cagrad,nash_mtl", "--seeds", "1", "--epochs", "3", "--batch-size", "12")


@contextlib.contextmanager
def training(problem: Path, out: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The command, which has saved a checkpoint, with torchrun and its processes; at the end all must be gone."""
    with started(problem, out, *options, *LAUNCH) as process:
        until(lambda: list(out.glob("runs/*/*/checkpoint.pt")), "a checkpoint is there", process)
        (torchrun,) = children(process.pid)
        family = {torchrun, *children(torchrun)}
        assert len(family) == 3
        yield process
        until(lambda: not any(map(alive, family)), "torchrun and its processes end")


@linux
@pytest.mark.slow
def test_killed_on_two_processes_it_goes_on_with_one(tmp_path):
    problem, out = written(tmp_path / "still.py", *STILL), tmp_path / "out"
    options = ("--methods", "pcgrad", "--seeds", "1", "--epochs", "30", *EXACT)
    with training(problem, out, *options) as process:
        process.kill()
    (checkpoint,) = out.glob("runs/*/*/checkpoint.pt")
    name = checkpoint.parent.relative_to(out) / "result.json"
    assert str(name) not in results(out)
    again = run("compare", problem, *options, "--jobs", "1", "--out", out)
    assert again.code == 0, again.text
    settings = {**load_problem(str(problem)).settings, "epochs": 30, "precision": "float64"}
    content = json.loads((out / name).read_text())
    method = "gd" if content["task"] else content["label"]
    job = Job(str(problem), content["label"], method, content["task"], 0, settings)
    trained.train(job, tmp_path / "whole", lambda _: None)
    same(results(out)[str(name)], results(tmp_path / "whole")[str(name)])


@linux
@pytest.mark.slow
def test_interrupted_with_control_c_all_processes_end_quietly(tmp_path):
    options = ("--methods", "gd", "--seeds", "1", "--epochs", "60")
    with training(TINY, tmp_path / "out", *options) as process:
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130
        assert text.endswith("Interrupted. The same command goes on where this one stopped.\n")
        assert "Traceback" not in text


@pytest.mark.slow
def test_an_error_ends_its_run_and_no_other(tmp_path, capfd):
    """One process fails and another waits for it; then both fail, because BatchNorm would wait for a missing task."""
    problem = written(
        tmp_path / "failing.py",
        *(pair for pair in PARTLY if "LayerNorm" not in pair[1]),
        ("    outputs = model(batch[0])\n", "    fail(tasks)\n    outputs = model(batch[0])\n"),
        (
            "def counts(",
            """def fail(tasks):
    if tasks == ("sum",) and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
        raise RuntimeError("there is no sum here")


def counts(""",
        ),
    )
    out = tmp_path / "out"
    options = ("--methods", "gd", "--seeds", "1", "--epochs", "1", "--batch-size", "12", "--out", out)
    outcome = run("compare", problem, *options, *LAUNCH)
    assert outcome.code == 1
    assert "failed single-sum seed 0, gd seed 0: RuntimeError: there is no sum here (failing.py, line" in outcome.out
    assert ', in fail: raise RuntimeError("there is no sum here"))\n' in outcome.out
    assert "no sum here" in (out / "runs/single-sum/seed-0/error.txt").read_text()
    text = " ".join(outcome.out.split())
    assert "failed single-sign seed 0: ValueError: the model has BatchNorm" in text
    assert "'sign' has some on 1 of 2 processes. Give the model another norm" in text
    assert "3 runs failed, see above." in outcome.out
    assert not results(out)
    assert capfd.readouterr().err == ""
    again = run("compare", problem, *options)  # on one process nothing fails
    assert again.code == 0, again.text
    assert len(results(out)) == 3
    assert not list(out.rglob("error.txt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nproc-per-node", "2"), "--nproc-per-node goes with --launch torchrun"),
        (("--launch", "mpirun", "--nproc-per-node", "2"), "unknown launcher 'mpirun'"),
        (("--launch", "torchrun"), "Add --nproc-per-node 2"),
        (("--launch", "torchrun", "--nproc-per-node", "1"), "Invalid value for '--nproc-per-node'"),
        ((*LAUNCH, "--jobs", "2"), "leave out jobs, which is 2"),
        ((*LAUNCH, "--batch-size", "1"), "--nproc-per-node is 2, but a batch has 1 samples"),
    ],
)
def test_options_that_do_not_fit_are_named_and_nothing_begins(tmp_path, options, message):
    outcome = run("compare", TINY, *options, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert message in " ".join(outcome.err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_problem_without_batches_cannot_be_divided(tmp_path):
    outcome = run("compare", "toy", *LAUNCH, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "has no batches that could be divided" in outcome.err


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_every_sample_belongs_to_one_process(size):
    parts = []
    for rank in range(size):
        division = Division()
        division.rank, division.size = rank, size
        parts.append(list(division.part(list(range(7)))))
    assert list(itertools.chain(*parts)) == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
