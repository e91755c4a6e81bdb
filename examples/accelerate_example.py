"""Accelerate: two regressions that share a trunk.

Run it with ``accelerate launch examples/accelerate_example.py``, ``torchrun --nproc-per-node 2`` or ``python`` (needs
``pip install 'detente[accelerate]'``).
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import detente
from detente.integrations import figures
from detente.integrations.accelerate import backward, log


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(640, 2, generator=generator) * 4 - 2
    return TensorDataset(x, torch.sin(3 * x[:, :1]) * x[:, 1:], (x.sum(1, keepdim=True) > 0).to(x.dtype))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.sine, self.step = nn.Linear(32, 1), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return self.sine(features), self.step(features)


def main(
    batch_size: int = 64,
    epochs: int = 2,
    accelerator: Accelerator | None = None,
    method: detente.Method | None = None,
) -> nn.Module:
    """Train; ``batch_size`` is that of all processes together."""
    accelerator = accelerator or Accelerator(cpu=True)
    method = method or detente.CAGrad(c=0.4)
    loader = DataLoader(make_data(), batch_size // accelerator.num_processes)
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(method)  # its history is saved by accelerator.save_state
    count = 0
    for epoch in range(epochs):
        for x, sine, step in loader:
            with accelerator.accumulate(model):
                outputs = model(x)
                losses = {
                    "sine": F.mse_loss(outputs[0], sine),
                    "step": F.binary_cross_entropy_with_logits(outputs[1], step),
                }
                update = backward(accelerator, losses, method)
                optimizer.step()
                optimizer.zero_grad()
            log(accelerator, update, step=count)
            count += 1
        method.next_epoch()
        accelerator.print(f"epoch {epoch}: {figures(update)}")
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
    Accelerator().end_training()
