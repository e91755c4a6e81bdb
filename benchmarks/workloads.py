"""The five trunks on which whole steps are measured, each with one linear head and one loss per task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["WORKLOADS", "Problem", "Workload"]


class Problem(nn.Module):
    """A trunk, its heads, and one fixed batch."""

    def __init__(self, trunk: nn.Module, width: int, inputs: Tensor, count: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(count))
        self.inputs = inputs
        self.targets = [torch.randint(10, (len(inputs),)) for _ in range(count)]

    def placed(self, device: torch.device) -> Problem:
        """Everything on this device."""
        self.to(device)
        self.inputs = self.inputs.to(device)
        self.targets = [target.to(device) for target in self.targets]
        return self

    def features(self) -> Tensor:
        return self.trunk(self.inputs)

    def losses(self, features: Tensor) -> list[Tensor]:
        return [
            nn.functional.cross_entropy(head(features), target)
            for head, target in zip(self.heads, self.targets, strict=True)
        ]


@dataclass(frozen=True)
class Workload:
    """What is measured: ``build(T)`` makes the problem; ``counts`` are the numbers of tasks that fit."""

    name: str
    what: str
    trunk: Callable[[], tuple[nn.Module, int, Tensor]]
    counts: Sequence[int]

    def build(self, count: int) -> Problem:
        torch.manual_seed(0)
        return Problem(*self.trunk(), count)


def _mlp() -> tuple[nn.Module, int, Tensor]:
    trunk = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    return trunk, 128, torch.randn(64, 64)


def _lenet() -> tuple[nn.Module, int, Tensor]:
    trunk = nn.Sequential(
        nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(720, 50), nn.ReLU(),
    )  # fmt: skip
    return trunk, 50, torch.randn(128, 1, 36, 36)


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        same = before == after and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.skip(x)).relu()


def _resnet() -> tuple[nn.Module, int, Tensor]:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    before = 64
    for after, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        layers.append(_Residual(before, after, stride))
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 512, torch.randn(32, 3, 32, 32)


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _transformer() -> tuple[nn.Module, int, Tensor]:
    layers = [nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, batch_first=True) for _ in range(6)]
    return nn.Sequential(*layers, _Mean()), 384, torch.randn(16, 64, 384)


def _wide() -> tuple[nn.Module, int, Tensor]:
    layers: list[nn.Module] = [nn.Linear(256, 3072), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(3072, 3072), nn.ReLU()]
    return nn.Sequential(*layers), 3072, torch.randn(4, 256)


WORKLOADS = {
    w.name: w
    for w in (
        Workload("a", "MLP 64-128-128, batch 64: overhead", _mlp, (2, 3, 10, 40)),
        Workload("b", "LeNet, 36x36, batch 128", _lenet, (2, 3, 10, 40)),
        Workload("c", "ResNet-18 for 32x32, 11 M parameters, batch 32", _resnet, (2, 3)),
        Workload("d", "transformer encoder, 10.6 M parameters, 16 x 64 tokens", _transformer, (2, 3)),
        Workload("e", "wide linear trunk, 29 M parameters, batch 4: traffic", _wide, (2, 3, 10)),
    )
}
