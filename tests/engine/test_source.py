"""Which gradients a step takes."""

from __future__ import annotations

import copy
import itertools
import weakref

import pytest
import torch

import detente
from detente.engine.source import Row, every_task, spread


def shares(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_every_task_is_a_row_of_its_own():
    assert every_task(3) == [Row((0,), (1.0,)), Row((1,), (1.0,)), Row((2,), (1.0,))]


@pytest.mark.parametrize(("n", "count"), [(1, 2), (3, 4), (4, 4), (9, 4), (1, 1)])
def test_a_sample_that_leaves_one_task_or_none_is_all_tasks(n, count):
    source = detente.Sampled(n)
    before = source.state_dict()["generator"]
    assert source.rows(torch.full((count,), 1 / count)) == every_task(count)
    assert torch.equal(source.state_dict()["generator"], before), "nothing had to be drawn"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_rows_are_the_sample_in_task_order_and_the_mean_of_the_rest(n):
    p = shares(0.1, 0.2, 0.3, 0.15, 0.25)
    source = detente.Sampled(n, seed=3)
    for _ in range(20):
        *members, rest = source.rows(p)
        drawn = [row.tasks[0] for row in members]
        assert drawn == sorted(drawn)
        assert all(row.tasks == (t,) and row.factors == (1.0,) for row, t in zip(members, drawn, strict=True))
        assert sorted([*drawn, *rest.tasks]) == list(range(5))
        total = sum(float(p[t]) for t in rest.tasks)
        assert rest.factors == pytest.approx([float(p[t]) / total for t in rest.tasks])
        assert sum(rest.factors) == pytest.approx(1)


def test_the_mean_gradient_stays_exact():
    """Rows combined by their shares are the mean, whatever was drawn."""
    g = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.full((6,), 1 / 6, dtype=torch.float64)
    for seed in range(10):
        rows = detente.Sampled(2, seed).rows(p)
        J = [sum(f * g[t] for t, f in zip(row.tasks, row.factors, strict=True)) for row in rows]
        mean = sum(p[list(row.tasks)].sum() * j for row, j in zip(rows, J, strict=True))
        torch.testing.assert_close(mean, g.mean(0), rtol=1e-12, atol=1e-14)


def test_every_subset_is_drawn_equally_often():
    source, p = detente.Sampled(2), torch.full((4,), 0.25)
    counts = dict.fromkeys(itertools.combinations(range(4), 2), 0)
    for _ in range(600):
        counts[tuple(row.tasks[0] for row in source.rows(p)[:-1])] += 1
    # 600 draws of 6 subsets: mean 100, standard deviation 9
    assert all(abs(count - 100) < 50 for count in counts.values())


def test_draws_follow_the_seed_and_the_state():
    p = torch.full((8,), 1 / 8)

    def draws(source: detente.Sampled, count: int = 6) -> list[list[Row]]:
        return [source.rows(p) for _ in range(count)]

    assert draws(detente.Sampled(3, seed=5)) == draws(detente.Sampled(3, seed=5))
    assert draws(detente.Sampled(3, seed=5)) != draws(detente.Sampled(3, seed=6))
    source, other = detente.Sampled(3, seed=5), detente.Sampled(3, seed=9)
    draws(source)
    saved = source.state_dict()
    wanted = draws(source)
    other.load_state_dict(saved)
    assert draws(other) == wanted
    source.load_state_dict(saved)
    assert draws(source) == wanted, "the saved state does not move on with the generator"


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    detente.Sampled(2).rows(torch.full((5,), 0.2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rest_without_any_preference_has_no_mean():
    sources = [detente.Sampled(1, seed) for seed in range(20)]
    first = next(s for s in sources if copy.deepcopy(s).rows(shares(0.4, 0.3, 0.3))[0].tasks == (0,))
    with pytest.raises(ValueError, match="positive preference"):
        first.rows(shares(1.0, 0.0, 0.0))


def test_spread_hands_the_rows_coefficient_to_its_tasks():
    rows = [Row((1,), (1.0,)), Row((0, 2), (0.25, 0.75))]
    assert spread(shares(3.0, 4.0), rows, 3).tolist() == [1.0, 3.0, 3.0]
    blocks = torch.stack([shares(3.0, 4.0), shares(0.0, 8.0)])
    assert spread(blocks, rows, 3).tolist() == [[1.0, 3.0, 3.0], [2.0, 0.0, 6.0]]


class Saved:
    """What a graph keeps for its backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("apart", [True, False])
def test_a_graph_that_shares_parameters_alone_is_freed_after_its_own_pass(apart):
    trunk, heads = torch.nn.Linear(3, 4), [torch.nn.Linear(4, 1) for _ in range(3)]
    alive: list[list[weakref.ref[Saved]]] = [[], [], []]
    seen: list[list[int]] = []

    def look(gradient: torch.Tensor) -> None:
        seen.append([sum(ref() is not None for ref in task) for task in alive])

    def forward(task: int) -> torch.Tensor:
        def pack(tensor: torch.Tensor) -> Saved:
            saved = Saved(tensor)
            alive[task].append(weakref.ref(saved))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            return trunk(torch.ones(2, 3)).tanh()

    features = [forward(t) for t in range(3)] if apart else [forward(0)] * 3
    losses = []
    for t, head in enumerate(heads):
        losses.append((head(features[t]) - t).square().mean())
        losses[-1].register_hook(look)
    del features
    detente.backward(losses, detente.CAGrad())
    assert len(seen) == 3
    if apart:
        assert [[count > 0 for count in counts] for counts in seen] == [
            [True, True, True], [False, True, True], [False, False, True]
        ]  # fmt: skip
    else:
        assert seen[2][0] == seen[0][0] > 0
    assert not any(ref() for task in alive for ref in task)
