"""GD, MGDA, EDM and CAGrad against the oracles, and what their papers promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import detente
import matrices
from reference import directions, geometry
from reference.agreement import EPS, assert_agrees, conditioning

fast = settings(max_examples=40, deadline=None, derandomize=True)
tasks = st.integers(2, 6)
seeds = st.integers(0, 10_000)
samplers = st.sampled_from(sorted(matrices.SAMPLERS))


EVERY = [(name, T, seed) for name, T in matrices.CASES for seed in range(6 if T <= 3 else 2)]


def sample(name: str, T: int, seed: int = 3):
    J = matrices.SAMPLERS[name](T, seed)
    return J, J.numpy()


@pytest.mark.parametrize(("name", "T"), matrices.CASES)
def test_gd(name, T):
    J, rows = sample(name, T)
    w = np.linspace(0.5, 2, T)
    for weights in (None, w):
        method = detente.GD(weights=weights)
        expected = directions.gd(rows, weights)
        assert_agrees(detente.aggregate(J, method), expected, terms=np.abs(rows).sum(), T=1)
        mean = detente.aggregate(J, detente.GD(weights=weights, reduction="mean"))
        assert_agrees(mean, expected / T, terms=np.abs(rows).sum() / T, T=1)


@pytest.mark.parametrize(("name", "T", "seed"), EVERY)
def test_mgda(name, T, seed):
    J, rows = sample(name, T, seed)
    w, d = geometry.min_norm(rows)
    assert_agrees(detente.aggregate(J, detente.MGDA()), d, terms=w @ geometry.norms(rows), T=T)


@pytest.mark.parametrize(("name", "T", "seed"), EVERY)
def test_edm(name, T, seed):
    J, rows = sample(name, T, seed)
    beta, d = directions.edm(rows)
    actual = detente.aggregate(J, detente.EDM()).numpy()
    terms = beta @ geometry.norms(rows)
    low, high = directions.edm_lengths(rows)
    if high / low > 1 + 1e-5:
        # affinely dependent unit gradients: the direction is determined, the length only within [low, high]
        ratio = np.linalg.norm(actual) / max(np.linalg.norm(d), 1e-300)
        assert np.linalg.norm(d) == 0 or low * (1 - 1e-6) <= ratio * terms <= high * (1 + 1e-6)
        d = d * ratio
    assert_agrees(actual, d, terms=terms, T=T)


@pytest.mark.parametrize("c", [0.0, 0.2, 0.9, 3.0])
@pytest.mark.parametrize(("name", "T"), matrices.CASES)
def test_cagrad(name, T, c):
    for seed in range(6 if T <= 3 else 1):
        check_cagrad(name, T, seed, c)


def check_cagrad(name, T, seed, c):
    J, rows = sample(name, T, seed)
    d = directions.cagrad(rows, c)
    assert_agrees(detente.aggregate(J, detente.CAGrad(c=c)), d, terms=(1 + c) * geometry.norms(rows).mean(), T=T)


@pytest.mark.parametrize("c", [0.3, 0.9, 2.0])
@pytest.mark.parametrize(("T", "P"), [(3, 1), (3, 2), (4, 2), (4, 3), (5, 2), (5, 3)])
def test_exactly_dependent_gradients(T, P, c):
    """Fewer parameters than tasks: the dual cone may be a line, a half-line or a point, and supports are not unique."""
    for seed in range(60):
        J = matrices.integers(T, P, seed)
        rows = J.numpy()
        w, d = geometry.min_norm(rows)
        assert_agrees(detente.aggregate(J, detente.MGDA()), d, terms=w @ geometry.norms(rows), T=T)
        expected = directions.cagrad(rows, c)
        terms = (1 + c) * geometry.norms(rows).mean()
        assert_agrees(detente.aggregate(J, detente.CAGrad(c=c)), expected, terms=terms, T=T)


KNOWN = {  # found by searching small whole numbers; each has its own way of being degenerate
    "cone is a point, boundary optimum": [[-3, -3, 2], [-1, 1, -1], [0, 3, 3], [3, -1, 1]],
    "opposite pair off the optimum": [[2, 2], [-2, 1], [-2, -2]],
    "opposite pair on the optimum": [[1, 1], [0, -2], [3, 0], [-3, -3]],
    "dependent triple": [[1, -1], [-2, 1], [-3, 3], [-3, 3]],
    "negative rounding under a root": [[-1, 0, 2], [-2, -1, -1], [3, 1, -1], [2, 0, -3]],
    "cone is a half-line": [[-3, -1], [3, 1], [-3, 0], [-1, 2], [2, 1]],
}


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 2.0])
@pytest.mark.parametrize("case", KNOWN)
def test_cagrad_known_degenerate_cases(case, c):
    J = torch.tensor(KNOWN[case], dtype=torch.float64)
    expected = directions.cagrad(J.numpy(), c)
    terms = (1 + c) * geometry.norms(J.numpy()).mean()
    a = detente.CAGrad(c=c).weights(J @ J.T)
    assert_agrees(J.T @ a, expected, terms=terms, T=len(J))
    # coefficients that only cancel each other would destroy the update of float32 gradients
    assert float(a.abs().max()) <= 1e3


def test_mgda_beside_an_opposite_pair():
    """0 = (1/4) g_1 + (3/4) g_3, whatever g_2 is."""
    J = torch.tensor([[3.0, -3.0], [0.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    for method in (detente.MGDA(), detente.EDM()):
        assert_agrees(detente.aggregate(J, method), [0.0, 0.0], terms=2.2, T=3)


def test_mgda_of_two_tasks_far_apart():
    """The long row's weight is 5e-17; taken as 1 - x it would be lost, and half of the update with it."""
    J = torch.tensor([[1e-8, 0.0], [-1e8, 1e8]], dtype=torch.float64)
    assert_agrees(detente.aggregate(J, detente.MGDA()), [5e-9, 5e-9], terms=1.5e-8, T=2)


@pytest.mark.parametrize("rescale", [1, 2])
@pytest.mark.parametrize("T", [2, 3, 10])
def test_cagrad_rescale_and_preference(rescale, T):
    J, rows = sample("conflicting", T)
    p = np.arange(1.0, T + 1) / np.arange(1.0, T + 1).sum()
    d = directions.cagrad(rows, 0.4, rescale, p)
    actual = detente.aggregate(J, detente.CAGrad(c=0.4, rescale=rescale, preference=p.tolist()))
    assert_agrees(actual, d, terms=geometry.norms(rows).max(), T=T)


def gap(rows, coefficients, p, c):
    """Primal-dual gap of CAGrad from J and the method's coefficients, in units of the terms of F(w).

    w = (a - p) / sum(a - p). The products g_i . d are formed from float64 coefficients, so each carries
    eps n_i sum_j |a_j| n_j whatever the solver does; that floor is taken off.
    """
    rows, a = rows.astype(np.longdouble), coefficients.astype(np.longdouble)
    step = a - p
    w = np.clip(step, 0, None) / np.clip(step, 0, None).sum()
    assert step.min() >= -8 * float(EPS) * np.abs(a).max()
    g0, g_w, d = rows.T @ p, rows.T @ w, rows.T @ a
    size, n = np.sqrt((g0 * g0).sum()), np.sqrt((rows * rows).sum(1))
    length = np.sqrt((g_w * g_w).sum())
    dual = (g_w * g0).sum() + c * size * length
    # a too long d would also raise the level, so the ball is checked with it
    assert np.sqrt(((d - g0) ** 2).sum()) <= c * size * (1 + 1e-9)
    floor = 8 * EPS * n * (np.abs(a) * n).sum()
    return float((dual - rows @ d - floor).max() / (size * (w * n).sum()))


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("T", [2, 3, 10, 40, 100, 200])
def test_cagrad_primal_dual_gap(T, c):
    for seed, spread in ((0, 0.0), (1, 3.0), (2, 3.0)):
        for sampler in (matrices.random, matrices.conflicting):
            exponents = spread * (2 * torch.rand(T, 1, generator=matrices.generator(seed), dtype=torch.float64) - 1)
            J = 10**exponents * sampler(T, seed)  # row norms from 1e-3 to 1e3
            a = detente.CAGrad(c=c).weights(J @ J.T).numpy()
            assert gap(J.numpy(), a, np.full(T, 1 / T), c) <= 1e-9


@pytest.mark.parametrize("zero_rows", ["drop", "keep"])
@pytest.mark.parametrize("T", [2, 3, 10])
@pytest.mark.parametrize("c", [0.2, 0.5, 0.9])
def test_cagrad_moves_beside_a_zero_gradient(zero_rows, T, c):
    for name in ("random", "conflicting", "duplicated", "row_scaled"):
        J = matrices.SAMPLERS[name](T, 1).clone()
        J[T - 1 if name != "row_scaled" else 0] = 0
        d = detente.aggregate(J, detente.CAGrad(c=c, zero_rows=zero_rows))
        # in both modes ||g0|| is at least the mean over all T rows
        assert d.norm() >= (1 - c) * J.mean(0).norm() * (1 - 1e-9)
        rows = J.numpy() if zero_rows == "keep" else J.numpy()[geometry.norms(J.numpy()) > 0]
        reference = directions.cagrad(rows, c)
        assert_agrees(d, reference, terms=(1 + c) * geometry.norms(rows).mean(), T=T)


@pytest.mark.parametrize("method", [detente.MGDA, detente.EDM, detente.CAGrad])
@pytest.mark.parametrize("small", [1e-4, 1e-8, 1e-12, 1e-100])
def test_no_row_scale_freezes_the_update(method, small):
    J = matrices.conflicting(3, 5).clone()
    J[1] *= small
    d = detente.aggregate(J, method())
    assert d.norm() > 0
    if method is detente.CAGrad:
        assert d.norm() >= 0.5 * J.mean(0).norm() * (1 - 1e-9)
    else:
        assert bool(((J @ d) / J.norm(dim=1) / d.norm() >= -1e-8).all())


def test_cagrad_where_tasks_are_mutually_stationary():
    """g_1 = -g_2, g_3 orthogonal to both: g_w = 0; the nearest maximiser is the projection of g0 on the dual cone."""
    J = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 2.0, 0]], dtype=torch.float64)
    for scale in (1e-6, 1.0, 1e6):
        d = detente.aggregate(J * scale, detente.CAGrad(c=0.5))
        assert_agrees(d / scale, directions.cagrad(J.numpy(), 0.5), terms=4 / 3, T=3)
    two = torch.tensor([[3.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert_agrees(detente.aggregate(two, detente.CAGrad(c=0.4)), [0.6, 0.0], terms=2, T=2)
    opposed = torch.tensor([[3.0, 1.0], [-3.0, -1.0]], dtype=torch.float64)
    assert detente.aggregate(opposed, detente.CAGrad(c=0.4)).norm() <= conditioning(0, 3.2, 2)


@fast
@given(samplers, tasks, seeds)
def test_mgda_invariants(name, T, seed):
    J, rows = sample(name, T, seed)
    a = detente.MGDA().weights(J @ J.T)
    d = (J.T @ a).numpy()
    n = geometry.norms(rows)
    noise = 32 * T * EPS * n * (a.numpy() @ n)
    assert a.min() >= 0
    assert abs(float(a.sum()) - 1) <= 1e-12
    assert np.linalg.norm(d) <= n.min() * (1 + 1e-9) + conditioning(n.min(), a.numpy() @ n, T)
    assert (rows @ d >= d @ d * (1 - 1e-8) - noise).all()  # KKT: every task at least ||d||^2
    held = a.numpy() > 0
    assert (np.abs(rows[held] @ d - d @ d) <= 1e-8 * d @ d + noise[held]).all()


@fast
@given(samplers, tasks, seeds)
def test_edm_invariants(name, T, seed):
    J, rows = sample(name, T, seed)
    beta = detente.EDM().weights(J @ J.T).numpy()
    d, n = rows.T @ beta, geometry.norms(rows)
    assert beta.min() >= 0
    assert abs(beta.sum() - 1) <= 1e-12
    along = rows @ d / n
    noise = 32 * T * EPS * (beta @ n)
    held = beta > 0
    # equal angles to the held tasks, no larger angle to the others
    assert along.min() >= along[held].max() - 1e-8 * abs(along[held].max()) - noise
    assert along.min() >= -noise
    assert n.min() * (1 - 1e-12) <= beta @ n * (1 + 1e-12)
    s = 10 ** np.linspace(-3, 3, T)
    turned = detente.aggregate(J * torch.from_numpy(s)[:, None], detente.EDM()).numpy()
    if np.linalg.norm(d) > 1e-6 * (beta @ n):  # direction is unchanged by rescaling single gradients
        assert turned @ d / np.linalg.norm(d) / np.linalg.norm(turned) >= 1 - 1e-8


@fast
@given(st.sampled_from(["random", "conflicting", "parallel", "row_scaled"]), seeds)
def test_edm_of_two_tasks_is_the_bisector(name, seed):
    J, rows = sample(name, 2, seed)
    (n1, n2), (g1, g2) = geometry.norms(rows), rows
    bisector = (n2 * g1 + n1 * g2) / (n1 + n2)
    assert_agrees(detente.aggregate(J, detente.EDM()), bisector, terms=2 * n1 * n2 / (n1 + n2), T=2)


@fast
@given(samplers, tasks, seeds, st.sampled_from([0.1, 0.4, 0.9]))
def test_cagrad_invariants(name, T, seed, c):
    J, rows = sample(name, T, seed)
    a = detente.CAGrad(c=c).weights(J @ J.T).numpy()
    d, g0, n = rows.T @ a, rows.mean(0), geometry.norms(rows)
    size = np.linalg.norm(g0)
    noise = conditioning(size, (1 + c) * n.mean(), T)
    assert (a >= 1 / T - 1e-12).all()
    assert np.linalg.norm(d - g0) <= c * size * (1 + 1e-9) + noise
    assert (1 - c) * size * (1 - 1e-9) - noise <= np.linalg.norm(d) <= (1 + c) * size * (1 + 1e-9) + noise
    assert d @ g0 >= (1 - c) * size**2 * (1 - 1e-9) - noise * size
    floor = 32 * T * EPS * n * (a @ n)
    # never worse for the worst-off task than the mean gradient
    assert (rows @ d + floor).min() >= (rows @ g0 - floor).min()


@fast
@given(st.sampled_from(["random", "conflicting"]), tasks, seeds)
def test_cagrad_limits(name, T, seed):
    J, rows = sample(name, T, seed)
    assert_agrees(detente.aggregate(J, detente.CAGrad(c=0.0)), rows.mean(0), terms=geometry.norms(rows).mean(), T=T)
    far, near = detente.aggregate(J, detente.CAGrad(c=1e6)).numpy(), geometry.min_norm(rows)[1]
    assert far @ near / np.linalg.norm(far) / np.linalg.norm(near) >= 1 - 1e-6  # direction tends to MGDA's like 1/c
    equal = J / J.norm(dim=1, keepdim=True)
    if T == 2:
        assert_agrees(detente.aggregate(equal, detente.CAGrad(c=0.3)), 1.3 * equal.mean(0).numpy(), terms=1.3, T=2)


@fast
@given(st.sampled_from(["random", "conflicting", "row_scaled", "low_rank"]), st.integers(2, 5), seeds)
def test_repeating_every_task_changes_nothing(name, T, seed):
    """The hull and the mean are those of the distinct tasks."""
    J, rows = sample(name, T, seed)
    for method, terms in (
        (detente.MGDA(), geometry.min_norm(rows)[0] @ geometry.norms(rows)),
        (detente.CAGrad(c=0.5), 1.5 * geometry.norms(rows).mean()),
    ):
        once = detente.aggregate(J, method)
        assert_agrees(detente.aggregate(torch.cat([J, J]), method), once, terms=terms, T=2 * T)
