"""Accelerate's loop against the plain one: the same parameters, trackers, checkpoints and errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.utils.data import DataLoader

import detente

pytest.importorskip("accelerate", reason="needs the extra `accelerate`")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from detente.integrations.accelerate import backward
from integrations.worker import error, example, plain, state

EXAMPLE = example("accelerate_example")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Accelerate keeps its state for the whole process."""
    torch.set_default_dtype(torch.float64)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_default_dtype(torch.float32)


def by_hand(accumulate: int = 1, method: detente.Method | None = None) -> tuple[Any, list[detente.Update]]:
    torch.manual_seed(0)
    model = EXAMPLE.Network()

    def losses(batch: Any) -> dict[str, torch.Tensor]:
        x, sine, step = batch
        outputs = model(x)
        return {
            "sine": F.mse_loss(outputs[0], sine),
            "step": F.binary_cross_entropy_with_logits(outputs[1], step),
        }

    batches = [list(DataLoader(EXAMPLE.make_data(), 64))] * 2
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return model, plain(model, losses, batches, method or detente.CAGrad(c=0.4), optimizer, accumulate)


class Tracker(GeneralTracker):
    """Keeps what it is told."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def tracker(self) -> Any:
        return self.rows

    def store_init_configuration(self, values: Any) -> None:
        """Nothing to keep."""

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append((step, values))


def test_example_and_its_trackers():
    tracker = Tracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("project")
    found = EXAMPLE.main(accelerator=accelerator)
    wanted, updates = by_hand()
    assert error(state(found), state(wanted)) < 1e-10
    assert [step for step, _ in tracker.rows] == list(range(len(updates)))
    for (_, row), update in zip(tracker.rows, updates, strict=True):
        weights = {f"weights/{task}": float(weight) for task, weight in update.weights.items()}
        assert row == pytest.approx({**weights, "conflicts": update.stats["conflicts"]})


# uncertainty weighting learns from the size of the losses: a scale that is not handed on changes it
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scaler", [False, True])
def test_accumulation_and_gradient_scalers(accumulate, scaler):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    if scaler:  # Accelerate gives none to a CPU; a power of 2 costs no digit
        accelerator.scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    found = EXAMPLE.main(accelerator=accelerator, method=detente.UW())
    wanted, _ = by_hand(accumulate, detente.UW())
    assert error(state(found), state(wanted)) < 1e-10
    if scaler:
        assert accelerator.scaler.get_scale() > 1024


def test_the_history_is_saved_with_the_rest(tmp_path):
    accelerator = Accelerator(cpu=True)
    method = detente.WPCGrad(priority=detente.DWA(), seed=3)
    accelerator.register_for_checkpointing(method)
    p = torch.ones(3, requires_grad=True)

    def losses() -> dict[str, torch.Tensor]:
        return {"a": p.square().sum(), "b": (p - 2).square()[0], "c": -p.sum()}

    for _ in range(3):
        backward(accelerator, losses(), method)
        method.next_epoch()
    accelerator.save_state(str(tmp_path))
    ahead = [backward(accelerator, losses(), method).weights for _ in range(3)]
    method.reset()
    accelerator.load_state(str(tmp_path))
    assert [backward(accelerator, losses(), method).weights for _ in range(3)] == ahead


def test_errors_say_what_to_do():
    accelerator = Accelerator(cpu=True)
    p = torch.ones(2, requires_grad=True)
    losses = {"a": p.sum(), "b": p.prod()}
    with pytest.raises(RuntimeError, match=r"detente\.step"):
        backward(accelerator, losses, detente.AutoLambda())
    with pytest.raises(TypeError, match="not their sum"):
        backward(accelerator, sum(losses.values()), detente.GD())
    engines = [
        (DistributedType.DEEPSPEED, "DeepSpeed"),
        (DistributedType.MEGATRON_LM, "Megatron"),
        (DistributedType.FSDP, "FSDP1"),
    ]
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    for kind, engine in engines:  # none of which runs here
        accelerator.state.distributed_type = kind
        with pytest.raises(RuntimeError, match=f"{engine}.* owns the backward pass"):
            backward(accelerator, losses, detente.GD())
    accelerator.state.fsdp_plugin.fsdp_version = 2
    assert backward(accelerator, losses, detente.GD()).weights
