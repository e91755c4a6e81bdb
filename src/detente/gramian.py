"""Gramians of task gradients, and how the shared coordinates split into blocks.

Everything a Gramian method knows of the network is here: ``G[i, j]``, the inner product of the gradients of
tasks ``i`` and ``j``, once for the whole model or once per block of coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Partition", "cosines", "gramian"]

# Columns converted to float64 at a time: 8 bytes x 2^15 x T stays in a core's cache for the usual T.
CHUNK = 1 << 15


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
        return cls(1, tuple(((), torch.tensor(0)) for _ in parameters))

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


def gramian(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """Inner products of the rows of a matrix, accumulated in float64.

    Args:
        rows: ``[T, P]`` of any real floating dtype.
        others: ``[T, P]`` to multiply them with; None for themselves.

    Returns:
        ``[T, T]`` float64 on the device of ``rows``. No float64 copy of ``rows`` is made.

    Example:
        >>> import torch
        >>> gramian(torch.tensor([[1.0, 0.0], [1.0, 2.0]])).tolist()
        [[1.0, 1.0], [1.0, 5.0]]
    """
    if rows.dtype == torch.float64:
        return rows @ (rows if others is None else others).T
    total = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, rows.shape[1], CHUNK):
        wide = rows[:, start : start + CHUNK].double()
        total.addmm_(wide, (wide if others is None else others[:, start : start + CHUNK].double()).T)
    return total


def cosines(gramian: Tensor) -> Tensor:
    """Cosine similarities ``[..., T, T]`` of the tasks' gradients; rows of a zero gradient are zero."""
    norms = gramian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return (gramian * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)).clamp(-1, 1)
