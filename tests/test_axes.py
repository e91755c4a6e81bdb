"""Rule, source, granularity, task weights and partial steps are independent choices: any of them compose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detente
from detente.engine.graph import reach
from detente.method import Context, GramianMethod, registry

# another order of summation and a well-conditioned solve of a few tasks, in float64
TIGHT = {"rtol": 1e-9, "atol": 1e-12}
TASKS = ("a", "b", "c")
GRAMIAN = {name: cls for name, cls in registry().items() if issubclass(cls, GramianMethod) and "model" not in cls.needs}
GRANULARITIES = ("model", "layer", "channel")
SOURCES = ("parameters", "features")


class Net(nn.Module):
    """A small convolution, a linear layer, and a head per task."""

    def __init__(self, tasks: Sequence[str] = TASKS) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.conv, self.linear = nn.Conv2d(2, 3, 3), nn.Linear(12, 5)
            self.heads = nn.ModuleDict({t: nn.Linear(5, 2) for t in tasks})
            self.x, self.y = torch.randn(7, 2, 4, 4).double(), torch.randn(3, 7, 2).double()
        self.double()
        self.h = torch.empty(0)

    def losses(self, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        self.h = torch.tanh(self.linear(torch.tanh(self.conv(self.x)).flatten(1)))
        return {t: (self.heads[t](self.h) - self.y[TASKS.index(t)]).square().mean() for t in tasks or self.heads}

    @property
    def shared(self) -> list[nn.Parameter]:
        return [*self.conv.parameters(), *self.linear.parameters()]


def build(name: str, granularity: str = "model", **options: Any) -> GramianMethod:
    """A method; weighted heads have one coefficient per task, so blocks need heads of their own."""
    if granularity != "model" and GRAMIAN[name].heads == "weighted":
        options["heads"] = "own"
    method = detente.get_method(name, **options)
    assert isinstance(method, GramianMethod)
    return method


def combinations() -> list[tuple[str, str, str]]:
    return [
        (name, granularity, source)
        for name, cls in GRAMIAN.items()
        for granularity in GRANULARITIES
        for source in SOURCES
        if not (source == "features" and cls.per_parameter)
    ]


def finite(name: str, net: Net, tasks: Sequence[str] = TASKS) -> None:
    for p in [*net.shared, *(p for t in tasks for p in net.heads[t].parameters())]:
        assert p.grad is not None
        assert bool(p.grad.isfinite().all())
    if name != "gdod":  # no direction on which all tasks agree is a zero update, and no error
        assert sum(float(p.grad.abs().sum()) for p in net.shared) > 0


def descend(net: Net) -> None:
    with torch.no_grad():
        for p in net.parameters():
            if p.grad is not None:
                p -= 0.02 * p.grad / p.grad.norm().clamp_min(1e-9)
    net.zero_grad(set_to_none=True)


def test_what_does_not_compose_is_what_it_says():
    assert len(GRAMIAN) >= 20
    assert len(combinations()) == 6 * len(GRAMIAN) - 3 * sum(cls.per_parameter for cls in GRAMIAN.values())


@pytest.mark.parametrize("tasks", [("a", "b"), TASKS], ids=["two tasks", "three tasks"])
@pytest.mark.parametrize(("name", "granularity", "source"), combinations())
def test_every_rule_takes_every_granularity_and_source(name, granularity, source, tasks):
    """Over a few steps and an epoch's end, so that histories are read as well as written."""
    net, method = Net(tasks), build(name, granularity)
    blocks = {
        "parameters": {"model": 1, "layer": 4, "channel": 3 + 3 + 5 + 5},
        "features": {"model": 1, "layer": 1, "channel": 5},
    }
    for step in range(3):
        update = detente.backward(net.losses(), method, source=source, granularity=granularity)
        finite(name, net, tasks)
        assert list(update.weights) == list(tasks)
        shape = () if (count := blocks[source][granularity]) == 1 else (count,)
        assert all(w.shape == shape for w in update.weights.values())
        assert update.gramian.shape == (len(tasks), len(tasks))
        assert update.stats["backwards"] == (1 if source == "features" else len(tasks))
        descend(net)
        if step == 1:
            method.next_epoch()


ALONE = [name for name, cls in GRAMIAN.items() if not cls.stochastic and cls.kind == "gramian"]
# one coefficient per task for all blocks by definition: weights learned from the norms of the whole model
WHOLE = {"gradnorm"}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", [n for n in ALONE if n not in WHOLE])
def test_blocks_are_solved_one_by_one(name, source, granularity):
    """One solve per block on Gramians computed by hand. In their first step methods with a history have none."""
    net = Net()
    losses = net.losses()
    values = torch.stack([loss.detach() for loss in losses.values()])
    taken = reach(list(losses.values())).shared if source == "parameters" else [net.h]
    g = [torch.autograd.grad(loss, taken, retain_graph=True) for loss in losses.values()]
    dim = 0 if source == "parameters" else 1
    first = torch.ones(3, dtype=torch.float64)
    method = build(name, granularity)
    if method.own_weighting is not None:
        first = build(name, granularity).own_weighting.weights(values, Context(TASKS))
    if granularity == "model":
        pieces = [[(k, None) for k in range(len(taken))]]
    elif granularity == "layer":
        pieces = [[(k, None)] for k in range(len(taken))]
    else:
        pieces = [[(k, i)] for k, p in enumerate(taken) for i in range(p.shape[dim])]
    d = [torch.zeros_like(p) for p in taken]
    weights = []
    for piece in pieces:
        J = torch.stack([torch.cat([_slice(row[k], dim, i).reshape(-1) for k, i in piece]) for row in g])
        J = first[:, None] * J
        context = Context(TASKS, losses=values * first)
        weights.append(build(name, granularity).weights(J @ J.T, context) * first)
        for k, i in piece:
            part = sum(w * _slice(row[k], dim, i) for w, row in zip(weights[-1], g, strict=True))
            _slice(d[k], dim, i).copy_(part)
    wanted = d if source == "parameters" else torch.autograd.grad(net.h, net.shared, d[0])
    written = taken if source == "parameters" else net.shared
    update = detente.backward(net.losses(), method, source=source, granularity=granularity)
    got = torch.stack(list(update.weights.values()), -1).reshape(len(pieces), 3)
    scale = float(torch.stack(weights).abs().max())
    # coefficients of badly conditioned blocks (a bias is one number: all gradients parallel) cancel in the update
    torch.testing.assert_close(got, torch.stack(weights), rtol=1e-6, atol=1e-8 * scale)
    for p, expected in zip(written, wanted, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-7, atol=1e-9 * max(1.0, float(expected.abs().max())))


def _slice(tensor: Tensor, dim: int, i: int | None) -> Tensor:
    return tensor if i is None else tensor.select(dim, i)


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize("weighting", ["dwa", "uw"])
@pytest.mark.parametrize("name", GRAMIAN)
def test_a_loss_weighting_comes_first(name, weighting, granularity):
    """The method with a weighting is the method on the weighted losses; both histories go on."""
    if build(name).own_weighting is not None:
        net = Net()
        with pytest.raises(ValueError, match="weights the losses itself"):
            detente.backward(net.losses(), build(name), weighting=detente.get_method(weighting))
        assert all(p.grad is None for p in net.parameters())
        return
    options = {"window": 1} if weighting == "dwa" else {"lr": 0.2}
    one, two = detente.get_method(weighting, **options), detente.get_method(weighting, **options)
    net, method, reference = Net(), build(name, granularity), build(name, granularity)
    for _ in range(4):
        losses = net.losses()
        factors = two.weights(torch.stack([loss.detach() for loss in losses.values()]), Context(TASKS))
        scaled = {t: f * loss for f, (t, loss) in zip(factors, losses.items(), strict=True)}
        detente.backward(scaled, reference, granularity=granularity)
        wanted = [p.grad for p in net.parameters()]
        net.zero_grad(set_to_none=True)
        detente.backward(net.losses(), method, weighting=one, granularity=granularity)
        for p, expected in zip(net.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-7, atol=1e-9 * max(1.0, float(expected.abs().max())))
        descend(net)
    assert float(factors.std()) > 0, "the weights came to differ"


@pytest.mark.parametrize(("name", "granularity", "source"), combinations())
def test_a_weighting_beside_a_source_and_a_granularity(name, granularity, source):
    net, method, weighting = Net(), build(name, granularity), detente.DWA(window=1)
    if method.own_weighting is not None:
        return  # refused, as the test above holds
    for _ in range(3):
        detente.backward(net.losses(), method, source=source, granularity=granularity, weighting=weighting)
        finite(name, net)
        descend(net)


@pytest.mark.parametrize(("name", "granularity", "source"), combinations())
def test_a_task_may_be_missing(name, granularity, source):
    net, method = Net(), build(name, granularity)
    for tasks in (("a", "b"), TASKS, ("c", "a"), ("b", "c"), ("c", "b", "a")):
        update = detente.backward(net.losses(tasks), method, source=source, granularity=granularity)
        finite(name, net, tasks)
        assert list(update.weights) == list(tasks)
        assert all(p.grad is None for t in set(TASKS) - set(tasks) for p in net.heads[t].parameters())
        descend(net)


PREFERRED = [name for name in GRAMIAN if hasattr(build(name), "preference")]


def test_methods_with_a_preference():
    assert {"cagrad", "upgrad", "dualproj", "aligned_mtl", "conicgrad", "sdmgrad"} <= set(PREFERRED)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", PREFERRED)
def test_a_preference_may_be_a_loss_weighting(name, source, granularity):
    """GLS weighs by the inverse of the loss: the same as these weights given as a fixed preference."""
    net = Net()
    for tasks in (TASKS, ("c", "a")):
        losses = net.losses(tasks)
        inverse = torch.stack([1 / loss.detach() for loss in losses.values()])
        fixed = dict(zip(tasks, (inverse / inverse.sum()).tolist(), strict=True))
        detente.backward(losses, build(name, preference=fixed), source=source, granularity=granularity)
        wanted = [p.grad for p in net.shared]
        net.zero_grad(set_to_none=True)
        method = build(name, preference=detente.GLS())
        assert "losses" in method.needs
        detente.backward(net.losses(tasks), method, source=source, granularity=granularity)
        for p, expected in zip(net.shared, wanted, strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-7, atol=1e-9 * max(1.0, float(expected.abs().max())))
        net.zero_grad(set_to_none=True)
    plain = build(name)
    detente.backward(net.losses(), plain, source=source, granularity=granularity)
    assert any(not torch.equal(p.grad, expected) for p, expected in zip(net.shared, wanted, strict=True))


@pytest.mark.parametrize("name", PREFERRED)
def test_a_preference_with_a_history_takes_each_step_once(name):
    net, method, reference = Net(), build(name, preference=detente.DWA(window=1)), detente.DWA(window=1)
    for _ in range(4):
        losses = net.losses()
        shares = reference.weights(torch.stack([loss.detach() for loss in losses.values()]), Context(TASKS))
        fixed = (shares / shares.sum()).tolist()
        detente.backward(losses, build(name, preference=fixed))
        wanted = [p.grad for p in net.shared]
        net.zero_grad(set_to_none=True)
        detente.backward(net.losses(), method)
        for p, expected in zip(net.shared, wanted, strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-7, atol=1e-9 * max(1.0, float(expected.abs().max())))
        descend(net)


@pytest.mark.parametrize("name", GRAMIAN)
def test_blocks_with_weighted_heads_are_refused_before_anything_is_written(name):
    net = Net()
    method = detente.get_method(name, heads="weighted")
    for granularity in ("layer", "channel"):
        with pytest.raises(ValueError, match="heads='own'"):
            detente.backward(net.losses(), method, granularity=granularity)
    assert all(p.grad is None for p in net.parameters())


def test_tight_is_met_where_blocks_are_well_conditioned():
    """The tolerances above are for the worst method and block; without them the axes agree to rounding."""
    net = Net()
    losses = net.losses()
    g = [torch.autograd.grad(loss, net.shared, retain_graph=True) for loss in losses.values()]
    detente.backward(losses, detente.CAGrad(), granularity="layer")
    for k, p in enumerate(net.shared):
        J = torch.stack([row[k].reshape(-1) for row in g])
        torch.testing.assert_close(p.grad.reshape(-1), detente.CAGrad().weights(J @ J.T) @ J, **TIGHT)


# ---------------------------------------------------------------------------------------------------------------------
# Where the rule runs


def moved(name: str) -> GramianMethod:
    """A method that was moved to a device: its rule then works on tensors, wherever the Gramian is."""
    return build(name).to("meta")


ON_DEVICE = [name for name in GRAMIAN if moved(name).on_device]


@pytest.mark.parametrize("name", ON_DEVICE)
def test_a_method_on_a_device_gives_the_same_update(name):
    net = Net()
    detente.backward(net.losses(), build(name))
    wanted = [p.grad for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    detente.backward(net.losses(), moved(name))
    for p, expected in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-7, atol=1e-9 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("name", ["mgda", "nash_mtl", "cagrad"])
@pytest.mark.parametrize("heads", ["own", "weighted"])
def test_a_method_on_a_device_trains_the_head_of_a_task_without_a_shared_gradient(name, heads):
    net = Net()
    results = []
    for method in (build(name, heads=heads), build(name, heads=heads).to("meta")):
        losses = net.losses()
        losses["b"] = (net.heads["b"](net.h.detach()) - net.y[1]).square().mean() + 0 * net.h.sum()
        update = detente.backward(losses, method)
        assert float(update.weights["b"]) == 0
        results.append((update.stats["dropped"], net.heads["b"].weight.grad))
        net.zero_grad(set_to_none=True)
    assert results[0][0] == ["b"]
    assert float(results[0][1].abs().max()) > 0
    torch.testing.assert_close(results[1][1], results[0][1], **TIGHT)
    assert results[1][0] == ["b"]
