"""The examples run as scripts, and what they show is so."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.matrix import launch
from integrations.worker import EXAMPLES, error, example

HERE = {"ddp", "depth_and_segmentation", "lora", "partly_labelled", "pinn"}
ELSEWHERE = {  # tests/integrations and tests/test_docs.py
    "accelerate_example",
    "actor_critic",
    "lightning_example",
    "own_problem",
    "torchrun_plain",
    "transformers_example",
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(name: str) -> Any:
    """What a script found, as ``python examples/NAME.py`` runs it."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")["figures"]


def test_no_example_is_left_out():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == HERE | ELSEWHERE


@pytest.mark.long
def test_depth_and_segmentation(capsys):
    figures = run("depth_and_segmentation")
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(figures)
    untrained = figures.pop("untrained")
    assert untrained["miou"] < 0.3
    assert untrained["depth_error"] > 1
    for row in figures.values():  # .75 and .77, .173 and .169 m
        assert row["miou"] > 0.65
        assert row["depth_error"] < 0.22


def test_partly_labelled(capsys):
    figures = run("partly_labelled")
    assert "rare" in capsys.readouterr().out
    steps = figures["steps"]
    assert 0.3 * steps["common"] < steps["rare"] < 0.9 * steps["common"]
    for way in ("equal weights", "CDTT"):  # 1 is the error of the mean
        assert figures[way]["common"] < 0.1
        assert figures[way]["some"] < 0.15
        assert figures[way]["rare"] < 0.9 * figures["alone"]["rare"]
    assert all(norm > 0 for norm in figures["last gradient norm"].values())


def test_a_rare_task_keeps_its_history_while_it_is_away():
    module = example("partly_labelled")
    module.LABELLED["rare"] = 0.01
    x, targets = module.make_data(240, 1, module.LABELLED)
    method = module.detente.CDTT(window=3)
    _, steps = module.train((x, targets), method=method, epochs=1, batch_size=24)
    assert 0 < steps["rare"] < 4 < steps["common"]
    assert {task: len(norms) for task, norms in method.history.items()} == {
        "common": 4, "some": 4, "rare": steps["rare"]
    }  # fmt: skip


def test_pinn(capsys):
    figures = run("pinn")
    assert len(capsys.readouterr().out.splitlines()) == len(figures)
    assert figures["untrained"] > 0.9
    assert figures["equal weights"] < 0.08
    assert figures["ConFIG"] < 0.05


def test_the_exact_solution_of_the_pinn_solves_its_equation():
    pinn = example("pinn")
    x, t = torch.cartesian_prod(torch.linspace(-1, 1, 41), torch.linspace(0.05, 1, 20)).double().unbind(1)
    x, t = x.requires_grad_(), t.requires_grad_()

    def slope(value: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value.sum(), of, create_graph=True)[0]

    u = pinn.exact(x, t)
    u_x = slope(u, x)
    assert (slope(u, t) + u * u_x - pinn.NU * slope(u_x, x)).abs().max() < 1e-6
    x, t = x.detach(), t.detach()
    assert (pinn.exact(x, 0 * t) + torch.sin(torch.pi * x)).abs().max() < 1e-12
    assert pinn.exact(x.sign(), t)[x != 0].abs().max() < 1e-12


@pytest.mark.long
def test_lora(capsys):
    figures = run("lora")
    assert figures["shared"] == [
        f"blocks.{block}.{layer}.{part}" for block in (0, 1) for layer in ("query", "value") for part in ("down", "up")
    ]
    assert "blocks.1.value.up" in capsys.readouterr().out
    heads, *adapted = figures["accuracies"].values()
    assert heads["source"] > 0.85  # the encoder has learned something
    for row in adapted:
        assert row["source"] > 0.9
        assert row["reversed"] > heads["reversed"] + 0.1
        assert row["repeats"] > 0.65


def losses_in(text: str) -> dict[str, float]:
    return {task: float(value) for task, value in re.findall(r"(sine|step) ([\d.]+)", text)}


@pytest.mark.long
def test_ddp_goes_on_from_its_checkpoint_with_any_number_of_processes(capsys, tmp_path):
    main = example("ddp").main
    start = main(epochs=0, path="start.pt")
    first = main(epochs=3, path="one.pt")
    one = torch.load("one.pt", weights_only=True)
    second = main(epochs=3, path="one.pt")
    assert second == main(epochs=6, path="whole.pt")  # to the bit
    assert second["sine"] < first["sine"] < start["sine"]
    assert second["step"] < first["step"] < start["step"]

    done = launch(2, EXAMPLES / "ddp.py")
    assert "after 3 epochs" in done.stdout, done.stderr[-4000:]
    assert losses_in(done.stdout) == pytest.approx({task: first[task] for task in ("sine", "step")}, rel=1e-4)
    two = torch.load("runs/ddp.pt", weights_only=True)
    assert error(two["network"], one["network"]) < 1e-4

    assert run("ddp") == pytest.approx(second, rel=1e-4)
    assert "after 6 epochs" in capsys.readouterr().out
