"""Transformers: a Trainer that trains on the losses by task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detente.integrations import (
    by_task,
    figures,
    load_state_dict,
    next_epoch,
    refuse_schedules,
    scaled,
    state_dict,
    summed,
)
from detente.losses import Losses
from detente.method import Method

try:
    from transformers import Trainer, TrainerCallback

    from detente.integrations.accelerate import backward
except ImportError as error:
    raise ImportError(
        f"detente.integrations.transformers needs {error.name}, which is not installed. "
        "Run: pip install 'detente[transformers]'"
    ) from error

__all__ = ["MultiTaskTrainer"]

_FILE = "detente.pt"


class MultiTaskTrainer(Trainer):
    """A ``Trainer`` with :func:`detente.backward` in place of ``loss.backward()``.

    Implement :meth:`compute_losses`. Gradient scalers, ``gradient_accumulation_steps``, clipping and several processes
    work as ever. The mean weights and conflicts since the last log are logged beside ``loss``, the method's history is
    in every checkpoint, and the method hears of every epoch's end.

    In evaluation ``loss`` is the sum of the losses, and the losses stand in the place of the model's outputs; override
    ``prediction_step`` where ``compute_metrics`` needs predictions.

    Args:
        args: as those of ``Trainer``.
        method: a method of this library.
        backward_options: options of :func:`detente.backward`.
        kwargs: as those of ``Trainer``.

    Raises:
        RuntimeError: in the first step, where DeepSpeed or FSDP1 own the backward pass, or the method needs
            :func:`detente.step` (write the loop yourself for those).

    Example:
        >>> class MyTrainer(MultiTaskTrainer):
        ...     def compute_losses(self, model, inputs):
        ...         outputs = model(inputs["x"])
        ...         return {task: (outputs[task] - inputs[task]).square().mean() for task in outputs}
    """

    def __init__(
        self, *args: Any, method: Method, backward_options: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.method = method
        self.backward_options = dict(backward_options or {})
        self._figures: list[dict[str, float]] = []
        self.add_callback(_Epochs(self))

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Losses:
        """The losses of a batch: ``{task: scalar loss}``, means over its samples."""
        raise NotImplementedError(
            f"{type(self).__name__} needs `def compute_losses(self, model, inputs)`, which returns "
            "{task: scalar loss}."
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        losses = by_task(self.compute_losses(model, inputs))
        loss = summed(losses)
        return (loss, {task: value.reshape(1) for task, value in losses.items()}) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        refuse_schedules(self.method, self.backward_options)
        model.train()
        train = getattr(self.optimizer, "train", None)  # optimizers without a schedule have two modes
        if callable(train):
            train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            losses = self.compute_losses(model, inputs)
        # Accelerate's own number of steps is 1 under the Trainer
        losses, factor = scaled(losses, None, self.current_gradient_accumulation_steps)
        update = backward(self.accelerator, losses, self.method, scale=factor, **self.backward_options)
        self._figures.append(figures(update))
        return summed(losses).detach().to(self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._figures:
            seen = {name for step in self._figures for name in step}
            for name in sorted(seen):  # a step may come without some tasks
                values = [step[name] for step in self._figures if name in step]
                logs[name] = sum(values) / len(values)
            self._figures.clear()
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(state_dict(self.method, self.backward_options), Path(output_dir, _FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and Path(checkpoint, _FILE).exists():
            saved = torch.load(Path(checkpoint, _FILE), map_location="cpu", weights_only=True)
            load_state_dict(self.method, self.backward_options, saved)


class _Epochs(TrainerCallback):
    """Tells the method that an epoch ended."""

    def __init__(self, trainer: MultiTaskTrainer) -> None:
        self.trainer = trainer

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        next_epoch(self.trainer.method, self.trainer.backward_options)
