"""PASCAL-Context: photos with classes (21), human parts, saliency, surface normals and edges, as in ASTMT and MTI-Net.

The set-up is that of NYUD-v2 (Vandenhende et al., "MTI-Net", ECCV 2020), with the factors of the losses published for
this data set. Images keep their size, padded to 512 x 512 as in ATRC. Most have no humans and so no target for that
task. Published trunks start from ImageNet's weights: give a file of them with --set pretrained=FILE.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from detente.benchmark.datasets import pascal_context
from detente.benchmark.dense.networks import with_trunk
from detente.benchmark.dense.tasks import Classes, Dense, Edges, Normals, Saliency
from detente.benchmark.problems import nyud

scene = Dense(
    {
        "segmentation": Classes(pascal_context.CLASSES, figures=("miou",)),
        "human_parts": Classes(len(pascal_context.PARTS), weight=2.0, figures=("miou",)),
        "saliency": Saliency(weight=5.0),
        "normals": Normals(weight=10.0, absolute=True, figures=("mean_angle",)),
        "edges": Edges(weight=50.0, positive=0.95),
    }
)
tasks, losses, counts, metrics = scene.tasks, scene.losses, scene.counts, scene.metrics
make_scheduler = nyud.make_scheduler
settings: dict[str, Any] = dict(nyud.settings)
presets: dict[str, dict[str, Any]] = {
    "vandenhende2020mti": {"protocol": "max-over-training"},
    "vandenhende2021multi": {"protocol": "max-over-training", "architecture": "resnet18", "batch_size": 6},
}
download = """PASCAL-Context as in ATRC: https://data.vision.ee.ethz.ch/brdavid/atrc/PASCALContext.tar.gz, which
https://github.com/prismformore/Multi-Task-Transformer/tree/main/InvPT names. Unpack it so that data/pascal_context
(or the folder that --data names) holds:
    JPEGImages/NAME.jpg
    semseg/VOC12/NAME.png or semseg/pascal-context/NAME.png    classes 0 to 20, 255 for none
    human_parts/NAME.mat
    sal_distill/NAME.png           0..255, salient above 127
    normals_distill/NAME.png       RGB, -1..1 as 0..255
    pascal-context/trainval/NAME.mat                           459 classes, for the edges
    ImageSets/Context/train.txt, ImageSets/Context/val.txt     4998 and 5105 names"""


def make_data(directory: Path, partial: bool = False) -> dict[str, Dataset[tuple[Tensor, ...]]]:
    """Samples of image [3, 512, 512], classes, human parts, saliency, normals [3, ..], edges; test is official val.

    Raises:
        DataError: files are missing, or (when a sample is read) not the official ones.
    """
    read = pascal_context.read(directory, download, partial)
    return scene.splits(read, scales=(0.75, 1.25), between=True, degrees=20.0)


def make_model(
    tasks: tuple[str, ...],
    architecture: str = "hrnet18",
    width: float = 1.0,
    dropout: float = 0.0,
    pretrained: str = "",
) -> nn.Module:
    """:func:`detente.benchmark.dense.networks.with_trunk`."""
    return with_trunk(scene.channels(tasks), architecture, width, dropout, pretrained)
