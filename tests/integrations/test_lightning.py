"""Lightning's loops against the plain one: the same parameters, checkpoints, logs and errors."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.amp import GradScaler
from torch.utils.data import DataLoader

import detente

pytest.importorskip("lightning", reason="needs the extra `lightning`")

from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from detente.integrations.lightning import MultiTaskModule
from integrations.worker import error, example, plain, state

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning asks for what torch has renamed
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # advice on data loaders
]
EXAMPLE = example("lightning_example")


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def loader() -> DataLoader[Any]:
    return DataLoader(EXAMPLE.make_data(), 64)


def in_order() -> torch.utils.data.Sampler[int]:
    return torch.utils.data.SequentialSampler(EXAMPLE.make_data())


def model_with(method: detente.Method | None = None, **options: Any) -> Any:
    """The example's model, with a method of the test's choice."""

    class Model(EXAMPLE.Model):  # type: ignore[name-defined,misc]
        def configure_method(self) -> detente.Method:
            return method or super().configure_method()

    torch.manual_seed(0)
    model = Model()
    model.backward_options.update(options)
    return model


def fit(folder: Path, model: Any, **options: Any) -> Any:
    return EXAMPLE.main(folder=str(folder), model=model, sampler=in_order(), enable_checkpointing=False, **options)


def by_hand(method: detente.Method, epochs: int = 2, accumulate: int = 1) -> tuple[Any, list[detente.Update]]:
    model = model_with()
    batches = [list(loader())] * epochs
    updates = plain(
        model, lambda b: model.training_losses(b, 0), batches, method, model.configure_optimizers(), accumulate
    )
    return model, updates


def test_automatic_optimization_and_its_log(tmp_path):
    found = fit(tmp_path, model_with())
    wanted, updates = by_hand(detente.CAGrad(c=0.4))
    assert error(state(found), state(wanted)) < 1e-10
    rows = list(csv.DictReader(next(tmp_path.rglob("metrics.csv")).read_text().splitlines()))
    assert len(rows) == len(updates) == 20
    for row, update in zip(rows, updates, strict=True):
        assert float(row["conflicts"]) == update.stats["conflicts"]
        for task, weight in update.weights.items():
            assert float(row[f"weights/{task}"]) == pytest.approx(float(weight), rel=1e-6)  # logged in float32


# uncertainty weighting learns from the size of the losses: a scale that is not handed on changes it
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scaler", [False, True])
def test_accumulation_and_gradient_scalers(tmp_path, accumulate, scaler):
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    if scaler:  # float64 stays what it is under autocast, and a power of 2 costs no digit
        options["plugins"] = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=1024.0, growth_interval=3))
    found = fit(tmp_path, model_with(detente.UW()), **options)
    wanted, _ = by_hand(detente.UW(), accumulate=accumulate)
    assert error(state(found), state(wanted)) < 1e-10
    if scaler:
        assert found.trainer.precision_plugin.scaler.get_scale() > 1024


def test_a_recorder_around_the_fit(tmp_path):
    """Sees every step, changes nothing, and knows what each step changed when the next one begins."""
    plain = fit(tmp_path, model_with(), max_epochs=2)
    model = model_with()
    with detente.Recorder(model, tmp_path / "run.jsonl", every=2) as recorder:
        fit(tmp_path, model, max_epochs=2)
    assert error(state(model), state(plain)) == 0
    found = detente.diagnostics.Recording.load(recorder.path)
    assert found.steps.tolist() == list(range(0, recorder.steps, 2))
    assert torch.from_numpy(found.predicted).isfinite().all()
    assert set(found.methods) == {model.method.name}


def test_manual_optimization(tmp_path):
    class Manual(EXAMPLE.Model):  # type: ignore[name-defined,misc]
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            losses = self.training_losses(batch, batch_idx)
            self.manual_backward({task: loss / 2 for task, loss in losses.items()}, scale=0.5)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    torch.manual_seed(0)
    found = fit(tmp_path, Manual())
    wanted, _ = by_hand(detente.CAGrad(c=0.4), accumulate=2)
    assert error(state(found), state(wanted)) < 1e-10
    assert set(found.update.weights) == {"sine", "step"}


def test_a_single_loss_goes_backward_as_ever(tmp_path):
    class Manual(EXAMPLE.Model):  # type: ignore[name-defined,misc]
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.zero_grad()
            self.manual_backward(sum(self.training_losses(batch, batch_idx).values()))
            self.optimizers().step()

    torch.manual_seed(0)
    found = fit(tmp_path, Manual(), max_epochs=1)
    wanted, _ = by_hand(detente.GD(), epochs=1)
    assert error(state(found), state(wanted)) < 1e-10
    assert found.update is None


def test_a_checkpoint_holds_the_history(tmp_path):
    """Random orders, weights by epoch and reused coefficients go on where they stopped."""

    def parts() -> Any:
        return model_with(detente.WPCGrad(priority=detente.DWA(), seed=3), source=detente.Every(4))

    whole = fit(tmp_path / "whole", parts(), max_epochs=4)
    half = fit(tmp_path / "half", parts(), max_epochs=3)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert "sine" in half.method.priority.source.history.closed  # it heard of the epochs

    rest = parts()
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(rest, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert error(state(rest), state(whole)) < 1e-10


def test_the_method_is_no_part_of_the_network():
    model = model_with()
    before = set(model.state_dict())
    assert model.method is model.method
    assert set(model.state_dict()) == before
    assert not any(isinstance(part, detente.Method) for part in model.modules())


def test_errors_say_what_to_do(tmp_path):
    for method in (detente.AutoLambda(), detente.FAMO()):
        with pytest.raises(RuntimeError, match=r"detente\.step"):
            fit(tmp_path, model_with(method))

    class Old(EXAMPLE.Model):  # type: ignore[name-defined,misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return sum(self.training_losses(batch, batch_idx).values())

    with pytest.raises(RuntimeError, match="training_losses"):
        fit(tmp_path, Old())
    with pytest.raises(NotImplementedError, match="configure_method"):
        MultiTaskModule().method  # noqa: B018
    with pytest.raises(NotImplementedError, match="training_losses"):
        MultiTaskModule().training_step(None, 0)


@pytest.mark.parametrize(("strategy", "engine"), [(DeepSpeedStrategy, "DeepSpeed"), (FSDPStrategy, "FSDP1")])
def test_strategies_that_own_the_backward_pass(strategy, engine):
    class Uninstalled(strategy):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            """Neither engine runs here."""

    from detente.integrations.lightning import _refuse

    with pytest.raises(RuntimeError, match=engine):
        _refuse(Uninstalled())
