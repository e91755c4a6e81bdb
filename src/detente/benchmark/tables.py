"""The result and the cost table, for the terminal (rich), Markdown, LaTeX and as tidy CSV.

Every form shows the same `Grid`. A cell is "mean ± distance to the farther end of the 95% interval over seeds" (both
ends stand in `results_csv`); one seed has no interval and shows "-" in its place. Bold marks the best mean among the
multi-task methods, which is not yet a sure difference: see `detente.benchmark.results.verdict`. The single-task row is
the reference and never competes. Only `results_csv` has full precision; it has no timings and is the same to the last
bit whenever the results are.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from detente.benchmark.results import SINGLE, Comparison, Row
from detente.benchmark.statistics import Estimate

Direction = Literal["max", "min"]
ARROWS = {"max": "↑", "min": "↓"}
WIDTH = 100
"""Columns of terminal that no table of `result_tables` exceeds by default, names permitting."""


@dataclass(frozen=True)
class Column:
    """A column: `group` is the task, or "" for what concerns all tasks; without `direction` nothing is better."""

    group: str
    name: str
    direction: Direction | None

    @property
    def arrow(self) -> str:
        return ARROWS[self.direction] if self.direction else ""

    @property
    def title(self) -> str:
        return f"{self.name} {self.arrow}".strip()


@dataclass(frozen=True)
class Cell:
    """`value` is what the text shows, for sorting: NaN where there is nothing."""

    text: str
    value: float
    best: bool


@dataclass(frozen=True)
class Grid:
    """Column heads and, per label, one cell per column."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def result_grid(comparison: Comparison) -> Grid:
    """Per label: delta-m, mean rank and conflict rate, then every metric.

    delta-m per task is left out where every task has as many metrics, because it then equals the flat one.
    """
    rows = comparison.rows
    columns, cells = [], []
    uneven = len({len(metrics) for metrics in comparison.tasks.values()}) > 1
    if any(row.delta_m for row in rows):
        columns.append(Column("", "Δm %", "min"))
        cells.append(_estimates([row.delta_m for row in rows], 2, fixed=True))
        if uneven:
            columns.append(Column("", "Δm % by task", "min"))
            cells.append(_estimates([row.delta_m_by_task for row in rows], 2, fixed=True))
    columns.append(Column("", "rank", "min"))
    cells.append([("-", math.nan) if r.mean_rank is None else (f"{r.mean_rank:.2f}", r.mean_rank) for r in rows])
    columns.append(Column("", "conflicts", None))
    cells.append([_conflicts(row) for row in rows])
    for task, metric in comparison.columns:
        direction: Direction = "max" if comparison.tasks[task][metric] == "max" else "min"
        estimates = [row.metrics.get((task, metric)) for row in rows]
        columns.append(Column(task, metric, direction))
        cells.append(_estimates(estimates, 4))
    return _grid([row.label for row in rows], columns, cells)


def cost_grid(comparison: Comparison) -> Grid:
    """Per label: milliseconds per step, the ratio to equal weights, peak megabytes and parameters."""
    costs = comparison.costs
    columns = [Column("", "ms/step", "min"), Column("", "x equal", "min"), Column("", "peak MB", "min"),
               Column("", "parameters", None)]  # fmt: skip
    cells = [
        [(f"{cost.step_ms:.2f}", cost.step_ms) for cost in costs],
        [("-", math.nan) if cost.ratio is None else (f"{cost.ratio:.2f}", cost.ratio) for cost in costs],
        [(f"{cost.peak_mb:.0f}", cost.peak_mb) for cost in costs],
        [(f"{cost.parameters:,}", float(cost.parameters)) for cost in costs],
    ]
    return _grid([cost.label for cost in costs], columns, cells)


def result_tables(comparison: Comparison, width: int = WIDTH) -> list[Table]:
    """The result table for the terminal; where `width` columns do not hold it, a summary and then tables per task."""
    grid = result_grid(comparison)
    title = f"{comparison.problem}, {_seeds(comparison)}"
    if _width(grid, range(len(grid.columns))) <= width:
        return [_rich(grid, range(len(grid.columns)), title, with_group=True)]
    tables = []
    for group in ["", *comparison.tasks]:
        indices = [index for index, column in enumerate(grid.columns) if column.group == group]
        for part in _pack(grid, indices, width):
            tables.append(_rich(grid, part, f"{title}: {group}" if group else title, with_group=False))
    return tables


def cost_table(comparison: Comparison) -> Table:
    """The cost table for the terminal. The single-task row adds up all its networks (peak memory: the largest)."""
    grid = cost_grid(comparison)
    return _rich(grid, range(len(grid.columns)), "cost, mean over seeds", with_group=False)


def tuning_table(content: Mapping[str, Any]) -> Table:
    """What tuning found, for the terminal: the best validation score of each run, that of the defaults, the choice."""
    title = f"tuning, {content['trials']} trials each; validation score, more is better"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
    for name, justify in (("run", "left"), ("defaults", "right"), ("best", "right"), ("chosen", "left")):
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=name != "chosen")
    for name, first, best, chosen in tuning_rows(content):
        table.add_row(name, first, best, chosen)
    return table


def tuning_rows(content: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Per run: its name, the score of the defaults, the best score, and what was chosen."""

    def text(score: float | None) -> str:
        return "failed" if score is None else f"{score:.4f}"

    rows = []
    for name, run in content["runs"].items():
        trials = run["trials"]
        settings = ", ".join(f"{key}={value:.3g}" for key, value in run["settings"].items())
        chosen = ", ".join(filter(None, [run["method"] if "(" in run["method"] else "", settings]))
        rows.append((name, text(trials[0]["score"]), text(trials[run["trial"]]["score"]), chosen or "the defaults"))
    return rows


def results_csv(comparison: Comparison) -> str:
    """Tidy, one figure a line: label, method, task, metric, direction, seed, value; full precision, no timings.

    `seed` is the number of a seed, or "mean", "low" and "high" for the mean and its 95% interval (absent for one seed).
    delta-m, the mean rank and the conflict rate have no task and, the last, no direction.
    """
    lines: list[Sequence[object]] = [("label", "method", "task", "metric", "direction", "seed", "value")]
    fixed = [row for row in comparison.sweep if row not in comparison.rows]
    for row in [*comparison.rows, *fixed]:

        def add(task: str, metric: str, direction: str, estimate: Estimate | None, row: Row = row) -> None:
            if estimate is None:
                return
            head = (row.label, row.method, task, metric, direction)
            lines.extend((*head, seed, repr(value)) for seed, value in estimate.by_seed.items())
            lines.append((*head, "mean", repr(estimate.mean)))
            for name, end in zip(("low", "high"), estimate.interval or (), strict=False):
                lines.append((*head, name, repr(end)))

        for task, metric in comparison.columns:
            add(task, metric, comparison.tasks[task][metric], row.metrics.get((task, metric)))
        add("", "delta_m", "min", row.delta_m)
        add("", "delta_m_by_task", "min", row.delta_m_by_task)
        if row.mean_rank is not None:
            lines.append((row.label, row.method, "", "mean_rank", "min", "mean", repr(row.mean_rank)))
        add("", "conflict_rate", "", row.conflict_rate)
    return _csv(lines)


def cost_csv(comparison: Comparison) -> str:
    """One label a line: label, step_ms, ratio, peak_mb, parameters."""
    lines: list[Sequence[object]] = [("label", "step_ms", "ratio", "peak_mb", "parameters")]
    for cost in comparison.costs:
        ratio = "" if cost.ratio is None else repr(cost.ratio)
        lines.append((cost.label, repr(cost.step_ms), ratio, repr(cost.peak_mb), cost.parameters))
    return _csv(lines)


def markdown(grid: Grid) -> str:
    """A GitHub table; the best value of a column is bold."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells) + " |"

    heads = [f"{column.group} {column.title}".strip() for column in grid.columns]
    lines = [line(["method", *heads]), "|---|" + "---:|" * len(heads)]
    lines += [line([label, *(f"**{c.text}**" if c.best else c.text for c in cells)]) for label, cells in grid.rows]
    return "\n".join(lines) + "\n"


def latex(grid: Grid) -> str:
    """A ``tabular`` for the booktabs package; tasks are spanning heads, the best value of a column is bold."""
    groups: list[tuple[str, int]] = []
    for column in grid.columns:
        if groups and groups[-1][0] == column.group:
            groups[-1] = (column.group, groups[-1][1] + 1)
        else:
            groups.append((column.group, 1))
    heads, rules, start = [""], [], 2
    for group, span in groups:
        heads.append(f"\\multicolumn{{{span}}}{{c}}{{{_tex(group)}}}")
        if group:
            rules.append(f"\\cmidrule(lr){{{start}-{start + span - 1}}}")
        start += span
    arrows = {"max": r" $\uparrow$", "min": r" $\downarrow$", None: ""}
    names = ["method", *(_tex(column.name) + arrows[column.direction] for column in grid.columns)]
    lines = [rf"\begin{{tabular}}{{l{'r' * len(grid.columns)}}}", r"\toprule"]
    if rules:
        lines += [" & ".join(heads) + r" \\", "".join(rules)]
    lines += [" & ".join(names) + r" \\", r"\midrule"]
    for label, cells in grid.rows:
        texts = [rf"\textbf{{{_tex(cell.text)}}}" if cell.best else _tex(cell.text) for cell in cells]
        lines.append(" & ".join([_tex(label), *texts]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _estimates(estimates: Sequence[Estimate | None], digits: int, fixed: bool = False) -> list[tuple[str, float]]:
    """Texts in one number of decimals: `digits` significant ones of the largest mean, or `digits` decimals if fixed."""
    largest = max((abs(e.mean) for e in estimates if e and e.finite), default=0.0)
    decimals = digits
    if not fixed:
        decimals = min(6, max(0, digits - 1 - math.floor(math.log10(largest)))) if largest else digits
    cells = []
    for estimate in estimates:
        if estimate is None:
            cells.append(("-", math.nan))
        elif not estimate.finite:
            cells.append(("diverged", math.nan))
        else:
            half = estimate.half_width
            mean = f"{round(estimate.mean, decimals) + 0.0:.{decimals}f}"  # + 0.0: no "-0.00"
            cells.append((f"{mean} ± {'-' if half is None else f'{half:.{decimals}f}'}", estimate.mean))
    return cells


def _conflicts(row: Row) -> tuple[str, float]:
    if row.conflict_rate is None:
        return "-", math.nan
    return f"{100 * row.conflict_rate.mean:.1f}%", row.conflict_rate.mean


def _grid(labels: Sequence[str], columns: Sequence[Column], cells: Sequence[list[tuple[str, float]]]) -> Grid:
    finished = []
    for column, entries in zip(columns, cells, strict=True):
        competing = [v for label, (_, v) in zip(labels, entries, strict=True) if label != SINGLE and not math.isnan(v)]
        pick: Callable[[list[float]], float] = max if column.direction == "max" else min
        best = pick(competing) if column.direction and len(competing) > 1 else None
        finished.append(
            [Cell(text, v, label != SINGLE and v == best) for label, (text, v) in zip(labels, entries, strict=True)]
        )
    return Grid(tuple(columns), tuple(zip(labels, zip(*finished, strict=True), strict=True)))


def _seeds(comparison: Comparison) -> str:
    n = len(comparison.seeds)
    return "1 seed, so no intervals" if n == 1 else f"{n} seeds, mean ± 95% interval"


def _lines(column: Column, with_group: bool) -> list[str]:
    return [column.group, column.title] if with_group and column.group else [column.title]


def _width(grid: Grid, indices: Iterable[int]) -> int:
    """Terminal columns of a table of these columns: two spaces between them, as `_rich` draws it."""
    total = 2 + max(len("method"), *(len(label) for label, _ in grid.rows))
    for index in indices:
        heads = [len(line) for line in _lines(grid.columns[index], with_group=True)]
        total += 2 + max([*heads, *(len(cells[index].text) for _, cells in grid.rows)])
    return total


def _pack(grid: Grid, indices: Sequence[int], width: int) -> list[list[int]]:
    """Cut a row of columns into runs that each fit the terminal."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and _width(grid, [*parts[-1], index]) <= width:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def _rich(grid: Grid, indices: Iterable[int], title: str, with_group: bool) -> Table:
    indices = list(indices)
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True, vertical="bottom")
    for index in indices:
        head = Text("\n".join(_lines(grid.columns[index], with_group)))
        table.add_column(head, justify="right", no_wrap=True, vertical="bottom")
    for label, cells in grid.rows:
        texts = [Text(cells[index].text, style="bold" if cells[index].best else "") for index in indices]
        table.add_row(Text(label), *texts, style="dim" if label == SINGLE else None)
    return table


def _tex(text: str) -> str:
    table = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
             "Δ": r"$\Delta$", **{char: "\\" + char for char in "&%$#_{}"}}  # fmt: skip
    return "".join(table.get(char, char) for char in text)


def _csv(lines: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()
