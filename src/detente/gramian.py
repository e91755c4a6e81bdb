"""Gramians of task gradients, and how the shared coordinates split into blocks.

Everything a Gramian method knows of the network is here: ``G[i, j]``, the inner product of the gradients of
tasks ``i`` and ``j``, once for the whole model or once per block of coordinates.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Partition", "cosines", "gramian"]

Array = NDArray[Any]

_COLUMNS = 1 << 21  # converted to float64 at a time on a device, where a call costs more than memory
_CACHED = 1 << 17  # entries in float64 that fit the caches of one core
_FEW = 7  # rows up to which single products are faster than one call of BLAS (for some shapes ten times)


@dataclass(frozen=True)
class Partition:
    """Which block each coordinate of the shared parameters belongs to.

    Attributes:
        count: number of blocks B.
        members: one entry per parameter: ``(dims, index)``. ``index`` is an int64 CPU tensor over the dimensions
            ``dims`` of the parameter with the block of every slice; with ``dims == ()`` it has no dimensions and
            the whole parameter lies in one block.
        owners: optional ``[B]`` int64 tensor: the task (by its position in the step) that a block belongs to, -1
            where it belongs to nobody. Only connection strength uses it.
        measured: positions of the parameters that count in the Gramian; None for all. Only GradNorm uses it.
    """

    count: int
    members: tuple[tuple[tuple[int, ...], Tensor], ...]
    owners: Tensor | None = None
    measured: frozenset[int] | None = None

    @classmethod
    def by_model(cls, parameters: Sequence[Tensor]) -> Partition:
        """All parameters in one block."""
        return cls(1, _WHOLE * len(parameters))

    @classmethod
    def by_layer(cls, parameters: Sequence[Tensor]) -> Partition:
        """One block per parameter tensor."""
        return cls(len(parameters), tuple(((), torch.tensor(k)) for k in range(len(parameters))))

    @classmethod
    def by_channel(cls, parameters: Sequence[Tensor], dim: int = 0) -> Partition:
        """One block per channel of every tensor: index of dimension ``dim`` (the last one where there are fewer)."""
        members, count = [], 0
        for p in parameters:
            where = min(dim, p.dim() - 1)
            size = p.shape[where] if p.dim() else 1
            index = torch.arange(count, count + size)
            members.append(((where,), index) if p.dim() else ((), index[0]))
            count += size
        return cls(count, tuple(members))


_WHOLE = (((), torch.tensor(0)),)


def gramian(rows: Tensor | Sequence[Tensor], others: Tensor | Sequence[Tensor] | None = None) -> Tensor:
    """Inner products of the rows of a matrix, accumulated in float64.

    Args:
        rows: ``[T, P]`` of any real floating dtype, or T tensors ``[P]``.
        others: what to multiply them with, in the same form; None for themselves.

    Returns:
        ``[T, T]`` float64 on the device of ``rows``. No float64 copy of ``rows`` is made. On the host float32 takes a
        third of the time where numba is installed (``pip install 'detente[fast]'``).

    Example:
        >>> import torch
        >>> gramian(torch.tensor([[1.0, 0.0], [1.0, 2.0]])).tolist()
        [[1.0, 1.0], [1.0, 5.0]]
    """
    if isinstance(rows, Tensor) and rows.dtype == torch.float64:
        return rows @ (rows if others is None else _matrix(others)).T
    if rows[0].device.type == "cpu":
        compiled = _compiled() if others is None and rows[0].dtype == torch.float32 else None
        laid_out = rows.is_contiguous() if isinstance(rows, Tensor) else all(row.is_contiguous() for row in rows)
        if compiled is not None and laid_out:
            given = _arrays(rows)
            return torch.from_numpy(compiled.gramian(given if isinstance(given, np.ndarray) else tuple(given)))
        with np.errstate(over="ignore", invalid="ignore"):  # the result shows it
            return torch.from_numpy(_on_host(rows, others))
    return _on_device(_matrix(rows), None if others is None else _matrix(others))


@cache
def _compiled() -> ModuleType | None:
    """The compiled products, where numba is installed and has a place to keep them (it raises RuntimeError else)."""
    try:
        return importlib.import_module("detente.compiled")
    except (ImportError, RuntimeError):
        return None


def _matrix(rows: Tensor | Sequence[Tensor]) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.stack(list(rows))


def _on_device(rows: Tensor, others: Tensor | None) -> Tensor:
    total = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, rows.shape[1], _COLUMNS):
        wide = rows[:, start : start + _COLUMNS].double()
        total.addmm_(wide, (wide if others is None else others[:, start : start + _COLUMNS].double()).T)
    return total


def _on_host(rows: Tensor | Sequence[Tensor], others: Tensor | Sequence[Tensor] | None) -> Array:
    """With NumPy, in pieces that the cache holds.

    ``dot`` and not ``@``, whose routine for the product of a matrix with itself takes four times as long for a few long
    rows.
    """
    count, length = len(rows), rows[0].numel()
    total: Array = np.zeros((count, count))
    wide, against = (_SCRATCH.whole(count),) * 2 if others is None else _SCRATCH.halves(count)
    step = wide.shape[1]
    given, theirs = _arrays(rows), None if others is None else _arrays(others)
    for start in range(0, length, step):
        a = _filled(wide[:, : length - start], given, start)
        if theirs is not None:
            total += a.dot(_filled(against[:, : length - start], theirs, start).T)
        elif count > _FEW:
            total += a.dot(a.T)
        else:
            for i, left in enumerate(a):
                for j in range(i + 1):
                    total[i, j] += left.dot(a[j])
    if others is None and count > _FEW:
        total = (total + total.T) / 2
    elif others is None:
        for i in range(count):
            total[:i, i] = total[i, :i]
    return total


def _arrays(rows: Tensor | Sequence[Tensor]) -> Array | list[Array]:
    """As NumPy knows them, which knows no bfloat16: those are converted piece by piece."""
    if rows[0].dtype == torch.bfloat16:
        return list(rows)
    return rows.numpy() if isinstance(rows, Tensor) else [row.numpy() for row in rows]


def _filled(into: Array, rows: Array | list[Array], start: int) -> Array:
    """Some columns of the rows, from ``start``, in float64."""
    stop = start + into.shape[1]
    if isinstance(rows, np.ndarray):
        into[...] = rows[:, start:stop]
        return into
    for place, row in zip(into, rows, strict=True):
        place[...] = row[start:stop].float().numpy() if isinstance(row, Tensor) else row[start:stop]
    return into


class _Scratch(threading.local):
    """Memory of a thread's own that stays: a page that is touched for the first time costs more than its product."""

    def __init__(self) -> None:
        self.memory = np.empty(_CACHED)

    def whole(self, count: int) -> Array:
        if 16 * count > len(self.memory):
            self.memory = np.empty(32 * count)
        columns = len(self.memory) // (count if count <= _FEW else 2 * count) // 8 * 8
        return self.memory[: count * columns].reshape(count, columns)

    def halves(self, count: int) -> tuple[Array, Array]:
        both = self.whole(2 * count)
        return both[:count], both[count:]


_SCRATCH = _Scratch()


def cosines(gramian: Tensor) -> Tensor:
    """Cosine similarities ``[..., T, T]`` of the tasks' gradients; rows of a zero gradient are zero."""
    norms = gramian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return (gramian * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)).clamp(-1, 1)
