"""One run of a comparison against another: what changed, and by how much more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy import stats

from detente.benchmark.results import Comparison, Row
from detente.benchmark.statistics import CONFIDENCE, Estimate
from detente.benchmark.tables import Cell, Column, Direction, Grid

__all__ = ["Against", "against", "difference"]


@dataclass(frozen=True)
class Against:
    """A run laid beside another. `changes`: what was asked for or where it ran, here and there, where it differs."""

    name: str
    grid: Grid
    changes: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]


def against(comparison: Comparison, other: Comparison) -> Against:
    """`comparison` minus `other`, for every label that both have."""
    pairs = [(row, there) for row in comparison.rows if (there := other.row(row.label)) is not None]
    columns: list[Column] = []
    cells: list[list[Cell]] = []
    if any(row.delta_m and there.delta_m for row, there in pairs):
        deltas = [(row.delta_m, there.delta_m) for row, there in pairs]
        columns += [Column("", "Δm % here", "min"), Column("", "Δm % there", "min"), Column("", "difference", "min")]
        cells += [[_value(here) for here, _ in deltas], [_value(there) for _, there in deltas]]
        cells += [[_difference(here, there, "min") for here, there in deltas]]
    for task, metric in comparison.columns:
        if comparison.tasks[task][metric] != other.tasks.get(task, {}).get(metric):
            continue
        direction: Direction = "max" if comparison.tasks[task][metric] == "max" else "min"
        columns.append(Column(task, metric, direction))
        found = [(row.metrics.get((task, metric)), there.metrics.get((task, metric))) for row, there in pairs]
        cells.append([_difference(here, there, direction) for here, there in found])
    rows = [(row.label, tuple(column[k] for column in cells)) for k, (row, _) in enumerate(pairs)]
    return Against(
        name=str(other.directory),
        grid=Grid(tuple(columns), tuple(rows if columns else ())),
        changes=tuple(_changes(comparison, other)),
        notes=tuple(_notes(comparison, other, pairs)),
    )


def difference(here: Estimate, there: Estimate) -> tuple[float, float | None]:
    """Difference of the means and half of its 95% interval; None where a run has one seed.

    Student's paired interval over the same seeds, Welch's otherwise.
    """
    if here.by_seed.keys() == there.by_seed.keys():
        paired = Estimate({seed: value - there.by_seed[seed] for seed, value in here.by_seed.items()})
        if len(paired.values) < 2 or not paired.finite:
            return paired.mean, None
        return paired.mean, paired.student()[1] - paired.mean
    mean = here.mean - there.mean
    sizes = len(here.values), len(there.values)
    if min(sizes) < 2 or not math.isfinite(mean):
        return mean, None
    variances = here.standard_error**2, there.standard_error**2
    total = sum(variances)
    if total == 0:
        return mean, 0.0
    freedom = total**2 / math.fsum(v**2 / (n - 1) for v, n in zip(variances, sizes, strict=True))
    return mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(total)


def _value(estimate: Estimate | None) -> Cell:
    if estimate is None or not estimate.finite:
        return Cell("-" if estimate is None else "diverged", math.nan, False)
    return Cell(f"{round(estimate.mean, 2) + 0.0:.2f}", estimate.mean, False)


def _difference(here: Estimate | None, there: Estimate | None, direction: str) -> Cell:
    """`best` marks a change for the better whose interval leaves out zero."""
    if here is None or there is None:
        return Cell("-", math.nan, False)
    mean, half = difference(here, there)
    if not math.isfinite(mean):
        return Cell("diverged", math.nan, False)
    size = max(abs(mean), half or 0.0)
    decimals = min(6, max(2, 2 - math.floor(math.log10(size)))) if size else 2
    text = f"{mean:+.{decimals}f}" if round(mean, decimals) else f"{0:.{decimals}f}"
    gain = mean if direction == "max" else -mean
    sure = half is not None and gain > half
    return Cell(f"{text} ± {'-' if half is None else f'{half:.{decimals}f}'}", mean, sure)


def _notes(comparison: Comparison, other: Comparison, pairs: list[tuple[Row, Row]]) -> list[str]:
    notes = []
    if comparison.problem != other.problem:
        notes.append(f"The other run is of another problem, {other.problem}.")
    if comparison.protocol != other.protocol:
        notes.append(f"The protocols differ: {comparison.protocol} here, {other.protocol} there.")
    if not pairs:
        notes.append("The two runs have no method in common.")
    for name, one, two in (("here", comparison, other), ("there", other, comparison)):
        alone = [row.label for row in one.rows if two.row(row.label) is None]
        if alone:
            notes.append(f"Only {name}: {', '.join(alone)}.")
    return notes


def _changes(comparison: Comparison, other: Comparison) -> list[tuple[str, str, str]]:
    here, there = _flat(comparison.config), _flat(other.config)
    keys = dict.fromkeys([*here, *there])
    return [(key, here.get(key, "-"), there.get(key, "-")) for key in keys if here.get(key) != there.get(key)]


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    lines = {"problem": config["problem"], "problem's code": config.get("digest", "-")}
    lines |= {"seeds": ", ".join(map(str, config["seeds"])), "trials of tuning": config.get("trials", 0)}
    for part in ("settings", "environment"):
        lines |= config.get(part, {})
    lines["command"] = config["command"]
    return {key: str(value) for key, value in lines.items()}
