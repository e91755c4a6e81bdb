"""source="features": the task gradients where the tasks part, and one pass through the trunk."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detente
from detente.diagnostics import task_gramian
from detente.engine.graph import Boundary, boundary, reach
from detente.method import Context, GramianMethod, registry
from reference import geometry
from states import plain

# another order of summation in float64
EXACT = {"rtol": 1e-12, "atol": 1e-13}
# the same behind a solve of a few tasks
TIGHT = {"rtol": 1e-9, "atol": 1e-12}
TASKS = ("a", "b", "c")


def parting(losses: list[Tensor]) -> Boundary:
    return boundary(losses, reach(losses))


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(**modules: nn.Module) -> nn.ModuleDict:
    net = nn.ModuleDict(modules).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / max(1, p.shape[-1]) ** 0.5)
    return net


def square(output: Tensor, seed: int) -> Tensor:
    return (output - data(*output.shape, seed=seed)).square().mean()


def linear(tasks: Sequence[str] = TASKS) -> dict[str, nn.Module]:
    return {t: nn.Linear(6, 1) for t in tasks}


# ---------------------------------------------------------------------------------------------------------------------
# Networks


class Forward:
    """A network with its losses; ``z`` holds the features of the last pass, in the order they were computed."""

    def __init__(self, net: nn.ModuleDict, run: Callable[[nn.ModuleDict], tuple[dict[str, Tensor], list[Tensor]]]):
        self.net = net
        self.run = run
        self.z: list[Tensor] = []

    def losses(self) -> dict[str, Tensor]:
        found, self.z = self.run(self.net)
        return found


def one() -> Forward:
    def run(net):
        h = torch.tanh(net["trunk"](data(9, 4)))
        return {t: square(net[t](h), k) for k, t in enumerate(TASKS)}, [h]

    return Forward(seeded(trunk=nn.Linear(4, 6), **linear()), run)


def deep_heads() -> Forward:
    """Heads with several layers, one of them with two outputs."""

    def run(net):
        h = torch.tanh(net["trunk"](data(9, 4)))
        first, second = net["b"](h).split(1, 1)
        return {"a": square(net["a"](h), 0), "b": square(first, 1) + 2 * square(second, 2).sqrt()}, [h]

    heads = {
        "a": nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)),
        "b": nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)),
    }
    return Forward(seeded(trunk=nn.Linear(4, 6), **heads), run)


def two_features() -> Forward:
    """A loss on either feature, and one that uses both."""

    def run(net):
        low = torch.tanh(net["trunk"](data(9, 4)))
        left, right = torch.tanh(net["left"](low)), torch.tanh(net["right"](low))
        losses = {
            "a": square(net["a"](left), 0) + square(net["a"](left), 5),
            "b": square(net["b"](right), 1),
            "c": square(net["c"](torch.cat([left, right], 1)), 2),
        }
        return losses, [left, right]

    heads = linear(("a", "b")) | {"c": nn.Linear(12, 1)}
    return Forward(seeded(trunk=nn.Linear(4, 5), left=nn.Linear(5, 6), right=nn.Linear(5, 6), **heads), run)


def skip() -> Forward:
    """Both heads read the input of the trunk's last layer beside its output: one feature comes out of the other."""

    def run(net):
        low = torch.tanh(net["trunk"](data(9, 4)))
        high = torch.tanh(net["last"](low))
        return {t: square(net[t](high) + net[t + "skip"](low), k) for k, t in enumerate("ab")}, [low, high]

    skips = {"askip": nn.Linear(5, 1), "bskip": nn.Linear(5, 1)}
    return Forward(seeded(trunk=nn.Linear(4, 5), last=nn.Linear(5, 6), **linear("ab"), **skips), run)


def partly() -> Forward:
    """Three tasks of which two share one more block."""

    def run(net):
        low = torch.tanh(net["trunk"](data(9, 4)))
        mid = torch.tanh(net["block"](low))
        return {"a": square(net["a"](low), 0), "b": square(net["b"](mid), 1), "c": square(net["c"](mid), 2)}, [low, mid]

    heads = {"a": nn.Linear(5, 1)} | linear("bc")
    return Forward(seeded(trunk=nn.Linear(4, 5), block=nn.Linear(5, 6), **heads), run)


def several_outputs() -> Forward:
    """A trunk whose last operation gives both tasks a piece of its own: two outputs of one node."""

    def run(net):
        left, right = torch.tanh(net["trunk"](data(9, 4))).split(6, 1)
        losses = {"a": square(net["a"](left), 0), "b": square(net["b"](right), 1)}
        losses["c"] = square(net["c"](left * right), 2)
        return losses, [left, right]

    return Forward(seeded(trunk=nn.Linear(4, 12), **linear()), run)


def convolution() -> Forward:
    def run(net):
        h = torch.tanh(net["trunk"](data(3, 2, 5, 5)))
        return {t: square(net[t](h), k) for k, t in enumerate("ab")}, [h]

    return Forward(seeded(trunk=nn.Conv2d(2, 4, 3), a=nn.Conv2d(4, 1, 1), b=nn.Conv2d(4, 2, 3)), run)


NETWORKS = [one, deep_heads, two_features, skip, partly, several_outputs, convolution]


def grads(net: nn.Module) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    return found


def assert_same(actual: dict[str, Any], wanted: dict[str, Any], **tolerance: float) -> None:
    for name in wanted:
        assert (actual[name] is None) == (wanted[name] is None), name
        if wanted[name] is not None:
            torch.testing.assert_close(actual[name], wanted[name], **tolerance)


def plain_sum(forward: Forward) -> dict[str, Tensor | None]:
    sum(forward.losses().values()).backward()
    return grads(forward.net)


class Fixed(GramianMethod):
    """Given coefficients, whatever the gradients."""

    name = "fixed"

    def __init__(self, *weights: float, heads: str = "own") -> None:
        super().__init__(heads=heads)
        self.given = weights

    def rule(self, gramian: Any, context: Context) -> Any:
        return gramian[..., 0] * 0 + torch.tensor(self.given, dtype=torch.float64).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Which features


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.__name__)
def test_the_features_are_found(network):
    forward = network()
    losses = forward.losses()
    found = parting(list(losses.values()))
    wanted = {torch.autograd.graph.get_gradient_edge(z) for z in forward.z}
    assert set(found.edges) == wanted
    assert len(found.edges) == len(wanted)
    assert found.nested == (network in (skip, partly))


def touched(found: Any, count: int) -> list[set[int]]:
    """The features that each task takes."""
    return [{k for _, task, taken in found.entries if task == t for _, k in taken} for t in range(count)]


def test_which_task_touches_which_feature():
    forward = partly()
    found = parting(list(forward.losses().values()))
    low, mid = (found.edges.index(torch.autograd.graph.get_gradient_edge(z)) for z in forward.z)
    assert touched(found, 3) == [{low}, {mid}, {mid}]
    forward = two_features()
    found = parting(list(forward.losses().values()))
    left, right = (found.edges.index(torch.autograd.graph.get_gradient_edge(z)) for z in forward.z)
    assert touched(found, 3) == [{left}, {right}, {left, right}]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.__name__)
@pytest.mark.parametrize(
    "build", [lambda: detente.GradDrop(leak=1.0), lambda: Fixed(1.0)], ids=["graddrop(leak=1)", "ones"]
)
@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
def test_coefficients_of_one_are_the_backward_of_the_sum(network, build, granularity):
    forward = network()
    wanted = plain_sum(forward)
    update = detente.backward(forward.losses(), build(), source="features", granularity=granularity)
    assert_same(grads(forward.net), wanted, **EXACT)
    assert update.stats["backwards"] == 1
    # in a block that a task does not reach it is left out, with coefficient 0 and a gradient of 0
    assert all(set(w.reshape(-1).tolist()) <= {0.0, 1.0} and bool(w.any()) for w in update.weights.values())


def test_pcgrad_without_conflicts_is_the_backward_of_the_sum():
    forward = one()

    def losses() -> dict[str, Tensor]:
        h = torch.tanh(forward.net["trunk"](data(9, 4)))
        return {"a": (h * forward.net["a"].weight.abs()).mean(), "b": (h * forward.net["b"].weight.abs()).sum()}

    sum(losses().values()).backward()
    wanted = grads(forward.net)
    update = detente.backward(losses(), detente.PCGrad(), source="features")
    assert update.stats["conflicts"] == 0
    assert_same(grads(forward.net), wanted, **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# By hand


def features_by_hand(forward: Forward) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
    """``g[t][k]``, the gradient of loss t at feature k through the task's own layers only; losses; features.

    The features are cut from the trunk, so that nothing flows on from one into another.
    """
    losses = forward.losses()
    cuts = list(forward.z)
    g = []
    for loss in losses.values():
        found = torch.autograd.grad(loss, cuts, retain_graph=True, allow_unused=True)
        g.append([torch.zeros_like(z) if f is None else f for f, z in zip(found, cuts, strict=True)])
    return g, list(losses.values()), cuts


FLAT = [n for n in NETWORKS if n not in (skip, partly)]


@pytest.mark.parametrize("network", FLAT, ids=lambda n: n.__name__)
def test_mgda_on_features_is_mgda_ub(network):
    """Gradients of z by autograd, the shortest vector of their hull, one backward of the weighted losses."""
    forward = network()
    g, losses, _ = features_by_hand(forward)
    J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in g])
    w, _ = geometry.min_norm(J.numpy())
    sum(float(a) * loss for a, loss in zip(w, losses, strict=True)).backward()  # heads="weighted", as in the paper
    wanted = grads(forward.net)
    update = detente.backward(forward.losses(), detente.MGDA(), source="features")
    assert_same(grads(forward.net), wanted, **TIGHT)
    torch.testing.assert_close(torch.stack(list(update.weights.values())), torch.from_numpy(w), **TIGHT)
    torch.testing.assert_close(update.gramian, J @ J.T, **TIGHT)


@pytest.mark.parametrize("network", [skip, partly], ids=lambda n: n.__name__)
def test_nested_features_count_each_path_once(network):
    """The gradient of a feature is what comes straight from the task, not what comes by way of another feature."""
    forward = network()
    losses = forward.losses()
    low, high = forward.z
    net, tasks = forward.net, list(losses)
    # by hand: the same heads on features without a trunk
    leaves = low.detach().requires_grad_(), high.detach().requires_grad_()
    if network is skip:
        cut = {t: square(net[t](leaves[1]) + net[t + "skip"](leaves[0]), k) for k, t in enumerate("ab")}
    else:
        cut = {t: square(net[t](leaves[t != "a"]), k) for k, t in enumerate(TASKS)}
    J = []
    for loss in cut.values():
        found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        J.append([torch.zeros_like(z) if f is None else f for f, z in zip(found, leaves, strict=True)])
    flat = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in J])
    w, _ = geometry.min_norm(flat.numpy())
    shared = [p for n, p in net.named_parameters() if n.split(".")[0] in ("trunk", "last", "block")]
    d = [sum(float(a) * row[k] for a, row in zip(w, J, strict=True)) for k in range(2)]
    wanted = torch.autograd.grad([low, high], shared, d)
    update = detente.backward(forward.losses(), detente.MGDA(heads="own"), source="features")
    for p, g in zip(shared, wanted, strict=True):
        torch.testing.assert_close(p.grad, g, **TIGHT)
    torch.testing.assert_close(update.gramian, flat @ flat.T, **TIGHT)
    assert list(update.weights) == tasks


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.__name__)
@pytest.mark.parametrize("method", [detente.CAGrad(), detente.PCGrad(), detente.EDM()], ids=lambda m: m.name)
def test_heads_get_their_own_gradient_once(network, method):
    forward = network()
    losses = forward.losses()
    reached: dict[str, list[Tensor]] = {}
    for loss in losses.values():
        found = torch.autograd.grad(loss, list(forward.net.parameters()), retain_graph=True, allow_unused=True)
        for (name, _), g in zip(forward.net.named_parameters(), found, strict=True):
            if g is not None:
                reached.setdefault(name, []).append(g)
    detente.backward(losses, method, source="features")
    got = grads(forward.net)
    heads = [name for name, parts in reached.items() if len(parts) == 1]
    assert len(heads) >= 4
    for name in heads:
        torch.testing.assert_close(got[name], reached[name][0], **EXACT)


@pytest.mark.parametrize("network", FLAT, ids=lambda n: n.__name__)
@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("name", ["cagrad", "edm", "aligned_mtl", "upgrad"])
def test_one_solve_per_feature_or_channel(network, granularity, name):
    """Blocks of the features: each feature, or each index of dimension 1 (dimension 0 is the sample)."""
    forward = network()
    g, losses, z = features_by_hand(forward)
    order = [parting(losses).edges.index(torch.autograd.graph.get_gradient_edge(part)) for part in z]
    d = [torch.zeros_like(part) for part in z]
    weights: dict[tuple[int, int], Tensor] = {}
    for k, part in enumerate(z):
        for i in range(part.shape[1]) if granularity == "channel" else [None]:
            where = (slice(None),) if i is None else (slice(None), i)
            J = torch.stack([row[k][where].reshape(-1) for row in g])
            w = detente.get_method(name).weights(J @ J.T)
            weights[order[k], i or 0] = w
            d[k][where] = sum(a * row[k][where] for a, row in zip(w, g, strict=True))
    shared = [p for n, p in forward.net.named_parameters() if n.split(".")[0] in ("trunk", "left", "right")]
    wanted = torch.autograd.grad(z, shared, d)
    update = detente.backward(forward.losses(), detente.get_method(name), source="features", granularity=granularity)
    for p, expected in zip(shared, wanted, strict=True):
        torch.testing.assert_close(p.grad, expected, **TIGHT)
    blocks = torch.stack([weights[key] for key in sorted(weights)])
    torch.testing.assert_close(torch.stack(list(update.weights.values()), -1).reshape(blocks.shape), blocks, **TIGHT)


def test_weighting_and_weighted_heads():
    forward = two_features()
    factors = {"a": 0.5, "b": 3.0, "c": 2.0}
    scaled = {t: factors[t] * loss for t, loss in forward.losses().items()}
    detente.backward(scaled, detente.MGDA(), source="features")
    wanted = grads(forward.net)
    detente.backward(forward.losses(), detente.MGDA(), source="features", weighting=detente.GD(weights=factors))
    assert_same(grads(forward.net), wanted, **TIGHT)


def test_scale_stays_in_grad():
    """1024 is a power of two: not one bit may differ."""
    forward = partly()
    before = detente.backward(forward.losses(), detente.CAGrad(), source="features")
    wanted = grads(forward.net)
    losses = {t: 1024 * loss for t, loss in forward.losses().items()}
    update = detente.backward(losses, detente.CAGrad(), source="features", scale=1024.0)
    got = grads(forward.net)
    for name, gradient in wanted.items():
        assert torch.equal(got[name], 1024 * gradient), name
    assert torch.equal(update.gramian, before.gramian)


# ---------------------------------------------------------------------------------------------------------------------
# Cost, precision, accumulation


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.__name__)
def test_one_pass_goes_through_the_trunk(network):
    forward = network()
    passes: list[int] = []
    losses = forward.losses()
    # the trunk's own weight is behind everything that is shared
    forward.net["trunk"].weight.register_hook(lambda g: passes.append(1))
    update = detente.backward(losses, detente.CAGrad(), source="features")
    assert len(passes) == 1 == update.stats["backwards"]
    detente.backward(forward.losses(), detente.CAGrad())
    assert len(passes) == 1 + len(losses), "the hook sees every pass"


def test_float32_and_autocast():
    """In float32 a sum of a few hundred terms is good to 1e-5; under autocast the engine itself must not lose more."""
    forward = one()
    wide = detente.backward(forward.losses(), detente.CAGrad(), source="features")
    exact = grads(forward.net)
    net = copy.deepcopy(forward.net).float()

    def losses() -> dict[str, Tensor]:
        h = torch.tanh(net["trunk"](data(9, 4).float()))
        return {t: (net[t](h) - data(9, 1, seed=k).float()).square().mean() for k, t in enumerate(TASKS)}

    update = detente.backward(losses(), detente.CAGrad(), source="features")
    single = grads(net)
    assert_same({k: v.double() for k, v in single.items()}, exact, rtol=1e-4, atol=1e-5)
    assert update.gramian.dtype == wide.gramian.dtype == torch.float64
    before = losses()
    with torch.autocast("cpu", torch.bfloat16):
        detente.backward(before, detente.CAGrad(), source="features")
    assert_same(grads(net), single, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses()
    detente.backward(mixed, detente.CAGrad(), source="features")
    got = grads(net)
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in got.values())
    # bfloat16 has 8 bits: its forward pass moves the gradients by some per cent
    size = float(torch.cat([g.reshape(-1) for g in single.values()]).norm())
    assert sum(float((got[k] - single[k]).norm()) for k in got) < 0.1 * size


def test_grad_accumulates_in_place():
    forward = deep_heads()
    detente.backward(forward.losses(), detente.CAGrad(), source="features")
    held = {n: p.grad for n, p in forward.net.named_parameters()}
    first = {n: g.clone() for n, g in held.items()}
    detente.backward(forward.losses(), detente.CAGrad(), source="features")
    for n, p in forward.net.named_parameters():
        assert p.grad is held[n]
        torch.testing.assert_close(p.grad, 2 * first[n], **EXACT)


def test_a_step_may_bring_only_some_of_the_tasks():
    forward = partly()
    method = detente.CDTT(window=1)
    for tasks in (("a", "b", "c"), ("b", "c"), ("c", "a"), ("a", "b", "c")):
        losses = forward.losses()
        update = detente.backward({t: losses[t] for t in tasks}, method, source="features")
        assert list(update.weights) == list(tasks)
        assert all(bool(g.isfinite().all()) for g in grads(forward.net).values() if g is not None)


def test_tasks_without_anything_in_common_warn():
    net = seeded(a=nn.Linear(4, 1), b=nn.Linear(4, 1))
    losses = {t: square(net[t](data(5, 4)), 0) for t in "ab"}
    with pytest.warns(UserWarning, match="no conflict"):
        detente.backward(losses, detente.CAGrad(), source="features")


def test_frozen_parts_of_the_trunk_get_nothing():
    forward = partly()
    forward.net["trunk"].requires_grad_(False)
    sum(forward.losses().values()).backward()
    wanted = grads(forward.net)
    detente.backward(forward.losses(), Fixed(1.0), source="features")
    assert_same(grads(forward.net), wanted, **EXACT)


def test_frozen_heads_still_pass_their_gradient_on():
    forward = one()
    forward.net["b"].requires_grad_(False)
    sum(forward.losses().values()).backward()
    wanted = grads(forward.net)
    detente.backward(forward.losses(), Fixed(1.0), source="features")
    assert_same(grads(forward.net), wanted, **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot work is refused, and nothing is written


def untouched(net: nn.Module, method: Any, losses: dict[str, Tensor], error: type, match: str, **options: Any) -> None:
    before = plain(method.state_dict())
    with pytest.raises(error, match=match):
        detente.backward(losses, method, source="features", **options)
    assert all(p.grad is None for p in net.parameters())
    assert plain(method.state_dict()) == before


def test_tied_weights_in_a_head_are_refused():
    net = seeded(embed=nn.Embedding(11, 6), trunk=nn.Linear(6, 6), a=nn.Linear(6, 1))
    h = torch.tanh(net["trunk"](net["embed"](torch.arange(11))))
    losses = {"a": square(net["a"](h), 0), "words": square(h @ net["embed"].weight.T, 1)}
    untouched(net, detente.PCGrad(), losses, ValueError, r"shape \(11, 6\).*tied weights.*source='parameters'")


def test_a_loss_computed_from_another_is_refused():
    forward = one()
    losses = forward.losses()
    losses["d"] = losses["a"] + losses["b"]
    untouched(forward.net, detente.PCGrad(), losses, ValueError, "source='parameters'")


def test_one_loss_under_two_names_is_refused():
    losses = (forward := one()).losses()
    untouched(forward.net, detente.PCGrad(), losses | {"d": losses["a"]}, ValueError, "source='parameters'")


def test_listed_shared_parameters_are_refused():
    forward = one()
    shared = forward.net["trunk"].parameters()
    untouched(forward.net, detente.PCGrad(), forward.losses(), ValueError, "leave `shared` out", shared=shared)


PER_PARAMETER = [
    name
    for name, cls in registry().items()
    if issubclass(cls, GramianMethod) and cls.per_parameter and "model" not in cls.needs
]


@pytest.mark.parametrize("name", PER_PARAMETER)
def test_methods_that_follow_single_parameters_are_refused(name):
    forward = one()
    untouched(forward.net, detente.get_method(name), forward.losses(), ValueError, f"{name} .*source='parameters'")
    assert len(PER_PARAMETER) >= 3


@pytest.mark.parametrize("name", ["gd", "dwa", "uw", "gls"])
def test_loss_weightings_are_refused(name):
    forward = one()
    untouched(forward.net, detente.get_method(name), forward.losses(), ValueError, "source and storage do not")


def test_a_loss_that_is_not_finite_is_refused():
    forward = one()
    losses = forward.losses()
    losses["b"] = losses["b"] * math.nan
    untouched(forward.net, detente.CDTT(), losses, FloatingPointError, r"losses\['b'\]")


@pytest.mark.parametrize("name", ["cdtt", "cagrad", "gradnorm", "modo", "pcgrad"])
def test_gradients_that_are_not_finite_become_nan_and_history_stays(name):
    forward, method = one(), detente.get_method(name)
    detente.backward(forward.losses(), method, source="features")
    grads(forward.net)
    before = plain(method.state_dict())
    losses = forward.losses()
    losses["c"] = losses["c"] + (forward.z[0][0, 0] * 0).clamp_min(0).sqrt()  # finite value, gradient inf * 0
    assert bool(losses["c"].isfinite())
    detente.backward(losses, method, source="features")
    assert all(bool(p.grad.isnan().all()) for p in forward.net["trunk"].parameters())
    assert plain(method.state_dict()) == before
    grads(forward.net)
    detente.backward(forward.losses(), method, source="features")
    assert all(bool(g.isfinite().all()) for g in grads(forward.net).values())


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.__name__)
def test_the_gramian_of_the_parameters_can_still_be_had(network):
    """What a features step leaves behind: nothing, neither hooks on the graph nor gradients."""
    forward = network()
    losses = forward.losses()
    trunk = ("trunk", "last", "block", "left", "right")
    shared = [p for n, p in forward.net.named_parameters() if n.split(".")[0] in trunk]
    J = []
    for loss in losses.values():
        found = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(found, shared, strict=True)]
        J.append(torch.cat([g.reshape(-1) for g in filled]))
    rows = torch.stack(J)
    wanted = rows @ rows.T
    detente.backward(forward.losses(), detente.CAGrad(), source="features")
    grads(forward.net)
    update = detente.backward(forward.losses(), detente.CAGrad())
    torch.testing.assert_close(update.gramian, wanted, **TIGHT)
    grads(forward.net)
    torch.testing.assert_close(task_gramian(forward.losses()), wanted, **TIGHT)
    assert all(p.grad is None for p in forward.net.parameters())
