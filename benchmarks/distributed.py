"""Two processes under DistributedDataParallel, beside one on the whole batch, three steps.  make bench-distributed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from common import header, publish, table  # first: sets the threads

# isort: split
import torch
import torch.distributed as dist
import torchjd.aggregation as tj
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchjd.autojac import jac_to_grad, mtl_backward

import detente

TASKS, SAMPLES, STEPS, RATE = ("a", "b", "c"), 16, 3, 0.05
# how the samples of a batch lie on the two processes
CUTS = {"even": 8, "uneven": 10}


class Model(nn.Module):
    """A trunk and a head per task; the forward pass gives the features too, which torchjd asks for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
        self.heads = nn.ModuleDict({t: nn.Linear(16, 1) for t in TASKS})
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.trunk(x)
        return features, {t: head(features).squeeze(1) for t, head in self.heads.items()}


Way = Callable[[Model, Tensor, dict[str, Tensor], int], None]


def _detente(model: Model, features: Tensor, losses: dict[str, Tensor], samples: int) -> None:
    detente.backward(losses, METHOD, counts=samples)


def _detente_alone(model: Model, features: Tensor, losses: dict[str, Tensor], samples: int) -> None:
    """Without knowing of the other process: what every library does that has no distributed code."""
    detente.backward(losses, METHOD, group=ALONE[0])


def _averaged(model: Model, features: Tensor, losses: dict[str, Tensor], samples: int) -> None:
    """Every process's own update, averaged: what DistributedDataParallel's hooks would do."""
    _detente_alone(model, features, losses, samples)
    _average(model)


def _torchjd(model: Model, features: Tensor, losses: dict[str, Tensor], samples: int) -> None:
    mtl_backward(list(losses.values()), features=features)
    jac_to_grad(model.trunk.parameters(), tj.UPGrad())


def _torchjd_averaged(model: Model, features: Tensor, losses: dict[str, Tensor], samples: int) -> None:
    _torchjd(model, features, losses, samples)
    _average(model)


def _average(model: Model) -> None:
    if dist.is_initialized():
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


WAYS: dict[str, Way] = {
    "detente": _detente,
    "detente, each process for itself": _detente_alone,
    "detente, updates averaged": _averaged,
    "torchjd": _torchjd,
    "torchjd, updates averaged": _torchjd_averaged,
}
METHOD = detente.UPGrad()
ALONE: list[dist.ProcessGroup | None] = [None]


def train(way: Way, cut: int, rank: int, size: int) -> Tensor:
    """All parameters after some steps on this process's samples."""
    model = Model()
    wrapped = DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    mine = slice(0, SAMPLES) if size == 1 else (slice(0, cut), slice(cut, SAMPLES))[rank]
    for step in range(STEPS):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(SAMPLES, 6, generator=g, dtype=torch.float64)
        y = torch.randn(3, SAMPLES, generator=g, dtype=torch.float64)
        features, predicted = wrapped(x[mine])
        losses = {t: (predicted[t] - 2 * y[k][mine]).square().mean() for k, t in enumerate(TASKS)}
        optimizer.zero_grad()
        way(model, features, losses, len(x[mine]))
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def worker(expected: Path) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    ALONE[0] = dist.new_group([rank], use_local_synchronization=True)
    wanted = torch.load(expected, weights_only=True)
    found = {}
    for name, way in WAYS.items():
        for kind, cut in CUTS.items():
            mine = train(way, cut, rank, size)
            both = [torch.empty_like(mine) for _ in range(size)]
            dist.all_gather(both, mine)
            right = wanted["torchjd" if name.startswith("torchjd") else "detente"]
            found[f"{name}/{kind}"] = [
                float((mine - right).norm() / right.norm()),
                float((both[0] - both[1]).norm() / right.norm()),
            ]
    if rank == 0:
        print("FOUND " + json.dumps(found), flush=True)
    dist.destroy_process_group()


def measured(expected: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "expected.pt")
        torch.save(dict(expected), path)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, env={**os.environ}, timeout=300)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    if line is None:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(line.removeprefix("FOUND "))


def main() -> None:
    expected = {name: train(WAYS[name], 0, 0, 1) for name in ("detente", "torchjd")}
    found = measured(expected)
    apart = float((expected["detente"] - expected["torchjd"]).norm() / expected["detente"].norm())
    rows = []
    for name in WAYS:
        row = [name]
        for kind in CUTS:
            off, drift = found[f"{name}/{kind}"]
            row += [f"{off:.0e}", f"{drift:.0e}"]
        rows.append(row)
    head = ["", *(f"{kind}: {what}" for kind in CUTS for what in ("off", "processes apart"))]
    publish(
        "distributed.md",
        header("Two processes, three steps, UPGrad under DistributedDataParallel")
        + "\n*Off*: distance of the parameters from those of one process on the whole batch, with the same library. "
        "*Processes apart*: distance between the two processes' parameters, which should be the same model. Both "
        f"relative to the parameters' length, float64. A batch of {SAMPLES} samples lies on the processes as "
        + ", ".join(f"{c} and {SAMPLES - c} ({k})" for k, c in CUTS.items())
        + f". On one process the two libraries are {apart:.0e} apart.\n\n"
        + table(head, rows),
    )


if __name__ == "__main__":
    if len(sys.argv) > 1 and Path(sys.argv[1]).suffix == ".pt":
        worker(Path(sys.argv[1]))
    else:
        main()
