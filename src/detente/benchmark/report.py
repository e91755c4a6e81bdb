"""One self-contained HTML file that shows a comparison: it needs no network, no server and no other file.

Figures are plain plotly.js specifications, built here and drawn in the page. A colour is written as the name of a CSS
variable (``var(--m1)``) and looked up when a figure is drawn, so that one specification serves light, dark and print.
A method keeps its colour, dash and marker in every figure; the marker tells methods apart without colour.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from detente.benchmark.results import EQUAL, SINGLE, Comparison, Job, verdict
from detente.benchmark.statistics import Estimate
from detente.benchmark.tables import ARROWS, cost_grid, result_grid

COLOURS = 7
"""Colours ``--m0`` to ``--m6`` of the template: the first, grey, is that of equal weights."""
MARKERS = (
    ("circle", "●"), ("square", "■"), ("diamond", "◆"), ("triangle-up", "▲"), ("cross", "✚"), ("star", "★"),
    ("triangle-down", "▼"), ("circle-open", "○"), ("square-open", "□"), ("diamond-open", "◇"),
    ("triangle-up-open", "△"), ("cross-open", "✛"), ("star-open", "☆"), ("triangle-down-open", "▽"),
)  # fmt: skip
"""Plotly's name and the character of each marker."""
POINTS = 240
"""A curve is thinned to about this many points."""
Pick = Callable[[Mapping[str, Any]], "float | None"]
"""What a curve shows of one entry of a history; None where it was not recorded."""
IMAGES = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class Style:
    """How a label looks in every figure."""

    label: str
    colour: str
    dash: str
    marker: str
    glyph: str


@dataclass(frozen=True)
class Figure:
    """A plot: `caption` stands above it, `alt` describes it to a screen reader, `height` is in pixels."""

    key: str
    caption: str
    alt: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    height: int = 280


@dataclass(frozen=True)
class Section:
    """Figures under one heading; `text` says what they show."""

    key: str
    title: str
    text: str
    figures: Sequence[Figure]

    @property
    def columns(self) -> int:
        """How many figures stand side by side on a wide screen: no orphan in the last row where that can be."""
        return {1: 1, 2: 2, 4: 2}.get(len(self.figures), 3)


def write_report(comparison: Comparison, directory: str | Path, headline: str | None = None) -> Path:
    """Write ``report.html`` into `directory` and return its path; the same comparison gives the same bytes.

    `headline` stands at the top; None is the verdict on the methods.

    Pictures that a problem has left in ``figures/*.svg`` or ``*.png`` of the comparison are embedded.
    """
    environment = Environment(
        loader=PackageLoader("detente.benchmark", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "sort_keys": True}
    looks = styles(comparison)
    sections = figure_sections(comparison)
    page = environment.get_template("report.html.j2").render(
        comparison=comparison,
        verdict=verdict(comparison) if headline is None else headline,
        styles=looks,
        tables={"results": result_grid(comparison), "cost": cost_grid(comparison)},
        sections=sections,
        plots={figure.key: [figure.data, figure.layout] for section in sections for figure in section.figures},
        pictures=list(_pictures(comparison.directory / "figures")),
        configuration=_configuration(comparison.config),
        plotly=Markup(get_plotlyjs()),
    )
    path = Path(directory) / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def styles(comparison: Comparison) -> dict[str, Style]:
    """Label -> style, in the order of the rows. It depends on the order asked for, not on who won."""
    listed = [label for label in comparison.config["methods"] if label not in (SINGLE, EQUAL)]
    labels = [row.label for row in comparison.rows]
    order = [EQUAL, *listed, *sorted(set(labels) - {EQUAL, SINGLE, *listed})]
    found = {}
    for label in labels:
        if label == SINGLE:
            found[label] = Style(label, "var(--ink)", "dot", "x", "✖")
        else:
            place = order.index(label)
            marker, glyph = MARKERS[place % len(MARKERS)]
            dash = ("solid", "dash", "dashdot")[place // COLOURS % 3]
            found[label] = Style(label, f"var(--m{place % COLOURS})", dash, marker, glyph)
    return found


def figure_sections(comparison: Comparison) -> list[Section]:
    """Every figure of the report. A section without data is left out."""
    sections = [
        Section(
            "gain",
            "Gain over single-task training",
            "Change against one network per task, in percent: left of zero is better than the baseline. Bars are 95% "
            "intervals over seeds, small points the seeds. Filled: average over all metrics alike; hollow, where tasks "
            "have different numbers of metrics: average per task first.",
            _gain(comparison),
        ),
        Section(
            "trade",
            "Trade-off between tasks",
            "Up and to the right is better on both tasks. Large points are means, small ones seeds; dotted lines are "
            "the single-task baseline. Each task is shown by its first metric.",
            _trade_offs(comparison),
        ),
        Section(
            "price",
            "Cost against gain",
            "Step time relative to equal weights. Down and to the left is better and cheaper.",
            _price(comparison),
        ),
        Section(
            "curves",
            "Learning curves",
            "Mean over seeds; the band spans the lowest and the highest seed.",
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
            [*_cosines(comparison), *_conflicts(comparison)],
        ),
    ]
    return [section for section in sections if section.figures]


def _gain(comparison: Comparison) -> list[Figure]:
    rows = [row for row in comparison.rows if row.delta_m and row.delta_m.finite]
    if not rows:
        return []
    looks = styles(comparison)
    uneven = len({len(metrics) for metrics in comparison.tasks.values()}) > 1
    data: list[dict[str, Any]] = []
    for place, row in enumerate(rows):
        averages = [(row.delta_m, "all metrics alike", 0.0)]
        if uneven:
            averages = [(row.delta_m, "all metrics alike", -0.16), (row.delta_m_by_task, "per task first", 0.16)]
        for estimate, name, shift in averages:
            assert estimate is not None
            look = looks[row.label]
            hollow = {"color": "var(--card)", "line": {"color": look.colour, "width": 2}} if shift > 0 else {}
            hover = f"{escape(row.label)}<br>{name}: %{{x:.2f}}%<extra></extra>"
            seeds = len(estimate.values)
            data.append(
                _points(look, list(estimate.values), [place + shift] * seeds, 4, opacity=0.55, hovertemplate=hover)
            )
            data.append(
                _points(look, [estimate.mean], [place + shift], 10, error_x=_bar(estimate, look), hovertemplate=hover)
            )
            data[-1]["marker"] |= hollow
    layout = {
        "xaxis": {"title": {"text": "delta-m in %, lower is better ←"}, "zeroline": False},
        "yaxis": {
            "tickvals": list(range(len(rows))),
            "ticktext": [escape(row.label) for row in rows],
            "range": [len(rows) - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
        },
        "shapes": [_baseline("x", 0.0)],
    }
    means = ", ".join(f"{row.label} {row.delta_m.mean:.1f}" for row in rows if row.delta_m)
    alt = f"delta-m in percent with 95% intervals, lower is better: {means}."
    return [Figure("gain", "delta-m per method", alt, data, layout, 110 + 34 * len(rows))]


def _trade_offs(comparison: Comparison) -> list[Figure]:
    """The plane of each pair of tasks; beyond three tasks there are too many pairs to read."""
    if not 2 <= len(comparison.tasks) <= 3:
        return []
    looks = styles(comparison)
    figures: list[Figure] = []
    for pair in combinations(comparison.tasks, 2):
        columns = [(task, next(iter(comparison.tasks[task]))) for task in pair]
        titles = [f"{task} {metric} {ARROWS[comparison.tasks[task][metric]]}" for task, metric in columns]
        data: list[dict[str, Any]] = []
        for row in comparison.rows:
            if not all(column in row.metrics and row.metrics[column].finite for column in columns):
                continue
            look, (x, y) = looks[row.label], (row.metrics[column] for column in columns)
            hover = f"{escape(row.label)}<br>{escape(titles[0])} %{{x:.4g}}<br>{escape(titles[1])} %{{y:.4g}}"
            hover += "<extra></extra>"
            if row.label != SINGLE:  # its two tasks come from different networks, so a seed is no point of the plane
                data.append(_points(look, list(x.values), list(y.values), 5, opacity=0.5, hovertemplate=hover))
            data.append(_points(look, [x.mean], [y.mean], 12, hovertemplate=hover))
        single = comparison.row(SINGLE)
        shapes = [
            _baseline(axis, single.metrics[column].mean)
            for axis, column in zip("xy", columns, strict=True)
            if single and column in single.metrics and single.metrics[column].finite
        ]
        layout: dict[str, Any] = {"shapes": shapes}
        for axis, title, (task, metric) in zip(("xaxis", "yaxis"), titles, columns, strict=True):
            lowest_last = "reversed" if comparison.tasks[task][metric] == "min" else True
            layout[axis] = {"title": {"text": escape(title)}, "autorange": lowest_last, "zeroline": False}
        alt = (
            f"Scatter of {titles[0]} against {titles[1]}, one large point per method; the result table has the values."
        )
        figures.append(Figure(f"trade-{len(figures)}", f"{pair[0]} against {pair[1]}", alt, data, layout, 380))
    return figures


def _price(comparison: Comparison) -> list[Figure]:
    looks = styles(comparison)
    data = []
    for row, cost in zip(comparison.rows, comparison.costs, strict=True):
        if row.delta_m and row.delta_m.finite and cost.ratio:
            hover = f"{escape(row.label)}<br>%{{x:.2f}} x equal weights<br>delta-m %{{y:.2f}}%<extra></extra>"
            bar = _bar(row.delta_m, looks[row.label])
            point = _points(looks[row.label], [cost.ratio], [row.delta_m.mean], 12, error_y=bar, hovertemplate=hover)
            data.append(point)
    layout = {
        "xaxis": {"title": {"text": "step time, equal weights = 1 ↓"}, "zeroline": False},
        "yaxis": {"title": {"text": "delta-m in % ↓"}, "zeroline": False},
        "shapes": [_baseline("y", 0.0)],
    }
    alt = "Scatter of relative step time against delta-m, one point per method; the tables have the values."
    return [Figure("price", "Step time against delta-m", alt, data, layout, 360)] if data else []


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


def _cosines(comparison: Comparison) -> list[Figure]:
    """Mean cosine between tasks over training: methods by pairs of tasks, or task by task where there are many."""
    tasks = list(comparison.tasks)
    pairs = list(combinations(range(len(tasks)), 2))
    means = {label: matrix for label in styles(comparison) if (matrix := _mean_cosine(comparison.jobs, label))}
    if not means or not pairs:
        return []
    limit = max(0.05, *(abs(m[i][j] or 0.0) for m in means.values() for i, j in pairs))
    look = {
        "type": "heatmap",
        "zmin": -limit,
        "zmax": limit,
        "colorscale": [[0, "var(--against)"], [0.5, "var(--card)"], [1, "var(--along)"]],
        "showscale": False,
        "texttemplate": "%{z:.2f}",
        "hovertemplate": "%{y}<br>%{x}: %{z:.3f}<extra></extra>",
        "xgap": 2,
        "ygap": 2,
    }
    axes = {"xaxis": {"showgrid": False}, "yaxis": {"showgrid": False, "autorange": "reversed"}}
    if len(tasks) <= 3:
        names = [escape(f"{tasks[i]}, {tasks[j]}") for i, j in pairs]
        z = [[matrix[i][j] for i, j in pairs] for matrix in means.values()]
        data = [{**look, "x": names, "y": [escape(label) for label in means], "z": z}]
        alt = "Heat map of the mean cosine between tasks: " + "; ".join(
            f"{label} " + ", ".join(f"{value:.2f}" for value in row if value is not None)
            for label, row in zip(means, z, strict=True)
        )
        return [Figure("cosine", "Mean cosine between tasks over training", alt, data, axes, 90 + 34 * len(means))]
    figures: list[Figure] = []
    for label, matrix in means.items():
        z = [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(matrix)]
        names = [escape(task) for task in tasks]
        data = [{**look, "x": names, "y": names, "z": z}]
        alt = f"Heat map of the mean cosine between every two tasks under {label}, averaged over training."
        caption = f"{label}: mean cosine between tasks"
        figures.append(Figure(f"cosine-{len(figures)}", caption, alt, data, axes, 320))
    return figures


def _mean_cosine(jobs: Iterable[Job], label: str) -> list[list[float | None]] | None:
    """Entry by entry the mean over seeds and epochs of what was measured."""
    found = [row["cosine"] for job in jobs if job.label == label for row in job.history if row.get("cosine")]
    if not found:
        return None
    size = len(found[0])

    def mean(i: int, j: int) -> float | None:
        values = [matrix[i][j] for matrix in found if matrix[i][j] is not None and math.isfinite(matrix[i][j])]
        return _round(math.fsum(values) / len(values)) if values else None

    return [[mean(i, j) for j in range(size)] for i in range(size)]


def _lines(comparison: Comparison, key: str, caption: str, pick: Pick) -> list[Figure]:
    """One figure: per label the mean over seeds of `pick(history row)` by epoch, with a band from lowest to highest."""
    bands: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for label, look in styles(comparison).items():
        by_epoch: dict[int, list[float]] = {}
        for job in comparison.jobs:
            for row in job.history if job.label == label else ():
                value = pick(row)
                if value is not None and math.isfinite(value):
                    by_epoch.setdefault(row["epoch"], []).append(value)
        if not by_epoch:
            continue
        epochs = _thin(sorted(by_epoch))
        if any(len(by_epoch[epoch]) > 1 for epoch in epochs):
            low = [_round(min(by_epoch[epoch])) for epoch in epochs]
            high = [_round(max(by_epoch[epoch])) for epoch in epochs]
            bands.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "fill": "toself",
                    "meta": label,
                    "hoverinfo": "skip",
                    "x": [*epochs, *reversed(epochs)],
                    "y": [*low, *reversed(high)],
                    "line": {"width": 0},
                    "fillcolor": look.colour,
                    "opacity": 0.16,
                }
            )
        lines.append(
            {
                "type": "scatter",
                "mode": "lines" if len(epochs) > 1 else "markers",
                "meta": label,
                "x": epochs,
                "y": [_round(math.fsum(by_epoch[e]) / len(by_epoch[e])) for e in epochs],
                "line": {"color": look.colour, "dash": look.dash, "width": 2},
                "marker": {"color": look.colour, "symbol": look.marker, "size": 8},
                "hovertemplate": f"{escape(label)}<br>epoch %{{x}}: %{{y:.4g}}<extra></extra>",
            }
        )
    if not lines:
        return []
    values = [value for trace in [*bands, *lines] for value in trace["y"]]
    steep = min(values) > 0 and max(values) / min(values) > 100
    layout = {
        "xaxis": {"title": {"text": "epoch"}, "zeroline": False},
        "yaxis": {"type": "log" if steep else "linear", "zeroline": False},
    }
    alt = f"Line chart over epochs, one line per method. {caption}."
    return [Figure(key, caption + (" (log scale)" if steep else ""), alt, [*bands, *lines], layout)]


def _points(look: Style, x: Sequence[float], y: Sequence[float], size: int, **extra: Any) -> dict[str, Any]:
    marker = {"color": look.colour, "symbol": look.marker, "size": size, "line": {"color": look.colour, "width": 2}}
    x, y = [_round(value) for value in x], [_round(value) for value in y]
    return {"type": "scatter", "mode": "markers", "meta": look.label, "x": x, "y": y, "marker": marker, **extra}


def _bar(estimate: Estimate, look: Style) -> dict[str, Any]:
    half = estimate.half_width
    if half is None:
        return {"visible": False}
    return {"type": "data", "array": [_round(half)], "color": look.colour, "thickness": 2, "width": 4}


def _baseline(axis: str, value: float) -> dict[str, Any]:
    """A dotted line across the plot where the single-task baseline stands."""
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": value, f"{axis}1": value, f"{other}0": 0, f"{other}1": 1}
    line = {"color": "var(--ink)", "width": 1.5, "dash": "dot"}
    return {"type": "line", f"{other}ref": "paper", **ends, "line": line, "layer": "below"}


def _thin(epochs: Sequence[int]) -> list[int]:
    stride = max(1, len(epochs) // POINTS)
    return sorted({*epochs[::stride], epochs[-1]})


def _round(value: float) -> float:
    """Six significant digits: more cannot be seen and only makes the file larger."""
    return float(f"{value:.6g}")


def _configuration(config: Mapping[str, Any]) -> dict[str, str]:
    """What was asked for and where it ran, as lines of text."""

    def text(value: object) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    lines = {key: text(config[key]) for key in ("problem", "methods", "seeds")}
    for part in ("settings", "environment"):
        lines |= {str(key): text(value) for key, value in config.get(part, {}).items()}
    return lines


def _pictures(directory: Path) -> Iterable[tuple[str, str]]:
    """Caption and data URI of every picture. As an image, an SVG can neither run scripts nor load anything."""
    for path in sorted(directory.glob("*")):
        if path.suffix in IMAGES:
            content = base64.b64encode(path.read_bytes()).decode("ascii")
            yield path.stem.replace("_", " "), f"data:{IMAGES[path.suffix]};base64,{content}"
