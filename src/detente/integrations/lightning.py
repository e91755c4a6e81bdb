"""Lightning: a module whose training step gives the losses by task."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from detente.backward import backward
from detente.integrations import figures, load_state_dict, next_epoch, refuse_schedules, scaled, state_dict, summed
from detente.losses import Losses
from detente.method import Method, Update

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
except ImportError as error:
    raise ImportError(
        f"detente.integrations.lightning needs {error.name}, which is not installed. "
        "Run: pip install 'detente[lightning]'"
    ) from error

__all__ = ["MultiTaskModule"]


class MultiTaskModule(LightningModule):
    """A ``LightningModule`` with :func:`detente.backward` in place of ``loss.backward()``.

    Implement :meth:`training_losses` instead of ``training_step``, and :meth:`configure_method`. Gradient scalers,
    ``accumulate_grad_batches`` and clipping work as ever; so does ``strategy="ddp"``, where gradients are averaged over
    the processes before their conflicts are resolved. Weights and conflicts of every step are logged, the method's
    history is in the checkpoint, and the method hears of every epoch's end (call ``super()`` where you override
    ``on_train_epoch_end``, ``on_save_checkpoint`` or ``on_load_checkpoint``).

    With manual optimization write ``training_step`` as ever, and in it ``self.manual_backward(losses)``.

    Attributes:
        method: what :meth:`configure_method` gave. It is no submodule: Lightning moves it to no device.
        backward_options: options of :func:`detente.backward`, such as ``{"source": detente.Every(10)}``; set
            ``self.backward_options["counts"] = len(x)`` in :meth:`training_losses` where processes have batches of
            different size.
        update: the last step's :class:`detente.Update`.

    Raises:
        RuntimeError: in the first step, where the strategy owns the backward pass (DeepSpeed, FSDP1), or the method
            needs :func:`detente.step` (not with Lightning: write that loop yourself).

    Example:
        >>> import torch, detente
        >>> class Model(MultiTaskModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.trunk = torch.nn.Linear(3, 4)
        ...         self.heads = torch.nn.ModuleDict({t: torch.nn.Linear(4, 1) for t in ("left", "right")})
        ...
        ...     def configure_method(self):
        ...         return detente.CAGrad(c=0.4)
        ...
        ...     def training_losses(self, batch, batch_idx):
        ...         h = self.trunk(batch).relu()
        ...         return {task: (head(h) - 1).square().mean() for task, head in self.heads.items()}
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters())
        >>> sorted(Model().training_losses(torch.ones(2, 3), 0))
        ['left', 'right']
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backward_options: dict[str, Any] = {}
        self.update: Update | None = None
        self._losses: Losses | None = None

    def configure_method(self) -> Method:
        """The method, built once, when it is first needed."""
        raise NotImplementedError(
            f"{type(self).__name__} needs `def configure_method(self)`, which returns a method such as "
            "detente.CAGrad()."
        )

    def training_losses(self, batch: Any, batch_idx: int) -> Losses:
        """The losses of a batch: ``{task: scalar loss}``."""
        raise NotImplementedError(
            f"{type(self).__name__} needs `def training_losses(self, batch, batch_idx)`, which returns "
            "{task: scalar loss}."
        )

    @cached_property  # written past nn.Module, which would move the method to the model's device, and its solvers too
    def method(self) -> Method:
        """What resolves the conflicts."""
        return self.configure_method()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._sum_of(self.training_losses(batch, batch_idx))

    def manual_backward(self, loss: Tensor | Losses, *args: Any, **options: Any) -> None:
        """With manual optimization: the losses by task, and options of :func:`detente.backward`; or one loss, as ever.

        Losses that you have divided, to accumulate gradients over steps, need ``scale=`` with that factor.
        """
        super().manual_backward(loss if isinstance(loss, Tensor) else self._sum_of(loss), *args, **options)

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        losses, self._losses = self._losses, None
        if losses is None and not self.automatic_optimization:
            super().backward(loss, *args, **options)
            return
        if losses is None:
            raise RuntimeError(
                f"the losses by task are not known. Let {type(self).__name__} implement training_losses(batch, "
                "batch_idx) instead of training_step."
            )
        if self.automatic_optimization:
            refuse_schedules(self.method, self.backward_options)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        losses, factor = scaled(losses, scaler, self.trainer.accumulate_grad_batches)
        options = {**self.backward_options, **options}
        options["scale"] = options.get("scale", 1.0) * factor
        self.update = backward(losses, self.method, **options)
        self.log_dict(figures(self.update))

    def on_train_epoch_end(self) -> None:
        next_epoch(self.method, self.backward_options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["detente"] = state_dict(self.method, self.backward_options)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "detente" in checkpoint:  # a network trained without may go on with a method
            load_state_dict(self.method, self.backward_options, checkpoint["detente"])

    def _sum_of(self, losses: Losses) -> Tensor:
        """Keep the losses for :meth:`backward`, to which Lightning hands their sum."""
        _refuse(self.trainer.strategy)
        self._losses = losses
        return summed(losses)


def _refuse(strategy: Strategy) -> None:
    """Raise for strategies that own the backward pass; some never call the module's."""
    for owner, engine in ((DeepSpeedStrategy, "DeepSpeed"), (FSDPStrategy, "FullyShardedDataParallel (FSDP1)")):
        if isinstance(strategy, owner):
            raise RuntimeError(
                f"{engine} owns the backward pass and does not give the gradients of single tasks. Use strategy='ddp'."
            )
