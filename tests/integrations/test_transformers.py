"""The Trainer's loop against the plain one: the same parameters, logs, checkpoints and errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.amp import GradScaler

import detente

pytest.importorskip("transformers", reason="needs the extra `transformers`")

from detente.integrations.transformers import MultiTaskTrainer
from integrations.worker import error, example, plain, state

EXAMPLE = example("transformers_example")


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(folder: Any, method: detente.Method | None = None, **arguments: Any) -> Any:
    settings = {"save_strategy": "no", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", **arguments}
    trainer = EXAMPLE.make_trainer(folder=str(folder), **settings)
    trainer.method = method or trainer.method
    return trainer


def by_hand(folder: Any, method: detente.Method, accumulate: int = 1) -> tuple[Any, list[detente.Update]]:
    """The plain loop over the same batches, and with the Trainer's own optimizer."""
    trainer = make(folder)
    torch.manual_seed(trainer.args.seed)
    loader = trainer.get_train_dataloader()
    batches = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches.append(list(loader))
    model = trainer.model.train()
    optimizer = trainer.create_optimizer()
    return model, plain(model, lambda b: trainer.compute_losses(model, b), batches, method, optimizer, accumulate)


def test_example_and_its_log(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    wanted, updates = by_hand(tmp_path, detente.CAGrad(c=0.4))
    assert error(state(trainer.model), state(wanted)) < 1e-10
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == len(updates) == 8
    for row, update in zip(rows, updates, strict=True):
        assert row["conflicts"] == update.stats["conflicts"]
        for task, weight in update.weights.items():
            assert row[f"weights/{task}"] == pytest.approx(float(weight))


# uncertainty weighting learns from the size of the losses: a scale that is not handed on changes it
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scaler", [False, True])
def test_accumulation_and_gradient_scalers(tmp_path, accumulate, scaler):
    trainer = make(tmp_path, detente.UW(), gradient_accumulation_steps=accumulate)
    if scaler:  # Accelerate gives none to a CPU; a power of 2 costs no digit
        trainer.accelerator.scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    trainer.train()
    wanted, _ = by_hand(tmp_path, detente.UW(), accumulate)
    assert error(state(trainer.model), state(wanted)) < 1e-10
    if scaler:
        assert trainer.accelerator.scaler.get_scale() > 1024


def test_a_checkpoint_holds_the_history(tmp_path):
    """Random orders, weights by epoch and reused coefficients go on where they stopped."""

    def parts(**arguments: Any) -> Any:
        method = detente.WPCGrad(priority=detente.DWA(), seed=3)
        trainer = make(tmp_path, method, num_train_epochs=4, **arguments)
        trainer.backward_options = {"source": detente.Every(3)}
        return trainer

    whole = parts(save_strategy="epoch")
    whole.train()
    rest = parts()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert "majority" in rest.method.priority.source.history.closed  # it heard of the epochs
    assert error(state(rest.model), state(whole.model)) < 1e-10


def test_evaluation(tmp_path):
    trainer = make(tmp_path)
    trainer.model.eval()
    found = trainer.evaluate(EXAMPLE.Sequences(16))["eval_loss"]
    items = [EXAMPLE.Sequences(16)[k] for k in range(16)]
    whole = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    with torch.no_grad():
        losses = trainer.compute_losses(trainer.model, whole)
    assert found == pytest.approx(float(sum(losses.values())))
    predicted = trainer.predict(EXAMPLE.Sequences(16)).predictions
    assert [float(p.mean()) for p in predicted] == pytest.approx([float(loss) for loss in losses.values()])


def test_errors_say_what_to_do(tmp_path):
    for method in (detente.AutoLambda(), detente.FAMO()):
        with pytest.raises(RuntimeError, match=r"detente\.step"):
            make(tmp_path, method).train()
    trainer = make(tmp_path)
    bare = MultiTaskTrainer(trainer.model, trainer.args, train_dataset=trainer.train_dataset, method=detente.GD())
    with pytest.raises(NotImplementedError, match="compute_losses"):
        bare.train()
