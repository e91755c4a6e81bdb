"""All tasks at once down a trunk of linear layers and elementwise functions.

Autograd goes through the trunk once per task. Where every operation there is a linear layer or acts on single entries, the
gradients of all tasks can go down together, as one tensor ``[T, ...]``: the same operations in larger pieces, with one
call where there were T, and a weight is read once. Autograd itself computes what lies above, for all tasks in one pass
where their own graphs begin with layers of their own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from detente.engine.graph import LEAF, Edges, Reach, root
from detente.engine.jacobian import Jacobian

__all__ = ["ENTRIES", "Trunk", "Unfit", "remember"]

ENTRIES = 1 << 20
"""Of a value inside a trunk, for all tasks: with more of them a pass for each task, whose memory is used again, is as fast."""


class Unfit(ValueError):
    """Why a graph is none that all tasks can go down together."""


class Trunk:
    """The part of a step's graph that all tasks go down together.

    Args:
        losses: of the step.
        found: the leaves behind them.

    Raises:
        Unfit: something in it is no linear layer and not elementwise, or watched in a way that needs autograd's own
            passes.
    """

    def __init__(self, losses: Sequence[Tensor], found: Reach) -> None:
        self.found = found
        self.places = {id(p): k for k, p in enumerate(found.shared)}
        self.inside: dict[Node, str] = {}  # from the leaves up
        self.layers: dict[int, Node] = {}  # of every leaf inside, by its id
        self.entries: dict[Node, int] = {}  # nodes that take gradients from above, with the set of losses
        self.above: dict[int, Tensor] = {}  # leaves that are used above
        self._sort()
        self._check(losses)
        self.watched = _registered(self.inside)

    def _sort(self) -> None:
        """Find what lies inside: from the leaves up, whatever has a rule and takes all from what has one."""
        found, inside, edges = self.found, self.inside, self.found.edges
        transposed: dict[Node, Node] = {}
        users: set[Node] = set()
        for node, mask in found.masks.items():
            sources = edges[node]
            if type(node) is LEAF:
                continue
            name = type(node).__name__
            if name == "TBackward0" and type(sources[0][0]) is LEAF:
                transposed[node] = sources[0][0]  # type: ignore[assignment]
                continue
            rule = _RULES.get(name)
            if rule == "linear":
                leaves = self._linear(node, sources, transposed, len(sources) - 1)
            elif rule is not None and all(child is None or child in inside for child, _ in sources):
                leaves = [] if rule == "view" or _same_shapes(node, sources) else None
            else:
                leaves = None
            if leaves is None:
                if mask & (mask - 1):
                    raise Unfit(f"the trunk has an operation {name}")
                self._end_above(node, mask, sources, transposed)
                continue
            inside[node] = rule  # type: ignore[assignment]
            for leaf in leaves:
                self.layers[id(leaf.variable)] = node  # type: ignore[attr-defined]
            users.update(child for child, _ in sources if child is not None)
        for node in self.entries:
            if node in users:
                raise Unfit("a value inside the trunk is also used above it")

    def _linear(self, node: Any, sources: Edges, transposed: Mapping[Node, Node], weight: int) -> list[Node] | None:
        """The leaves of a linear layer; None where it is another product."""
        leaves = []
        value, matrix = sources[weight - 1][0], sources[weight][0]
        if value is not None and value not in self.inside:
            return None
        if matrix is not None:
            # what is packed may be computed again whenever it is looked at
            if matrix not in transposed or getattr(node._raw_saved_mat1, "unpack_hook", _UNKNOWN) is not None:
                return None
            leaves.append(transposed[matrix])
        if weight == 2:
            if node._saved_alpha != 1 or node._saved_beta != 1:
                return None
            bias: Any = sources[0][0]
            if bias is not None:
                if type(bias) is not LEAF or bias.variable.dim() != 1:
                    return None
                leaves.append(bias)
        if any(id(leaf.variable) in self.layers for leaf in leaves):  # type: ignore[attr-defined]
            return None
        return leaves

    def _end_above(self, node: Node, mask: int, sources: Edges, transposed: Mapping[Node, Node]) -> None:
        """Note what an operation above the trunk takes from it."""
        for child, _ in sources:
            if child is None:
                continue
            leaf: Any = transposed.get(child, child)
            if type(leaf) is LEAF:
                self.above[id(leaf.variable)] = leaf.variable
            elif child in self.inside:
                self.entries[child] = self.entries.get(child, 0) | mask

    def _check(self, losses: Sequence[Tensor]) -> None:
        found = self.found
        if torch.is_anomaly_enabled():
            raise Unfit("anomaly detection wants autograd's own passes")
        if not found.apart:
            raise Unfit("a parameter that is not listed in `shared`, or an input, is reached by several losses")
        for k, p in enumerate(found.shared):
            if id(p) not in self.layers or id(p) in self.above:
                raise Unfit(f"shared parameter {k} of shape {tuple(p.shape)} is not that of one linear layer alone")
            if p._backward_hooks:
                raise Unfit(f"shared parameter {k} has a hook")
            if p.dtype not in (torch.float32, torch.float64) or type(p) not in (Parameter, Tensor):
                raise Unfit(f"shared parameter {k} has dtype {p.dtype}")
        for own in found.own:
            for p in own:
                if id(p) in self.layers and (id(p) in self.above or p._backward_hooks):
                    raise Unfit("a task's own parameter is used in several places, or has a hook")
        if any(root(loss) in self.inside for loss in losses):
            raise Unfit("a loss is itself a part of the trunk")

    @property
    def widest(self) -> int:
        """The most entries that a value inside has."""
        return max(math.prod(_shape(node)) for node in self.inside)

    @torch.no_grad()
    def pull(self, losses: list[Tensor], jacobian: Jacobian) -> list[tuple[Tensor, int, Tensor]]:
        """Write the rows of all tasks; the gradients of the tasks' own parameters are returned."""
        return _Descent(self, losses, jacobian).heads


class _Descent:
    """One walk down a trunk."""

    def __init__(self, trunk: Trunk, losses: list[Tensor], jacobian: Jacobian) -> None:
        self.trunk = trunk
        self.jacobian = jacobian
        self.every = (1 << len(losses)) - 1
        self.heads: list[tuple[Tensor, int, Tensor]] = []
        # of every node the gradients that have arrived: [N, ...] of one task, [k, N, ...] of a set of k
        self.arrived: dict[Node, list[tuple[int, Tensor]]] = {}
        self.unwatched = set(trunk.entries)  # autograd has told whoever watches these
        self.written: set[int] = set()
        self._above(losses)
        for node in reversed(trunk.inside):
            parts = self.arrived.pop(node, None)
            if parts is not None:
                mask, gradient = _together(parts)
                if node not in self.unwatched:
                    gradient = self._shown(node, mask, gradient)
                getattr(self, trunk.inside[node])(node, mask, gradient)
        for k in range(len(jacobian.parameters)):
            if k not in self.written:
                jacobian.clear(k)

    def _above(self, losses: list[Tensor]) -> None:
        """Autograd's part: from the losses to where the trunk begins."""
        trunk = self.trunk
        alone = all(not mask & (mask - 1) for mask in trunk.entries.values())
        tasks = range(len(losses))
        for batch in [list(tasks)] if alone else [[t] for t in tasks]:
            here = sum(1 << t for t in batch)
            nodes = [node for node, mask in trunk.entries.items() if mask & here]
            own = [(p, t) for t in batch for p in trunk.found.own[t] if id(p) in trunk.above]
            ends = [*(GradientEdge(node, 0) for node in nodes), *(p for p, _ in own)]
            # tensors and edges together, as in Features
            taken = torch.autograd.grad([losses[t] for t in batch], ends, allow_unused=True)  # type: ignore[arg-type]
            for node, gradient in zip(nodes, taken, strict=False):
                if gradient is not None:
                    self.arrived.setdefault(node, []).append((trunk.entries[node] & here, gradient))
            for (p, t), gradient in zip(own, taken[len(nodes) :], strict=True):
                if gradient is not None:
                    self.heads.append((p, t, gradient))

    def _shown(self, node: Node, mask: int, gradient: Tensor) -> Tensor:
        """The gradient of a value inside, once the hooks on it have seen it."""
        if not self.trunk.watched:  # retain_grad remains
            _tell(node, gradient.sum(0) if mask & (mask - 1) else gradient)
            return gradient
        if not mask & (mask - 1):
            return _tell(node, gradient)
        rows = gradient.unbind(0)
        told = [_tell(node, row) for row in rows]
        return gradient if all(a is b for a, b in zip(rows, told, strict=True)) else torch.stack(told)

    def linear(self, node: Any, mask: int, gradient: Tensor) -> None:
        """``Y = X W' + b``."""
        edges = self.trunk.found.edges
        *bias, (value, _), (matrix, _) = edges[node]
        if matrix is not None:
            x = node._saved_mat1
            self._write(edges[matrix][0][0], mask, gradient, x)
            if value is not None and not (self.trunk.watched or x.retains_grad):
                self.unwatched.add(value)
        if bias and bias[0][0] is not None:
            self._write(bias[0][0], mask, gradient, None)
        if value is not None:
            several = mask & (mask - 1)
            passed = (gradient.flatten(0, 1) if several else gradient) @ node._saved_mat2.T
            self._pass(value, mask, passed.view(*gradient.shape[:-1], -1) if several else passed)

    def elementwise(self, node: Any, mask: int, gradient: Tensor) -> None:
        """Operations whose formula for the gradient is one for tensors of any shape that broadcast."""
        passed = node(gradient)
        for (child, _), one in zip(self.trunk.found.edges[node], passed if isinstance(passed, tuple) else [passed], strict=True):
            if child is not None and one is not None:
                self._pass(child, mask, one)

    def view(self, node: Node, mask: int, gradient: Tensor) -> None:
        """The same entries in another shape."""
        child: Any = self.trunk.found.edges[node][0][0]
        front = gradient.shape[:1] if mask & (mask - 1) else ()
        self._pass(child, mask, gradient.reshape(*front, *_shape(child)))

    def _pass(self, child: Node, mask: int, gradient: Tensor) -> None:
        self.arrived.setdefault(child, []).append((mask, gradient))

    def _write(self, leaf: Any, mask: int, gradient: Tensor, x: Tensor | None) -> None:
        """The gradients of a weight, ``D_t' X``, or without X of a bias, the sums of ``D_t``."""
        p, several = leaf.variable, mask & (mask - 1)
        k = self.trunk.places.get(id(p))
        if k is None:
            self.heads.append((p, mask.bit_length() - 1, gradient.sum(0) if x is None else gradient.T @ x))
            return
        self.written.add(k)
        rows = gradient if several else gradient.unsqueeze(0)
        if k in self.jacobian.outputs:
            self.jacobian.outputs[k] = self._of_all(mask, rows)
            return
        place = self.jacobian.slices[k]
        if mask != self.every or place.dtype != rows.dtype:
            place.copy_(self._of_all(mask, rows.sum(1) if x is None else rows.transpose(1, 2) @ x))
        elif x is None:
            torch.sum(rows, 1, out=place)
        else:
            torch.bmm(rows.transpose(1, 2), x.expand(len(rows), *x.shape), out=place)

    def _of_all(self, mask: int, rows: Tensor) -> Tensor:
        """Rows of some tasks with zeros for the others."""
        if mask == self.every:
            return rows
        whole = rows.new_zeros(self.jacobian.count, *rows.shape[1:])
        whole[_tasks(mask)] = rows
        return whole


def _together(parts: Sequence[tuple[int, Tensor]]) -> tuple[int, Tensor]:
    """The sum of what has arrived, with the set of tasks that it is of."""
    if len(parts) == 1:
        return parts[0]
    masks = [mask for mask, _ in parts]
    mask = masks[0]
    for other in masks[1:]:
        mask |= other
    if all(other == mask for other in masks):
        total = parts[0][1] + parts[1][1]
        for _, gradient in parts[2:]:
            total = total + gradient
        return mask, total
    if sum(masks) == mask and not any(other & (other - 1) for other in masks):
        return mask, torch.stack([gradient for _, gradient in sorted(parts, key=_first)])
    places = {task: place for place, task in enumerate(_tasks(mask))}
    whole: Tensor | None = None
    for other, gradient in parts:
        rows = gradient if other & (other - 1) else gradient.unsqueeze(0)
        if whole is None:
            whole = rows.new_zeros(len(places), *rows.shape[1:])
        whole[[places[task] for task in _tasks(other)]] += rows
    assert whole is not None
    return mask, whole


_first = itemgetter(0)


def _tasks(mask: int) -> list[int]:
    return [t for t in range(mask.bit_length()) if mask >> t & 1]


def _shape(node: Any) -> Sequence[int]:
    """Of the value that a node computed."""
    shape: Sequence[int] = node._input_metadata[0].shape
    return shape


def _same_shapes(node: Any, sources: Edges) -> bool:
    """Whether no argument was broadcast, whose gradient would be a sum."""
    shape = _shape(node)
    return all(child is None or _shape(child) == shape for child, _ in sources)


def _tell(node: Node, gradient: Tensor) -> Tensor:
    """Show a gradient to the hooks on the value that a node computed; the gradient that they leave is returned."""
    edge = GradientEdge(node, 0)
    # as torch.autograd.grad, which takes twice as long
    engine: Any = Variable._execution_engine  # type: ignore[attr-defined]
    found: Tensor = engine.run_backward((edge,), (gradient,), True, False, (edge,), True, accumulate_grad=False)[0]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Hooks on values inside: autograd does not say whether there are any


class _Last(threading.local):
    """When this thread took its last step: the number of handles of hooks, and of nodes, that there had been."""

    handles = -1
    nodes = -1


_LAST = _Last()
_ONE = torch.zeros((), requires_grad=True)


def remember() -> None:
    """Take note of the hooks there are, so that the next step knows that its graph has none."""
    _LAST.handles = RemovableHandle.next_id
    with torch.enable_grad():
        _LAST.nodes = _ONE.view_as(_ONE).grad_fn._sequence_nr()  # type: ignore[union-attr]


def _registered(nodes: Iterable[Node]) -> bool:
    """Whether there may be hooks on values of a graph: any was registered since it was begun, or it was long ago.

    Raises:
        Unfit: there are hooks on the operations themselves.
    """
    if RemovableHandle.next_id == _LAST.handles and all(node._sequence_nr() > _LAST.nodes for node in nodes):
        return False
    for node in nodes:
        for register in (node.register_hook, node.register_prehook):
            handle: Any = register(_nothing)
            count = len(handle.hooks_dict_ref())
            handle.remove()
            if count > 1:
                raise Unfit(f"an operation of the trunk ({node.name()}) has a hook")
    return True


def _nothing(*_: object) -> None:
    """A hook that leaves everything as it is."""


_UNKNOWN = object()
_RULES = {
    "AddmmBackward0": "linear",
    "MmBackward0": "linear",
    "ViewBackward0": "view",
    "UnsafeViewBackward0": "view",
    "ReshapeAliasBackward0": "view",
    **{
        f"{name}Backward0": "elementwise"
        for name in ("Add", "Div", "Elu", "Gelu", "LeakyRelu", "Mul", "Neg", "Relu", "Sigmoid", "Silu", "Softplus", "Sub", "Tanh")
    },
}  # fmt: skip
