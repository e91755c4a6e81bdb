"""One backward pass for losses with samples of their own: every row of a layer's gradient belongs to one task."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils.weak import WeakIdKeyDictionary

from detente.engine.graph import Reach, users
from detente.engine.jacobian import Jacobian
from detente.engine.lean import Product, biases, products

__all__ = ["Chunks"]


class Chunks:
    """A batch in which the samples of each task follow those of the task before.

    Args:
        found: the leaves behind the losses.
        samples: of each loss.
        alike: whether all losses count alike for leaves that are not shared. Those that several losses reach take the
            sum of their gradients then, which one pass gives.

    Raises:
        ValueError: some parameter's gradients cannot be told apart by the rows of a linear layer.
    """

    def __init__(self, found: Reach, samples: Sequence[int], alike: bool) -> None:
        if not (found.apart or alike):
            raise ValueError("a parameter that is not listed in `shared`, or an input, is reached by several losses")
        self.found = found
        self.samples = samples
        self.total = sum(samples)
        feeds = users(found.edges)
        # of which layer each shared parameter is the weight or the bias
        self.weights = self._whole(products(feeds, found.shared))
        self.biases = self._whole(biases(feeds, found.shared))
        self.alone = [k for k, tasks in enumerate(found.tasks) if len(tasks) == 1]
        covered = {*self.weights, *self.biases, *self.alone}
        for k, p in enumerate(found.shared):
            if k not in covered:
                raise ValueError(
                    f"shared parameter {k} of shape {tuple(p.shape)} is not that of one linear layer over the whole "
                    "batch alone"
                )

    def _whole(self, layers: Mapping[int, Product]) -> dict[int, Product]:
        """Those that every sample of the batch goes through, one time or several (tokens)."""
        return {
            k: layer
            for k, layer in layers.items()
            if layer.samples and layer.samples % self.total == 0 and len(self.found.tasks[k]) > 1
        }

    def pull(self, losses: Sequence[Tensor], jacobian: Jacobian) -> tuple[list[tuple[Tensor, int, Tensor]], int]:
        """Write the rows of all tasks.

        Returns:
            The gradients of the tasks' own parameters, and the number of backward passes.

        Raises:
            ValueError: a row of the batch has a part in the loss of a task that it does not belong to.
        """
        shared = self.found.shared
        layers = {layer.node: layer.samples for layer in (*self.weights.values(), *self.biases.values())}
        edges = [GradientEdge(node, 0) for node in layers]
        own = list({id(p): (p, t) for t, leaves in enumerate(self.found.own) for p in leaves}.values())
        inputs = {k: layer.inputs for k, layer in self.weights.items()}  # the pass frees them
        key = frozenset(map(type, self.found.masks)), tuple(n // self.total for n in layers.values())
        kept = _KEPT.setdefault(shared[0], set())
        checked = len(losses) > 1 and (key not in kept or os.environ.get("DETENTE_DEBUG") == "1")
        ends = [*edges, *(shared[k] for k in self.alone), *(p for p, _ in own)]
        # tensors and edges together, as in source.take
        taken = torch.autograd.grad(losses, ends, retain_graph=checked, allow_unused=True)  # type: ignore[arg-type]
        outputs = dict(zip(layers, taken, strict=False))
        if checked and self._apart(losses, edges, taken[: len(edges)]):
            kept.add(key)
        for k, layer in self.weights.items():
            self._write(jacobian, k, outputs[layer.node], inputs[k])
        for k, layer in self.biases.items():
            self._write(jacobian, k, outputs[layer.node], None)
        rest = taken[len(edges) :]
        for k, gradient in zip(self.alone, rest, strict=False):
            jacobian.slices[k].zero_()
            if gradient is not None:
                jacobian.places[k][self.found.tasks[k][0]].copy_(gradient)
        rest = rest[len(self.alone) :]
        heads = [(p, t, gradient) for (p, t), gradient in zip(own, rest, strict=True) if gradient is not None]
        return heads, 1 + checked

    def _write(self, jacobian: Jacobian, k: int, output: Tensor | None, inputs: Tensor | None) -> None:
        """The rows of a weight, ``D_t' X_t``, or of a bias, the sums of ``D_t``; D ``[N, o]`` is ``output``."""
        rows = jacobian.slices[k]
        if output is None:
            rows.zero_()
            return
        if rows.dtype != output.dtype:
            rows.copy_(self._products(output, inputs, output.new_empty(rows.shape)))
        else:
            self._products(output, inputs, rows)

    def _products(self, output: Tensor, inputs: Tensor | None, rows: Tensor) -> Tensor:
        count = len(self.samples)
        if all(n == self.samples[0] for n in self.samples):
            chunks = output.reshape(count, len(output) // count, -1)
            if inputs is None:
                return torch.sum(chunks, 1, out=rows)
            return torch.bmm(chunks.transpose(1, 2), inputs.reshape(count, len(output) // count, -1), out=rows)
        sizes = self._sizes(len(output))
        outputs = torch.split(output, sizes)
        if inputs is None:
            for row, chunk in zip(rows.unbind(0), outputs, strict=True):
                torch.sum(chunk, 0, out=row)
        else:
            for row, chunk, x in zip(rows.unbind(0), outputs, torch.split(inputs, sizes), strict=True):
                torch.mm(chunk.T, x, out=row)
        return rows

    def _sizes(self, rows: int) -> list[int]:
        """Of the rows of a layer those of each task."""
        return [n * (rows // self.total) for n in self.samples]

    def _apart(self, losses: Sequence[Tensor], edges: Sequence[GradientEdge], taken: Sequence[Tensor | None]) -> bool:
        """Whether gradients that are finite were shown to belong to the tasks in whose rows they are.

        Losses with other factors must give the same gradients with the factors of the rows. Powers of two lose
        nothing above the smallest normal number, so that only a kernel that sums in another order leaves a difference.
        """
        factors = [2.0 ** -(t % 32) for t in range(len(losses))]
        starts = [torch.full_like(loss, factor) for loss, factor in zip(losses, factors, strict=True)]
        again = torch.autograd.grad(losses, edges, starts, allow_unused=True)
        for before, after in zip(taken, again, strict=True):
            if before is None or after is None:
                continue
            if not bool(before.isfinite().all()):
                return False
            sizes = self._sizes(len(before))
            for t, (one, other) in enumerate(zip(torch.split(before, sizes), torch.split(after, sizes), strict=True)):
                kind, scaled = torch.finfo(one.dtype), one * factors[t]
                if float((other - scaled).abs().max()) > 100 * kind.eps * float(scaled.abs().max()) + kind.tiny:
                    raise ValueError(
                        f"source=detente.Disjoint({list(self.samples)}): rows that belong to loss {t} have a part in "
                        "another loss. The samples of each loss must follow those of the loss before, in the order "
                        "of the losses and in dimension 0, and nothing may mix samples of different losses (as "
                        "BatchNorm does). Use source='parameters'."
                    )
        return True


# by the first shared parameter of a network, the kinds of graph that were checked
_KEPT: Any = WeakIdKeyDictionary()
