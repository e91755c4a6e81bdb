"""What a recorder wrote, read back as arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FORMAT", "Recording", "pairs", "records"]

FORMAT = 1
Array = NDArray[np.float64]


def pairs(count: int) -> list[tuple[int, int]]:
    """The pairs of tasks in the order in which their cosines are written."""
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def records(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Step, line and content of everything in a file but its head; a last line that was cut off is left out."""
    with path.open(encoding="utf-8") as file:
        next(file, None)
        for line in file:
            try:
                entry = json.loads(line)
                step = int(entry["of"] if "of" in entry else entry["step"])
            except (ValueError, KeyError, TypeError):
                continue
            yield step, line, entry


@dataclass(frozen=True)
class Recording:
    """The records of a run, as arrays of float64; NaN where a step lacks a task, or a figure was not recorded.

    R records, T tasks, L layers that tasks share.

    Attributes:
        path: the file.
        tasks: their names, in the order in which they appeared.
        layers: names of the modules with shared parameters, in the model's order.
        steps: ``[R]`` number of the step, from 0.
        times: ``[R]`` seconds since 1970.
        losses: ``[R, T]``.
        norms: ``[R, T]`` of the gradients of all shared parameters.
        cosines: ``[R, T, T]`` between these gradients.
        layer_norms: ``[R, L, T]``.
        layer_cosines: ``[R, L, T, T]``.
        weights: ``[R, T]`` coefficients of the method; means where it works on blocks.
        predicted: ``[R, T]`` change of each loss by the optimizer's step to first order.
        realised: ``[R, T]`` its change on the same samples.
        curvature: ``[R, T]`` of each loss along the step: ``2 (realised - predicted) / length^2``.
        lengths: ``[R]`` of the step.
        phases: ``[R]`` of connection strength, 1 or 2.
        priorities: per record ``{layer with norm: {task: channels that it owns}}``, empty for other methods.
        methods: ``[R]`` names; "" for steps without a method.
        step_ms: ``[R]`` time of a step of the loop, without what recording takes.
        gradients_ms: ``[R]`` time of one backward pass per task.

    Example:
        >>> import detente, torch, tempfile
        >>> model = torch.nn.Linear(2, 2)
        >>> recorder = detente.Recorder(model, tempfile.mkdtemp() + "/run.jsonl")
        >>> out = model(torch.ones(1, 2)).sum()
        >>> observation = recorder.observe({"up": out, "down": -out})
        >>> found = Recording.load(recorder.path)
        >>> found.cosines[0, 0, 1].item(), found.conflict_rate.item()
        (-1.0, 1.0)
    """

    path: Path
    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    steps: NDArray[np.int64]
    times: Array
    losses: Array
    norms: Array
    cosines: Array
    layer_norms: Array
    layer_cosines: Array
    weights: Array
    predicted: Array
    realised: Array
    curvature: Array
    lengths: Array
    phases: Array
    priorities: list[Mapping[str, Mapping[str, int]]]
    methods: list[str]
    step_ms: Array
    gradients_ms: Array

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a file that :class:`detente.Recorder` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no such file, or has no records.
        """
        path = Path(path)
        head = _head(path)
        merged: dict[int, dict[str, Any]] = {}
        for step, _, entry in records(path):
            merged.setdefault(step, {}).update(entry)
        found = [entry for _, entry in sorted(merged.items()) if "step" in entry]
        if not found:
            raise ValueError(f"{path} has no records: the run ended before its first step was recorded.")
        tasks = tuple(dict.fromkeys(task for entry in found for task in entry["tasks"]))
        there = [k for k in range(len(head["layers"])) if any(_layers(entry, k) is not None for entry in found)]
        places = [[tasks.index(task) for task in entry["tasks"]] for entry in found]

        def by_task(what: str) -> Array:
            result = np.full((len(found), len(tasks)), np.nan)
            for r, (entry, place) in enumerate(zip(found, places, strict=True)):
                if entry.get(what) is not None:
                    result[r, place] = np.array(entry[what], dtype=float)
            return result

        def number(of: Any) -> float:
            return np.nan if of is None else float(of)

        count, shape = len(tasks), (len(found), len(there))
        cosines = np.full((len(found), count, count), np.nan)
        layer_norms = np.full((*shape, count), np.nan)
        layer_cosines = np.full((*shape, count, count), np.nan)
        weights = np.full((len(found), count), np.nan)
        for r, (entry, place) in enumerate(zip(found, places, strict=True)):
            _fill(cosines[r], place, entry.get("norms"), entry.get("cosines"))
            for k, layer in enumerate(there):
                one = _layers(entry, layer)
                if one is not None:
                    layer_norms[r, k, place] = np.array(one["norms"], dtype=float)
                    _fill(layer_cosines[r, k], place, one["norms"], one["cosines"])
            for task, weight in entry.get("weights", {}).items():
                if task in tasks:
                    weights[r, tasks.index(task)] = number(weight)
        return cls(
            path=path,
            tasks=tasks,
            layers=tuple(head["layers"][k] for k in there),
            steps=np.array([entry["step"] for entry in found]),
            times=np.array([number(entry["time"]) for entry in found]),
            losses=by_task("losses"),
            norms=by_task("norms"),
            cosines=cosines,
            layer_norms=layer_norms,
            layer_cosines=layer_cosines,
            weights=weights,
            predicted=by_task("predicted"),
            realised=by_task("realised"),
            curvature=by_task("curvature"),
            lengths=np.array([number(entry.get("length")) for entry in found]),
            phases=np.array([number(entry.get("phase")) for entry in found]),
            priorities=[entry.get("priorities", {}) for entry in found],
            methods=[entry.get("method", "") for entry in found],
            step_ms=np.array([number(entry["ms"].get("step")) for entry in found]),
            gradients_ms=np.array([number(entry["ms"].get("gradients")) for entry in found]),
        )

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Positions of the tasks of every pair."""
        return pairs(len(self.tasks))

    @cached_property
    def conflict_rate(self) -> Array:
        """``[R]`` share of the pairs of tasks with a negative cosine."""
        between = np.array([self.cosines[:, i, j] for i, j in self.pairs])
        return _share(between < 0, np.isfinite(between), 0) if self.pairs else np.full(len(self.steps), np.nan)

    @cached_property
    def layer_pairs(self) -> Array:
        """``[pairs, R, L]`` cosines of every pair of tasks in each layer."""
        shape = (len(self.pairs), len(self.steps), len(self.layers))
        return np.array([self.layer_cosines[:, :, i, j] for i, j in self.pairs]).reshape(shape)

    @cached_property
    def layer_conflict_rate(self) -> Array:
        """``[L]`` share of pairs and records with a negative cosine in each layer."""
        return _share(self.layer_pairs < 0, np.isfinite(self.layer_pairs), (0, 1))

    @cached_property
    def to_mean(self) -> Array:
        """``[R, T]`` cosines of every task's gradient to the mean of all."""
        gramian = self.cosines * self.norms[:, :, None] * self.norms[:, None, :]
        there = np.isfinite(self.norms)
        gramian = np.where(there[:, :, None] & there[:, None, :], gramian, 0.0)
        mean = np.sqrt(np.maximum(gramian.sum((1, 2)), 0.0))[:, None]
        length = self.norms * mean
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(length > 0, gramian.sum(2) / length, np.nan)


def _head(path: Path) -> Mapping[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(file.readline())
        if head["detente"] == FORMAT and isinstance(head["layers"], list):
            return dict(head)
        what = f"format {head['detente']}, and this version of detente reads {FORMAT}"
    except (ValueError, KeyError, TypeError) as error:
        what = f"no line that names the layers ({error!r})"
    raise ValueError(f"{path} is no file of detente.Recorder: it begins with {what}.")


def _layers(entry: Mapping[str, Any], k: int) -> Mapping[str, Any] | None:
    layers: Sequence[Mapping[str, Any] | None] = entry.get("layers") or ()
    return layers[k] if k < len(layers) else None


def _fill(into: Array, place: Sequence[int], norms: Sequence[float] | None, upper: Sequence[float] | None) -> None:
    """Cosines of the tasks of a record; those of a zero gradient are unknown."""
    if norms is None or upper is None:
        return
    alive = [norm is not None and norm > 0 for norm in norms]
    for task, some in zip(place, alive, strict=True):
        into[task, task] = 1.0 if some else np.nan
    for (i, j), value in zip(pairs(len(place)), upper, strict=True):
        if alive[i] and alive[j] and value is not None:
            into[place[i], place[j]] = into[place[j], place[i]] = value


def _share(holds: NDArray[np.bool_], there: NDArray[np.bool_], axes: int | tuple[int, ...]) -> Array:
    total = there.sum(axes)
    return np.where(total > 0, (holds & there).sum(axes) / np.maximum(total, 1), np.nan)
