"""Plain PyTorch on any number of processes: two regressions that share a trunk.

Run it with ``torchrun --nproc-per-node 2 examples/torchrun_plain.py`` (one process: ``python``).
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import detente


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


def main(batch_size: int = 64, epochs: int = 2) -> nn.Module:
    """Train on all processes, which divide a batch among them; the result is that of one process."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")  # "nccl" with GPUs
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    data = make_data()
    sampler = DistributedSampler(data, size, rank, shuffle=True, seed=0)
    loader = DataLoader(data, batch_size // size, sampler=sampler)

    torch.manual_seed(0)
    network = Network()
    model = nn.parallel.DistributedDataParallel(network) if size > 1 else network
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    method = detente.CAGrad(c=0.4)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, sine, step in loader:
            outputs = model(x)
            losses = {
                "sine": F.mse_loss(outputs[0], sine),
                "step": F.binary_cross_entropy_with_logits(outputs[1], step),
            }
            optimizer.zero_grad()
            update = detente.backward(losses, method)
            optimizer.step()
        method.next_epoch()
        if rank == 0:
            weights = {task: round(float(weight), 3) for task, weight in update.weights.items()}
            print(f"epoch {epoch}: conflicts {update.stats['conflicts']}, weights {weights}")
    return network


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
