"""Task gradients summed over processes: whole rows on each, or every process with its own columns of all rows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from detente.engine.jacobian import Jacobian, real
from detente.gramian import Partition

__all__ = ["Scattered", "Summed", "all_gather", "by_kind", "reduce_scatter", "restored_shape"]

# their names since torch 2.13, where the old ones warn
all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class Group(Protocol):
    """What rows need to know of the processes that sum them."""

    group: dist.ProcessGroup | None
    size: int
    gloo: bool


def by_kind(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the tensors that can be laid end to end: of one real dtype on one device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for k, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype.to_real(), tensor.device), []).append(k)
    return list(kinds.values())


def restored_shape(flat: Tensor, like: Tensor) -> Tensor:
    """Numbers laid end to end as a tensor of the shape and kind of another."""
    return torch.view_as_complex(flat.view(*like.shape, 2)) if like.is_complex() else flat.view(like.shape)


class Summed(Jacobian):
    """Rows summed over the processes, all of them on every process.

    For methods and blocks that need whole rows: T P numbers each, and as much traffic as T reductions.
    """

    def __init__(self, parameters: Sequence[Tensor], count: int, processes: Group, **options: Any) -> None:
        super().__init__(parameters, count, **options)
        self.processes = processes
        self._waiting: list[dist.Work] = []

    def write(self, row: int, gradients: Sequence[Tensor | None], *, add: bool = False, more: bool = False) -> None:
        super().write(row, gradients, add=add)
        if more:
            return
        for buffer in super().buffers:
            work = dist.all_reduce(buffer[row], group=self.processes.group, async_op=True)
            assert work is not None
            self._waiting.append(work)

    @property
    def buffers(self) -> list[Tensor]:
        self._settle()
        return super().buffers

    def gramian(self, partition: Partition, other: Jacobian | None = None) -> Tensor:
        self._settle()
        if isinstance(other, Summed):
            other._settle()
        return super().gramian(partition, other)

    def _settle(self) -> None:
        while self._waiting:
            self._waiting.pop().wait()


class Scattered:
    """Rows summed over the processes, each keeping 1/R of the columns.

    A row travels in buckets while the next task's backward pass runs: every process receives its columns of a bucket
    from all others and adds them up. The Gramian is then a sum over the processes of T x T matrices, and only the
    update is gathered: (T + 1) P numbers instead of 2 T P, and T P / R in memory.

    Args:
        parameters: the shared parameters.
        count: number of rows T.
        processes: that sum them.
        storage: dtype of the rows; None is that of the parameters.
    """

    partial = True

    def __init__(
        self,
        parameters: Sequence[Tensor],
        count: int,
        processes: Group,
        storage: torch.dtype | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.kinds = [
            _Kind(members, [self.parameters[k] for k in members], processes) for members in by_kind(self.parameters)
        ]
        self.columns = Jacobian([kind.columns for kind in self.kinds], count, storage=storage)
        self.whole = Partition.by_model(self.columns.parameters)

    def write(self, row: int, gradients: Sequence[Tensor | None], *, add: bool = False, more: bool = False) -> None:
        """Send the gradient of one task, one tensor per parameter; None is zero. With ``add`` to what is there."""
        for kind, rows in zip(self.kinds, self.columns.buffers, strict=True):
            kind.send([gradients[k] for k in kind.members], rows[row], add=add)

    @property
    def buffers(self) -> list[Tensor]:
        """This process's columns: ``[T, P_k / R]`` per dtype and device."""
        return self._settled().buffers

    def gramian(self, partition: Partition, other: Scattered | None = None) -> Tensor:
        """This process's part ``[1, T, T]`` of the Gramian, or of the products with the rows of another batch."""
        return self._settled().gramian(self.whole, None if other is None else other._settled())

    def combine(self, weights: Tensor, partition: Partition) -> list[Tensor]:
        """The update ``J'a``, one tensor per parameter, from weights ``[1, T]``."""
        updates = list(self.parameters)
        for kind, part in zip(self.kinds, self._settled().combine(weights, self.whole), strict=True):
            for k, update in zip(kind.members, kind.gather(part), strict=True):
                updates[k] = update
        return updates

    def _settled(self) -> Jacobian:
        for kind in self.kinds:
            kind.settle()
        return self.columns


class _Kind:
    """The parameters of one dtype on one device, laid end to end and cut into buckets."""

    def __init__(self, members: list[int], parameters: Sequence[Tensor], processes: Group) -> None:
        self.members = members
        self.parameters = parameters
        self.processes = processes
        self.sizes = [real(p).numel() for p in parameters]
        self.total = sum(self.sizes)
        most = min(max(self.total / _PARTS, _SMALL), _BUCKET)
        share = math.ceil(most / processes.size)
        whole, rest = divmod(self.total, share * processes.size)
        # per bucket, the columns that each process keeps
        self.shares = [share] * whole + ([math.ceil(rest / processes.size)] if rest else [])
        one = parameters[0].new_empty(1, dtype=parameters[0].dtype.to_real())
        self.columns = one.expand(sum(self.shares))  # no memory: only its shape is used
        self._free: list[Tensor] = []
        self._waiting: deque[tuple[dist.Work, Tensor, Tensor, Tensor, bool]] = deque()

    def send(self, gradients: Sequence[Tensor | None], row: Tensor, *, add: bool) -> None:
        """Add up over the processes; this one's columns go into ``row`` once :meth:`settle` has been called."""
        pieces = _Pieces(
            self.columns.new_zeros(1).expand(size) if g is None else real(g).reshape(-1)
            for g, size in zip(gradients, self.sizes, strict=True)
        )
        places = torch.split(row, self.shares)
        for place in places:
            bucket = self._buffer(len(place) * self.processes.size)
            pieces.fill(bucket)
            self._launch(bucket, place, add)

    def _launch(self, bucket: Tensor, place: Tensor, add: bool) -> None:
        group = self.processes.group
        if self.processes.gloo and bucket.device.type == "cpu":
            # gloo's own reduce_scatter moves as much as an all_reduce
            received = self._buffer(len(bucket))
            work = dist.all_to_all_single(received, bucket, group=group, async_op=True)
        else:
            received = self._buffer(len(place))
            work = reduce_scatter(received, bucket, group=group, async_op=True)
        assert work is not None
        self._waiting.append((work, bucket, received, place, add))
        if len(self._waiting) >= _PARTS // 2:
            self._arrive()

    def _arrive(self) -> None:
        work, bucket, received, place, add = self._waiting.popleft()
        work.wait()
        parts = received.view(-1, len(place))
        if add:
            place.add_(parts.sum(0))
        elif len(parts) == 1 or place.dtype != parts.dtype:
            place.copy_(parts.sum(0))
        else:
            torch.sum(parts, 0, out=place)
        self._free += [bucket, received]

    def settle(self) -> None:
        """Wait for everything that is on its way."""
        while self._waiting:
            self._arrive()
        self._free.clear()

    def _buffer(self, length: int) -> Tensor:
        for k, buffer in enumerate(self._free):
            if len(buffer) == length:
                return self._free.pop(k)
        return self.columns.new_empty(length)

    def gather(self, mine: Tensor) -> list[Tensor]:
        """The whole update from this process's columns ``[P_k / R]``, one tensor per parameter."""
        flat = mine.new_empty(len(mine) * self.processes.size)
        wholes = torch.split(flat, [share * self.processes.size for share in self.shares])
        for whole, part in zip(wholes, torch.split(mine, self.shares), strict=True):
            all_gather(whole, part, group=self.processes.group)
        parts = torch.split(flat[: self.total], self.sizes)
        return [restored_shape(part, p) for part, p in zip(parts, self.parameters, strict=True)]


class _Pieces:
    """Flat tensors laid end to end, copied away in pieces."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = deque(tensors)

    def fill(self, bucket: Tensor) -> None:
        """The next entries into a bucket, with zeros behind the last one."""
        filled = 0
        while filled < len(bucket) and self.tensors:
            piece = self.tensors.popleft()
            room = len(bucket) - filled
            if len(piece) > room:
                self.tensors.appendleft(piece[room:])
                piece = piece[:room]
            bucket[filled : filled + len(piece)] = piece
            filled += len(piece)
        bucket[filled:].zero_()


_BUCKET = 1 << 22  # entries of a bucket
_SMALL = 1 << 16
_PARTS = 8  # of a row at least, so that the buckets on their way, sent and received, take no more than the row
