"""RotoGrad: one rotation per task of the shared features, and task gradients brought to one length there.

Javaloy and Valera, "RotoGrad: Gradient Homogenization in Multitask Learning", ICLR 2022, arXiv 2103.02631.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import orthogonal

from detente.nn.task_norm import module_key, task_names


class RotoGrad(nn.Module):
    """Rotate the shared features for each task and equalise the tasks' gradients (Javaloy & Valera, ICLR 2022).

    Put it between trunk and heads: ``z -> {task: R_k z}``, every ``R_k`` orthogonal and at first the identity. In the
    backward pass of a training step the gradients ``G_k`` of the tasks with respect to ``z`` are brought to the common
    norm ``C = sum_k alpha_k ||G_k||``, with ``alpha_k`` proportional to ``||G_k|| / ||G_k(0)||``, so that the length
    of the tasks that have come less far prevails; norms are over the whole batch. ``||G_k(0)||`` is taken anew in each
    of the first ``burn_in`` steps. Heads get their own loss's plain gradient. An ordinary ``sum(losses).backward()``
    does all this.

    The rotations are not trained by the tasks but by :meth:`rotation_loss`, with an optimizer of their own and, in the
    paper, a lower learning rate::

        optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=1e-3)
        rotation_optimizer = torch.optim.Adam(rotograd.rotation_parameters(), lr=1e-4)
        ...
        sum(losses.values()).backward()
        optimizer.step()
        rotation_optimizer.zero_grad()
        rotograd.rotation_loss().backward()
        rotation_optimizer.step()

    Keep the rotation parameters out of the first optimizer, which ``model.parameters()`` would not.

    The scaling needs all tasks in one backward pass. A gradient method of this library makes one pass per task: it gets
    unscaled gradients, whose lengths are then its own business, while the rotation works as ever. Tasks without a loss
    in a step are left out of it, and a task whose gradient is zero stays at zero. One task alone is left as it is.
    Where a gradient is not finite, the plain sum goes to ``z``, neither the reference norms nor the count of steps see
    that backward pass, and the rotations do not see the step. In eval mode nothing is scaled or remembered. Tasks that
    come in forward passes of their own (each with other data) have no common ``z``: they are rotated, not scaled.

    Args:
        tasks: distinct task names.
        features: size of the last dimension of ``z``.
        burn_in: steps during which the reference norms are taken anew; 20 in the authors' code.
        rotate: rotate the leading ``rotate`` features only; None is all. A rotation costs ``rotate^2`` parameters and
            a matrix exponential per forward pass.

    Raises:
        ValueError: no task or a duplicate, numbers out of range, or ``z`` of another size.

    Example:
        >>> import torch, detente
        >>> trunk, rotograd = torch.nn.Linear(3, 4), detente.nn.RotoGrad(["a", "b"], features=4)
        >>> features = rotograd(trunk(torch.randn(5, 3)))
        >>> losses = {"a": features["a"].square().mean(), "b": 100 * (features["b"] - 1).abs().mean()}
        >>> sum(losses.values()).backward()
        >>> rotograd.rotation_loss().backward()
        >>> [p.grad is not None for p in [*trunk.parameters(), *rotograd.rotation_parameters()]]
        [True, True, True, True]
    """

    steps: Tensor

    def __init__(self, tasks: Iterable[str], features: int, burn_in: int = 20, *, rotate: int | None = None) -> None:
        super().__init__()
        self.tasks = task_names(tasks)
        if not isinstance(features, int) or features < 1:
            raise ValueError(f"features must be the size of z's last dimension, at least 1; got {features!r}.")
        if not isinstance(burn_in, int) or burn_in < 0:
            raise ValueError(f"burn_in must be a number of steps, at least 0; got {burn_in!r}.")
        if rotate is not None and (not isinstance(rotate, int) or not 1 <= rotate <= features):
            raise ValueError(f"rotate must be None or from 1 to features, {features}; got {rotate!r}.")
        self.features = features
        self.burn_in = burn_in
        self.rotate = features if rotate is None else rotate
        self.branches = nn.ModuleDict({module_key(task): _branch(self.rotate) for task in self.tasks})
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._last: _Step | None = None

    def rotation(self, task: str) -> Tensor:
        """``R_k``, ``[rotate, rotate]``, as a function of its parameters."""
        if task not in self.tasks:
            raise KeyError(f"RotoGrad has no rotation for task {task!r}; it knows {list(self.tasks)}")
        with torch.autocast(self.steps.device.type, enabled=False):
            return cast(Tensor, self.branches[module_key(task)].weight)

    def rotation_parameters(self) -> list[nn.Parameter]:
        """What the rotations' own optimizer steps."""
        return list(self.branches.parameters())

    def extra_repr(self) -> str:
        """Tasks and sizes."""
        return f"tasks={list(self.tasks)}, features={self.features}, burn_in={self.burn_in}, rotate={self.rotate}"

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """``{task: R_k z}``, each ``[..., features]`` like ``z``."""
        if z.dim() == 0 or z.shape[-1] != self.features or not z.is_floating_point():
            raise ValueError(
                f"expected floating z with {self.features} features in its last dimension; got {tuple(z.shape)}, "
                f"{z.dtype}. Flatten or pool the trunk's output, or move its channels last."
            )
        with torch.no_grad():
            rotations = [self.rotation(task) for task in self.tasks]
        copies: tuple[Tensor, ...] = (z,) * len(self.tasks)
        if self.training and torch.is_grad_enabled() and z.requires_grad:
            copies = _FanOut.apply(z, self, _Step(rotations))  # type: ignore[no-untyped-call]
        result = {}
        for task, rotation, branch in zip(self.tasks, rotations, copies, strict=True):
            turned = linear(branch[..., : self.rotate], rotation.to(z.dtype))
            rest = branch[..., self.rotate :]
            result[task] = torch.cat([turned, rest.to(turned.dtype)], dim=-1) if self.rotate < self.features else turned
        return result

    def rotation_loss(self, *, normalized: bool = True) -> Tensor:
        """How far the tasks' gradients of the last step are from their mean, as a function of the rotations.

        Mean over tasks of ``||R_k v - g_k||^2``: ``g_k`` is task k's gradient in its rotated space, ``v`` the mean of
        the tasks' gradients in the space of ``z``, all brought to the common norm C; both are constants. Call it after
        the losses' backward pass. Zero where the step's gradients were not finite or all zero.

        Args:
            normalized: in units of C, so that the size of the losses has no influence on the rotations' learning
                rate. False gives the mean over samples of the squared distances themselves, as the authors' code has.

        Returns:
            A scalar whose graph leads to :meth:`rotation_parameters`.

        Raises:
            RuntimeError: no backward pass has gone through this module in training mode yet.
        """
        step = self._last
        if step is None:
            raise RuntimeError(
                "rotation_loss() aligns the gradients of the last step, and no backward pass has gone through this "
                "module in training mode yet. Call sum(losses).backward() first, with gradients enabled for z."
            )
        turned = [self.rotation(task) for task in self.tasks]
        norms = {k: norm for k, norm in step.norms.items() if norm > 0}
        if not step.finite or not norms:
            return torch.stack([0.0 * rotation.sum() for rotation in turned]).sum()
        # first to unit length: a half-precision gradient or its square may be out of float32's range
        equal = {k: (step.gradients[k].double() / norm).to(turned[k].dtype) for k, norm in norms.items()}
        mean = torch.stack(list(equal.values())).mean(0)
        distances = [
            (linear(mean, turned[k]) - linear(gradient, step.rotations[k])).square().sum()
            for k, gradient in equal.items()
        ]
        loss = torch.stack(distances).mean()
        return loss if normalized else loss * (self._common(norms) ** 2 / len(mean))

    def _references(self) -> list[float]:
        """The norms that tasks are compared to, 0 where a task has had none yet."""
        return cast(list[float], torch.stack([cast(Tensor, b.reference) for b in self.branches.values()]).tolist())

    def _common(self, norms: dict[int, float]) -> float:
        """C for the tasks with these positive norms."""
        references = self._references()
        ratios = {k: norm / (references[k] or norm) for k, norm in norms.items()}
        return sum(ratio * norms[k] for k, ratio in ratios.items()) / sum(ratios.values())

    def _receive(self, step: _Step, gradients: dict[int, Tensor]) -> Tensor:
        """The gradient of ``z`` from those of its copies."""
        wide = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients.values()]
        norms = dict(zip(gradients, torch.stack(wide).tolist(), strict=True))
        self._last = step
        if not all(map(math.isfinite, norms.values())):
            step.finite = False
            return _sum(list(gradients.values()))
        if step.burning is None:  # per forward, because a gradient method comes back once per task
            step.burning = int(self.steps) < self.burn_in
            self.steps += 1
        for k, reference in enumerate(self._references()):
            if norms.get(k, 0.0) > 0 and (step.burning or reference == 0):
                cast(Tensor, self.branches[module_key(self.tasks[k])].reference).fill_(norms[k])
        step.norms.update(norms)
        for k, gradient in gradients.items():
            step.gradients[k] = gradient[..., : self.rotate].reshape(-1, self.rotate).detach().clone()
        positive = {k: norm for k, norm in norms.items() if norm > 0}
        if len(gradients) == 1 or not positive:
            return _sum(list(gradients.values()))
        common = self._common(positive)
        return _sum([gradients[k] * (common / norm) for k, norm in positive.items()])


@dataclass
class _Step:
    """What one forward pass and the backward passes through it leave behind, by position of the task."""

    rotations: list[Tensor]
    norms: dict[int, float] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)  # [samples, rotate], in the space of z
    burning: bool | None = None
    finite: bool = True


class _FanOut(torch.autograd.Function):
    """Copies of a tensor, one per task; its backward gets all their gradients at once."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, module: RotoGrad, step: _Step) -> tuple[Tensor, ...]:
        ctx.module, ctx.step = module, step
        ctx.set_materialize_grads(False)  # tells a task without a loss from one with a zero gradient
        return tuple(z.view_as(z) for _ in module.tasks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None]:
        present = {k: gradient for k, gradient in enumerate(gradients) if gradient is not None}
        return ctx.module._receive(ctx.step, present), None, None


class _Branch(nn.Module):
    """One task's rotation and reference norm, together so that a state dict knows both by the task's name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(size))
        self.register_buffer("reference", torch.zeros((), dtype=torch.float64))


def _branch(size: int) -> nn.Module:
    return orthogonal(_Branch(size), orthogonal_map="matrix_exp")


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
