"""Coefficients that are reused: the weighted gradient in one pass, heads as in a fresh step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detente


class Net(nn.Module):
    """Three tasks, with a skip past the features, an output weight tied to the trunk, and features of features."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 5) for _ in range(3))
        self.double()

    def losses(self, x: Tensor, shift: float = 0.0) -> dict[str, Tensor]:
        low = self.a(x).tanh()
        high = self.b(low).tanh()
        found = {}
        for t, head in enumerate(self.heads):
            h = head(high if t else low) if self.kind == "skip" else head(high)
            h = h @ self.a.weight.T if self.kind == "tied" and t == 1 else h
            found["abc"[t]] = (h - t - shift).square().mean()
        if self.kind == "loss of losses":
            found["c"] = found["c"] + found["a"] * found["b"]
        return found

    def named(self) -> dict[str, Tensor | None]:
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.named_parameters()}


def task_gradients(net: Net, x: Tensor, shift: float) -> list[dict[str, Tensor]]:
    rows = []
    for task in "abc":
        net.zero_grad()
        net.losses(x, shift)[task].backward()
        rows.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()})
    net.zero_grad()
    return rows


X = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("kind", ["plain", "skip", "tied"])
@pytest.mark.parametrize("method", ["cagrad", "pcgrad", "upgrad", "mgda"])
def test_a_step_in_between_is_the_weighted_gradient(kind, method, heads):
    net, source = Net(kind), detente.Every(2)
    rule = detente.get_method(method, heads=heads)
    fresh = detente.backward(net.losses(X), rule, source=source)
    assert (fresh.stats["backwards"], fresh.stats["reused"]) == (3, 0)
    wanted = task_gradients(net, X, 0.5)
    update = detente.backward(net.losses(X, 0.5), rule, source=source)
    assert (update.stats["backwards"], update.stats["reused"]) == (1, 1)
    assert update.gramian is None
    assert update.weights == fresh.weights
    weights = [float(update.weights[task]) for task in "abc"]
    for name, found in net.named().items():
        own = heads == "own" and name.startswith("heads")
        mixed = sum((1.0 if own else w) * row[name] for w, row in zip(weights, wanted, strict=True))
        # one sum over tasks in another order, in float64
        torch.testing.assert_close(found, mixed, rtol=1e-12, atol=1e-13, msg=name)


def test_a_loss_that_others_are_computed_from():
    net, source, rule = Net("loss of losses"), detente.Every(2), detente.MGDA(heads="weighted")
    detente.backward(net.losses(X), rule, source=source)
    wanted = task_gradients(net, X, 0.5)
    update = detente.backward(net.losses(X, 0.5), rule, source=source)
    weights = [float(update.weights[task]) for task in "abc"]
    for name, found in net.named().items():
        mixed = sum(w * row[name] for w, row in zip(weights, wanted, strict=True))
        torch.testing.assert_close(found, mixed, rtol=1e-12, atol=1e-13, msg=name)


def test_listed_parameters_that_one_task_reaches_are_mixed_too():
    net, source, rule = Net("plain"), detente.Every(2), detente.MGDA(heads="own")
    shared = [*net.a.parameters(), *net.b.parameters(), net.heads[0].weight]
    detente.backward(net.losses(X), rule, shared=shared, source=source)
    wanted = task_gradients(net, X, 0.5)
    update = detente.backward(net.losses(X, 0.5), rule, shared=shared, source=source)
    torch.testing.assert_close(
        net.heads[0].weight.grad, update.weights["a"] * wanted[0]["heads.0.weight"], rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(net.heads[0].bias.grad, wanted[0]["heads.0.bias"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("heads", ["own", "weighted"])
def test_the_head_of_a_task_that_was_left_out_still_trains(heads):
    net, source, rule = Net("plain"), detente.Every(3), detente.CAGrad(heads=heads)
    nn.init.zeros_(net.heads[1].weight)
    assert detente.backward(net.losses(X), rule, source=source).stats["dropped"] == ["b"]
    saved = source.state_dict()
    source = detente.Every(3)
    source.load_state_dict(saved)
    wanted = task_gradients(net, X, 0.5)
    update = detente.backward(net.losses(X, 0.5), rule, source=source)
    assert update.stats["reused"] == 1
    weights = {task: float(update.weights[task]) for task in "abc"}
    assert weights["b"] == 0
    torch.testing.assert_close(net.heads[1].weight.grad, wanted[1]["heads.1.weight"], rtol=1e-12, atol=1e-14)
    factor = weights["a"] if heads == "weighted" else 1.0
    torch.testing.assert_close(net.heads[0].bias.grad, factor * wanted[0]["heads.0.bias"], rtol=1e-12, atol=1e-14)
    mix = weights["a"] * wanted[0]["b.weight"] + weights["c"] * wanted[2]["b.weight"]
    torch.testing.assert_close(net.b.weight.grad, mix, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("inner", ["parameters", "features", "sampled"])
def test_fresh_steps_are_those_of_the_inner_source(inner):
    net = Net("plain")
    source, alone = (detente.Sampled(1, 3) if inner == "sampled" else inner for _ in range(2))
    every, rule, found = detente.Every(3, source), detente.CAGrad(), []
    for step in range(7):
        net.zero_grad()
        update = detente.backward(net.losses(X, step / 7), rule, source=every)
        found.append(update.stats["reused"])
        if step % 3 == 0:
            kept = net.named()
            net.zero_grad()
            detente.backward(net.losses(X, step / 7), rule, source=alone)
            assert all(torch.equal(kept[name], grad) for name, grad in net.named().items())
    assert found == [0, 1, 2, 0, 1, 2, 0]


def test_every_step_is_fresh_with_one():
    net, source = Net("plain"), detente.Every(1)
    assert [detente.backward(net.losses(X), detente.CAGrad(), source=source).stats["backwards"] for _ in range(2)] == [
        3, 3
    ]  # fmt: skip


def test_a_task_without_coefficient_makes_a_fresh_step():
    """Task "c" alone shares nothing, and leaves the coefficients as they were."""
    net, source = Net("plain"), detente.Every(10)

    def reused(tasks: str) -> int:
        losses = {task: loss for task, loss in net.losses(X).items() if task in tasks}
        return detente.backward(losses, detente.CAGrad(), source=source).stats.get("reused", 0)

    assert [reused("ab"), reused("ab"), reused("ba"), reused("bc"), reused("c"), reused("bc"), reused("abc")] == [
        0,
        1,
        2,
        0,
        0,
        1,
        0,
    ]


def test_a_weighting_sees_every_step():
    net, source, rule = Net("plain"), detente.Every(2), detente.CAGrad()
    weighting = detente.LossPower()
    first = detente.backward(net.losses(X), rule, source=source, weighting=weighting)
    wanted = task_gradients(net, X, 0.5)
    losses = net.losses(X, 0.5)
    values = torch.stack([loss.detach() for loss in losses.values()])
    factors = detente.LossPower().weights(values)
    update = detente.backward(losses, rule, source=source, weighting=weighting)
    before = detente.LossPower().weights(torch.stack([loss.detach() for loss in net.losses(X).values()]))
    for t, task in enumerate("abc"):
        raw = first.weights[task] / before[t]
        torch.testing.assert_close(update.weights[task], raw * factors[t], rtol=1e-12, atol=1e-14)
    net.zero_grad()
    detente.backward(net.losses(X, 0.5), rule, source=source, weighting=weighting)
    assert torch.allclose(net.heads[1].bias.grad, factors[1] * wanted[1]["heads.1.bias"], rtol=1e-12)


def test_state_goes_on_where_it_was_saved(tmp_path):
    def run(steps: range, source: detente.Every, method: Any) -> list[Tensor]:
        found = []
        for step in steps:
            net = Net("plain")
            detente.backward(net.losses(X, step / 7), method, source=source)
            found.append(net.a.weight.grad)
        return found

    whole = run(range(8), detente.Every(3, detente.Sampled(1, 5)), detente.CAGrad())
    source = detente.Every(3, detente.Sampled(1, 5))
    begun = run(range(5), source, detente.CAGrad())
    torch.save(source.state_dict(), tmp_path / "source.pt")
    other = detente.Every(3, detente.Sampled(1, 9))
    other.load_state_dict(torch.load(tmp_path / "source.pt", weights_only=True))
    assert all(map(torch.equal, whole, [*begun, *run(range(5, 8), other, detente.CAGrad())]))


def test_a_step_that_is_not_finite_is_never_reused():
    net, source = Net("plain"), detente.Every(3)
    losses = net.losses(X)
    losses["b"] = losses["b"] * float("inf")
    detente.backward(losses, detente.CAGrad(), source=source, scale=2.0)
    assert net.a.weight.grad.isnan().all()
    net.zero_grad()
    assert detente.backward(net.losses(X), detente.CAGrad(), source=source).stats["reused"] == 0
    losses = net.losses(X)
    losses["b"] = losses["b"] * float("inf")
    detente.backward(losses, detente.CAGrad(), source=source, scale=2.0)
    assert net.a.weight.grad.isnan().all()
    with pytest.raises(FloatingPointError, match="'b'"):
        detente.backward({**net.losses(X), "b": net.losses(X)["b"] * float("nan")}, detente.CAGrad(), source=source)
    net.zero_grad()
    assert detente.backward(net.losses(X), detente.CAGrad(), source=source).stats["reused"] == 1


def test_with_step():
    net, source = Net("plain"), detente.Every(2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def closure(tasks: Any = None) -> dict[str, Tensor]:
        return net.losses(X)

    found = [detente.step(closure, optimizer, detente.CAGrad(), source=source).stats["backwards"] for _ in range(4)]
    assert found == [3, 1, 3, 1]


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        (detente.CAGrad(), {"granularity": "layer"}, "one coefficient per task"),
        (detente.CAGrad(), {"source": detente.Every(2, "features"), "granularity": "channel"}, "one coefficient"),
        (detente.GradDrop(), {}, "rewrites the task gradients"),
        (detente.DWA(), {}, "source and storage do not apply"),
    ],
)
def test_what_it_cannot_do_is_an_error_before_anything_is_written(method, options, reason):
    net = Net("plain")
    with pytest.raises(ValueError, match=reason):
        detente.backward(net.losses(X), method, **{"source": detente.Every(2), **options})
    assert all(p.grad is None for p in net.parameters())


def test_a_parameter_left_out_of_shared_is_an_error():
    net = Net("plain")
    with pytest.raises(ValueError, match="not listed in `shared`"):
        detente.backward(net.losses(X), detente.CAGrad(), shared=[net.a.weight], source=detente.Every(2))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2"])
def test_the_number_of_steps_is_a_positive_whole_number(wrong):
    with pytest.raises(ValueError, match="k >= 1"):
        detente.Every(wrong)


@pytest.mark.parametrize("wrong", ["feature", None, detente.Every(2)])
def test_the_inner_source_is_one_that_takes_gradients(wrong):
    with pytest.raises(ValueError, match="source must be"):
        detente.Every(2, wrong)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("no gradient from here")


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("what", ["reused", "features", "weighting"])
def test_a_pass_that_fails_half_way_writes_nothing(what, kept):
    net = Net("plain")
    every = detente.Every(5)
    method = detente.RLW() if what == "weighting" else detente.CAGrad()
    source = {"reused": every, "features": "features", "weighting": "parameters"}[what]
    if kept or what == "reused":
        detente.backward(net.losses(X), method, source=source)
    if not kept:
        net.zero_grad()
    before = net.named()
    high = net.b(Fails.apply(net.a(X)).tanh()).tanh()
    losses = {"abc"[t]: (head(high) - t).square().mean() for t, head in enumerate(net.heads)}
    with pytest.raises(RuntimeError, match="no gradient from here"):
        detente.backward(losses, method, source=source)
    for name, grad in net.named().items():
        assert (grad is None) == (before[name] is None)
        assert grad is None or torch.equal(grad, before[name])
    if what == "reused":
        assert every.reused == 0
