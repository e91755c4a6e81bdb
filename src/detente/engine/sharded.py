"""Parameters that are spread over processes by PyTorch: FSDP2, hybrid sharding, tensor parallelism, and both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from detente.engine.graph import Reach
from detente.engine.jacobian import Jacobian
from detente.gramian import Partition

__all__ = ["Layout", "gathered", "layout"]


class Layout:
    """How the parameters of a step are spread.

    Attributes:
        groups: the FSDP2 parameter groups behind the step; none under tensor parallelism alone. Their gradients exist
            only after a whole backward pass, in ``.grad`` of the sharded parameters.
    """

    def __init__(self, groups: Sequence[Any]) -> None:
        self.groups = list(groups)

    def rows(
        self, parameters: Sequence[Tensor], count: int, storage: torch.dtype | None, size: int, *, whole: bool
    ) -> Jacobian:
        """Rows of what this process holds; their Gramian is a part of the whole one."""
        if whole:
            raise RuntimeError(
                "this method rewrites the task gradients as a whole, and under fully_shard and tensor parallelism no "
                "process has them. Use DistributedDataParallel for it."
            )
        return _Parts(
            [_local(p) for p in parameters], count, storage=storage, shares=[_share(p, size) for p in parameters]
        )

    def restored(self, parameters: Sequence[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
        """This process's parts of gradients, as gradients of the parameters."""
        return [_like(p, u) for p, u in zip(parameters, updates, strict=True)]

    def parts(self, partition: Partition, parameters: Sequence[Tensor]) -> Partition:
        """The blocks of what this process holds, from those of whole parameters."""
        members = []
        for p, (dims, index) in zip(parameters, partition.members, strict=True):
            if isinstance(p, DTensor):
                for position, d in enumerate(dims):
                    index = index.index_select(position, _coordinates(p, d))
            members.append((dims, index))
        return replace(partition, members=tuple(members))

    def gradients(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        factors: Sequence[Tensor] | None,
        keep: bool,
    ) -> list[Tensor | None]:
        """As ``torch.autograd.grad``, averaged over the processes that share the data."""
        if not self.groups:
            found = torch.autograd.grad(outputs, inputs, factors, retain_graph=keep, allow_unused=True)
            return [None if g is None else _placed(g, p) for g, p in zip(found, inputs, strict=True)]
        managed = [record.sharded_param for group in self.groups for record in group.fsdp_params]
        before = [p.grad for p in managed]
        resharding = [group.reshard_after_backward for group in self.groups]
        try:
            for p in managed:
                p.grad = None
            if keep:
                for group in self.groups:
                    group.reshard_after_backward = False  # the next task's pass needs the gathered parameters again
            torch.autograd.backward(outputs, factors, retain_graph=keep)
            return [p.grad for p in inputs]
        finally:
            for p, grad in zip(managed, before, strict=True):
                p.grad = grad
            for group, reshard in zip(self.groups, resharding, strict=True):
                group.reshard_after_backward = reshard


def layout(found: Reach, size: int) -> tuple[Layout, Reach] | None:
    """How the leaves of a step are spread, and the same leaves as the user and the optimizer know them.

    None where they are ordinary tensors.

    Args:
        found: the leaves as the graph knows them.
        size: number of processes.

    Raises:
        RuntimeError: some parameters are spread and others are not, or over different processes.
    """
    managed = _managed()
    leaves = found.leaves
    groups = list({id(managed[id(p)][0]): managed[id(p)][0] for p in leaves if id(p) in managed}.values())
    if not groups and not any(isinstance(p, DTensor) for p in leaves):
        return None

    def known(p: Tensor) -> Tensor:
        entry = managed.get(id(p))
        result: Tensor = p if entry is None else entry[1].sharded_param
        if groups and entry is None:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} is outside of fully_shard, while others are inside: nobody "
                "averages its gradient. Call fully_shard on the whole model last."
            )
        return result

    spread = replace(found, shared=[known(p) for p in found.shared], own=[[known(p) for p in own] for own in found.own])
    # under FSDP2 with tensor parallelism, what is not cut by the latter lies on the data dimension of the mesh alone
    largest = max(p.device_mesh.size() for p in spread.leaves if isinstance(p, DTensor))
    if largest != size:
        raise RuntimeError(
            f"the parameters are spread over {largest} of {size} processes, and nothing says what the others do. Put "
            'them on one mesh of all processes, such as init_device_mesh(device, (data, model), mesh_dim_names=("data",'
            ' "model")), and fully_shard the model over its data dimension; or pass group=.'
        )
    return Layout(groups), spread


def gathered(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Parameters as the graph knows them, from those that the optimizer knows."""
    known = {id(record.sharded_param): record._unsharded_param for _, record in _managed().values()}
    return [known.get(id(p), p) for p in parameters]


class _Parts(Jacobian):
    """Rows of which this process holds a part of every gradient."""

    def write(self, row: int, gradients: Sequence[Tensor | None], *, add: bool = False, more: bool = False) -> None:
        super().write(row, [None if g is None else _local(g) for g in gradients], add=add, more=more)


def _managed() -> dict[int, tuple[Any, Any]]:
    """FSDP2's parameter group and record of every parameter that it gathers, by the tensor that the graph knows.

    Its modules, and with them the sharded parameters, cannot be reached from the graph by a public way.
    """
    from torch.distributed._composable_state import _module_state_mapping

    found = {}
    for reference in list(_module_state_mapping.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for record in getattr(group, "fsdp_params", ()):
                gathered = getattr(record, "_unsharded_param", None)
                if gathered is not None:
                    found[id(gathered)] = (group, record)
    return found


def _placed(gradient: Tensor, p: Tensor) -> Tensor:
    if isinstance(gradient, DTensor) and isinstance(p, DTensor) and gradient.placements != p.placements:
        return gradient.redistribute(p.device_mesh, p.placements)
    return gradient


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def _like(p: Tensor, part: Tensor) -> Tensor:
    """This process's part of a gradient, as the gradient of ``p``."""
    if not isinstance(p, DTensor):
        return part
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _share(p: Tensor, size: int) -> float:
    """The part of a sum over all processes that is to count: 1 over the copies of each of its entries."""
    if not isinstance(p, DTensor):
        return 1 / size
    shards = math.prod(
        p.device_mesh.size(d) for d, placement in enumerate(p.placements) if not isinstance(placement, Replicate)
    )
    return shards / size


def _coordinates(p: DTensor, dim: int) -> Tensor:
    """Where in dimension ``dim`` of the whole parameter this process's slices lie."""
    own = p.device_mesh.get_coordinate()
    assert own is not None
    along = [(d, placement) for d, placement in enumerate(p.placements) if getattr(placement, "dim", None) == dim]
    # FSDP2 cuts what tensor parallelism has cut before, and marks that with a strided placement
    along.sort(key=lambda entry: "Strided" in type(entry[1]).__name__)
    where = torch.arange(p.shape[dim])
    for d, _ in along:
        pieces = where.chunk(p.device_mesh.size(d))
        where = pieces[own[d]] if own[d] < len(pieces) else where[:0]
    return where
