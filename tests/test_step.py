"""detente.step: the same as zero_grad, backward and step by hand, and the order of a closure's calls."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import detente
from states import plain

ALL = [name for name in detente.list_methods() if name != "connection_strength"]
TASKS = ("a", "b", "c")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
            self.heads = nn.ModuleDict({t: nn.Linear(6, 1) for t in TASKS})
            self.x, self.y = torch.randn(12, 4), torch.randn(3, 12, 1)
        self.asked: list[tuple[str, ...] | None] = []

    def closure(self, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        self.asked.append(tasks)
        h = self.trunk(self.x)
        return {t: (self.heads[t](h) - self.y[TASKS.index(t)]).square().mean() for t in tasks or TASKS}


def equal(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_is_the_loop_written_out(name, optimizer):
    net, twin = Net(), Net()
    method, by_hand = detente.get_method(name), detente.get_method(name)
    one, two = OPTIMIZERS[optimizer](net.parameters()), OPTIMIZERS[optimizer](twin.parameters())
    for _ in range(4):
        update = detente.step(net.closure, one, method)
        two.zero_grad()
        wanted = detente.backward(twin.closure(), by_hand)
        two.step()
        assert equal(net, twin)  # the same operations in the same order: bit for bit
        assert all(torch.equal(update.weights[t], wanted.weights[t]) for t in TASKS)
    assert net.asked == [None] * 4, "one forward pass per step"
    assert not equal(net, Net())


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "layer"},
        {"weighting": detente.GD(weights=[1.0, 2.0, 3.0])},
        {"source": "sampled"},
        {"shared": "last"},
    ],
    ids=str,
)
def test_options_go_through(options):
    net, twin = Net(), Net()
    one, two = (torch.optim.SGD(n.parameters(), lr=0.1) for n in (net, twin))

    def given(n: Net) -> dict[str, object]:
        if "source" in options:
            return {"source": detente.Sampled(1, seed=2)}
        # a generator: must survive being read once
        return {"shared": (p for p in [n.trunk[0].weight])} if "shared" in options else options

    detente.step(net.closure, one, detente.CAGrad(), **given(net))
    detente.backward(twin.closure(), detente.CAGrad(), **given(twin))
    two.step()
    assert equal(net, twin)
    plain = Net()
    detente.step(plain.closure, torch.optim.SGD(plain.parameters(), lr=0.1), detente.CAGrad())
    assert not equal(net, plain)


def test_gradients_of_an_earlier_step_are_dropped_and_absent_heads_stay_put():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    detente.step(net.closure, optimizer, detente.CAGrad())
    before = copy.deepcopy(net.heads["c"].state_dict())
    detente.step(lambda tasks=None: net.closure(("a", "b")), optimizer, detente.CAGrad())
    assert net.heads["c"].weight.grad is None
    assert all(torch.equal(before[k], v) for k, v in net.heads["c"].state_dict().items()), (
        "no momentum without gradient"
    )


def test_the_closure_may_be_any_callable_that_takes_tasks():
    class Step:
        def __init__(self) -> None:
            self.net = Net()

        def __call__(self, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
            return self.net.closure(tasks)

    step = Step()
    update = detente.step(step, torch.optim.SGD(step.net.parameters(), lr=0.1), detente.PCGrad())
    assert list(update.weights) == list(TASKS)


@pytest.mark.parametrize("name", ALL)
def test_training_with_step_lowers_every_loss(name):
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    start = {t: float(v.detach()) for t, v in net.closure().items()}
    method = detente.get_method(name)
    for k in range(100):
        detente.step(net.closure, optimizer, method)
        if k % 20 == 19:
            method.next_epoch()
    end = {t: float(v.detach()) for t, v in net.closure().items()}
    # twelve samples, fifty parameters: any method that moves the right way takes a fifth off each loss
    assert all(end[t] < 0.8 * start[t] for t in TASKS), (start, end)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(value):
    net, method = Net(), detente.CDTT()
    optimizer = torch.optim.Adam(net.parameters())
    detente.step(net.closure, optimizer, method)
    before = copy.deepcopy(net.state_dict()), plain(optimizer.state_dict()), plain(method.state_dict())

    def closure(tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        losses = net.closure(tasks)
        return losses | {"b": losses["b"] * value}

    with pytest.raises(FloatingPointError, match=r"losses\['b'\]"):
        detente.step(closure, optimizer, method)
    assert (plain(optimizer.state_dict()), plain(method.state_dict())) == before[1:]
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before[0].values(), strict=True))


def test_an_error_in_the_closure_passes_through_and_moves_nothing():
    net, method = Net(), detente.PCGrad()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def closure(tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        raise LookupError("batch ran out")

    before = plain(method.state_dict())
    with pytest.raises(LookupError, match="batch ran out"):
        detente.step(closure, optimizer, method)
    assert plain(method.state_dict()) == before
    assert equal(net, Net())


def test_step_emits_no_warning():
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detente.step(net.closure, torch.optim.SGD(net.parameters(), lr=0.1), detente.CAGrad())
