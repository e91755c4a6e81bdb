"""The baselines' oracles against a second route each: closed forms, literal definitions, limits, other oracles."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import mpmath
import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

import matrices
from reference import bargaining, baselines, directions, geometry, projections, stateful, weighting

CONDITION = 1e-10  # float64 rounding times the worst condition number of the matrices used here (about 1e5)
GENERIC = [
    matrices.SAMPLERS[name](T, seed).numpy() for name in ("random", "conflicting") for T in (2, 3, 5) for seed in (1, 2)
]
PAIRS = [matrices.SAMPLERS[name](2, seed).numpy() for name in ("random", "conflicting") for seed in range(4)]
ONE, OTHER = matrices.normal(2, 9, 4).numpy()


def scaled(*scales: float) -> np.ndarray:
    return matrices.conflicting(3, 5).numpy() * np.array(scales)[:, None]


HARD = {
    "tiny": scaled(1e-8, 1e-8, 1e-8),
    "huge": scaled(1e8, 1e8, 1e8),
    "from 1e-8 to 1e8": scaled(1e-8, 1, 1e8),
    "one short": scaled(1e-3, 1, 1),
    "from 1e-2 to 1e2": scaled(1e-2, 1, 1e2),
    "duplicates": matrices.random(3, 7).numpy()[[0, 0, 1, 2]],
    "a zero row": scaled(1, 0, 2),
    "one task": ONE[None],
    "opposite": np.array([ONE, -ONE]),
    "opposite, unequal": np.array([3 * ONE, -ONE]),
    "nearly opposite": np.array([ONE, -ONE + 1e-5 * OTHER]),
    "dependent": matrices.integers(4, 2, 3).numpy(),
    "100 tasks": matrices.normal(100, 1000, 1).numpy(),
    "100 tasks, rank 20": matrices.normal(100, 20, 1).numpy(),
}
ORACLES = {
    "mgda": lambda J: baselines.mgda(J)[1],
    "mgda l2": lambda J: baselines.mgda(J, "l2")[1],
    "sdmgrad": lambda J: baselines.sdmgrad(J, 0.3)[1],
    "imtl_g": lambda J: baselines.imtl_g(J)[1],
    "config": baselines.config,
    "nash": lambda J: bargaining.nash(J).d,
    "fairgrad": lambda J: bargaining.fairgrad(J, 2.0).d,
    "aligned_mtl": lambda J: baselines.aligned_mtl(J)[1],
    "upgrad": baselines.upgrad,
    "dualproj": baselines.dualproj,
    "gradops": baselines.gradops,
    "gdod": baselines.gdod,
    "conicgrad": lambda J: baselines.conicgrad(J, 0.5)[0],
}
DEGREE = {"nash": 0.0, "fairgrad": -1 / 3}  # of homogeneity; 1 for all others


def off(a, b, scale: float | None = None) -> float:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) if scale is None else scale))


def unit(d: np.ndarray) -> np.ndarray:
    return d / np.linalg.norm(d)


# All of them


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("case", HARD)
def test_hard_inputs_pass_the_self_checks(case, name):
    d = ORACLES[name](HARD[case])
    assert d.shape == HARD[case].shape[1:]
    assert np.isfinite(d).all()


@pytest.mark.parametrize("name", ORACLES)
def test_zero_gradients_are_absent_tasks(name):
    J = matrices.conflicting(3, 2).numpy()
    with_zero = np.array([J[0], np.zeros_like(J[0]), J[1], J[2]])
    assert (ORACLES[name](with_zero) == ORACLES[name](J)).all()
    assert (ORACLES[name](np.zeros((3, 5))) == 0).all()


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("s", [1e-8, 1e8])
def test_homogeneity(name, s):
    J = matrices.conflicting(4, 3).numpy()
    # rounding of s g_i is all that differs
    assert off(ORACLES[name](s * J), s ** DEGREE.get(name, 1.0) * ORACLES[name](J)) < CONDITION


@pytest.mark.parametrize("name", ORACLES)
def test_rotation_and_permutation(name):
    J = matrices.conflicting(4, 3).numpy()
    Q = np.linalg.qr(matrices.normal(J.shape[1], J.shape[1], 9).numpy())[0]
    d, order = ORACLES[name](J), [2, 0, 3, 1]
    assert off(ORACLES[name](J @ Q), d @ Q) < CONDITION
    assert off(ORACLES[name](J[order]), d) < CONDITION


@pytest.mark.parametrize("J", PAIRS)
def test_two_tasks_share_the_bisector(J):
    n1, n2 = geometry.norms(J)
    bisector = unit(n2 * J[0] + n1 * J[1])
    for name in ("imtl_g", "config", "nash"):
        assert off(unit(ORACLES[name](J)), bisector) < CONDITION
    assert off(unit(bargaining.fairgrad(J, 1.0).d), bisector) < CONDITION
    assert off(unit(directions.edm(J)[1]), bisector) < CONDITION


@pytest.mark.parametrize("s", [1e-8, 1e-3, 1e8])
def test_one_row_scaled_leaves_directions_alone(s):
    J = matrices.conflicting(3, 4).numpy()
    moved = J * np.array([1.0, s, 1.0])[:, None]
    for name in ("imtl_g", "config", "nash"):
        assert off(unit(ORACLES[name](moved)), unit(ORACLES[name](J))) < CONDITION
    assert off(ORACLES["nash"](moved), ORACLES["nash"](J)) < CONDITION


# Linear algebra


@pytest.mark.parametrize("J", GENERIC)
def test_svd_equals_lapack(J):
    Q, s = baselines.svd(J)
    assert off(s, np.linalg.svd(J, compute_uv=False)) < 1e-13  # LAPACK's error is a few eps of the largest
    W = Q.T @ J
    assert np.abs(W @ W.T - np.diag(s**2)).max() < 1e-13 * s[0] ** 2


def test_svd_keeps_small_singular_values():
    """Against 60 digits: row scales of 1e-6 to 1e6 leave LAPACK 4 digits of the smallest, the oracle all 15."""
    J = matrices.random(5, 1).numpy() * np.logspace(-6, 6, 5)[:, None]
    with mpmath.workdps(60):
        M = mpmath.matrix(J.tolist())
        lam = sorted((float(mpmath.sqrt(x)) for x in mpmath.eigsy(M * M.T, eigvals_only=True)), reverse=True)
    assert np.abs(baselines.svd(J)[1].astype(float) / lam - 1).max() < 1e-14


@pytest.mark.parametrize("scales", [(1, 1, 1, 1), (1e-8, 1, 1e4, 1e8)])
def test_reduced_keeps_every_product(scales):
    J = matrices.random(4, 2).numpy() * np.array(scales, dtype=float)[:, None]
    R, n = baselines.reduced(J), geometry.norms(J)
    assert R.shape == (4, 4)
    assert np.abs((R @ R.T - J @ J.T) / np.outer(n, n)).max() < 1e-14  # J @ J.T rounds at eps n_i n_j


# Hull


@pytest.mark.parametrize("normalise", ["none", "l2", "loss", "loss+"])
@pytest.mark.parametrize("J", PAIRS)
def test_mgda_of_two_tasks(J, normalise):
    losses = [0.3, 1.7]
    n = geometry.norms(J)
    divisor = {"none": [1, 1], "l2": n, "loss": losses, "loss+": n * losses}[normalise]
    a, b = J[0] / divisor[0], J[1] / divisor[1]
    x = min(max((b @ b - a @ b) / (a @ a + b @ b - 2 * a @ b), 0), 1)
    w, d = baselines.mgda(J, normalise, losses)
    assert off(w, [x, 1 - x]) < CONDITION
    assert off(d, x * J[0] + (1 - x) * J[1]) < CONDITION


def test_mgda_normalised_equals_edm():
    """Same weights on unit gradients; EDM then restores a length."""
    J = matrices.random(5, 3).numpy()
    w = baselines.mgda(J, "l2")[0]
    beta = directions.edm(J)[0]
    n = geometry.norms(J)
    assert off(beta, w / n / (w / n).sum()) < CONDITION
    doubled = baselines.mgda(np.array([J[0], 5 * J[0], J[1]]), "l2")[0]
    assert doubled[0] == pytest.approx(doubled[1], rel=1e-12)  # equal normalised gradients share


@pytest.mark.parametrize("J", GENERIC)
def test_sdmgrad_limits_and_optimality(J):
    n = geometry.norms(J)
    assert off(baselines.sdmgrad(J, 0.0)[1], geometry.min_norm(J)[1], n.max()) < CONDITION
    assert off(baselines.sdmgrad(J, 1e8)[1], J.mean(0), n.max()) < 1e-7  # the hull's share of d is 1 / (1 + lam)
    w, d = baselines.sdmgrad(J, 0.6)
    g_w = w @ J
    assert off(d, (g_w + 0.6 * J.mean(0)) / 1.6, n.max()) < CONDITION
    along = J @ d  # no vertex of the simplex lies lower than w
    assert along.min() >= g_w @ d - CONDITION * n.max() ** 2


# Equal projections


@pytest.mark.parametrize("J", GENERIC)
def test_imtl_g_equals_the_papers_form(J):
    """(a_2 ... a_T) = g_1 U^T (D U^T)^-1 with rows g_1 - g_i of D and u_1 - u_i of U."""
    u = np.array([unit(g) for g in J])
    D = np.array([J[0] - g for g in J[1:]])
    U = np.array([u[0] - v for v in u[1:]])
    rest = np.linalg.solve((D @ U.T).T, U @ J[0])
    expected = np.append(1 - rest.sum(), rest)
    a, d, margin = baselines.imtl_g(J)
    allowed = CONDITION / margin  # a is v / sum v
    assert off(a, expected) < allowed
    assert off(d, expected @ J) < allowed
    assert np.ptp(u @ d) < allowed * np.linalg.norm(d)
    assert a.sum() == pytest.approx(1, abs=1e-12 / margin)


@pytest.mark.parametrize(("T", "P"), [(4, 2), (6, 3), (10, 4), (3, 8)])
def test_equal_projections_by_pseudo_inverse(T, P):
    J = matrices.normal(T, P, 2).numpy()
    n = geometry.norms(J)
    U = J / n[:, None]
    x = np.linalg.pinv(U) @ np.ones(T)
    direction = unit(x)
    assert off(baselines.config(J), (J @ direction).sum() * direction) < CONDITION
    v = np.linalg.pinv(U @ U.T) @ np.ones(T) / n
    assert off(baselines.imtl_g(J)[0], v / v.sum()) < CONDITION * np.abs(v).sum() / abs(v.sum())


@pytest.mark.parametrize("J", GENERIC)
def test_config_direction_is_imtl_g_up_to_sign(J):
    a, b = unit(baselines.config(J)), unit(baselines.imtl_g(J)[1])
    assert min(off(a, b), off(a, -b)) < CONDITION
    assert (J @ a).min() > 0
    if (np.linalg.solve(J @ J.T, geometry.norms(J)) > 0).all():  # EDM holds every task
        assert off(unit(directions.edm(J)[1]), a) < CONDITION


def test_equal_projections_of_opposites_and_duplicates():
    for J in (np.array([ONE, -ONE]), np.array([ONE, -2 * ONE])):
        assert (baselines.config(J) == 0).all()
        assert (baselines.imtl_g(J)[1] == 0).all()
    J = matrices.random(3, 7).numpy()
    repeated = J[[0, 0, 1, 2]]
    assert off(unit(baselines.config(repeated)), unit(baselines.config(J))) < CONDITION


# Bargaining


@pytest.mark.parametrize("scales", [(1, 1), (1e-8, 1e8)])
@pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-5, 1e-7])
def test_nash_of_two_tasks(noise, scales):
    """a_i = 1 / (n_i sqrt(1 + cos)), with 1 + cos = ||u_1 + u_2||^2 / 2 so that near opposites keep their digits."""
    J = np.array([ONE, -ONE + noise * OTHER]) * np.array(scales)[:, None]
    U, n = baselines.unit_rows(J)
    both = U[0] + U[1]
    root = np.sqrt(np.dot(both, both) / 2)
    a = np.asarray(1 / (n * root), dtype=float)
    for result in (bargaining.nash(J), bargaining.fairgrad(J, 1.0)):
        assert not result.stationary
        # the rounding of U itself, LONG_EPS, against the length of u_1 + u_2
        allowed = 1e-13 + 10 * baselines.LONG_EPS / float(root)
        assert np.abs(result.a / a - 1).max() < allowed
        assert off(result.d, np.asarray(both / root, dtype=float)) < allowed


@pytest.mark.parametrize("case", HARD)
def test_fairgrad_of_alpha_one_is_nash(case):
    """Two different Newton methods, one over d and one over the coefficients."""
    a, b = bargaining.nash(HARD[case]), bargaining.fairgrad(HARD[case], 1.0)
    assert a.stationary == b.stationary
    if a.stationary:
        assert case in ("opposite", "opposite, unequal", "dependent", "100 tasks, rank 20")
        return
    T = np.count_nonzero(geometry.norms(HARD[case]))
    assert off(a.d, b.d) < 1e-12
    live = a.a > 0
    assert np.abs(a.a[live] / b.a[live] - 1).max() < 1e-11
    assert np.linalg.norm(a.d) == pytest.approx(math.sqrt(T), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_bargains_by_root_finding(seed, alpha):
    """G w = w^(-1/alpha) in 40 digits on the Gramian, from a start 1e-4 off (much further, and G w < 0)."""
    J = matrices.conflicting(3, seed).numpy() * np.array([0.3, 1.0, 5.0])[:, None]
    found = bargaining.fairgrad(J, alpha)
    with mpmath.workdps(40):
        M = mpmath.matrix(J.tolist())
        G = M * M.T

        def residual(*x):
            w = [mpmath.exp(v) for v in x]
            return [mpmath.log(sum(G[i, j] * w[j] for j in range(3))) + x[i] / mpmath.mpf(alpha) for i in range(3)]

        start = [mpmath.log(v) for v in found.a * np.array([1 + 1e-4, 1 - 1e-4, 1 + 2e-4])]
        w = [float(mpmath.exp(v)) for v in mpmath.findroot(residual, start)]
    assert np.abs(found.a / w - 1).max() < 1e-13
    assert found.a @ J @ J.T @ found.a == pytest.approx((found.a ** (1 - 1 / alpha)).sum(), rel=1e-12)
    if alpha == 1.0:
        assert np.abs(bargaining.nash(J).a / w - 1).max() < 1e-13


def test_fairgrad_limits():
    """w = (G w)^(-alpha) tends to  w >= 1, G w >= 0, complementary: the sum projected on the dual cone (alpha to 0).

    Of w^(-1/alpha) nothing but w > 0 is left at the other end: 0.5 ||g_w||^2 - sum w, a multiple of the min-norm point.
    """
    for seed in (1, 2, 3):
        J = matrices.random(4, seed).numpy() / 4
        assert off(bargaining.fairgrad(J, 1e-4).d, 4 * baselines.dualproj(J)) < 1e-2  # O(alpha log 1 / alpha)
        v = geometry.min_norm(J)[1]
        assert off(bargaining.fairgrad(J, 1e4).d, v / (v @ v)) < 1e-2  # O(1 / alpha)
    J = np.abs(J)
    assert off(bargaining.fairgrad(J, 1e-4).d, J.sum(0)) < 1e-3  # the plain sum only where it helps every task


def test_nearer_than_the_gramian_sees():
    for noise, stationary in ((1e-6, False), (1e-8, False), (1e-12, True), (0.0, True)):
        result = bargaining.nash(np.array([ONE, -ONE + noise * OTHER]))
        assert result.stationary == stationary
        assert result.distance <= noise + 1e-15
    third = np.array([ONE, -ONE, OTHER])  # an opposite pair is enough, whatever the others do
    assert bargaining.fairgrad(third, 2.0).stationary


# Spectral


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@pytest.mark.parametrize("T", [2, 3, 5])
def test_aligned_equals_the_orthogonal_polar_factor(T, scale):
    """B J / sqrt(sg) is the nearest orthogonal matrix, found here by Newton's iteration without any spectrum."""
    J = matrices.normal(T, T, 6).numpy()
    X = J.copy()
    for _ in range(60):
        X = (X + np.linalg.inv(X).T) / 2
    lam = np.sort(np.linalg.svd(J, compute_uv=False) ** 2)
    sg = {"min": lam[0], "median": lam[(T - 1) // 2], "rmse": lam.mean()}[scale]
    p = np.linspace(0.5, 2.0, T)
    for preference, w in ((None, np.ones(T)), (p, p)):
        a, d = baselines.aligned_mtl(J, scale, preference)
        assert off(d, math.sqrt(sg) * w @ X) < CONDITION
        assert off(a @ J, d) < CONDITION


def test_aligned_special_cases():
    orthogonal = 3 * np.linalg.qr(matrices.normal(6, 6, 1).numpy())[0][:4]
    assert off(baselines.aligned_mtl(orthogonal)[1], orthogonal.sum(0)) < 1e-14
    assert off(baselines.aligned_mtl(ONE[None])[1], ONE) < 1e-14
    # one direction: (g, g) has lam = 2 ||g||^2, and both rows become sqrt(lam) v / sqrt(2)
    assert off(baselines.aligned_mtl(np.array([ONE, ONE]))[1], 2 * ONE) < 1e-14
    J = np.diag([1.0, 1e-3, 1e-9])  # the last eigenvalue is 1e-18 of the first
    assert off(baselines.aligned_mtl(J)[1], 1e-3 * np.array([1.0, 1.0, 0.0])) < 1e-14
    assert off(baselines.aligned_mtl(J, cutoff=1e-20)[1], np.full(3, 1e-9)) < 1e-14
    assert off(baselines.aligned_mtl(J, cutoff=1e-4)[1], np.array([1.0, 0, 0])) < 1e-14


def test_gdod_special_cases():
    assert off(baselines.gdod(ONE[None]), ONE) < 1e-14
    orthogonal = np.diag([3.0, 2.0, 1.0]) @ np.linalg.qr(matrices.normal(5, 5, 1).numpy())[0][:3]
    assert off(baselines.gdod(orthogonal), orthogonal.sum(0)) < 1e-13
    for seed in range(6):  # equal norms: the directions are the sum, shared, and the difference, conflicting
        J = np.array([unit(g) for g in matrices.random(2, seed).numpy()])
        assert off(baselines.gdod(J), J.sum(0)) < CONDITION
    assert (baselines.gdod(np.array([ONE, -3 * ONE])) == 0).all()


@pytest.mark.parametrize("J", GENERIC)
def test_gdod_by_lapack(J):
    gap, zero, rest = baselines.gdod_margins(J)
    assert gap > 1e-3  # well separated, so that both routes see the same directions
    assert zero == 0
    assert rest > 1e-3
    V = np.linalg.svd(J, full_matrices=False)[2]
    c = J @ V.T
    shared = (c >= 0).all(0) | (c <= 0).all(0)
    expected = c[:, shared].sum(0) @ V[shared]
    assert off(baselines.gdod(J), expected, np.linalg.norm(J)) < CONDITION
    assert (J @ baselines.gdod(J)).min() >= -CONDITION * np.linalg.norm(J) ** 2


# Dual cone


def project_by_faces(J, g):
    """The dual cone's face on which the projection lies: the nearest feasible g minus its part in span{g_i, i in S}."""
    best = None
    for size in range(len(J) + 1):
        for S in combinations(range(len(J)), size):
            A = J[list(S)]
            d = g - A.T @ np.linalg.lstsq(A.T, g, rcond=1e-12)[0] if S else g
            feasible = (J @ d >= -1e-11 * geometry.norms(J) * np.linalg.norm(g)).all()
            if feasible and (best is None or np.linalg.norm(d - g) < np.linalg.norm(best - g)):
                best = d
    return best


@pytest.mark.parametrize("J", [*GENERIC, *(matrices.integers(4, P, s).numpy() for P in (2, 3) for s in range(4))])
def test_upgrad_and_dualproj_by_faces(J):
    scale = geometry.norms(J).max()
    p = np.arange(1.0, len(J) + 1) / np.arange(1.0, len(J) + 1).sum()
    for preference, w in ((None, np.full(len(J), 1 / len(J))), (p, p)):
        each = sum(x * project_by_faces(J, g) for x, g in zip(w, J, strict=True))
        assert off(baselines.upgrad(J, preference), each, scale) < CONDITION
        assert off(baselines.dualproj(J, preference), project_by_faces(J, w @ J), scale) < CONDITION


def test_dual_cone_anchors():
    assert off(baselines.upgrad(ONE[None]), ONE) < 1e-15
    assert off(baselines.dualproj(ONE[None]), ONE) < 1e-15
    J = np.abs(matrices.random(4, 1).numpy())  # no conflict
    assert off(baselines.upgrad(J), J.mean(0)) < 1e-14
    assert off(baselines.dualproj(J), J.mean(0)) < 1e-14
    assert np.linalg.norm(baselines.upgrad(np.array([ONE, -ONE]))) < 1e-14 * np.linalg.norm(ONE)
    J = matrices.conflicting(3, 2).numpy()
    weighted = baselines.upgrad(J * np.array([1.0, 3.0, 0.5])[:, None])
    # scaling g_i only scales its own projection
    assert off(weighted * 3, 4.5 * baselines.upgrad(J, np.array([1.0, 3.0, 0.5]) / 4.5)) < CONDITION


# GradOPS


def orthogonalised(g, others):
    """Modified Gram-Schmidt, twice."""
    basis = []
    for v in others:
        for _ in range(2):
            for e in basis:
                v = v - (v @ e) * e
        basis.append(unit(v))
    for _ in range(2):
        for e in basis:
            g = g - (g @ e) * e
    return g


@pytest.mark.parametrize("J", GENERIC)
def test_gradops_by_gram_schmidt(J):
    expected = 0
    for i, g in enumerate(J):
        conflict = any(g @ other < 0 for other in J)
        expected = expected + (orthogonalised(g, [v for j, v in enumerate(J) if j != i]) if conflict else g)
    d = baselines.gradops(J)
    assert baselines.least_cosine(J) > 1e-6
    assert off(d, expected, np.linalg.norm(J)) < CONDITION
    assert (J @ d / geometry.norms(J)).min() >= -CONDITION * np.linalg.norm(J)
    if len(J) == 2:
        assert off(d, projections.pcgrad(J, [[1], [0]])) < CONDITION


def test_gradops_special_cases():
    J = np.abs(matrices.random(3, 1).numpy())
    assert off(baselines.gradops(J), J.sum(0)) < 1e-15
    assert (baselines.gradops(np.array([ONE, -2 * ONE])) == 0).all()
    assert (baselines.gradops(np.array([ONE, -1e8 * ONE])) == 0).all()
    dependent = np.array([[1.0, 0, 0], [-1, 1, 0], [0, -1, 0], [0, 0, 5.0]])  # only the last conflicts with nobody
    assert np.abs(baselines.gradops(dependent) - [0, 0, 5.0]).max() < 1e-14


# ConicGrad


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("J", PAIRS)
def test_conicgrad_by_scalar_minimisation(J, c):
    """T = 2: strong duality, the level is the minimum of the support function over the segment of weights."""
    g0 = J.mean(0)
    d, level = baselines.conicgrad(J, c)
    h = unit(g0)
    bound = minimize_scalar(
        lambda x: baselines.conic_support(x * J[0] + (1 - x) * J[1], h, c), bounds=(0, 1), options={"xatol": 1e-10}
    ).fun
    n = geometry.norms(J).max()
    assert level == pytest.approx(min(bound, *(baselines.conic_support(g, h, c) for g in J)), abs=1e-7 * n)
    assert np.linalg.norm(d) == pytest.approx(np.linalg.norm(g0), rel=1e-12)
    assert h @ unit(d) >= c - 1e-10
    if level > 0:
        assert (J @ unit(d)).min() == pytest.approx(level, abs=1e-9 * n)


@pytest.mark.parametrize("c", [0.25, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("T", [2, 3, 4])
def test_conicgrad_in_the_plane(T, c):
    """P = 2: every unit vector of the cone is an angle, and the optimum lies between two grid points."""
    angles = np.linspace(-math.acos(c), math.acos(c), 20001)
    for seed in range(8):
        J = matrices.integers(T, 2, seed).numpy()
        g0 = J.mean(0)
        d, level = baselines.conicgrad(J, c)
        if np.linalg.norm(g0) == 0:
            assert (d == 0).all()
            continue
        h = unit(g0)
        scan = np.cos(angles)[:, None] * h + np.sin(angles)[:, None] * np.array([-h[1], h[0]])
        best = (scan @ J.T).min(1).max()
        step = (angles[1] - angles[0]) * geometry.norms(J).max()
        if best > step:
            assert level == pytest.approx(best, abs=step)
            assert (J @ unit(d)).min() >= best - 1e-9
        else:  # the convex hull of the arc may do better than the arc where the optimum is not positive
            assert level >= best - 1e-9
        if np.linalg.norm(d):
            assert h @ unit(d) >= c - 1e-9


@pytest.mark.parametrize("J", GENERIC)
def test_conicgrad_limits(J):
    g0 = J.mean(0)
    assert off(baselines.conicgrad(J, 1.0)[0], g0) < 1e-14
    v = geometry.min_norm(J)[1]
    wide = baselines.conicgrad(J, 0.0)
    assert off(unit(wide[0]), unit(v)) < 1e-12  # g0 . v >= ||v||^2, so the half space never binds
    assert wide[1] == pytest.approx(np.linalg.norm(v), rel=1e-12)
    levels = [baselines.conicgrad(J, c)[1] for c in (0.0, 0.3, 0.6, 0.9, 0.99)]
    assert all(a >= b - 1e-12 for a, b in pairwise(levels))  # a narrower cone offers less


# Per coordinate


def test_graddrop():
    J = matrices.random(3, 1).numpy()
    P = J.shape[1]
    U = np.random.default_rng(0).uniform(size=P)
    assert off(baselines.graddrop(J, U, leak=1.0), J.sum(0)) < 1e-15
    assert off(baselines.graddrop(np.abs(J), U), np.abs(J).sum(0)) < 1e-15  # purity 1 lets everything pass
    assert off(baselines.graddrop(-np.abs(J), U), -np.abs(J).sum(0)) < 1e-15
    kept = baselines.graddrop(J, U)
    positive, negative = np.clip(J, 0, None).sum(0), np.clip(J, None, 0).sum(0)
    assert all(d in (pytest.approx(a), pytest.approx(b)) for d, a, b in zip(kept, positive, negative, strict=True))
    # averaged over U the positive part comes with f and the negative one with 1 - f; the grid has 1000 cells
    grid = [baselines.graddrop(J, np.full(P, (k + 0.5) / 1000), 0.3, 1.7) for k in range(1000)]
    f = np.clip(1.7 * (0.5 * (1 + J.sum(0) / np.abs(J).sum(0)) - 0.5) + 0.5, 0, 1)
    expected = 0.3 * J.sum(0) + 0.7 * (f * positive + (1 - f) * negative)
    assert np.abs(np.mean(grid, axis=0) - expected).max() < 1e-3 * np.abs(J).sum(0).max()
    J[:, 2] = 0
    assert baselines.graddrop(J, U)[2] == 0
    assert off(baselines.graddrop(J, U, [1.0, 0.0, 0.0]), J[0] + baselines.graddrop(J, U) - first_kept(J, U)) < 1e-14


def first_kept(J, U):
    """What GradDrop keeps of the first task."""
    f = np.where(np.abs(J).sum(0) > 0, 0.5 * (1 + J.sum(0) / np.maximum(np.abs(J).sum(0), 1e-300)), 0.5)
    return np.where((f > U) == (J[0] > 0), J[0], 0.0)


# Loss weightings


def test_stch_and_si():
    losses, nadir = [0.4, 1.3, 2.2], [1.0, 0.7, 3.0]
    for mu in (0.3, 1.0, 4.0):
        numeric = [
            baselines.slope_of(lambda x, mu=mu: baselines.stch_objective(x, nadir, mu), losses, i) for i in range(3)
        ]
        assert baselines.stch(losses, nadir, mu) == pytest.approx(numeric, rel=1e-8)  # fourth-order difference quotient
    worst = baselines.stch(losses, nadir, 1e-3)
    assert worst == pytest.approx([0, 3 / 1.3, 0], abs=1e-12)
    assert baselines.stch([2.0, 2.0], [1.0, 1.0]) == pytest.approx([0.5, 0.5])
    ratio = np.array(weighting.gls(losses)) / baselines.si(losses)
    assert ratio == pytest.approx([ratio[0]] * 3)  # SI and GLS share their direction


def test_adam_equals_torch():
    rng = np.random.default_rng(1)
    x = [0.3, -0.2, 1.0]
    parameter = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    ours, theirs = stateful.Adam(3, 0.025, decay=0.01), torch.optim.Adam([parameter], lr=0.025, weight_decay=0.01)
    for _ in range(30):
        slopes = rng.normal(size=3).tolist()
        ours(x, slopes)
        parameter.grad = torch.tensor(slopes, dtype=torch.float64)
        theirs.step()
    assert x == pytest.approx(parameter.tolist(), rel=1e-13)


def test_imtl_l_tends_to_the_inverse_loss():
    history = stateful.imtl_l([[4.0, 0.25, 1.0]] * 2000, 0.01)
    assert history[0] == [1.0, 1.0, 1.0]
    assert history[1] == pytest.approx([math.exp(-0.01), math.exp(0.01), 1.0], rel=1e-6)  # Adam's first step is lr
    assert history[-1] == pytest.approx([0.25, 4.0, 1.0], rel=1e-3)


def test_famo():
    # large losses, else Adam would amplify what the 1e-8 in D leaves of equal ratios
    history = stateful.famo([([1e6, 4e6], [0.5e6, 2e6])] * 5, gamma=0.0)
    for w in history:  # equal ratios leave z alone
        assert w == pytest.approx([0.8, 0.2], rel=1e-7)
        assert sum(w) == pytest.approx(1, rel=1e-15)
    steps = [([1.0, 2.0, 3.0], [0.9, 1.0, 2.9]), ([0.9, 1.0, 2.9], [0.5, 0.9, 2.8]), ([0.5, 0.9, 2.8], [0.4, 0.9, 2.7])]
    w = stateful.famo(steps, gamma=0.01)
    # the same run by autograd and torch's optimizer
    xi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([xi], lr=0.025, weight_decay=0.01)
    for (before, after), found in zip(steps, w, strict=True):
        D, new = torch.tensor(before).double() + 1e-8, torch.tensor(after).double() + 1e-8
        z = xi.softmax(0)
        expected = (z / D / (z / D).sum()).tolist()
        assert found == pytest.approx(expected, rel=1e-6)  # torch.tensor of a list rounds to float32
        delta = D.log() - new.log()
        xi.grad = torch.autograd.grad((z * delta).sum(), xi)[0]
        adam.step()
    moved = stateful.famo([([2.0, 3.0], [1.5, 2.0])], least=[1.0, 1.0])[0]
    assert moved == pytest.approx([2 / 3, 1 / 3], rel=1e-7)


def test_gradnorm():
    even = stateful.gradnorm([([2.0, 2.0], [1.0, 3.0])] * 4)
    assert even == [[1.0, 1.0]] * 4
    steps = [([1.0, 3.0, 0.5], [1.0, 2.0, 3.0]), ([1.2, 2.0, 0.7], [0.9, 1.0, 2.9]), ([1.2, 2.0, 0.7], [0.8, 0.5, 2.5])]
    history = stateful.gradnorm(steps, alpha=1.5, lr=0.05)
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([z], lr=0.05)
    for (n, losses), w in zip(steps, history, strict=True):
        assert sum(w) == pytest.approx(3, rel=1e-14)
        weights = 3 * z.softmax(0)
        assert w == pytest.approx(weights.tolist(), rel=1e-12)
        N = weights * torch.tensor(n, dtype=torch.float64)
        pace = torch.tensor(losses, dtype=torch.float64) / torch.tensor(steps[0][1], dtype=torch.float64)
        target = (N.mean() * (pace / pace.mean()) ** 1.5).detach()
        z.grad = torch.autograd.grad((N - target).abs().sum(), z)[0]
        adam.step()
    assert history[1][1] < 1 < history[1][2]  # the longest gradient loses weight


# Runs


def test_simplex_projection_is_a_min_norm_point():
    """x - P(x) is the shortest vector between x and the simplex: the min-norm point of the rows e_i - x."""
    rng = np.random.default_rng(0)
    for T in (1, 2, 3, 10):
        for spread in (0.1, 1.0, 10.0):
            x = spread * rng.normal(size=T)
            w = stateful.project_on_simplex(x)
            assert off(w - x, geometry.min_norm(np.eye(T) - x)[1], 1 + np.abs(x).max()) < CONDITION
            inside = np.full(T, 1 / T)
            assert off(stateful.project_on_simplex(inside), inside) < 1e-15


def test_moco_and_modo():
    steps = [matrices.conflicting(3, seed).numpy() for seed in range(4)]
    for (lam, d), J in zip(stateful.moco(steps, beta=1.0, gamma=0.0, sigma=0.0), steps, strict=True):
        assert lam == pytest.approx([1 / 3] * 3)
        assert off(d, J.mean(0)) < 1e-14  # no memory, no movement
    tracking = stateful.moco(steps, beta=1.0, gamma=0.1, rho=0.2, sigma=0.0)
    for (lam, d), (other, e) in zip(tracking, stateful.modo(steps, gamma=0.1, rho=0.2), strict=True):
        assert off(lam, other) < 1e-14  # beta = 1 makes MoCo a single-batch MoDo
        assert off(d, e) < 1e-14
    # y is the average of the gradients when beta_k = 1 / k
    assert off(stateful.moco(steps, 1.0, 0.0, sigma=1.0)[-1][1], np.mean(steps, axis=0).mean(0)) < 1e-14
    same = stateful.moco([steps[0]] * 4000, beta=1.0, gamma=0.02, sigma=0.0)[-1][1]
    assert off(same, geometry.min_norm(steps[0])[1]) < 1e-4  # projected gradient descent on MGDA's problem
    lam, d = stateful.modo([tuple(steps[:3])], gamma=0.05, rho=0.1)[0]
    by_gramian = np.full(3, 1 / 3) - 0.05 * (steps[0] @ steps[1].T + 0.1 * np.eye(3)) @ np.full(3, 1 / 3)
    assert off(lam, stateful.project_on_simplex(by_gramian)) < 1e-13
    assert off(d, lam @ steps[2]) < 1e-14


def test_excess_mtl():
    steps = [matrices.random(3, seed).numpy() for seed in range(4)]
    history = stateful.excess_mtl(steps, eta=0.1)
    assert (history[0][0] == 1).all()
    assert off(history[0][1], steps[0].sum(0)) < 1e-15
    # every loss scaled by its own factor: e_i / e_i(0) stays, up to the eps under the root
    factor = np.array([0.5, 2.0, 30.0])[:, None]
    for (w, d), (v, _), J in zip(history, stateful.excess_mtl([factor * J for J in steps], 0.1), steps, strict=True):
        assert w.sum() == pytest.approx(3, rel=1e-14)
        assert off(v, w) < 1e-4
        assert off(d, w @ J) < 1e-14
    S = steps[0] ** 2 + steps[1] ** 2
    e, first = (steps[1] ** 2 / np.sqrt(S + 1e-7)).sum(1), (steps[0] ** 2 / np.sqrt(steps[0] ** 2 + 1e-7)).sum(1)
    w = np.exp(0.1 * e / first)
    assert off(history[1][0], 3 * w / w.sum()) < 1e-14


def test_db_mtl():
    steps = [(matrices.random(3, seed).numpy(), [0.5 + seed, 2.0, 0.1]) for seed in range(4)]
    J, losses = steps[0]
    g = J / (np.array(losses) + 1e-8)[:, None]
    n = geometry.norms(g)
    d = stateful.db_mtl(steps, beta=0.9)[0]  # the first average is 0.1 g
    assert off(d, 0.1 * n.max() * (g / n[:, None]).sum(0)) < 1e-14
    scaled_losses = [(J * 1e3, [1e3 * x for x in losses]) for J, losses in steps]
    for a, b in zip(stateful.db_mtl(steps), stateful.db_mtl(scaled_losses), strict=True):
        assert off(a, b) < 1e-6  # log L, but for the 1e-8 beside the smallest loss
    assert off(stateful.db_mtl(steps, beta=0.5, sigma=0.5)[0], 5 * d) < 1e-14
    memoryless = stateful.db_mtl(steps, beta=0.0)[-1]
    J, losses = steps[-1]
    g = J / (np.array(losses) + 1e-8)[:, None]
    assert off(memoryless, geometry.norms(g).max() * sum(unit(x) for x in g)) < 1e-14


@pytest.mark.parametrize("T", [2, 3, 5])
def test_gradvac(T):
    J = matrices.conflicting(T, 1).numpy()
    orders = [[j for j in reversed(range(T)) if j != i] for i in range(T)]
    d, rho = stateful.gradvac(J, orders, np.zeros((T, T)), 0.0)
    assert off(d, projections.pcgrad(J, orders)) < CONDITION  # target 0
    assert (rho == 0).all()
    low = stateful.gradvac(J, orders, np.full((T, T), -0.999), 0.5)
    assert off(low[0], J.sum(0)) < 1e-14  # every cosine is above its target
    u = np.array([unit(g) for g in J])
    expected = -0.4995 + 0.5 * u @ u.T
    np.fill_diagonal(expected, -0.999)
    assert np.abs(low[1] - expected).max() < 1e-14


def test_gradvac_lands_on_its_target():
    J = matrices.conflicting(2, 3).numpy()
    rho = np.array([[0.0, 0.4], [-0.1, 0.0]])
    d, moved = stateful.gradvac(J, [[1], [0]], rho, 0.25)
    c = unit(J[0]) @ unit(J[1])
    assert c < -0.1
    n = geometry.norms(J)

    def printed(i, j):  # the paper's coefficient on cosines
        r = rho[i, j]
        sine, root = math.sqrt(1 - c * c), math.sqrt(1 - r * r)
        return J[i] + n[i] * (r * sine - c * root) / (n[j] * root) * J[j]

    first, second = printed(0, 1), printed(1, 0)
    assert unit(first) @ unit(J[1]) == pytest.approx(0.4, abs=1e-12)
    assert unit(second) @ unit(J[0]) == pytest.approx(-0.1, abs=1e-12)
    assert off(d, first + second) < CONDITION
    assert moved[0, 1] == pytest.approx(0.75 * 0.4 + 0.25 * c, rel=1e-12)
    with_zero = np.array([J[0], np.zeros_like(J[0]), J[1]])
    wide = np.zeros((3, 3))
    wide[0, 2], wide[2, 0] = rho[0, 1], rho[1, 0]
    found, kept = stateful.gradvac(with_zero, [[1, 2], [0, 2], [1, 0]], wide, 0.25)
    assert off(found, d) < 1e-15
    assert (kept[1] == 0).all()
    assert (kept[:, 1] == 0).all()
    opposite = stateful.gradvac(np.array([ONE, -ONE]), [[1], [0]], np.zeros((2, 2)), 0.5)
    assert np.linalg.norm(opposite[0]) < 1e-12 * np.linalg.norm(ONE)
    assert opposite[1][0, 1] == pytest.approx(-0.5)
