"""The task gradients of one pass are those of a pass per task, where no sample counts in two losses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import detente

# sums over the same samples in another order
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Net(nn.Module):
    """Parts, and how they make of a batch, with these rows of each task, one output, or one for each task."""

    def __init__(self, forward: Callable[[Any, Tensor, list[int]], Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.run = forward

    def losses(self, x: Tensor, samples: list[int]) -> list[Tensor]:
        found = self.run(self, x, samples)
        chunks = found.split(samples) if isinstance(found, Tensor) else found
        return [(chunk - t).square().mean() for t, chunk in enumerate(chunks)]


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def several(count: int = 3) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(6, 2) for _ in range(count))


def on_slices(net: Any, x: Tensor, samples: list[int]) -> list[Tensor]:
    """Each task's head on its own rows."""
    return [head(chunk) for head, chunk in zip(net.heads, net.trunk(x).split(samples), strict=True)]


def on_all(net: Any, x: Tensor, samples: list[int]) -> list[Tensor]:
    """Each task's head on all rows, of which it takes its own."""
    h, ends = net.trunk(x), [0, *itertools.accumulate(samples)]
    return [head(h)[a:b] for head, (a, b) in zip(net.heads, itertools.pairwise(ends), strict=True)]


def one_hot(net: Any, x: Tensor, samples: list[int]) -> Tensor:
    which = torch.eye(3, dtype=x.dtype).repeat_interleave(torch.tensor(samples), 0)
    return net.trunk(torch.cat([x, which], 1))


def some_reach(net: Any, x: Tensor, samples: list[int]) -> list[Tensor]:
    """The first task alone does without the expert, which sees all rows."""
    h = net.trunk(x)
    return [h[: samples[0]], *net.expert(h).split(samples)[1:]]


# network, and the shape of one sample
NETS: dict[str, tuple[Callable[[], Net], tuple[int, ...]]] = {
    "layers": (lambda: Net(lambda s, x, _: s.trunk(x), trunk=mlp(6, 9, 7, 2)), (6,)),
    "no biases": (lambda: Net(lambda s, x, _: s.trunk(x), trunk=mlp(6, 9, 7, 2, bias=False)), (6,)),
    "one task is an input": (lambda: Net(one_hot, trunk=mlp(9, 12, 2)), (6,)),
    "heads on slices": (lambda: Net(on_slices, trunk=mlp(6, 9, 6), heads=several()), (6,)),
    "heads on all rows": (lambda: Net(on_all, trunk=mlp(6, 9, 6), heads=several()), (6,)),
    "tokens": (lambda: Net(lambda s, x, _: s.trunk(x), trunk=mlp(6, 9, 2)), (4, 6)),
    "tokens, then samples": (
        lambda: Net(lambda s, x, _: s.b(s.a(x).tanh().mean(1)), a=nn.Linear(6, 9), b=nn.Linear(9, 2)), (4, 6)),
    "only some reach a layer": (lambda: Net(some_reach, trunk=mlp(6, 9, 6), expert=mlp(6, 5, 6)), (6,)),
    "skips": (lambda: Net(lambda s, x, _: s.c(x + s.b(s.a(x).relu())), a=mlp(6, 9), b=mlp(9, 6), c=mlp(6, 2)), (6,)),
    "dropout": (lambda: Net(lambda s, x, _: s.trunk(x), trunk=nn.Sequential(mlp(6, 9), nn.Dropout(), mlp(9, 2))), (6,)),
}  # fmt: skip


def build(name: str, samples: Sequence[int], dtype: torch.dtype = torch.float64) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    make, shape = NETS[name]
    return make().to(dtype), torch.randn(sum(samples), *shape, dtype=dtype)


def grads(net: Net, x: Tensor, samples: list[int], method: Any, **options: Any) -> tuple[Any, list[Tensor | None]]:
    torch.manual_seed(1)  # of dropout
    net.zero_grad()
    update = detente.backward(net.losses(x, samples), method, **options)
    return update, [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def assert_close(found: list[Tensor | None], wanted: list[Tensor | None], tolerance: float) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("samples", [[4, 4, 4], [5, 1, 3]], ids=["even", "uneven"])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", NETS)
def test_one_pass_is_a_pass_per_task(name, dtype, samples):
    net, x = build(name, samples, dtype)
    source = detente.Disjoint(samples)
    for method in (detente.CAGrad, detente.PCGrad, detente.NashMTL):
        update, mine = grads(net, x, samples, method(), source=source)
        serial, theirs = grads(net, x, samples, method(), engine="serial")
        assert update.stats["engine"] == "disjoint"
        tolerance = CLOSE[dtype]
        torch.testing.assert_close(
            update.gramian, serial.gramian, rtol=tolerance, atol=tolerance * float(serial.gramian.diagonal().max())
        )
        # a solver may enlarge the rounding of the Gramian by its condition
        assert_close(mine, theirs, 100 * tolerance)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (detente.CAGrad, {"granularity": "layer"}),
        (detente.CAGrad, {"granularity": "channel"}),
        (detente.GradDrop, {}),
        (detente.WPCGrad, {}),
        (detente.MoCo, {}),
        (lambda: detente.MGDA(heads="weighted"), {}),
        (detente.CAGrad, {"weighting": detente.RLW}),
        (detente.CAGrad, {"scale": 1024.0}),
        (detente.CAGrad, {"storage": torch.float32}),
    ],
)
def test_with_every_method_and_option(method, options):
    samples = [4, 2, 3]
    net, x = build("heads on slices", samples)
    found = []
    for way in ({"source": detente.Disjoint(samples)}, {"engine": "serial"}):
        made = {name: value() if name == "weighting" else value for name, value in options.items()}
        found.append(grads(net, x, samples, method(), **made, **way))
    assert found[0][0].stats["engine"] == "disjoint"
    # in float32 the rows are rounded, and the update with them
    assert_close(found[0][1], found[1][1], 1e-5 if "storage" in options else 1e-8)


def test_some_tasks_of_a_mapping_in_the_order_of_their_losses():
    samples = {"a": 4, "b": 2, "c": 3}
    net, _ = build("layers", [1])
    source = detente.Disjoint(samples)
    for tasks in ("abc", "ca", "bc", "b"):
        rows = [samples[task] for task in tasks]
        x = torch.randn(sum(rows), 6, dtype=torch.float64)
        found = []
        for options in ({"source": source}, {"engine": "serial"}):
            net.zero_grad()
            losses = dict(zip(tasks, net.losses(x, rows), strict=True))
            update = detente.backward(losses, detente.PCGrad(), shared=net.parameters(), **options)
            found.append([p.grad for p in net.parameters()])
            assert list(update.weights) == list(tasks)
            assert update.stats["engine"] == ("disjoint" if "source" in options else "serial")
        assert_close(*found, 1e-10)


def test_a_head_that_is_listed_as_shared_has_one_row():
    samples = [2, 3, 4]
    net, x = build("heads on slices", samples)
    found = []
    for options in ({"source": detente.Disjoint(samples)}, {"engine": "serial"}):
        found.append(grads(net, x, samples, detente.UPGrad(), shared=net.parameters(), **options))
    assert found[0][0].stats["engine"] == "disjoint"
    assert_close(found[0][1], found[1][1], 1e-8)


@pytest.mark.parametrize(
    ("method", "engine"),
    [(detente.CAGrad, "disjoint"), (lambda: detente.MGDA(heads="weighted"), "serial")],
    ids=["own", "weighted"],
)
def test_heads_whose_outputs_are_joined_are_the_tasks_own_where_only_the_trunk_is_shared(method, engine):
    """Every loss then seems to reach every head; their gradients are summed, and all but one are 0."""
    samples = [2, 3, 4]
    net = Net(lambda s, x, n: torch.cat(on_slices(s, x, n)), trunk=mlp(6, 9, 6), heads=several()).double()
    x, found = torch.randn(9, 6, dtype=torch.float64), []
    for options in ({"source": detente.Disjoint(samples)}, {"engine": "serial"}):
        found.append(grads(net, x, samples, method(), shared=net.trunk.parameters(), **options))
    assert found[0][0].stats["engine"] == engine
    assert_close(found[0][1], found[1][1], 1e-8)


def test_a_frozen_weight_with_a_bias_that_is_trained():
    samples = [2, 3]
    net, x = build("layers", samples)
    net.trunk[2].weight.requires_grad_(False)
    update, mine = grads(net, x, samples, detente.CAGrad(), source=detente.Disjoint(samples))
    assert update.stats["engine"] == "disjoint"
    assert_close(mine, grads(net, x, samples, detente.CAGrad(), engine="serial")[1], 1e-8)


def test_gradients_accumulate():
    samples = [2, 3]
    net, x = build("layers", samples)
    _, once = grads(net, x, samples, detente.CAGrad(), source=detente.Disjoint(samples))
    detente.backward(net.losses(x, samples), detente.CAGrad(), source=detente.Disjoint(samples))
    assert_close([p.grad for p in net.parameters()], [2 * g for g in once], 1e-12)


def test_steps_in_between_reuse_the_coefficients():
    samples = [2, 3, 4]
    net, x = build("heads on slices", samples)
    source, plain = detente.Every(2, detente.Disjoint(samples)), detente.Every(2)
    for engine in ("disjoint", "reused", "disjoint"):
        update, mine = grads(net, x, samples, detente.CAGrad(), source=source)
        assert update.stats["engine"] == engine
        assert_close(mine, grads(net, x, samples, detente.CAGrad(), source=plain)[1], 1e-8)
    assert source.state_dict()["reused"] == 0


def test_a_step_is_one_pass_once_the_network_was_checked():
    net, _ = build("layers", [1])
    passes: list[int] = []

    def step(samples: list[int]) -> int:
        passes.clear()
        h = net.trunk[0](torch.randn(sum(samples), 6, dtype=torch.float64))
        h.register_hook(lambda g: passes.append(1))
        losses = [chunk.square().mean() for chunk in net.trunk[1:](h).split(samples)]
        update = detente.backward(losses, detente.CAGrad(), source=detente.Disjoint(samples))
        assert update.stats["backwards"] == len(passes)
        return len(passes)

    assert step([4, 4]) == 2
    # with other rows, and other tasks, it is the same network
    assert [step(samples) for samples in ([4, 4], [2, 7], [3, 3, 3])] == [1, 1, 1]


def conv(net: Any, x: Tensor, _: list[int]) -> Tensor:
    return net.b(net.a(x.unsqueeze(1)).flatten(1))


def hooked() -> nn.Sequential:
    model = mlp(6, 8, 2)
    model[0].weight.register_hook(lambda g: 2 * g)
    return model


UNCOVERED: dict[str, tuple[Callable[[], Net], tuple[int, ...]]] = {
    "convolution": (lambda: Net(conv, a=nn.Conv1d(1, 2, 3), b=nn.Linear(8, 2)), (2, 1, 3)),
    "norm": (lambda: Net(lambda s, x, _: s.b(s.n(s.a(x))), a=mlp(6, 8), n=nn.LayerNorm(8), b=mlp(8, 2)), (8,)),
    "tied": (lambda: Net(lambda s, x, _: s.a(x).tanh() @ s.a.weight, a=nn.Linear(6, 8)), (8, 6)),
    "used twice": (lambda: Net(lambda s, x, _: s.a(s.a(x).tanh()), a=nn.Linear(6, 6)), (6, 6)),
    "scaled": (lambda: Net(lambda s, x, _: s.a(x) * s.a.bias, a=nn.Linear(6, 2)), (2,)),
    "hook": (lambda: Net(lambda s, x, _: s.a(x), a=hooked()), (8, 6)),
    "a layer on some rows": (
        lambda: Net(lambda s, x, n: torch.cat([s.b(s.a(x[: sum(n[:2])])), s.b(x[sum(n[:2]) :])]), a=nn.Linear(6, 6),
                    b=nn.Linear(6, 2)), (6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_no_layer_covers_takes_a_pass_per_task_and_is_named(name):
    make, shape = UNCOVERED[name]
    torch.manual_seed(0)
    net, samples = make().double(), [2, 3, 4]
    x = torch.randn(9, 6, dtype=torch.float64)
    update, mine = grads(net, x, samples, detente.CAGrad(), source=detente.Disjoint(samples))
    assert update.stats["engine"] == "serial"
    assert update.stats["backwards"] == 3
    assert str(shape) in update.stats["why"] or f"({shape[0]},)" in update.stats["why"]
    assert_close(mine, grads(net, x, samples, detente.CAGrad(), engine="serial")[1], 1e-12)


@pytest.mark.parametrize("method", [lambda: detente.CAGrad(heads="weighted"), detente.IMTL, detente.DBMTL])
def test_heads_that_two_tasks_share_take_a_pass_per_task_where_the_losses_count_differently(method):
    samples = [2, 3]
    net, x = build("layers", samples)
    source = detente.Disjoint(samples)
    update, mine = grads(net, x, samples, method(), source=source, shared=net.trunk[0].parameters())
    assert update.stats["backwards"] == 2
    assert "not listed" in update.stats["why"]
    wanted = grads(net, x, samples, method(), shared=net.trunk[0].parameters(), engine="serial")[1]
    assert_close(mine, wanted, 1e-12)


def mixed(net: Any, x: Tensor, _: list[int]) -> Tensor:
    return net.b(nn.functional.batch_norm(net.a(x), None, None, training=True))


def tokens_first(net: Any, x: Tensor, _: list[int]) -> Tensor:
    return net.a(x.transpose(0, 1).contiguous()).square().transpose(0, 1)


BROKEN: dict[str, Callable[[], tuple[Net, Tensor]]] = {
    "samples are mixed": lambda: (Net(mixed, a=nn.Linear(6, 6), b=nn.Linear(6, 2)), torch.randn(9, 6)),
    "tokens come before samples": lambda: (Net(tokens_first, a=nn.Linear(6, 2)), torch.randn(9, 4, 6)),
}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", BROKEN)
def test_a_network_that_mixes_rows_is_an_error_before_anything_is_written(name, dtype):
    torch.manual_seed(0)
    net, x = BROKEN[name]()
    with pytest.raises(ValueError, match="have a part in another loss"):
        grads(net.to(dtype), x.to(dtype), [2, 3, 4], detente.CAGrad(), source=detente.Disjoint([2, 3, 4]))
    assert all(p.grad is None for p in net.parameters())


def overlapping(net: Net, x: Tensor) -> list[Tensor]:
    y = net.trunk(x)
    return [y[:3].square().mean(), y[2:].mean()]


def swapped(net: Net, x: Tensor) -> list[Tensor]:
    y = net.trunk(x)
    return [y[3:].square().mean(), y[:3].mean()]


@pytest.mark.parametrize("losses", [overlapping, swapped])
def test_losses_of_other_rows_are_an_error(losses):
    net, x = build("layers", [3, 3])
    with pytest.raises(ValueError, match=r"Disjoint\(\[3, 3\]\): rows that belong to loss"):
        detente.backward(losses(net, x), detente.CAGrad(), source=detente.Disjoint([3, 3]))
    assert all(p.grad is None for p in net.parameters())


def test_every_step_is_checked_for_debugging(monkeypatch):
    net, x = build("layers", [3, 3])
    source = detente.Disjoint([3, 3])
    y = net.trunk(x)
    detente.backward([y[:3].square().mean(), y[3:].mean()], detente.CAGrad(), source=source)
    monkeypatch.setenv("DETENTE_DEBUG", "1")
    with pytest.raises(ValueError, match="have a part in another loss"):
        detente.backward(overlapping(net, x), detente.CAGrad(), source=source)


def test_a_step_that_is_not_finite_is_as_ever_and_shows_nothing():
    samples = [3, 3]
    net, x = build("layers", samples)
    source = detente.Disjoint(samples)
    update, found = grads(net, x * float("inf"), samples, detente.CAGrad(), source=source, scale=2.0)
    assert all(bool(g.isnan().all()) for g in found)
    for passes in (2, 1):
        update, _ = grads(net, x, samples, detente.CAGrad(), source=source)
        assert update.stats["backwards"] == passes


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
def test_gradients_at_the_ends_of_float32_are_no_reason_for_an_error(size):
    samples = [2] * 40
    net, x = build("layers", samples, torch.float32)
    losses = [loss * size for loss in net.losses(x, samples)]
    update = detente.backward(losses, detente.CAGrad(), source=detente.Disjoint(samples), scale=2.0)
    assert update.stats["engine"] == "disjoint"


@pytest.mark.parametrize("samples", [64, [], [0, 2], [2.5, 1], ["2"], {"a": -1}, torch.ones(2)])
def test_rows_that_are_no_numbers_are_an_error(samples):
    with pytest.raises(ValueError, match="needs a whole number >= 1"):
        detente.Disjoint(samples)


def test_rows_from_numpy_are_numbers():
    assert detente.Disjoint(np.array([2, 3])).rows(["0", "1"]) == [2, 3]


@pytest.mark.parametrize(
    ("samples", "message"), [([3, 3, 3], "3 losses, and this step brings 2"), ({"0": 3}, r"no rows for .*'1'")]
)
def test_rows_of_other_losses_are_an_error(samples, message):
    net, x = build("layers", [3, 3])
    with pytest.raises(ValueError, match=message):
        grads(net, x, [3, 3], detente.CAGrad(), source=detente.Disjoint(samples))
    assert all(p.grad is None for p in net.parameters())


def test_an_engine_does_not_apply():
    net, x = build("layers", [3, 3])
    with pytest.raises(ValueError, match="leave `engine` out"):
        grads(net, x, [3, 3], detente.CAGrad(), source=detente.Disjoint([3, 3]), engine="batched")


def test_several_processes_are_refused(tmp_path):
    net, x = build("layers", [3, 3])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="for one process"):
            grads(net, x, [3, 3], detente.CAGrad(), source=detente.Disjoint([3, 3]), group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert all(p.grad is None for p in net.parameters())


def test_micro_batches_add_up_their_own_updates_alone():
    samples = [2, 3]
    net, x = build("layers", samples)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    options = {"source": detente.Disjoint(samples), "micro_batches": 2}
    with pytest.raises(ValueError, match="accumulate='direction'"):
        detente.step(lambda tasks=None: net.losses(x, samples), optimizer, detente.CAGrad(), **options)

    def closure(tasks: Any = None) -> dict[str, Tensor]:
        return dict(zip("ab", net.losses(x, samples), strict=True))

    update = detente.step(closure, optimizer, detente.CAGrad(), accumulate="direction", **options)
    assert update.stats["engine"] == "disjoint"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_are_the_gradients_of_the_losses_alone(data):
    samples = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    widths = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    tokens = data.draw(st.sampled_from([(), (1,), (3,)]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    net = Net(lambda s, x, _: s.trunk(x), trunk=mlp(*widths, bias=data.draw(st.booleans()))).double()
    x = torch.randn(sum(samples), *tokens, widths[0], dtype=torch.float64)
    rows = []
    for t in range(len(samples)):
        net.zero_grad()
        net.losses(x, samples)[t].backward()
        rows.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    J = torch.stack(rows)
    update, found = grads(net, x, samples, detente.PCGrad(), source=detente.Disjoint(samples))
    assert update.stats["engine"] == "disjoint"
    torch.testing.assert_close(update.gramian, J @ J.T, rtol=1e-10, atol=1e-10 * float(J.square().max()))
    weights = torch.stack(list(update.weights.values()))
    direction = torch.cat([g.flatten() for g in found])
    torch.testing.assert_close(direction, weights @ J, rtol=1e-10, atol=1e-10 * float(J.abs().max()))
