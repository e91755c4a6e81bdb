"""Which parameters the tasks share, read off the autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module, Parameter

__all__ = [
    "LEAF",
    "SINK",
    "Boundary",
    "Edges",
    "Reach",
    "boundary",
    "feeds",
    "leaves_of",
    "listed",
    "reach",
    "root",
    "users",
]


@dataclass(frozen=True)
class Reach:
    """The leaves behind a step's losses.

    Attributes:
        shared: parameters that the method's update is for.
        tasks: for every shared parameter the positions of the losses that reach it.
        own: for every loss, the other leaves it reaches; the heads.
        masks: the nodes of the graph, each after what it feeds on, with the set of losses that reach each: bit t for
            loss t.
        edges: what each node takes its values from, each with the number of the output.
    """

    shared: list[Tensor]
    tasks: list[tuple[int, ...]]
    own: list[list[Tensor]]
    masks: dict[Node, int]
    edges: dict[Node, Edges]

    @classmethod
    def of(
        cls,
        leaves: Iterable[tuple[Tensor, tuple[int, ...]]],
        shared: Container[int],
        count: int,
        masks: dict[Node, int],
        edges: dict[Node, Edges],
    ) -> Reach:
        """Sort leaves, each with the positions of the losses that reach it, by the ids of those that are shared."""
        result = cls([], [], [[] for _ in range(count)], masks, edges)
        for p, tasks in leaves:
            if id(p) in shared:
                result.shared.append(p)
                result.tasks.append(tasks)
            else:
                for t in tasks:
                    result.own[t].append(p)
        return result

    @property
    def leaves(self) -> list[Tensor]:
        """All of them, once each: the shared ones first."""
        return [*self.shared, *{id(p): p for own in self.own for p in own}.values()]

    @cached_property
    def everywhere(self) -> bool:
        """Whether every loss reaches every shared parameter."""
        return all(len(tasks) == len(self.own) for tasks in self.tasks)

    @property
    def apart(self) -> bool:
        """Whether no leaf that is not shared is reached by two losses."""
        return len(self.leaves) == len(self.shared) + sum(map(len, self.own))


def feeds(node: Node) -> Edges:
    """What a node takes its values from, each with the number of the output.

    Seen through the node that DistributedDataParallel puts behind all outputs of a model, which would make every loss
    depend on everything.
    """
    edges: Edges = node.next_functions
    for child, _ in edges:
        if type(child).__name__ == SINK:
            return tuple(_behind(child, number) for child, number in edges)
    return edges


Edges = tuple[tuple[Node | None, int], ...]
SINK = "_DDPSinkBackward"
_COMPILED = "CompiledFunctionBackward"


def _behind(child: Node | None, number: int) -> tuple[Node | None, int]:
    while type(child).__name__ == SINK:
        assert child is not None
        child, number = child.next_functions[number]
    return child, number


def _start(loss: Tensor) -> tuple[Node, int]:
    # a leaf has no node of its own until it is asked for
    node, number = _behind(loss.grad_fn or get_gradient_edge(loss).node, loss.output_nr)
    assert node is not None
    return node, number


def root(loss: Tensor) -> Node:
    """The node that computed a loss."""
    return _start(loss)[0]


def users(edges: Mapping[Node, Edges]) -> dict[Node, list[Node]]:
    """What each node of a graph feeds, as often as it does."""
    found: dict[Node, list[Node]] = {}
    for node, sources in edges.items():
        for child, _ in sources:
            if child is not None:
                found.setdefault(child, []).append(node)
    return found


def reach(losses: Sequence[Tensor], shared: Iterable[Tensor] | None = None) -> Reach:
    """Sort the leaves behind the losses into shared and task-specific.

    A parameter is shared when two or more losses reach it, or when it is listed in ``shared``. Leaves that are no
    ``torch.nn.Parameter``, such as inputs that require a gradient, count only where there are no parameters at all.
    One walk over the graph, whatever the number of tasks.

    Raises:
        ValueError: an entry of ``shared`` is not a leaf that requires a gradient.
    """
    masks, edges, fused = _walk(losses)
    if fused and shared is None:
        raise ValueError(
            "the model was compiled as a whole, the tasks' own layers included, so that every loss seems to depend on "
            "all of it. Pass shared=model.trunk.parameters(), or compile the shared part alone."
        )
    leaves = leaves_of(masks)
    positions = {mask: tuple(t for t in range(len(losses)) if mask >> t & 1) for mask in {mask for _, mask in leaves}}
    if shared is None:
        any_leaf = not any(isinstance(p, Parameter) for p, _ in leaves)
        chosen = {id(p) for p, mask in leaves if mask & (mask - 1) and (any_leaf or isinstance(p, Parameter))}
    else:
        shared = listed(shared)
        chosen = set()
        for k, p in enumerate(shared):
            if not isinstance(p, Tensor) or not p.is_leaf or not p.requires_grad:
                raise ValueError(
                    f"shared[{k}] must be a parameter (a leaf tensor that requires a gradient); got "
                    f"{'a tensor that is not' if isinstance(p, Tensor) else type(p).__name__}. "
                    "Pass model.trunk.parameters(), without frozen ones."
                )
            chosen.add(id(p))
    return Reach.of(((p, positions[mask]) for p, mask in leaves), chosen, len(losses), masks, edges)


def listed(shared: Iterable[Tensor]) -> list[Tensor]:
    """What was passed as ``shared``, as a list."""
    if isinstance(shared, Tensor | Module):
        raise TypeError(f"shared must be an iterable of parameters, such as {_example(shared)}.")
    return list(shared)


def leaves_of(masks: dict[Node, int]) -> list[tuple[Tensor, int]]:
    """The leaves of a graph, in the order in which it uses them, and the set of losses that reach each."""
    return [(node.variable, mask) for node, mask in reversed(masks.items()) if type(node) is LEAF]  # type: ignore[attr-defined]


def _example(given: Tensor | Module) -> str:
    return "[parameter]" if isinstance(given, Tensor) else "model.trunk.parameters(); got the module itself"


@dataclass(frozen=True)
class Boundary:
    """Where the tasks' own graphs end and the shared one begins.

    Attributes:
        edges: the features: every place where a task's own graph takes a value from the shared one.
        entries: the operations of a task that take such a value, each with the task and, for every such argument,
            its position and that of the edge.
        nested: whether some features are computed from others, as with skip connections.
    """

    edges: list[GradientEdge]
    entries: list[tuple[Node, int, list[tuple[int, int]]]]
    nested: bool


def boundary(losses: Sequence[Tensor], found: Reach) -> Boundary:
    """The features of a step, found from the graph.

    Args:
        losses: of the step.
        found: the leaves behind them.

    Raises:
        ValueError: a task uses a shared parameter above the features (tied weights), so that no gradient of the
            features can stand for the gradient of the shared parameters; or a loss is computed from another.
    """
    masks = found.masks
    edges: dict[GradientEdge, int] = {}
    entries: list[tuple[Node, int, list[tuple[int, int]]]] = []
    for t, loss in enumerate(losses):
        mask = masks[root(loss)]
        if mask & (mask - 1):
            raise ValueError(
                f"loss {t} is itself part of what other losses are computed from, so there are no features between "
                "them. Use source='parameters'."
            )
    for node, mask in masks.items():
        if mask & (mask - 1):
            continue
        taken = []
        for place, (child, number) in enumerate(found.edges[node]):
            if child is None or not masks[child] & (masks[child] - 1):
                continue
            if type(child) is LEAF:
                shape = tuple(child.variable.shape)  # type: ignore[attr-defined]
                raise ValueError(
                    f"a shared leaf of shape {shape} is used by a task's own layers directly (tied weights, or an "
                    "input that requires a gradient), so the features do not carry all of its gradient. Use "
                    "source='parameters'."
                )
            taken.append((place, edges.setdefault(GradientEdge(child, number), len(edges))))
        if taken:
            entries.append((node, mask.bit_length() - 1, taken))
    ends = {edge.node for edge in edges}
    below: set[Node] = set()
    stack = [child for node in ends for child, _ in found.edges[node] if child is not None]
    while stack:
        node = stack.pop()
        if node not in below:
            below.add(node)
            stack.extend(child for child, _ in found.edges[node] if child is not None)
    return Boundary(list(edges), entries, bool(ends & below))


LEAF: Any = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)
"""The kind of node at which a leaf's gradient arrives."""


def _walk(losses: Sequence[Tensor]) -> tuple[dict[Node, int], dict[Node, Edges], bool]:
    """All nodes behind the losses, each after what it feeds on, with the losses that reach it and what it feeds on.

    And whether a compiled node has outputs that different losses reach: it hides which of them needs what.
    """
    starts = [_start(loss) for loss in losses]
    masks, edges = _ordered(starts, attrgetter("next_functions"))
    kinds = {kind.__name__ for kind in set(map(type, masks))}
    if SINK in kinds:
        masks, edges = _ordered(starts, feeds)
    for t, (node, _) in enumerate(starts):
        masks[node] |= 1 << t
    for node in reversed(masks):
        mask = masks[node]
        for child, _ in edges[node]:
            if child is not None:
                masks[child] |= mask
    return masks, edges, _COMPILED in kinds and _hides(masks, edges, starts)


def _ordered(
    starts: Sequence[tuple[Node, int]], sources: Callable[[Node], Edges]
) -> tuple[dict[Node, int], dict[Node, Edges]]:
    """The nodes behind some, each after what it feeds on, with 0; and what each feeds on."""
    done: dict[Node, int] = {}
    edges: dict[Node, Edges] = {}
    stack = [node for node, _ in reversed(starts)]
    while stack:
        node = stack[-1]
        if node in edges:
            stack.pop()
            done.setdefault(node, 0)
            continue
        edges[node] = found = sources(node)
        for child, _ in found:
            if child is not None and child not in edges:
                stack.append(child)
    return done, edges


def _hides(masks: Mapping[Node, int], edges: Mapping[Node, Edges], starts: Sequence[tuple[Node, int]]) -> bool:
    """Whether different losses reach different outputs of one compiled node."""
    reached: dict[tuple[Node, int], int] = {}
    uses = [(edge, 1 << t) for t, edge in enumerate(starts)]
    uses += [((child, number), mask) for node, mask in masks.items() for child, number in edges[node] if child]
    for (node, number), mask in uses:
        if type(node).__name__ == _COMPILED:
            reached[node, number] = reached.get((node, number), 0) | mask
    return any(mask != masks[node] for (node, _), mask in reached.items())
