"""detente.step: the same as zero_grad, backward and step by hand, and the order of a closure's calls."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import detente
from detente.method import method_class
from states import plain

# built without arguments: a method that works on the layers of a model needs the model
ALL = [name for name in detente.list_methods() if "model" not in method_class(name).needs]
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


# a method that requires step has no loop of backward that could be written out
@pytest.mark.parametrize("name", [name for name in ALL if not detente.get_method(name).requires_step])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_is_the_loop_written_out(name, optimizer):
    net, twin = Net(), Net()
    method, by_hand = detente.get_method(name), detente.get_method(name)
    one, two = OPTIMIZERS[optimizer](net.parameters()), OPTIMIZERS[optimizer](twin.parameters())
    after = "losses after the step" in method.needs
    for _ in range(4):
        update = detente.step(net.closure, one, method)
        two.zero_grad()
        wanted = detente.backward(twin.closure(), by_hand)
        two.step()
        if after:
            by_hand.after_step({t: loss.detach() for t, loss in twin.closure(TASKS).items()})
        assert equal(net, twin)  # the same operations in the same order: bit for bit
        assert all(torch.equal(update.weights[t], wanted.weights[t]) for t in TASKS)
    assert net.asked == ([None, TASKS] if after else [None]) * 4, "one forward pass per step, and one after it"
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
    # twelve samples, fifty parameters: any method that moves the right way takes a third off each loss
    assert all(end[t] < 0.65 * start[t] for t in TASKS), (start, end)


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


# ---------------------------------------------------------------------------------------------------------------------
# Methods that one backward pass cannot express

NEED_STEP = {
    "auto_lambda": (lambda: detente.AutoLambda(), "it tries a virtual step before each real one"),
    "modo, 2 batches": (lambda: detente.MoDo(batches=2), "it compares 2 batches.*or leave batches=1"),
    "modo, 3 batches": (lambda: detente.MoDo(batches=3), "it compares 3 batches.*or leave batches=1"),
    "sdmgrad, 3 batches": (lambda: detente.SDMGrad(batches=3), "it compares 3 batches.*or leave batches=1"),
}


@pytest.mark.parametrize("case", NEED_STEP)
def test_backward_says_why_a_method_needs_step(case):
    build, why = NEED_STEP[case]
    net, method = Net(), build()
    before = plain(method.state_dict())
    with pytest.raises(RuntimeError, match=rf"{method.name} cannot work with one backward pass: {why}"):
        detente.backward(net.closure(), method)
    with pytest.raises(RuntimeError, match=r"Use detente\.step\(closure, optimizer, method\)"):
        detente.backward(net.closure(), method)
    assert all(p.grad is None for p in net.parameters())
    assert plain(method.state_dict()) == before
    detente.step(net.closure, torch.optim.SGD(net.parameters(), lr=0.1), method)
    assert not equal(net, Net()), "and step can"


def test_methods_that_require_step_are_those_named():
    required = {name for name in ALL if detente.get_method(name).requires_step}
    assert required == {"auto_lambda"}
    assert not detente.MoDo().requires_step
    assert not detente.SDMGrad().requires_step


@pytest.mark.parametrize(
    "options",
    [{"weighting": detente.DWA()}, {"source": "features"}, {"source": detente.Sampled(1)}],
    ids=["weighting", "features", "sampled"],
)
def test_a_schedule_takes_neither_weighting_nor_source(options):
    net = Net()
    with pytest.raises(ValueError, match="do not apply to the schedule of auto_lambda"):
        detente.step(net.closure, torch.optim.SGD(net.parameters(), lr=0.1), detente.AutoLambda(), **options)
    assert equal(net, Net())
    assert net.asked == []


class Batches(Net):
    """In float64, with a fresh batch in every call; ``given`` are the batches that were handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.double()
        self.generator = torch.Generator().manual_seed(5)
        self.given: list[tuple[Tensor, Tensor]] = []

    def on(self, x: Tensor, y: Tensor, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {t: (self.heads[t](h) - y[TASKS.index(t)]).square().mean() for t in tasks or TASKS}

    def closure(self, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        self.asked.append(tasks)
        draw = {"generator": self.generator, "dtype": torch.float64}
        self.given.append((torch.randn(12, 4, **draw), torch.randn(3, 12, 1, **draw)))
        return self.on(*self.given[-1], tasks)

    def jacobian(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        shared = list(self.trunk.parameters())
        rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in self.on(*batch).values()]
        return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


@pytest.mark.parametrize("batches", [2, 3])
def test_several_batches_are_drawn_and_multiplied(batches):
    """MoDo by hand: ``l <- Proj(l - gamma (J1 J2' l + rho l))``, and the update from the first call's batch."""
    net, gamma, rho = Batches(), 0.3, 0.1
    method = detente.MoDo(gamma=gamma, rho=rho, batches=batches)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    shares = torch.full((3,), 1 / 3, dtype=torch.float64)
    for k in range(3):
        frozen = copy.deepcopy(net)
        update = detente.step(net.closure, optimizer, method)
        now = net.given[k * batches :]
        assert len(now) == batches, "one call of the closure per batch"
        # with two batches the first one serves twice
        first, second = (frozen.jacobian(batch) for batch in now[-2:])
        shares = simplex(shares - gamma * (first @ second.T @ shares + rho * shares))
        # float64 products of 30 numbers
        torch.testing.assert_close(torch.stack(list(update.weights.values())), shares, rtol=1e-10, atol=1e-12)
        d = torch.cat([p.grad.reshape(-1) for p in net.trunk.parameters()])
        torch.testing.assert_close(d, shares @ frozen.jacobian(now[0]), rtol=1e-10, atol=1e-12)
        own = frozen.jacobian(now[0])
        torch.testing.assert_close(update.gramian, own @ own.T, rtol=1e-10, atol=1e-12)
        assert update.stats["backwards"] == 3 * batches
    assert net.asked == [None if k % batches == 0 else TASKS for k in range(3 * batches)]
    assert float(shares.std()) > 0.01


def simplex(point: Tensor) -> Tensor:
    """The nearest point of the simplex, by trying every threshold."""
    for count in range(len(point), 0, -1):
        kept = point.sort(descending=True).values[:count]
        level = (kept.sum() - 1) / count
        if float(kept[-1]) > float(level):
            return (point - level).clamp_min(0)
    raise AssertionError


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_cross_products_come_in_blocks_too(granularity):
    seen: list[Tensor] = []

    class Spy(detente.SDMGrad):
        def rule(self, gramian, context):
            seen.append(context.cross)
            return super().rule(gramian, context)

    net = Batches()
    frozen = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    detente.step(net.closure, optimizer, Spy(batches=3), granularity=granularity)
    _, first, second = (frozen.jacobian(batch) for batch in net.given)
    (cross,) = seen
    assert cross.shape == ((1 if granularity == "model" else 2), 3, 3)
    torch.testing.assert_close(cross.sum(0), first @ second.T, rtol=1e-10, atol=1e-12)
    assert float((cross - cross.transpose(1, 2)).abs().max()) > 1e-3, "of two batches: not symmetric"


def test_batches_that_bring_other_tasks_are_refused():
    net, calls = Batches(), []

    def closure(tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        calls.append(tasks)
        return net.closure(("a", "b") if len(calls) == 2 else TASKS)

    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"same tasks.*\['a', 'b', 'c'\] and \['a', 'b'\]"):
        detente.step(closure, torch.optim.SGD(net.parameters(), lr=0.1), detente.MoDo(batches=3))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))


def snapshot(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


class Watched(Net):
    """Remembers where the parameters were at every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.double()
        self.x, self.y = self.x.double(), self.y.double()
        self.places: list[list[Tensor]] = []

    def closure(self, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        self.places.append(snapshot(self))
        return super().closure(tasks)


SGDS = {
    "plain": {"lr": 0.3},
    "momentum and decay": {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.02},
}


@pytest.mark.parametrize("options", SGDS)
def test_auto_lambda_steps_virtually_and_comes_back_to_the_bit(options):
    net, method = Watched(), detente.AutoLambda(lr=0.01)
    optimizer = torch.optim.SGD(net.parameters(), **SGDS[options])
    for _ in range(3):
        net.places.clear()
        weights = method.lambdas.read(TASKS)
        # what the optimizer itself would do with these weights
        twin = copy.deepcopy(net)
        other = torch.optim.SGD(twin.parameters(), **SGDS[options])
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        sum(w * loss for w, loss in zip(weights, twin.closure().values(), strict=True)).backward()
        other.step()
        detente.step(net.closure, optimizer, method)
        start, ahead, above, below, resolved = net.places
        for a, b, c in zip(start, resolved, ahead, strict=True):
            assert torch.equal(a, b), "restored to the bit"
            assert not torch.equal(a, c)
        for a, b in zip(ahead, snapshot(twin), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)  # float64, another order of the same sums
        # the finite difference: epsilon to both sides of where it began
        up = torch.cat([(a - s).reshape(-1) for a, s in zip(above, start, strict=True)])
        down = torch.cat([(b - s).reshape(-1) for b, s in zip(below, start, strict=True)])
        torch.testing.assert_close(up, -down, rtol=1e-9, atol=1e-14)  # differences of numbers of the size 1
        assert float(up.norm()) == pytest.approx(method.epsilon, rel=1e-9)


def test_auto_lambda_by_hand():
    """Three steps, written out from the docstring, Adam included."""
    net, twin = Watched(), Watched()
    method = detente.AutoLambda(lr=0.02, primary=["a", "c"])
    rate, epsilon = 0.3, 0.01
    one, two = (torch.optim.SGD(n.parameters(), lr=rate) for n in (net, twin))
    values = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([values], lr=0.02)
    for _ in range(3):
        used = values.detach().clone()
        parameters = list(twin.parameters())

        def total(weights: Tensor, model: Net = twin) -> Tensor:
            return sum(w * loss for w, loss in zip(weights, model.closure().values(), strict=True))

        def at(places: list[Tensor], model: Net = twin) -> list[float]:
            old = snapshot(model)
            with torch.no_grad():
                for p, place in zip(model.parameters(), places, strict=True):
                    p.copy_(place)
                found = [float(loss) for loss in model.closure().values()]
                for p, place in zip(model.parameters(), old, strict=True):
                    p.copy_(place)
            return found

        here = snapshot(twin)
        ahead = copy.deepcopy(twin)
        slopes = torch.autograd.grad(total(used), parameters)
        with torch.no_grad():
            for p, g in zip(ahead.parameters(), slopes, strict=True):
                p -= rate * g
        goal = ahead.closure()
        found = torch.autograd.grad(goal["a"] + goal["c"], list(ahead.parameters()), allow_unused=True)
        v = [torch.zeros_like(p) if g is None else rate * g for p, g in zip(parameters, found, strict=True)]
        step = epsilon / float(torch.cat([g.reshape(-1) for g in v]).norm())
        up = at([p + step * g for p, g in zip(here, v, strict=True)])
        down = at([p - step * g for p, g in zip(here, v, strict=True)])
        change = [-(a - b) / (2 * step) for a, b in zip(up, down, strict=True)]
        values.grad = torch.tensor(change, dtype=torch.float64)
        adam.step()
        two.zero_grad()
        total(values.detach()).backward()
        two.step()
        update = detente.step(net.closure, one, method)
        got = torch.stack(list(update.weights.values()))
        # the difference of losses of the size 1 over 2 e, about 1e-2, keeps 13 digits; Adam divides by its own size

        torch.testing.assert_close(got, values.detach(), rtol=0, atol=1e-8)
        assert not torch.equal(values.detach(), used)
    assert len({round(v, 6) for v in values.tolist()}) > 1


def test_an_error_during_the_virtual_step_leaves_the_parameters_where_they_were():
    net = Watched()
    start = snapshot(net)

    def meta(tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        raise LookupError("no second batch")

    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    with pytest.raises(LookupError, match="no second batch"):
        detente.step(net.closure, optimizer, detente.AutoLambda(meta=meta))
    assert all(torch.equal(a, b) for a, b in zip(start, snapshot(net), strict=True))


class Dropped(Net):
    """With dropout in the trunk: every forward pass draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk.append(nn.Dropout(0.5))


def test_famo_through_step_is_the_loop_with_after_step():
    """The losses after the step are those of the same dropout masks; the generator goes on as if they had not been."""
    net, twin = Dropped(), Dropped()
    method, by_hand = detente.FAMO(lr=0.5), detente.FAMO(lr=0.5)
    one, two = (torch.optim.Adam(n.parameters(), lr=0.05) for n in (net, twin))
    torch.manual_seed(11)
    for _ in range(5):
        drawn = torch.get_rng_state()
        update = detente.step(net.closure, one, method)
        after_step = torch.get_rng_state()
        torch.set_rng_state(drawn)
        two.zero_grad()
        wanted = detente.backward(twin.closure(), by_hand)
        two.step()
        after_loop = torch.get_rng_state()
        torch.set_rng_state(drawn)
        with torch.no_grad():
            by_hand.after_step(twin.closure())
        torch.set_rng_state(after_loop)
        assert torch.equal(after_step, after_loop)
        assert equal(net, twin)
        assert all(torch.equal(update.weights[t], wanted.weights[t]) for t in TASKS)
        assert plain(method.state_dict()) == plain(by_hand.state_dict())
    assert float(torch.stack(list(update.weights.values())).std()) > 0


def test_famo_leaves_its_history_when_a_step_is_not_finite():
    net, method = Net(), detente.FAMO()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    detente.step(net.closure, optimizer, method)
    before = plain(method.state_dict())
    with pytest.raises(FloatingPointError):
        detente.step(lambda tasks=None: {t: v * math.nan for t, v in net.closure(tasks).items()}, optimizer, method)
    assert plain(method.state_dict()) == before


class Probe(detente.GD):
    """Looks at the session from inside."""

    name = "probe"

    def take_step(self, session):
        self.first = {t: float(v.detach()) for t, v in session.losses().items()}
        after = torch.get_rng_state()
        self.again = session.values(), session.values()
        self.left = torch.equal(torch.get_rng_state(), after)
        torch.rand(3)  # draws in between do not matter
        moved = torch.get_rng_state()
        self.later = session.values()
        self.left = self.left and torch.equal(torch.get_rng_state(), moved)
        return super().take_step(session)


def test_values_repeat_the_draw_of_the_forward_pass_and_leave_the_generator_alone():
    net, probe = Dropped(), Probe()
    torch.manual_seed(3)
    detente.step(net.closure, torch.optim.SGD(net.parameters(), lr=0.1), probe)
    assert probe.again == (probe.first, probe.first)
    assert probe.later == probe.first
    assert probe.left
    assert {t: float(v.detach()) for t, v in net.closure().items()} != probe.first, "other masks, other parameters"


def test_values_leave_the_generator_alone_when_the_closure_fails():
    class Failing(detente.GD):
        name = "failing"

        def take_step(self, session):
            session.losses()
            net.broken = True
            return session.values()

    net = Dropped()
    net.broken = False

    def closure(tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        found = net.closure(tasks)
        if net.broken:
            raise LookupError("gone")
        return found

    torch.manual_seed(3)
    net.closure()
    wanted = torch.get_rng_state()
    torch.manual_seed(3)
    with pytest.raises(LookupError, match="gone"):
        detente.step(closure, torch.optim.SGD(net.parameters(), lr=0.1), Failing())
    assert torch.equal(torch.get_rng_state(), wanted)


class Parts(Net):
    """The batch in three parts, one per call of the closure."""

    def __init__(self) -> None:
        super().__init__()
        self.double()
        self.x, self.y = self.x.double(), self.y.double()
        self.part = 0

    def next_part(self, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        here = slice(4 * self.part, 4 * self.part + 4)
        self.part = (self.part + 1) % 3
        h = self.trunk(self.x[here])
        return {t: (self.heads[t](h) - self.y[TASKS.index(t), here]).square().mean() for t in tasks or TASKS}


GRADIENTS = [
    name
    for name in ALL
    if method_class(name).kind != "losses"
    and not detente.get_method(name).requires_step
    and detente.get_method(name).batches == 1
    and "losses after the step" not in method_class(name).needs
    and isinstance(detente.get_method(name), detente.GramianMethod)
]


@pytest.mark.parametrize("name", GRADIENTS)
def test_accumulated_task_gradients_are_those_of_the_whole_batch(name):
    net, whole = Parts(), Parts()
    method, other = detente.get_method(name), detente.get_method(name)
    one, two = (torch.optim.SGD(n.parameters(), lr=0.05) for n in (net, whole))
    for _ in range(3):
        update = detente.step(net.next_part, one, method, micro_batches=3)
        wanted = detente.step(whole.closure, two, other)
        assert update.stats["backwards"] == 9
        torch.testing.assert_close(update.gramian, wanted.gramian, rtol=1e-9, atol=1e-12)
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        # float64, three sums of three parts; methods that follow a kink may amplify that
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_accumulated_task_gradients_by_blocks(granularity):
    net, whole = Parts(), Parts()
    for n, closure, parts in ((net, net.next_part, 3), (whole, whole.closure, 1)):
        optimizer = torch.optim.SGD(n.parameters(), lr=0.05)
        detente.step(closure, optimizer, detente.PCGrad(), granularity=granularity, micro_batches=parts)
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["cagrad", "uw", "cdtt"])
def test_accumulated_directions_are_the_loop_written_out(name):
    net, twin = Parts(), Parts()
    method, by_hand = detente.get_method(name), detente.get_method(name)
    one, two = (torch.optim.SGD(n.parameters(), lr=0.05) for n in (net, twin))
    for _ in range(2):
        detente.step(net.next_part, one, method, micro_batches=3, accumulate="direction")
        two.zero_grad()
        for _ in range(3):
            losses = {t: loss / 3 for t, loss in twin.next_part().items()}
            detente.backward(losses, by_hand, scale=1 / 3)
        two.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)  # a third is rounded in two ways


def test_micro_batches_that_do_not_fit_are_refused_and_nothing_is_written():
    net = Parts()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)

    def other_tasks(tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        losses = net.next_part()
        return losses if net.part == 1 else {"a": losses["a"]}

    before = copy.deepcopy(net.state_dict())
    for closure, method, options, match in (
        (other_tasks, detente.CAGrad(), {}, "must bring the same tasks"),
        (net.next_part, detente.CAGrad(), {"source": "features"}, "accumulate='direction'"),
        (net.next_part, detente.UW(), {}, "accumulate='direction'"),
        (net.next_part, detente.FAMO(), {}, "no micro-batches"),
        (net.next_part, detente.AutoLambda(), {}, "no micro-batches"),
    ):
        net.part = 0
        with pytest.raises(ValueError, match=match):
            detente.step(closure, optimizer, method, micro_batches=2, **options)
    for bad in ({"micro_batches": 0}, {"accumulate": "mean"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            detente.step(net.next_part, optimizer, detente.CAGrad(), **bad)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert all(p.grad is None for p in net.parameters())
