"""Comparisons in a directory: what a run writes, that it repeats, and that killing it at any moment loses nothing."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import detente
from benchmark.command import PATIENCE, Outcome, alive, children, results, run, started, until
from detente.benchmark import training
from detente.benchmark.job import Event, Job
from detente.benchmark.problem import load_problem

TINY = Path(__file__).with_name("tiny_problem.py")
METHODS = "pcgrad,connection_strength"

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")


def compare(out: Path, problem: Path = TINY, methods: str = METHODS, seeds: int = 2, *more: str) -> Outcome:
    return run("compare", problem, "--methods", methods, "--seeds", str(seeds), "--out", out, *more)


def snapshot(out: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def tidy(outcome: Outcome) -> str:
    assert "Traceback" not in outcome.text
    return outcome.text


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("original") / "out"
    outcome = compare(out)
    assert outcome.code == 0, outcome.text
    return out


@pytest.fixture
def finished(original, tmp_path) -> Path:
    """A finished comparison: 2 baselines and 3 methods, 2 seeds each."""
    return Path(shutil.copytree(original, tmp_path / "out"))


def test_a_finished_run_says_what_was_trained_and_how_it_went(original):
    found = results(original)
    names = ["single-sum", "single-sign", "gd", "pcgrad", "connection_strength"]
    assert set(found) == {f"runs/{name}/seed-{seed}/result.json" for name in names for seed in (0, 1)}
    result = found["runs/pcgrad/seed-1/result.json"]
    assert {key: result[key] for key in ("problem", "method", "label", "seed", "task", "epochs", "steps")} == {
        "problem": "tiny_problem",
        "method": "pcgrad",
        "label": "pcgrad",
        "seed": 1,
        "task": None,
        "epochs": 30,
        "steps": 30 * 48 // 16,
    }
    assert {task: set(figures) for task, figures in result["metrics"].items()} == {
        "sum": {"mse"},
        "sign": {"accuracy", "mse"},
    }
    assert [row["epoch"] for row in result["history"]] == list(range(1, 31))
    last = result["history"][-1]
    assert set(last["loss"]) == set(last["weights"]) == set(last["norms"]) == {"sum", "sign"}
    assert last["cosine"][0][1] == pytest.approx(last["cosine"][1][0], abs=1e-12)  # float64 rounding of a mean
    assert last["cosine"][0][0] == pytest.approx(1, abs=1e-12)
    assert 0 <= result["conflict_rate"] <= 1
    cost = json.loads((original / "runs/pcgrad/seed-1/result.json").read_text())["cost"]
    assert cost["step_ms"] > 0
    assert cost["peak_mb"] >= 0
    model = load_problem(str(TINY)).make_model(("sum", "sign"), {})
    assert cost["parameters"] == sum(p.numel() for p in model.parameters())
    assert not list(original.rglob("checkpoint.pt"))
    assert not list(original.rglob("*.tmp"))


def test_the_reported_figures_are_those_of_the_epoch_that_validation_chose(original):
    for result in results(original).values():
        chosen = result["history"][result["selected_epoch"] - 1]["val"]
        assert set(chosen) == set(result["metrics"])
        if result["task"] == "sum":  # a single figure: the best epoch is the one with the least validation error
            errors = [row["val"]["sum"]["mse"] for row in result["history"]]
            assert result["selected_epoch"] == 1 + errors.index(min(errors))
            assert result["metrics"]["sum"]["mse"] not in errors  # of the test split


def test_a_baseline_trains_its_task_alone(original):
    result = results(original)["runs/single-sign/seed-0/result.json"]
    assert (result["method"], result["label"], result["task"]) == ("single", "single", "sign")
    assert set(result["metrics"]) == set(result["history"][0]["loss"]) == {"sign"}
    assert result["conflict_rate"] is None


def test_the_same_seeds_give_the_same_results_whatever_the_number_of_processes(original, tmp_path):
    outcome = compare(tmp_path / "again", TINY, METHODS, 2, "--jobs", "1")
    assert outcome.code == 0, outcome.text
    assert results(tmp_path / "again") == results(original)
    assert (tmp_path / "again/results.csv").read_bytes() == (original / "results.csv").read_bytes()


def test_another_seed_gives_another_run(original):
    found = results(original)
    for name in ("single-sum", "gd", "pcgrad", "connection_strength"):
        one, other = (found[f"runs/{name}/seed-{seed}/result.json"] for seed in (0, 1))
        assert one["history"][0]["loss"] != other["history"][0]["loss"]


class _Interrupted(BaseException):
    pass


def train(job: Job, root: Path, stop_at: float = 2.0) -> list[float]:
    """The job in this process; interrupted between two checkpoints once more than ``stop_at`` of it is done."""
    fractions: list[float] = []

    def progress(event: Event) -> None:
        fractions.append(event.fraction)
        if event.fraction > stop_at:
            raise _Interrupted

    with contextlib.suppress(_Interrupted):
        training.train(job, root, progress)
    return fractions


@pytest.mark.parametrize("label", [*detente.list_methods(), "wpcgrad(priority=loss_power)", "single"])
def test_a_job_resumed_from_its_checkpoint_is_the_uninterrupted_one_bit_for_bit(label, tmp_path, monkeypatch):
    # a clock that jumps: every epoch is saved and every step reported
    clock = SimpleNamespace(monotonic=itertools.count(0, 10).__next__, process_time=time.process_time)
    monkeypatch.setattr(training, "time", clock)
    task = "sign" if label == "single" else None
    job = Job(str(TINY), label, "gd" if task else label, task, 3, {**load_problem(str(TINY)).settings, "epochs": 5})
    train(job, tmp_path / "whole")
    train(job, tmp_path / "parts", stop_at=0.7)
    assert not results(tmp_path / "parts")
    torch.manual_seed(99)  # another process has another state
    resumed = train(job, tmp_path / "parts")
    assert 0.5 < resumed[0] < 0.7  # went on from an epoch in the middle
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    assert len(results(tmp_path / "parts")) == 1


@linux
@pytest.mark.slow
def test_killed_again_and_again_the_same_command_ends_with_the_same_tables(original, tmp_path):
    options = ("--methods", METHODS, "--seeds", "2")
    out = tmp_path / "killed"

    def finished_runs() -> list[Path]:
        return list(out.glob("runs/*/*/result.json"))

    def checkpoints() -> list[Path]:
        return list(out.glob("runs/*/*/checkpoint.pt"))

    kept: dict[Path, int] = {}
    moments: list[tuple[str, Callable[[subprocess.Popen[str]], Any]]] = [
        ("the workers start", lambda process: (out / "comparison.json").exists() and children(process.pid)),
        ("the first checkpoints are there", lambda _: checkpoints() and not finished_runs()),
        ("baselines are finished and methods on their way", lambda _: finished_runs() and checkpoints()),
    ]
    for what, moment in moments:
        with started(TINY, out, *options) as process:
            until(lambda: moment(process), what, process)  # noqa: B023
            workers = children(process.pid)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert workers
            until(lambda: not any(map(alive, workers)), "the workers of the killed process die")  # noqa: B023
        kept = {path: path.stat().st_mtime_ns for path in finished_runs()}
        assert len(kept) < 10
    assert kept
    assert len(torch.load(checkpoints()[0], weights_only=True)["history"]) > 0
    resumed = run("compare", TINY, *options, "--out", out)
    assert resumed.code == 0, resumed.text
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in ("results.csv", "results.md", "results.tex"):
        assert (out / name).read_bytes() == (original / name).read_bytes()
    assert results(out) == results(original)
    assert not checkpoints()


@linux
def test_while_one_process_works_in_a_directory_another_one_is_sent_away(tmp_path):
    out = tmp_path / "out"
    with started(TINY, out, "--methods", "gd", "--seeds", "1", "--epochs", "400") as process:
        until(lambda: list(out.glob("runs/*/*")), "runs start", process)
        before = (out / "comparison.json").read_bytes()
        second = run("compare", TINY, "--methods", "mgda", "--seeds", "2", "--epochs", "400", "--out", out)
        assert process.poll() is None
        assert second.code == 2
        assert "another detente process is working in" in tidy(second)
        assert (out / "comparison.json").read_bytes() == before


@linux
def test_interrupting_with_control_c_ends_quickly_without_tracebacks_and_can_be_continued(tmp_path):
    out = tmp_path / "out"
    options = ("--methods", "gd", "--seeds", "6", "--epochs", "60")  # takes a minute
    with started(TINY, out, *options) as process:
        until(lambda: list(out.glob("runs/*/*/checkpoint.pt")), "a checkpoint is there", process)
        workers = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal sends
        text, _ = process.communicate(timeout=PATIENCE)
        until(lambda: not any(map(alive, workers)), "the workers end")
    assert process.returncode not in (0, 2)
    assert "Traceback" not in text
    assert len(list(out.glob("runs/*/*/result.json"))) < 18


def test_unusable_checkpoints_end_their_jobs_alone(original, finished):
    broken = {"gd/seed-0": b"no checkpoint", "pcgrad/seed-1": b"", "single-sum/seed-1": None}
    for name, content in broken.items():
        (finished / "runs" / name / "result.json").unlink()
        path = finished / "runs" / name / "checkpoint.pt"
        if content is None:
            torch.save({"job": {"label": "another"}}, path)
        else:
            path.write_bytes(content)
    (finished / "runs/pcgrad/seed-0/result.json").unlink()
    before = {k: v for k, v in snapshot(finished).items() if k.endswith("result.json")}
    outcome = compare(finished)
    assert outcome.code == 1
    for name in broken:
        run_name, seed = name.split("/seed-")
        (line,) = [x for x in tidy(outcome).splitlines() if x.startswith(f"failed {run_name} seed {seed}")]
        assert str(finished / "runs" / name / "checkpoint.pt") in line
        assert "Delete this file" in line
    assert outcome.text.count("cannot be used") == 3
    after = snapshot(finished)
    assert {k: after[k] for k in before} == before
    assert "runs/pcgrad/seed-0/result.json" in after
    for name in broken:
        (finished / "runs" / name / "checkpoint.pt").unlink()
    repaired = compare(finished)
    assert repaired.code == 0, repaired.text
    assert results(finished) == results(original)
    assert (finished / "results.csv").read_bytes() == (original / "results.csv").read_bytes()
    assert not list(finished.rglob("error.txt"))


def test_a_finished_comparison_is_shown_again_without_training(original, finished):
    before = snapshot(finished)
    outcome = compare(finished)
    assert outcome.code == 0
    assert "10/10" in outcome.text
    after = snapshot(finished)
    assert {k: v for k, v in after.items() if k.startswith("runs/")} == {
        k: v for k, v in before.items() if k.startswith("runs/")
    }
    assert after["results.csv"][1] == before["results.csv"][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", "9"), "settings was epochs = 30 and is now 9"),
        (("--lr", "0.5"), "lr = 0.01 and is now 0.5"),
        (("--batch-size", "8", "--seeds", "5"), "batch_size = 16 and is now 8"),
    ],
)
def test_other_settings_in_the_same_directory_are_an_error_and_change_nothing(finished, options, message):
    before = snapshot(finished)
    outcome = compare(finished, TINY, METHODS, 2, *options)
    assert outcome.code == 2
    assert "holds another comparison" in tidy(outcome)
    assert message in outcome.text
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    ("name", "message"), [("tiny_problem", "the problem's code was"), ("other", "problem was 'tiny_problem'")]
)
def test_another_problem_in_the_same_directory_is_an_error_and_changes_nothing(finished, tmp_path, name, message):
    problem = tmp_path / f"{name}.py"
    problem.write_text(TINY.read_text() + "# edited\n")
    before = snapshot(finished)
    outcome = compare(finished, problem)
    assert outcome.code == 2
    assert message in tidy(outcome)
    assert snapshot(finished) == before


def test_methods_and_seeds_may_be_added_and_finished_runs_are_kept(finished):
    before = {k: v for k, v in snapshot(finished).items() if k.startswith("runs/")}
    rows = set((finished / "results.csv").read_text().splitlines())
    outcome = compare(finished, TINY, "gd", 3)
    assert outcome.code == 0, outcome.text
    assert "2 of 15 runs are not finished (" in outcome.text
    assert "connection_strength seed 2" in outcome.text
    outcome = compare(finished, TINY, "mgda," + METHODS, 1)
    assert outcome.code == 0, outcome.text
    after = snapshot(finished)
    assert {k: after[k] for k in before} == before
    added = {"single-sum/seed-2", "single-sign/seed-2", "gd/seed-2", "mgda/seed-0"}
    assert {k for k in after if k.startswith("runs/")} - set(before) == {f"runs/{k}/result.json" for k in added}
    config = json.loads((finished / "comparison.json").read_text())
    assert set(config["methods"]) == {"single", "gd", "pcgrad", "connection_strength", "mgda"}
    assert config["seeds"] == [0, 1, 2]
    figures = {r for r in rows if ",pcgrad,sum,mse,min,0," in r or ",gd,sign,accuracy,max,1," in r}
    assert len(figures) == 2
    assert figures <= set((finished / "results.csv").read_text().splitlines())


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        outcome = compare(out)
        assert outcome.code == 2
        assert f"cannot write to {out}" in tidy(outcome)
        assert "Choose another --out" in outcome.text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("x, total, sign = batch", "x, total = batch", "too many values to unpack"),
        ('"test": slice', '"extra": slice', "'test' is missing"),
    ],
)
def test_when_every_run_fails_the_reason_is_shown(tmp_path, old, new, message):
    problem = tmp_path / "broken.py"
    assert old in TINY.read_text()
    problem.write_text(TINY.read_text().replace(old, new))
    outcome = compare(tmp_path / "out", problem, "gd", 1)
    assert outcome.code == 1
    assert message in tidy(outcome)


def test_a_metric_that_is_never_finite_is_said_and_does_not_block_the_tables(tmp_path):
    problem = tmp_path / "undefined.py"
    problem.write_text(TINY.read_text().replace(".double().mean())", ".double().mean()) * float('nan')"))
    outcome = compare(tmp_path / "out", problem, "gd", 1)
    assert outcome.code in (0, 1)
    assert "accuracy" in tidy(outcome)
    assert "not finite" in outcome.text


def test_a_batch_larger_than_the_training_split_is_an_error_not_a_run_without_steps(tmp_path):
    outcome = compare(tmp_path / "out", TINY, "gd", 1, "--batch-size", "49")
    assert outcome.code in (1, 2)
    assert "batch_size" in tidy(outcome)  # not the --batch-size of the repeated command


def test_a_run_that_diverges_is_reported_and_never_dropped(tmp_path):
    """Its row is there, says where it stopped, and the other methods are compared as usual; a resumed run keeps it."""
    out, problem = tmp_path / "out", tmp_path / "descent.py"
    descent = (
        "\n\ndef make_optimizer(model, settings):\n    return torch.optim.SGD(model.parameters(), lr=settings['lr'])\n"
    )
    problem.write_text(TINY.read_text() + descent)
    for _ in range(2):
        methods = "mgda,famo,auto_lambda,gd(weights=[1e9, 1e9])"  # the losses overflow within a few steps
        outcome = compare(out, problem, methods, 3, "--epochs", "2")
        assert outcome.code == 0, outcome.out
        assert "diverged" in outcome.out
        assert "seed 0 in epoch" in outcome.out
    rows = (out / "results.csv").read_text()
    assert all(name in rows for name in ("famo", "auto_lambda", "gd(weights="))
    assert {r["label"] for r in results(out).values() if r["diverged"] is None} >= {"single", "gd", "mgda"}
    found = [json.loads(path.read_text()) for path in out.glob("runs/gd(weights*/seed-*/result.json")]
    assert len(found) == 3
    assert all(result["diverged"]["epoch"] == 1 for result in found)
    assert all(value is None for result in found for task in result["metrics"].values() for value in task.values())
    assert re.match(r"losses\['s\w+'\] is (nan|inf)", found[0]["diverged"]["reason"])


def test_losses_are_logged_once_a_step_whatever_the_method_computes(tmp_path):
    """Auto-Lambda computes the losses five times, FAMO twice; the logged mean is that of the first time."""
    out = tmp_path / "out"
    assert compare(out, TINY, "famo,auto_lambda", 1, "--epochs", "1", "--lr", "1e-9").code == 0
    logged = [
        json.loads((out / f"runs/{name}/seed-0/result.json").read_text())["history"][0]["loss"]
        for name in ("gd", "famo", "auto_lambda")
    ]
    for losses in logged[1:]:  # nothing learns at this rate; dropout draws differ where a method looks ahead
        assert all(abs(losses[task] / logged[0][task] - 1) < 0.2 for task in losses)
