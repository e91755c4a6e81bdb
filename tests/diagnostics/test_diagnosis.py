"""Planted causes are named, by `detente diagnose` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import detente
from benchmark.command import run
from detente.diagnostics import Recording, diagnose, figures

PLANTED = Path(__file__).with_name("planted.py")


@pytest.mark.parametrize(
    ("relation", "causes", "headline"),
    [
        ("none", (), "No conflict was seen"),
        ("scale", ("dominance",), "The gradient of left drowns that of right"),
        ("last block", ("local conflict",), "Left and right pull against each other, but only in blocks.2."),
    ],
)
def test_planted_causes_are_named(relation, causes, headline, tmp_path):
    out = tmp_path / "out"
    told = run("diagnose", PLANTED, "--set", f"relation={relation}", "--every", "2", "--out", out)
    assert told.code == 0, told.text
    assert f"\n{headline}" in told.out
    found = diagnose(Recording.load(out / "recording.jsonl"))
    assert found.causes == causes
    assert found.layers == (("blocks.2.0", "blocks.2.2") if relation == "last block" else ())
    page = (out / "diagnosis.html").read_text()
    assert headline in page
    assert page.count("<figure") >= 4
    assert "http:" not in page  # nothing is loaded from anywhere
    for command in ("diagnose", "report"):
        again = run(command, out / "recording.jsonl")
        assert again.code == 0, again.text
        assert headline in again.out
        (out / "recording.html").unlink()


def test_an_earlier_recording_is_kept(tmp_path):
    arguments = ("diagnose", PLANTED, "--epochs", "1", "--out", tmp_path)
    assert run(*arguments).code == 0
    first = (tmp_path / "recording.jsonl").read_bytes()
    assert run(*arguments).code == 0
    assert (tmp_path / "recording-before.jsonl").read_bytes() == first


def recording(tmp_path, losses_of, steps=30, lr=0.01, model=None):
    """Of a parameter with two coordinates in two layers."""
    torch.manual_seed(0)
    model = (
        torch.nn.ModuleDict({k: torch.nn.Linear(2, 2, bias=False) for k in ("one", "two")}) if model is None else model
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    recorder = detente.Recorder(model, tmp_path / "run.jsonl", every=1, realised_every=1)
    for k in range(steps):
        with recorder.observe(losses_of(model, k), again=lambda k=k: losses_of(model, k)):
            sum(losses_of(model, k).values()).backward()
            optimizer.step()
        optimizer.zero_grad()
    return Recording.load(recorder.path)


def test_a_conflict_that_begins_is_dated(tmp_path):
    def losses(model, k):
        out = model["two"](model["one"](torch.ones(1, 2))).sum()
        return {"up": out, "down": -out if k >= 20 else 0.5 * out}

    found = diagnose(recording(tmp_path, losses, steps=40))
    assert found.causes == ("conflict",)
    since = next(answer for answer in found.answers if answer.question == "Since when?")
    assert since.answer.startswith("Since about step ")
    assert 15 <= int(since.answer.split()[-1].rstrip(".")) <= 25  # a running mean of five records


def test_steps_that_are_too_long_are_no_conflict(tmp_path):
    """A quadratic with curvature 1 in every direction and a learning rate above 2."""

    def losses(model, k):
        point = torch.cat([p.reshape(-1) for p in model.parameters()])
        return {"a": (point - 0.1).square().sum() / 2, "b": (point + 0.1).square().sum() / 2}

    found = diagnose(recording(tmp_path, losses, lr=1.3))
    assert found.causes == ("overshoot",)
    assert "learning rate" in str(found)


def test_curvature_of_a_quadratic(tmp_path):
    def losses(model, k):
        point = torch.cat([p.double().reshape(-1) for p in model.parameters()])
        return {"a": point.square().sum(), "b": 3 * (point - 1).square().sum()}

    model = torch.nn.ModuleDict({k: torch.nn.Linear(2, 2, bias=False) for k in ("one", "two")}).double()
    found = recording(tmp_path, losses, steps=5, lr=0.05, model=model)
    # second derivatives 2 and 6 along any step; six digits are written, of differences
    assert found.curvature[:3] == pytest.approx(np.array([[2.0, 6.0]] * 3), rel=1e-3)


def test_one_task_alone_says_nothing(tmp_path):
    found = diagnose(recording(tmp_path, lambda model, k: {"a": model["two"](model["one"](torch.ones(1, 2))).sum()}))
    assert found.causes == ()
    assert found.answers[0].answer == "Not known."


def test_figures_of_many_tasks(tmp_path):
    def losses(model, k):
        out = model["two"](model["one"](torch.ones(1, 2)))
        return {f"task {t}": out.sum() * (t - 6) + out[0, 0] * (t + 1) for t in range(14)}

    shown = {title: figure for title, _, figure in figures(recording(tmp_path, losses, steps=12))}
    assert {"Cosines over time", "Who against whom", "Layer by layer", "Change of the losses"} <= set(shown)
    for figure in shown.values():
        figure.canvas.draw()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toy"], "no several losses on batches"),
        (["mt4"], "Attach a detente.Recorder"),
        (["digits", "--method", "nosuch"], "nosuch"),
        (["missing.jsonl"], "missing.jsonl"),
    ],
)
def test_what_cannot_be_diagnosed_is_told(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = run("diagnose", *arguments)
    assert told.code == 2
    assert message in told.err
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_training_that_diverges_is_told_about_all_the_same(tmp_path):
    told = run("diagnose", PLANTED, "--lr", "1e30", "--every", "1", "--out", tmp_path)
    assert told.code == 0, told.text
    assert "Diverged: " in told.out
    assert "This is what was seen until then." in told.out
    assert (tmp_path / "diagnosis.html").exists()


def test_two_recordings_are_not_laid_side_by_side(tmp_path):
    assert "one at a time" in run("report", "a.jsonl", "b.jsonl").err
