"""DistributedDataParallel with uneven batches, and a checkpoint from which any number of processes goes on.

Every run trains for three more epochs. Run it with ``torchrun --nproc-per-node 2 examples/ddp.py`` or
``python examples/ddp.py``, a few times and in any order: the losses are those of one process, up to rounding.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import detente

Data = tuple[Tensor, Tensor, Tensor]


def make_data() -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(640, 2, generator=generator) * 4 - 2
    return x, torch.sin(3 * x[:, :1]) * x[:, 1:], (x.sum(1, keepdim=True) > 0).to(x.dtype)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.sine, self.step = nn.Linear(32, 1), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return self.sine(features), self.step(features)


def losses_of(model: nn.Module, batch: Data) -> dict[str, Tensor]:
    x, sine, step = batch
    outputs = model(x)
    return {"sine": F.mse_loss(outputs[0], sine), "step": F.binary_cross_entropy_with_logits(outputs[1], step)}


def part(batch: Tensor, rank: int, size: int) -> Tensor:
    """This process's samples of a batch; process k takes k + 1 shares, as if its device were that much faster."""
    ends = [len(batch) * k * (k + 1) // (size * (size + 1)) for k in range(size + 1)]
    return batch[ends[rank] : ends[rank + 1]]


def main(epochs: int = 3, batch_size: int = 64, path: str = "runs/ddp.pt") -> dict[str, float]:
    """Train for some more epochs; returns the losses on all data, and the number of epochs so far."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")  # "nccl" with GPUs
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    data, checkpoint = make_data(), Path(path)
    torch.manual_seed(0)
    network = Network()
    model = nn.parallel.DistributedDataParallel(network) if size > 1 else network
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    method = detente.WPCGrad(priority=detente.DWA())  # remembers past losses and its random draws
    parts = {"network": network, "optimizer": optimizer, "method": method}
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, stateful in parts.items():
            stateful.load_state_dict(saved[name])
        done = saved["epochs"]

    for epoch in range(done, done + epochs):
        order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(batch_size):
            mine = part(batch, rank, size)
            losses = losses_of(model, tuple(values[mine] for values in data))
            optimizer.zero_grad()
            detente.backward(losses, method, counts=len(mine))
            optimizer.step()
        method.next_epoch()

    if rank == 0:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        states = {name: stateful.state_dict() for name, stateful in parts.items()}
        torch.save({**states, "epochs": done + epochs}, checkpoint)
    if size > 1:
        dist.barrier()  # nobody ends before it is written
    with torch.no_grad():
        figures = {task: float(loss) for task, loss in losses_of(network, data).items()}
    return {**figures, "epochs": done + epochs}


if __name__ == "__main__":
    figures = main()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"after {figures['epochs']} epochs: sine {figures['sine']:.6f}, step {figures['step']:.6f}")
    if dist.is_initialized():
        dist.destroy_process_group()
