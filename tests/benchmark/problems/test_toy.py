"""The CAGrad toy: right gradients, the same steps as a plain loop, and the published end points."""

from __future__ import annotations

import csv
import io
import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import detente
from benchmark.command import run as command
from detente.benchmark.problems import toy
from detente.benchmark.specs import Spec, parse_methods

SETTINGS = {"steps": 300, "lr": 1e-3}


def losses(x: Tensor) -> Tensor:
    """Both losses at one point, written down from the paper (f2 as in the authors' code)."""
    x1, x2 = x
    f1 = torch.log(torch.maximum((0.5 * (-x1 - 7) - torch.tanh(-x2)).abs(), torch.tensor(5e-6))) + 6
    f2 = torch.log(torch.maximum((0.5 * (-x1 + 3) + torch.tanh(-x2) + 2).abs(), torch.tensor(5e-6))) + 6
    q1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    q2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    above = torch.maximum(torch.tanh(0.5 * x2), torch.zeros((), dtype=x.dtype))
    below = torch.maximum(torch.tanh(-0.5 * x2), torch.zeros((), dtype=x.dtype))
    return torch.stack([above * f1 + below * q1, above * f2 + below * q2])


def jacobian(x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(losses, x)  # type: ignore[no-any-return]


def run(directory: Path, methods: str, steps: int = 300) -> dict[tuple[str, int], dict[str, Any]]:
    toy.compare([Spec.parse(m) for m in methods.split(";")], {**SETTINGS, "steps": steps}, directory, lambda _: None)
    return read(directory)


def read(directory: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Results by method and start, without what was timed."""
    found = {}
    for path in directory.glob("runs/*/*/result.json"):
        content = json.loads(path.read_text())
        del content["cost"]
        found[content["label"], content["seed"]] = content
    return found


def test_losses_and_gradients_are_those_of_the_formulas():
    generator = torch.Generator().manual_seed(0)
    x = 22 * torch.rand(400, 2, dtype=torch.float64, generator=generator) - 11
    x = x[x[:, 1].abs() > 1e-3]  # m1 and m2 have a kink at 0
    # float64 rounding, enlarged where the logarithm is steep: |u| is above 1e-3 at these points
    np.testing.assert_allclose(toy.losses_at(x.numpy()), torch.stack([losses(p) for p in x]), rtol=1e-12, atol=1e-12)
    expected = torch.stack([jacobian(p) for p in x])
    np.testing.assert_allclose(toy.gradients_at(x.numpy()), expected, rtol=1e-10, atol=1e-10)


def test_any_batch_of_points_is_evaluated_point_by_point():
    x = np.array(toy.STARTS)
    stacked = np.stack([x, x[::-1]])
    assert toy.losses_at(stacked).shape == (2, 5, 2)
    assert toy.gradients_at(stacked).shape == (2, 5, 2, 2)
    np.testing.assert_array_equal(toy.gradients_at(stacked)[1, 0], toy.gradients_at(x[4]))


def test_the_optimum_is_where_the_mean_gradient_vanishes():
    gradient = toy.gradients_at(np.array(toy.OPTIMUM)).mean(0)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)  # the optimum is given to four digits, the curvature is .03
    assert toy.losses_at(np.array(toy.OPTIMUM)).mean() == pytest.approx(-15.0916, abs=1e-4)  # its four digits


def test_a_short_run_is_the_plain_loop_of_every_method_and_start(tmp_path):
    methods = ("gd", "mgda", "pcgrad", "cagrad(c=0.5)", "edm")
    found = run(tmp_path, ";".join(methods), steps=100)
    assert len(found) == 25
    for label, (k, start) in itertools.product(methods, enumerate(toy.STARTS)):
        x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        optimizer, method = torch.optim.Adam([x], lr=1e-3), Spec.parse(label).build()
        path = []
        for _ in range(100):
            path.append(x.detach().clone())
            x.grad = detente.aggregate(jacobian(x.detach()), method)
            optimizer.step()
        path.append(x.detach().clone())
        # rounding of 100 steps of 1e-3 in float64, through the direction of a gradient of any length
        np.testing.assert_allclose(found[label, k]["path"], torch.stack(path), atol=1e-9, err_msg=f"{label} {start}")


def test_a_result_has_the_final_losses_and_is_thinned(tmp_path):
    result = run(tmp_path, "gd", steps=1200)["gd", 3]
    assert result["path"][0] == list(toy.STARTS[3])
    assert len(result["path"]) == 601  # every second point, and the last
    final = toy.losses_at(np.array(result["path"][-1]))
    assert result["metrics"] == {"loss 1": {"final": final[0]}, "loss 2": {"final": final[1]}}
    assert result["steps"] == result["selected_epoch"] == 1200
    assert result["task"] is None
    assert 0 <= result["conflict_rate"] <= 1


class _Interrupted(BaseException):
    pass


def test_a_run_resumed_from_its_checkpoint_is_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "SAVE_EVERY", 700)
    methods, settings = parse_methods("rlw,pcgrad,cagrad"), {"steps": 2100, "lr": 1e-3}
    for name in ("parts", "whole"):
        (tmp_path / name).mkdir()

    def interrupt(event: Any) -> None:
        if event.fraction * 2100 >= 1000:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        toy.compare(methods, settings, tmp_path / "parts", interrupt)
    assert torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)["step"] == 700
    assert not read(tmp_path / "parts")
    steps: list[float] = []
    toy.compare(methods, settings, tmp_path / "parts", lambda event: steps.append(event.fraction * 2100))
    assert min(steps) == pytest.approx(1000)
    toy.compare(methods, settings, tmp_path / "whole", lambda _: None)
    assert read(tmp_path / "parts") == read(tmp_path / "whole")
    assert not (tmp_path / "parts/checkpoint.pt").exists()


def test_an_unusable_checkpoint_is_an_error_with_its_path(tmp_path):
    for content in (b"", b"no checkpoint"):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be used.*Delete this file") as caught:
            run(tmp_path, "gd")
        assert str(tmp_path / "checkpoint.pt") in str(caught.value)


def test_a_method_added_later_leaves_the_results_of_the_others_as_they_were(tmp_path):
    before = run(tmp_path, "gd;pcgrad")
    assert {**run(tmp_path, "gd;mgda;pcgrad"), **before} == read(tmp_path)
    assert len(read(tmp_path)) == 15


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ((0.0, -8.3551), "optimum"),
        ((0.01, -8.36), "optimum"),
        ((0.03, -8.3551), "front"),
        ((-6.9, -8.42), "front"),
        ((7.0, -8.36), "front"),
        ((-5.04, 2.13), "stuck"),
        ((-5.63, 0.81), "stuck"),
        ((9.0, -8.36), "under way"),
        ((0.0, -5.0), "under way"),
    ],
)
def test_outcome(x, expected):
    assert toy.outcome(np.array(x)) == expected


def results(**ends: list[tuple[float, float]]) -> list[dict[str, Any]]:
    return [
        {"label": label, "seed": k, "path": [list(toy.STARTS[k]), list(end)], "task": None}
        for label, found in ends.items()
        for k, end in enumerate(found)
    ]


def test_the_verdict_names_who_is_where():
    text = toy.verdict(
        results(
            cagrad=[(0, -8.3551)] * 5,
            pcgrad=[(-2.2, -8.36), (-2.3, -8.36), (0, -8.355), (2.7, -8.36), (6.6, -8.36)],
            mgda=[(-5.8, -8.36), (-5.8, -8.36), (-5.6, -8.36), (-3.6, -8.36), (-3.3, -8.36)],
            gd=[(-5, 2.1), (-5.6, 0.8), (0, -8.355), (5, 2.3), (0, -8.355)],
        )
    )
    sentence = text.lower()
    assert "cagrad reached the optimum" in sentence
    assert "gd is stuck at the ridge from 3" in sentence
    front = sentence.partition("stuck at the ridge")[2]
    assert "pcgrad" in front
    assert "mgda" in front


def test_the_summary_shows_every_method_in_full_in_eighty_columns():
    labels = ("gd", "cagrad(c=0.2)", "cagrad(c=0.8)")
    made = [{**r, "label": label} for label in labels for r in results(x=[(-5.04, 2.13)] * 3 + [(0, -8.355)] * 2)]
    text = io.StringIO()
    for table in toy.summary(made):
        Console(file=text, width=80).print(table)
    assert all(label in text.getvalue() for label in labels)


def test_the_command_writes_the_figure_the_points_and_the_tables(tmp_path):
    code, out, err, _ = command("compare", "toy", "--methods", "mgda,cagrad", "--steps", "50", "--out", tmp_path)
    assert code == 0, err
    assert "not finished" not in out
    (figure,) = tmp_path.glob("figures/*.svg")
    assert ET.parse(figure).getroot().tag.endswith("svg")
    with (tmp_path / "points.csv").open() as file:
        points = list(csv.DictReader(file))
    assert [(p["label"], p["start"]) for p in points[:2]] == [("cagrad", "0"), ("cagrad", "1")]
    assert len(points) == 15
    ends = read(tmp_path)
    assert all([float(p["x1"]), float(p["x2"])] == ends[p["label"], int(p["start"])]["path"][-1] for p in points)
    assert "mgda" in (tmp_path / "results.csv").read_text()
    assert figure.stem.partition(",")[0].split()[0] in (tmp_path / "report.html").read_text()
    table = (tmp_path / "results.csv").read_bytes()
    figure.unlink()
    assert command("report", tmp_path)[0] == 0
    assert figure.exists()
    assert (tmp_path / "results.csv").read_bytes() == table


@pytest.mark.parametrize("method", ["cdtt", "gls", "dwa", "connection_strength", "wpcgrad(priority=loss_power)"])
def test_a_method_that_needs_what_the_toy_lacks_is_refused_and_not_remembered(method, tmp_path):
    code, out, err, _ = command("compare", "toy", "--methods", method, "--steps", "10", "--out", tmp_path)
    assert code == 2
    assert out == ""
    assert f"{method} needs" in err
    assert "Leave it out of --methods" in err
    assert "Traceback" not in err
    code, out, err, _ = command("compare", "toy", "--methods", "gd", "--steps", "10", "--out", tmp_path)
    assert code == 0, err
    assert "not finished" not in out


@pytest.mark.slow
def test_after_the_whole_run_the_methods_are_where_the_paper_says(tmp_path):
    labels = ["gd", "mgda", "pcgrad", "cagrad(c=0.2)", "cagrad(c=0.5)", "cagrad(c=0.8)"]
    found = run(tmp_path, ";".join(labels), steps=100_000)
    ends = {label: [np.array(found[label, k]["path"][-1]) for k in range(5)] for label in labels}
    reached = {label: [toy.outcome(end) for end in ends[label]] for label in labels}
    for label in labels[3:]:
        for end in ends[label]:
            # the optimum is flat: Adam's steps of up to 1e-3 still wander about it
            assert np.linalg.norm(end - [0, -8.3551]) <= 0.02, (label, end)
    # where on the front is chaos: a start moved by 1e-13 moves the end by whole units, past the ridge's singularity
    assert set(reached["mgda"]) <= {"front", "optimum"}
    assert set(reached["pcgrad"]) <= {"front", "optimum"}
    assert reached["gd"] == ["stuck", "stuck", "optimum", "stuck", "optimum"]
    np.testing.assert_allclose(ends["gd"][0], [-5.04, 2.13], atol=0.1)
    np.testing.assert_allclose(ends["gd"][3], [5.06, 2.33], atol=0.1)
