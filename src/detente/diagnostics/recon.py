"""Which layers the tasks fight over: the first half of Recon."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from detente.diagnostics.conflicts import seen, take_gradients
from detente.gramian import Partition, cosines
from detente.nn.task_layers import submodules
from detente.nn.task_norm import TaskModule

__all__ = ["ConflictScores"]


class ConflictScores:
    """Count, layer by layer, how often two tasks' gradients conflict (Recon; Shi et al., ICLR 2023, arXiv 2302.11289).

    A layer's score is the number of pairs (step, two tasks) whose gradients of the layer's parameters have a cosine
    below the threshold. Recon trains a shared model for a part of the training (40 to 50 epochs in the paper) while it
    observes, makes the K layers with the highest scores task-specific, and trains that model from scratch::

        scores = ConflictScores(model)
        ...
        scores.observe(losses)  # before the update, in some or all steps
        ...
        model = detente.nn.convert_task_layers(make_model(), tasks, scores.top(10))

    Layers are the modules that hold parameters and contain no other such module; attention and parametrized modules
    count as a whole. Parameters held by a module around others (a class token) are not scored unless ``layers`` names
    that module; nor are layers that only one loss reaches, or that are task-specific already. The paper's settings:
    Cityscapes K = 40, threshold 0; Multi-Fashion and MNIST 25, -0.1; NYUv2 15, -0.02.

    Args:
        model: the network that the losses are computed with.
        threshold: S, from -1 to 1.
        layers: names of the submodules to score instead, none inside another.

    Raises:
        ValueError: the threshold is out of range, no layer has parameters, or a name does not fit.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> scores = ConflictScores(model)
        >>> out = model(torch.ones(3, 2)).mean()
        >>> scores.observe({"up": out, "down": -out, "higher": 2 * out})
        >>> scores.scores(), scores.top(1)
        ({'0': 2, '1': 2}, ['0'])
    """

    def __init__(self, model: nn.Module, threshold: float = 0.0, *, layers: Iterable[str] | None = None) -> None:
        if not isinstance(threshold, int | float) or not -1 <= threshold <= 1:
            raise ValueError(f"threshold is compared to cosines and must be from -1 to 1; got {threshold!r}.")
        self.threshold = threshold
        chosen = _layers(model) if layers is None else submodules(model, layers)
        self.layers = tuple(chosen)
        self._parameters: dict[int, int] = {}  # id of a parameter to the position of its layer
        self._kept = [list(module.parameters()) for module in chosen.values()]  # so that no id is used again
        for position, parameters in enumerate(self._kept):
            for p in parameters:
                self._parameters.setdefault(id(p), position)
        if not self._parameters:
            raise ValueError(
                "there is no layer with parameters to score. Task-specific layers are left out: pass the shared model."
            )
        self._counts: dict[str, int] = {}
        self.steps = 0

    def observe(self, losses: Mapping[str, Tensor] | Sequence[Tensor]) -> None:
        """Add one step's conflicts; keeps the graph and writes no ``.grad``.

        Costs one backward pass per task. Pairs with a zero gradient, or one that is not finite, are not counted.

        Args:
            losses: as in :func:`detente.backward`; some of the tasks are enough.

        Raises:
            TypeError, ValueError: the losses do not fit, or no two of them reach a layer of the model.
        """
        step = seen(losses)
        found, count = step.found, len(step.named)
        scored = [k for k, p in enumerate(found.shared) if id(p) in self._parameters]
        if not scored and count > 1:
            raise ValueError(
                "no two of the losses reach a layer of the model that was given. Was it copied, rebuilt or converted "
                "after the scores were made, are its layers frozen, or were its features detached?"
            )
        self.steps += 1
        if not scored:
            return
        found = replace(found, shared=[found.shared[k] for k in scored], tasks=[found.tasks[k] for k in scored])
        blocks = take_gradients(replace(step, found=found), Partition.by_layer).gramians
        positions = torch.tensor([self._parameters[id(p)] for p in found.shared])
        by_layer = torch.zeros(len(self.layers), count, count, dtype=torch.float64).index_add_(0, positions, blocks)
        below = (cosines(by_layer) < self.threshold).triu(1)
        present = by_layer.diagonal(dim1=1, dim2=2) > 0
        conflicts = (below & present.unsqueeze(1) & present.unsqueeze(2)).sum((1, 2)).tolist()
        for position in sorted(set(positions.tolist())):
            name = self.layers[position]
            self._counts[name] = self._counts.get(name, 0) + conflicts[position]

    def scores(self) -> dict[str, int]:
        """``{layer: number of conflicts}`` of the layers that two tasks shared in some step, in the model's order."""
        return {name: self._counts[name] for name in self.layers if name in self._counts}

    def top(self, count: int) -> list[str]:
        """Names of the layers with the highest scores, highest first, ties in the model's order.

        Raises:
            ValueError: ``count`` is not from 0 to the number of scored layers.
        """
        scores = self.scores()
        if not isinstance(count, int) or not 0 <= count <= len(scores):
            raise ValueError(
                f"expected a number of layers from 0 to {len(scores)}, those scored in {self.steps} steps; got "
                f"{count!r}.{'' if self.steps else ' Call observe(losses) while the shared model trains.'}"
            )
        return sorted(scores, key=scores.__getitem__, reverse=True)[:count]

    def state_dict(self) -> dict[str, Any]:
        """Counts, steps and threshold."""
        return {"counts": dict(self._counts), "steps": self.steps, "threshold": self.threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over saved counts.

        Raises:
            ValueError: they were made with another threshold, or have layers that the model lacks.
        """
        if state["threshold"] != self.threshold:
            raise ValueError(f"the saved counts are for threshold {state['threshold']}; this one is {self.threshold}.")
        if unknown := [name for name in state["counts"] if name not in self.layers]:
            raise ValueError(f"the saved counts are of another model: it has no scored layers {unknown}.")
        self._counts = dict(state["counts"])
        self.steps = state["steps"]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with parameters that contain no other such module, outside of task-specific ones."""
    found: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        if isinstance(module, TaskModule) or module in found.values():
            return
        children = [(n, m) for n, m in module.named_children() if any(True for _ in m.parameters())]
        whole = isinstance(module, nn.MultiheadAttention) or is_parametrized(module)
        if whole or not children:
            if any(True for _ in module.parameters()):
                found[name] = module
            return
        for child_name, child in children:
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return found
