"""Cross-stitch: the mixing is the paper's formula, and the identity leaves independent networks."""

from __future__ import annotations

import copy
import io
from itertools import pairwise

import pytest
import torch
from torch import nn

import detente
from detente.nn import CrossStitch, CrossStitchUnit

TASKS = ("seg.mask", "depth", "%")


def trunk() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Flatten()
    )


def equal(first: torch.Tensor, second: torch.Tensor) -> None:
    # the same kernels on the same numbers: not one bit may differ
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def close(first: torch.Tensor, second: torch.Tensor) -> None:
    # float64 sums of three terms of size 1 in another order: about 1e-15
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "channel_dim", "shape"),
    [(None, 1, (5, 4)), (None, 1, ()), (4, 1, (5, 4, 3, 2)), (4, 1, (5, 4)), (4, -1, (5, 3, 4)), (4, 2, (5, 3, 4, 2))],
)
def test_the_mix_is_the_sum_over_tasks(channels: int | None, channel_dim: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    unit = CrossStitchUnit(TASKS, channels, channel_dim=channel_dim).double()
    nn.init.normal_(unit.mixing)
    x = {task: torch.randn(shape, dtype=torch.float64) for task in reversed(TASKS)}
    mixed = unit(x)
    assert list(mixed) == list(TASKS)
    for i, task in enumerate(TASKS):
        expected = torch.zeros(shape, dtype=torch.float64)
        for j, other in enumerate(TASKS):
            if channels is None:
                expected += unit.mixing[i, j].detach() * x[other]
            else:
                for c in range(channels):
                    at = (slice(None),) * (channel_dim % len(shape)) + (c,)
                    expected[at] += unit.mixing[i, j, c].detach() * x[other][at]
        close(mixed[task], expected)


def test_initial_mixing() -> None:
    # float32 rounding of 0.9 and of (1 - 0.9) / 2
    torch.testing.assert_close(
        CrossStitchUnit(TASKS).mixing.detach(), torch.full((3, 3), 0.05) + 0.85 * torch.eye(3), rtol=1e-6, atol=0
    )
    equal(CrossStitchUnit(TASKS, same=1).mixing.detach(), torch.eye(3))
    equal(CrossStitchUnit(TASKS, same=1, different=1).mixing.detach(), torch.ones(3, 3))
    equal(CrossStitchUnit(["only"], 2).mixing.detach(), torch.ones(1, 1, 2))
    assert CrossStitchUnit(TASKS, 7).mixing.shape == (3, 3, 7)


@pytest.mark.parametrize("channels", [None, [4, 3]])
def test_the_identity_leaves_independent_networks(channels: list[int] | None) -> None:
    torch.manual_seed(0)
    model = CrossStitch(trunk(), TASKS, [2, 3], channels=channels, same=1.0, reset=True)
    alone = {task: nn.Sequential(*copy.deepcopy(model.network(task))) for task in TASKS}
    x = {task: torch.randn(5, 2, 6, 6) for task in TASKS}
    features = model(x)
    for task, network in alone.items():
        # 1 * x + 0 * y is x to the last bit, in whatever order it is added
        equal(features[task], network(x[task]))
    features["depth"].square().sum().backward()
    alone["depth"](x["depth"]).square().sum().backward()
    for task, network in alone.items():
        for p, reference in zip(model.network(task).parameters(), network.parameters(), strict=True):
            if task == "depth":
                # sums over 180 entries below 10 in float32, in another order: about 1e-5
                torch.testing.assert_close(p.grad, reference.grad, rtol=1e-4, atol=1e-4)
            else:
                assert p.grad is None or not p.grad.any()


@pytest.mark.parametrize(("after", "units"), [(None, range(6)), ([2, -2], [2, 4]), ([], [])])
def test_units_stand_behind_the_chosen_blocks(after: list[int] | None, units: range | list[int]) -> None:
    torch.manual_seed(0)
    model = CrossStitch(trunk(), TASKS, after, same=0.6, reset=True).double()
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    streams = [x, x, x]
    for k in range(6):
        streams = [model.network(task)[k](stream) for task, stream in zip(TASKS, streams, strict=True)]
        if k in units:
            streams = [0.6 * own + 0.2 * sum(s for s in streams if s is not own) for own in streams]
    for task, expected in zip(TASKS, streams, strict=True):
        # the units' 0.6 and 0.2 are float32
        torch.testing.assert_close(model(x)[task], expected, rtol=1e-6, atol=1e-6)
    assert len(model.mixing_parameters()) == len(units)


def test_copies_start_from_the_trunk_or_anew() -> None:
    torch.manual_seed(0)
    original = trunk()
    before = copy.deepcopy(original.state_dict())
    same, anew = CrossStitch(original, TASKS), CrossStitch(original, TASKS, reset=True)
    same(torch.randn(5, 2, 6, 6))
    for name, value in original.state_dict().items():
        equal(value, before[name])
    for task in TASKS:
        assert same.network(task)[0] is not original[0]
        equal(same.network(task)[0].weight, original[0].weight)
    weights = [original[0].weight, *(anew.network(task)[0].weight for task in TASKS)]
    assert all(not torch.equal(a, b) for a, b in pairwise(weights))


def test_tied_blocks_stay_tied() -> None:
    block = nn.Linear(3, 3)
    model = CrossStitch([block, nn.ReLU(), block], ["a", "b"])
    assert model.network("a")[0] is model.network("a")[2] is not model.network("b")[0]


def test_parameters_come_in_two_groups() -> None:
    model = CrossStitch(trunk(), TASKS, [2, 4], channels=[4, 3])
    groups = [model.network_parameters(), model.mixing_parameters()]
    assert sum(map(len, groups)) == len(list(model.parameters()))
    assert [tuple(p.shape) for p in groups[1]] == [(3, 3, 4), (3, 3, 3)]
    model(torch.randn(5, 2, 6, 6))["depth"].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in groups[1])


def test_conflicts_are_resolved_on_all_that_is_mixed() -> None:
    torch.manual_seed(0)
    model = CrossStitch(trunk(), ("a", "b"), [2])
    features = model(torch.randn(5, 2, 6, 6))
    losses = {"a": features["a"].mean(), "b": -features["b"].mean()}
    detente.backward(losses, detente.CAGrad())
    assert all(p.grad is not None for p in model.parameters())
    for task in ("a", "b"):  # behind the last unit only the task's own loss
        (own,) = torch.autograd.grad(model(torch.zeros(1, 2, 6, 6))[task].sum(), [model.network(task)[3].weight])
        assert own.shape == model.network(task)[3].weight.grad.shape


def test_state_dict_is_matched_by_name() -> None:
    torch.manual_seed(0)
    model = CrossStitch(trunk(), TASKS, [2, 4], reset=True).eval()
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    loaded = CrossStitch(trunk(), TASKS, [2, 4]).eval()
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    x = torch.randn(2, 2, 6, 6)
    for task in TASKS:
        equal(loaded(x)[task], model(x)[task])


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: CrossStitchUnit("ab"), ValueError, "string 'ab'"),
        (lambda: CrossStitchUnit(["a"], 0), ValueError, "channels must be"),
        (lambda: CrossStitch(nn.Linear(2, 2), ["a"]), TypeError, "Sequential or a list.*got Linear"),
        (lambda: CrossStitch([], ["a"]), ValueError, "no blocks"),
        (lambda: CrossStitch(trunk(), ["a"], [6]), ValueError, "from -6 to 5; got 6"),
        (lambda: CrossStitch(trunk(), ["a"], [5, -1]), ValueError, r"\[5\] appear more than once"),
        (lambda: CrossStitch(trunk(), ["a"], [1], channels=[4, 4]), ValueError, "expected 1.*got 2"),
        (lambda: CrossStitch([Bare()], ["a"], reset=True), ValueError, r"reset_parameters.*trunk\[0\]"),
        (lambda: CrossStitch(trunk(), ["a"]).network("b"), KeyError, "'b'"),
    ],
)
def test_bad_arguments(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


class Bare(nn.Module):
    """A parameter that nobody knows how to initialise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_bad_activations() -> None:
    unit = CrossStitchUnit(["a", "b"], 4)
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"all its tasks \['a', 'b'\].*got \['a'\]"):
        unit({"a": x})
    with pytest.raises(ValueError, match="one shape"):
        unit({"a": x, "b": torch.ones(2, 5)})
    with pytest.raises(ValueError, match=r"expected 4 channels in dimension 1.*channels=5"):
        unit({"a": torch.ones(2, 5), "b": torch.ones(2, 5)})
    with pytest.raises(TypeError, match="got Tensor"):
        unit(x)
    with pytest.raises(ValueError, match="needs the activations"):
        CrossStitch([nn.Linear(4, 4)], ["a", "b"])({"a": x, "c": x})
