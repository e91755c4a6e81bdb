"""Success rates of runs on several tasks: the table and the pictures that reinforcement learning is judged by."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from detente.benchmark.statistics import interquartile_mean, stratified_bootstrap

__all__ = ["FILM", "report", "scores", "sheet", "summary"]

FILM = "film.png"
"""Pictures of a trained policy, in the directory of its run."""

Result = Mapping[str, Any]


def scores(results: Sequence[Result]) -> dict[str, NDArray[np.float64]]:
    """Success rates [S, T] by label, seeds by tasks; ``single`` puts the runs on single tasks together.

    Diverged runs count as failures, and seeds that lack a task are left out.
    """
    found: dict[str, dict[int, dict[str, float]]] = {}
    for result in results:
        rates = {task: figures["success"] for task, figures in result["metrics"].items()}
        filled = {task: 0.0 if rate is None or rate != rate else float(rate) for task, rate in rates.items()}
        found.setdefault(result["label"], {}).setdefault(result["seed"], {}).update(filled)
    tasks = list(dict.fromkeys(task for result in results for task in result["metrics"]))
    return {
        label: np.array([[rates[task] for task in tasks] for rates in whole])
        for label, seeds in found.items()
        if (whole := [rates for rates in seeds.values() if len(rates) == len(tasks)])
    }


def summary(results: Sequence[Result]) -> list[Table]:
    """Mean success and the interquartile mean with its interval, best first."""
    table = Table(title="success over all tasks", box=box.SIMPLE_HEAD)
    for heading in ("method", "mean", "interquartile mean", "95% interval", "seeds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for label, found in sorted(scores(results).items(), key=lambda item: -item[1].mean()):
        low, high = stratified_bootstrap(found)
        interval = f"{low:.3f} to {high:.3f}" if len(found) > 1 else "-"
        table.add_row(label, f"{found.mean():.3f}", f"{interquartile_mean(found):.3f}", interval, str(len(found)))
    return [table]


def report(results: Sequence[Result], directory: Path) -> None:
    """Draw the mean success over training, a line per method with the range of its seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[list[int], list[float]]]] = {}
    for result in results:
        if result["task"] is None and result["history"]:
            steps = np.cumsum([row["steps"] for row in result["history"]]).tolist()
            means = [float(np.mean([f["success"] for f in row["val"].values()])) for row in result["history"]]
            curves.setdefault(result["label"], []).append((steps, means))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, seeds in curves.items():
        length = min(len(steps) for steps, _ in seeds)
        steps, rates = seeds[0][0][:length], np.array([means[:length] for _, means in seeds])
        (line,) = axes.plot(steps, rates.mean(0), marker="o", markersize=3, label=label)
        axes.fill_between(steps, rates.min(0), rates.max(0), alpha=0.15, color=line.get_color())
    axes.set(xlabel="optimizer steps", ylabel="mean success over tasks", ylim=(-0.03, 1.03))
    axes.legend(fontsize="small", ncols=1 + len(curves) // 16, loc="center left", bbox_to_anchor=(1, 0.5))
    figures = directory / "figures"
    figures.mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "detente"}):  # the same file every time
        caption = "Success on the validation goals over training; shaded, the range of the seeds"
        figure.savefig(figures / f"{caption}.svg", metadata={"Date": None})
    for path in sorted(directory.glob(f"runs/*/seed-*/{FILM}")):
        label, seed = path.parent.parent.name, path.parent.name.replace("-", " ")
        caption = f"{label}, {seed}: a test episode of each task, up to its success"
        shutil.copyfile(path, figures / f"{caption}{path.suffix}")


def sheet(films: Sequence[NDArray[np.uint8]], tasks: Sequence[str], path: Path) -> None:
    """Write pictures [F, H, W, 3] of each task as one, a row per task with its name."""
    from PIL import Image, ImageDraw

    rows = [np.concatenate(list(pictures), axis=1) for pictures in films]
    whole = Image.fromarray(np.concatenate(rows))
    draw = ImageDraw.Draw(whole)
    for k, task in enumerate(tasks):
        draw.text((5, k * rows[0].shape[0] + 3), task, fill="white", stroke_width=2, stroke_fill="black")
    whole.save(path)
