"""The figures of the report, section by section, as plotly.js specifications."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from typing import Any

import numpy as np

from detente.benchmark.report.styles import Style, styles
from detente.benchmark.results import EQUAL, SINGLE, Comparison, Row
from detente.benchmark.statistics import Estimate
from detente.benchmark.tables import ARROWS

__all__ = ["Choice", "Figure", "Section", "View", "figure_sections", "metric_choices"]

POINTS = (16, 240)
"""A curve is thinned to a number of points between these, so that all curves together have about CURVES."""
CURVES = 250_000
CELLS = 60
"""Columns of a heat map over time."""
PAIRS = 24
"""Most pairs of tasks in a heat map."""
SHADES = 6
"""Colours ``--r0`` to ``--r5`` of the page, from the best ranks to the worst."""
Pick = Callable[[Mapping[str, Any]], "float | None"]
"""What a curve shows of one entry of a history; None where it was not recorded."""
Trace = dict[str, Any]


@dataclass(frozen=True)
class View:
    """A plot: `caption` stands above it, `note` below, `alt` describes it to a screen reader."""

    caption: str
    alt: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A place for a plot, `height` pixels high.

    `views`: which plot stands there, by the values of `controls` joined by "|"; the first is shown at first.
    """

    key: str
    views: Mapping[str, View]
    height: int = 280
    controls: Sequence[str] = ()
    wide: bool = False
    """It takes a row of its own."""

    @property
    def first(self) -> View:
        return next(iter(self.views.values()))


@dataclass(frozen=True)
class Choice:
    """An entry of a <select>; `task` is the number of the task that a metric belongs to."""

    value: str
    text: str
    task: int | None = None


@dataclass(frozen=True)
class Section:
    """Figures under one heading; `text` says what they show. `choices` are the values of the control ``method``."""

    key: str
    title: str
    text: str
    figures: Sequence[Figure]
    choices: Sequence[Choice] = ()

    @property
    def columns(self) -> int:
        """How many figures stand side by side on a wide screen: no orphan in the last row where that can be."""
        beside = sum(not figure.wide for figure in self.figures)
        return {1: 1, 2: 2, 4: 2}.get(beside, 3)


@dataclass(frozen=True)
class Measure:
    """A figure of merit of a row. Its key is ``delta_m``, ``delta_m_by_task``, or the number of the metric's column."""

    key: str
    name: str
    direction: str
    task: int | None
    of: Callable[[Row], Estimate | None]
    unit: str = ""


def figure_sections(comparison: Comparison) -> list[Section]:
    """Every figure of the report. A section without data is left out."""
    cosines, choices = _cosines(comparison)
    points = " Methods that are switched off above stay as small grey points." if len(comparison.rows) > 2 else ""
    line = (
        "joins the fixed weightings of the sweep" if len(comparison.tasks) == 2 else "is the front of fixed weightings"
    )
    fixed = (
        f" The line {line}; filled points of it are beaten by no other in both metrics. A ring marks a method that no "
        "fixed weighting beats in both, judged by the means shown."
        if comparison.sweep
        else ""
    )
    sections = [
        Section(
            "gain",
            "Method by method",
            "Best at the top; the choice of metric above applies here and to the planes. Bars are 95% intervals over "
            "seeds, small points the seeds. The dotted line is one network per task, the dashed line equal weights. "
            "delta-m is the change against one network per task: left of zero is better.",
            _gain(comparison),
        ),
        Section(
            "ranks",
            "Ranks",
            "How often a method comes out at which rank, over all metrics and the seeds that every method has. Tied "
            "methods share the ranks they cover. Controls take part.",
            _ranks(comparison),
        ),
        Section(
            "trade",
            "Trade-off between tasks",
            "Up and to the right is better on both tasks. Large points are means, small ones seeds; dotted lines are "
            f"the single-task baseline.{fixed}{points}",
            _trade_offs(comparison),
        ),
        Section(
            "price",
            "Cost against gain",
            f"Step time relative to equal weights. Down and to the left is better and cheaper.{points}",
            _price(comparison),
        ),
        Section(
            "curves",
            "Learning curves",
            "Thick: mean over seeds. Thin: the seeds.",
            _curves(comparison),
        ),
        Section(
            "weights",
            "Task weights",
            "The weight a method gave to a task, divided by the mean weight of all tasks in that epoch: 1 is an equal "
            "share. This hides the overall scale on purpose, since methods differ in it by definition.",
            _weights(comparison),
        ),
        Section(
            "conflict",
            "Conflict between tasks",
            "Two tasks conflict in a step when the cosine between their gradients of the shared parameters is "
            "negative. Each method is measured on its own path, so these figures also show where it led the network.",
            [*cosines, *_conflicts(comparison)],
            choices,
        ),
    ]
    return [section for section in sections if section.figures]


def metric_choices(comparison: Comparison) -> list[Choice]:
    """What the control ``metric`` offers: every measure that some row has."""
    return [
        Choice(measure.key, f"{measure.name} {ARROWS[measure.direction]}", measure.task)
        for measure in _measures(comparison)
    ]


def _measures(comparison: Comparison) -> list[Measure]:
    def delta(by_task: bool) -> Callable[[Row], Estimate | None]:
        return lambda row: row.delta_m_by_task if by_task else row.delta_m

    def metric(column: tuple[str, str]) -> Callable[[Row], Estimate | None]:
        return lambda row: row.metrics.get(column)

    found = [Measure("delta_m", "delta-m", "min", None, delta(False), "%")]
    if len({len(metrics) for metrics in comparison.tasks.values()}) > 1:
        found = [
            Measure("delta_m", "delta-m, all metrics alike", "min", None, delta(False), "%"),
            Measure("delta_m_by_task", "delta-m, per task first", "min", None, delta(True), "%"),
        ]
    names = list(comparison.tasks)
    for number, (task, name) in enumerate(comparison.columns):
        direction = comparison.tasks[task][name]
        found.append(Measure(str(number), f"{task} {name}", direction, names.index(task), metric((task, name))))
    return [m for m in found if any((e := m.of(row)) is not None and e.finite for row in comparison.rows)]


def _gain(comparison: Comparison) -> list[Figure]:
    views = {measure.key: _ladder(comparison, measure) for measure in _measures(comparison)}
    if not views:
        return []
    height = 100 + _row_height(len(comparison.rows)) * len(comparison.rows)
    return [Figure("gain", views, height, ("metric",))]


def _ladder(comparison: Comparison, measure: Measure) -> View:
    """One line per row, the best at the top."""
    looks = styles(comparison)
    found = [(row, estimate) for row in comparison.rows if (estimate := measure.of(row)) is not None]
    lost = [row.label for row, estimate in found if not estimate.finite]
    sign = 1 if measure.direction == "min" else -1
    entries = sorted(((row, e) for row, e in found if e.finite), key=lambda item: sign * item[1].mean)
    small = len(entries) > 14
    data: list[Trace] = []
    for place, (row, estimate) in enumerate(entries):
        look = looks[row.label]
        ends = "" if estimate.interval is None else " ({:.4g} to {:.4g})".format(*estimate.interval)
        seeds = [f"seed {seed}" for seed in estimate.by_seed]
        hover = f"{escape(row.label)}, %{{text}}<br>%{{x:.4g}}{measure.unit}<extra></extra>"
        values = list(estimate.values)
        data.append(_points(look, values, [place] * len(values), 4, opacity=0.5, text=seeds, hovertemplate=hover))
        hover = f"{escape(row.label)}<br>%{{x:.4g}}{measure.unit}{ends}<extra></extra>"
        mean = _points(look, [estimate.mean], [place], 8 if small else 10, hovertemplate=hover)
        data.append({**mean, "error_x": _bar(estimate, look)})
    for trace in data:
        del trace["meta"]  # the legend leaves this figure alone: every row has its own line
    means = {row.label: estimate.mean for row, estimate in entries}
    shapes = []
    if EQUAL in means:
        shapes.append(_line_at("x", means[EQUAL], "dash", "var(--m0)"))
    if measure.task is None or SINGLE in means:
        shapes.append(_line_at("x", 0.0 if measure.task is None else means[SINGLE]))
    reaches = {row.label: estimate.interval or (estimate.mean, estimate.mean) for row, estimate in entries}
    window, outside = _window(means, reaches)
    unit = f" in {measure.unit}" if measure.unit else ""
    side = "lower" if measure.direction == "min" else "higher"
    layout = {
        "xaxis": {"title": {"text": escape(measure.name + unit)}, "zeroline": False},
        "yaxis": {
            "tickvals": list(range(len(entries))),
            "ticktext": [_short(row.label) for row, _ in entries],
            "range": [len(entries) - 0.5, -0.5],
            "tickfont": {"size": 11 if small else 12.5},
            "showgrid": False,
            "zeroline": False,
        },
        "shapes": shapes,
    }
    if window:
        layout["xaxis"]["range"] = window  # type: ignore[index]
    caption = f"{measure.name} per method, {side} is better"
    listed = ", ".join(f"{label} {mean:.4g}" for label, mean in means.items())
    alt = f"{measure.name} with 95% intervals, best first: {listed}."
    note = _outside(outside, means) + (f" Diverged: {', '.join(lost)}." if lost else "")
    return View(caption, alt, data, layout, note.strip())


def _ranks(comparison: Comparison) -> list[Figure]:
    """Stacked bars: the share of every rank, or of groups of neighbouring ranks where there are many methods."""
    rows = [row for row in comparison.rows if row.label != SINGLE]
    seeds = sorted(set.intersection(*(set(row.seeds) for row in rows))) if rows else []
    if len(rows) < 2 or not seeds:
        return []
    shares = np.zeros((len(rows), len(rows)))
    for task, metric in comparison.columns:
        sign = 1 if comparison.tasks[task][metric] == "min" else -1
        for seed in seeds:
            values = np.array([sign * row.metrics[task, metric].by_seed[seed] for row in rows])
            values[~np.isfinite(values)] = math.inf
            for k, value in enumerate(values):
                first, tied = int((values < value).sum()), int((values == value).sum())
                shares[k, first : first + tied] += 1 / tied
    shares /= len(seeds) * len(comparison.columns)
    average = shares @ np.arange(1, len(rows) + 1)
    order = np.argsort(average, kind="stable")
    bins = np.array_split(np.arange(len(rows)), min(SHADES, len(rows)))
    labels = [rows[k].label for k in order]
    data = []
    for place, ranks in enumerate(bins):
        name = f"{ranks[0] + 1}" if len(ranks) == 1 else f"{ranks[0] + 1} to {ranks[-1] + 1}"
        shade = round(place * (SHADES - 1) / (len(bins) - 1))
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "x": [_round(100 * shares[k, ranks].sum()) for k in order],
                "y": list(range(len(rows))),
                "text": [escape(f"{rows[k].label}: mean rank {average[k]:.1f}") for k in order],
                "textposition": "none",
                "marker": {"color": f"var(--r{shade})"},
                "hovertemplate": f"%{{text}}<br>rank {name}: %{{x:.0f}}%<extra></extra>",
            }
        )
    small = len(rows) > 14
    layout = {
        "barmode": "stack",
        "bargap": 0.25,
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal",
                   "title": {"text": "rank "}, "itemclick": False, "itemdoubleclick": False},
        "xaxis": {"title": {"text": "share of ranks in %"}, "range": [0, 100], "zeroline": False, "showgrid": False},
        "yaxis": {"tickvals": list(range(len(rows))), "ticktext": [_short(label) for label in labels],
                  "range": [len(rows) - 0.5, -0.5], "tickfont": {"size": 11 if small else 12.5}, "showgrid": False,
                  "zeroline": False},
    }  # fmt: skip
    caption = "Rank distribution, best mean rank at the top"
    listed = ", ".join(f"{rows[k].label} {average[k]:.1f}" for k in order)
    alt = f"Stacked bars of the share of ranks per method. Mean ranks: {listed}."
    height = 130 + _row_height(len(rows)) * len(rows)
    return [Figure("ranks", {"": View(caption, alt, data, layout)}, height)]


def _trade_offs(comparison: Comparison) -> list[Figure]:
    """The plane of each pair of tasks; beyond three tasks there are too many pairs to read."""
    names = list(comparison.tasks)
    if not 2 <= len(names) <= 3:
        return []
    numbers = {column: str(number) for number, column in enumerate(comparison.columns)}
    figures: list[Figure] = []
    for pair in combinations(range(len(names)), 2):
        first, second = (names[task] for task in pair)
        views = {
            f"{numbers[first, x]}|{numbers[second, y]}": _plane(comparison, ((first, x), (second, y)))
            for x in comparison.tasks[first]
            for y in comparison.tasks[second]
        }
        figures.append(Figure(f"trade-{len(figures)}", views, 400, tuple(f"metric:{task}" for task in pair)))
    return figures


def _plane(comparison: Comparison, columns: tuple[tuple[str, str], tuple[str, str]]) -> View:
    looks = styles(comparison)
    directions = [comparison.tasks[task][metric] for task, metric in columns]
    titles = [f"{' '.join(column)} {ARROWS[direction]}" for column, direction in zip(columns, directions, strict=True)]
    hover = f"<br>{escape(titles[0])} %{{x:.4g}}<br>{escape(titles[1])} %{{y:.4g}}<extra></extra>"

    def place(row: Row) -> tuple[float, float] | None:
        found = [row.metrics.get(column) for column in columns]
        means = [estimate.mean for estimate in found if estimate is not None and estimate.finite]
        return (means[0], means[1]) if len(means) == 2 else None

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        pairs = [(a, b) if d == "max" else (-a, -b) for a, b, d in zip(one, other, directions, strict=True)]
        return one != other and all(a >= b for a, b in pairs)

    here = {row.label: at for row in comparison.rows if (at := place(row)) is not None}
    fixed = {row.label: at for row in comparison.sweep if (at := place(row)) is not None}
    front = [at for at in fixed.values() if not any(beats(other, at) for other in fixed.values())]
    free = [
        row.label
        for row in comparison.methods
        if row.label in here and row.label != EQUAL and fixed and not any(beats(p, here[row.label]) for p in front)
    ]
    data: list[Trace] = [_ghosts(here, hover)]
    if fixed:
        sorted_front = sorted(front)
        joined = list(fixed.values()) if len(comparison.tasks) == 2 else sorted_front
        x, y = zip(*joined, strict=True)
        line = {"color": "var(--control)", "width": 1.5}
        data.append({"type": "scatter", "mode": "lines", "x": _rounded(x), "y": _rounded(y), "line": line,
                     "hoverinfo": "skip"})  # fmt: skip
        x, y = zip(*fixed.values(), strict=True)
        best = [at in front for at in fixed.values()]
        marker = {"color": "var(--control)", "symbol": ["circle" if b else "circle-open" for b in best],
                  "size": [8 if b else 6 for b in best]}  # fmt: skip
        data.append({"type": "scatter", "mode": "markers", "x": _rounded(x), "y": _rounded(y), "marker": marker,
                     "text": [escape(label) for label in fixed], "hovertemplate": "%{text}" + hover})  # fmt: skip
    for row in comparison.rows:
        if row.label not in here:
            continue
        look, text = looks[row.label], escape(row.label) + hover
        if row.label != SINGLE:  # its two tasks come from different networks, so a seed is no point of the plane
            values = [list(row.metrics[column].values) for column in columns]
            data.append(_points(look, values[0], values[1], 5, opacity=0.45, hovertemplate=text))
        data.append(_points(look, [here[row.label][0]], [here[row.label][1]], 12, hovertemplate=text))
    if free:
        x, y = zip(*(here[label] for label in free), strict=True)
        ring = {"symbol": "circle-open", "size": 20, "color": "var(--accent)", "line": {"width": 1.5}}
        data.append({"type": "scatter", "mode": "markers", "x": _rounded(x), "y": _rounded(y), "marker": ring,
                     "hoverinfo": "skip"})  # fmt: skip
    layout: dict[str, Any] = {"shapes": []}
    outside: list[str] = []
    for k, axis in enumerate("xy"):
        window, beyond = _window({label: at[k] for label, at in [*fixed.items(), *here.items()]})
        outside += [label for label in beyond if label not in outside]
        layout[f"{axis}axis"] = {"title": {"text": escape(titles[k])}, "zeroline": False}
        if window:
            layout[f"{axis}axis"]["range"] = window[::-1] if directions[k] == "min" else window
        else:
            layout[f"{axis}axis"]["autorange"] = "reversed" if directions[k] == "min" else True
        if SINGLE in here:
            layout["shapes"].append(_line_at(axis, here[SINGLE][k]))
    note = ""
    if fixed:
        judged = sum(row.label in here and row.label != EQUAL for row in comparison.methods)
        named = f" ({', '.join(free)})" if free else ""
        note = f"Not beaten by any fixed weighting: {len(free)} of {judged}{named}."
    if outside:
        note += f" Outside the plot: {', '.join(outside)}."
    caption = f"{' '.join(columns[0])} against {' '.join(columns[1])}"
    alt = f"Scatter of {titles[0]} against {titles[1]}, one large point per method; the result table has the values."
    return View(caption, alt, data, layout, note.strip())


def _price(comparison: Comparison) -> list[Figure]:
    looks = styles(comparison)
    hover = "<br>%{x:.2f} x equal weights<br>delta-m %{y:.2f}%<extra></extra>"
    places, points = {}, []
    for row, cost in zip(comparison.rows, comparison.costs, strict=True):
        if row.delta_m and row.delta_m.finite and cost.ratio:
            look, x, y = looks[row.label], cost.ratio, row.delta_m.mean
            places[row.label] = (x, y)
            bar = _bar(row.delta_m, look)
            points.append(_points(look, [x], [y], 12, error_y=bar, hovertemplate=escape(row.label) + hover))
    if not places:
        return []
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "step time, equal weights = 1 ↓"}, "zeroline": False},
        "yaxis": {"title": {"text": "delta-m in % ↓"}, "zeroline": False},
        "shapes": [_line_at("y", 0.0)],
    }
    outside: list[str] = []
    for k, axis in enumerate(("xaxis", "yaxis")):
        window, beyond = _window({label: at[k] for label, at in places.items()})
        outside += [label for label in beyond if label not in outside]
        if window:
            layout[axis]["range"] = window
    note = f"Outside the plot: {', '.join(outside)}." if outside else ""
    alt = "Scatter of relative step time against delta-m, one point per method; the tables have the values."
    view = View("Step time against delta-m", alt, [_ghosts(places, hover), *points], layout, note)
    return [Figure("price", {"": view}, 380)]


def _curves(comparison: Comparison) -> list[Figure]:
    def loss(task: str) -> Pick:
        return lambda row: row["loss"].get(task)

    def validation(task: str, metric: str) -> Pick:
        return lambda row: row["val"].get(task, {}).get(metric)

    figures: list[Figure] = []
    for task, metrics in comparison.tasks.items():
        figures += _lines(comparison, f"curve-{len(figures)}", f"{task}: training loss", loss(task))
        for metric, direction in metrics.items():
            caption = f"{task}: validation {metric}\N{NO-BREAK SPACE}{ARROWS[direction]}"
            figures += _lines(comparison, f"curve-{len(figures)}", caption, validation(task, metric))
    return figures


def _weights(comparison: Comparison) -> list[Figure]:
    def share(task: str) -> Pick:
        def pick(row: Mapping[str, Any]) -> float | None:
            weights = row.get("weights") or {}
            total = sum(weights.values())
            return len(weights) * weights[task] / total if task in weights and total > 0 else None

        return pick

    figures: list[Figure] = []
    for task in comparison.tasks:
        figures += _lines(comparison, f"weight-{len(figures)}", f"{task}: relative weight", share(task))
    return figures


def _conflicts(comparison: Comparison) -> list[Figure]:
    caption = "Conflict rate: share of task pairs and probed steps with a negative cosine"
    return _lines(comparison, "conflict-rate", caption, lambda row: row.get("conflict_rate"))


def _cosines(comparison: Comparison) -> tuple[list[Figure], list[Choice]]:
    """Heat maps of the cosine between tasks, over time and in the mean, and the methods to choose from.

    Two tasks make one pair, so all methods fit into one map and there is nothing to choose.
    """
    tasks = list(comparison.tasks)
    pairs = list(combinations(range(len(tasks)), 2))
    over_time: dict[str, dict[tuple[int, int], dict[int, float]]] = {}
    for row in comparison.rows:
        found = _cosine_by_pair(comparison, row.label, pairs)
        if found:
            over_time[row.label] = found
    if not over_time or not pairs:
        return [], []
    means = {label: {pair: _mean(by.values()) for pair, by in found.items()} for label, found in over_time.items()}
    if len(pairs) > PAIRS:  # those that conflict most
        measured = {pair: [mean[pair] for mean in means.values() if pair in mean] for pair in pairs}
        lowest = sorted((pair for pair in pairs if measured[pair]), key=lambda pair: _mean(measured[pair]))
        pairs = sorted(lowest[:PAIRS])
    name = {(i, j): f"{tasks[i]}, {tasks[j]}" for i, j in pairs}
    size = [abs(value) for found in over_time.values() for by_epoch in found.values() for value in by_epoch.values()]
    limit = max(0.05, float(np.quantile(size, 0.98)))  # one method far out leaves colours to the others
    alt = "Heat map of the mean cosine between tasks over epochs"
    if len(pairs) == 1:
        rows = {label: found.get(pairs[0], {}) for label, found in over_time.items()}
        caption = f"{name[pairs[0]]}: cosine over epochs, mean over seeds"
        view = View(caption, f"{alt}, one line per method.", *_map_over_time(rows, limit))
        return [Figure("cosine", {"": view}, 110 + _row_height(len(rows)) * len(rows), wide=True)], []
    views = {}
    for label, found in over_time.items():
        rows = {name[pair]: found.get(pair, {}) for pair in pairs}
        caption = f"{label}: cosine over epochs, mean over seeds"
        views[label] = View(caption, f"{alt} under {label}, one line per pair of tasks.", *_map_over_time(rows, limit))
    figures = [Figure("cosine", views, 110 + _row_height(len(pairs)) * len(pairs), ("method",), wide=True)]
    if len(tasks) <= 3:
        z = [[_maybe(mean.get(pair)) for pair in pairs] for mean in means.values()]
        x = [f"{escape(tasks[i])},<br>{escape(tasks[j])}" for i, j in pairs]
        y = [_short(label) for label in means]
        data, layout = _heat(x, y, z, limit, gap=2, text=True)
        alt = "Heat map of the mean cosine between tasks over training; rows are methods, columns pairs of tasks."
        view = View("Mean cosine over training", alt, data, layout)
        figures.append(Figure("cosine-mean", {"": view}, 90 + _row_height(len(means)) * len(means)))
    else:
        views = {}
        for label, mean in means.items():
            z = [[_maybe(mean.get((min(i, j), max(i, j)))) for j in range(len(tasks))] for i in range(len(tasks))]
            names = [_short(task) for task in tasks]
            data, layout = _heat(names, names, z, limit, gap=1, text=len(tasks) <= 8)
            alt = f"Heat map of the mean cosine between every two tasks under {label}, averaged over training."
            views[label] = View(f"{label}: mean cosine over training", alt, data, layout)
        figures.append(Figure("cosine-mean", views, min(640, 150 + 30 * len(tasks)), ("method",)))
    return figures, [Choice(label, label) for label in over_time]


def _cosine_by_pair(
    comparison: Comparison, label: str, pairs: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], dict[int, float]]:
    """Pair -> epoch -> cosine, mean over the seeds where it was measured."""
    values: dict[tuple[int, int], dict[int, list[float]]] = {}
    for job in comparison.jobs:
        for row in job.history if job.label == label else ():
            for i, j in pairs if row.get("cosine") else ():
                cosine = row["cosine"][i][j]
                if cosine is not None and math.isfinite(cosine):
                    values.setdefault((i, j), {}).setdefault(row["epoch"], []).append(cosine)
    return {pair: {epoch: _mean(v) for epoch, v in by_epoch.items()} for pair, by_epoch in values.items()}


def _map_over_time(rows: Mapping[str, Mapping[int, float]], limit: float) -> tuple[list[Trace], dict[str, Any]]:
    """Rows over epochs; neighbouring epochs share a column, their mean, where there are many."""
    epochs = sorted({epoch for by_epoch in rows.values() for epoch in by_epoch})
    bins = [list(map(int, part)) for part in np.array_split(epochs, min(CELLS, len(epochs)))]
    z = []
    for by_epoch in rows.values():
        cells = ([by_epoch[epoch] for epoch in part if epoch in by_epoch] for part in bins)
        z.append([_round(_mean(cell), 3) if cell else None for cell in cells])
    names = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in bins]
    data, layout = _heat(names, [_short(name) for name in rows], z, limit, gap=1 if len(names) <= 20 else 0)
    every = math.ceil(len(names) / 10)
    layout["xaxis"] |= {
        "title": {"text": "epoch"}, "type": "category", "tickvals": names[::every], "tickangle": 0,
        "ticktext": [str(part[0]) for part in bins][::every],
    }  # fmt: skip
    return data, layout


def _heat(
    x: Sequence[str], y: Sequence[str], z: Sequence[Sequence[float | None]], limit: float, gap: int, text: bool = False
) -> tuple[list[Trace], dict[str, Any]]:
    look: Trace = {
        "type": "heatmap",
        "x": list(x),
        "y": list(y),
        "z": z,
        "zmin": -_round(limit),
        "zmax": _round(limit),
        "colorscale": [[0, "var(--against)"], [0.5, "var(--card)"], [1, "var(--along)"]],
        "colorbar": {"thickness": 9, "outlinewidth": 0, "xpad": 4, "tickfont": {"size": 11}, "nticks": 5},
        "hovertemplate": "%{y}<br>%{x}: %{z:.3f}<extra></extra>",
        "xgap": gap,
        "ygap": 2 if len(y) <= 14 else 1,
    }
    if text:
        look |= {"texttemplate": "%{z:.2f}", "showscale": False}
    small = {"tickfont": {"size": 11}} if len(y) > 14 else {}
    axes = {
        "xaxis": {"showgrid": False, "zeroline": False},
        "yaxis": {"showgrid": False, "zeroline": False, "autorange": "reversed", **small},
    }
    return [look], axes


def _lines(comparison: Comparison, key: str, caption: str, pick: Pick) -> list[Figure]:
    """One figure: per label `pick(history row)` by epoch, a thin line for each seed and their mean."""
    looks = styles(comparison)
    seeds: list[Trace] = []
    lines: list[Trace] = []
    for label, look in looks.items():
        by_job: list[dict[int, float]] = []
        for job in comparison.jobs:
            if job.label == label:
                picked = ((row["epoch"], pick(row)) for row in job.history)
                by_job.append({epoch: v for epoch, v in picked if v is not None and math.isfinite(v)})
        by_job = [values for values in by_job if values]
        if not by_job:
            continue
        epochs = _thin(sorted({epoch for values in by_job for epoch in values}), _points_per_curve(comparison))
        if len(by_job) > 1 and len(epochs) > 1:
            x: list[int | None] = []
            y: list[float | None] = []
            for values in by_job:
                kept = [epoch for epoch in epochs if epoch in values]
                x += [*kept, None]  # a gap between one seed and the next
                y += [*(_round(values[epoch], 4) for epoch in kept), None]
            seeds.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "meta": label,
                    "x": x[:-1],
                    "y": y[:-1],
                    "line": {"color": look.colour, "width": 0.8},
                    "opacity": 0.4,
                    "hoverinfo": "skip",
                }
            )
        means = [_mean(values[epoch] for values in by_job if epoch in values) for epoch in epochs]
        lines.append(
            {
                "type": "scatter",
                "mode": "lines" if len(epochs) > 1 else "markers",
                "meta": label,
                "x": epochs,
                "y": _rounded(means),
                "line": {"color": look.colour, "dash": look.dash, "width": 2},
                "marker": {"color": look.colour, "symbol": look.marker, "size": 8},
                "hovertemplate": f"{escape(label)}<br>epoch %{{x}}: %{{y:.4g}}<extra></extra>",
            }
        )
    if not lines:
        return []
    drawn = [value for trace in [*seeds, *lines] for value in trace["y"] if value is not None]
    steep = min(drawn) > 0 and max(drawn) / min(drawn) > 20
    scale = {"type": "log", "dtick": "D2" if max(drawn) / min(drawn) < 200 else 1} if steep else {"type": "linear"}
    layout = {"xaxis": {"title": {"text": "epoch"}, "zeroline": False}, "yaxis": {**scale, "zeroline": False}}
    alt = f"Line chart over epochs, one line per method. {caption}."
    caption += " (log scale)" if steep else ""
    return [Figure(key, {"": View(caption, alt, [*seeds, *lines], layout)})]


def _points_per_curve(comparison: Comparison) -> int:
    figures = len(comparison.columns) + 2 * len(comparison.tasks) + 1
    curves = figures * len(comparison.rows) * (1 + len(comparison.seeds))
    low, high = POINTS
    return max(low, min(high, CURVES // curves))


def _thin(epochs: Sequence[int], points: int) -> list[int]:
    stride = math.ceil(len(epochs) / points)
    return sorted({*epochs[::stride], epochs[-1]})


def _ghosts(places: Mapping[str, tuple[float, float]], hover: str) -> Trace:
    """A small grey point for every label: the page shows those that are switched off."""
    x, y = zip(*places.values(), strict=True) if places else ((), ())
    marker = {"color": "var(--m0)", "size": 6, "opacity": 0.6}
    return {"type": "scatter", "mode": "markers", "name": "ghosts", "x": _rounded(x), "y": _rounded(y),
            "marker": marker, "ids": list(places), "text": [escape(label) for label in places],
            "hovertemplate": "%{text}" + hover}  # fmt: skip


def _points(look: Style, x: Sequence[float], y: Sequence[float], size: int, **extra: Any) -> Trace:
    marker = {"color": look.colour, "symbol": look.marker, "size": size, "line": {"color": look.colour, "width": 2}}
    return {"type": "scatter", "mode": "markers", "meta": look.label, "x": _rounded(x), "y": _rounded(y),
            "marker": marker, **extra}  # fmt: skip


def _bar(estimate: Estimate, look: Style) -> dict[str, Any]:
    if estimate.interval is None:
        return {"visible": False}
    low, high = estimate.interval
    up, down = [_round(high - estimate.mean)], [_round(estimate.mean - low)]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": look.colour, "thickness": 2,
            "width": 4}  # fmt: skip


def _line_at(axis: str, value: float, dash: str = "dot", colour: str = "var(--ink)") -> dict[str, Any]:
    """A line across the plot, by default the dotted one of the single-task baseline."""
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": value, f"{axis}1": value, f"{other}0": 0, f"{other}1": 1}
    line = {"color": colour, "width": 1.5, "dash": dash}
    return {"type": "line", f"{other}ref": "paper", **ends, "line": line, "layer": "below"}


def _window(
    values: Mapping[str, float], ends: Mapping[str, tuple[float, float]] | None = None
) -> tuple[list[float] | None, list[str]]:
    """An axis range without the labels that lie so far out that the others could not be told apart; None: no need.

    The baselines are always inside, and so are `ends`, as far as they leave room for the rest.
    """
    found = np.array(list(values.values()))
    if len(found) < 8:
        return None, []
    quarter, three = np.quantile(found, [0.25, 0.75])
    reach = 4 * (three - quarter)
    inside = [
        label
        for label, value in values.items()
        if label in (SINGLE, EQUAL) or quarter - reach <= value <= three + reach
    ]
    if reach == 0 or len(inside) == len(found):
        return None, []
    low, high = (pick(values[label] for label in inside) for pick in (min, max))
    span = high - low
    if ends:
        low = max(low - span / 2, min(low, *(ends[label][0] for label in inside)))
        high = min(high + span / 2, max(high, *(ends[label][1] for label in inside)))
    beyond = [label for label, value in values.items() if not low <= value <= high]
    return [_round(low - 0.05 * span), _round(high + 0.05 * span)], beyond


def _outside(labels: Iterable[str], values: Mapping[str, float]) -> str:
    named = ", ".join(f"{label} ({values[label]:.4g})" for label in labels)
    return f"Outside the plot: {named}." if named else ""


def _row_height(rows: int) -> int:
    return 32 if rows <= 14 else 17 if rows <= 30 else 15  # 40 rows fit on a sheet of paper


def _short(label: str) -> str:
    """A label on an axis."""
    return escape(label if len(label) <= 24 else label[:23] + "…")


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def _maybe(value: float | None) -> float | None:
    return None if value is None else round(value, 4) + 0.0


def _rounded(values: Iterable[float]) -> list[float]:
    return [_round(value) for value in values]


def _round(value: float, digits: int = 6) -> float:
    """Significant digits: more cannot be seen and only makes the file larger."""
    return float(f"{value:.{digits}g}")
