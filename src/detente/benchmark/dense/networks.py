"""The networks of the problems, from their settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import nn

from detente.benchmark.datasets.source import DataError, read_tensors
from detente.benchmark.models.hrnet import HRNet
from detente.benchmark.models.layers import scaled
from detente.benchmark.models.resnet import DenseModel, resnet18, resnet50
from detente.benchmark.models.segnet import SegNet

__all__ = ["segnet", "with_trunk"]

T = TypeVar("T")

TRUNKS: dict[str, Callable[[float], nn.Module]] = {
    "hrnet18": lambda width: HRNet(scaled(18, width), small=True),
    "resnet18": lambda width: resnet18(width=width, dilated=True),
    "resnet50": lambda width: resnet50(width=width, dilated=True),
}


def segnet(channels: Mapping[str, int], architecture: str, width: float, dropout: float) -> nn.Module:
    """SegNet with MTAN's attention ("mtan") or shared up to the tasks' last convolutions ("segnet").

    For one task both are the plain SegNet: the published single-task baseline.
    """
    attention = _chosen(architecture, {"mtan": len(channels) > 1, "segnet": False})
    return SegNet(channels, attention, width, dropout)


def with_trunk(
    channels: Mapping[str, int], architecture: str, width: float, dropout: float, pretrained: str
) -> nn.Module:
    """A trunk ("hrnet18": HRNet-W18-Small-v2, as MTI-Net has it; or dilated "resnet18" or "resnet50"), a head per task.

    Args:
        channels: of the tasks' outputs.
        architecture: of the trunk.
        width: multiplies the trunk's channels.
        dropout: rate before each task's last convolution.
        pretrained: a file of the trunk's weights, by the names of torchvision or the HRNet authors; "" for none.
    """
    trunk = _chosen(architecture, TRUNKS)(width)
    if pretrained:
        load_weights(trunk, Path(pretrained))
    return DenseModel(trunk, channels, dropout)


def load_weights(trunk: nn.Module, path: Path) -> None:
    """Load the weights of the trunk's layers from a file of ``torch.save``; what else is in it, as a head, is left.

    Raises:
        DataError: the file cannot be read, or lacks layers of the trunk.
    """
    given = read_tensors(path)
    own = trunk.state_dict()
    if not isinstance(given, dict):
        raise DataError(f"{path} holds a {type(given).__name__}; expected a dict of tensors, as state_dict() gives.")
    wrong = [name for name, value in own.items() if getattr(given.get(name), "shape", None) != value.shape]
    if wrong:
        raise DataError(
            f"{path} has no {wrong[0]!r} of shape {tuple(own[wrong[0]].shape)}. Is it a file for this architecture, "
            "and is width 1?"
        )
    trunk.load_state_dict({name: given[name] for name in own})


def _chosen(architecture: str, among: Mapping[str, T]) -> T:
    if architecture not in among:
        raise ValueError(f"architecture must be one of {', '.join(among)}; got {architecture!r}.")
    return among[architecture]
