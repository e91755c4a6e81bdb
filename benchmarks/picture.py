"""The README's picture, from results/steps.csv.  make bench-picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from workloads import WORKLOADS

HERE = Path(__file__).resolve().parent
SOURCE, TARGET = HERE / "results" / "steps.csv", HERE.parent / "docs" / "images" / "steps.svg"
METHOD, COUNT = "cagrad(c=0.5)", 3
SHORT = {"a": "small MLP", "b": "LeNet", "c": "ResNet-18", "d": "transformer", "e": "wide MLP, 29 M"}
SERIES = {
    "detente": ("#0b6e4f", "o"),
    "detente, features": ("#58b09c", "s"),
    "detente, reused": ("#a8d5c2", "D"),
    "torchjd": ("#c1440e", "o"),
    "LibMTL": ("#e08e45", "o"),
}
NAMES = {
    "detente, features": 'detente, source="features"',
    "detente, reused": "detente, a reused step of Every(k)",
}


def draw(axes: Axes, rows: list[dict[str, str]]) -> None:
    """One line per workload: time of a step over a plain step, and the floor as a grey bar."""
    shown = [w for w in WORKLOADS if any(r["workload"] == w and int(r["T"]) == COUNT for r in rows)]
    for y, workload in enumerate(reversed(shown)):
        found = {
            r["variant"]: float(r["ms"])
            for r in rows
            if r["workload"] == workload and int(r["T"]) == COUNT and r["method"] in ("", METHOD)
        }
        axes.plot([1, found["floor"] / found["plain"]], [y, y], color="#d9d9d9", linewidth=9, solid_capstyle="butt")
        for name, (color, marker) in SERIES.items():
            value = found.get(name, math.nan) / found["plain"]
            if not math.isnan(value):
                label = NAMES.get(name, name) if y == 0 else None
                axes.plot(value, y, marker, color=color, markersize=7, label=label, linestyle="none")
                if name in ("detente", "torchjd", "LibMTL"):
                    place = (0, 8) if name == "torchjd" else (0, -14)  # the two peers may lie side by side
                    axes.annotate(f"{value:.1f}", (value, y), place, textcoords="offset points", ha="center",
                                  fontsize=8, color=color)  # fmt: skip
    axes.set_yticks(range(len(shown)), [SHORT[w] for w in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 3, 5, 10, 20], ["1", "2", "3", "5", "10", "20"])
    axes.minorticks_off()
    axes.axvline(1, color="#888888", linewidth=0.8)
    axes.set_xlabel("time of a whole step over a plain step (three tasks, CAGrad, one CPU thread)")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, frameon=False, fontsize=8.5)


def main() -> None:
    with SOURCE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    plt.rcParams["svg.hashsalt"] = "detente"  # the same numbers give the same file
    figure, axes = plt.subplots(figsize=(8.2, 3.9), layout="constrained")
    draw(axes, rows)
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, metadata={"Date": None})
    print(f"written to {TARGET.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
