"""Finished comparisons made up from a formula: the files a real run would leave, with figures that look like one.

The effects are real enough to read: conflicts make equal weights worse than single-task, methods differ by a known
amount, seeds add noise. Everything is drawn from `random.Random`, so the same call writes the same bytes.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

DIGITS = {"left": {"accuracy": "max"}, "right": {"accuracy": "max"}}
SCENES = {
    "segmentation": {"miou": "max", "pixel_accuracy": "max"},
    "depth": {"absolute_error": "min", "relative_error": "min"},
    "normals": {"mean_angle": "min", "median_angle": "min", "within_11": "max", "within_22": "max", "within_30": "max"},
}
METHODS = ("gd", "mgda", "pcgrad", "cagrad(c=0.4)", "cagrad(c=0.8)", "cdtt")
EFFECT = {"gd": 0.05, "mgda": 0.09, "pcgrad": 0.04, "cagrad(c=0.4)": 0.025, "cagrad(c=0.8)": 0.01, "cdtt": 0.045}
"""Relative loss against single-task."""
TYPICAL = {
    "accuracy": 0.9, "miou": 0.55, "pixel_accuracy": 0.83, "absolute_error": 0.51, "relative_error": 0.21,
    "mean_angle": 16.5, "median_angle": 11.9, "within_11": 0.47, "within_22": 0.71, "within_30": 0.86,
}  # fmt: skip


def write_comparison(
    directory: Path,
    problem: str = "digits",
    tasks: dict[str, dict[str, str]] = DIGITS,
    methods: tuple[str, ...] = METHODS,
    seeds: tuple[int, ...] = (0, 1, 2),
    epochs: int = 30,
    single: bool = True,
    noise: float = 0.004,
    sweep: int = 0,
    extract: tuple[str, ...] = (),
    tuned: bool = False,
    protocol: str = "val-selected",
) -> Path:
    """Write comparison.json and one result.json per job; returns `directory`.

    `sweep`: so many fixed weightings of two tasks. `extract`: methods whose weights are kept fixed as a control.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fixed = [f"fixed({k / (sweep + 1):.2f}, {1 - k / (sweep + 1):.2f})" for k in range(1, sweep + 1)]
    controls = {**dict.fromkeys(fixed, "sweep"), **{f"weights of {label}": "extracted" for label in extract}}
    runs = [*(f"single-{task}" for task in tasks), *methods]
    config = {
        "problem": problem,
        "tasks": tasks,
        "settings": {"epochs": epochs, "batch_size": 128, "lr": 1e-3, "protocol": protocol},
        "methods": [*(["single"] if single else []), *methods],
        "controls": controls,
        "trials": 3 if tuned else 0,
        "tuning": make_tuning(runs) if tuned else None,
        "seeds": list(seeds),
        "command": f"detente compare {problem} --methods {','.join(methods)} --seeds {len(seeds)}",
        "environment": {"detente": "0.1.0", "torch": "2.13.0+cpu", "python": "3.12.3", "platform": "Linux-x86_64"},
    }
    (directory / "comparison.json").write_text(json.dumps(config, indent=1))
    for seed in seeds:
        if single:
            for task in tasks:
                write_job(directory, f"single-{task}", make_job(problem, tasks, "single", seed, epochs, noise, task))
        for label in (*methods, *controls):
            job = make_job(problem, tasks, label, seed, epochs, noise)
            if label in fixed:
                _lean(job, tasks, float(label[6:10]) - 0.5)
            write_job(directory, label, job)
    return directory


def _lean(job: dict[str, Any], tasks: dict[str, dict[str, str]], by: float) -> None:
    """Make the first task better and the others worse, and all worse far from the middle."""
    for place, (task, metrics) in enumerate(tasks.items()):
        gain = (0.04 if place == 0 else -0.04) * by - 0.05 * by**2
        for metric, direction in metrics.items():
            job["metrics"][task][metric] *= 1 + (gain if direction == "max" else -gain)
    job["score"] = -abs(by)


def make_tuning(runs: list[str]) -> dict[str, Any]:
    """Content of tuning.json: three trials each, of which the second is best except for the last run."""
    tried: list[dict[str, float]] = [{}, {"lr": 0.004, "option c": 0.25}, {"lr": 0.02, "option c": 0.75}]
    scores = [[0.5, 0.6 + k / 100, None] for k in range(len(runs) - 1)] + [[0.5, 0.4, 0.3]]
    found = {}
    for run, values in zip(runs, scores, strict=True):
        best = int(values[1] > values[0])
        found[run] = {
            "method": f"{run}(c=0.25)" if best else run,
            "settings": {"lr": 0.004} if best else {},
            "trial": best,
            "trials": [{"parameters": p, "score": s} for p, s in zip(tried, values, strict=True)],
        }
    return {
        "trials": 3,
        "seed": 1_000_003,
        "sampler": "defaults, 5 at random, then TPE (Optuna 4.0.0)",
        "ranges": {run: {"lr": "0.001 to 0.1 (logarithmic)", "option c": "0 to 1"} for run in runs},
        "runs": found,
    }


def write_job(directory: Path, folder: str, job: dict[str, Any]) -> Path:
    path = directory / "runs" / folder / f"seed-{job['seed']}" / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(job))
    return path


def make_job(
    problem: str, tasks: dict[str, dict[str, str]], label: str, seed: int, epochs: int, noise: float,
    task: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One result as a dict: each metric is its typical value, made worse by the method's effect and the seed's luck."""
    draw = random.Random(f"{label} {task} {seed}")
    names = [task] if task else list(tasks)
    effect = EFFECT.get(label, 0.03) if task is None else 0.0

    def metric(name: str, direction: str, progress: float) -> float:
        worse = effect + draw.gauss(0, noise) + 0.6 * (1 - progress)
        return TYPICAL[name] * (1 - worse if direction == "max" else 1 + worse)

    history = []
    for epoch in range(1, epochs + 1):
        progress = 1 - math.exp(-4 * epoch / epochs)
        row: dict[str, Any] = {
            "epoch": epoch,
            "loss": {name: (1.5 + index) * (1.02 + effect - progress) * math.exp(draw.gauss(0, 0.03))
                     for index, name in enumerate(names)},
            "val": {name: {m: metric(m, d, progress) for m, d in tasks[name].items()} for name in names},
        }  # fmt: skip
        if task is None:
            base = -0.25 + 4 * EFFECT.get(label, 0.03) * progress
            cosine = [
                [
                    1.0 if i == j else -base - 0.15 * (i + j) / len(names) + draw.gauss(0, 0.02)
                    for j in range(len(names))
                ]
                for i in range(len(names))
            ]
            row["weights"] = {
                name: 1.0 if label in ("gd", "pcgrad") else 0.5 + (0.4 * index + draw.gauss(0, 0.05)) * progress
                for index, name in enumerate(names)
            }
            row["norms"] = {name: 0.7 * math.exp(draw.gauss(0, 0.1)) for name in names}
            row["cosine"] = cosine
            row["conflict_rate"] = min(1.0, max(0.0, 0.15 + effect * 3 * progress + draw.gauss(0, 0.02)))
        history.append(row)
    return {
        "problem": problem,
        "method": label.partition("(")[0],
        "label": label,
        "seed": seed,
        "task": task,
        "metrics": {name: {m: metric(m, d, 1.0) for m, d in tasks[name].items()} for name in names},
        "selected_epoch": epochs - 3,
        "score": -effect,
        "epochs": epochs,
        "steps": 40 * epochs,
        "history": history,
        "conflict_rate": None if task else sum(row["conflict_rate"] for row in history) / epochs,
        "cost": {
            "step_ms": (3.0 if task else 3.4 if label == "gd" else 5.5 + 10 * effect) * math.exp(draw.gauss(0, 0.02)),
            "peak_mb": 380.0 if label in ("gd", "single") else 412.0,
            "parameters": 40_000 if task else 51_234,
        },
    }
