"""What one process does of a training that several share: its part of every batch.

Each process draws the same batches and computes a part of their samples; :func:`detente.step` sums what they find. What
one process decides or measures (figures on the validation split, whether there is a checkpoint) it tells the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Division"]

T = TypeVar("T")


class Division:
    """The part of this process, which is everything where it works alone."""

    def __init__(self) -> None:
        among = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if among else 0
        self.size = dist.get_world_size() if among else 1
        self.joint_norms = False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def part(self, batch: Sequence[T]) -> Sequence[T]:
        """The samples of a batch that this process computes."""
        ends = [len(batch) * k // self.size for k in (self.rank, self.rank + 1)]
        return batch[ends[0] : ends[1]]

    def agreed(self, find: Callable[[], T]) -> T:
        """What process 0 finds, on all processes; the others do not look."""
        if self.size == 1:
            return find()
        found: list[Any] = [find() if self.first else None]
        dist.broadcast_object_list(found, src=0)
        answer: T = found[0]
        return answer

    def any(self, here: bool) -> bool:
        """Whether it holds on any process."""
        if self.size == 1:
            return here
        there = torch.tensor([float(here)])
        dist.all_reduce(there)
        return bool(there > 0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))

    def seed(self) -> int | None:
        """For the draws of this process in an epoch, so that no two drop the same units; process 0 goes on as it is."""
        common = self.agreed(lambda: _digest(torch.get_rng_state()))
        return None if self.first else (common + self.rank) % 2**32

    def join(self, model: nn.Module) -> None:
        """Start all processes from the same model, whose BatchNorms see the whole batch."""
        if self.size == 1:
            return
        for tensor in (*model.parameters(), *model.buffers()):
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, src=0)
            tensor.detach().copy_(whole)
        for module in model.modules():
            if type(module) in _JOINT:
                module.__class__ = _JOINT[type(module)]
                self.joint_norms = True

    def check(self, present: Iterable[str], tasks: Sequence[str]) -> None:
        """Raise, on all processes, where BatchNorm would wait for a task that some of them do not compute."""
        if not self.joint_norms:
            return
        there = torch.tensor([float(task in present) for task in tasks])
        dist.all_reduce(there)
        some = [task for task, count in zip(tasks, there.tolist(), strict=True) if 0 < count < self.size]
        if some:
            raise ValueError(
                f"the model has BatchNorm, which takes its statistics from the whole batch, so that every process must "
                f"have samples of the same tasks; {some[0]!r} has some on {there[tasks.index(some[0])]:.0f} of "
                f"{self.size} processes. Give the model another norm, such as GroupNorm, or leave out --launch."
            )

    def means(self, values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Means over the samples of all processes, and how many these are; NaN where there are none."""
        if self.size == 1:
            return values, counts
        both = torch.stack([torch.where(counts > 0, values * counts, 0.0), counts])
        dist.all_reduce(both)
        return both[0] / both[1], both[1]


def _digest(state: Tensor) -> int:
    return int.from_bytes(hashlib.blake2b(state.numpy().tobytes(), digest_size=4).digest(), "little")


class _Total(torch.autograd.Function):
    """The sum over the processes, through which gradients go both ways: to and from all of them."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        total = mine.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class _Joint(_BatchNorm):
    """BatchNorm whose statistics are those of the whole batch. PyTorch's SyncBatchNorm needs a GPU."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        over = [d for d in range(input.ndim) if d != 1]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        own = input.mean(over)
        spread = (input - own.view(shape)).square().sum(over)
        number = input.new_tensor([input.numel() / input.shape[1]])
        means, spreads, numbers = _gathered(torch.cat([own, spread, number])).split_with_sizes(
            [self.num_features, self.num_features, 1], dim=1
        )
        count = numbers.sum()
        mean = (numbers * means).sum(0) / count
        variance = (spreads + numbers * (means - mean).square()).sum(0) / count
        if self.training and self.running_mean is not None:
            self._follow(mean.detach(), (variance * count / (count - 1)).detach())
        output = (input - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if not self.affine:
            return output
        return torch.addcmul(self.bias.view(shape), output, self.weight.view(shape))

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(variance, rate)


def _gathered(mine: Tensor) -> Tensor:
    """What all processes have, one row each."""
    row = torch.arange(dist.get_world_size(), device=mine.device).unsqueeze(1) == dist.get_rank()
    everyone: Tensor = _Total.apply(torch.where(row, mine, 0.0))  # type: ignore[no-untyped-call]
    return everyone


class _Joint1d(_Joint, nn.BatchNorm1d):
    pass


class _Joint2d(_Joint, nn.BatchNorm2d):
    pass


class _Joint3d(_Joint, nn.BatchNorm3d):
    pass


_JOINT: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _Joint1d,
    nn.BatchNorm2d: _Joint2d,
    nn.BatchNorm3d: _Joint3d,
}
