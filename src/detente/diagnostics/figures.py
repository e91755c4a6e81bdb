"""A recording as matplotlib figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from detente.diagnostics.recording import Array, Recording

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["changes", "cosines", "figures", "layers", "matrix", "norms", "priorities", "weights"]

# Okabe and Ito's colours, which colour-blind readers tell apart, and dashes for more than eight lines
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_DASHES = ("-", "--", ":", "-.")
_LINES = 12
_WIDTH = 8.0


def figures(recording: Recording) -> Iterator[tuple[str, str, Figure]]:
    """Title, what is to be seen, and figure, of everything that was recorded.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import detente, torch, tempfile
        >>> model = torch.nn.Linear(2, 2)
        >>> recorder = detente.Recorder(model, tempfile.mkdtemp() + "/run.jsonl", every=1)
        >>> for _ in range(3):
        ...     out = model(torch.ones(1, 2)).sum()
        ...     observation = recorder.observe({"up": out, "down": -out})
        >>> [title for title, *_ in figures(detente.diagnostics.Recording.load(recorder.path))]
        ['Cosines over time', 'Layer by layer', 'Lengths of the gradients']
    """
    count = len(recording.tasks)
    if np.isfinite(recording.cosines[:, ~np.eye(count, dtype=bool)]).any():
        yield "Cosines over time", "Below 0, two tasks pull against each other.", cosines(recording)
        if count > 3:
            yield "Who against whom", "Mean cosine of every pair of tasks.", matrix(recording)
        if recording.layers:
            yield "Layer by layer", "The lowest cosine of any two tasks; red is conflict.", layers(recording)
    if np.isfinite(recording.norms).any():
        yield "Lengths of the gradients", "Far apart, the longest decides where the sum goes.", norms(recording)
    if np.isfinite(recording.predicted).any():
        note = "What each step did to every loss on its own samples, beside what its gradient promised."
        yield "Change of the losses", note, changes(recording)
    given = recording.weights[np.isfinite(recording.weights)]
    if len(given) and np.ptp(given) > 0:
        yield "Weights", "Coefficients that the method gave the tasks.", weights(recording)
    if any(recording.priorities):
        note = "Connection strength: share of each layer's channels that a task owns, at the end."
        yield "Priorities", note, priorities(recording)


def cosines(recording: Recording) -> Figure:
    """Cosines of the task gradients over the steps, with a running mean; of many pairs the lowest."""
    figure, (axes,) = _subplots(1, 3.4)
    of = {f"{recording.tasks[i]} / {recording.tasks[j]}": recording.cosines[:, i, j] for i, j in recording.pairs}
    lowest = sorted(of, key=lambda name: np.nan_to_num(np.nanmean(of[name]), nan=1) if _any(of[name]) else 1)
    _lines(axes, recording, {name: of[name] for name in of if name in lowest[:_LINES] and _any(of[name])})
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set(ylim=(-1.05, 1.05), ylabel="cosine")
    return figure


def norms(recording: Recording) -> Figure:
    """Lengths of the task gradients over the steps."""
    figure, (axes,) = _subplots(1, 3.0)
    of = dict(zip(recording.tasks, recording.norms.T, strict=True))
    _lines(axes, recording, {name: np.where(series > 0, series, np.nan) for name, series in of.items()})
    axes.set(yscale="log", ylabel="norm")
    return figure


def weights(recording: Recording) -> Figure:
    """Coefficients of the method over the steps."""
    figure, (axes,) = _subplots(1, 3.0)
    _lines(axes, recording, dict(zip(recording.tasks, recording.weights.T, strict=True)))
    axes.set(ylabel="weight")
    return figure


def matrix(recording: Recording) -> Figure:
    """Mean cosine of every pair of tasks."""
    count = len(recording.tasks)
    size = min(max(0.34 * count + 1.8, 3.2), _WIDTH)
    figure, (axes,) = _subplots(1, size, size + 1.2)
    there = np.isfinite(recording.cosines)
    mean = np.where(there, recording.cosines, 0).sum(0) / np.maximum(there.sum(0), 1)
    mean = np.where(there.any(0) & ~np.eye(count, dtype=bool), mean, np.nan)
    image = axes.imshow(mean, cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(range(count), recording.tasks, rotation=90, fontsize=8)
    axes.set_yticks(range(count), recording.tasks, fontsize=8)
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="mean cosine", shrink=0.8)
    return figure


def layers(recording: Recording) -> Figure:
    """The lowest cosine of any two tasks in every layer over the steps, and its mean over them."""
    count = len(recording.layers)
    height = min(max(0.2 * count + 1.2, 2.4), 11.0)
    figure, (axes, beside) = _subplots(2, height, ratios=(4, 1))
    between = recording.layer_pairs
    there = np.isfinite(between)
    lowest = np.where(there.any(0), np.where(there, between, np.inf).min(0), np.nan)  # [R, L]
    total = there.sum(1)
    means = np.where(total > 0, np.where(there, between, 0).sum(1) / np.maximum(total, 1), np.inf)
    mean = np.where(np.isfinite(means).any(0), means.min(0), np.nan)
    image = axes.imshow(
        lowest.T, aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest", extent=_extent(recording, count)
    )
    shown = range(0, count, max(1, -(-count // 55)))
    axes.set_yticks([k + 0.5 for k in shown], [_short(recording.layers[k]) for k in shown], fontsize=8)
    axes.set(xlabel="step")
    axes.grid(visible=False)
    beside.barh([k + 0.5 for k in range(count)], mean, color=[_sign(value) for value in mean], height=0.7)
    beside.axvline(0, color="0.3", linewidth=0.8)
    beside.set(ylim=(count, 0), yticks=[], xlim=(-1.05, 1.05), xlabel="lowest mean\nof a pair")
    figure.colorbar(image, ax=[axes, beside], label="cosine", shrink=min(1.0, 2.4 / height), pad=0.02)
    return figure


def changes(recording: Recording) -> Figure:
    """Predicted and realised change of each loss by the recorded steps."""
    shown = [t for t in range(len(recording.tasks)) if _any(recording.predicted[:, t])][:_LINES]
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    figure, grid = _subplots(columns, 2.3 * rows + 0.4, rows=rows)
    for axes, t in zip(grid, shown, strict=False):
        axes.plot(recording.steps, recording.predicted[:, t], color=_COLOURS[0], linewidth=1, label="predicted")
        if _any(recording.realised[:, t]):
            axes.plot(recording.steps, recording.realised[:, t], color=_COLOURS[1], linewidth=1, label="realised")
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set_title(recording.tasks[t], fontsize=9)
        axes.set_xlabel("step")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    grid[0].legend(fontsize=8, frameon=False)
    grid[0].set_ylabel("change of the loss")
    return figure


def priorities(recording: Recording) -> Figure:
    """Share of the channels of each layer that a task owns in the last record, and the phases over the steps."""
    last = next(found for found in reversed(recording.priorities) if found)
    names = list(last)
    figure, (axes,) = _subplots(1, min(max(0.24 * len(names) + 1.4, 2.4), 11.0))
    left = np.zeros(len(names))
    for t, task in enumerate(recording.tasks):
        share = np.array([last[name].get(task, 0) / max(sum(last[name].values()), 1) for name in names])
        axes.barh(names, share, left=left, label=task, color=_COLOURS[t % len(_COLOURS)], height=0.8)
        left += share
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    first = recording.phases == 1
    axes.set(xlim=(0, 1), xlabel=f"share of the channels; {first.sum()} of {len(first)} recorded steps were of phase 1")
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _subplots(
    columns: int, height: float, width: float = _WIDTH, rows: int = 1, ratios: tuple[float, ...] | None = None
) -> tuple[Figure, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib, which is not installed. Run: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, width_ratios=ratios)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, list(grid.flat)


def _lines(axes: Any, recording: Recording, series: dict[str, Array]) -> None:
    """Each series thin, its running mean bold and named at its end."""
    for k, (name, values) in enumerate(list(series.items())[:_LINES]):
        colour, dash = _COLOURS[k % len(_COLOURS)], _DASHES[k // len(_COLOURS) % len(_DASHES)]
        axes.plot(recording.steps, values, color=colour, linewidth=0.6, alpha=0.35)
        axes.plot(recording.steps, _running(values), color=colour, linestyle=dash, linewidth=1.6, label=name)
    axes.set_xlabel("step")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _running(values: Array) -> Array:
    """Mean over a twentieth of the records around each."""
    half = max(1, len(values) // 40)
    there = np.isfinite(values)
    kernel = np.ones(2 * half + 1)
    total = np.convolve(np.where(there, values, 0), kernel)[half : half + len(values)]
    count = np.convolve(there.astype(float), kernel)[half : half + len(values)]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _extent(recording: Recording, count: int) -> tuple[float, float, float, float]:
    first, last = float(recording.steps[0]), float(recording.steps[-1])
    return first, last if last > first else first + 1, float(count), 0.0


def _any(values: Array) -> bool:
    return bool(np.isfinite(values).any())


def _sign(value: float) -> str:
    return _COLOURS[1] if value < 0 else _COLOURS[0]


def _short(name: str) -> str:
    return name if len(name) <= 28 else "..." + name[-25:]
