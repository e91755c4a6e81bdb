"""The nine-layer convolutional network of the CelebA experiments with 40 attributes.

Layers as in FAMO's code (Liu et al., NeurIPS 2023, arXiv 2306.03792; github.com/Cranial-XIX/FAMO,
experiments/celeba/models.py): seven convolutions and two linear layers, all with batch norm.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detente.benchmark.models import layers
from detente.benchmark.models.layers import block, scaled


class CelebANet(nn.Module):
    """A shared trunk with 512 features, and a linear layer per attribute.

    Maps [B, 3, 64, 64] (any size of at least 8 works) to {task: logits [B]}.

    Args:
        tasks: names of the attributes.
        dropout: rate before the attributes' layers.
        width: multiplies the trunk's channels and features.
    """

    def __init__(self, tasks: Sequence[str], dropout: float = 0.0, width: float = 1.0) -> None:
        super().__init__()
        a, b, c, d = (scaled(channels, width) for channels in (64, 128, 256, 512))
        pool = nn.MaxPool2d(2)
        self.trunk = nn.Sequential(
            block(3, a),
            pool,
            block(a, b),
            block(b, b),
            pool,
            block(b, c),
            block(c, c),
            pool,
            block(c, d),
            block(d, d),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            _linear(d),
            _linear(d),
            layers.dropout(dropout),
        )
        self.heads = nn.ModuleDict({task: nn.Linear(d, 1) for task in tasks})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        return {task: head(features).squeeze(-1) for task, head in self.heads.items()}


def _linear(features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU())
