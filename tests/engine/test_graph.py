"""Which parameters the tasks share, read off the autograd graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import detente
from detente.engine.graph import reach


def leaf(value: float = 1.0, name: str = "") -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


def ids(tensors) -> set[int]:
    return {id(t) for t in tensors}


def test_trunk_and_heads():
    trunk, one, two = leaf(), leaf(), leaf()
    h = trunk.sin()
    found = reach([h * one, h * two])
    assert ids(found.shared) == ids([trunk])
    assert found.tasks == [(0, 1)]
    assert [ids(own) for own in found.own] == [ids([one]), ids([two])]


def test_tasks_of_a_parameter_that_some_tasks_share():
    low, mid, heads = leaf(), leaf(), [leaf() for _ in range(4)]
    a = low.sin()
    b = a * mid
    found = reach([a * heads[0], b * heads[1], b * heads[2], heads[3] * 2])
    assert dict(zip(map(id, found.shared), found.tasks, strict=True)) == {id(low): (0, 1, 2), id(mid): (1, 2)}
    assert [ids(own) for own in found.own] == [ids([h]) for h in heads]


def test_a_parameter_is_listed_once_however_many_paths_lead_to_it():
    p, q = leaf(), leaf()
    a = p.sin() * p + p.exp() * q
    found = reach([a + p, a * a])
    assert [id(t) for t in found.shared].count(id(p)) == 1
    assert len(found.shared) == 2


def test_frozen_parameters_constants_and_the_unused_do_not_appear():
    p, frozen, unused = leaf(), leaf().requires_grad_(False), leaf()
    found = reach([p * frozen, p * 3.0])
    assert ids(found.shared) == ids([p])
    assert found.own == [[], []]
    assert id(unused) not in ids(found.shared)


def test_detached_features_are_not_shared():
    trunk, one, two = leaf(), leaf(), leaf()
    h = trunk.sin()
    found = reach([h * one, h.detach() * two])
    assert found.shared == []
    assert [ids(own) for own in found.own] == [ids([trunk, one]), ids([two])]


def test_a_parameter_that_is_itself_a_loss():
    p, q = leaf(), leaf()
    found = reach([p, p * q, q])
    assert dict(zip(map(id, found.shared), found.tasks, strict=True)) == {id(p): (0, 1), id(q): (1, 2)}
    alone = reach([p, q])
    assert alone.shared == []
    assert [ids(own) for own in alone.own] == [ids([p]), ids([q])]


def test_a_loss_inside_another_loss():
    p, q = leaf(), leaf()
    part = p * 2
    for losses, tasks in (([part, part * q], (0, 1)), ([part * q, part], (0, 1))):
        found = reach(losses)
        assert ids(found.shared) == ids([p])
        assert found.tasks == [tasks]


def test_one_loss_twice_shares_everything():
    p, q = leaf(), leaf()
    loss = p * q
    found = reach([loss, loss])
    assert ids(found.shared) == ids([p, q])
    assert found.tasks == [(0, 1), (0, 1)]
    assert found.own == [[], []]


def test_one_loss_shares_nothing_unless_told():
    p, q = leaf(), leaf()
    assert reach([p * q]).shared == []
    assert ids(reach([p * q]).own[0]) == ids([p, q])
    found = reach([p * q], shared=[p])
    assert (ids(found.shared), found.tasks, ids(found.own[0])) == (ids([p]), [(0,)], ids([q]))


def test_listed_parameters_replace_what_the_graph_says():
    p, q, r, out_of_reach = leaf(), leaf(), leaf(), leaf()
    found = reach([p * q, p * r], shared=iter([q, out_of_reach, q]))
    assert ids(found.shared) == ids([q])
    assert found.tasks == [(0,)]
    assert [ids(own) for own in found.own] == [ids([p]), ids([p, r])]
    assert reach([p * q, p * r], shared=[]).shared == []


def test_forwards_that_share_parameters_only():
    net, x = nn.Linear(3, 1), torch.randn(2, 3)
    found = reach([net(x).sum(), net(x + 1).sum()])
    assert ids(found.shared) == ids(net.parameters())


def test_order_is_stable():
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))

    def order() -> list[int]:
        h = net(torch.ones(2, 3))
        return [id(p) for p in reach([h.sum(), h.square().sum()]).shared]

    assert order() == order()
    assert sorted(order()) == sorted(id(p) for p in net.parameters())


def test_a_deep_graph_needs_no_recursion_and_a_wide_one_no_second_walk():
    p = leaf()
    h: Tensor = p
    for _ in range(20_000):
        h = h + 1
    found = reach([h, h * 2])
    assert ids(found.shared) == ids([p])
    h = p
    for _ in range(60):  # 2^60 paths
        h = h + h
    assert ids(reach([h, -h]).shared) == ids([p])


def test_many_tasks():
    trunk, heads = leaf(), [leaf() for _ in range(100)]
    found = reach([trunk * h for h in heads])
    assert found.tasks == [tuple(range(100))]
    assert [ids(own) for own in found.own] == [ids([h]) for h in heads]


@pytest.mark.parametrize("wrong", [torch.ones(2), torch.ones(2, requires_grad=True) * 2, "trunk.weight", None])
def test_what_is_not_a_leaf_that_requires_grad_is_refused(wrong):
    p = leaf()
    with pytest.raises(ValueError, match=r"shared\[1\] must be a parameter.*trunk\.parameters"):
        reach([p * 2, p * 3], shared=[p, wrong])


def test_a_model_that_was_compiled_as_a_whole_needs_its_shared_parameters_named():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = torch.nn.Linear(3, 4, dtype=torch.float64)
            self.heads = torch.nn.ModuleList(torch.nn.Linear(4, 1, dtype=torch.float64) for _ in range(2))

        def forward(self, x):
            h = self.trunk(x).tanh()
            return [head(h) for head in self.heads]

    def losses(model, x):
        first, second = model(x)
        return {"a": first.square().mean(), "b": (3 - second).square().mean()}

    torch.manual_seed(0)
    net, twin, x = Model(), Model(), torch.randn(5, 3, dtype=torch.float64)
    twin.load_state_dict(net.state_dict())
    compiled = torch.compile(net, backend="aot_eager")  # as other backends up to the code that they generate
    with pytest.raises(ValueError, match=r"compiled as a whole.*shared=model\.trunk\.parameters\(\)"):
        detente.backward(losses(compiled, x), detente.CAGrad())
    assert all(p.grad is None for p in net.parameters())
    detente.backward(losses(compiled, x), detente.CAGrad(), shared=net.trunk.parameters())
    detente.backward(losses(twin, x), detente.CAGrad())
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)

    net.zero_grad()
    trunk = torch.compile(net.trunk, backend="aot_eager")
    h = trunk(x).tanh()
    detente.backward(
        {"a": net.heads[0](h).square().mean(), "b": (3 - net.heads[1](h)).square().mean()}, detente.CAGrad()
    )
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
