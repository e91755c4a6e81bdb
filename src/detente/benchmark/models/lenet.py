"""The small LeNet of two overlaid digits (MultiMNIST and its fashion variants).

Layers as in the code of Pareto MTL (Lin et al., NeurIPS 2019, arXiv 1912.12854; github.com/Xi-L/ParetoMTL,
multiMNIST/model_lenet.py), to which CAGrad (Liu et al., NeurIPS 2021, Appendix B.1) adds batch norm.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detente.benchmark.models import layers
from detente.benchmark.models.layers import scaled


class LeNet(nn.Module):
    """Two convolutions with max pooling and 50 features, shared; a linear layer per task.

    Maps [B, 1, size, size] to {task: class scores [B, classes]}.

    Args:
        tasks: names of the tasks.
        classes: classes of every task.
        size: side of the images, at least 16.
        dropout: rate before the tasks' layers.
        width: multiplies the channels of the convolutions, 10 (9 x 9) and 20 (5 x 5).
        norm: batch norm after the convolutions and the shared linear layer.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        classes: int = 10,
        size: int = 36,
        dropout: float = 0.0,
        width: float = 1.0,
        norm: bool = False,
    ) -> None:
        super().__init__()
        first, second = scaled(10, width), scaled(20, width)
        side = ((size - 8) // 2 - 4) // 2
        self.trunk = nn.Sequential(
            nn.Conv2d(1, first, 9),
            nn.BatchNorm2d(first) if norm else nn.Identity(),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5),
            nn.BatchNorm2d(second) if norm else nn.Identity(),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(second * side**2, 50),
            nn.BatchNorm1d(50) if norm else nn.Identity(),
            nn.ReLU(),
            layers.dropout(dropout),
        )
        self.heads = nn.ModuleDict({task: nn.Linear(50, classes) for task in tasks})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        return {task: head(features) for task, head in self.heads.items()}
