"""One step, from the losses and the leaves behind them to ``.grad``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detente.engine.disjoint import Chunks
from detente.engine.distributed import Processes
from detente.engine.grad import accumulate, pull
from detente.engine.graph import Reach, users
from detente.engine.jacobian import Jacobian
from detente.engine.lean import LARGE, Product, fresh, products, worth
from detente.engine.linear import MANY, Trunk, Unfit
from detente.engine.rows import Scattered
from detente.engine.source import (
    Disjoint,
    Every,
    Features,
    Head,
    Row,
    Sampled,
    done_with,
    every_task,
    mixed,
    spread,
    take,
    task_rows,
)
from detente.gramian import Partition
from detente.losses import check_finite
from detente.method import Context, GramianMethod, LossWeighting, Method, Update

__all__ = ["Step", "first_weights", "resolve"]

Rows = Jacobian | Scattered


@dataclass(frozen=True)
class Step:
    """One step on one or several processes.

    Attributes:
        named: losses by task; with several processes, this one's part of them.
        found: the leaves behind them.
        others: the losses on further batches, for methods that compare them.
        further: micro-batches whose task gradients are added to those of the first, each computed when it is its turn.
        among: the processes that take the step together; None is this one alone.
        every: what remembers the coefficients, where they are reused.
        method, source, granularity, weighting, scale, engine, storage: see :func:`detente.backward`.
    """

    named: dict[str, Tensor]
    found: Reach
    others: list[tuple[dict[str, Tensor], Reach]]
    further: Iterable[tuple[dict[str, Tensor], Reach]]
    micro_batches: int
    method: Method
    source: str | Sampled | Disjoint
    every: Every | None
    granularity: str | None
    weighting: LossWeighting | None
    scale: float
    engine: str
    storage: torch.dtype | None
    among: Processes | None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.named)

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.named.values())

    def take(self) -> Update:
        """Write the update into ``.grad``."""
        method, found = self.method, self.found
        if isinstance(method, LossWeighting):
            return self._weighted(method, self.weighting)
        assert isinstance(method, GramianMethod)
        if self.every is not None and method.heads == "own" and not found.apart:
            raise ValueError(
                "source=detente.Every(...) takes all losses in one pass, and a parameter that is not listed in "
                "`shared` is reached by several of them. List it, or leave `shared` out."
            )
        weighting = self.weighting or method.own_weighting
        if self.every is not None and found.shared and not self.every.due(self.tasks):
            return self._reused(method, weighting, self.every)
        if not found.shared:
            if len(self.tasks) > 1 and found.apart:
                warnings.warn(
                    f"no parameter is reached by two or more of the losses {list(self.tasks)}: there is no conflict to "
                    "resolve, and every loss gets its plain gradient. Were the shared features detached?",
                    stacklevel=4,
                )
            return self._weighted(_PLAIN, weighting)
        return self._projected(method, weighting)

    def _weighted(self, method: LossWeighting, weighting: LossWeighting | None) -> Update:
        """One pass of the weighted losses."""
        losses = self._read()
        context = Context(self.tasks, losses=losses)
        method.check(context)
        weights = first_weights(weighting, context)
        weights = weights * method.weights(losses * weights, context)
        factors = [torch.full_like(loss, weight) for loss, weight in zip(self.tensors, weights.tolist(), strict=True)]
        pull(self.tensors, factors, self.found.leaves, self.among)
        stats = {"backwards": 1, **context.stats}
        return Update(dict(zip(self.tasks, weights, strict=True)), None, stats)

    def _reused(self, method: GramianMethod, weighting: LossWeighting | None, every: Every) -> Update:
        """A step with the coefficients of an earlier one: one pass for all tasks."""
        losses = self._read()
        context = Context(self.tasks, losses=losses)
        method.check(context)
        finite = bool(losses.isfinite().all())
        first = first_weights(weighting if finite else None, context)
        kept = torch.tensor(
            [every.coefficients[task] if finite else math.nan for task in self.tasks], dtype=torch.float64
        )
        heads, inner = first, kept
        if method.heads == "weighted":
            out = torch.tensor([task in every.dropped for task in self.tasks])
            heads, inner = torch.where(out, first, first * kept), torch.where(out, kept, 1.0)
        mixed(self.tensors, self.found, heads.tolist(), inner.tolist(), self.among)
        every.reused += finite
        stats = {"engine": "reused", "backwards": 1, "reused": every.reused, **context.stats}
        return Update(dict(zip(self.tasks, kept * first, strict=True)), None, stats)

    def _projected(self, method: GramianMethod, weighting: LossWeighting | None) -> Update:
        """The task gradients, their Gramian, the method's coefficients, the update."""
        tasks, found = self.tasks, self.found
        rows, shares = every_task(len(tasks)), None
        if isinstance(self.source, Sampled):
            # on a device, to read the losses first is a transfer of its own
            losses = self._read() if "losses" in method.needs else None
            shares = method.sampling_shares(Context(tasks, losses=losses))
            drawn = self.source.state_dict()
            rows = self.source.rows(shares)
        taken = self._features(method) if self.source == "features" else self._gradients(method, rows)
        jacobian, partition = taken.jacobian, taken.partition

        cross = self._cross(taken) if self.others else None
        try:
            blocks, cross, losses, finite = self._to_host(
                jacobian.gramian(partition), cross, taken.values, jacobian.partial
            )
        except FloatingPointError:
            if isinstance(self.source, Sampled):
                self.source.load_state_dict(drawn)
            raise
        sizes = tuple(buffer.shape[1] for buffer in jacobian.buffers)
        context = Context(tasks, losses=losses, partition=partition, sizes=sizes)
        method.check(context)
        # no history, the weighting's included, sees a step that is not finite
        first = first_weights(weighting if finite else None, context)
        if weighting is not None:
            blocks = blocks * first.unsqueeze(1) * first
            cross = None if cross is None else cross * first.unsqueeze(1) * first
            context.losses = losses * first
        context.cross = cross
        if shares is not None:
            context = replace(
                context,
                tasks=tuple(tasks[row.tasks[0]] if len(row.tasks) == 1 else "(rest)" for row in rows),
                losses=torch.stack([losses[list(row.tasks)] @ torch.tensor(row.factors).double() for row in rows]),
                shares=torch.stack([shares[list(row.tasks)].sum() for row in rows]),
            )
            first = torch.ones(len(rows), dtype=torch.float64)
        weights, updates = resolve(jacobian, method, blocks, partition, context, first, self.scale, finite)

        if taken.features is not None:
            taken.features.pull(updates)
        else:
            if self.among is not None:
                updates = self.among.restored(found.shared, updates)
            accumulate({id(p): (p, u) for p, u in zip(found.shared, updates, strict=True)}, ours=True)
        if isinstance(jacobian, Jacobian) and not method.transforms:  # a method may keep the rows that it sees
            jacobian.release()
        total = blocks[0].numpy().copy() if len(blocks) == 1 else blocks.sum(0).numpy()
        # a task that is left out for its zero trunk gradient still trains its head
        left_out = ~((blocks.numpy().diagonal(0, 1, 2) > 0).any(0) | (weights.numpy() != 0).any(0))
        self._train_heads(taken, method, weights, first, left_out)

        stats: dict[str, Any] = {
            **taken.how,
            "conflicts": int(np.count_nonzero(total < 0)) // 2,
            "dropped": [t for t, out in zip(context.tasks, left_out.tolist(), strict=True) if out],
            **context.stats,
        }
        if len(rows) < len(tasks):
            stats["sampled"] = [tasks[row.tasks[0]] for row in rows[:-1]]
        if self.every is not None:
            stats["reused"] = 0
            raw = spread(torch.where(first == 0, 0.0, weights[0] / first), rows, len(tasks))
            if finite and bool(raw.isfinite().all()):
                dropped = [tasks[t] for row, out in zip(rows, left_out.tolist(), strict=True) if out for t in row.tasks]
                self.every.keep(dict(zip(tasks, raw.tolist(), strict=True)), dropped)
        by_task = spread(weights[0] if partition.count == 1 else weights, rows, len(tasks))
        return Update(dict(zip(tasks, by_task.unbind(-1), strict=True)), torch.from_numpy(total), stats)

    def _features(self, method: GramianMethod) -> _Taken:
        """The task gradients of the features; those of different processes belong to different samples."""
        if self.among is not None:
            self.among.need_features()
        features = Features(self.tensors, self.found, self.storage, self.among)
        partition = self._partition(method, features.jacobian.parameters)
        how = {"engine": "features", "why": "source", "backwards": 1, "products": 0}
        return _Taken(features.jacobian, features.heads, _values(self.tensors), partition, how, features)

    def _gradients(self, method: GramianMethod, rows: list[Row]) -> _Taken:
        """The task gradients of the shared parameters."""
        found, count = self.found, len(rows)
        if self.among is not None:
            return self._summed(method, rows, self.among)
        partition = self._partition(method, found.shared)
        reason = None
        if isinstance(self.source, Disjoint):
            samples = self.source.rows(self.tasks)
            alike = method.heads == "own" and (self.weighting or method.own_weighting) is None
            try:
                chunks = Chunks(found, samples, alike)
            except ValueError as error:
                reason = str(error)
            else:
                return self._in_chunks(chunks, partition)
        written = bool(self.others) or self.micro_batches > 1 or method.transforms or method.per_parameter
        together, alone_for = self._together(rows)
        kept: dict[int, Product] = {}
        alone: set[int] = set()
        if not written:
            kept, alone = _kept(found, partition, count, self.engine, together, self.storage)
        inputs = {k: product.inputs for k, product in kept.items()}
        jacobian = Jacobian(found.shared, count, inputs, alone, self.storage)
        if together is not None:
            heads, values = together.pull(self.tensors, jacobian), _values(self.tensors)
        else:
            heads, values = self._row_by_row(jacobian, rows, method, kept)
        if reason is None:
            reason = f"{method.name} needs every gradient written out" if written else _why(self.engine, kept, found)
            reason += f"; a pass for each task, because {alone_for}" if alone_for else ""
        how = {
            "engine": "batched" if together else "lean" if kept else "serial",
            "why": reason,
            "backwards": 1 if together else count * (self.micro_batches + len(self.others)),
            "products": len(kept),
        }
        ours = together is not None and not together.above
        return _Taken(jacobian, heads, values, partition, how, ours=ours)

    def _together(self, rows: list[Row]) -> tuple[Trunk | None, str]:
        """The trunk that all tasks can go down together, where that is asked for or faster; or why there is none."""
        if self.engine not in ("auto", "batched"):
            return None, ""
        if self.engine == "auto" and len(rows) < MANY and not any(p.numel() >= LARGE for p in self.found.shared):
            return None, "there are few tasks and no large weights"
        try:
            if len(rows) < len(self.tasks) or self.others or self.micro_batches > 1:
                raise Unfit("the step is made of several graphs, or of sampled tasks")
            trunk = Trunk(self.tensors, self.found)
        except Unfit as error:
            if self.engine == "batched":
                raise ValueError(f"engine='batched' does not work here: {error}. Use engine='auto'.") from None
            return None, str(error)
        if self.engine == "auto" and trunk.at_once < 2:
            return None, "the values in the trunk are large"
        return trunk, ""

    def _in_chunks(self, chunks: Chunks, partition: Partition) -> _Taken:
        """The task gradients of the shared parameters from one pass, where each task has samples of its own."""
        jacobian = Jacobian(self.found.shared, len(self.tasks), storage=self.storage)
        heads, passes = chunks.pull(self.tensors, jacobian)
        how = {"engine": "disjoint", "why": "source", "backwards": passes, "products": 0}
        return _Taken(jacobian, heads, _values(self.tensors), partition, how)

    def _summed(self, method: GramianMethod, rows: list[Row], among: Processes) -> _Taken:
        """The task gradients of the shared parameters, summed over the processes."""
        shared, count = self.found.shared, len(rows)
        if self.engine not in ("auto", "serial"):
            raise ValueError(
                f"engine={self.engine!r} keeps what one process knows of its own samples, and gradients must be summed "
                "over the processes. Use engine='auto'."
            )
        if isinstance(self.source, Disjoint):
            raise ValueError(
                "source=detente.Disjoint(...) is for one process, whose batch it divides. Use source='parameters'."
            )
        how: dict[str, Any] = {"engine": "serial", "why": "several processes", "products": 0}
        how["backwards"] = count * (self.micro_batches + len(self.others))
        if among.layout is not None:
            jacobian: Rows = among.layout.rows(shared, count, self.storage, among.size, whole=method.transforms)
            heads, values = self._row_by_row(jacobian, rows, method, {})
            # only now are the layers' weights those that the optimizer knows
            return _Taken(jacobian, heads, values, among.agreed(self._partition(method, shared), shared), how)
        partition = among.agreed(self._partition(method, shared), shared)
        jacobian = among.rows(shared, count, partition, self.storage, whole=method.transforms)
        return _Taken(jacobian, *self._row_by_row(jacobian, rows, method, {}), partition, how)

    def _row_by_row(
        self, jacobian: Rows, rows: list[Row], method: GramianMethod, kept: Mapping[int, Product]
    ) -> tuple[list[Head], Tensor]:
        """Write the rows, added up over the micro-batches; the heads' gradients and the losses, added up alike."""
        heads: list[Head] = []
        values: list[Tensor] = []
        for m, (named, found) in enumerate(chain([(self.named, self.found)], self.further)):
            if m:
                found = self._same(named, found)
            tensors = list(named.values())
            if self.micro_batches > 1:
                rows = [replace(row, add=m > 0, more=m < self.micro_batches - 1) for row in rows]
            for r, (row, last) in enumerate(zip(rows, done_with(found, rows), strict=True)):
                heads += take(jacobian, r, row, tensors, found, method.heads, kept, self.among, last=last)
            values.append(_values(tensors))
        return (heads if self.among is None else self.among.heads(_added(heads))), reduce(torch.add, values)

    def _same(self, named: Mapping[str, Tensor], found: Reach) -> Reach:
        """The leaves of a further micro-batch, in the order of the first."""
        first = self.found
        alike = tuple(named) == self.tasks and all(
            {id(p) for p in ours} == {id(p) for p in theirs}
            for ours, theirs in zip([first.shared, *first.own], [found.shared, *found.own], strict=True)
        )
        if not alike:
            raise ValueError(
                f"the micro-batches of a step must bring the same tasks, which reach the same parameters; got "
                f"{list(self.tasks)}, then {list(named)}. Use accumulate='direction'."
            )
        return replace(first, masks=found.masks, edges=found.edges)

    def _partition(self, method: GramianMethod, parameters: list[Tensor]) -> Partition:
        chosen = self.granularity or method.native_granularity
        if self.source == "features" and chosen == "channel":
            partition = Partition.by_channel(parameters, dim=1)  # dimension 0 of a feature is the sample
        else:
            partition = method.partition(parameters, self.tasks, chosen)
        if self.every is not None and partition.count > 1:
            raise ValueError(
                f"source=detente.Every(...) reuses one coefficient per task, and {partition.count} blocks have one "
                "each. Use granularity='model'."
            )
        if method.heads == "weighted" and partition.count > 1:
            raise ValueError(
                f"{method.name} weights the heads' losses by the tasks' coefficients, and {partition.count} blocks "
                "have one coefficient each. Use heads='own', or granularity='model'."
            )
        return partition

    def _cross(self, taken: _Taken) -> Tensor:
        """Products ``[B, T, T]`` of the gradients on two further batches, or on this and one further batch."""
        each = [taken.jacobian]
        for batch, found in self.others:
            jacobian: Rows = Jacobian(found.shared, len(batch))
            if self.among is not None:
                jacobian = self.among.rows(found.shared, len(batch), taken.partition, None)
            task_rows(list(batch.values()), found, jacobian, self.among, keep=False)
            each.append(jacobian)
        return each[-2].gramian(taken.partition, each[-1])  # type: ignore[arg-type]

    def _train_heads(self, taken: _Taken, method: GramianMethod, weights: Tensor, first: Tensor, left_out: Any) -> None:
        gradients: dict[int, tuple[Tensor, Tensor]] = {}
        factors = first.tolist()
        if method.heads == "weighted":
            given = weights[0].tolist()
            factors = [old if out else new for old, new, out in zip(factors, given, left_out, strict=True)]
        for p, r, gradient in taken.heads:
            scaled = gradient if factors[r] == 1 else gradient * factors[r]
            gradients[id(p)] = (p, gradients[id(p)][1] + scaled if id(p) in gradients else scaled)
        accumulate(gradients, ours=taken.ours)

    def _read(self) -> Tensor:
        """Unscaled loss values ``[T]`` float64 on the CPU, checked where no gradient scaler would skip the step."""
        losses = _values(self.tensors)
        if self.among is not None:
            losses = self.among.whole(losses)
        losses = losses.cpu() / self.scale
        if self.scale == 1.0:
            check_finite(dict(zip(self.tasks, losses, strict=True)))
        return losses

    def _to_host(
        self, raw: Tensor, cross: Tensor | None, values: Tensor, partial: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, bool]:
        """Unscaled products of the gradients and loss values in float64 on the CPU, and whether all are finite.

        One transfer, whatever is on a device; with several processes, after one sum over them (of the products where
        they are ``partial``). Raises where a loss is not finite and no gradient scaler is there.
        """
        given = [values, raw] if cross is None else [values, raw, cross]
        if self.among is not None:
            given = self.among.add_up(given, partial)
        devices = {t.device for t in given if t.device.type != "cpu"}
        if devices:
            flat = torch.cat([part.to(next(iter(devices))).reshape(-1) for part in given]).cpu()
            pieces = torch.split(flat, [part.numel() for part in given])
            given = [piece.view(part.shape) for piece, part in zip(pieces, given, strict=True)]
        values, raw, *rest = given
        finite = all(np.isfinite(part.numpy()).all() for part in given)
        if self.scale != 1.0:
            values, raw, rest = values / self.scale, raw / self.scale**2, [part / self.scale**2 for part in rest]
        elif not finite:
            check_finite(dict(zip(self.tasks, values, strict=True)))
        return raw, rest[0] if rest else None, values, finite


@dataclass(frozen=True)
class _Taken:
    """The task gradients of a step.

    Attributes:
        jacobian: their rows.
        heads: the gradients of the tasks' own parameters.
        values: the losses ``[T]`` float64, still scaled and on their device.
        partition: the blocks.
        how: they were taken, for ``stats``.
        features: the place where they were taken, where that is not the shared parameters.
        ours: whether nobody else has the gradients of the tasks' own parameters.
    """

    jacobian: Rows
    heads: list[Head]
    values: Tensor
    partition: Partition
    how: dict[str, Any]
    features: Features | None = None
    ours: bool = False


def _values(losses: list[Tensor]) -> Tensor:
    """Loss values ``[T]`` float64, still scaled and on the losses' device."""
    device = losses[0].device
    if device.type == "cpu":
        return torch.tensor([loss.item() for loss in losses], dtype=torch.float64)
    return torch.stack([loss.detach().reshape(()).double().to(device) for loss in losses])


def _added(heads: list[Head]) -> list[Head]:
    """One gradient for every parameter and row."""
    found: dict[tuple[int, int], Head] = {}
    for p, r, gradient in heads:
        before = found.get((id(p), r))
        found[id(p), r] = (p, r, gradient if before is None else before[2] + gradient)
    return list(found.values())


def first_weights(weighting: LossWeighting | None, context: Context) -> Tensor:
    """Weights of the losses before the method sees them."""
    assert context.losses is not None
    if weighting is None:
        return torch.ones_like(context.losses)
    return weighting.weights(context.losses, context)


def _why(engine: str, kept: Mapping[int, Product], found: Reach) -> str:
    """In words, what decided how the task gradients were kept."""
    if engine == "serial":
        return "asked for"
    how = "can be" if engine == "lean" else "are cheaper as"
    return f"{len(kept)} of {len(found.shared)} shared parameters {how} products of small matrices"


def _kept(
    found: Reach,
    partition: Partition,
    count: int,
    engine: str,
    together: Trunk | None,
    storage: torch.dtype | None,
) -> tuple[dict[int, Product], set[int]]:
    """Which task gradients need no buffer, by position: those kept as products, and as the tensors that come."""

    def pays(k: int, samples: int) -> bool:
        if engine in ("lean", "serial"):
            return engine == "lean"
        return worth(samples, found.shared[k].shape, count, together=together is not None)

    whole = [k for k, (dims, _) in enumerate(partition.members) if dims == ()]
    lean = [k for k in whole if pays(k, 1)]
    if together is not None:
        layers = {k: together.product(k) for k in lean}
        return {k: layer for k, layer in layers.items() if layer is not None and pays(k, layer.samples)}, set()
    large = [] if storage is not None else [k for k in whole if found.shared[k].numel() >= LARGE]
    if not (lean or large):
        return {}, set()
    feeds = users(found.edges)
    kept = {
        lean[i]: product
        for i, product in products(feeds, [found.shared[k] for k in lean]).items()
        if pays(lean[i], product.samples)
    }
    large = [k for k in large if k not in kept]
    return kept, {large[i] for i in fresh(feeds, [found.shared[k] for k in large])}


def resolve(
    jacobian: Rows,
    method: GramianMethod,
    blocks: Tensor,
    partition: Partition,
    context: Context,
    first: Tensor,
    scale: float,
    finite: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Coefficients ``[B, T]`` of the raw task gradients, and the update they give."""
    if not method.transforms:
        weights = method.weights(blocks, context) * first
        return weights, jacobian.combine(weights, partition)
    if not finite:
        weights = torch.full(blocks.shape[:-1], math.nan, dtype=torch.float64)
        return weights, jacobian.combine(weights, partition)
    factors = first / scale
    if bool((factors != 1).any()):
        for buffer in jacobian.buffers:
            buffer.mul_(factors.to(buffer.device, buffer.dtype).unsqueeze(1))
    method.transform(jacobian.buffers, context)
    weights = method.weights(jacobian.gramian(partition).cpu(), context)
    return weights * first, jacobian.combine(weights * scale, partition)


class _Plain(LossWeighting):
    """Every loss with weight 1: what a step without shared parameters does."""

    name = "plain"
    needs = frozenset()

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        return torch.ones_like(losses)


_PLAIN = _Plain()
