"""Lightning: two regressions that share a trunk.

Run it with ``python examples/lightning_example.py`` (needs ``pip install 'detente[lightning]'``); for two processes
call ``main(devices=2, strategy="ddp")``.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset

import detente
from detente.integrations.lightning import MultiTaskModule


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(640, 2, generator=generator) * 4 - 2
    return TensorDataset(x, torch.sin(3 * x[:, :1]) * x[:, 1:], (x.sum(1, keepdim=True) > 0).to(x.dtype))


class Model(MultiTaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.sine, self.step = nn.Linear(32, 1), nn.Linear(32, 1)

    def configure_method(self) -> detente.Method:
        return detente.CAGrad(c=0.4)

    def training_losses(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        x, sine, step = batch
        features = self.trunk(x)
        return {
            "sine": F.mse_loss(self.sine(features), sine),
            "step": F.binary_cross_entropy_with_logits(self.step(features), step),
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main(
    batch_size: int = 64,
    folder: str = "runs/lightning",
    model: Model | None = None,
    sampler: Sampler[int] | None = None,
    **options: Any,
) -> Model:
    """Train; weights and conflicts of the steps go to ``folder`` with everything else that is logged."""
    torch.manual_seed(0)
    model = model or Model()
    loader = DataLoader(make_data(), batch_size, shuffle=sampler is None, sampler=sampler)
    settings = {"max_epochs": 2, "log_every_n_steps": 1, "accelerator": "cpu", "enable_progress_bar": False, **options}
    trainer = Trainer(default_root_dir=folder, logger=CSVLogger(folder), enable_model_summary=False, **settings)
    trainer.fit(model, loader)
    return model


if __name__ == "__main__":
    print(main().update)
