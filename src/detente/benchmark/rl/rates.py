"""Success rates of runs on several tasks: the table and the pictures that reinforcement learning is judged by."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from detente.benchmark.results import EQUAL, SINGLE
from detente.benchmark.statistics import interquartile_mean, stratified_bootstrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FILM", "report", "scores", "sheet", "summary"]

NAMED = 8
"""Methods that have a colour and a name in a picture of many."""
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
    """Draw the mean success over training and the interquartile means, and copy the pictures of trained policies."""
    import matplotlib

    figures = directory / "figures"
    figures.mkdir(exist_ok=True)
    drawn = {
        "Success on the validation goals over training; shaded, the range of the seeds": _curves(results),
        "Interquartile mean of the success over runs and tasks, with 95% bootstrap intervals": _intervals(results),
    }
    with matplotlib.rc_context({"svg.hashsalt": "detente"}):  # the same file every time
        for caption, figure in drawn.items():
            figure.savefig(figures / f"{caption}.svg", metadata={"Date": None})
    for path in sorted(directory.glob(f"runs/*/seed-*/{FILM}")):
        label, seed = path.parent.parent.name, path.parent.name.replace("-", " ")
        caption = f"{label}, {seed}: a test episode of each task, up to its success"
        shutil.copyfile(path, figures / f"{caption}{path.suffix}")


def _curves(results: Sequence[Result]) -> Figure:
    """Mean success over training, best first; of many methods equal weights and the best, the others in grey."""
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[list[int], list[float]]]] = {}
    for result in results:
        if result["task"] is None and result["history"]:
            steps = np.cumsum([row["steps"] for row in result["history"]]).tolist()
            means = [float(np.mean([f["success"] for f in row["val"].values()])) for row in result["history"]]
            curves.setdefault(result["label"], []).append((steps, means))
    last = {label: np.mean([means[-1] for _, means in seeds]) for label, seeds in curves.items()}
    best = sorted(curves, key=lambda label: -last[label])
    named = [label for label in best if label in best[:NAMED] or label == EQUAL]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for label in [*(label for label in best if label not in named), *named]:
        seeds = curves[label]
        length = min(len(steps) for steps, _ in seeds)
        steps, rates = seeds[0][0][:length], np.array([means[:length] for _, means in seeds])
        if label not in named:
            axes.plot(steps, rates.mean(0), color="0.8", linewidth=0.8)
            continue
        (line,) = axes.plot(steps, rates.mean(0), marker="o", markersize=3, label=label)
        axes.fill_between(steps, rates.min(0), rates.max(0), alpha=0.12, color=line.get_color())
    axes.set(xlabel="optimizer steps", ylabel="mean success over tasks", ylim=(-0.03, 1.03))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _intervals(results: Sequence[Result]) -> Figure:
    from matplotlib.figure import Figure

    found = sorted(scores(results).items(), key=lambda item: interquartile_mean(item[1]))
    figure = Figure(figsize=(8, 1 + 0.24 * len(found)), layout="constrained")
    axes = figure.subplots()
    for k, (label, rates) in enumerate(found):
        low, high = stratified_bootstrap(rates)
        colour = "0.5" if label == SINGLE else "#0072b2"
        axes.plot([low, high], [k, k], color=colour, linewidth=5, alpha=0.4, solid_capstyle="butt")
        axes.plot([interquartile_mean(rates)], [k], "o", color=colour, markersize=4)
    axes.set_yticks(range(len(found)), [label for label, _ in found], fontsize="small")
    axes.set(xlabel="interquartile mean of success", xlim=(-0.03, 1.03))
    axes.grid(axis="x", alpha=0.3)
    return figure


def sheet(films: Sequence[NDArray[np.uint8]], tasks: Sequence[str], path: Path) -> None:
    """Write pictures [F, H, W, 3] of each task as one, a row per task with its name."""
    from PIL import Image, ImageDraw

    rows = [np.concatenate(list(pictures), axis=1) for pictures in films]
    whole = Image.fromarray(np.concatenate(rows))
    draw = ImageDraw.Draw(whole)
    for k, task in enumerate(tasks):
        draw.text((5, k * rows[0].shape[0] + 3), task, fill="white", stroke_width=2, stroke_fill="black")
    whole.save(path)
