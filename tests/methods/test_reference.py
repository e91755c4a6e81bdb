"""The oracles against each other: two independent routes must meet before either may judge the library."""

from __future__ import annotations

import numpy as np
import pytest

import matrices
from reference import connection, directions, geometry, projections, tensioner, weighting

CONDITION = 1e-10  # float64 rounding times the worst condition number that the samplers below produce


def gap(a, b, scale):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / scale


@pytest.mark.parametrize("sampler", matrices.SAMPLERS)
@pytest.mark.parametrize("T", [2, 3, 4])
def test_min_norm_equals_enumeration_of_faces(sampler, T):
    for seed in range(5):
        J = matrices.SAMPLERS[sampler](T, seed).numpy()
        w, d = geometry.min_norm(J)
        assert w.min() >= 0
        assert abs(w.sum() - 1) < 1e-12
        # row_scaled: the edges g_i - g_0 round at eps times the largest row, so enumeration can do no better there
        scale = geometry.norms(J).max() if sampler == "row_scaled" else np.dot(w, geometry.norms(J))
        assert gap(d, geometry.min_norm_by_enumeration(J), scale) < CONDITION


@pytest.mark.parametrize(("sampler", "T"), matrices.CASES)
def test_cagrad_oracle_certifies_itself(sampler, T):
    """The oracle asserts its own primal-dual gap."""
    for c in (0.0, 0.2, 0.9):
        directions.cagrad(matrices.SAMPLERS[sampler](T, 1).numpy(), c)


@pytest.mark.parametrize("sampler", ["random", "conflicting", "parallel", "row_scaled"])
@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 3.0])
def test_cagrad_bisection_equals_scalar_minimisation(sampler, c):
    for seed in range(5):
        J = matrices.SAMPLERS[sampler](2, seed).numpy()
        if c > 1 and geometry.project_on_dual_cone(J, J.mean(0)) @ J.mean(0) <= 0:
            continue
        d = directions.cagrad(J, c)
        assert gap(d, directions.cagrad_two_tasks(J, c), np.linalg.norm(d)) < CONDITION


def test_cagrad_degenerate_hull_gives_the_projection():
    """g_1 = -g_2 with g_3 orthogonal to both: {d : J d >= 0} meets the ball, and the mean is the nearest maximiser."""
    J = np.array([[1.0, 0, 0], [-1.0, 0, 0], [0, 2.0, 0]])
    assert np.allclose(directions.cagrad(J, 0.5), [0, 2 / 3, 0], rtol=0, atol=1e-14)


def test_edm_length_is_unique_only_without_affine_dependence():
    low, high = directions.edm_lengths(matrices.random(5).numpy())
    assert high / low - 1 < 1e-6  # the linear program's own tolerance
    low, high = directions.edm_lengths(np.array([[1.0, 0.0], [3.0, 0.0]]))
    assert (round(low, 6), round(high, 6)) == (1.0, 3.0)


def test_projections_reach_what_they_promise():
    J = matrices.conflicting(4).numpy()
    for d in projections.wpcgrad_results(J, "anchor"):
        assert np.isfinite(d).all()
    order = [2, 0, 3, 1]
    assert min(np.linalg.norm(projections.wpcgrad_results(J) - projections.wpcgrad(J, order), axis=1)) == 0
    orders = [[j for j in (3, 1, 0, 2) if j != i] for i in range(4)]
    assert min(np.linalg.norm(projections.pcgrad_results(J) - projections.pcgrad(J, orders), axis=1)) < 1e-12
    law = projections.plackett_luce(np.array([0.5, 0.3, 0.2]))
    assert abs(sum(law.values()) - 1) < 1e-12
    assert abs(law[0, 1, 2] - 0.5 * 0.6) < 1e-12


def test_tensioner_fix_lands_on_the_hyperplane():
    for seed in range(20):
        d, g = matrices.normal(2, 5, seed).numpy()
        fixed = tensioner.make_feasible(d, g)
        if d @ g < 0:
            s = (g @ g) / (g @ g - d @ g)
            assert abs(fixed @ g) < 1e-12
            assert np.allclose(fixed, s * d + (1 - s) * g, rtol=0, atol=1e-12)
        else:
            assert (fixed == d).all()
    assert tensioner.tension(1.0, 1.0, 0.3) == pytest.approx(1 - 0.15)


def test_weighting_anchors():
    assert weighting.uw_slope(np.log(3.0), 3.0) == pytest.approx(0, abs=1e-11)
    assert weighting.dwa([[1, 2], [0.5, 1]]) == pytest.approx([1, 1])
    assert weighting.gls([2.0, 2.0]) == pytest.approx([0.5, 0.5])
    assert weighting.loss_power([1.0, 3.0], 0.0) == [0.5, 0.5]
    assert weighting.dtp(0.2) > weighting.dtp(0.6) > 0


def test_connection_owner_and_groups():
    rows = [np.array([1.0, 2.0]), np.array([3.0, 0.0])]
    a = connection.strength(rows, np.array([1.0, 1.0]), np.array([1.0, 1.0]))
    b = connection.strength(rows, np.array([2.0, 1.0]), np.array([1.0, 1.0]))
    assert a.sum() == pytest.approx(1)
    assert connection.owners([a, b]) == [1, 0]
    assert connection.owners([a, a]) == [0, 0]
