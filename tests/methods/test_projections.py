"""PCGrad and wPCGrad against every result that a random order can give."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import detente
import matrices
from reference import directions, geometry, projections
from reference.agreement import EPS, assert_agrees, nearest

fast = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
MODES = ("sequence", "anchor", "sequence_original")


def terms(rows) -> float:
    return geometry.norms(rows).sum()


@pytest.mark.parametrize("T", [1, 2, 3, 4])
@pytest.mark.parametrize("name", matrices.SAMPLERS)
def test_pcgrad_is_one_of_all_orders(name, T):
    for seed in range(3):
        J = matrices.SAMPLERS[name](T, seed)
        results = projections.pcgrad_results(J.numpy())
        for method, factor in ((detente.PCGrad(seed=seed), 1), (detente.PCGrad(seed=seed, reduction="mean"), 1 / T)):
            for _ in range(3):
                d = detente.aggregate(J, method).numpy()
                assert_agrees(d, nearest(d, factor * results), terms=factor * terms(J.numpy()), T=T)


def independent_pairs(T: int, seed: int) -> torch.Tensor:
    """Tasks 2k and 2k+1 conflict with each other only, so that no order matters; row norms from 1e-8 to 1e8."""
    J = torch.zeros(T, 3 * T, dtype=torch.float64)
    for k in range(0, T, 2):
        pair = matrices.conflicting(min(2, T - k), seed + k)[:, :6]
        J[k : k + 2, 3 * k : 3 * k + pair.shape[1]] = pair[:, : 3 * T - 3 * k]
    return torch.logspace(-8, 8, T, dtype=torch.float64)[:, None] * J


@pytest.mark.parametrize("T", [2, 3, 10, 40])
def test_pcgrad_where_no_order_matters(T):
    J = independent_pairs(T, 1)
    d = projections.pcgrad(J.numpy(), [[j for j in range(T) if j != i] for i in range(T)])
    assert_agrees(detente.aggregate(J, detente.PCGrad()), d, terms=terms(J.numpy()), T=T)
    J = matrices.antiparallel(T)
    assert detente.aggregate(J, detente.PCGrad()).norm() <= 1e-12 * terms(J.numpy())  # all meet an opponent: d = 0


@pytest.mark.parametrize("T", [3, 10])
def test_pcgrad_orders_differ_between_tasks_and_steps(T):
    J = matrices.conflicting(T, 2)
    method = detente.PCGrad()
    found = {tuple(detente.aggregate(J, method).numpy().round(9)) for _ in range(200)}
    assert len(found) > 5
    if T == 3:  # 2 orders per task, 8 combinations; a single order for all tasks would give only 6
        distinct = {tuple(d.round(9)) for d in projections.pcgrad_results(J.numpy())}
        assert found == distinct


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("T", [1, 2, 3, 4])
@pytest.mark.parametrize("name", matrices.SAMPLERS)
def test_wpcgrad_is_one_of_all_orders(name, T, mode):
    for seed in range(3):
        J = matrices.SAMPLERS[name](T, seed)
        results = projections.wpcgrad_results(J.numpy(), mode)
        for reduction, factor in (("sum", 1), ("mean", 1 / T)):
            d = detente.aggregate(J, detente.WPCGrad(mode=mode, reduction=reduction, seed=seed)).numpy()
            assert_agrees(d, nearest(d, factor * results), terms=factor * terms(J.numpy()), T=T)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("T", [2, 3, 10, 40])
@pytest.mark.parametrize("name", matrices.SAMPLERS)
def test_wpcgrad_with_a_forced_order(name, T, mode):
    """Probabilities that fall by 1e7 per task leave one order possible, up to a chance of about T 1e-7."""
    order = np.random.default_rng(T).permutation(T).tolist()
    p = np.empty(T)
    p[order] = 10.0 ** (-7.0 * np.arange(T))
    J = matrices.SAMPLERS[name](T, 4)
    d = detente.aggregate(J, detente.WPCGrad(priority=(p / p.sum()).tolist(), mode=mode))
    assert_agrees(d, projections.wpcgrad(J.numpy(), order, mode), terms=terms(J.numpy()), T=T)


def test_wpcgrad_orders_follow_plackett_luce():
    J, p = matrices.conflicting(3, 1), np.array([0.6, 0.3, 0.1])
    method = detente.WPCGrad(priority=p.tolist(), seed=1)
    trials = 3000
    results = {order: projections.wpcgrad(J.numpy(), order) for order in projections.plackett_luce(p)}
    seen = Counter()
    for _ in range(trials):
        d = detente.aggregate(J, method).numpy()
        seen[min(results, key=lambda order: np.linalg.norm(results[order] - d))] += 1
    for order, chance in projections.plackett_luce(p).items():
        assert abs(seen[order] / trials - chance) <= 4.5 * np.sqrt(chance * (1 - chance) / trials)  # 4.5 sigma, seeded


def test_wpcgrad_expectation_for_two_tasks():
    J, p = matrices.conflicting(2, 3), np.array([0.8, 0.2])
    G = J @ J.T
    method = detente.WPCGrad(priority=p.tolist())
    trials = 2000
    mean = sum(method.weights(G) for _ in range(trials)).numpy() / trials
    m, squares = min(0.0, float(G[0, 1])), np.diag(G.numpy())
    assert m < 0
    sigma = np.sqrt(p * (1 - p) / trials) * -m / squares
    assert (np.abs(mean - (1 - p * m / squares)) <= 4.5 * sigma).all()


def test_wpcgrad_zero_probabilities_come_last_in_random_order():
    J = matrices.conflicting(3, 1)
    rows = J.numpy()
    method = detente.WPCGrad(priority=[0.0, 1.0, 0.0])
    found = {tuple(detente.aggregate(J, method).numpy().round(9)) for _ in range(50)}
    assert found == {tuple(projections.wpcgrad(rows, order).round(9)) for order in ((1, 0, 2), (1, 2, 0))}


@fast
@given(seeds, st.integers(1, 6))
def test_no_conflict_gives_the_plain_sum(seed, T):
    J = matrices.random(T, seed).abs()
    for method in (detente.PCGrad(), *(detente.WPCGrad(mode=mode) for mode in MODES)):
        d = detente.aggregate(J, method)
        assert_agrees(d, directions.gd(J.numpy()), terms=terms(J.numpy()), T=1)


@fast
@given(st.sampled_from(sorted(matrices.SAMPLERS)), st.integers(2, 6), seeds)
def test_coefficients_never_fall_below_one(name, T, seed):
    """Every correction adds a non-negative amount; so in PCGrad and wherever wPCGrad's references are raw gradients."""
    J = matrices.SAMPLERS[name](T, seed)
    others = [detente.WPCGrad(mode=mode) for mode in ("sequence_original", "anchor")]
    for method in (detente.PCGrad(seed=seed), *others):
        assert (method.weights(J @ J.T) >= 1 - 1e-12).all()


@fast
@given(seeds)
def test_two_tasks_end_without_conflict(seed):
    J = matrices.conflicting(2, seed)
    a = detente.PCGrad().weights(J @ J.T)
    g11, g12, g22 = float(J[0] @ J[0]), float(J[0] @ J[1]), float(J[1] @ J[1])
    m = min(g12, 0.0)
    assert a.numpy() == pytest.approx([1 - m / g11, 1 - m / g22], rel=1e-12)
    assert (J @ J.T @ a >= -64 * EPS * g11).all() if m < 0 else True


@pytest.mark.parametrize("T", [2, 3, 4])
def test_the_certain_task_is_never_changed(T):
    J = matrices.conflicting(T, 7)
    for i in range(T):
        p = [float(j == i) for j in range(T)]
        one = detente.aggregate(J, detente.WPCGrad(priority=p, mode="anchor")).numpy()
        expected = projections.wpcgrad(J.numpy(), [i], "anchor")
        assert_agrees(one, expected, terms=terms(J.numpy()), T=T)


def test_priority_from_losses():
    """Loss power as priority: after an epoch with a vanishing loss, the other task is kept whole."""
    J = matrices.conflicting(2, 1)
    method = detente.WPCGrad(priority=detente.LossPower(gamma=20.0))
    detente.aggregate(J, method, losses=[1.0, 1e-6])
    method.next_epoch()
    d = detente.aggregate(J, method, losses=[1.0, 1.0])
    assert_agrees(d, projections.wpcgrad(J.numpy(), [0, 1]), terms=terms(J.numpy()), T=2)
