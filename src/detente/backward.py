"""One backward pass over several losses: the line that replaces ``loss.backward()``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detente.engine.grad import accumulate, pull
from detente.engine.graph import Reach, reach, users
from detente.engine.jacobian import Jacobian
from detente.engine.lean import LARGE, Product, fresh, obstacle, products, worth
from detente.engine.source import Every, Features, Row, Sampled, done_with, every_task, mixed, spread, take, trunk_rows
from detente.gramian import Partition
from detente.method import (
    Context,
    GramianMethod,
    LossWeighting,
    Method,
    Update,
    need_losses,
    one_of,
    require_method,
)

__all__ = ["aggregate", "backward"]

Losses = Mapping[str, Tensor] | Sequence[Tensor]


def backward(
    losses: Losses,
    method: Method,
    *,
    shared: Iterable[Tensor] | None = None,
    source: str | Sampled | Every = "parameters",
    granularity: str | None = None,
    weighting: LossWeighting | None = None,
    scale: float = 1.0,
    engine: str = "auto",
    storage: torch.dtype | None = None,
) -> Update:
    """Resolve the conflicts between the tasks' gradients and write the update into ``.grad``.

    Use it where you called ``sum(losses).backward()``. Parameters reached by two or more losses receive the method's
    update; those reached by one loss, the heads, receive their own loss's gradient (or the weighted loss's, where
    the method's paper does so). ``.grad`` accumulates as with ``loss.backward()``.

    Args:
        losses: ``{task: scalar loss}``, or a sequence of scalar losses (the tasks are then named ``"0"``, ``"1"``,
            ...). A step may bring only some of the tasks, in any order. Compute them as separate tensors: entries of
            one vector all seem to depend on all parameters.
        method: a method of this library, such as ``detente.CAGrad()``.
        shared: parameters to treat as shared; None finds them from the autograd graph. With a single loss nothing is
            shared unless you say so, and every parameter gets its plain gradient.
        source: ``"parameters"`` (the gradients of all tasks), ``"features"`` (those of the values at which the tasks
            part, found from the graph: one pass through the trunk instead of T, an approximation that the papers call
            the upper bound), :class:`detente.Sampled`, or :class:`detente.Every` (the coefficients of one step for
            the next k - 1 as well).
        granularity: ``"model"``, ``"layer"`` (one set of coefficients per parameter tensor, or per feature) or
            ``"channel"`` (per index of the parameter's first dimension, of a feature's second); None is the method's
            own.
        weighting: a loss weighting that is applied to the losses first: the method sees weighted losses and gradients.
        engine: how the task gradients of the parameters are taken and kept; the result is the same. ``"serial"`` takes
            one pass per task and writes every gradient. ``"lean"`` keeps those of the linear layers as the products
            that they are, which saves the writing but takes longer where a batch has many more samples than the
            layer has units; ``"auto"`` chooses layer by layer. ``"batched"`` does as ``"auto"``, with one batched pass
            through the trunk instead of T: faster for small batches and many tasks, for trunks of linear layers
            and elementwise operations only. Hooks on values inside the trunk then see batched tensors, and
            ``retain_grad`` keeps one. ``update.stats["engine"]`` says what ran, ``["why"]`` and ``["products"]`` why.
        storage: dtype in which the task gradients wait for their coefficients, such as ``torch.bfloat16`` for half the
            memory; their products and the update are summed in float64 and float32. None keeps them as they are.
        scale: factor that is already inside the losses, such as ``scaler.get_scale()``. Methods see the unscaled
            losses and gradients; ``.grad`` keeps the factor.

    Returns:
        An :class:`Update`: the coefficients, the Gramian and figures of the step.

    Raises:
        TypeError, ValueError: the losses, the method or an option do not fit; nothing has been written.
        FloatingPointError: a loss is NaN or infinite and ``scale`` is 1, so that no gradient scaler is there to skip
            the step; nothing has been written. With a scaler, and wherever only the gradients are not finite,
            ``.grad`` of the shared parameters becomes NaN instead and the method's history stays as it was.
        RuntimeError: several processes are running (not supported yet), or the method needs :func:`detente.step`.

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
    return run(losses, method, shared, source, granularity, weighting, scale, engine, storage)


def run(
    losses: Losses,
    method: Method,
    shared: Iterable[Tensor] | None = None,
    source: str | Sampled | Every = "parameters",
    granularity: str | None = None,
    weighting: LossWeighting | None = None,
    scale: float = 1.0,
    engine: str = "auto",
    storage: torch.dtype | None = None,
    more: Sequence[Losses] = (),
) -> Update:
    """What :func:`backward` does, for methods in whatever phase; ``more``: the losses on further batches."""
    _single_process()
    named = named_losses(losses)
    others = [named_losses(batch) for batch in more]
    for batch in others:
        if list(batch) != list(named):
            raise ValueError(
                f"{getattr(method, 'name', method)} compares several batches, which must bring the same tasks in the "
                f"same order; got {list(named)} and {list(batch)}."
            )
    with torch.autocast(next(iter(named.values())).device.type, enabled=False):
        return _run(named, method, shared, source, granularity, weighting, scale, engine, storage, others)


def _run(
    named: dict[str, Tensor],
    method: Method,
    shared: Iterable[Tensor] | None,
    source: str | Sampled | Every,
    granularity: str | None,
    weighting: LossWeighting | None,
    scale: float,
    engine: str,
    storage: torch.dtype | None,
    others: list[dict[str, Tensor]],
) -> Update:
    require_method(method)
    one_of("engine", engine, ("auto", "serial", "batched", "lean"))
    if weighting is not None and not isinstance(weighting, LossWeighting):
        raise TypeError(f"weighting must be a loss weighting such as detente.DWA(); got {weighting!r}.")
    if not isinstance(source, Sampled | Every) and source not in ("parameters", "features"):
        raise ValueError(
            f"source must be 'parameters', 'features', detente.Sampled(n) or detente.Every(k); got {source!r}."
        )
    if granularity is not None:
        one_of("granularity", granularity, ("model", "layer", "channel"))
    if storage not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"storage must be a real floating dtype, such as torch.bfloat16, or None; got {storage!r}.")
    if not isinstance(scale, int | float) or not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number; got {scale!r}.")
    found = reach(list(named.values()), shared)
    if isinstance(method, LossWeighting):
        if granularity is not None or source != "parameters" or storage is not None:
            raise ValueError(
                f"{method.name} weights whole losses and takes no task gradients: granularity, source and storage do "
                "not apply."
            )
        return _weighted(named, method, found, weighting, scale)
    assert isinstance(method, GramianMethod)
    every, source = (source, source.source) if isinstance(source, Every) else (None, source)
    if every is not None:
        _check_reuse(method, found)
    if storage is not None and method.transforms:
        raise ValueError(
            f"{method.name} rewrites the task gradients in place, in the dtype of the parameters. Leave `storage` out."
        )
    if source == "features":
        if shared is not None:
            raise ValueError("source='features' finds the shared part from the graph; leave `shared` out.")
        if method.per_parameter:
            raise ValueError(
                f"{method.name} works on single parameters or follows them from step to step, which the features of a "
                "batch do not allow. Use source='parameters'."
            )
    if weighting is not None and method.own_weighting is not None:
        raise ValueError(
            f"{method.name} weights the losses itself ({method.own_weighting.name}); leave `weighting` out."
        )
    weighting = weighting or method.own_weighting
    if every is not None and found.shared and not every.due(tuple(named)):
        return _reused(named, method, found, every, weighting, scale)
    return _projected(named, method, found, source, granularity, weighting, scale, engine, storage, others, every)


def _check_reuse(method: GramianMethod, found: Reach) -> None:
    if method.transforms or method.per_parameter:
        raise ValueError(
            f"{method.name} rewrites the task gradients or follows them from step to step, so its coefficients say "
            "nothing without them. Leave detente.Every out."
        )
    if method.heads == "own" and not found.apart:
        raise ValueError(
            "source=detente.Every(...) takes all losses in one pass, and a parameter that is not listed in `shared` is "
            "reached by several of them. List it, or leave `shared` out."
        )


def named_losses(losses: Losses) -> dict[str, Tensor]:
    """Check the losses and give them names."""
    if isinstance(losses, Tensor) or not isinstance(losses, Mapping | Sequence):
        raise TypeError(
            f"losses must be a dict {{task: loss}} or a sequence of losses; got {type(losses).__name__}. "
            "Pass the tasks' losses separately, not their sum."
        )
    named = dict(losses) if isinstance(losses, Mapping) else {str(i): loss for i, loss in enumerate(losses)}
    if not named:
        raise ValueError("losses is empty; pass at least one loss.")
    for task, loss in named.items():
        if not isinstance(task, str):
            raise TypeError(f"task names must be strings; got {task!r}.")
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"losses[{task!r}] must be a scalar tensor; got {type(loss).__name__}. Did you call .item()?"
            )
        if loss.numel() != 1:
            raise ValueError(
                f"losses[{task!r}] must be a scalar tensor; it has shape {tuple(loss.shape)}. Did you forget .mean()?"
            )
        if loss.is_complex() or not loss.is_floating_point():
            raise TypeError(f"losses[{task!r}] must be real and floating; it has dtype {loss.dtype}.")
        if not loss.requires_grad:
            raise ValueError(
                f"losses[{task!r}] has no autograd graph. Was it computed under torch.no_grad(), from detached "
                "tensors, or by a model whose parameters are all frozen? Leave such a task out of the step."
            )
    return named


def _single_process() -> None:
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            "detente does not reduce task gradients over processes yet, and per-process updates would drift apart "
            f"silently (world size {dist.get_world_size()}). Train in one process."
        )


def _values(named: Mapping[str, Tensor], scale: float) -> Tensor:
    """Unscaled loss values ``[T]`` float64, still on the losses' device."""
    device = next(iter(named.values())).device
    if device.type == "cpu":
        return torch.tensor([loss.item() / scale for loss in named.values()], dtype=torch.float64)
    return torch.stack([loss.detach().reshape(()).double().to(device) for loss in named.values()]) / scale


def _read(named: Mapping[str, Tensor], scale: float) -> Tensor:
    """Unscaled loss values ``[T]`` float64 on the CPU, checked where no gradient scaler is there to skip the step."""
    losses = _values(named, scale).cpu()
    if scale == 1.0:
        check_finite(dict(zip(named, losses, strict=True)))
    return losses


def _to_host(
    raw: Tensor, cross: Tensor | None, named: Mapping[str, Tensor], scale: float
) -> tuple[Tensor, Tensor | None, Tensor, bool]:
    """Unscaled products of the gradients and loss values in float64 on the CPU, and whether all of them are finite.

    One transfer, whatever is on a device. Raises where a loss is not finite and no gradient scaler is there.
    """
    values = _values(named, scale)
    devices = {t.device for t in (raw, values) if t.device.type != "cpu"}
    if devices:
        parts = [raw, values] if cross is None else [raw, values, cross]
        flat = torch.cat([part.to(next(iter(devices))).reshape(-1) for part in parts]).cpu()
        taken = torch.split(flat, [part.numel() for part in parts])
        raw, values = taken[0].view(raw.shape), taken[1]
        cross = None if cross is None else taken[2].view(cross.shape)
    finite = all(np.isfinite(part.numpy()).all() for part in (raw, values, cross) if part is not None)
    if scale != 1.0:
        raw, cross = raw / scale**2, None if cross is None else cross / scale**2
    elif not finite:
        check_finite(dict(zip(named, values, strict=True)))
    return raw, cross, values, finite


def check_finite(losses: Mapping[str, Tensor]) -> None:
    """Raise where a loss is NaN or infinite."""
    for task, loss in losses.items():
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"losses[{task!r}] is {value}. Lower the learning rate, clip gradients, or look for a division by zero "
                "or log(0) in this loss. Nothing was written. (Under a gradient scaler pass scale=scaler.get_scale(), "
                "and the step is skipped instead.)"
            )


def _weighted(
    named: dict[str, Tensor], method: LossWeighting, found: Reach, weighting: LossWeighting | None, scale: float
) -> Update:
    losses = _read(named, scale)
    context = Context(tuple(named), losses=losses)
    method.check(context)
    weights = _first(weighting, context)
    weights = weights * method.weights(losses * weights, context)
    tensors = list(named.values())
    factors = [w.to(loss.device, loss.dtype).reshape(loss.shape) for w, loss in zip(weights, tensors, strict=True)]
    pull(tensors, factors, found.leaves)
    stats = {"backwards": 1, **context.stats}
    return Update(dict(zip(named, weights, strict=True)), None, stats)


def _reused(
    named: dict[str, Tensor],
    method: GramianMethod,
    found: Reach,
    every: Every,
    weighting: LossWeighting | None,
    scale: float,
) -> Update:
    """A step with the coefficients of an earlier one: one pass for all tasks."""
    losses = _read(named, scale)
    context = Context(tuple(named), losses=losses)
    method.check(context)
    finite = bool(losses.isfinite().all())
    first = _first(weighting if finite else None, context)
    kept = torch.tensor([every.coefficients[task] if finite else math.nan for task in named], dtype=torch.float64)
    heads, inner = first, kept
    if method.heads == "weighted":
        out = torch.tensor([task in every.dropped for task in named])
        heads, inner = torch.where(out, first, first * kept), torch.where(out, kept, 1.0)
    mixed(list(named.values()), found, heads.tolist(), inner.tolist())
    every.reused += finite
    stats = {"engine": "reused", "backwards": 1, "reused": every.reused, **context.stats}
    return Update(dict(zip(named, kept * first, strict=True)), None, stats)


def _first(weighting: LossWeighting | None, context: Context) -> Tensor:
    """Weights of the losses before the method sees them."""
    assert context.losses is not None
    if weighting is None:
        return torch.ones_like(context.losses)
    return weighting.weights(context.losses, context)


def _projected(
    named: dict[str, Tensor],
    method: GramianMethod,
    found: Reach,
    source: str | Sampled,
    granularity: str | None,
    weighting: LossWeighting | None,
    scale: float,
    engine: str,
    storage: torch.dtype | None,
    others: list[dict[str, Tensor]],
    every: Every | None,
) -> Update:
    tasks, tensors = tuple(named), list(named.values())
    if not found.shared:
        if len(tasks) > 1 and found.apart:
            warnings.warn(
                f"no parameter is reached by two or more of the losses {list(tasks)}: there is no conflict to resolve, "
                "and every loss gets its plain gradient. Were the shared features detached?",
                stacklevel=5,
            )
        return _weighted(named, _PLAIN, found, weighting, scale)
    rows = every_task(len(tasks))
    shares = None
    if isinstance(source, Sampled):
        if weighting is not None:
            raise ValueError("source=detente.Sampled(...) and weighting do not combine; use the method's preference.")
        losses = _read(named, scale)
        shares = method.sampling_shares(Context(tasks, losses=losses))
        rows = source.rows(shares)

    features: Features | None
    why = "source"
    together: Features | None = None
    kept: dict[int, Product] = {}
    if source == "features":
        features = Features(tensors, found, storage)
        jacobian, heads = features.jacobian, features.heads
        partition = _partition(method, jacobian.parameters, tasks, granularity, every, features=True)
    else:
        partition = _partition(method, found.shared, tasks, granularity, every)
        together = _together(tensors, found, rows) if engine == "batched" else None
        alone: set[int] = set()
        written = bool(others) or method.transforms or method.per_parameter
        if not written:
            kept, alone = _kept(found, partition, len(rows), engine, storage)
        inputs = {k: product.inputs for k, product in kept.items()}
        features, jacobian, heads = None, Jacobian(found.shared, len(rows), inputs, alone, storage), []
        why = f"{method.name} needs every gradient written out" if written else _why(engine, kept, found)
        if together is not None:
            heads = together.heads
            together.pull_each(jacobian, kept)
        else:
            for r, (row, last) in enumerate(zip(rows, done_with(found, rows), strict=True)):
                heads += take(jacobian, r, row, tensors, found, method.heads, kept, last=last)
    one_pass = features is not None or together is not None
    how = {
        "engine": "features" if features is not None else "batched" if together else "lean" if kept else "serial",
        "why": why,
        "backwards": 1 if one_pass else len(rows) * (1 + len(others)),
        "products": len(kept),
    }

    cross = _cross(jacobian, others, found, partition) if others else None
    blocks, cross, losses, finite = _to_host(jacobian.gramian(partition), cross, named, scale)
    sizes = tuple(buffer.shape[1] for buffer in jacobian.buffers)
    context = Context(tasks, losses=losses, partition=partition, sizes=sizes)
    method.check(context)
    # no history, the weighting's included, sees a step that is not finite
    first = _first(weighting if finite else None, context)
    if weighting is not None:
        blocks = blocks * first.unsqueeze(1) * first
        cross = None if cross is None else cross * first.unsqueeze(1) * first
    context = replace(context, losses=losses * first, cross=cross)
    if shares is not None:
        context = replace(
            context,
            tasks=tuple(tasks[row.tasks[0]] if len(row.tasks) == 1 else "(rest)" for row in rows),
            losses=torch.stack([losses[list(row.tasks)] @ torch.tensor(row.factors).double() for row in rows]),
            shares=torch.stack([shares[list(row.tasks)].sum() for row in rows]),
        )
        first = torch.ones(len(rows), dtype=torch.float64)
    weights, updates = _resolve(jacobian, method, blocks, partition, context, first, scale, finite)

    if features is None:
        accumulate({id(p): (p, u) for p, u in zip(found.shared, updates, strict=True)}, ours=True)
    else:
        features.pull(updates)
    products, coefficients = blocks.numpy(), weights.numpy()
    # a task that is left out for its zero trunk gradient still trains its head
    left_out = ~((products.diagonal(0, 1, 2) > 0).any(0) | (coefficients != 0).any(0))
    gradients: dict[int, tuple[Tensor, Tensor]] = {}
    for p, r, gradient in heads:
        weighted = method.heads == "weighted" and not left_out[r]
        factor = float(coefficients[0, r]) if weighted else float(first[r])
        scaled = gradient if factor == 1 else gradient * factor
        gradients[id(p)] = (p, gradients[id(p)][1] + scaled if id(p) in gradients else scaled)
    accumulate(gradients)

    total = products.sum(0)
    stats: dict[str, Any] = {
        **how,
        "conflicts": int(np.count_nonzero(np.triu(total, 1) < 0)),
        "dropped": [t for t, out in zip(context.tasks, left_out.tolist(), strict=True) if out],
        **context.stats,
    }
    if len(rows) < len(tasks):
        stats["sampled"] = [tasks[row.tasks[0]] for row in rows[:-1]]
    if every is not None:
        stats["reused"] = 0
        raw = spread(torch.where(first == 0, 0.0, weights[0] / first), rows, len(tasks))
        if finite and bool(raw.isfinite().all()):
            dropped = [tasks[t] for row, out in zip(rows, left_out.tolist(), strict=True) if out for t in row.tasks]
            every.keep(dict(zip(tasks, raw.tolist(), strict=True)), dropped)
    by_task = spread(weights[0] if partition.count == 1 else weights, rows, len(tasks))
    return Update(dict(zip(tasks, by_task.unbind(-1), strict=True)), torch.from_numpy(total), stats)


def _together(tensors: list[Tensor], found: Reach, rows: list[Row]) -> Features:
    """The features from which one batched pass takes all gradients through the trunk."""
    why = "it takes the gradient of every task" if len(rows) < len(tensors) else obstacle(found.masks, found.shared)
    if why is None:
        try:
            return Features(tensors, found)
        except ValueError as error:
            why = str(error).partition(". Use")[0]
    raise ValueError(f"engine='batched' does not work here: {why}. Use engine='auto'.")


def _why(engine: str, kept: Mapping[int, Product], found: Reach) -> str:
    """In words, what decided how the task gradients were kept."""
    if engine == "serial":
        return "asked for"
    how = "can be" if engine == "lean" else "are cheaper as"
    return f"{len(kept)} of {len(found.shared)} shared parameters {how} products of small matrices"


def _kept(
    found: Reach, partition: Partition, count: int, engine: str, storage: torch.dtype | None
) -> tuple[dict[int, Product], set[int]]:
    """Which task gradients need no buffer, by position: those kept as products, and as the tensors that come."""
    whole = [k for k, (dims, _) in enumerate(partition.members) if dims == ()]
    lean = [k for k in whole if engine == "lean" or (engine != "serial" and worth(1, found.shared[k].shape, count))]
    copied = engine == "batched" or storage is not None
    large = [] if copied else [k for k in whole if found.shared[k].numel() >= LARGE]
    if not (lean or large):
        return {}, set()
    feeds = users(found.masks)
    kept = {
        lean[i]: product
        for i, product in products(feeds, [found.shared[k] for k in lean]).items()
        if engine == "lean" or worth(product.samples, found.shared[lean[i]].shape, count)
    }
    large = [k for k in large if k not in kept]
    return kept, {large[i] for i in fresh(feeds, [found.shared[k] for k in large])}


def _partition(
    method: GramianMethod,
    parameters: Sequence[Tensor],
    tasks: tuple[str, ...],
    granularity: str | None,
    every: Every | None,
    *,
    features: bool = False,
) -> Partition:
    chosen = granularity or method.native_granularity
    if features and chosen == "channel":
        partition = Partition.by_channel(parameters, dim=1)  # dimension 0 of a feature is the sample
    else:
        partition = method.partition(parameters, tasks, chosen)
    if every is not None and partition.count > 1:
        raise ValueError(
            f"source=detente.Every(...) reuses one coefficient per task, and {partition.count} blocks have one each. "
            "Use granularity='model'."
        )
    if method.heads == "weighted" and partition.count > 1:
        raise ValueError(
            f"{method.name} weights the heads' losses by the tasks' coefficients, and {partition.count} blocks have "
            "one coefficient each. Use heads='own', or granularity='model'."
        )
    return partition


def _cross(jacobian: Jacobian, others: list[dict[str, Tensor]], found: Reach, partition: Partition) -> Tensor:
    """Products ``[B, T, T]`` of the gradients on two further batches, or on this and one further batch."""
    taken = [jacobian]
    for batch in others:
        taken.append(trunk_rows(list(batch.values()), found, keep=False))
    return taken[-2].gramian(partition, taken[-1])


def _resolve(
    jacobian: Jacobian,
    method: GramianMethod,
    blocks: Tensor,
    partition: Partition,
    context: Context,
    first: Tensor,
    scale: float,
    finite: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Coefficients ``[B, T]`` of the raw task gradients, and the update they give."""
    if not method.transforms:
        weights = method.weights(blocks, context) * first
        return weights, jacobian.combine(weights, partition)
    if not finite:
        weights = torch.full(blocks.shape[:-1], math.nan, dtype=torch.float64)
        return weights, jacobian.combine(weights, partition)
    for buffer in jacobian.buffers:
        buffer.mul_((first / scale).to(buffer.device, buffer.dtype).unsqueeze(1))
    method.transform(jacobian.buffers, context)
    weights = method.weights(jacobian.gramian(partition).cpu(), context)
    return weights * first, jacobian.combine(weights * scale, partition)


def aggregate(jacobian: Tensor, method: Method, losses: Sequence[float] | Tensor | None = None) -> Tensor:
    """Apply a method's rule to given task gradients.

    Args:
        jacobian: ``[T, P]``, one row per task.
        method: a method of this library.
        losses: ``[T]`` loss values, for methods that need them.

    Returns:
        The update ``[P]``, in the dtype and on the device of ``jacobian``; all NaN where an entry of ``jacobian``
        is not finite.

    Raises:
        ValueError: shapes do not fit, or the method needs losses or a model.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> detente.aggregate(J, detente.MGDA()).tolist()
        [1.0, 1.0]
    """
    require_method(method)
    if not isinstance(jacobian, Tensor) or jacobian.dim() != 2 or not jacobian.is_floating_point():
        got = f"{tuple(jacobian.shape)}, {jacobian.dtype}" if isinstance(jacobian, Tensor) else type(jacobian).__name__
        raise ValueError(f"jacobian must be a floating tensor of shape [T, P]; got {got}.")
    if len(jacobian) == 0:
        raise ValueError(f"jacobian has no rows, its shape is {tuple(jacobian.shape)}; pass at least one task.")
    jacobian = jacobian.detach()
    if "model" in method.needs:
        raise ValueError(f"{method.name} works on the layers of a model; use detente.backward or detente.step.")
    count = len(jacobian)
    values = None if losses is None else torch.as_tensor(losses, dtype=torch.float64).cpu()
    if values is not None and values.shape != (count,):
        raise ValueError(f"losses must have shape ({count},), one per row of jacobian; got {tuple(values.shape)}.")
    context = Context(tuple(str(i) for i in range(count)), losses=values)
    if not bool(jacobian.isfinite().all()):
        return torch.full_like(jacobian[0], math.nan)
    if not isinstance(method, GramianMethod):
        assert isinstance(method, LossWeighting)
        if values is None and "losses" in method.needs:
            raise ValueError(f"{method.name} needs the losses of the step; pass losses=[...] beside the gradients.")
        weights = method.weights(torch.ones(count, dtype=torch.float64) if values is None else values, context)
        return weights.to(jacobian.device, jacobian.dtype) @ jacobian
    rows = Jacobian([jacobian[0]], count)
    for t, row in enumerate(jacobian):
        rows.write(t, [row])
    partition = method.partition(rows.parameters, context.tasks, "model")
    first = torch.ones(count, dtype=torch.float64)
    context.sizes = tuple(buffer.shape[1] for buffer in rows.buffers)
    method.check(context)
    if method.own_weighting is not None:
        need_losses(method.own_weighting, context)
        method.own_weighting.check(context)
        finite = values is not None and bool(values.isfinite().all())
        first = _first(method.own_weighting if finite else None, context)
        context = replace(context, losses=None if values is None else values * first)
    blocks = rows.gramian(partition)
    blocks = (blocks if method.on_device else blocks.cpu()) * first.unsqueeze(1).to(blocks.device) * first
    with torch.autocast(jacobian.device.type, enabled=False):
        _, updates = _resolve(rows, method, blocks, partition, context, first, 1.0, True)
    return updates[0]


class _Plain(LossWeighting):
    """Every loss with weight 1: what a step without shared parameters does."""

    name = "plain"
    needs = frozenset()

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        return torch.ones_like(losses)


_PLAIN = _Plain()
