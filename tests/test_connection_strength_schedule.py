"""Connection strength as a schedule: phase 1 step by step, the mixed draw, and the pairs of layers and norms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import detente
from detente.methods.connection_strength import find_pairs
from detente.nn import active_task, convert_task_norm
from reference import connection

TASKS = ("seg", "depth")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.trunk = convert_task_norm(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), TASKS)
            self.heads = nn.ModuleDict({t: nn.Linear(4, 1) for t in TASKS})
            self.x, self.y = torch.randn(6, 2, 5, 5), torch.randn(2, 6, 1)
        self.asked: list[tuple[str, ...] | None] = []

    def closure(self, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        self.asked.append(tasks)
        losses = {}
        for t in tasks or TASKS:
            with active_task(t):
                out = self.heads[t](self.trunk(self.x).mean((2, 3)))
            losses[t] = (out - self.y[TASKS.index(t)]).square().mean()
        return losses

    def learn(self, seed: int = 1) -> Net:
        """Norms that differ between the tasks, so that the channels have owners."""
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for t in TASKS:
                self.trunk[1][t].weight.copy_(torch.rand(4, generator=g) + 0.2)
                self.trunk[1][t].running_var.copy_(torch.rand(4, generator=g) + 0.5)
        return self


def copied(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    assert changed(first.state_dict(), second.state_dict()) == set()  # the same operations: bit for bit


# ---- phase 1 ---------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_phase_one_is_one_plain_step_per_task(kind):
    net, twin = Net(), Net()
    method = detente.ConnectionStrength(net.trunk, phase=1)
    one, two = OPTIMIZERS[kind](net.parameters()), OPTIMIZERS[kind](twin.parameters())
    for _ in range(3):
        update = detente.step(net.closure, one, method)
        for task in TASKS:
            two.zero_grad()
            twin.closure((task,))[task].backward()
            two.step()
        assert_equal(net, twin)
    assert net.asked == [("seg",), ("depth",)] * 3
    assert {t: float(w) for t, w in update.weights.items()} == {"seg": 1, "depth": 1}
    assert update.gramian is None
    assert update.stats == {"backwards": 2, "sequential": True}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_phase_one_leaves_the_other_tasks_head_and_norm_alone(kind):
    """Momentum and weight decay included: between two calls of the closure one task alone has moved."""
    net = Net()
    optimizer = OPTIMIZERS[kind](net.parameters())
    method = detente.ConnectionStrength(net.trunk, phase=1)
    detente.step(net.closure, optimizer, method)  # momentum and moments are there now
    states = []

    def closure(tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        states.append(copied(net))
        return net.closure(tasks)

    detente.step(closure, optimizer, method)
    states.append(copied(net))
    for task, before, after in zip(TASKS, states[:-1], states[1:], strict=True):
        other = TASKS[1 - TASKS.index(task)]
        moved = changed(before, after)
        assert {"trunk.0.weight", f"heads.{task}.weight", f"trunk.1.task_{task}.weight"} <= moved
        assert not {name for name in moved if f"heads.{other}" in name or f"task_{other}" in name}


def test_phase_one_goes_through_the_tasks_in_the_order_of_the_norms():
    net = Net()
    net.trunk = convert_task_norm(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), ("depth", "seg"))
    detente.step(net.closure, torch.optim.SGD(net.parameters(), lr=0.1), detente.ConnectionStrength(net.trunk, phase=1))
    assert net.asked == [("depth",), ("seg",)]


def test_phase_one_learns():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    method = detente.ConnectionStrength(net.trunk, phase=1)
    start = {t: float(v.detach()) for t, v in net.closure().items()}
    for _ in range(150):
        detente.step(net.closure, optimizer, method)
    end = {t: float(v.detach()) for t, v in net.closure().items()}
    assert all(end[t] < 0.7 * start[t] for t in TASKS), (start, end)


# ---- phase 2 ---------------------------------------------------------------------------------------------------


def test_phase_two_is_one_step_of_backward():
    net, twin = Net().learn(), Net().learn()
    one, two = (torch.optim.SGD(n.parameters(), lr=0.1) for n in (net, twin))
    for _ in range(3):
        update = detente.step(net.closure, one, detente.ConnectionStrength(net.trunk, phase=2))
        two.zero_grad()
        detente.backward(twin.closure(), detente.ConnectionStrength(twin.trunk, phase=2))
        two.step()
        assert_equal(net, twin)
    assert net.asked == [None] * 3
    assert update.stats["phase"] == 2
    assert "sequential" not in update.stats


def test_phase_two_keeps_what_only_one_task_reaches():
    net = Net().learn()
    losses = net.closure()
    wanted = {}
    for t in TASKS:
        own = [*net.heads[t].parameters(), *net.trunk[1][t].parameters()]
        wanted[t] = (own, torch.autograd.grad(losses[t], own, retain_graph=True))
    bias = sum(torch.autograd.grad(losses[t], net.trunk[0].bias, retain_graph=True)[0] for t in TASKS)
    detente.backward(losses, detente.ConnectionStrength(net.trunk, phase=2))
    for own, gradients in wanted.values():
        # two paths of float32 sums
        torch.testing.assert_close([p.grad for p in own], list(gradients), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(net.trunk[0].bias.grad, bias, rtol=1e-5, atol=1e-6)  # no channels: the plain sum


# ---- the mixed schedule ----------------------------------------------------------------------------------------


def phases(method: detente.ConnectionStrength, epochs: int, batches: int = 3) -> list[list[int]]:
    """1 or 2 for every batch of every epoch."""
    result = []
    for _ in range(epochs):
        result.append([1 if method.sequential() else 2 for _ in range(batches)])
        method.next_epoch()
    return result


def mixed(**options: object) -> detente.ConnectionStrength:
    return detente.ConnectionStrength(Net().trunk, **options)


def test_an_epoch_is_of_one_phase_and_a_batch_draws_for_itself():
    drawn = phases(mixed(epochs=20), 20)
    assert all(len(set(epoch)) == 1 for epoch in drawn)
    assert {1, 2} <= {epoch[0] for epoch in drawn}
    drawn = phases(mixed(epochs=20, draw="batch"), 20, batches=40)
    assert set(drawn[0]) == {1}, "epoch 0 is always phase 1"
    assert all(len(set(epoch)) == 2 for epoch in drawn[5:15])


@pytest.mark.parametrize("draw", ["epoch", "batch"])
def test_the_share_of_phase_one_falls_linearly(draw):
    epochs, seeds = 5, 300
    runs = [phases(mixed(epochs=epochs, draw=draw, seed=s), epochs, batches=1) for s in range(seeds)]
    for e in range(epochs):
        share = sum(run[e][0] == 1 for run in runs) / seeds
        # standard deviation at most 0.5 / sqrt(300) = 0.029
        assert abs(share - (1 - e / epochs)) < 0.12, (e, share)


def test_after_the_last_epoch_all_is_phase_two():
    method = mixed(epochs=3, draw="batch")
    phases(method, 3)
    assert phases(method, 4) == [[2] * 3] * 4


def test_fixed_phases_draw_nothing():
    for phase in (1, 2):
        method = mixed(phase=phase)
        before = method.generator.get_state().clone()
        assert phases(method, 3) == [[phase] * 3] * 3
        assert torch.equal(method.generator.get_state(), before)
        assert method.requires_step == (phase == 1)
    assert mixed(epochs=3).requires_step


@pytest.mark.parametrize("draw", ["epoch", "batch"])
def test_draws_follow_the_seed_and_leave_the_global_generator_alone(draw):
    before = torch.get_rng_state()
    runs = [phases(mixed(epochs=30, draw=draw, seed=s), 30) for s in (4, 4, 5)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), before)
    method = mixed(epochs=30, draw=draw, seed=4)
    state = torch.get_rng_state()
    assert phases(method, 30) == runs[0]
    assert torch.equal(torch.get_rng_state(), state)
    method.reset()
    assert phases(method, 30) == runs[0]


@pytest.mark.parametrize("draw", ["epoch", "batch"])
def test_a_saved_schedule_resumes_in_the_middle_of_an_epoch(draw):
    method = mixed(epochs=30, draw=draw, seed=2)
    phases(method, 11)
    here = method.sequential()  # the epoch's draw has been made
    saved = copy.deepcopy(method.state_dict())
    wanted = phases(method, 19)
    fresh = mixed(epochs=30, draw=draw, seed=77)
    fresh.load_state_dict(saved)
    assert phases(fresh, 19) == wanted
    if draw == "epoch":
        assert wanted[0] == [1 if here else 2] * 3


@pytest.mark.parametrize("options", [{"epochs": 5}, {"phase": 1}])
def test_backward_alone_cannot_run_the_schedule(options):
    net = Net()
    before = copied(net)
    method = detente.ConnectionStrength(net.trunk, **options)
    losses = net.closure()
    with pytest.raises(RuntimeError, match=r"connection_strength.*detente\.step.*phase=2"):
        detente.backward(losses, method)
    assert all(p.grad is None for p in net.parameters())
    assert changed(before, net.state_dict()) <= {n for n in before if "running" in n or "num_b" in n}


def test_training_with_the_mixed_schedule_runs_both_phases():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    method = detente.ConnectionStrength(net.trunk, epochs=8, seed=3)
    seen = []
    for _ in range(8):
        for _ in range(4):
            seen.append(bool(detente.step(net.closure, optimizer, method).stats.get("sequential")))
        method.next_epoch()
    assert seen[:4] == [True] * 4
    assert set(seen) == {True, False}


# ---- pairs of layers and norms ---------------------------------------------------------------------------------


def pairs(model: nn.Module) -> list[tuple[str, str]]:
    return [(pair.name, pair.form) for pair in find_pairs(convert_task_norm(model, TASKS))]


@pytest.mark.parametrize(
    ("layer", "norm"),
    [
        (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)),
        (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        (nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)),
        (nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)),
        (nn.ConvTranspose1d(3, 6, 3), nn.BatchNorm1d(6)),
        (nn.Linear(3, 6), nn.BatchNorm1d(6)),
        (nn.Linear(3, 6), nn.LayerNorm(6)),
        (nn.Linear(3, 6), nn.RMSNorm(6)),
    ],
    ids=lambda m: f"{type(m).__name__}{getattr(m, 'groups', '')}",
)
def test_a_layer_and_the_norm_behind_it(layer, norm):
    form = "batch" if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) else "post"
    assert pairs(nn.Sequential(layer, norm, nn.ReLU())) == [("0 with 1", form)]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3)),
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.BatchNorm1d(54)),
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6)),
        nn.Sequential(nn.Linear(3, 6), nn.LayerNorm((2, 6))),
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()),
    ],
    ids=["norm first", "no statistics", "other width", "group norm", "two dimensions", "no norm"],
)
def test_what_cannot_be_paired_is_not(model):
    assert pairs(model) == []


def test_norms_in_a_residual_network():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.relu = nn.ReLU()
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.down = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Block(), nn.Linear(4, 2))
    assert pairs(model) == [
        ("0 with 1", "batch"),
        ("2.conv1 with 2.bn1", "batch"),
        ("2.conv2 with 2.bn2", "batch"),
        ("2.down.0 with 2.down.1", "batch"),
    ]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_pre_norm_transformer_block(norm):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.qkv, self.proj = norm(8), nn.Linear(8, 24), nn.Linear(8, 8)
            self.norm2, self.up, self.down = norm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    model = nn.Sequential(nn.Linear(5, 8), Block(), Block())
    wanted = [(f"{b}.{layer} with {b}.{n}", "pre") for b in "12" for layer, n in (("qkv", "norm1"), ("up", "norm2"))]
    assert pairs(model) == wanted


def test_norms_behind_linear_layers():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down, self.norm = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8), nn.LayerNorm(8)

    assert pairs(Block()) == [("down with norm", "post")]
    # in one Sequential the neighbour in front wins over the layer behind
    stack = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    assert pairs(stack) == [("0 with 1", "post"), ("2 with 3", "post")]


def test_norms_around_attention_are_not_paired_with_layers_they_do_not_touch():
    """Registered next to each other is not connected: in torch's own layer norm1 stands behind the attention."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2)
            self.norm2, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    # norm1 feeds the projections inside the attention, never its output projection
    assert ("attention.out_proj with norm1", "pre") not in pairs(Block())
    for first in (False, True):
        layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=first)
        assert ("linear2 with norm1", "post") not in pairs(layer)


def test_pairs_by_name_and_by_module():
    model = convert_task_norm(
        nn.ModuleDict(
            {
                "norms": nn.ModuleList([nn.BatchNorm2d(4), nn.LayerNorm(6), nn.LayerNorm(5)]),
                "conv": nn.Conv2d(2, 4, 3),
                "out": nn.Linear(5, 6),
            }
        ),
        TASKS,
    )
    method = detente.ConnectionStrength(
        model, phase=2, pairs=[("conv", "norms.0"), (model["out"], model["norms"][1]), ("out", model["norms"][2])]
    )
    assert [(p.name, p.form) for p in method.pairs] == [
        ("conv with norms.0", "batch"),
        ("out with norms.1", "post"),
        ("out with norms.2", "pre"),
    ]
    assert method.pairs[0].layer is model["conv"]
    assert "conv with norms.0" in repr(method)


def strengths_by_hand(rows: list, norm: nn.Module) -> Tensor:
    variance = norm.running_var.double().numpy() if hasattr(norm, "running_var") else None
    return torch.from_numpy(connection.strength(rows, norm.weight.detach().double().numpy(), variance, norm.eps))


@pytest.mark.parametrize(
    ("layer", "norm", "rows"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), connection.conv_rows),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), lambda W: connection.transposed_rows(W, 2)),
        (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), connection.transposed_rows),
        (nn.Linear(3, 6), nn.BatchNorm1d(6), connection.conv_rows),
        (nn.Linear(3, 6), nn.LayerNorm(6), connection.conv_rows),
        (nn.Linear(6, 3), nn.RMSNorm(6, eps=1e-5), connection.columns),
    ],
    ids=["grouped", "grouped transposed", "transposed", "linear", "post", "pre"],
)
def test_strengths_and_owners_of_every_kind_of_layer(layer, norm, rows):
    model = convert_task_norm(nn.ModuleDict({"layer": layer, "norm": norm}), TASKS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in TASKS:
            for value in (model["norm"][t].weight, getattr(model["norm"][t], "running_var", None)):
                if value is not None:
                    value.copy_(torch.rand(6, generator=generator) + 0.2)
    method = detente.ConnectionStrength(model, phase=2, pairs=[("layer", "norm")])
    (pair,) = method.pairs
    W = layer.weight.detach().double().numpy()
    wanted = [strengths_by_hand(rows(W), model["norm"][t]) for t in TASKS]
    # float64 sums of float32 weights in another order
    torch.testing.assert_close(pair.strengths(TASKS), torch.stack(wanted), rtol=1e-10, atol=1e-14)
    assert method.owners(pair).tolist() == connection.owners([w.numpy() for w in wanted])
