"""detente.backward and detente.aggregate against plain loops of torch.autograd.grad over the whole model."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import detente
from detente.method import Context, method_class
from states import plain

# float64 rounding through another order of summation and a well-conditioned solve of a few tasks
TIGHT = {"rtol": 1e-9, "atol": 1e-12}
# the same in float32: its rounding (6e-8) times the few hundred terms of a sum
SINGLE = {"rtol": 2e-5, "atol": 1e-7}

TASKS = ("a", "b", "c")
# built without arguments: a method that works on the layers of a model needs the model
METHODS = {n: detente.get_method(n) for n in detente.list_methods() if "model" not in method_class(n).needs}
GRAMIAN = [name for name, m in METHODS.items() if isinstance(m, detente.GramianMethod)]
# one backward pass is all they need
WEIGHTINGS = [n for n, m in METHODS.items() if isinstance(m, detente.LossWeighting) and not m.requires_step]
# the update is the coefficients times the gradients, not times rewritten ones
COMBINING = [name for name in GRAMIAN if not METHODS[name].transforms]
# a loss weighting of the method's own leaves no room for another
WEIGHTABLE = [name for name in GRAMIAN if METHODS[name].own_weighting is None]
# the update is what ``weights`` makes of the Gramian of the gradients
PLAIN = [name for name in COMBINING if name in WEIGHTABLE]
# draws per coordinate are in the order in which the engine lays out the parameters
ORDERLESS = [name for name in GRAMIAN if not (METHODS[name].transforms and METHODS[name].stochastic)]


def build(name: str, granularity: str | None = "model") -> detente.Method:
    """The method, with heads that go with blocks."""
    blocks = granularity not in (None, "model") and METHODS[name].heads == "weighted"
    return detente.get_method(name, **({"heads": "own"} if blocks else {}))


class Net(nn.Module):
    """A trunk and one head per task, in float64."""

    def __init__(self, tasks: Sequence[str] = TASKS, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh())
            self.heads = nn.ModuleDict({t: nn.Linear(6, 1) for t in tasks})
            self.x = torch.randn(16, 5, dtype=torch.float64)
            self.y = {t: torch.randn(16, 1, dtype=torch.float64) for t in tasks}
        self.double()

    def losses(
        self, tasks: Sequence[str] | None = None, hook: Callable[[Tensor], Tensor] = lambda h: h
    ) -> dict[str, Tensor]:
        h = hook(self.trunk(self.x))
        return {t: (self.heads[t](h) - self.y[t]).square().mean() for t in tasks or self.heads}


def grads(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


def taken(module: nn.Module) -> list[Tensor | None]:
    """The gradients, removed from the module."""
    result = grads(module)
    module.zero_grad(set_to_none=True)
    return result


def assert_same(actual: Sequence[Tensor | None], wanted: Sequence[Tensor | None], **tolerance: float) -> None:
    assert [g is None for g in actual] == [g is None for g in wanted]
    for a, b in zip(actual, wanted, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, **(tolerance or TIGHT))


def flat(gradient: Tensor | None, like: Tensor) -> Tensor:
    gradient = torch.zeros_like(like) if gradient is None else gradient
    return (torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient).reshape(-1).double()


def resolved(J: Tensor, method: detente.GramianMethod, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """The update, the coefficients, and the method's own weights of the losses."""
    first = torch.ones(len(J), dtype=torch.float64)
    if method.own_weighting is not None:
        first = method.own_weighting.weights(context.losses, context)
        context = replace(context, losses=context.losses * first)
    rows = first[:, None] * J
    if method.transforms:
        method.transform([rows], context)
    weights = method.weights(rows @ rows.T, context)
    return weights @ rows, weights * first, first


def oracle(
    losses: dict[str, Tensor],
    parameters: Sequence[Tensor],
    method: detente.GramianMethod,
    shared: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor | None], Tensor]:
    """``.grad`` of every parameter: one autograd.grad per task over the whole model, then the method's rule."""
    active = [p for p in parameters if p.requires_grad]
    g = []
    for loss in losses.values():
        found = iter(torch.autograd.grad(loss, active, retain_graph=True, allow_unused=True))
        g.append([next(found) if p.requires_grad else None for p in parameters])
    hits = [sum(row[k] is not None for row in g) for k in range(len(parameters))]
    if shared is None:
        chosen = [k for k, count in enumerate(hits) if count > 1]
    else:
        chosen = [k for k, p in enumerate(parameters) if any(p is s for s in shared)]
    parts = [torch.stack([flat(row[k], parameters[k]) for row in g]) for k in chosen]
    J = torch.cat(parts, 1)
    values = torch.stack([loss.detach().double().reshape(()) for loss in losses.values()])
    update, weights, first = resolved(J, method, Context(tuple(losses), losses=values))
    combined = dict(zip(chosen, update.split([part.shape[1] for part in parts]), strict=True))
    # a task left out for its zero trunk gradient has coefficient 0 there, and still trains its own head
    heads = torch.where(J.norm(dim=1) > 0, weights, first) if method.heads == "weighted" else first
    result: list[Tensor | None] = []
    for k, p in enumerate(parameters):
        own = [w * row[k] for w, row in zip(heads, g, strict=True) if row[k] is not None]
        if not own:
            result.append(None)
        elif k not in combined:
            result.append(sum(own[1:], own[0]).to(p.dtype))
        elif p.is_complex():
            result.append(torch.view_as_complex(combined[k].reshape(*p.shape, 2).clone()).to(p.dtype))
        else:
            result.append(combined[k].reshape(p.shape).to(p.dtype))
    return result, weights


# ---- against the oracle ----------------------------------------------------------------------------------------


def test_gd_is_the_backward_of_the_sum():
    net = Net().float()
    net.x, net.y = net.x.float(), {t: y.float() for t, y in net.y.items()}
    sum(net.losses().values()).backward()
    wanted = taken(net)
    detente.backward(net.losses(), detente.GD())
    assert_same(grads(net), wanted, **SINGLE)


@pytest.mark.parametrize("name", ORDERLESS)
def test_gramian_methods_equal_the_plain_loop(name):
    """Over steps in which the parameters move, so that histories and generators are in step too."""
    net, method, reference = Net(), detente.get_method(name), detente.get_method(name)
    for _ in range(13):  # the longest warm-up is cdtt's: a window of 10 and one more
        wanted, weights = oracle(net.losses(), list(net.parameters()), reference)
        update = detente.backward(net.losses(), method)
        assert_same(grads(net), wanted)
        torch.testing.assert_close(torch.stack(list(update.weights.values())), weights, **TIGHT)
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad
        net.zero_grad()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_loss_weightings_equal_the_backward_of_the_weighted_sum(name):
    net, method, reference = Net(), detente.get_method(name), detente.get_method(name)
    for _ in range(3):
        losses = net.losses()
        values = torch.stack([loss.detach() for loss in losses.values()])
        weights = reference.weights(values, Context(TASKS))
        sum(w * loss for w, loss in zip(weights, losses.values(), strict=True)).backward()
        wanted = taken(net)
        update = detente.backward(net.losses(), method)
        assert_same(taken(net), wanted)
        torch.testing.assert_close(torch.stack(list(update.weights.values())), weights, **TIGHT)
        method.next_epoch()
        reference.next_epoch()


@pytest.mark.parametrize(
    "method", [detente.GD(), detente.CAGrad(), detente.MGDA(heads="weighted")], ids=lambda m: m.name
)
def test_grad_accumulates(method):
    net = Net()
    detente.backward(net.losses(), method)
    first = taken(net)
    net.x = net.x.flip(0)
    detente.backward(net.losses(), method)
    second = taken(net)
    detente.backward(net.losses(), method)
    held = grads(net)
    net.x = net.x.flip(0)
    detente.backward(net.losses(), method)
    assert_same(grads(net), [a + b for a, b in zip(first, second, strict=True)])
    assert all(a is b for a, b in zip(grads(net), held, strict=True)), "as in autograd, .grad is added to in place"


# ---- which parameters are shared -------------------------------------------------------------------------------


def double(*modules: nn.Module) -> nn.ModuleList:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for m in modules:
            for child in m.modules():
                if hasattr(child, "reset_parameters"):
                    child.reset_parameters()
    return nn.ModuleList(modules).double()


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frozen():
    net = Net()
    net.trunk[0].requires_grad_(False)
    net.heads["b"].bias.requires_grad_(False)
    return net, net.losses


def unused():
    net = Net()
    net.spare = nn.Linear(3, 3).double()
    return net, lambda: net.losses(("a", "c"))


def tied():
    """A language model with an embedding tied to its head, and a classifier on the same embedding."""
    net = double(nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11, bias=False), nn.Linear(4, 3))
    net[2].weight = net[0].weight
    words = torch.arange(20) % 11

    def losses():
        h = torch.tanh(net[1](net[0](words)))
        cross_entropy = nn.functional.cross_entropy
        return {"word": cross_entropy(net[2](h), words.flip(0)), "class": cross_entropy(net[3](h), words % 3)}

    return net, losses


def skip():
    """Both heads read the input of the trunk's last layer beside its output."""
    net = double(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(10, 1), nn.Linear(10, 1))

    def losses():
        low = torch.tanh(net[0](data(9, 4)))
        h = torch.cat([low, torch.tanh(net[1](low))], 1)
        return {t: (net[k](h) - data(9, 1, seed=k)).square().mean() for t, k in (("a", 2), ("b", 3))}

    return net, losses


def some():
    """A middle layer that two of three tasks share, and a task that stands alone."""
    net = double(nn.Linear(4, 5), nn.Linear(5, 5), *(nn.Linear(5, 1) for _ in "abc"), nn.Linear(4, 1))

    def losses():
        low = torch.tanh(net[0](data(9, 4)))
        mid = torch.tanh(net[1](low))
        outputs = {"a": net[2](low), "b": net[3](mid), "c": net[4](mid), "alone": net[5](data(9, 4))}
        return {t: (y - data(9, 1, seed=k)).square().mean() for k, (t, y) in enumerate(outputs.items())}

    return net, losses


class Scalars(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.q = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))


def parameter_as_loss():
    net = Scalars()
    return net, lambda: {"p": net.p, "q": net.q, "both": (net.p - 5) * net.q}


def nested_losses():
    """A loss that is part of another loss."""
    net = Scalars()

    def losses():
        part = net.p.square()
        return {"whole": part * net.q - 7 * net.q, "part": part}

    return net, losses


def two_forwards():
    """One forward pass per task: the graphs share nothing but parameters."""
    net = Net()
    return net, lambda: {t: net.losses((t,))[t] for t in TASKS}


def dropout():
    net = Net()
    net.trunk.append(nn.Dropout(0.5))

    def losses():
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return net.losses()

    return net, losses


def checkpointed():
    net = Net()
    return net, lambda: net.losses(hook=lambda h: checkpoint(torch.sin, h, use_reentrant=False))


def checkpointed_trunk():
    net = Net()

    def losses():
        h = checkpoint(net.trunk, net.x, use_reentrant=False)
        return {t: (net.heads[t](h) - net.y[t]).square().mean() for t in TASKS}

    return net, losses


def complex_parameters():
    net = Scalars()
    net.w = nn.Parameter(torch.complex(data(3), data(3, seed=1)))
    net.v = nn.Parameter(torch.complex(data(3, seed=2), data(3, seed=3)))
    x = torch.complex(data(3, seed=4), data(3, seed=5))
    return net, lambda: {
        "a": (net.w * x).sum().abs() * net.p,
        "b": (net.w - x).abs().square().sum() + (net.v * x).abs().sum(),
    }


def conjugated():
    """The gradient of a conjugated parameter is a lazily conjugated tensor."""
    net = Scalars()
    net.w = nn.Parameter(torch.complex(data(3), data(3, seed=1)))
    return net, lambda: {"a": net.w.conj().real.sum() * net.p + net.w.conj().imag.sum(), "b": net.w.abs().sum() * net.p}


def mixed_dtypes():
    net = double(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 1), nn.Linear(5, 1))
    net[0].float()
    net[1].bfloat16()

    def losses():
        h = torch.tanh(net[1](torch.tanh(net[0](data(9, 4).float())).bfloat16())).double()
        return {t: (net[k](h) - data(9, 1, seed=k)).square().mean() for t, k in (("a", 2), ("b", 3))}

    return net, losses


def odd_shapes():
    """A scalar parameter, an empty one, losses of shape [1] and [1, 1]."""
    net = Scalars()
    net.empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
    net.m = nn.Parameter(data(2, 3))
    return net, lambda: {
        "a": ((net.m @ net.m.T).sum() + net.p + net.empty.sum()).reshape(1, 1),
        "b": (net.m * 2).sum() * net.q - net.p.square() + net.empty.sum(),
    }


GRAPHS = [
    frozen, unused, tied, skip, some, parameter_as_loss, nested_losses, two_forwards, dropout, checkpointed,
    checkpointed_trunk, complex_parameters, conjugated, mixed_dtypes, odd_shapes,
]  # fmt: skip


@pytest.mark.parametrize("name", ["cagrad", "mgda"])
@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: g.__name__)
def test_every_graph_equals_the_plain_loop(graph, name):
    net, losses = graph()
    wanted, _ = oracle(losses(), list(net.parameters()), detente.get_method(name))
    detente.backward(losses(), detente.get_method(name))
    if graph is mixed_dtypes:  # 2^-8: one rounding to bfloat16 of the coefficients and one of the sum
        assert_same(grads(net), wanted, rtol=2**-6, atol=2**-8)
    else:
        assert_same(grads(net), wanted)


def test_reentrant_checkpoints_are_refused_by_torch_and_not_passed_over():
    net = Net()
    net.x.requires_grad_()  # else a reentrant checkpoint has no graph at all
    h = checkpoint(net.trunk, net.x, use_reentrant=True)
    losses = {t: (net.heads[t](h) - net.y[t]).square().mean() for t in TASKS}
    with pytest.raises(RuntimeError, match="use_reentrant"):
        detente.backward(losses, detente.CAGrad())
    assert all(g is None for g in grads(net))


def test_explicit_shared_parameters():
    """What is not listed counts as a head: every loss that reaches it adds its own gradient."""
    net = Net()
    last = list(net.trunk[2].parameters())
    wanted, weights = oracle(net.losses(), list(net.parameters()), detente.CAGrad(), shared=last)
    update = detente.backward(net.losses(), detente.CAGrad(), shared=(p for p in last))
    assert_same(grads(net), wanted)
    torch.testing.assert_close(torch.stack(list(update.weights.values())), weights, **TIGHT)


def test_a_shared_parameter_that_no_loss_reaches_keeps_no_gradient():
    net = Net()
    net.trunk.spare = nn.Linear(2, 2).double()
    losses = {t: (net.heads[t](net.trunk[:4](net.x)) - net.y[t]).square().mean() for t in TASKS}
    detente.backward(losses, detente.CAGrad(), shared=net.trunk.parameters())
    assert net.trunk.spare.weight.grad is None
    assert net.trunk[0].weight.grad is not None


def test_a_sequence_of_losses_is_named_by_position():
    net, twin = Net(), Net()
    update = detente.backward(list(net.losses().values()), detente.CAGrad())
    detente.backward(twin.losses(), detente.CAGrad())
    assert list(update.weights) == ["0", "1", "2"]
    assert_same(grads(net), grads(twin), rtol=0, atol=0)


@pytest.mark.parametrize("method", [detente.CAGrad(), detente.EDM(), detente.CDTT()], ids=lambda m: m.name)
def test_the_order_of_the_tasks_is_theirs(method):
    net = Net()
    update = detente.backward(net.losses(), method)
    wanted = taken(net)
    method.reset()
    other = detente.backward(net.losses(("c", "a", "b")), method)
    assert_same(grads(net), wanted)
    assert list(other.weights) == ["c", "a", "b"]
    for task in TASKS:
        torch.testing.assert_close(other.weights[task], update.weights[task], **TIGHT)


def test_preferences_follow_the_names_of_the_tasks():
    method = detente.CAGrad(c=0.1, preference={"a": 0.7, "b": 0.2, "c": 0.1})
    net = Net()
    wanted, _ = oracle(net.losses(), list(net.parameters()), method)
    detente.backward(net.losses(("b", "c", "a")), method)
    assert_same(grads(net), wanted)


@pytest.mark.parametrize("name", [*ORDERLESS, *WEIGHTINGS])
def test_a_step_may_bring_only_some_of_the_tasks(name):
    """Methods with a history go on with each task's own: the reference sees exactly the same steps."""
    net, method, reference = Net(), detente.get_method(name), detente.get_method(name)
    for tasks in (("a", "b"), ("c", "b"), ("b", "c", "a"), ("a", "c")):
        losses = net.losses(tasks)
        if isinstance(reference, detente.GramianMethod):
            wanted, _ = oracle(losses, list(net.parameters()), reference)
        else:
            values = torch.stack([loss.detach() for loss in losses.values()])
            weights = reference.weights(values, Context(tasks))
            sum(w * loss for w, loss in zip(weights, losses.values(), strict=True)).backward()
            wanted = taken(net)
        update = detente.backward(net.losses(tasks), method)
        assert list(update.weights) == list(tasks)
        assert_same(taken(net), wanted)


# what a lone task's (weighted) gradient of length n is multiplied with, where that is not 1
ALONE: dict[str, Callable[[float], float]] = {
    "cagrad": lambda n: 1.5,  # g0 + c |g0| g / |g|
    "nash_mtl": lambda n: 1 / n,  # of length 1
    "fairgrad": lambda n: n ** (-4 / 3),  # n^2 a = a^(-1 / 2)
    "db_mtl": lambda n: 0.1,  # smoothed gradients start at 0
    "moco": lambda n: 0.5,  # tracked gradients as well
}


@pytest.mark.parametrize("name", GRAMIAN)
def test_one_task(name):
    """Nothing is shared unless listed, and the gradient is the plain one; listed, it is the method's multiple."""
    net, method = Net(("a",)), detente.get_method(name)
    loss = net.losses()["a"]
    loss.backward(retain_graph=True)
    weighting = method.own_weighting or detente.GD()
    first = float(weighting.weights(loss.detach().reshape(1), Context(("a",))))
    weighting.reset()
    wanted = [first * g for g in taken(net)]
    update = detente.backward({"a": loss}, detente.get_method(name))
    assert_same(taken(net), wanted)
    assert list(update.weights) == ["a"]
    assert float(update.weights["a"]) == first
    count = len(list(net.trunk.parameters()))
    trunk, head = wanted[:count], wanted[count:]
    multiple = ALONE.get(name, lambda n: 1.0)(float(torch.cat([g.reshape(-1) for g in trunk]).norm()))
    update = detente.backward(net.losses(), method, shared=net.trunk.parameters())
    got = taken(net)
    assert_same(got[:count], [multiple * g for g in trunk])
    factor = float(update.weights["a"]) / first if method.heads == "weighted" else 1.0
    assert_same(got[count:], [factor * g for g in head])
    if not method.transforms:
        assert float(update.weights["a"]) == pytest.approx(first * multiple)


def test_cagrad_on_one_task_with_listed_parameters_is_its_formula():
    net = Net(("a",))
    wanted, weights = oracle(
        net.losses(), list(net.parameters()), detente.CAGrad(c=0.4), shared=list(net.trunk.parameters())
    )
    detente.backward(net.losses(), detente.CAGrad(c=0.4), shared=net.trunk.parameters())
    assert_same(grads(net), wanted)
    assert float(weights) == pytest.approx(1.4)  # g0 + c |g0| g / |g|


@pytest.mark.parametrize("name", [*COMBINING, "gd"])
def test_one_tensor_under_two_names(name):
    net = Net()
    loss = net.losses(("a",))["a"]
    loss.backward(retain_graph=True)
    plain = taken(net)
    update = detente.backward({"one": loss, "two": loss}, detente.get_method(name))
    total = float(sum(update.weights.values()))
    assert total > 0
    # both rows are the same gradient: the update is their total coefficient times it, in the head as well
    assert_same(grads(net), [None if g is None else total * g for g in plain])


def test_tasks_without_common_parameters_are_left_alone_with_a_warning():
    net = Net()
    losses = net.losses(hook=Tensor.detach)
    with pytest.warns(UserWarning, match=r"no conflict to resolve.*detached") as caught:
        update = detente.backward(losses, detente.CAGrad())
    assert caught[0].filename == __file__
    assert set(map(float, update.weights.values())) == {1.0}
    assert update.gramian is None
    assert net.trunk[0].weight.grad is None
    for t in TASKS:
        loss = net.losses((t,))[t]
        assert_same([net.heads[t].weight.grad], torch.autograd.grad(loss, [net.heads[t].weight]))


def test_shared_listed_as_empty_gives_plain_gradients_quietly():
    net = Net()
    sum(net.losses().values()).backward()
    wanted = taken(net)
    detente.backward(net.losses(), detente.CAGrad(), shared=[])
    assert_same(grads(net), wanted)


def test_sparse_gradients_of_one_task_stay_sparse():
    table, shared = nn.Embedding(9, 4, sparse=True).double(), nn.Linear(4, 1).double()
    for _ in range(2):  # the second time onto an existing sparse .grad
        h = table(torch.tensor([1, 3, 3]))
        detente.backward({"a": shared(h).sum(), "b": shared(data(2, 4)).square().sum()}, detente.CAGrad())
    assert table.weight.grad.is_sparse
    wanted = torch.zeros(9, 4, dtype=torch.float64)
    wanted[1], wanted[3] = 2 * shared.weight, 4 * shared.weight
    torch.testing.assert_close(table.weight.grad.to_dense(), wanted, **TIGHT)


# ---- memory formats, precision ---------------------------------------------------------------------------------


def test_grad_has_the_memory_format_of_the_parameter():
    conv, heads = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), [nn.Linear(4, 1) for _ in "ab"]
    transposed = nn.Parameter(torch.randn(6, 4).T)
    x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)

    def losses():
        h = conv(x).mean((2, 3)) + transposed.mean(1)
        return {t: head(h).square().mean() for t, head in zip("ab", heads, strict=True)}

    sum(losses().values()).backward()
    detente_grads = {}
    for granularity in ("model", "layer", "channel"):
        conv.weight.grad = transposed.grad = None
        detente.backward(losses(), detente.PCGrad(), granularity=granularity)
        assert conv.weight.grad.stride() == conv.weight.stride()
        assert transposed.grad.stride() == transposed.stride()
        detente_grads[granularity] = conv.weight.grad
    # the two losses do not conflict on every axis, yet all three are finite and none is a view of the engine's buffer
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in detente_grads.values())
    assert all(g._base is None for g in detente_grads.values())


def test_channels_last_equals_contiguous():
    torch.manual_seed(0)
    conv, heads, x = nn.Conv2d(3, 4, 3).double(), [nn.Linear(4, 1).double() for _ in "ab"], data(2, 3, 6, 6)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        twin, inputs = copy.deepcopy(conv).to(memory_format=layout), x.to(memory_format=layout)
        h = twin(inputs).sin().mean((2, 3))
        detente.backward(
            [(head(h) - k).square().mean() for k, head in enumerate(heads)], detente.EDM(), granularity="channel"
        )
        results.append(twin.weight.grad)
    assert_same(results[1:], results[:1])


def test_aggregate_inside_autocast_costs_no_precision():
    J = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    wanted = detente.aggregate(J, detente.CAGrad())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(detente.aggregate(J, detente.CAGrad()), wanted)


@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
def test_calling_inside_autocast_costs_no_precision(granularity):
    """The forward ran in float32; only the call sits inside the autocast region."""
    net = Net().float()
    net.x, net.y = net.x.float(), {t: y.float() for t, y in net.y.items()}
    detente.backward(net.losses(), detente.CAGrad(), granularity=granularity)
    wanted = taken(net)
    losses = net.losses()
    with torch.autocast("cpu", torch.bfloat16):
        detente.backward(losses, detente.CAGrad(), granularity=granularity)
    assert_same(grads(net), wanted, **SINGLE)


# coefficients must not grow until their float32 terms no longer cancel
@pytest.mark.parametrize("name", [name for name in GRAMIAN if METHODS[name].nonconflicting])
def test_nothing_moves_in_float32_where_the_tasks_pull_apart(name):
    """One parameter and gradients of both signs, as in every channel of a bias: no direction helps all tasks."""
    for seed in range(20):
        J = data(3, 1, seed=seed).float()
        if J.min() < 0 < J.max():
            assert float(detente.aggregate(J, detente.get_method(name)).abs()) <= 1e-5


def test_calling_under_no_grad_is_fine():
    net = Net()
    wanted, _ = oracle(net.losses(), list(net.parameters()), detente.CAGrad())
    losses = net.losses()
    with torch.no_grad():
        detente.backward(losses, detente.CAGrad())
    assert_same(grads(net), wanted)
    assert not any(g.requires_grad for g in grads(net))


def test_gradients_of_very_different_size_in_float32_keep_the_small_task():
    w = nn.Parameter(torch.zeros(4))
    x = torch.tensor([1.0, -1.0, 2.0, 0.5])
    update = detente.backward({"large": (w + x).sum() * 1e6, "small": -(w * x).sum() * 1e-6}, detente.MGDA())
    assert float(update.weights["small"]) > 0.999
    assert float(w.grad @ -x) > 0


# ---- granularity -----------------------------------------------------------------------------------------------


def pieces(parameters: Sequence[Tensor], granularity: str) -> list[tuple[int, int | None]]:
    """(parameter, index of its first dimension or None) of every block, in order."""
    if granularity == "layer":
        return [(k, None) for k in range(len(parameters))]
    return [(k, i) for k, p in enumerate(parameters) for i in (range(len(p)) if p.dim() else [None])]


# methods with one coefficient per task for the model as a whole declare it
@pytest.mark.parametrize("name", [n for n in PLAIN if "blocks" not in METHODS[n].exempt])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_granularity_equals_one_solve_per_block(name, granularity):
    net = Net()
    net.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))  # without dimensions: one block

    def losses():
        return net.losses(hook=lambda h: h * net.scale)

    shared = [p for n, p in net.named_parameters() if "heads" not in n]
    update = detente.backward(losses(), build(name, granularity), granularity=granularity)
    got = {id(p): p.grad for p in shared}
    values = losses()
    g = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in values.values()]

    def part(t: int, k: int, i: int | None) -> Tensor:
        return (g[t][k] if i is None else g[t][k][i]).reshape(-1)

    blocks = pieces(shared, granularity)
    rows = [torch.stack([part(t, k, i) for t in range(3)]) for k, i in blocks]
    gramians = torch.stack([J @ J.T for J in rows])
    context = Context(TASKS, losses=torch.stack([v.detach() for v in values.values()]))
    method = build(name, granularity)
    weights = method.weights(gramians, context)
    # coefficients of fewer parameters than tasks are not unique: updates are, up to the rounding of their terms
    noise = torch.stack([1e-14 * (w.abs() @ J.norm(dim=1)) for w, J in zip(weights, rows, strict=True)])
    if not method.stochastic:
        for J, G, w, e in zip(rows, gramians, weights, noise, strict=True):
            single = build(name, granularity).weights(G, context)
            e = e + 1e-14 * (single.abs() @ J.norm(dim=1))
            torch.testing.assert_close(w @ J, single @ J, rtol=1e-9, atol=1e-12 + float(e))
            if J.shape[1] >= 3:
                torch.testing.assert_close(w, single, **TIGHT)
    for k in range(len(shared)):
        mine = [b for b, (owner, _) in enumerate(blocks) if owner == k]
        wanted = torch.cat([weights[b] @ rows[b] for b in mine])
        slack = 1e-12 + float(noise[mine].max())
        torch.testing.assert_close(got[id(shared[k])].reshape(-1), wanted, rtol=1e-9, atol=slack)
    assert all(w.shape == (len(blocks),) for w in update.weights.values())
    torch.testing.assert_close(update.gramian, gramians.sum(0), **TIGHT)
    for t, loss in values.items():
        assert_same([net.heads[t].weight.grad], torch.autograd.grad(loss, [net.heads[t].weight], retain_graph=True))


def test_granularity_of_several_dtypes_and_complex_parameters():
    for graph in (complex_parameters, odd_shapes):
        net, losses = graph()
        for granularity in ("layer", "channel"):
            detente.backward(losses(), detente.PCGrad(), granularity=granularity)
            reached = [(p, g) for p, g in zip(net.parameters(), taken(net), strict=True) if g is not None]
            assert len(reached) >= 3
            assert all((g.dtype, g.shape) == (p.dtype, p.shape) for p, g in reached)


def test_granularity_model_is_the_default():
    net = Net()
    detente.backward(net.losses(), detente.CAGrad())
    wanted = taken(net)
    detente.backward(net.losses(), detente.CAGrad(), granularity="model")
    assert_same(grads(net), wanted, rtol=0, atol=0)


# ---- weighting and scale ---------------------------------------------------------------------------------------

FACTORS = {"a": 0.5, "b": 3.0, "c": 2.0}


@pytest.mark.parametrize("name", WEIGHTABLE)
@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_weighting_equals_scaling_the_losses(name, granularity):
    net = Net()
    scaled = {t: FACTORS[t] * loss for t, loss in net.losses().items()}
    reference = detente.backward(scaled, build(name, granularity), granularity=granularity)
    wanted = taken(net)
    weighting = detente.GD(weights=FACTORS)
    update = detente.backward(net.losses(), build(name, granularity), granularity=granularity, weighting=weighting)
    assert_same(grads(net), wanted)
    for t in TASKS:  # the coefficients are those of the task gradients themselves
        torch.testing.assert_close(update.weights[t], FACTORS[t] * reference.weights[t], **TIGHT)


@pytest.mark.parametrize(
    "build",
    [lambda: detente.CDTT(window=1), detente.GLS, detente.UW, lambda: detente.CAGrad(preference=detente.GLS())],
    ids=["cdtt", "gls", "uw", "cagrad(gls)"],
)
def test_methods_that_read_losses_see_the_weighted_ones(build):
    """That is, applied to the losses first: the same as handing in the scaled losses, for every method."""
    net, plain, weighted = Net(), build(), build()
    for _ in range(3):
        detente.backward({t: FACTORS[t] * loss for t, loss in net.losses().items()}, plain)
        wanted = taken(net)
        detente.backward(net.losses(), weighted, weighting=detente.GD(weights=FACTORS))
        assert_same(taken(net), wanted)


def test_a_weighting_with_history_is_stepped_once_per_call():
    net, weighting, reference = Net(), detente.DWA(window=1), detente.DWA(window=1)
    for _ in range(4):
        values = torch.stack([loss.detach() for loss in net.losses().values()])
        factors = reference.weights(values, Context(TASKS))
        detente.backward([f * loss for f, loss in zip(factors, net.losses().values(), strict=True)], detente.EDM())
        wanted = taken(net)
        detente.backward(net.losses(), detente.EDM(), weighting=weighting)
        assert_same(grads(net), wanted)
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad
        net.zero_grad()
    assert float(factors.std()) > 0


@pytest.mark.parametrize(
    ("name", "granularity"), [(n, None) for n in [*GRAMIAN, *WEIGHTINGS]] + [(n, "layer") for n in GRAMIAN]
)
def test_scale_leaves_the_method_unmoved_and_stays_in_grad(name, granularity):
    """1024 is a power of two: every product is exact, so not one bit may differ."""
    net, plain, scaled = Net(), build(name, granularity), build(name, granularity)
    for _ in range(12 if plain.state else 1):  # cdtt's window of 10 is the longest warm-up
        before = detente.backward(net.losses(), plain, granularity=granularity)
        wanted = taken(net)
        losses = {t: 1024 * loss for t, loss in net.losses().items()}
        update = detente.backward(losses, scaled, granularity=granularity, scale=1024.0)
        assert_same(taken(net), [1024 * g for g in wanted], rtol=0, atol=0)
        for t in TASKS:
            assert torch.equal(update.weights[t], before.weights[t])
        if before.gramian is not None:
            assert torch.equal(update.gramian, before.gramian)


def steep(h: Tensor) -> Tensor:
    """``h`` itself, with a gradient a million times too large."""
    return h + 1e6 * (h - h.detach())


# one with no history, one each that keeps losses, a generator, weights, and gradients; one with weighted heads
@pytest.mark.parametrize("name", ["cagrad", "cdtt", "pcgrad", "gradnorm", "moco", "db_mtl", "mgda"])
def test_grad_scaler_skips_an_overflow_and_the_history_with_it(name):
    net, twin = Net().float(), Net().float()
    for n in (net, twin):
        n.x, n.y = n.x.float(), {t: y.float() for t, y in n.y.items()}
    method, reference = detente.get_method(name), detente.get_method(name)
    optimizer, other = (torch.optim.SGD(n.parameters(), lr=1e-7) for n in (net, twin))

    def losses(net: Net) -> dict[str, Tensor]:
        return net.losses(("a", "b")) | net.losses(("c",), hook=steep)

    def step(scaler: torch.amp.GradScaler) -> detente.Update:
        optimizer.zero_grad()
        update = detente.backward(
            {t: scaler.scale(v) for t, v in losses(net).items()}, method, scale=scaler.get_scale()
        )
        scaler.step(optimizer)
        scaler.update()
        return update

    detente.backward(losses(net), method)
    detente.backward(losses(net), reference)
    before = copy.deepcopy(net.state_dict()), plain(method.state_dict())
    # losses near 1 times 2^115 just fit into float32; the gradient of one of them, a million times larger, does not
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**115)
    update = step(scaler)
    assert all(math.isnan(float(w)) for w in update.weights.values())
    assert all(bool(p.grad.isnan().all()) for p in net.trunk.parameters())
    assert plain(method.state_dict()) == before[1]
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before[0].values(), strict=True))
    assert scaler.get_scale() == 2.0**114
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        step(scaler)
        other.zero_grad()
        detente.backward(losses(twin), reference)
        other.step()
        # powers of two are exact in float32: the scaled run is the plain one bit for bit
        assert all(
            torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True)
        )
    assert scaler.get_scale() == 2.0**10
    assert not torch.equal(net.trunk[0].weight, before[0]["trunk.0.weight"])


@pytest.mark.parametrize(
    "method",
    [detente.CAGrad(), detente.CDTT(), detente.DBMTL(), detente.IMTL(), detente.DWA(), detente.GD()],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_scaler_gets_nan_gradients_for_a_loss_that_is_not_finite(method, value):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    detente.backward(net.losses(), method)
    before, parameters = plain(method.state_dict()), copy.deepcopy(net.state_dict())
    optimizer.zero_grad()
    losses = net.losses()
    losses["b"] = losses["b"] * value
    update = detente.backward({t: scaler.scale(loss) for t, loss in losses.items()}, method, scale=scaler.get_scale())
    assert all(bool(p.grad.isnan().all()) for p in net.trunk.parameters())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512
    assert plain(method.state_dict()) == before
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), parameters.values(), strict=True))
    assert list(update.weights) == list(TASKS)


@pytest.mark.parametrize("name", GRAMIAN)
@pytest.mark.parametrize("granularity", [None, "layer"])
def test_gradients_that_are_not_finite_become_nan_without_an_exception(name, granularity):
    net, method = Net(), build(name, granularity)
    detente.backward(net.losses(), method, granularity=granularity)
    net.zero_grad()
    before = plain(method.state_dict())

    def infinite_slope(h: Tensor) -> Tensor:
        return h + (h[:1, :1] * 0).clamp_min(0).sqrt()  # finite value, gradient inf * 0

    losses = net.losses(("a", "b"))
    losses["c"] = net.losses(hook=infinite_slope)["c"]
    assert all(bool(loss.isfinite()) for loss in losses.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update = detente.backward(losses, method, granularity=granularity)
    assert all(bool(p.grad.isnan().all()) for p in net.trunk.parameters())
    assert plain(method.state_dict()) == before
    assert update.stats["conflicts"] >= 0
    detente.backward(net.losses(), method, granularity=granularity)  # and the next step works as if nothing had been


# ---- Sampled ---------------------------------------------------------------------------------------------------

MANY = tuple("abcdef")


class Count(torch.autograd.Function):
    """The identity, counting how often gradients flow back through it."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        Count.passes += 1
        return g


def counted(call: Callable[[], detente.Update]) -> tuple[int, detente.Update]:
    Count.passes = 0
    update = call()
    return Count.passes, update


@pytest.mark.parametrize(
    ("method", "source", "passes"),
    [
        (detente.CAGrad(), "parameters", 6),
        (detente.PCGrad(), "parameters", 6),
        (detente.CAGrad(), detente.Sampled(1), 2),
        (detente.CAGrad(), detente.Sampled(3), 4),
        (detente.CAGrad(), detente.Sampled(5), 6),
        (detente.CAGrad(), detente.Sampled(50), 6),
        (detente.GD(), "parameters", 1),
        (detente.UW(), "parameters", 1),
    ],
)
def test_backward_passes_are_as_many_as_reported(method, source, passes):
    net = Net(MANY)
    seen, update = counted(lambda: detente.backward(net.losses(hook=Count.apply), method, source=source))
    assert seen == passes == update.stats["backwards"]


@pytest.mark.parametrize("n", [5, 6, 100])
def test_enough_samples_are_all_tasks(n):
    net = Net(MANY)
    full = detente.backward(net.losses(), detente.CAGrad())
    wanted = taken(net)
    update = detente.backward(net.losses(), detente.CAGrad(), source=detente.Sampled(n))
    assert_same(grads(net), wanted)
    torch.testing.assert_close(update.weights, full.weights, **TIGHT)
    assert "sampled" not in update.stats


UNEVEN = dict(zip(MANY, (0.3, 0.1, 0.2, 0.05, 0.15, 0.2), strict=True))


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("preference", [None, UNEVEN], ids=["mean", "preference"])
@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_sampled_is_the_reduced_problem(n, preference, granularity):
    """Members and the mean of the rest as rows, their shares of the mean as the centre."""
    net = Net(MANY)
    share = preference or dict.fromkeys(MANY, 1 / 6)
    shared = list(net.trunk.parameters())
    source = detente.Sampled(n, seed=4)
    for _ in range(3):
        method = detente.CAGrad(c=0.6, preference=preference)
        update = detente.backward(net.losses(), method, source=source, granularity=granularity)
        members = update.stats["sampled"]
        rest = [t for t in MANY if t not in members]
        assert len(set(members)) == n
        losses = net.losses()
        g = {t: torch.autograd.grad(losses[t], shared, retain_graph=True) for t in MANY}
        remainder = sum(share[t] for t in rest)
        rows = [
            *(g[t] for t in members),
            [sum(share[t] / remainder * g[t][k] for t in rest) for k in range(len(shared))],
        ]
        J = [torch.stack([row[k].reshape(-1) for row in rows]) for k in range(len(shared))]
        G = torch.stack([block @ block.T for block in J])
        reduced = detente.CAGrad(c=0.6, preference=[*(share[t] for t in members), remainder])
        w = reduced.weights(G.sum(0)).expand(len(shared), -1) if granularity == "model" else reduced.weights(G)
        for k, p in enumerate(shared):
            torch.testing.assert_close(p.grad.reshape(-1), w[k] @ J[k], **TIGHT)
        if granularity == "model":
            for r, t in enumerate(members):
                torch.testing.assert_close(update.weights[t], w[0, r], **TIGHT)
            for t in rest:
                torch.testing.assert_close(update.weights[t], w[0, -1] * share[t] / remainder, **TIGHT)
        net.zero_grad()


@pytest.mark.parametrize("preference", [None, UNEVEN], ids=["mean", "preference"])
def test_sampled_heads_get_their_own_gradient_whether_drawn_or_not(preference):
    net = Net(MANY)
    detente.backward(net.losses(), detente.CAGrad(preference=preference), source=detente.Sampled(2))
    for t, loss in net.losses().items():
        head = net.heads[t].weight
        torch.testing.assert_close(head.grad, torch.autograd.grad(loss, head, retain_graph=True)[0], **TIGHT)


def test_sampled_with_weighted_heads():
    net = Net(MANY)
    update = detente.backward(net.losses(), detente.CAGrad(heads="weighted"), source=detente.Sampled(2))
    for t, loss in net.losses().items():
        head = net.heads[t].weight
        (own,) = torch.autograd.grad(loss, head, retain_graph=True)
        torch.testing.assert_close(head.grad, update.weights[t] * own, **TIGHT)


def test_sampled_heads_of_tasks_without_preference_keep_their_gradient():
    net = Net(MANY)
    preference = dict.fromkeys(MANY, 0.0) | {"a": 0.5, "b": 0.5}
    detente.backward(net.losses(), detente.CAGrad(preference=preference), source=detente.Sampled(1))
    for t, loss in net.losses().items():
        head = net.heads[t].weight
        torch.testing.assert_close(head.grad, torch.autograd.grad(loss, head, retain_graph=True)[0], **TIGHT)


def test_sampled_with_parameters_that_several_losses_reach_beside_the_listed_ones():
    net = Net(MANY)
    method = detente.CAGrad(preference=UNEVEN)
    detente.backward(net.losses(), method, source=detente.Sampled(1), shared=net.trunk[2].parameters())
    got = net.trunk[0].weight.grad
    (wanted,) = torch.autograd.grad(sum(net.losses().values()), net.trunk[0].weight)
    torch.testing.assert_close(got, wanted, **TIGHT)  # every loss adds its own gradient, sampled or not


def test_sampled_takes_a_loss_weighting_as_preference():
    net, source = Net(MANY), detente.Sampled(2)
    method = detente.CAGrad(preference=detente.DWA())
    update = detente.backward(net.losses(), method, source=source)
    wanted = taken(net)
    members = update.stats["sampled"]
    fresh = detente.Sampled(2)
    again = detente.backward(net.losses(), detente.CAGrad(), source=fresh)  # DWA is uniform in its first epoch
    assert again.stats["sampled"] == members
    assert_same(grads(net), wanted)
    assert plain(method.state_dict()) != plain(detente.CAGrad(preference=detente.DWA()).state_dict()), "took the step"


def test_sampled_draws_every_task_and_resumes():
    net, source = Net(MANY), detente.Sampled(2, seed=1)

    def draws(count: int, source: detente.Sampled) -> list[list[str]]:
        return [detente.backward(net.losses(), detente.CAGrad(), source=source).stats["sampled"] for _ in range(count)]

    seen = draws(40, source)
    counts = {t: sum(t in d for d in seen) for t in MANY}
    # 80 draws over 6 tasks: mean 13.3, standard deviation 3; five of them is far beyond chance
    assert all(abs(count - 40 / 3) < 15 for count in counts.values())
    assert min(counts.values()) > 0
    saved = source.state_dict()
    following = draws(5, source)
    other = detente.Sampled(2, seed=99)
    other.load_state_dict(saved)
    assert draws(5, other) == following
    assert draws(40, detente.Sampled(2, seed=1)) == seen
    assert draws(10, detente.Sampled(2, seed=2)) != seen[:10]


def test_sampled_draws_nothing_when_the_step_fails():
    net, source = Net(MANY), detente.Sampled(2)
    before = source.state_dict()["generator"].clone()
    losses = net.losses()
    losses["d"] = losses["d"] * math.nan
    with pytest.raises(FloatingPointError, match="'d'"):
        detente.backward(losses, detente.CAGrad(), source=source)
    assert torch.equal(source.state_dict()["generator"], before)


# ---- heads and Update ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAMIAN)
@pytest.mark.parametrize("heads", ["own", "weighted"])
def test_heads_follow_the_convention(name, heads):
    net, method = Net(), detente.get_method(name, heads=heads)
    losses = net.losses()
    weighting = method.own_weighting or detente.GD()
    own_weights = weighting.weights(torch.stack([loss.detach() for loss in losses.values()]), Context(TASKS))
    weighting.reset()
    update = detente.backward(losses, method)
    for w, (t, loss) in zip(own_weights, net.losses().items(), strict=True):
        parameters = list(net.heads[t].parameters())
        own = torch.autograd.grad(loss, parameters, retain_graph=True)
        factor = update.weights[t] if heads == "weighted" else w
        assert_same([p.grad for p in parameters], [factor * g for g in own])


def test_update_tells_what_happened():
    net = Net()
    losses = net.losses()
    shared = list(net.trunk.parameters())
    J = torch.stack(
        [torch.cat([g.reshape(-1) for g in torch.autograd.grad(v, shared, retain_graph=True)]) for v in losses.values()]
    )
    update = detente.backward(losses, detente.CAGrad())
    assert isinstance(update, detente.Update)
    assert list(update.weights) == list(TASKS)
    assert all(w.shape == () and w.dtype == torch.float64 and w.device.type == "cpu" for w in update.weights.values())
    assert update.gramian.dtype == torch.float64
    torch.testing.assert_close(update.gramian, J @ J.T, **TIGHT)
    assert update.stats["conflicts"] == int(((J @ J.T).triu(1) < 0).sum())
    assert update.stats["dropped"] == []
    assert update.stats["backwards"] == 3


def test_update_names_tasks_whose_shared_gradient_is_zero():
    net = Net()
    losses = net.losses()
    losses["b"] = losses["b"] * 0
    update = detente.backward(losses, detente.CAGrad())
    assert update.stats["dropped"] == ["b"]
    assert float(update.weights["b"]) == 0
    wanted = taken(net)
    detente.backward(net.losses(("a", "c")), detente.CAGrad())
    got = taken(net)
    named = dict(net.named_parameters())
    for name, a, b in zip(named, got, wanted, strict=True):
        if "heads.b" not in name:
            torch.testing.assert_close(a, b, **TIGHT)


def test_weightings_form_no_gramian():
    update = detente.backward(Net().losses(), detente.UW())
    assert update.gramian is None
    assert update.stats["backwards"] == 1


# ---- aggregate -------------------------------------------------------------------------------------------------

LOSSES = [0.5, 2.0, 1.0]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, torch.float64) for n in [*GRAMIAN, *WEIGHTINGS]]
    # the number types of every method are in the conformance suite
    + [(n, dtype) for n in ("cagrad", "imtl", "gls") for dtype in (torch.float32, torch.bfloat16)],
)
def test_aggregate_combines_the_rows_with_the_weights(name, dtype):
    J = data(3, 50).to(dtype)
    d = detente.aggregate(J, detente.get_method(name), losses=LOSSES)
    method, wide = detente.get_method(name), J.double()
    values = torch.tensor(LOSSES, dtype=torch.float64)
    if isinstance(method, detente.GramianMethod):
        wanted, weights, _ = resolved(wide, method, Context(("0", "1", "2"), losses=values))
    else:
        weights = method.weights(values)
        wanted = weights @ wide
    assert (d.dtype, d.shape) == (dtype, (50,))
    # rounding of the coefficients and of the result to the dtype
    eps = torch.finfo(dtype).eps
    bound = 8 * max(eps, 1e-10) * float((weights.abs()[:, None] * wide.abs()).sum(0).max())
    torch.testing.assert_close(d.double(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("name", [*GRAMIAN, *WEIGHTINGS])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_aggregate_of_a_jacobian_that_is_not_finite_is_all_nan(name, value):
    J = data(3, 5)
    J[1, 2] = value
    method = detente.get_method(name)
    before = plain(method.state_dict())
    assert bool(detente.aggregate(J, method, losses=LOSSES).isnan().all())
    assert plain(method.state_dict()) == before


def test_aggregate_takes_losses_as_a_tensor_and_leaves_its_input_alone():
    J = data(2, 5)
    kept = J.clone()
    a = detente.aggregate(J, detente.GLS(), losses=torch.tensor([1.0, 4.0]))
    b = detente.aggregate(J, detente.GLS(), losses=[1.0, 4.0])
    assert torch.equal(a, b)
    assert torch.equal(J, kept)
    assert not torch.equal(detente.aggregate(J, detente.GD()), J[0])


def test_aggregate_of_gradients_that_require_grad_is_detached():
    J = data(2, 5).requires_grad_()
    assert not detente.aggregate(J, detente.CAGrad()).requires_grad
