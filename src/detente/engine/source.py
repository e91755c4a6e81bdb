"""Which gradients a step takes: of the parameters or of the features, of every task or of sampled ones, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from detente.engine.distributed import Processes
from detente.engine.grad import pull, zero_missing
from detente.engine.graph import Reach, boundary, root
from detente.engine.jacobian import Jacobian
from detente.engine.lean import Product
from detente.engine.rows import Scattered

__all__ = [
    "Disjoint",
    "Every",
    "Features",
    "Head",
    "Row",
    "Sampled",
    "done_with",
    "every_task",
    "mixed",
    "spread",
    "take",
    "task_rows",
]


Head = tuple[Tensor, int, Tensor]
"""A parameter that is not shared, the row in which its gradient was taken, and the gradient."""


@dataclass(frozen=True)
class Row:
    """One row of J: a weighted sum of losses, backpropagated at once.

    Attributes:
        tasks: positions of its losses.
        factors: their factors in the sum.
        add: whether it is added to what an earlier micro-batch gave.
        more: whether a later one will add to it.
    """

    tasks: tuple[int, ...]
    factors: tuple[float, ...]
    add: bool = False
    more: bool = False


def every_task(count: int) -> list[Row]:
    """One row per task."""
    return [Row((t,), (1.0,)) for t in range(count)]


class Sampled:
    """Take the gradients of a few sampled tasks and of the mean of the others: CAGrad-Fast (Liu et al. 2021, Eq. 4).

    A step costs ``n + 1`` backward passes instead of T. The mean gradient stays exact; only the inner choice of
    weights sees the sample. Tasks of the rest share one coefficient.

    Args:
        n: number of sampled tasks, at least 1. With ``n >= T - 1`` every task gets its own row.
        seed: of the draws; the generator's state is in :meth:`state_dict`.

    Raises:
        ValueError: ``n`` is below 1.

    Example:
        >>> import torch, detente
        >>> x = torch.ones(2, requires_grad=True)
        >>> losses = [(x * k).sum() ** 2 for k in (1.0, 2.0, 3.0, 4.0)]
        >>> update = detente.backward(losses, detente.CAGrad(), source=detente.Sampled(2))
        >>> update.stats["backwards"]
        3
    """

    def __init__(self, n: int, seed: int = 0) -> None:
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"Sampled(n) needs a whole number n >= 1 of sampled tasks; got {n!r}.")
        self.n = n
        self.generator = torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved generator's state."""
        self.generator.set_state(state["generator"])

    def rows(self, shares: Tensor) -> list[Row]:
        """Rows for tasks with these weights ``[T]`` in the mean: the sample in task order, then the rest."""
        count = len(shares)
        if self.n >= count - 1:
            return every_task(count)
        before = self.generator.get_state()
        drawn = torch.randperm(count, generator=self.generator)[: self.n].sort().values.tolist()
        rest = [t for t in range(count) if t not in drawn]
        total = float(shares[rest].sum())
        if total == 0:
            self.generator.set_state(before)
            raise ValueError(
                "Sampled cannot average tasks whose preferences are all 0; give every task a positive preference."
            )
        return [
            *(Row((t,), (1.0,)) for t in drawn),
            Row(tuple(rest), tuple(float(shares[t]) / total for t in rest)),
        ]


class Disjoint:
    """Take the gradients of all tasks in one backward pass, where every task has samples of its own.

    For losses that are means over slices of one batch, after one forward pass: multi-task reinforcement learning, or
    one data set per task. What a linear layer ``Y = X W' + b`` adds to the gradient of task t then lies in that
    task's rows of ``dL/dY``, of whatever loss ``L`` is the sum; the gradients are those of T passes.

    Every shared parameter must be the weight or the bias of one linear layer that the whole batch goes through, in
    float32 or float64 and without hooks. If one is not, a step takes a pass per task as usual, and
    ``update.stats["why"]`` names the parameter.

    **What you promise.** The rows of the first loss come first in dimension 0 of the batch, then those of the second,
    and no row has a part in two losses, also not through the network (BatchNorm, attention across the batch). This is
    checked, by a second and cheaper pass, in the first step of a network and of every further kind of graph
    (operations and tokens per sample) that it comes with, and in every step under ``DETENTE_DEBUG=1``.

    Where the losses come from a forward pass for each task, leave this out: their backward passes share no work.

    Args:
        samples: rows of the batch of each loss, in the order of the losses; or ``{task: rows}``, of which a step that
            brings some of the tasks takes theirs.

    Raises:
        ValueError: the rows are not whole numbers of at least 1; in a step, they are not those of its losses, or the
            promise is broken.

    Example:
        >>> import torch, detente
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> source = detente.Disjoint({"reach": 4, "push": 2})
        >>> for x in torch.randn(2, 6, 3):
        ...     y = net(x)
        ...     losses = {"reach": y[:4].square().mean(), "push": (y[4:] - 1).square().mean()}
        ...     update = detente.backward(losses, detente.CAGrad(), source=source)
        >>> update.stats["engine"], update.stats["backwards"]
        ('disjoint', 1)
    """

    def __init__(self, samples: Sequence[int] | Mapping[str, int]) -> None:
        given: Mapping[Any, Any] = samples if isinstance(samples, Mapping) else {}
        if not isinstance(samples, Mapping) and isinstance(samples, Iterable):
            given = dict(enumerate(samples))
        if not given or not all(isinstance(rows, Integral) and int(rows) >= 1 for rows in given.values()):
            raise ValueError(f"Disjoint(samples) needs a whole number >= 1 of rows for every loss; got {samples!r}.")
        self.samples: dict[str | int, int] = {task: int(rows) for task, rows in given.items()}
        self.named = isinstance(samples, Mapping)

    def rows(self, tasks: Sequence[str]) -> list[int]:
        """Rows of the batch of each of these tasks."""
        if not self.named:
            if len(self.samples) != len(tasks):
                raise ValueError(
                    f"source=detente.Disjoint(...) has rows for {len(self.samples)} losses, and this step brings "
                    f"{len(tasks)}. Pass {{task: rows}} where a step may bring some of the tasks."
                )
            return list(self.samples.values())
        missing = [task for task in tasks if task not in self.samples]
        if missing:
            raise ValueError(
                f"source=detente.Disjoint(...) has no rows for the losses {missing}; it names {list(self.samples)}."
            )
        return [self.samples[task] for task in tasks]


class Every:
    """Take the task gradients on every k-th step only, and reuse the coefficients that they gave in between.

    A step in between is one forward and one backward pass of all losses together, as without any method: what the
    tasks' own layers pass on into the shared ones is multiplied by the tasks' coefficients. In the mean a step costs
    ``1 + (E - 1) / k`` plain steps, where a step of the inner source costs E. A task that comes without a coefficient
    makes its step a fresh one. The method, and what it remembers of the losses, sees fresh steps alone; a
    ``weighting`` sees all.

    Use one object for one training loop, and save it with the method.

    Args:
        k: steps from one fresh step to the next, at least 1.
        source: of the fresh steps: ``"parameters"``, ``"features"``, :class:`Sampled` or :class:`Disjoint`.

    Raises:
        ValueError: ``k`` is below 1, or ``source`` is none of these.

    Example:
        >>> import torch, detente
        >>> x, source = torch.ones(2, requires_grad=True), detente.Every(2)
        >>> for _ in range(3):
        ...     losses = [(x * k).sum() ** 2 for k in (1.0, -2.0, 3.0)]
        ...     print(detente.backward(losses, detente.CAGrad(), source=source).stats["backwards"])
        3
        1
        3
    """

    def __init__(self, k: int, source: str | Sampled | Disjoint = "parameters") -> None:
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"Every(k) needs a whole number k >= 1 of steps; got {k!r}.")
        if not isinstance(source, Sampled | Disjoint) and source not in ("parameters", "features"):
            raise ValueError(
                "Every(k, source): source must be 'parameters', 'features', Sampled(n) or Disjoint(samples); got "
                f"{source!r}."
            )
        self.k = k
        self.source = source
        self.reused = 0
        self.coefficients: dict[str, float] = {}
        self.dropped: list[str] = []

    def due(self, tasks: Sequence[str]) -> bool:
        """Whether a step with these tasks takes their gradients."""
        return self.reused + 1 >= self.k or any(task not in self.coefficients for task in tasks)

    def keep(self, coefficients: dict[str, float], dropped: list[str]) -> None:
        """Take over the coefficients of a fresh step, and the tasks that it left out for their zero gradient."""
        self.coefficients = coefficients
        self.dropped = dropped
        self.reused = 0

    def state_dict(self) -> dict[str, Any]:
        """Coefficients by task, the number of steps that used them, and the state of a :class:`Sampled` source."""
        state: dict[str, Any] = {
            "coefficients": dict(self.coefficients),
            "dropped": list(self.dropped),
            "reused": self.reused,
        }
        if isinstance(self.source, Sampled):
            state["source"] = self.source.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        if isinstance(self.source, Sampled):
            self.source.load_state_dict(state["source"])
        self.keep(dict(state["coefficients"]), list(state["dropped"]))
        self.reused = state["reused"]


def spread(weights: Tensor, rows: Sequence[Row], count: int) -> Tensor:
    """Coefficients of the tasks ``[..., T]`` from those of the rows ``[..., R]``."""
    if len(rows) == count:
        return weights
    result = weights.new_zeros(*weights.shape[:-1], count)
    for r, row in enumerate(rows):
        for task, factor in zip(row.tasks, row.factors, strict=True):
            result[..., task] = weights[..., r] * factor
    return result


class Features:
    """The task gradients of the features at which the tasks part, instead of those of the shared parameters.

    One short backward pass through the tasks' own layers, then one through the trunk for all of them together.

    Args:
        losses: the losses of the step.
        found: its shared and task-specific parameters.
        storage: dtype in which the gradients are kept; None is that of the features.
        among: the processes that take the step together. The features of each are of its own samples, so that the
            Gramian is the sum of theirs.
    """

    def __init__(
        self,
        losses: list[Tensor],
        found: Reach,
        storage: torch.dtype | None = None,
        among: Processes | None = None,
    ) -> None:
        self.found = found
        self.among = among
        edge = boundary(losses, found)
        self.edges = edge.edges
        taken: list[list[Tensor | None]] = [[None] * len(self.edges) for _ in losses]
        self.heads: list[Head] = []
        hooks = [node.register_hook(_keeping(taken[t], positions)) for node, t, positions in edge.entries]
        # with skip connections a gradient must not flow on from one feature into another: the trunk's pass does that
        hooks += [e.node.register_prehook(_cut) for e in self.edges] if edge.nested else []
        # leaves that several tasks reach without sharing them need each task's gradient
        passes = [list(range(len(losses)))] if found.apart else [[t] for t in range(len(losses))]
        try:
            for tasks in passes:
                own = [(p, t) for t in tasks for p in {id(p): p for p in found.own[t]}.values()]
                ends = [*self.edges, *(get_gradient_edge(p) for p, _ in own)]
                gradients = torch.autograd.grad(
                    [losses[t] for t in tasks], ends, retain_graph=edge.nested or len(passes) > 1, allow_unused=True
                )[len(self.edges) :]
                self.heads += _heads(own, gradients, among)
        finally:
            for hook in hooks:
                hook.remove()
        examples = [next((row[k] for row in taken if row[k] is not None), None) for k in range(len(self.edges))]
        self.used = [k for k, example in enumerate(examples) if example is not None]
        self.jacobian = Jacobian([g for g in examples if g is not None], len(losses), storage=storage)
        if among is not None:
            self.heads = among.heads(self.heads)
            self.jacobian.partial = True
        for t, row in enumerate(taken):
            self.jacobian.write(t, [row[k] for k in self.used])

    def pull(self, updates: Sequence[Tensor]) -> None:
        """Add to ``.grad`` of the shared parameters what carries these gradients of the features."""
        if self.used:
            pull([self.edges[k] for k in self.used], updates, self.found.shared, self.among)
        zero_missing(self.found.shared)


def _keeping(row: list[Tensor | None], positions: Sequence[tuple[int, int]]) -> Callable[..., None]:
    """A hook that adds to a task's gradients of the features what one operation gives them."""

    def keep(inputs: tuple[Tensor | None, ...], outputs: object) -> None:
        for place, k in positions:
            gradient, before = inputs[place], row[k]
            if gradient is not None:
                row[k] = gradient if before is None else before + gradient

    return keep


def _cut(gradients: tuple[Tensor, ...]) -> tuple[None, ...]:
    return (None,) * len(gradients)


def mixed(
    losses: list[Tensor],
    found: Reach,
    factors: Sequence[float],
    coefficients: Sequence[float],
    among: Processes | None = None,
) -> None:
    """Add to ``.grad`` of all leaves in one pass: the heads' own gradients, and a mix for the shared parameters.

    Args:
        losses: of the step.
        found: the leaves behind them. No leaf may be some task's own that another task reaches too.
        factors: of the losses.
        coefficients: by which each task's gradient is multiplied where it enters the shared part of the graph.
        among: the processes that take the step together.
    """
    for p, tasks in zip(found.shared, found.tasks, strict=True):
        if len(tasks) == 1 and get_gradient_edge(p).node not in found.masks:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is listed in `shared`, reached by one task and spread by "
                "fully_shard, so that detente.Every cannot tell where its gradient enters. Leave it out of `shared`."
            )
    inner = {node for node, mask in found.masks.items() if mask & (mask - 1)}
    inner.update(get_gradient_edge(p).node for p in found.shared)
    hooks = []
    for node, mask in found.masks.items():
        entering = [] if node in inner else [k for k, (child, _) in enumerate(found.edges[node]) if child in inner]
        if entering:
            hooks.append(node.register_hook(_scaling(entering, coefficients[mask.bit_length() - 1])))
    starts = [
        torch.full_like(loss, f * c if root(loss) in inner else f)
        for loss, f, c in zip(losses, factors, coefficients, strict=True)
    ]
    try:
        pull(losses, starts, found.leaves, among)
    finally:
        for hook in hooks:
            hook.remove()
    zero_missing(found.shared)


def _scaling(positions: list[int], factor: float) -> Callable[..., tuple[Tensor | None, ...]]:
    def scale(inputs: tuple[Tensor | None, ...], outputs: object) -> tuple[Tensor | None, ...]:
        return tuple(g * factor if k in positions and g is not None else g for k, g in enumerate(inputs))

    return scale


def take(
    jacobian: Jacobian | Scattered,
    r: int,
    row: Row,
    losses: list[Tensor],
    found: Reach,
    convention: str,
    products: Mapping[int, Product],
    among: Processes | None,
    *,
    last: bool,
) -> list[Head]:
    """Backpropagate one row: its gradient goes into J; those of its heads are returned.

    Heads of a row that averages several tasks take another, short pass (it ends above the trunk), because their own
    losses have other factors than the average. Of the parameters in ``products`` the gradient of the layer's output
    is taken instead.
    """
    positions = range(len(found.shared))
    mine = positions if found.everywhere else [k for k in positions if any(t in found.tasks[k] for t in row.tasks)]
    own = list({id(p): p for t in row.tasks for p in found.own[t]}.values())
    outputs = [losses[t] for t in row.tasks]
    factors = None
    if len(row.tasks) > 1:
        factors = [torch.full_like(loss, f) for loss, f in zip(outputs, row.factors, strict=True)]
    inputs = [products[k].output if k in products else found.shared[k] for k in mine]

    def gradients_of(
        inputs: Sequence[Tensor | GradientEdge], factors: list[Tensor] | None, keep: bool
    ) -> Sequence[Tensor | None]:
        if not inputs:
            return ()
        if among is not None and among.layout is not None:
            return among.layout.gradients(outputs, inputs, factors, keep)  # type: ignore[arg-type]
        # PyTorch's annotation wants tensors or edges alone; it takes both together
        return torch.autograd.grad(outputs, inputs, factors, retain_graph=keep, allow_unused=True)  # type: ignore[arg-type]

    if len(row.tasks) == 1 or convention == "weighted":
        taken = gradients_of([*inputs, *own], factors, not last)
        head_gradients = taken[len(inputs) :]
    else:
        head_gradients = gradients_of(own, [torch.ones_like(loss) for loss in outputs], True)
        taken = gradients_of(inputs, factors, not last)
    gradients: list[Tensor | None] = [None] * len(found.shared)
    for k, gradient in zip(mine, taken, strict=False):
        if gradient is not None and gradient.layout != torch.strided:
            raise ValueError(
                f"a shared parameter of shape {tuple(found.shared[k].shape)} has a sparse gradient, which is "
                "not supported yet. Build the embedding with sparse=False."
            )
        gradients[k] = gradient
    jacobian.write(r, gradients, add=row.add, more=row.more)
    return _heads([(p, r) for p in own], head_gradients, among)


def _heads(
    own: Sequence[tuple[Tensor, int]], gradients: Sequence[Tensor | None], among: Processes | None
) -> list[Head]:
    """Gradients that are there; with several processes all of them, because another process may have them."""
    found = []
    for (p, r), gradient in zip(own, gradients, strict=True):
        if gradient is not None:
            found.append((p, r, gradient))
        elif among is not None:
            found.append((p, r, torch.zeros_like(p)))
    return found


def done_with(found: Reach, rows: Sequence[Row]) -> list[bool]:
    """For each row whether no later one needs the graph it runs through.

    True before the last row for tasks with a forward pass of their own: their graphs share parameters alone.
    """
    common = {mask for node, mask in found.masks.items() if mask & (mask - 1) and found.edges[node]}
    tasks = [sum(1 << t for t in row.tasks) for row in rows]
    if sum(tasks) in common:
        return [False] * (len(rows) - 1) + [True]
    return [not any(mask & own and mask & sum(tasks[r + 1 :]) for mask in common) for r, own in enumerate(tasks)]


def task_rows(
    losses: list[Tensor],
    found: Reach,
    rows: Jacobian | Scattered,
    among: Processes | None = None,
    *,
    keep: bool,
    heads: bool = False,
) -> list[Head]:
    """Fill the tasks' gradients of the shared parameters, one backward pass each; those of the heads are returned.

    Args:
        losses: of the step, or of another batch with the same tasks.
        found: its leaves.
        rows: of a Jacobian, to be written.
        among: the processes that take the step together.
        keep: whether the graph is needed afterwards.
        heads: whether to take the gradients of parameters that one loss alone reaches, too.
    """
    reached = found if heads else replace(found, own=[[] for _ in losses])
    taken: list[Head] = []
    for t, row in enumerate(every_task(len(losses))):
        taken += take(rows, t, row, losses, reached, "own", {}, among, last=not keep and t == len(losses) - 1)
    return among.heads(taken) if among is not None and heads else taken
