"""All tasks at once down a trunk of linear layers: the same step as with a pass per task, hooks included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import detente

# sums of a few hundred products in another order, which a solver may enlarge by the condition of its problem
CLOSE = {torch.float64: 1e-8, torch.float32: 1e-3}


class Net(nn.Module):
    """A trunk of three layers with ``between`` after the first, and heads by name."""

    def __init__(
        self,
        between: Callable[[Tensor], Tensor] = torch.tanh,
        heads: Callable[[int], nn.Module] = lambda k: nn.Linear(5, 2),
        tasks: int = 4,
        sizes: tuple[int, int, int] = (4, 6, 5),
    ) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.between = between
        self.first, self.second = nn.Linear(sizes[0], sizes[1]), nn.Linear(sizes[1], sizes[2])
        self.heads = nn.ModuleDict({name(t): heads(t) for t in range(tasks)})
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x))).sigmoid()

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        h = self(x)
        return {task: (head(h) - t).square().mean() for t, (task, head) in enumerate(self.heads.items())}

    def step(self, x: Tensor, engine: str = "auto", method: Any = None, **options: Any) -> detente.Update:
        self.zero_grad()
        torch.manual_seed(1)
        method = copy.deepcopy(method or detente.CAGrad())  # it may have a history
        if "weighting" in options:
            options["weighting"] = copy.deepcopy(options["weighting"])
        return detente.backward(self.losses(x), method, engine=engine, **options)

    def found(self) -> dict[str, Tensor | None]:
        return {n: None if p.grad is None else p.grad.clone() for n, p in self.named_parameters()}


def name(t: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[t // 26] + str(t)


def data(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


X = data(7, 4)


def assert_close(mine: dict[str, Tensor | None], theirs: dict[str, Tensor | None], tolerance: float = 1e-10) -> None:
    for key, one in mine.items():
        other = theirs[key]
        assert (one is None) == (other is None), key
        if one is not None and other is not None:
            assert one.stride() == other.stride()
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


def same_as_serial(net: Net, x: Tensor, engine: str, tolerance: float = 1e-10, **options: Any) -> detente.Update:
    """One step each way; the update of the first, which ran on ``engine``."""
    update = net.step(x, **options)
    mine = net.found()
    serial = net.step(x, "serial", **options)
    assert update.stats["engine"] == engine, update.stats["why"]
    assert_close(mine, net.found(), tolerance)
    if update.gramian is not None:
        torch.testing.assert_close(update.gramian, serial.gramian, rtol=tolerance, atol=tolerance)
    return update


# ---- what may lie between linear layers ----------------------------------------------------------------------------

BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "abs by hand": lambda x: (x * x + 1e-3) ** 0.5,
    "celu": F.celu,
    "chain": lambda x: (-x).exp().sin() - x.cos() / 3 + 1,
    "clamp": lambda x: x.clamp(-0.5, 0.5).clamp_min(-0.4).clamp_max(0.4),
    "clone": lambda x: x.clone(),
    "divided": lambda x: x / (1 + x.square().exp()),
    "dropout": lambda x: F.dropout(x, 0.5),
    "elu": F.elu,
    "gate": lambda x: x * x.sigmoid(),
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.6),
    "in place": lambda x: x.mul_(2).relu_(),
    "leaky": F.leaky_relu,
    "mean": lambda x: x.view(-1, 2, 3).mean(1, keepdim=True).reshape(-1, 3).tanh(),
    "mish": F.mish,
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "shapes": lambda x: x.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)[:, :6].unsqueeze(1).sum(1),
    "silu": F.silu,
    "skip": lambda x: x + x.tanh(),
    "softplus": F.softplus,
    "squeezed": lambda x: x.unsqueeze(2).permute(0, 2, 1).squeeze(1),
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("between", BETWEEN)
def test_operations(between, dtype):
    net = Net(BETWEEN[between])
    if between == "mean":
        net.second = nn.Linear(3, 5)
    net, x = net.to(dtype), X.to(dtype)
    for method in (detente.CAGrad(), detente.UPGrad(), detente.GradDrop()):
        same_as_serial(net, x, "batched", CLOSE[dtype], method=method)


class Normed(Net):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.double()
        self.between = lambda h: self.norm(h).tanh()


def test_layer_norm():
    same_as_serial(Normed(nn.LayerNorm(6)), X, "batched")
    same_as_serial(Normed(nn.LayerNorm(6, elementwise_affine=False)), X, "batched")
    same_as_serial(Normed(nn.LayerNorm(6, bias=False)), X, "batched", granularity="layer")


@pytest.mark.parametrize(
    ("between", "word"),
    [
        (lambda x: x.softmax(1), "Softmax"),
        (lambda x: F.batch_norm(x, None, None, training=True), "NativeBatchNorm"),
        (lambda x: F.conv1d(x.unsqueeze(1), torch.ones(1, 1, 3, dtype=x.dtype), padding=1).squeeze(1), "Convolution"),
        (lambda x: x + x.mean(0), "Add"),  # broadcast: its gradient is a sum
    ],
    ids=["softmax", "batch norm", "convolution", "broadcast"],
)
def test_what_has_no_rule_takes_a_pass_per_task_and_says_so(between, word):
    net = Net(between)
    update = same_as_serial(net, X, "serial")
    assert f"operation {word}" in update.stats["why"]
    assert update.stats["backwards"] == 4
    net.zero_grad()
    with pytest.raises(ValueError, match=f"operation {word}"):
        net.step(X, "batched")
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "layer"},
        {"granularity": "channel"},
        {"method": detente.GradDrop()},
        {"method": detente.MGDA()},
        {"weighting": detente.UW()},
        {"scale": 1024.0},
        {"storage": torch.float32},
        {"method": detente.CAGrad(heads="weighted")},
    ],
    ids=str,
)
def test_options(options):
    same_as_serial(Net(), X, "batched", 1e-5 if "storage" in options else 1e-10, **options)


def test_products_and_written_rows_are_one():
    net = Net(sizes=(4, 600, 600), heads=lambda k: nn.Linear(600, 2))
    update = same_as_serial(net, X, "batched")
    assert update.stats["products"] == 1  # 600 x 600; the first layer is small


# ---- heads ---------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(5, 2), nn.Parameter(torch.tensor(0.7))

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h) * self.scale


def frozen(layer: nn.Linear, what: str) -> nn.Linear:
    getattr(layer, what).requires_grad_(False)
    return layer


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "alike": lambda k: nn.Linear(5, 2),
    "of all sizes": lambda k: nn.Linear(5, 1 + k),
    "without bias": lambda k: nn.Linear(5, 2, bias=False),
    "some without bias": lambda k: nn.Linear(5, 2, bias=k > 0),
    "frozen bias": lambda k: frozen(nn.Linear(5, 2), "bias"),
    "frozen weight": lambda k: frozen(nn.Linear(5, 2), "weight") if k else nn.Linear(5, 2),
    "two layers": lambda k: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)),
    "a parameter above": lambda k: Scaled(),
    "none": lambda k: nn.Identity(),
    "none for one": lambda k: nn.Linear(5, 2) if k else nn.Flatten(),
    "convolution": lambda k: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3), nn.Flatten()),
    "softmax": lambda k: nn.Sequential(nn.Softmax(1), nn.Linear(5, 2)),
}


@pytest.mark.parametrize("heads", HEADS)
def test_heads(heads):
    net = Net(heads=HEADS[heads])
    same_as_serial(net, X, "batched")


def test_a_head_that_is_listed_as_shared():
    net = Net()
    shared = [*net.first.parameters(), *net.second.parameters(), net.heads["a1"].weight, net.heads["a1"].bias]
    update = same_as_serial(net, X, "batched", shared=shared)
    assert update.gramian.shape == (4, 4)


def test_some_of_the_trunk_is_listed_as_shared():
    net = Net()
    same_as_serial(net, X, "batched", shared=[net.first.weight, net.second.bias])


class Parts(Net):
    """Two trunks, of which tasks use one, the other, or both."""

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        low = self.first(x).tanh()
        high = self.second(low).tanh()
        found = {"a": self.heads["a0"](high).square().mean(), "b": (self.heads["a1"](high) - 1).square().mean()}
        found["d"] = self.heads["a2"](high).square().mean()
        return {**found, "c": (self.first(x + 1) if self.twice else self.end(low)).square().mean()}

    twice = False
    end: Callable[[Tensor], Tensor] = torch.exp


def test_tasks_that_use_a_part_of_the_trunk():
    net = Parts()
    same_as_serial(net, X, "batched")
    net.end = lambda low: low.softmax(1)  # what arrives at `low` is known to autograd in part
    assert "also used above" in same_as_serial(net, X, "serial").stats["why"]


def test_a_layer_that_is_used_twice():
    net = Parts()
    net.twice = True
    assert "not that of one" in same_as_serial(net, X, "serial").stats["why"]


class Sides(Net):
    def losses(self, x: Tensor) -> dict[str, Tensor]:
        left, right = self.first(x).tanh(), self.side(x).tanh()
        heads = iter(self.heads.values())
        return {
            "a": next(heads)(left).square().mean(),
            "b": (next(heads)(left) - next(heads)(right)).square().mean(),
            "c": (next(heads)(right) - 1).square().mean(),
            "d": (next(heads)(right) + next(heads)(left) - 2).square().mean(),
        }


@pytest.mark.parametrize("engine", ["batched", "auto"])
def test_a_task_that_uses_one_side_has_zeros_on_the_other(engine):
    net = Sides(heads=lambda k: nn.Linear(6, 2), tasks=6)
    net.side = nn.Linear(4, 6).double()
    update = same_as_serial(net, X, "batched")
    assert update.stats["backwards"] == 1
    for method in (detente.GradDrop(), detente.UPGrad()):
        same_as_serial(net, X, "batched", method=method)


def test_losses_that_are_the_trunk_itself():
    linear = nn.Linear(3, 1).double()
    for engine in ("auto", "serial"):
        linear.zero_grad()
        losses = [linear(data(1, 3)).reshape(()), -linear(data(1, 3) + 1).reshape(())]
        detente.backward(losses, detente.UPGrad(), engine=engine)
        assert linear.weight.grad is not None


def test_few_tasks_on_small_weights_take_a_pass_each():
    assert "few tasks" in same_as_serial(Net(tasks=3), X, "serial").stats["why"]
    assert Net(tasks=3).step(X, "batched").stats["engine"] == "batched"
    same_as_serial(Net(tasks=2, sizes=(4, 400, 400), heads=lambda k: nn.Linear(400, 2)), X, "batched")


@pytest.mark.parametrize("tasks", [1, 2, 40])
def test_many_tasks_go_down_in_groups(tasks):
    net = Net(sizes=(4, 128, 64), heads=lambda k: nn.Linear(64, 3), tasks=tasks)
    x = data(64, 4)  # 64 x 128 entries a task: 16 at once
    update = net.step(x, "batched", detente.UPGrad(), shared=[*net.first.parameters(), *net.second.parameters()])
    assert update.stats["engine"] == "batched"
    mine = net.found()
    net.step(x, "serial", detente.UPGrad(), shared=[*net.first.parameters(), *net.second.parameters()])
    assert_close(mine, net.found(), 1e-9)


def test_large_values_take_a_pass_per_task():
    net, x = Net(sizes=(4, 64, 5)), data(4096, 4)
    assert "values in the trunk are large" in same_as_serial(net, x, "serial").stats["why"]
    net.zero_grad()
    assert net.step(x, "batched").stats["engine"] == "batched"


def test_the_memory_of_the_rows_is_used_again_without_being_seen():
    """Two updates that wait side by side, and rows of another size in between."""
    small, large = Net(), Net(sizes=(4, 60, 50), heads=lambda k: nn.Linear(50, 2))
    small.step(X)
    first = small.found()
    kept = [p.grad for p in small.parameters()]
    large.step(X)
    for found, p in zip(first.values(), kept, strict=True):
        assert torch.equal(found, p)
    large.step(X)
    small.step(X)
    assert_close(small.found(), first, 0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.lists(st.sampled_from(["tanh", "relu", "gelu", "skip", "none"]), min_size=4, max_size=4),
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=2), min_size=2, max_size=5),
    st.integers(1, 6),
    st.booleans(),
)
def test_any_network_of_such_layers(widths, acts, heads, samples, bias):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=bias) for a, b in zip([3, *widths], widths, strict=False)]
    tops = [
        nn.Sequential(*(nn.Linear(a, b) for a, b in zip([widths[-1], *sizes], sizes, strict=False))) for sizes in heads
    ]
    net = nn.ModuleList([*layers, *tops]).double()
    x = data(samples, 3)
    found = []
    for engine in ("auto", "serial"):
        net.zero_grad()
        h = x
        for layer, act in zip(layers, acts, strict=False):
            h = BETWEEN[act](layer(h))
        losses = [(top(h) - t).square().sum() for t, top in enumerate(tops)]
        update = detente.backward(losses, detente.UPGrad(), engine=engine)
        found.append((update.gramian, [p.grad for p in net.parameters()]))
    assert update.stats["engine"] == "serial"
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-10)


# ---- hooks ---------------------------------------------------------------------------------------------------------


class Watched(Net):
    """Calls ``watch`` on the values inside the trunk: before and after each activation."""

    watch: Callable[[str, Tensor], object] = staticmethod(lambda name, value: None)

    def forward(self, x: Tensor) -> Tensor:
        self.watch("z1", z1 := self.first(x))
        self.watch("h1", h1 := z1.relu())
        self.watch("z2", z2 := self.second(h1))
        self.watch("h2", h2 := z2.sigmoid())
        return h2


VALUES = ("z1", "h1", "z2", "h2")


@pytest.mark.parametrize("value", VALUES)
def test_a_hook_that_changes_a_gradient(value):
    net = Watched()
    for _ in range(3):
        net.step(X)  # nobody watches
    net.watch = lambda name, v: v.register_hook(lambda g: 2 * g.abs()) if name == value else None
    for _ in range(3):
        same_as_serial(net, X, "batched")
    net.watch = Watched.watch
    same_as_serial(net, X, "batched")


@pytest.mark.parametrize("value", VALUES)
def test_a_hook_sees_every_task_once(value):
    net = Watched()
    seen: dict[str, list[Tensor]] = {"auto": [], "serial": []}
    for engine, found in seen.items():
        net.watch = lambda name, v, f=found: v.register_hook(lambda g: f.append(g.clone())) if name == value else None
        net.step(X, engine)
    assert len(seen["auto"]) == len(seen["serial"]) == 4
    for mine, theirs in zip(seen["auto"], seen["serial"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_hook_that_is_registered_after_the_forward_pass():
    net, found = Watched(), {}
    for engine in ("auto", "serial"):
        values: dict[str, Tensor] = {}
        net.watch = values.__setitem__
        for _ in range(2):
            net.zero_grad()
            losses = net.losses(X)
        values["z2"].register_hook(lambda g: g * 3)
        detente.backward(losses, detente.UPGrad(), engine=engine)
        found[engine] = net.found()
    assert_close(found["auto"], found["serial"])


def test_a_hook_on_a_graph_that_waited_while_other_steps_were_taken():
    net, other, found = Watched(), Net(), {}
    for engine in ("auto", "serial"):
        values: dict[str, Tensor] = {}
        net.watch = values.__setitem__
        net.zero_grad()
        losses = net.losses(X)
        values["z1"].register_hook(lambda g: g * 3)
        for _ in range(3):
            other.step(X)
        detente.backward(losses, detente.UPGrad(), engine=engine)
        found[engine] = net.found()
    assert_close(found["auto"], found["serial"])


@pytest.mark.parametrize("quiet", [True, False])
def test_retained_gradients(quiet):
    """They are those of the sum of the losses, as after a plain backward pass."""
    net = Watched()
    found: dict[str, dict[str, Tensor]] = {}
    for engine in ("auto", "plain"):
        values: dict[str, Tensor] = {}

        def keep(name: str, value: Tensor, values: dict[str, Tensor] = values) -> None:
            value.retain_grad()
            values[name] = value

        net.watch = keep
        if quiet:
            net.step(X)  # so that the next step knows that no hook was registered
        else:
            torch.ones(1, requires_grad=True).register_hook(print)
        net.zero_grad()
        losses = net.losses(X)
        if engine == "auto":
            assert detente.backward(losses, detente.CAGrad()).stats["engine"] == "batched"
        else:
            sum(losses.values()).backward()
        found[engine] = {name: value.grad for name, value in values.items()}
    for key in VALUES:
        torch.testing.assert_close(found["auto"][key], found["plain"][key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("register", ["register_hook", "register_prehook"])
def test_hooks_on_operations(register):
    net = Watched()
    changed = (lambda i, o: tuple(g if g is None else 2 * g for g in i)) if register == "register_hook" else (
        lambda o: tuple(2 * g for g in o)
    )  # fmt: skip
    net.watch = lambda name, v: getattr(v.grad_fn, register)(changed) if name == "z2" else None
    assert "has a hook" in same_as_serial(net, X, "serial").stats["why"]


def test_hooks_on_modules_and_parameters():
    net = Net()
    handle = net.second.register_full_backward_hook(lambda m, i, o: (2 * i[0],))
    same_as_serial(net, X, "serial")
    handle.remove()
    same_as_serial(net, X, "batched")
    handle = net.first.weight.register_hook(lambda g: 2 * g)
    assert "has a hook" in same_as_serial(net, X, "serial").stats["why"]
    handle.remove()
    handle = net.heads["a0"].bias.register_hook(lambda g: 2 * g)
    assert "has a hook" in same_as_serial(net, X, "serial").stats["why"]


def test_what_is_packed_is_not_unpacked_by_us():
    class Packed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    same_as_serial(Packed(), X, "serial")


def test_anomaly_detection():
    with torch.autograd.set_detect_anomaly(True):
        assert "anomaly" in Net().step(X).stats["why"]


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["sampled", "tied", "hook"])
def test_asked_for_where_it_cannot_be(what):
    net, options = Net(sizes=(4, 6, 4), heads=lambda k: nn.Linear(4, 2)), {}
    reason = "sampled tasks"
    if what == "sampled":
        options["source"] = detente.Sampled(1)
    elif what == "tied":
        net.between = lambda h: nn.functional.linear(h, net.first.weight.T) @ net.first.weight.T
        reason = "operation"
    else:
        net.first.weight.register_hook(lambda g: 2 * g)
        reason = "has a hook"
    with pytest.raises(ValueError, match=reason):
        net.step(X, "batched", **options)
    assert all(p.grad is None for p in net.parameters())


def test_a_value_that_was_changed_in_place():
    net = Watched()
    values: dict[str, Tensor] = {}
    net.watch = values.__setitem__
    losses = net.losses(X)
    with torch.no_grad():
        values["h1"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        detente.backward(losses, detente.CAGrad())
    assert all(p.grad is None for p in net.parameters())


def test_a_graph_can_be_used_once():
    losses = Net().losses(X)
    detente.backward(losses, detente.CAGrad())
    with pytest.raises(RuntimeError, match="second time"):
        detente.backward(losses, detente.CAGrad())


def test_gradients_accumulate():
    net = Net()
    net.step(X)
    once = net.found()
    detente.backward(net.losses(X), detente.CAGrad())
    assert_close({k: None if g is None else g / 2 for k, g in net.found().items()}, once, 1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite(value):
    net = Net()
    losses = net.losses(X)
    losses["a1"].grad_fn.register_hook(lambda i, o: (torch.full_like(i[0], value),))
    detente.backward(losses, detente.CAGrad())
    assert all(bool(p.grad.isnan().all()) for p in [*net.first.parameters(), *net.second.parameters()])
