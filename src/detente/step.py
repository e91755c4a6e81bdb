"""One whole training step: forward, backward and the optimizer, in the order a method's schedule wants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from detente.backward import Options, joined, run
from detente.engine.distributed import Counts, Processes
from detente.engine.grad import pull
from detente.engine.graph import Reach, listed
from detente.engine.source import Disjoint, Every, Sampled
from detente.losses import check_finite, named_losses, without_graph
from detente.method import GramianMethod, LossWeighting, Method, Update, one_of, require_method
from detente.watch import Seen, watchers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Closure", "step"]


class Closure(Protocol):
    """Computes the losses of a step: of the named tasks, or of all with ``None``."""

    def __call__(self, tasks: tuple[str, ...] | None = None) -> Mapping[str, Tensor]: ...


def step(
    closure: Closure,
    optimizer: torch.optim.Optimizer,
    method: Method,
    *,
    shared: Iterable[Tensor] | None = None,
    source: str | Sampled | Disjoint | Every = "parameters",
    granularity: str | None = None,
    weighting: LossWeighting | None = None,
    counts: Counts | None = None,
    engine: str = "auto",
    storage: torch.dtype | None = None,
    group: ProcessGroup | None = None,
    micro_batches: int = 1,
    accumulate: str = "jacobian",
) -> Update:
    """Zero the gradients, compute the losses, resolve their conflicts, and step the optimizer.

    Needed for schedules that one backward pass cannot express: connection strength's first phase (an optimizer step
    per task), FAMO (the losses after the step), Auto-Lambda (a virtual step), and methods that compare several batches.
    For all other methods the same as ``optimizer.zero_grad()``, :func:`detente.backward`, ``optimizer.step()``.

    Args:
        closure: ``closure(tasks=None) -> {task: loss}``; runs the forward pass for the named tasks (all with None)
            on the current batch. Methods with ``batches > 1`` call it that often: let it take a fresh batch each time.
        optimizer: of all parameters. It is stepped once, or once per task in a sequential step.
        method: a method of this library.
        counts: as in :func:`detente.backward`. The closure may fill a dict that is passed here.
        shared, source, granularity, weighting, engine, storage, group: as in :func:`detente.backward`. With several
            processes, some may come without some tasks: the optimizer knows all parameters.
        micro_batches: times that the closure is called for one step, each with a fresh part of the batch; all parts
            count alike.
        accumulate: what is added up over the micro-batches. ``"jacobian"``: the task gradients, whose conflicts are
            then resolved once, which is the step on the whole batch. ``"direction"``: each micro-batch's own update,
            which is another step, and one more for the method's history each time, but works with every source.

    Returns:
        The :class:`Update`; after a sequential step every weight is 1 and ``stats["sequential"]`` is True.

    Raises:
        ValueError: the closure does not return the task it was asked for, micro-batches do not go with the method or
            the source; else as :func:`detente.backward`.

    Example:
        >>> import torch, detente
        >>> trunk, heads = torch.nn.Linear(3, 4), torch.nn.ModuleDict({t: torch.nn.Linear(4, 1) for t in "ab"})
        >>> optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1)
        >>> def closure(tasks=None):
        ...     h = trunk(torch.ones(2, 3)).relu()
        ...     return {t: (heads[t](h) - 1).square().mean() for t in tasks or "ab"}
        >>> update = detente.step(closure, optimizer, detente.PCGrad())
        >>> sorted(update.weights)
        ['a', 'b']
    """
    require_method(method)
    if method.requires_step and (weighting is not None or source != "parameters"):
        raise ValueError(f"weighting and source do not apply to the schedule of {method.name}; leave them out.")
    one_of("accumulate", accumulate, ("jacobian", "direction"))
    if not isinstance(micro_batches, int) or micro_batches < 1:
        raise ValueError(f"micro_batches must be a whole number, at least 1; got {micro_batches!r}.")
    if micro_batches > 1:
        if method.requires_step or method.batches > 1 or "losses after the step" in method.needs:
            raise ValueError(f"the schedule of {method.name} has no micro-batches; leave micro_batches out.")
        gradients = isinstance(method, GramianMethod) and source == "parameters" and engine in ("auto", "serial")
        if accumulate == "jacobian" and not gradients:
            raise ValueError(
                "accumulate='jacobian' adds up the task gradients of the parameters, which this method, source or "
                "engine does not take. Use accumulate='direction'."
            )
    everything = [p for part in optimizer.param_groups for p in part["params"]]
    options = Options(
        shared=None if shared is None else listed(shared),
        source=source,
        granularity=granularity,
        weighting=weighting,
        counts=counts,
        engine=engine,
        storage=storage,
        parameters=everything,
        group=group,
    )
    session = _Session(closure, optimizer, method, options, micro_batches, accumulate)
    update = method.take_step(session)
    for watcher in watchers():
        # a closure that is called several times for one step takes fresh samples each time
        watcher.stepped(session.values if micro_batches == method.batches == 1 else None)
    return update


class _Session:
    """What a method's schedule is made of; see :class:`detente.method.Session`."""

    def __init__(
        self,
        closure: Closure,
        optimizer: torch.optim.Optimizer,
        method: Method,
        options: Options,
        micro_batches: int,
        accumulate: str,
    ) -> None:
        self.closure = closure
        self.optimizer = optimizer
        self.method = method
        self.options = options
        self.micro_batches = micro_batches
        self.accumulate = accumulate
        self.among = Processes.of(options.group)
        self.parameters: list[Tensor] = list(options.parameters or ())
        self.tasks: tuple[str, ...] = ()
        self.descents = 0
        self._here: tuple[str, ...] = ()  # of the tasks those that this process has
        self._random: list[Tensor] = []

    def losses(self, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        losses = self.join(self._forward(tasks))
        self.tasks = tuple(losses)
        return losses

    def join(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._joined(losses)[0]

    def _forward(self, tasks: tuple[str, ...] | None = None) -> Mapping[str, Tensor]:
        self._random = [torch.get_rng_state(), *_cuda_states()]
        losses = self.closure(tasks)
        with self._together():
            self._here = tuple(named_losses(losses, any_number=self.among is not None))
        return losses

    def _together(self) -> AbstractContextManager[None]:
        return nullcontext() if self.among is None else self.among.failing_together()

    def _joined(self, losses: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Reach]:
        return joined(losses, self.options.shared, self.parameters, self.options.counts, self.among)

    def values(self) -> dict[str, float]:
        before = [torch.get_rng_state(), *_cuda_states()]

        def again() -> Mapping[str, Tensor]:
            _set_states(self._random)
            return self.closure(self._here)

        try:
            losses = without_graph(again) if self._here else {}
        finally:
            _set_states(before)
        values = {task: float(losses[task].detach()) for task in self._here}
        return values if self.among is None else self.among.means(values, self.options.counts, self.tasks)

    def resolve(self) -> Update:
        if self.micro_batches > 1:
            return self._in_parts()
        losses = self._forward()
        more = [self.closure(self._here) for _ in range(self.method.batches - 1)]
        self.optimizer.zero_grad(set_to_none=True)
        update = run(losses, self.method, self.options, more)
        self.tasks = tuple(update.weights)
        return update

    def _in_parts(self) -> Update:
        """As :meth:`resolve`, over several micro-batches."""
        share = 1 / self.micro_batches
        options = replace(self.options, scale=self.options.scale * share)

        def part() -> dict[str, Tensor]:
            return {task: loss * share for task, loss in self._forward().items()}

        first = part()
        self.optimizer.zero_grad(set_to_none=True)
        if self.accumulate == "jacobian":
            update = run(first, self.method, self.options, micro=[part] * (self.micro_batches - 1))
        else:
            update = run(first, self.method, options)
            for _ in range(self.micro_batches - 1):
                update = run(part(), self.method, options)
        self.tasks = tuple(update.weights)
        return update

    def descend(self) -> None:
        self.optimizer.step()
        self.descents += 1

    def one_by_one(self, tasks: Sequence[str]) -> Update:
        for watcher in watchers():
            watcher.sequence(lambda: Seen(*self._joined(self._forward()), self.among))
        weights: dict[str, Tensor] = {}
        for task, loss, found in self._in_turn(tasks):
            # heads of the other tasks keep gradient None, so that no optimizer moves them
            self.optimizer.zero_grad(set_to_none=True)
            pull([loss], [torch.ones_like(loss)], found.leaves, self.among)
            self.descend()
            weights[task] = torch.ones((), dtype=torch.float64)
        update = Update(weights, None, {"backwards": len(weights), "sequential": True})
        for watcher in watchers():
            watcher.updated(self.method, update)
        return update

    def _in_turn(self, tasks: Iterable[str]) -> Iterator[tuple[str, Tensor, Reach]]:
        """The loss of each task, computed when its turn comes; tasks without a loss in this batch are left out."""
        for task in tasks:
            losses = dict(self.closure((task,)))
            with self._together():
                if losses and set(losses) != {task}:
                    raise ValueError(
                        f"closure(tasks=({task!r},)) must return the loss of that task alone; got {sorted(losses)}. "
                        "Compute only the losses named in `tasks`."
                    )
            if not losses and self.among is None:
                continue
            parts, found = self._joined(losses)
            for part in parts.values():  # of one task, or of none where no process has it
                value = part.detach().double()
                if self.among is not None:
                    value = self.among.whole(value.reshape(1))
                check_finite({task: value})
                yield task, part, found

    def gradients(self, losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> list[Tensor | None]:
        if self.among is not None and self.among.layout is not None:
            raise RuntimeError(
                f"{self.method.name} takes gradients between the optimizer's steps, which fully_shard and tensor "
                "parallelism do not give. Use DistributedDataParallel for it."
            )
        factors = [torch.full_like(loss, weights[task]) for task, loss in losses.items()]
        wanted = [p for p in self.parameters if p.requires_grad]
        taken: Sequence[Tensor | None] = torch.autograd.grad(list(losses.values()), wanted, factors, allow_unused=True)
        if self.among is not None:
            taken = self.among.sum_some(taken, wanted)
        found = iter(taken)
        return [next(found) if p.requires_grad else None for p in self.parameters]

    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups for _ in group["params"]]

    def virtual_step(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        steps: list[Tensor | None] = []
        given = iter(gradients)
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                g = next(given)
                if g is not None:
                    g = g + group.get("weight_decay", 0.0) * p.detach()
                    kept = self.optimizer.state[p].get("momentum_buffer") if p in self.optimizer.state else None
                    g = g if kept is None else g + group.get("momentum", 0.0) * kept
                    g = -group["lr"] * g
                steps.append(g)
        return steps

    @contextmanager
    def moved(self, directions: Sequence[Tensor | None], length: float = 1.0) -> Iterator[None]:
        before = [p.detach().clone() for p, d in zip(self.parameters, directions, strict=True) if d is not None]
        moving = [(p, d) for p, d in zip(self.parameters, directions, strict=True) if d is not None]
        try:
            with torch.no_grad():
                for p, d in moving:
                    p.add_(d, alpha=length)
            yield
        finally:
            with torch.no_grad():
                for (p, _), old in zip(moving, before, strict=True):
                    p.copy_(old)  # to the bit, which moving back would not be


def _cuda_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]


def _set_states(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(list(states[1:]))
