"""How each peer takes a whole step: from a problem with zeroed gradients to written ``.grad``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from common import NotThereYet  # first: sets the threads

# isort: split
import torch
import torchjd.aggregation as tj
from conflictfree.grad_operator import ConFIG_update, IMTLGOperator, PCGradOperator
from conflictfree.utils import apply_gradient_vector, get_gradient_vector
from pairs import PAIRS
from torchjd.autojac import jac_to_grad, mtl_backward
from workloads import Problem

__all__ = ["METHODS", "PEERS", "Step"]

Step = Callable[[Problem], object]
METHODS = {p.label: p for p in PAIRS if isinstance(p.theirs(2, False), tj.Aggregator)}


def torchjd(label: str, count: int, chunk: int | None = None) -> Step:
    """Its ``mtl_backward``; ``chunk``: tasks that are backpropagated at once, all of them by default."""
    aggregator = METHODS[label].theirs(count, False)

    def run(problem: Problem) -> None:
        features = problem.features()
        mtl_backward(problem.losses(features), features=features, parallel_chunk_size=chunk)
        jac_to_grad(problem.trunk.parameters(), aggregator)

    return run


def _libmtl() -> ModuleType:
    """The weightings of LibMTL, whose package otherwise asks for torchvision, which has no build for this torch."""
    if "LibMTL" not in sys.modules:
        found = find_spec("LibMTL")
        assert found is not None
        package = ModuleType("LibMTL")
        package.__path__ = list(found.submodule_search_locations or ())
        sys.modules["LibMTL"] = package
    return importlib.import_module("LibMTL.weighting")


_LIBMTL: dict[str, tuple[str, dict[str, Any]]] = {
    "cagrad(c=0.5)": ("CAGrad", {"calpha": 0.5, "rescale": 0}),
    "mgda": ("MGDA", {"mgda_gn": "none"}),
    "pcgrad": ("PCGrad", {}),
}


def libmtl(label: str, count: int) -> Step:
    """A weighting of LibMTL on our trunk, called as its trainer calls it; it must read what the trainer would set."""
    if label not in _LIBMTL:
        raise NotThereYet(label)
    if label.startswith("cagrad") and count != 3:
        raise NotThereYet("the CAGrad of LibMTL 1.1.5 is for three tasks")
    name, options = _LIBMTL[label]
    weighting = getattr(_libmtl(), name)()
    weighting.task_num, weighting.rep_grad = count, False

    def run(problem: Problem) -> None:
        weighting.device = problem.inputs.device
        weighting.get_share_params = problem.trunk.parameters
        weighting.zero_grad_share_params = lambda: problem.trunk.zero_grad(set_to_none=False)
        weighting.backward(torch.stack(problem.losses(problem.features())), **options)

    return run


_CONFLICTFREE: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {
    "config": ConFIG_update,
    "imtl_g": IMTLGOperator().calculate_gradient,
    "pcgrad": PCGradOperator().calculate_gradient,
}


def conflictfree(label: str, count: int) -> Step:
    """A step as its documentation writes it, with the gradients of the trunk."""
    if label not in _CONFLICTFREE:
        raise NotThereYet(label)

    def run(problem: Problem) -> None:
        rows = []
        losses = problem.losses(problem.features())
        for t, loss in enumerate(losses):
            problem.trunk.zero_grad()
            loss.backward(retain_graph=t < count - 1)
            rows.append(get_gradient_vector(problem.trunk))
        apply_gradient_vector(problem.trunk, _CONFLICTFREE[label](rows))

    return run


PEERS: dict[str, Callable[[str, int], Step]] = {
    "torchjd": torchjd,
    "torchjd, chunk 1": lambda label, count: torchjd(label, count, 1),
    "LibMTL": libmtl,
    "conflictfree": conflictfree,
}
