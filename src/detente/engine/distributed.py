"""One step on many processes: what every process brings into it, and how gradients become those of the whole batch.

A process sees a part of the batch. Its losses are multiplied by its share of the samples, so that the loss of the whole
batch is the sum of the processes' losses, and every gradient of it the sum of theirs. Row by row, and before any
Gramian is taken: the Gramian of a sum is no sum of Gramians.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from detente.engine.graph import SINK, Reach, feeds, leaves_of, reach, root
from detente.engine.jacobian import Jacobian, real
from detente.engine.rows import Scattered, Summed, all_gather, by_kind, restored_shape
from detente.gramian import Partition

if TYPE_CHECKING:
    from detente.engine.sharded import Layout

__all__ = ["Counts", "Processes"]

Counts = float | Mapping[str, float]


class Processes:
    """The processes that take a step together.

    Args:
        group: of ``torch.distributed``; None is all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.layout: Layout | None = None  # of parameters that PyTorch itself spreads and averages
        self.alike = True  # whether all bring the same tasks, which reach the same parameters
        backends = str(dist.get_backend_config(group))
        self.gloo = "cpu:gloo" in backends
        # what only steers the step stays off the device, where reading it would wait for all kernels
        self.control = torch.device("cpu" if "cpu:" in backends else backends.partition(":")[0])

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Processes | None:
        """Those of a group; None where there is one process and no group was named."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        return cls(group) if group is not None or dist.get_world_size() > 1 else None

    def join(
        self,
        losses: Mapping[str, Tensor],
        shared: Sequence[Tensor] | None,
        counts: Counts | None,
        parameters: Sequence[Tensor] | None,
    ) -> tuple[dict[str, Tensor], Reach]:
        """This process's part in the losses of the whole batch, of all tasks that some process brings.

        Args:
            losses: of this process's samples.
            shared: parameters to treat as shared; None finds them.
            counts: samples behind the losses.
            parameters: all that a loss may reach, in the same order everywhere.

        Returns:
            The losses whose sum over the processes are those of the batch (a task without samples here gets one that
            reaches nothing), and the leaves that they reach on any process.

        Raises:
            RuntimeError: processes bring different tasks, or their losses reach different parameters, and
                ``parameters`` does not say which are which; or another process has failed.
        """
        with self.failing_together():
            for task, loss in losses.items():
                if hasattr(loss, "full_tensor"):
                    raise TypeError(
                        f"losses[{task!r}] is a distributed tensor, of which this process has a part. Pass "
                        "loss.full_tensor()."
                    )
            mine = _counts(losses, counts)
            found = self._reach(losses, shared)
            signature = [1 if counts is None else 2, _digest(list(losses)), _digest(_layout(found))]
        everyone = self._gather(signature)
        failed = [r for r, (ok, _, _) in enumerate(everyone) if not ok]
        if failed:
            raise RuntimeError(
                f"process {failed[0]} of {self.size} could not take part in this step; its own error says why. "
                "Nothing was written here."
            )
        if len({given for given, _, _ in everyone}) > 1:
            raise RuntimeError("some processes pass counts and others do not. Pass it on all of them, or on none.")
        alike = self.alike = all(other == signature for other in everyone)
        if self.layout is not None and not alike:
            raise RuntimeError(
                "under fully_shard and tensor parallelism all processes must bring the same losses, which reach the "
                f"same parameters; here they are {list(losses)}. For a task without samples on a process take a loss "
                "of 0 that is computed from the model's output, and counts={task: 0}."
            )
        tasks = list(losses) if alike else self._in_order(list(losses))
        known = dict(zip(losses, mine, strict=True))
        counted = [float(known.get(task, 0)) for task in tasks]
        if alike and counts is None:
            total = [float(self.size)] * len(tasks)
        else:
            total = self.total(torch.tensor(counted, dtype=torch.float64, device=self.control)).tolist()
        parts: dict[str, Tensor] = {}
        device = next((loss.device for loss in losses.values()), self.control)
        for task, count, all_of_it in zip(tasks, counted, total, strict=True):
            # the mean over no samples is often NaN, and NaN times 0 is
            if self.layout is not None:
                parts[task] = losses[task] * (self.size * count / all_of_it if count else 0)
            elif count:
                parts[task] = losses[task] * (count / all_of_it)
            else:
                parts[task] = torch.zeros((), requires_grad=True, device=device)
        if alike:
            for t, part in enumerate(parts.values()):
                found.masks[root(part)] = 1 << t
                found.edges[root(part)] = feeds(root(part))
        return parts, found if alike else self._merged(parts, shared, parameters, list(losses))

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error here is told to the other processes, which would wait for this one forever."""
        try:
            yield
        except Exception:
            self._gather([0, 0, 0])
            raise

    def _reach(self, losses: Mapping[str, Tensor], shared: Sequence[Tensor] | None) -> Reach:
        # loading PyTorch's tensors over meshes takes longer than all of the rest
        from detente.engine.sharded import gathered, layout

        found = reach(list(losses.values()), None if shared is None else gathered(shared))
        for p in found.leaves:
            _refuse_foreign(p)
        _take_over(losses, found)
        spread = layout(found, self.size)
        if spread is None:
            return found
        self.layout, known = spread
        return known

    def gradients(
        self, outputs: Sequence[Any], leaves: Sequence[Tensor], factors: Sequence[Tensor] | None
    ) -> list[Tensor]:
        """Gradients of the whole batch, from the parts of its losses; they are nobody else's tensors."""
        if self.layout is not None:
            found = self.layout.gradients(outputs, leaves, factors, keep=False)
            return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]
        local = torch.autograd.grad(outputs, leaves, factors, allow_unused=True)
        return self.sum_all([torch.zeros_like(p) if g is None else g for p, g in zip(leaves, local, strict=True)])

    @property
    def copies(self) -> int:
        """How often a sum over the processes counts every loss."""
        return 1 if self.layout is None else self.size

    def rows(
        self,
        parameters: Sequence[Tensor],
        count: int,
        partition: Partition,
        storage: torch.dtype | None,
        *,
        whole: bool = False,
    ) -> Jacobian | Scattered:
        """A Jacobian of the whole batch, to be written with this process's gradients.

        Blocks, and methods that rewrite rows (``whole``), need whole rows on every process.
        """
        if self.layout is not None:
            return self.layout.rows(parameters, count, storage, self.size, whole=whole)
        if whole or partition.count > 1 or partition.measured is not None:
            return Summed(parameters, count, self, storage=storage)
        return Scattered(parameters, count, self, storage)

    def agreed(self, partition: Partition, parameters: Sequence[Tensor]) -> Partition:
        """The blocks of process 0, where they depend on what the processes may see differently (BatchNorm)."""
        if partition.owners is not None:
            described = [
                partition.count,
                [[list(dims), index.tolist()] for dims, index in partition.members],
                partition.owners.tolist(),
            ]
            count, members, owners = json.loads(self._gather_text(json.dumps(described))[0])
            partition = replace(
                partition,
                count=count,
                members=tuple((tuple(dims), torch.tensor(index)) for dims, index in members),
                owners=torch.tensor(owners),
            )
        return partition if self.layout is None else self.layout.parts(partition, parameters)

    def restored(self, parameters: Sequence[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
        """Updates as gradients of the parameters."""
        return list(updates) if self.layout is None else self.layout.restored(parameters, updates)

    def heads(self, heads: list[tuple[Tensor, int, Tensor]]) -> list[tuple[Tensor, int, Tensor]]:
        """The heads' gradients of the whole batch."""
        if self.layout is not None:
            return heads
        sums = self.sum_all([gradient for _, _, gradient in heads])
        return [(p, r, gradient) for (p, r, _), gradient in zip(heads, sums, strict=True)]

    def need_features(self) -> None:
        """Raise where the features of a step say nothing about the whole batch."""
        if self.layout is not None or not self.alike:
            raise RuntimeError(
                "source='features' needs, with several processes, the same tasks on all of them, and parameters that "
                "are not spread by fully_shard or tensor parallelism. Use source='parameters'."
            )

    def add_up(self, given: list[Tensor], partial: bool) -> list[Tensor]:
        """Loss values and products ``[values, *products]`` of the whole batch; products only where ``partial``."""
        summed = given if partial else given[:1]
        device = next((t.device for t in summed if t.device.type != "cpu"), summed[0].device)
        flat = self.total(torch.cat([t.to(device).reshape(-1) for t in summed]))
        pieces = [p.view(t.shape) for p, t in zip(torch.split(flat, [t.numel() for t in summed]), summed, strict=True)]
        return [pieces[0] / self.copies, *pieces[1:], *given[len(summed) :]]

    def _in_order(self, mine: list[Any]) -> list[Any]:
        """What the processes list, together: an entry stands where the first process that has it put it."""
        merged: list[Any] = []
        for listed in map(json.loads, self._gather_text(json.dumps(mine))):
            place = len(merged)
            for entry in reversed(listed):
                if entry in merged:
                    place = merged.index(entry)
                else:
                    merged.insert(place, entry)
        return merged

    def _merged(
        self,
        parts: Mapping[str, Tensor],
        shared: Sequence[Tensor] | None,
        parameters: Sequence[Tensor] | None,
        mine: list[str],
    ) -> Reach:
        """The leaves that the losses of all processes reach together."""
        count = len(parts)
        local = reach(list(parts.values()), shared)
        dummies = {id(loss) for loss in parts.values()}
        reached = {id(p): mask for p, mask in leaves_of(local.masks) if id(p) not in dummies}
        known = [] if parameters is None else [p for p in parameters if p.requires_grad]
        places = {id(p): k for k, p in enumerate(known)}
        missing = sum(key not in places for key in reached)
        everyone = self._gather([len(known), missing])
        if any(size != len(known) for size, _ in everyone) or any(other for _, other in everyone):
            theirs = "; ".join(f"process {r}: {names}" for r, names in enumerate(self._gather_text(json.dumps(mine))))
            raise RuntimeError(
                "the processes' losses reach different parameters, so that none knows what all of them share. Tasks: "
                f"{theirs}. Pass parameters=model.parameters(), all of them and in the same order everywhere "
                "(detente.step takes those of the optimizer), or compute a loss for every task on every process."
                + (f" {missing} reached here are not in `parameters`." if known and missing else "")
            )
        table = torch.zeros(len(known), count, dtype=torch.uint8)
        for key, mask in reached.items():
            table[places[key], [t for t in range(count) if mask >> t & 1]] = 1
        table = table.to(self.control)
        dist.all_reduce(table, op=dist.ReduceOp.MAX, group=self.group)
        rows = table.tolist()
        leaves = [
            (known[k], tuple(t for t in range(count) if rows[k][t]))
            for k in self._in_order([places[key] for key in reached])
        ]
        chosen = {id(p) for p, tasks in leaves if len(tasks) > 1} if shared is None else {id(p) for p in shared}
        return Reach.of(leaves, chosen, count, local.masks, local.edges)

    def whole(self, losses: Tensor) -> Tensor:
        """Loss values of the whole batch, from those of the processes' parts; in place."""
        return self.total(losses) / self.copies

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def sum_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the processes, as new tensors."""
        sparse = next((tensor for tensor in tensors if tensor.layout != torch.strided), None)
        if sparse is not None:
            raise ValueError(
                f"a parameter of shape {tuple(sparse.shape)} has a sparse gradient, which is not summed over "
                "processes. Build the embedding with sparse=False."
            )
        result = list(tensors)
        waiting = []
        for members in by_kind(tensors):
            flat = torch.cat([real(tensors[k]).reshape(-1) for k in members])
            waiting.append((members, flat, dist.all_reduce(flat, group=self.group, async_op=True)))
        for members, flat, work in waiting:
            work.wait()
            for k, part in zip(members, torch.split(flat, [real(tensors[k]).numel() for k in members]), strict=True):
                result[k] = restored_shape(part, tensors[k])
        return result

    def sum_some(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Sums over the processes where at least one has a tensor."""
        there = torch.tensor([tensor is not None for tensor in tensors], dtype=torch.uint8, device=self.control)
        dist.all_reduce(there, op=dist.ReduceOp.MAX, group=self.group)
        some = [k for k, any_has in enumerate(there.tolist()) if any_has]
        given = [(k, tensors[k]) for k in some]
        result: list[Tensor | None] = [None] * len(tensors)
        sums = self.sum_all([torch.zeros_like(like[k]) if tensor is None else tensor for k, tensor in given])
        for k, tensor in zip(some, sums, strict=True):
            result[k] = tensor
        return result

    def means(self, values: Mapping[str, float], counts: Counts | None, tasks: Sequence[str]) -> dict[str, float]:
        """Loss values of the whole batch from those of this process's samples, of tasks that all agree on."""
        known = dict(zip(values, _counts(values, counts), strict=True))
        # the mean over no samples is often NaN, and NaN times 0 is
        pairs = [(known[t] * values[t], known[t]) if known.get(t) else (0.0, 0.0) for t in tasks]
        sums = self.total(torch.tensor(pairs, dtype=torch.float64, device=self.control)).tolist()
        return {task: total / count if count else 0.0 for task, (total, count) in zip(tasks, sums, strict=True)}

    def check_equal(self, what: Mapping[str, Any]) -> None:
        """Raise on every process where some values differ between them. For debugging: it reads all of them."""
        digests = {name: _digest_of(value) for name, value in what.items()}
        everyone = self._gather(list(digests.values()))
        for k, name in enumerate(digests):
            other = next((r for r, values in enumerate(everyone) if values[k] != everyone[0][k]), None)
            if other is not None:
                raise RuntimeError(
                    f"{name} is not the same on process 0 and on process {other} of {self.size}. Were they given "
                    "different seeds, or checkpoints, or did one skip a step?"
                )

    def _gather(self, numbers: Sequence[int]) -> list[list[int]]:
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.control)
        everyone = mine.new_empty(self.size * len(mine))
        all_gather(everyone, mine, group=self.group)
        return everyone.view(self.size, -1).tolist()

    def _gather_text(self, text: str) -> list[str]:
        data = text.encode()
        sizes = [size for (size,) in self._gather([len(data)])]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        everyone = padded.new_empty(self.size * len(padded)).to(self.control)
        all_gather(everyone, padded.to(self.control), group=self.group)
        rows = everyone.view(self.size, -1).cpu()
        return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]


def _counts(losses: Mapping[str, Any], counts: Counts | None) -> list[float]:
    """Samples behind each loss, checked."""
    if counts is None:
        return [1.0] * len(losses)
    if isinstance(counts, Mapping):
        absent = [task for task in losses if task not in counts]
        if absent:
            raise ValueError(f"counts says nothing about the task {absent[0]!r}; it has {list(counts)}.")
        found = [counts[task] for task in losses]
    else:
        found = [counts] * len(losses)
    for task, count in zip(losses, found, strict=True):
        if isinstance(count, Tensor) or not isinstance(count, int | float) or not 0 <= count < math.inf:
            raise ValueError(
                f"counts must be numbers of samples, at least 0; for {task!r} it is {count!r}. Pass a plain number, "
                "such as len(batch) or int(mask.sum())."
            )
    return [float(count) for count in found]


def _layout(found: Reach) -> list[Any]:
    def described(p: Tensor) -> str:
        return f"{tuple(p.shape)} {p.dtype}"

    return [
        [(described(p), tasks) for p, tasks in zip(found.shared, found.tasks, strict=True)],
        [[described(p) for p in own] for own in found.own],
    ]


def _digest(value: Any) -> int:
    return _number(hashlib.blake2b(repr(value).encode(), digest_size=8))


def _number(digest: Any) -> int:
    return int.from_bytes(digest.digest(), "little", signed=True)


def _digest_of(value: Any) -> int:
    """Of nested dicts and lists of tensors and plain values."""
    digest = hashlib.blake2b(digest_size=8)

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value, key=repr):
                digest.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif isinstance(value, Tensor):
            digest.update(value.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    add(value)
    return _number(digest)


def _refuse_foreign(p: Tensor) -> None:
    """Raise for parameters of engines that own the backward pass."""
    for marks, engine in _FOREIGN.items():
        if any(getattr(p, mark, None) is not None for mark in marks):
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} belongs to {engine}, which does not give the gradients of "
                "single tasks. Use DistributedDataParallel, or fully_shard (FSDP2)."
            )


def _take_over(losses: Mapping[str, Tensor], found: Reach) -> None:
    """Keep DistributedDataParallel(static_graph=True) from reducing what it believes to be its first backward pass."""
    nodes = [get_gradient_edge(loss).node for loss in losses.values()]
    nodes += [child for node in found.masks for child, _ in node.next_functions if child is not None]
    for node in nodes:
        if type(node).__name__ == SINK:
            wrapper = node.ddp_weakref()  # type: ignore[attr-defined]
            wrapper._static_graph_delay_allreduce_enqueued = True


_FOREIGN = {
    ("_is_flat_param", "_fsdp_flattened"): "FullyShardedDataParallel (FSDP1)",
    ("ds_id", "ds_tensor", "_hp_mapping"): "DeepSpeed",
    ("main_grad", "tensor_model_parallel"): "Megatron",
}
