"""detente: train one PyTorch network on several tasks whose gradients conflict.

One line instead of ``loss.backward()``::

    detente.backward({"depth": depth_loss, "segmentation": segmentation_loss}, detente.CAGrad(c=0.4))
"""

from detente import diagnostics, methods, nn
from detente.aggregate import aggregate
from detente.backward import backward
from detente.diagnostics import Recorder
from detente.engine.source import Disjoint, Every, Sampled
from detente.history import History
from detente.method import GramianMethod, LossWeighting, Method, Update, cite, get_method, list_methods
from detente.methods import *  # noqa: F403
from detente.step import step

__version__ = "0.1.0"

__all__ = [
    "Disjoint",
    "Every",
    "GramianMethod",
    "History",
    "LossWeighting",
    "Method",
    "Recorder",
    "Sampled",
    "Update",
    "aggregate",
    "backward",
    "cite",
    "diagnostics",
    "get_method",
    "list_methods",
    "nn",
    "step",
]
__all__ += methods.__all__
