"""All tasks at once down a trunk of linear layers and elementwise functions.

Autograd goes through the trunk once per task. Where every operation there is a linear layer or acts on single entries,
the gradients of all tasks can go down together, as one tensor ``[T, ...]``: the same operations in larger pieces, one
call where there were T, and a weight is read once. Autograd itself computes what lies above, for all tasks in one pass
where their own graphs begin with layers of their own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from detente.engine.graph import LEAF, Edges, Reach, root
from detente.engine.jacobian import Jacobian
from detente.engine.lean import Product, packed_input, saved_input

__all__ = ["MANY", "Trunk", "Unfit", "remember"]

MANY = 4
"""Tasks from which going down together is faster also for small weights."""

_CACHED = 1 << 17  # entries of the tasks' gradients of one value that stay in the cache


class Unfit(ValueError):
    """Why a graph is none that all tasks can go down together."""


class Layer(NamedTuple):
    """What a linear layer takes: a value, unless that needs no gradient, and its parameters, unless they are frozen."""

    value: Node | None
    weight: Tensor | None
    bias: Tensor | None


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
        self.layers: dict[Node, Layer] = {}  # what the linear ones among them take
        self.users: dict[int, Node] = {}  # of every leaf inside, by its id
        self.entries: dict[Node, int] = {}  # nodes that take gradients from above, with the set of losses
        self.above: dict[int, Tensor] = {}  # leaves that are used above
        self._sort()
        self._check(losses)
        self.outputs = self._outputs()
        self.watched = _registered(self.inside)

    def _sort(self) -> None:
        """Find what lies inside: from the leaves up, whatever has a rule and takes all from what has one."""
        found, inside, edges = self.found, self.inside, self.found.edges
        transposed: dict[Node, Any] = {}
        users: set[Node] = set()
        for node, mask in found.masks.items():
            sources = edges[node]
            if type(node) is LEAF:
                continue
            name = type(node).__name__
            if name == "TBackward0" and type(sources[0][0]) is LEAF:
                transposed[node] = sources[0][0]
                continue
            rule = _RULES.get(name)
            layer = self._linear(node, sources, transposed) if rule == "linear" else None
            if layer is not None:
                leaves: list[Tensor] | None = [p for p in (layer.weight, layer.bias) if p is not None]
            else:
                leaves = None if rule in (None, "linear") else self._other(node, rule, sources)
            if leaves is None or any(id(p) in self.users for p in leaves):
                if mask & (mask - 1):
                    raise Unfit(f"the trunk has an operation {name}")
                self._end_above(node, mask, sources, transposed)
                continue
            assert rule is not None
            inside[node] = rule
            if layer is not None:
                self.layers[node] = layer
            for p in leaves:
                self.users[id(p)] = node
            users.update(child for child, _ in sources if child is not None)
        for node in self.entries:
            if node in users:
                raise Unfit("a value inside the trunk is also used above it")

    def _linear(self, node: Any, sources: Edges, transposed: Mapping[Node, Any]) -> Layer | None:
        """The parts of a linear layer; None where it is another product."""
        *bias, (value, _), (matrix, _) = sources
        if value is not None and value not in self.inside:
            return None
        weight = None
        if matrix is not None:
            saved = packed_input(node)
            if not hasattr(saved, "unpack_hook"):
                raise Unfit("this version of PyTorch does not say whether the trunk's values were packed by hooks")
            # what is packed may be computed again whenever it is looked at
            if matrix not in transposed or saved.unpack_hook is not None:
                return None
            weight = transposed[matrix].variable
        if not bias:
            return Layer(value, weight, None)
        leaf: Any = bias[0][0]
        if node._saved_alpha != 1 or node._saved_beta != 1:
            return None
        if leaf is not None and (type(leaf) is not LEAF or list(leaf.variable.shape) != list(_shape(node)[1:])):
            return None
        return Layer(value, weight, None if leaf is None else leaf.variable)

    def _other(self, node: Node, rule: str | None, sources: Edges) -> list[Tensor] | None:
        """The leaves of another operation; None where it takes something from elsewhere."""
        leaves = []
        child: Any
        for child, _ in sources:
            if type(child) is LEAF and node.name() in _WITH_LEAVES:
                leaves.append(child.variable)
            elif child is not None and child not in self.inside:
                return None
        return None if rule == "elementwise" and not _same_shapes(node, sources) else leaves

    def _end_above(self, node: Node, mask: int, sources: Edges, transposed: Mapping[Node, Any]) -> None:
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
        for k, p in enumerate(found.shared):
            if id(p) not in self.users or id(p) in self.above:
                raise Unfit(f"shared parameter {k} of shape {tuple(p.shape)} is not that of one linear layer alone")
            if p._backward_hooks:
                raise Unfit(f"shared parameter {k} has a hook")
            if p.dtype not in (torch.float32, torch.float64) or type(p) not in (Parameter, Tensor):
                raise Unfit(f"shared parameter {k} has dtype {p.dtype}")
        for own in found.own:
            for p in own:
                if id(p) in self.users and (id(p) in self.above or p._backward_hooks):
                    raise Unfit("a task's own parameter is used in several places, or has a hook")
        if any(root(loss) in self.inside for loss in losses):
            raise Unfit("a loss is itself a part of the trunk")

    def _outputs(self) -> list[list[Node]]:
        """Layers of the tasks' own that take the same value and are alike, where their outputs leave the trunk."""
        alike: dict[Any, list[Node]] = {}
        for node, mask in self.entries.items():
            layer = self.layers.get(node)
            if layer is None or mask & (mask - 1) or layer.value is None or layer.weight is None:
                continue
            if id(layer.weight) not in self.places and id(layer.bias) not in self.places:
                key = layer.value, tuple(_shape(node)), layer.bias is None
                alike.setdefault(key, []).append(node)
        return list(alike.values())

    def product(self, k: int) -> Product | None:
        """The layer of which shared parameter k is the weight."""
        p = self.found.shared[k]
        node = self.users[id(p)]
        layer = self.layers.get(node)
        return Product(node, _shape(node)[0]) if layer is not None and layer.weight is p else None

    @property
    def at_once(self) -> int:
        """How many tasks may go down together, so that their gradients stay in the cache, or small beside a weight."""
        widest = max(math.prod(_shape(node)) for node in self.inside)
        largest = max((p.numel() for p in self.found.shared), default=0)
        return max(_CACHED, largest // 4) // max(widest, 1)

    @torch.no_grad()
    def pull(self, losses: list[Tensor], jacobian: Jacobian) -> list[tuple[Tensor, int, Tensor]]:
        """Write the rows of all tasks; the gradients of the tasks' own parameters are returned."""
        first: Any = next(iter(self.inside))
        if _USED in first.metadata:
            raise RuntimeError(
                "Trying to backward through the graph a second time. Compute the losses again, or detach what is kept "
                "from one step for the next."
            )
        first.metadata[_USED] = True  # autograd's own passes free the graph
        heads, tasks, size = [], range(len(losses)), max(self.at_once, 2)
        for start in tasks[::size]:
            heads += _Descent(self, losses, tasks[start : start + size], jacobian).heads
        return heads


class _Descent:
    """One walk down a trunk."""

    def __init__(self, trunk: Trunk, losses: list[Tensor], tasks: range, jacobian: Jacobian) -> None:
        self.trunk = trunk
        self.jacobian = jacobian
        self.tasks = tasks
        self.every = sum(1 << t for t in tasks)
        self.heads: list[tuple[Tensor, int, Tensor]] = []
        # of every node the gradients that have arrived: [N, ...] of one task, [k, N, ...] of a set of k
        self.arrived: dict[Node, list[tuple[int, Tensor]]] = {}
        self.unwatched = set(trunk.entries)  # autograd has told whoever watches these
        self.written: set[int] = set()
        self._above(losses)
        for layers in trunk.outputs:
            self._side_by_side([node for node in layers if node in self.arrived])
        for node in reversed(trunk.inside):
            parts = self.arrived.pop(node, None)
            if parts is not None:
                mask, gradient = _together(parts)
                if node not in self.unwatched:
                    gradient = self._shown(node, mask, gradient)
                getattr(self, trunk.inside[node])(node, mask, gradient)
        for k in range(len(jacobian.parameters)):
            if k not in self.written:
                jacobian.clear(k, tasks.start, tasks.stop)

    def _above(self, losses: list[Tensor]) -> None:
        """Autograd's part: from the losses to where the trunk begins."""
        trunk = self.trunk
        alone = not any(mask & (mask - 1) for mask in trunk.entries.values())
        for batch in [list(self.tasks)] if alone and trunk.found.apart else [[t] for t in self.tasks]:
            here = sum(1 << t for t in batch)
            nodes = [node for node, mask in trunk.entries.items() if mask & here]
            own = [(p, t) for t in batch for p in trunk.found.own[t] if id(p) in trunk.above]
            ends = [*(GradientEdge(node, 0) for node in nodes), *(p for p, _ in own)]
            # tensors and edges together, as in source.take
            taken = torch.autograd.grad([losses[t] for t in batch], ends, allow_unused=True)  # type: ignore[arg-type]
            for node, gradient in zip(nodes, taken, strict=False):
                if gradient is not None:
                    self.arrived.setdefault(node, []).append((trunk.entries[node] & here, gradient))
            for (p, t), gradient in zip(own, taken[len(nodes) :], strict=True):
                if gradient is not None:
                    self.heads.append((p, t, gradient))

    def _side_by_side(self, nodes: list[Any]) -> None:
        """Layers of one task each that take the same value, all with one call."""
        if len(nodes) < 2:
            return
        layers: list[Any] = [self.trunk.layers[node] for node in nodes]
        parts = [self.arrived.pop(node)[0] for node in nodes]
        gradient = torch.stack([one for _, one in parts])
        tasks = [mask.bit_length() - 1 for mask, _ in parts]
        value, x = layers[0].value, saved_input(nodes[0])
        written = torch.bmm(gradient.transpose(1, 2), x.expand(len(nodes), *x.shape))
        self.heads += zip([layer.weight for layer in layers], tasks, written.unbind(0), strict=True)
        if layers[0].bias is not None:
            self.heads += zip([layer.bias for layer in layers], tasks, gradient.sum(1).unbind(0), strict=True)
        self._look(value, x)
        passed = torch.bmm(gradient, torch.stack([node._saved_mat2.T for node in nodes]))
        self._pass(value, sum(mask for mask, _ in parts), passed)

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
        value, weight, bias = self.trunk.layers[node]
        if weight is not None:
            x = saved_input(node)
            self._write(weight, mask, gradient, x)
            if value is not None:
                self._look(value, x)
        if bias is not None:
            self._write(bias, mask, gradient, None)
        if value is not None:
            several = mask & (mask - 1)
            passed = (gradient.flatten(0, 1) if several else gradient) @ node._saved_mat2.T
            self._pass(value, mask, passed.view(*gradient.shape[:-1], -1) if several else passed)

    def elementwise(self, node: Any, mask: int, gradient: Tensor) -> None:
        """Operations whose formula for the gradient is one for tensors of any shape that broadcast."""
        for (child, _), one in zip(self.trunk.found.edges[node], _as_tuple(node(gradient)), strict=True):
            if child is not None and one is not None:
                self._pass(child, mask, one)

    def each(self, node: Any, mask: int, gradient: Tensor) -> None:
        """Operations that go from one shape to another, or whose kernels do: one task after the other."""
        several = mask & (mask - 1)
        parts = [_as_tuple(node(one)) for one in (gradient if several else [gradient])]
        child: Any
        for (child, _), ones in zip(self.trunk.found.edges[node], zip(*parts, strict=True), strict=True):
            if child is not None and ones[0] is not None:
                whole = torch.stack(ones)
                if type(child) is LEAF:
                    self._keep(child.variable, mask, whole)
                else:
                    self._pass(child, mask, whole if several else ones[0])

    def view(self, node: Node, mask: int, gradient: Tensor) -> None:
        """The same entries in another shape."""
        child: Any = self.trunk.found.edges[node][0][0]
        front = gradient.shape[:1] if mask & (mask - 1) else ()
        self._pass(child, mask, gradient.reshape(*front, *_shape(child)))

    def _look(self, node: Node, value: Tensor) -> None:
        """Take note of it where nobody watches the value that a node computed."""
        if not (self.trunk.watched or value.retains_grad):
            self.unwatched.add(node)

    def _pass(self, child: Node, mask: int, gradient: Tensor) -> None:
        self.arrived.setdefault(child, []).append((mask, gradient))

    def _write(self, p: Tensor, mask: int, gradient: Tensor, x: Tensor | None) -> None:
        """The gradients of a weight, ``D_t' X``, or without X of a bias, the sums of ``D_t``."""
        rows = gradient if mask & (mask - 1) else gradient.unsqueeze(0)
        k = self.trunk.places.get(id(p))
        if k in self.jacobian.outputs:
            self._fill(self.jacobian.outputs[k], mask, rows)
            self.written.add(k)
        elif k is None or mask != self.every or self.jacobian.slices[k].dtype != rows.dtype:
            self._keep(p, mask, rows.sum(1) if x is None else rows.transpose(1, 2) @ x)
        else:
            place = self.jacobian.slices[k][self.tasks.start : self.tasks.stop]
            if x is None:
                torch.sum(rows, 1, out=place)
            else:
                torch.bmm(rows.transpose(1, 2), x.expand(len(rows), *x.shape), out=place)
            self.written.add(k)

    def _keep(self, p: Tensor, mask: int, gradients: Tensor) -> None:
        """The gradients of a leaf of a set of tasks."""
        k = self.trunk.places.get(id(p))
        if k is None:
            self.heads += [(p, t, one) for t, one in zip(_tasks(mask), gradients, strict=True)]
        else:
            self._fill(self.jacobian.slices[k], mask, gradients)
            self.written.add(k)

    def _fill(self, place: Tensor, mask: int, rows: Tensor) -> None:
        """Write the rows of a set of tasks, and zeros for the others. (A list of positions would go to the device.)"""
        if mask == self.every:
            place[self.tasks.start : self.tasks.stop].copy_(rows)
            return
        given = iter(rows)
        for t in self.tasks:
            if mask >> t & 1:
                place[t].copy_(next(given))
            else:
                place[t].zero_()


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
        for task, row in zip(_tasks(other), rows, strict=True):
            whole[places[task]] += row
    assert whole is not None
    return mask, whole


_first = itemgetter(0)


def _as_tuple(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


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
    engine: Any = Variable._execution_engine
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


_USED = "detente"
_WITH_LEAVES = ("NativeLayerNormBackward0",)


def _all(rule: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), rule)


_RULES = {
    **_all("linear", "AddmmBackward0 MmBackward0"),
    **_all("view", "UnsafeViewBackward0 ViewBackward0"),
    **_all(
        "elementwise",
        """AddBackward0 AliasBackward0 CeluBackward0 ClampBackward1 ClampMaxBackward0 ClampMinBackward0 CloneBackward0
        CosBackward0 DivBackward0 EluBackward0 ExpBackward0 HardtanhBackward0 LeakyReluBackward0 MishBackward0
        MulBackward0 NegBackward0 PowBackward0 ReluBackward0 SigmoidBackward0 SiluBackward0 SinBackward0
        SoftplusBackward0 SubBackward0 TanhBackward0""",
    ),
    **_all(
        "each",
        """GeluBackward0 MeanBackward1 NativeDropoutBackward0 NativeLayerNormBackward0 PermuteBackward0 SliceBackward0
        SqueezeBackward1 SumBackward1 TransposeBackward0 UnsqueezeBackward0""",
    ),
}
