"""One backward pass over several losses: the line that replaces ``loss.backward()``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from detente.engine.distributed import Counts, Processes
from detente.engine.graph import Reach, listed, reach
from detente.engine.linear import remember
from detente.engine.source import Disjoint, Every, Sampled
from detente.losses import Losses, named_losses
from detente.method import GramianMethod, LossWeighting, Method, Update, one_of, require_method
from detente.resolve import Step
from detente.watch import Seen, watchers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Options", "backward", "joined", "run"]


def backward(
    losses: Losses,
    method: Method,
    *,
    shared: Iterable[Tensor] | None = None,
    source: str | Sampled | Disjoint | Every = "parameters",
    granularity: str | None = None,
    weighting: LossWeighting | None = None,
    counts: Counts | None = None,
    scale: float = 1.0,
    engine: str = "auto",
    storage: torch.dtype | None = None,
    parameters: Iterable[Tensor] | None = None,
    group: ProcessGroup | None = None,
) -> Update:
    """Resolve the conflicts between the tasks' gradients and write the update into ``.grad``.

    Use it where you called ``sum(losses).backward()``. Parameters reached by two or more losses receive the method's
    update; those reached by one loss, the heads, receive their own loss's gradient (or the weighted loss's, where
    the method's paper does so). ``.grad`` accumulates as with ``loss.backward()``.

    Args:
        losses: ``{task: scalar loss}``, or a sequence of scalar losses (the tasks are then named ``"0"``, ``"1"``,
            ...). A step may bring only some of the tasks, in any order. Compute them as separate tensors: entries of
            one vector all seem to depend on all parameters, and so do outputs of a model that ``torch.compile`` took
            as a whole; name ``shared`` then.
        method: a method of this library, such as ``detente.CAGrad()``.
        shared: parameters to treat as shared; None finds them from the autograd graph. With a single loss nothing is
            shared unless you say so, and every parameter gets its plain gradient.
        source: ``"parameters"`` (the gradients of all tasks), ``"features"`` (those of the values at which the tasks
            part, found from the graph: one pass through the trunk instead of T, an approximation that the papers call
            the upper bound), :class:`detente.Sampled`, :class:`detente.Disjoint` (one pass for all tasks, exactly,
            where no sample counts in two losses), or :class:`detente.Every` (the coefficients of one step for the
            next k - 1 as well).
        granularity: ``"model"``, ``"layer"`` (one set of coefficients per parameter tensor, or per feature) or
            ``"channel"`` (per index of the parameter's first dimension, of a feature's second); None is the method's
            own.
        weighting: a loss weighting that is applied to the losses first: the method sees weighted losses and gradients.
        engine: how the task gradients of the parameters are taken and kept; the result is the same. ``"serial"`` takes
            one pass per task and writes every gradient. ``"lean"`` keeps those of the linear layers as the products
            that they are, which saves the writing but takes longer where a batch has many more samples than the
            layer has units. ``"batched"`` takes the gradients of all tasks down the trunk together, where that is made
            of linear layers, LayerNorm and elementwise operations. ``"auto"`` chooses: products layer by layer, all
            tasks together where there are at least four of them or large weights, and values small beside the
            weights or the cache. ``update.stats["engine"]`` says what ran, ``["why"]`` and ``["products"]`` why.
        storage: dtype in which the task gradients wait for their coefficients, such as ``torch.bfloat16`` for half the
            memory; their products and the update are summed in float64 and float32. None keeps them as they are.
        scale: factor that is already inside the losses, such as ``scaler.get_scale()``. Methods see the unscaled
            losses and gradients; ``.grad`` keeps the factor.
        counts: with several processes, the number of samples behind this process's losses: one number, or
            ``{task: number}``. They weight the mean over the processes; None gives all processes that bring a task
            the same weight.
        parameters: all parameters that a loss may reach, in the same order on every process. Needed only where
            processes may bring different tasks.
        group: process group that takes the step together; None is all processes. See docs/distributed.md.

    Returns:
        An :class:`Update`: the coefficients, the Gramian and figures of the step.

    Raises:
        TypeError, ValueError: the losses, the method or an option do not fit; nothing has been written.
        FloatingPointError: a loss is NaN or infinite and ``scale`` is 1, so that no gradient scaler is there to skip
            the step; nothing has been written. With a scaler, and wherever only the gradients are not finite,
            ``.grad`` of the shared parameters becomes NaN instead and the method's history stays as it was.
        RuntimeError: the method needs :func:`detente.step`; or the processes do not fit together: different tasks
            without ``parameters``, parameters of another engine (FSDP1, DeepSpeed, Megatron), an error in one of them.

    Example:
        >>> import torch, detente
        >>> trunk, left, right = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> h = trunk(torch.ones(2, 3)).relu()
        >>> update = detente.backward({"left": left(h).mean(), "right": -right(h).mean()}, detente.CAGrad(c=0.4))
        >>> sorted(update.weights), trunk.weight.grad.shape
        (['left', 'right'], torch.Size([4, 3]))
    """
    if isinstance(method, Method) and method.requires_step:
        raise RuntimeError(
            f"{method.name} cannot work with one backward pass: {method.why_step()} "
            f"Use detente.step(closure, optimizer, method){method.without_step}."
        )
    options = Options(
        shared=None if shared is None else listed(shared),
        source=source,
        granularity=granularity,
        weighting=weighting,
        counts=counts,
        scale=scale,
        engine=engine,
        storage=storage,
        parameters=None if parameters is None else list(parameters),
        group=group,
    )
    return run(losses, method, options)


@dataclass(frozen=True)
class Options:
    """How a step is taken; see :func:`backward`."""

    shared: list[Tensor] | None = None
    source: str | Sampled | Disjoint | Every = "parameters"
    granularity: str | None = None
    weighting: LossWeighting | None = None
    counts: Counts | None = None
    scale: float = 1.0
    engine: str = "auto"
    storage: torch.dtype | None = None
    parameters: list[Tensor] | None = None
    group: ProcessGroup | None = None

    def check(self, method: Method) -> None:
        """Raise where an option is none, or does not go with the method or with the others."""
        require_method(method)
        one_of("engine", self.engine, ("auto", "serial", "batched", "lean"))
        weighting, source, storage, scale = self.weighting, self.source, self.storage, self.scale
        if weighting is not None and not isinstance(weighting, LossWeighting):
            raise TypeError(f"weighting must be a loss weighting such as detente.DWA(); got {weighting!r}.")
        if not isinstance(source, Sampled | Disjoint | Every) and source not in ("parameters", "features"):
            raise ValueError(
                "source must be 'parameters', 'features', detente.Sampled(n), detente.Disjoint(samples) or "
                f"detente.Every(k); got {source!r}."
            )
        if self.granularity is not None:
            one_of("granularity", self.granularity, ("model", "layer", "channel"))
        if storage not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ValueError(
                f"storage must be a real floating dtype, such as torch.bfloat16, or None; got {storage!r}."
            )
        if not isinstance(scale, int | float) or not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be a positive number; got {scale!r}.")
        if isinstance(method, LossWeighting):
            if self.granularity is not None or source != "parameters" or storage is not None:
                raise ValueError(
                    f"{method.name} weights whole losses and takes no task gradients: granularity, source and storage "
                    "do not apply."
                )
            return
        assert isinstance(method, GramianMethod)
        if isinstance(source, Every) and (method.transforms or method.per_parameter):
            raise ValueError(
                f"{method.name} rewrites the task gradients or follows them from step to step, so its coefficients say "
                "nothing without them. Leave detente.Every out."
            )
        if storage is not None and method.transforms:
            raise ValueError(
                f"{method.name} rewrites the task gradients in place, in the dtype of the parameters. Leave `storage` "
                "out."
            )
        if self.taken == "features":
            if self.shared is not None:
                raise ValueError("source='features' finds the shared part from the graph; leave `shared` out.")
            if method.per_parameter:
                raise ValueError(
                    f"{method.name} works on single parameters or follows them from step to step, which the features "
                    "of a batch do not allow. Use source='parameters'."
                )
        if isinstance(self.taken, Disjoint) and self.engine != "auto":
            raise ValueError(
                "source=detente.Disjoint(...) is itself a way to take the gradients; leave `engine` out. Got "
                f"engine={self.engine!r}."
            )
        if weighting is not None and method.own_weighting is not None:
            raise ValueError(
                f"{method.name} weights the losses itself ({method.own_weighting.name}); leave `weighting` out."
            )
        if weighting is not None and isinstance(self.taken, Sampled):
            raise ValueError("source=detente.Sampled(...) and weighting do not combine; use the method's preference.")

    @property
    def every(self) -> Every | None:
        """What reuses coefficients."""
        return self.source if isinstance(self.source, Every) else None

    @property
    def taken(self) -> str | Sampled | Disjoint:
        """What a fresh step takes the gradients of."""
        return self.source.source if isinstance(self.source, Every) else self.source


def run(
    losses: Losses,
    method: Method,
    options: Options,
    more: Sequence[Losses] = (),
    micro: Sequence[Callable[[], Losses]] = (),
) -> Update:
    """What :func:`backward` does, for methods in whatever phase.

    Args:
        losses, method, options: as there.
        more: the losses on further batches, for methods that compare them.
        micro: compute the losses on further micro-batches, whose gradients are added to the first's.
    """
    options.check(method)
    shared, parameters = options.shared, options.parameters
    among = Processes.of(options.group)
    batches = [joined(batch, shared, parameters, options.counts, among) for batch in (losses, *more)]
    named, found = batches[0]
    others = batches[1:]
    for batch, _ in others:
        if list(batch) != list(named):
            raise ValueError(
                f"{getattr(method, 'name', method)} compares several batches, which must bring the same tasks in the "
                f"same order; got {list(named)} and {list(batch)}."
            )
    for watcher in watchers():
        watcher.losses(Seen(named, found, among, options.scale / (1 + len(micro))))
    step = Step(
        named=named,
        found=found,
        others=others,
        further=(joined(compute(), shared, parameters, options.counts, among) for compute in micro),
        micro_batches=1 + len(micro),
        method=method,
        source=options.taken,
        every=options.every,
        granularity=options.granularity,
        weighting=options.weighting,
        scale=options.scale,
        engine=options.engine,
        storage=options.storage,
        among=among,
    )
    with torch.autocast(next(iter(named.values())).device.type, enabled=False):
        update = step.take()
    source = options.source
    if among is not None and os.environ.get("DETENTE_DEBUG") == "1":
        among.check_equal(
            {
                "the history of the method": method.state_dict(),
                "the history of the source": {} if isinstance(source, str | Disjoint) else source.state_dict(),
                "the history of the weighting": {} if options.weighting is None else options.weighting.state_dict(),
                "the set of weights": update.weights,
                "the value of the shared parameters": [] if among.layout else found.shared,
            }
        )
    for watcher in watchers():
        watcher.updated(method, update)
    remember()
    return update


def joined(
    losses: Losses,
    shared: list[Tensor] | None,
    parameters: list[Tensor] | None,
    counts: Counts | None,
    among: Processes | None,
) -> tuple[dict[str, Tensor], Reach]:
    """The losses by name and the leaves behind them; with several processes, this one's part of all tasks."""
    if among is None:
        named = named_losses(losses)
        return named, reach(list(named.values()), shared)
    with among.failing_together():
        named = named_losses(losses, any_number=True)
    return among.join(named, shared, counts, parameters)
