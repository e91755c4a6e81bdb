"""Which parameters the tasks share, read off the autograd graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import Module, Parameter

__all__ = ["Reach", "reach"]


@dataclass(frozen=True)
class Reach:
    """The leaves behind a step's losses.

    Attributes:
        shared: parameters that the method's update is for.
        tasks: for every shared parameter the positions of the losses that reach it.
        own: for every loss, the other leaves it reaches; the heads.
    """

    shared: list[Tensor]
    tasks: list[tuple[int, ...]]
    own: list[list[Tensor]]


def reach(losses: Sequence[Tensor], shared: Iterable[Tensor] | None = None) -> Reach:
    """Sort the leaves behind the losses into shared and task-specific.

    A parameter is shared when two or more losses reach it, or when it is listed in ``shared``. Leaves that are no
    ``torch.nn.Parameter``, such as inputs that require a gradient, count only where there are no parameters at all.
    One walk over the graph, whatever the number of tasks.

    Raises:
        ValueError: an entry of ``shared`` is not a leaf that requires a gradient.
    """
    leaves = _leaves(losses)
    if shared is None:
        any_leaf = not any(isinstance(p, Parameter) for p, _ in leaves)
        chosen = {id(p) for p, mask in leaves if mask & (mask - 1) and (any_leaf or isinstance(p, Parameter))}
    else:
        if isinstance(shared, Tensor | Module):
            raise TypeError(f"shared must be an iterable of parameters, such as {_example(shared)}.")
        chosen = set()
        for k, p in enumerate(shared):
            if not isinstance(p, Tensor) or not p.is_leaf or not p.requires_grad:
                raise ValueError(
                    f"shared[{k}] must be a parameter (a leaf tensor that requires a gradient); got "
                    f"{'a tensor that is not' if isinstance(p, Tensor) else type(p).__name__}. "
                    "Pass model.trunk.parameters(), without frozen ones."
                )
            chosen.add(id(p))
    result = Reach([], [], [[] for _ in losses])
    for p, mask in leaves:
        tasks = tuple(t for t in range(len(losses)) if mask >> t & 1)
        if id(p) in chosen:
            result.shared.append(p)
            result.tasks.append(tasks)
        else:
            for t in tasks:
                result.own[t].append(p)
    return result


def _example(given: Tensor | Module) -> str:
    return "[parameter]" if isinstance(given, Tensor) else "model.trunk.parameters(); got the module itself"


def _leaves(losses: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Leaves behind the losses with the set of losses that reach each (bit t for loss t), in a stable order."""
    roots: dict[Node, int] = {}
    for t, loss in enumerate(losses):
        node = get_gradient_edge(loss).node
        roots[node] = roots.get(node, 0) | 1 << t
    order: list[Node] = []  # every node after all that it feeds on
    seen: set[Node] = set()
    for root in roots:
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend((child, False) for child, _ in node.next_functions if child is not None)
    masks = dict.fromkeys(order, 0) | roots
    leaves = []
    for node in reversed(order):
        mask = masks[node]
        for child, _ in node.next_functions:
            if child is not None:
                masks[child] |= mask
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.append((node.variable, mask))  # type: ignore[attr-defined]
    return leaves
