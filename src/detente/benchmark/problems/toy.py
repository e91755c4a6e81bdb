"""The CAGrad toy: two losses of two parameters; who reaches the optimum, the Pareto front, or gets stuck?

The problem of the CAGrad paper (Liu et al. 2021, Section 5.1) with the losses of the authors' code (the paper prints
another sign in ``f2``), the paper's five starts, Adam with rate 1e-3 and 100,000 steps. A long ridge separates most
starts from the optimum of the mean loss at (0, -8.355); the Pareto set is close to the segment from (-7, -8.355) to
(7, -8.355). All methods and starts run in one batch, in float64. "Seed" k of the tables is start k. There is no
single-task baseline: the two parameters are all there is. Methods that take logarithms of losses do not apply, because
the losses are negative.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from torch import Tensor

from detente.benchmark.files import read_checkpoint, write_checkpoint, write_json
from detente.benchmark.job import Event, Job
from detente.benchmark.specs import Spec
from detente.method import Context, GramianMethod, LossWeighting, Method, method_class

Array = NDArray[np.float64]

tasks = {"loss 1": {"final": "min"}, "loss 2": {"final": "min"}}
settings = {"steps": 100_000, "lr": 1e-3, "seeds": 5}
methods = "gd,mgda,pcgrad,cagrad(c=0.2),cagrad(c=0.5),cagrad(c=0.8),wpcgrad,edm"
STARTS = ((-8.5, 7.5), (-8.5, 5.0), (0.0, 0.0), (9.0, 9.0), (10.0, -8.0))
OPTIMUM = (0.0, -8.3551)
KEEP = 500  # points kept of a trajectory
SAVE_EVERY = 5000
NAMES = tuple(tasks)


def losses_at(x: Array) -> Array:
    """Losses ``[..., 2]`` at points ``[..., 2]``."""
    return _evaluate(x)[0]


def gradients_at(x: Array) -> Array:
    """Gradients ``[..., 2 losses, 2 parameters]`` at points ``[..., 2]``; at the kink x2 = 0 the mean of both sides."""
    return _evaluate(x)[1]


def _evaluate(x: Array) -> tuple[Array, Array]:
    x1, x2 = x[..., 0], x[..., 1]
    tanh, half = np.tanh(x2), np.tanh(0.5 * x2)
    up = np.heaviside(x2, 0.5)  # the ridge losses f count above x2 = 0, the bowls q below
    m1, m2 = half * up, half * (up - 1)
    slope = 0.5 * (1 - half**2)
    dm1, dm2 = slope * up, slope * (up - 1)
    values, gradients = [], []
    for sign in (1.0, -1.0):
        u = -0.5 * x1 - sign * 3.5 + sign * tanh
        large = np.abs(u) > 5e-6
        inverse = np.where(large, 1 / np.where(large, u, 1.0), 0.0)
        f = np.log(np.maximum(np.abs(u), 5e-6)) + 6
        q = ((x1 - sign * 7) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
        values.append(m1 * f + m2 * q)
        d1 = m1 * inverse * -0.5 + m2 * (x1 - sign * 7) / 5
        d2 = m1 * inverse * sign * (1 - tanh**2) + dm1 * f + m2 * 0.02 * (x2 + 8) + dm2 * q
        gradients.append(np.stack([d1, d2], axis=-1))
    return np.stack(values, axis=-1), np.stack(gradients, axis=-2)


def outcome(x: Array) -> str:
    """Where a trajectory that ended at ``x`` got to.

    ``optimum`` (within 0.02), ``front`` (on the Pareto set), ``stuck`` (at the ridge) or ``under way`` (in the bowl).
    """
    if math.dist(x.tolist(), OPTIMUM) <= 0.02:
        return "optimum"
    if abs(x[0]) <= 7.05 and abs(x[1] + 8.395) <= 0.05:
        return "front"
    return "stuck" if x[1] > 0 else "under way"


def check(specs: Sequence[Spec]) -> None:
    """Raise where a method needs more than gradients: the losses are negative, and there is no model."""
    for spec in specs:
        needs = method_class(spec.method).needs
        if not needs - {"gramian"}:
            needs = spec.build().needs
        if needs - {"gramian"}:
            raise ValueError(
                f"{spec.label} needs {', '.join(sorted(needs - {'gramian'}))}, which the toy does not have (its losses "
                "are negative). Leave it out of --methods."
            )


def compare(
    specs: Sequence[Spec], settings: dict[str, Any], directory: Path, progress: Callable[[Event], None]
) -> None:
    """Run all methods from all starts at once; goes on from its checkpoint after an interruption."""
    jobs = [[Job("toy", spec.label, spec.label, None, k, settings) for k in range(len(STARTS))] for spec in specs]
    if all((job.directory(directory) / "result.json").exists() for row in jobs for job in row):
        return
    check(specs)
    trained = [spec.build() for spec in specs]
    state = _State(len(specs), settings)
    checkpoint = directory / "checkpoint.pt"
    labels = [spec.label for spec in specs]
    if checkpoint.exists():
        state.load(checkpoint, labels, trained)
    steps = int(settings["steps"])
    stride = max(steps // KEEP, 1)
    while state.step < steps:
        if state.step % stride == 0:
            state.path.append(state.x.detach().clone())
        state.advance(trained)
        if state.step % 1000 == 0:
            progress(Event("toy", "training", state.step / steps, f"step {state.step:,}"))
        if state.step % SAVE_EVERY == 0:
            state.save(checkpoint, labels, trained)
    state.path.append(state.x.detach().clone())
    path = torch.stack(state.path).numpy()  # [points, methods, starts, 2]
    for m, row in enumerate(jobs):
        for k, job in enumerate(row):
            job.directory(directory).mkdir(parents=True, exist_ok=True)
            write_json(job.directory(directory) / "result.json", _result(job, specs[m], state, path[:, m, k], m, k))
    checkpoint.unlink(missing_ok=True)


class _State:
    """Points ``[methods, starts, 2]``, their optimizer, and what is recorded on the way."""

    def __init__(self, count: int, settings: dict[str, Any]) -> None:
        starts = torch.tensor(STARTS, dtype=torch.float64)
        self.x = starts.expand(count, -1, -1).clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.x], lr=settings["lr"], foreach=False)
        self.step = 0
        self.path: list[Tensor] = []
        self.conflicts = torch.zeros(count, len(STARTS), dtype=torch.float64)
        self.milliseconds = torch.zeros(count, dtype=torch.float64)

    def advance(self, methods: Sequence[Method]) -> None:
        jacobian = torch.from_numpy(gradients_at(self.x.detach().numpy()))  # [methods, starts, losses, 2]
        gramian = jacobian @ jacobian.transpose(-1, -2)
        self.conflicts += gramian[..., 0, 1] < 0
        weights = torch.empty(gramian.shape[:-1], dtype=torch.float64)
        for m, method in enumerate(methods):
            start = time.process_time()
            weights[m] = _weights(method, gramian[m])
            self.milliseconds[m] += 1000 * (time.process_time() - start)
        self.x.grad = (weights.unsqueeze(-2) @ jacobian).squeeze(-2)
        self.optimizer.step()
        self.step += 1

    def save(self, path: Path, labels: list[str], methods: Sequence[Method]) -> None:
        content = {
            "labels": labels,
            "x": self.x.detach(),
            "optimizer": self.optimizer.state_dict(),
            "methods": [method.state_dict() for method in methods],
            "step": self.step,
            "path": torch.stack(self.path),
            "conflicts": self.conflicts,
            "milliseconds": self.milliseconds,
        }
        write_checkpoint(path, content)

    def load(self, path: Path, labels: list[str], methods: Sequence[Method]) -> None:
        with read_checkpoint(path) as saved:
            if saved["labels"] != labels:
                return  # methods were added: all run anew
            with torch.no_grad():
                self.x.copy_(saved["x"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for method, state in zip(methods, saved["methods"], strict=True):
                method.load_state_dict(state)
            self.step, self.path = saved["step"], list(saved["path"])
            self.conflicts, self.milliseconds = saved["conflicts"], saved["milliseconds"]


_CONTEXT = Context(NAMES)


def _weights(method: Method, gramian: Tensor) -> Tensor:
    if isinstance(method, GramianMethod):
        return method.weights(gramian, _CONTEXT)
    assert isinstance(method, LossWeighting)
    return method.weights(torch.ones(2, dtype=torch.float64), _CONTEXT).expand(gramian.shape[:-1])


def _result(job: Job, spec: Spec, state: _State, path: Array, m: int, k: int) -> dict[str, Any]:
    values = losses_at(path)
    gradients = gradients_at(path)
    norms = np.linalg.norm(gradients, axis=-1)
    cosine = (gradients[:, 0] * gradients[:, 1]).sum(-1) / np.maximum(norms[:, 0] * norms[:, 1], 1e-300)
    stride = max(int(job.settings["steps"]) // KEEP, 1)
    history = [
        {
            "epoch": i * stride,
            "loss": dict(zip(NAMES, values[i].tolist(), strict=True)),
            "val": {},
            "weights": {},
            "norms": dict(zip(NAMES, norms[i].tolist(), strict=True)),
            "cosine": [[1.0, float(cosine[i])], [float(cosine[i]), 1.0]],
            "conflict_rate": float(cosine[i] < 0),
        }
        for i in range(0, len(path), 5)
    ]
    return {
        "problem": "toy",
        "method": spec.method,
        "label": spec.label,
        "seed": k,
        "task": None,
        "metrics": {name: {"final": float(values[-1, i])} for i, name in enumerate(NAMES)},
        "selected_epoch": state.step,
        "epochs": state.step,
        "steps": state.step,
        "path": path.tolist(),
        "history": history,
        "conflict_rate": float(state.conflicts[m, k]) / max(state.step, 1),
        "cost": {"step_ms": float(state.milliseconds[m]) / max(state.step, 1), "peak_mb": 0.0, "parameters": 2},
    }


def _paths(results: Sequence[dict[str, Any]]) -> dict[str, list[Array]]:
    found: dict[str, list[Array]] = {}
    for result in sorted(results, key=lambda r: int(r["seed"])):
        found.setdefault(result["label"], []).append(np.array(result["path"]))
    return found


def summary(results: Sequence[dict[str, Any]]) -> list[Table]:
    """End points of every method from every start."""
    table = Table(title="toy: where each start ended (front: its first coordinate)", box=box.SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for start in STARTS:
        table.add_column(f"{start[0]:g}, {start[1]:g}")
    for label, paths in _paths(results).items():
        ends = [path[-1] for path in paths]
        table.add_row(label, *(_words(x) for x in ends))
    return [table]


def verdict(results: Sequence[dict[str, Any]]) -> str:
    """Who reached the optimum from every start, and who got stuck."""
    reached = {label: [outcome(path[-1]) for path in paths] for label, paths in _paths(results).items()}
    parts = []
    everywhere = [label for label, found in reached.items() if set(found) == {"optimum"}]
    if everywhere:
        parts.append(f"{', '.join(everywhere)} reached the optimum of the mean loss from all {len(STARTS)} starts")
    for label, found in reached.items():
        if "stuck" in found:
            parts.append(f"{label} is stuck at the ridge from {found.count('stuck')}")
    on_front = [label for label, found in reached.items() if "front" in found and set(found) <= {"optimum", "front"}]
    if on_front:
        parts.append(f"{', '.join(on_front)} ended on the Pareto front, at points that depend on the start")
    return ("; ".join(parts) or "no method has reached the optimum or the Pareto front from all starts") + "."


def _words(x: Array) -> str:
    reached = outcome(x)
    details = {"optimum": "", "front": f" at {x[0]:.2f}"}
    return reached + details.get(reached, f" ({x[0]:.1f}, {x[1]:.1f})")


def report(results: Sequence[dict[str, Any]], directory: Path) -> None:
    """Draw the trajectories over the contours of the mean loss, and write the end points to ``points.csv``."""
    import matplotlib
    from matplotlib.figure import Figure

    paths = _paths(results)
    with (directory / "points.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "start", "x1", "x2", "loss 1", "loss 2", "outcome"])
        for label, found in paths.items():
            for k, path in enumerate(found):
                end = path[-1]
                writer.writerow([label, k, *map(repr, [*end.tolist(), *losses_at(end).tolist()]), outcome(end)])
    grid = np.stack(np.meshgrid(np.linspace(-11, 11, 221), np.linspace(-11, 11, 221)), axis=-1)
    mean = losses_at(grid).mean(-1)
    columns = min(4, len(paths))
    rows = math.ceil(len(paths) / columns)
    figure = Figure(figsize=(3.4 * columns, 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(paths) :]:
        ax.set_visible(False)
    for ax, (label, found) in zip(axes.flat, paths.items(), strict=False):
        ax.contour(grid[..., 0], grid[..., 1], mean, levels=24, linewidths=0.5, cmap="viridis", alpha=0.6)
        ax.plot([-7, 7], [OPTIMUM[1]] * 2, color="0.35", linewidth=4, alpha=0.5, solid_capstyle="round")
        for path in found:
            ax.plot(path[:, 0], path[:, 1], color="#d55e00", linewidth=1.4)
            ax.plot(*path[0], "o", color="black", markersize=4)
            ax.plot(*path[-1], "s", color="#d55e00", markeredgecolor="black", markersize=6)
        ax.plot(*OPTIMUM, "*", color="#f0e442", markeredgecolor="black", markersize=12)
        reached = [outcome(path[-1]) for path in found]
        ax.set_title(
            f"{label}\noptimum {reached.count('optimum')}, front {reached.count('front')}, "
            f"stuck {reached.count('stuck')}",
            fontsize=10,
        )
        ax.set_xlim(-11, 11)
        ax.set_ylim(-11, 11)
        ax.set_aspect("equal")
    figures = directory / "figures"
    figures.mkdir(exist_ok=True)
    caption = "Trajectories from five starts (dots) over the mean loss; star: optimum, grey bar: Pareto set"
    with matplotlib.rc_context({"svg.hashsalt": "detente"}):  # the same file every time
        figure.savefig(figures / f"{caption}.svg", metadata={"Date": None})
