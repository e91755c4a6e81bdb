"""The task gradients of the shared parameters: written once, read once for the Gramian and once for the update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from detente.gramian import Partition, gramian

__all__ = ["Jacobian"]


def _flat(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)


class Jacobian:
    """Rows g_t of J, one preallocated ``[T, P]`` buffer per dtype and device of the parameters.

    Args:
        parameters: the shared parameters.
        count: number of rows T.
        inputs: ``[N, i]`` X by position of the parameters ``[o, i]`` whose gradients are products ``D_t' X``. Their
            rows are kept as D_t ``[N, o]``, and only the update is multiplied out.
    """

    def __init__(self, parameters: Sequence[Tensor], count: int, inputs: Mapping[int, Tensor] | None = None) -> None:
        self.parameters = list(parameters)
        self.count = count
        self.inputs = dict(inputs or {})
        self.outputs = {k: x.new_empty(count, len(x), self.parameters[k].shape[0]) for k, x in self.inputs.items()}
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for k, p in enumerate(self.parameters):
            if k in self.inputs:
                continue
            dtype = p.dtype.to_real() if p.is_complex() else p.dtype
            kinds.setdefault((dtype, p.device), []).append(k)
        self.groups = []
        self.slices: list[Tensor] = [torch.empty(0)] * len(self.parameters)  # [T, *shape] views, one per parameter
        for (dtype, device), members in kinds.items():
            sizes = [self.parameters[k].numel() * (2 if self.parameters[k].is_complex() else 1) for k in members]
            buffer = torch.empty(count, sum(sizes), dtype=dtype, device=device)
            self.groups.append((members, buffer))
            for k, part in zip(members, torch.split(buffer, sizes, dim=1), strict=True):
                p = self.parameters[k]
                self.slices[k] = part.view(count, *p.shape, *([2] if p.is_complex() else []))

    def write(self, row: int, gradients: Sequence[Tensor | None]) -> None:
        """Write the gradient of one task, one tensor per parameter (D_t for a product); None is zero."""
        for k, kept in self.outputs.items():
            output = gradients[k]
            if output is None:
                kept[row].zero_()
            else:
                kept[row].copy_(output)
        for members, buffer in self.groups:
            parts = [gradients[k] for k in members]
            if any(g is None for g in parts):
                buffer[row].zero_()
                for k, g in zip(members, parts, strict=True):
                    if g is not None:
                        self.slices[k][row].view(-1).copy_(_flat(g))
            else:
                torch.cat([_flat(g) for g in parts if g is not None], out=buffer[row])

    def write_all(self, gradients: Sequence[Tensor | None]) -> None:
        """Write the gradients of all tasks, ``[T, *shape]`` per parameter (``[T, N, o]`` for a product)."""
        for k, gradient in enumerate(gradients):
            if k in self.outputs:
                self.outputs[k] = torch.zeros_like(self.outputs[k]) if gradient is None else gradient
            elif gradient is None:
                self.slices[k].zero_()
            else:
                self.slices[k].copy_(gradient)

    @property
    def buffers(self) -> list[Tensor]:
        """The rows themselves: ``[T, P_k]`` per dtype and device."""
        return [buffer for _, buffer in self.groups]

    def gramian(self, partition: Partition, other: Jacobian | None = None) -> Tensor:
        """Gramians of the blocks, ``[B, T, T]`` float64; on the parameters' device where there is only one.

        With ``other``, the products ``J other'`` with the rows of another batch instead.
        """
        devices = {p.device for p in self.parameters}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        second = self if other is None else other
        measured = partition.measured
        with torch.autocast(device.type, enabled=False):
            if partition.count == 1 and measured is None:
                total = torch.zeros(self.count, self.count, dtype=torch.float64, device=device)
                for buffer, against in zip(self.buffers, second.buffers, strict=True):
                    total += gramian(buffer, None if other is None else against).to(device)
                for k in self.inputs:
                    total += self._of_product(k).to(device)
                return total.unsqueeze(0)
            blocks = torch.zeros(partition.count, self.count, self.count, dtype=torch.float64, device=device)
            for k, ((dims, index), rows) in enumerate(zip(partition.members, self.slices, strict=True)):
                if measured is not None and k not in measured:
                    continue
                if k in self.inputs:
                    blocks[int(index)] += self._of_product(k).to(device)
                else:
                    part = _by_slice(rows, dims).double()
                    against = part if other is None else _by_slice(second.slices[k], dims).double()
                    blocks.index_add_(0, index.reshape(-1).to(device), (part @ against.transpose(1, 2)).to(device))
            return blocks

    def _of_product(self, k: int) -> Tensor:
        """``<D_s' X, D_t' X> = <D_s, X X' D_t>``, in float64 because the terms may cancel."""
        x, kept = self.inputs[k].double(), self.outputs[k].double()
        product = kept.flatten(1) @ (x @ x.T @ kept).flatten(1).T
        return (product + product.T) / 2

    def combine(self, weights: Tensor, partition: Partition) -> list[Tensor]:
        """The update ``J'a``, one tensor per parameter, from weights ``[B, T]``."""
        device = self.parameters[0].device.type
        with torch.autocast(device, enabled=False):
            updates = self._combine(weights, partition)
        return [
            torch.view_as_complex(u.clone(memory_format=torch.contiguous_format)) if p.is_complex() else u
            for p, u in zip(self.parameters, updates, strict=True)
        ]

    def _combine(self, weights: Tensor, partition: Partition) -> list[Tensor]:
        updates: list[Tensor] = list(self.slices)
        for k, x in self.inputs.items():
            block = 0 if partition.count == 1 else int(partition.members[k][1])
            mixed = torch.tensordot(weights[block].to(x.device, x.dtype), self.outputs[k], 1)
            updates[k] = mixed.T @ x
        if partition.count == 1:
            for members, buffer in self.groups:
                combined = weights[0].to(buffer.device, buffer.dtype) @ buffer
                shapes = [self.slices[k].shape[1:] for k in members]
                for k, part in zip(members, torch.split(combined, [s.numel() for s in shapes]), strict=True):
                    updates[k] = part.view(self.slices[k].shape[1:])
        else:
            for k, ((dims, index), rows) in enumerate(zip(partition.members, self.slices, strict=True)):
                if k in self.inputs:
                    continue
                chosen = weights[index.reshape(-1)].to(rows.device, rows.dtype)
                update = chosen.unsqueeze(1) @ _by_slice(rows, dims)
                shape = rows.shape[1:]
                front = [shape[d] for d in dims] + [size for d, size in enumerate(shape) if d not in dims]
                updates[k] = update.view(front).movedim(tuple(range(len(dims))), dims)
        return updates


def _by_slice(rows: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``[T, *shape]`` as ``[slices, T, rest]``, one slice per index of the dimensions ``dims`` of the parameter."""
    slices = math.prod(rows.shape[d + 1] for d in dims)
    front = rows.movedim(tuple(d + 1 for d in dims), tuple(range(len(dims))))
    return front.reshape(slices, rows.shape[0], rows[0].numel() // max(slices, 1))
