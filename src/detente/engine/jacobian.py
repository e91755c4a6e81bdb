"""The task gradients of the shared parameters: written once, read once for the Gramian and once for the update."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from detente.gramian import Partition, gramian

__all__ = ["Jacobian", "real"]


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


class Jacobian:
    """Rows g_t of J: one preallocated ``[T, P]`` buffer per dtype and device, except where other ways are cheaper.

    Args:
        parameters: the shared parameters.
        count: number of rows T.
        inputs: ``[N, i]`` X by position of the parameters ``[o, i]`` whose gradients are products ``D_t' X``. Their
            rows are kept as D_t ``[N, o]``, and only the update is multiplied out.
        fresh: positions of the parameters whose gradients are kept as the tensors that they come in, without a copy.
            The update overwrites them, so nobody else may hold them.
        storage: dtype of the buffers; None is that of the parameters.
        shares: with several processes, the share of each parameter in a sum over them; the Gramians are then parts.
        rows: ``[T, P]`` of the only parameter ``[P]``, where they are there already.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        count: int,
        inputs: Mapping[int, Tensor] | None = None,
        fresh: Iterable[int] = (),
        storage: torch.dtype | None = None,
        shares: Sequence[float] | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.count = count
        self.partial = shares is not None  # whether a Gramian is to be summed over the processes
        self.shares = [1.0] * len(self.parameters) if shares is None else list(shares)
        self.devices = [p.device for p in self.parameters]
        self.fresh: dict[int, list[Tensor | None]] = {k: [None] * count for k in fresh}
        self.inputs = dict(inputs or {})
        self.outputs = {k: x.new_empty(count, len(x), self.parameters[k].shape[0]) for k, x in self.inputs.items()}
        kinds: dict[tuple[torch.dtype, torch.device, float], list[int]] = {}
        for k, p in enumerate(self.parameters):
            if k not in self.inputs and k not in self.fresh:
                kinds.setdefault((p.dtype.to_real(), self.devices[k], self.shares[k]), []).append(k)
        self.shapes = [(*p.shape, 2) if p.is_complex() else p.shape for p in self.parameters]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.groups: list[tuple[list[int], Tensor]] = []
        for (dtype, device, _), members in kinds.items():
            length = sum([self.sizes[k] for k in members])
            if rows is None:
                rows = _memory(count * length, storage or dtype, device).view(count, length)
            self.groups.append((members, rows))
            rows = None

    @cached_property
    def slices(self) -> list[Tensor]:
        """Views of the buffers ``[T, *shape]``, one per parameter."""
        found = [_NOTHING] * len(self.parameters)
        for members, buffer in self.groups:
            parts = buffer.split_with_sizes([self.sizes[k] for k in members], 1)
            for k, part in zip(members, parts, strict=True):
                found[k] = part.view(self.count, *self.shapes[k])
        return found

    def release(self) -> None:
        """Let the next step write into the same memory: what is touched for the first time costs more than its use."""
        for _, buffer in self.groups:
            if buffer.device.type == "cpu" and buffer.numel() <= _KEPT:
                _SPARE.memory = buffer.view(-1)

    @cached_property
    def places(self) -> dict[int, tuple[Tensor, ...]]:
        """The slices of the buffers once more, one view per row."""
        return {k: self.slices[k].unbind(0) for members, _ in self.groups for k in members}

    def write(self, row: int, gradients: Sequence[Tensor | None], *, add: bool = False, more: bool = False) -> None:
        """Write the gradient of one task, one tensor per parameter (D_t for a product); None is zero.

        With ``add`` to what is there already, which neither products nor kept gradients can; ``more`` is to come.
        """
        for k, kept in self.outputs.items():
            output = gradients[k]
            if output is None:
                kept[row].zero_()
            else:
                kept[row].copy_(output)
        for k, tensors in self.fresh.items():
            gradient = gradients[k]
            tensors[row] = None if gradient is None else gradient.contiguous()
        if not add and self._laid_out(row, gradients):
            return
        places, values = [], []
        for k, rows in self.places.items():
            gradient = gradients[k]
            if gradient is not None:
                places.append(rows[row])
                values.append(real(gradient))
            elif not add:
                rows[row].zero_()
        if places and add:
            torch._foreach_add_(places, [value.to(place.dtype) for place, value in zip(places, values, strict=True)])
        elif places:
            torch._foreach_copy_(places, values)

    def _laid_out(self, row: int, gradients: Sequence[Tensor | None]) -> bool:
        """Write a row with one call, where gradients need only be laid end to end."""
        if len(self.groups) != 1:
            return False
        members, buffer = self.groups[0]
        parts = []
        for k in members:
            gradient = gradients[k]
            if gradient is None or gradient.dtype != buffer.dtype or not gradient.is_contiguous():
                return False
            parts.append(gradient.view(-1))
        torch.cat(parts, out=buffer[row])
        return True

    def clear(self, k: int, start: int, stop: int) -> None:
        """Zero gradients of one parameter in these rows."""
        (self.outputs if k in self.outputs else self.slices)[k][start:stop].zero_()

    @property
    def buffers(self) -> list[Tensor]:
        """The rows themselves: ``[T, P_k]`` per dtype and device."""
        return [buffer for _, buffer in self.groups]

    def gramian(self, partition: Partition, other: Jacobian | None = None) -> Tensor:
        """Gramians of the blocks, ``[B, T, T]`` float64; on the parameters' device where there is only one.

        With ``other``, the products ``J other'`` with the rows of another batch instead.
        """
        measured = partition.measured
        alone = len(self.groups) == 1 and not (self.inputs or self.fresh or self.partial)
        if alone and other is None and partition.count == 1 and measured is None:
            return gramian(self.groups[0][1]).unsqueeze(0)
        devices = set(self.devices)
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        second = self if other is None else other
        blocks = torch.zeros(partition.count, self.count, self.count, dtype=torch.float64, device=device)
        if partition.count == 1 and measured is None:
            for (members, buffer), (_, against) in zip(self.groups, second.groups, strict=True):
                part = gramian(buffer, None if other is None else against).to(device)
                blocks[0].add_(part, alpha=self.shares[members[0]])
            for k in (*self.inputs, *self.fresh):
                blocks[0] += self._of_one(k, device)
            return blocks
        places, products = [], []
        for k, ((dims, index), rows) in enumerate(zip(partition.members, self.slices, strict=True)):
            if measured is not None and k not in measured:
                continue
            if dims == () and other is None:
                blocks[int(index)].add_(self._of_one(k, device), alpha=self.shares[k])
            else:
                part = _by_slice(rows, dims).double()
                against = part if other is None else _by_slice(second.slices[k], dims).double()
                places.append(index.reshape(-1))
                products.append((part @ against.transpose(1, 2)).to(device) * self.shares[k])
        if places:
            _add(blocks, torch.cat(places), torch.cat(products))
        return blocks

    def _of_one(self, k: int, device: torch.device) -> Tensor:
        """The part ``[T, T]`` that one parameter has in the Gramian."""
        if k in self.inputs:
            return self._of_product(k).to(device)
        if k not in self.fresh:
            return gramian(_by_slice(self.slices[k], ())[0]).to(device)
        there = [t for t, row in enumerate(self.fresh[k]) if row is not None]
        total = torch.zeros(self.count, self.count, dtype=torch.float64, device=device)
        if there:
            part = gramian([row.view(-1) for row in self.fresh[k] if row is not None]).to(device)
            place = torch.tensor(there, device=device)
            total[place.unsqueeze(1), place] = part
        return total

    def _of_product(self, k: int) -> Tensor:
        """``<D_s' X, D_t' X> = <D_s, X X' D_t>``, in float64 because the terms may cancel."""
        x, kept = self.inputs[k].double(), self.outputs[k].double()
        product = kept.flatten(1) @ (x @ x.T @ kept).flatten(1).T
        return (product + product.T) / 2

    def combine(self, weights: Tensor, partition: Partition) -> list[Tensor]:
        """The update ``J'a``, one tensor per parameter, from weights ``[B, T]``."""
        updates = self._combine(weights, partition)
        for k, p in enumerate(self.parameters):
            if p.is_complex():
                updates[k] = torch.view_as_complex(updates[k].clone(memory_format=torch.contiguous_format))
        return updates

    def _combine(self, weights: Tensor, partition: Partition) -> list[Tensor]:
        updates = [_NOTHING] * len(self.parameters)
        chosen = self._chosen(weights, partition)
        for k, x in self.inputs.items():
            updates[k] = torch.tensordot(chosen[k][0].to(x.dtype), self.outputs[k], 1).T @ x
        for k, tensors in self.fresh.items():
            updates[k] = _mixed(tensors, chosen[k][0].tolist(), self.parameters[k])
        if partition.count == 1:
            for members, buffer in self.groups:
                combined = _weighted(chosen[members[0]][0], buffer, self.parameters[members[0]].dtype.to_real())
                parts = combined.split_with_sizes([self.sizes[k] for k in members])
                for k, part in zip(members, parts, strict=True):
                    updates[k] = part.view(self.shapes[k])
        else:
            for k, ((dims, _), rows) in enumerate(zip(partition.members, self.slices, strict=True)):
                if k in self.inputs or k in self.fresh:
                    continue
                wide, dtype = _wide(rows.dtype), self.parameters[k].dtype.to_real()
                update = (chosen[k].to(wide).unsqueeze(1) @ _by_slice(rows, dims).to(wide)).to(dtype)
                shape = rows.shape[1:]
                front = [shape[d] for d in dims] + [size for d, size in enumerate(shape) if d not in dims]
                updates[k] = update.view(front).movedim(tuple(range(len(dims))), dims)
        return updates

    def _chosen(self, weights: Tensor, partition: Partition) -> list[Tensor]:
        """Of every parameter the weights ``[slices, T]``, on its device: one transfer to each device."""
        devices = set(self.devices)
        if partition.count == 1:
            there = {device: weights.to(device) for device in devices}
            return [there[device] for device in self.devices]
        places = [index.reshape(-1) for _, index in partition.members]
        taken = weights[torch.cat(places)]
        parts = {device: torch.split(taken.to(device), [len(place) for place in places]) for device in devices}
        return [parts[device][k] for k, device in enumerate(self.devices)]


_NOTHING = torch.empty(0)
_KEPT = 1 << 22  # entries of a buffer that are worth keeping: of larger ones the gradients themselves are the cost


class _Spare(threading.local):
    """Memory of a thread's last step."""

    memory: Tensor = _NOTHING


_SPARE = _Spare()


def _memory(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for ``size`` entries, with anything in it."""
    spare = _SPARE.memory
    if device.type == "cpu" and spare.dtype == dtype and size <= len(spare) <= 2 * size:
        _SPARE.memory = _NOTHING  # nobody else gets it until it is released
        return spare[:size]
    return torch.empty(size, dtype=dtype, device=device)


def _add(blocks: Tensor, places: Tensor, products: Tensor) -> None:
    """Add products of slices to their blocks; an index goes to the device only where it is no plain range."""
    start = int(places[0]) if len(places) else 0
    if torch.equal(places, torch.arange(start, start + len(places))):
        blocks[start : start + len(places)] += products
    else:
        blocks.index_add_(0, places.to(blocks.device), products)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which dtype rows are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weighted(weights: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The weighted sum ``[P]`` of the rows, summed in float32 or more."""
    weights = weights.to(_wide(rows.dtype))
    if weights.dtype == rows.dtype:
        return (weights @ rows).to(dtype)
    result = torch.empty(rows.shape[1], dtype=dtype, device=rows.device)
    size = _PIECE if rows.device.type == "cpu" else _LARGE_PIECE
    for place, piece in zip(torch.split(result, size), torch.split(rows, size, dim=1), strict=True):
        place.copy_(weights @ piece.to(weights.dtype))
    return result


def _mixed(rows: Sequence[Tensor | None], weights: Sequence[float], parameter: Tensor) -> Tensor:
    """The weighted sum of the rows, in the memory of the first: fresh memory costs more than the sum."""
    there = [(row.view(-1), weight) for row, weight in zip(rows, weights, strict=True) if row is not None]
    if not there:
        return torch.zeros_like(parameter)
    pieces = [torch.split(row, _PIECE) for row, _ in there]
    for piece, *others in zip(*pieces, strict=True):
        piece.mul_(there[0][1])
        for other, (_, weight) in zip(others, there[1:], strict=True):
            piece.add_(other, alpha=weight)
    return there[0][0].view(parameter.shape)


_PIECE = 1 << 16  # entries that are summed while they are in the cache
_LARGE_PIECE = 1 << 21  # on a device, where a call costs more than memory


def _by_slice(rows: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``[T, *shape]`` as ``[slices, T, rest]``, one slice per index of the dimensions ``dims`` of the parameter."""
    slices = math.prod(rows.shape[d + 1] for d in dims)
    front = rows.movedim(tuple(d + 1 for d in dims), tuple(range(len(dims))))
    return front.reshape(slices, rows.shape[0], rows[0].numel() // max(slices, 1))
