"""The pages on other libraries: their block and ours give the same, or differ by what the page says."""

from __future__ import annotations

import inspect
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import detente
from reference import bargaining, directions, projections
from reference.geometry import Array

PAGES = Path(__file__).parents[1] / "docs/migration"
PAIRS = {"torchjd.md": 5, "libmtl.md": 1, "papers.md": 4}
NEEDS = {
    "torchjd": ("torchjd", "qpsolvers", "quadprog"),
    "libmtl": ("LibMTL", "scipy"),
    "conflictfree": ("conflictfree",),
}
FENCE = re.compile(r'^```python title="(.+?)"\n((?:.*\n)*?)```$', re.MULTILINE)
STATED = re.compile(r"^# theirs is (?:within (?P<within>\S+)|(?P<away>\S+) away)$", re.MULTILINE)


class Pair(NamedTuple):
    """Two consecutive blocks, and how far apart their results are: ``within`` this distance, or this far ``away``."""

    peer: str
    theirs: str
    ours: str
    within: float | None
    away: float | None


def pairs(page: str) -> list[Pair]:
    blocks = FENCE.findall((PAGES / page).read_text())
    assert [title == "detente" for title, _ in blocks] == [False, True] * (len(blocks) // 2), page
    found = []
    for (peer, theirs), (_, ours) in zip(blocks[::2], blocks[1::2], strict=True):
        (stated,) = STATED.finditer(ours)
        within, away = (None if text is None else float(text) for text in stated.group("within", "away"))
        found.append(Pair(peer, theirs, ours, within, away))
    return found


EVERY = [pytest.param(pair, id=f"{page} {k} {pair.peer}") for page in PAIRS for k, pair in enumerate(pairs(page))]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """The LibMTL block stands in for a module that torchvision no longer has."""
    stand_in = "torchvision.models.utils"
    before = sys.modules.get(stand_in)
    random.seed(0)
    yield
    for name in [n for n in sys.modules if n == "LibMTL" or n.startswith("LibMTL.")]:
        del sys.modules[name]
    if before is None:
        sys.modules.pop(stand_in, None)
    else:
        sys.modules[stand_in] = before


def run(block: str) -> Tensor:
    names: dict[str, object] = {"__name__": "document"}
    exec(compile(block, "document", "exec"), names)
    result = names["result"]
    assert isinstance(result, Tensor)
    assert result.dim() == 1
    assert bool(result.isfinite().all())
    return result.double()


def distance(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).norm() / ours.norm())


def test_all_pairs_are_found():
    assert {page: len(pairs(page)) for page in PAIRS} == PAIRS
    assert sorted(page.name for page in PAGES.glob("*.md")) == sorted([*PAIRS, "index.md"])
    assert all(page.read_text().count("```python") == len(FENCE.findall(page.read_text())) for page in PAGES.iterdir())


@pytest.mark.parametrize("pair", EVERY)
def test_our_block_runs(pair):
    run(pair.ours)


@pytest.mark.parametrize("pair", EVERY)
def test_both_blocks_give_the_same(pair, monkeypatch):
    if pair.peer.endswith("script"):
        ours = run(pair.ours)
        with monkeypatch.context() as patch:
            patch.setattr(detente, "backward", by_hand(SCRIPTS[pair.peer]))
            theirs = run(pair.ours)
    else:
        for module in NEEDS[pair.peer]:
            if find_spec(module) is None:  # not imported: LibMTL's block makes room for it first
                pytest.skip(f"needs {module}")
        ours, theirs = run(pair.ours), run(pair.theirs)
    apart = distance(theirs, ours)
    if pair.within is not None:
        assert apart <= pair.within
    else:
        assert apart == pytest.approx(pair.away, rel=0.01)


@pytest.mark.parametrize("page", ["index.md", *PAIRS])
def test_linked_files_exist(page):
    prose = FENCE.sub("", (PAGES / page).read_text())
    for target in re.findall(r"\]\(([^)#\s]+)", prose):
        if not target.startswith("http"):
            assert (PAGES / target).exists(), target


@pytest.mark.parametrize("page", PAIRS)
def test_names_in_tables_exist(page):
    """``Name(...)`` in the second column is a method or a module, with these options."""
    for row in re.findall(r"^\| .+$", (PAGES / page).read_text(), re.MULTILINE):
        ours = row.split(" | ")[1]
        for name, options in re.findall(r"`(?:detente\.)?([A-Z]\w+)\(([^)`]*)\)`", ours):
            taken = inspect.signature(getattr(detente, name).__init__).parameters
            for option in re.findall(r"(\w+)=", options):
                assert option in taken, f"{name}({option}=)"


# ---------------------------------------------------------------------------------------------------------------------
# What the papers' scripts do, in plain steps and float64

Rule = Callable[[Array], "tuple[Array, Array]"]
"""Task gradients [T, P] to the update [P] and the weight of each task in its head."""


def leaves(loss: Tensor) -> dict[int, Tensor]:
    """The parameters behind a loss."""
    found: dict[int, Tensor] = {}
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting += [following for following, _ in node.next_functions]
    return found


def by_hand(rule: Rule) -> Callable[..., None]:
    """A ``detente.backward`` that takes one gradient after the other and applies the rule to the shared part."""

    def backward(losses: dict[str, Tensor], method: object, shared: Sequence[Tensor] | None = None) -> None:
        reached = [leaves(loss) for loss in losses.values()]
        everything = {key: p for some in reached for key, p in some.items()}
        if shared is None:
            shared = [p for key, p in everything.items() if sum(key in some for some in reached) > 1]
        parameters = list(everything.values())
        taken = [
            dict(
                zip(
                    everything, torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True), strict=True
                )
            )
            for loss in losses.values()
        ]
        rows = [
            torch.cat([(torch.zeros_like(p) if own[id(p)] is None else own[id(p)]).flatten() for p in shared])
            for own in taken
        ]
        d, weights = rule(torch.stack(rows).double().numpy())
        parts = torch.from_numpy(d).float().split([p.numel() for p in shared])
        for p, part in zip(shared, parts, strict=True):
            p.grad = part.reshape(p.shape)
        inside = {id(p) for p in shared}
        for weight, own in zip(weights.tolist(), taken, strict=True):
            for key, gradient in own.items():
                if gradient is not None and key not in inside:
                    everything[key].grad = weight * gradient

    return backward


def cagrad(J: Array) -> tuple[Array, Array]:
    return len(J) * directions.cagrad(J, 0.4, rescale=1), np.ones(len(J))


def pcgrad(J: Array) -> tuple[Array, Array]:
    """The mean where both tasks have a gradient, the sum elsewhere."""
    d = projections.pcgrad(J, [[1], [0]])
    return np.where((J != 0).all(0), d / 2, d), np.ones(2)


def nash(J: Array) -> tuple[Array, Array]:
    a, d, _ = bargaining.nash(J)
    return d / max(1.0, float(np.linalg.norm(d))), a


SCRIPTS: dict[str, Rule] = {"CAGrad script": cagrad, "PCGrad script": pcgrad, "Nash-MTL script": nash}
