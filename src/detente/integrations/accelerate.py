"""Accelerate: a backward pass over several losses, in place of ``accelerator.backward(loss)``."""

from __future__ import annotations

from typing import Any

from detente.backward import backward as plain_backward
from detente.integrations import figures, scaled
from detente.losses import Losses
from detente.method import Method, Update

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError as error:
    raise ImportError(
        f"detente.integrations.accelerate needs {error.name}, which is not installed. "
        "Run: pip install 'detente[accelerate]'"
    ) from error

__all__ = ["backward", "log"]


def backward(accelerator: Accelerator, losses: Losses, method: Method, *, scale: float = 1.0, **options: Any) -> Update:
    """Use it where you called ``accelerator.backward(sum(losses))``.

    The losses are divided by ``gradient_accumulation_steps`` and multiplied by the gradient scaler's factor, as
    Accelerate does; methods see neither. Under ``accelerator.accumulate(model)`` every batch's update is added into
    ``.grad``. Each of them is one of all processes' samples, so that nothing is left for ``no_sync`` to put off.

    ``accelerator.register_for_checkpointing(method)`` saves and loads the method's history with the rest.

    Args:
        accelerator: that has prepared the model and the optimizer.
        losses: ``{task: scalar loss}``, unscaled.
        method: a method of this library.
        scale: factor that is already inside the losses.
        options: of :func:`detente.backward`. Where processes may bring different tasks, pass
            ``parameters=accelerator.unwrap_model(model).parameters()``.

    Raises:
        RuntimeError: DeepSpeed, Megatron or FSDP1 own the backward pass; else as :func:`detente.backward`.

    Example:
        >>> import torch, detente
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True)
        >>> trunk, left, right = (accelerator.prepare(torch.nn.Linear(3, n)) for n in (3, 1, 1))
        >>> h = trunk(torch.ones(2, 3)).relu()
        >>> update = backward(accelerator, {"left": left(h).mean(), "right": -right(h).mean()}, detente.CAGrad())
        >>> sorted(update.weights), trunk.weight.grad.shape
        (['left', 'right'], torch.Size([3, 3]))
    """
    _refuse(accelerator)
    losses, factor = scaled(losses, accelerator.scaler, accelerator.gradient_accumulation_steps)
    return plain_backward(losses, method, scale=scale * factor, **options)


def log(accelerator: Accelerator, update: Update, step: int | None = None) -> None:
    """Send the weights and conflicts of a step to Accelerate's trackers."""
    accelerator.log(figures(update), step=step)


def _refuse(accelerator: Accelerator) -> None:
    """Raise for engines that own the backward pass."""
    kind = accelerator.distributed_type
    engine = {
        DistributedType.DEEPSPEED: "DeepSpeed",
        DistributedType.MEGATRON_LM: "Megatron",
        DistributedType.FSDP: "FullyShardedDataParallel (FSDP1)",
    }.get(kind)
    if engine is not None and not (kind == DistributedType.FSDP and accelerator.is_fsdp2):
        raise RuntimeError(
            f"{engine} owns the backward pass and does not give the gradients of single tasks. Use "
            "DistributedDataParallel (accelerate launch --multi_gpu)."
        )
