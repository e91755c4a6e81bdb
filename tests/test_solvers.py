"""The T x T solvers: optimality conditions, independent references, masks, batches, NumPy against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import detente
import matrices
from detente import solvers
from detente.method import Context, GramianMethod, registry
from reference import baselines, geometry
from reference.agreement import EPS, assert_agrees, conditioning

Array = np.ndarray

SIZES = (1, 2, 3, 6, 10)
CASES = [(name, T, seed) for name in matrices.SAMPLERS for T in SIZES for seed in range(2 if T == 3 else 1)]
SMALL = [(name, T, 0) for name in matrices.SAMPLERS for T in (2, 3, 6)]
# what a rule sees of gradients whose cosines have full rank and a condition below about 1e4: nothing is lost
REGULAR = ("random", "conflicting", "row_scaled")


def rows(name: str, T: int, seed: int = 0) -> Array:
    return matrices.SAMPLERS[name](T, seed).numpy()


def block(J: Array) -> Array:
    return (J @ J.T)[None]


def cosines(J: Array) -> Array:
    return solvers.unit(block(J))[1]


def numbers(T: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((1, T))


def everyone(T: int, B: int = 1) -> Array:
    return np.ones((B, T), dtype=bool)


def units(J: Array) -> Array:
    return J / geometry.norms(J)[:, None]


def noise(T: int, *sizes: float) -> float:
    """A KKT residual in float64: sums of T products, each rounded at eps, and what the solve leaves of them."""
    return 64 * T * EPS * sum(map(float, sizes))


# ---------------------------------------------------------------------------------------------------------------------
# Norms, cosines, weights


@pytest.mark.parametrize(("name", "T", "seed"), CASES)
def test_unit(name, T, seed):
    J = rows(name, T, seed)
    norms, cosine = solvers.unit(block(J))
    # the square root halves the relative error of a sum of T products
    np.testing.assert_allclose(norms[0], geometry.norms(J), rtol=1e-14)
    np.testing.assert_allclose(cosine[0], units(J) @ units(J).T, atol=1e-14)
    assert (np.diagonal(cosine, axis1=1, axis2=2) == 1).all()
    assert np.abs(cosine).max() <= 1


def test_unit_of_a_zero_gradient_is_orthogonal_to_all():
    J = rows("random", 3)
    J[1] = 0
    norms, cosine = solvers.unit(block(J))
    assert norms[0, 1] == 1
    assert cosine[0, 1].tolist() == [0, 1, 0] == cosine[0, :, 1].tolist()


@pytest.mark.parametrize(
    ("weights", "alive", "wanted"),
    [
        ([1.0, 3.0, 4.0], [1, 1, 1], [0.125, 0.375, 0.5]),
        ([1.0, 3.0, 4.0], [1, 1, 0], [0.25, 0.75, 0]),
        ([0.0, 0.0, 7.0], [1, 1, 0], [0.5, 0.5, 0]),
        ([0.0, 0.0, 0.0], [1, 1, 1], [1 / 3, 1 / 3, 1 / 3]),
        ([1.0, 2.0, 3.0], [0, 0, 0], [0, 0, 0]),
        ([1e-100, 3e-100, 0.0], [1, 1, 1], [0.25, 0.75, 0]),
        ([2e300, 6e300, 0.0], [1, 1, 1], [0.25, 0.75, 0]),
    ],
)
def test_normalised(weights, alive, wanted):
    w, there = np.array([weights]), np.array([alive], dtype=bool)
    # one division: within an ulp or two, in either kind of array
    np.testing.assert_allclose(solvers.normalised(w, there)[0], wanted, rtol=4 * EPS)
    got = solvers.normalised(torch.from_numpy(w), torch.from_numpy(there))
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got[0].numpy(), wanted, rtol=4 * EPS)


@pytest.mark.parametrize("T", [1, 2, 3, 8])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_on_simplex_is_the_nearest_point(T, spread):
    for seed in range(20):
        point = spread * numbers(T, seed)
        got = solvers.on_simplex(point, everyone(T))[0]
        # the projection of p on the simplex is the point of smallest norm in the hull of the vectors e_i - p
        wanted, _ = geometry.min_norm(np.eye(T) - point)
        # one division by at most T of a sum of numbers of size `spread`
        np.testing.assert_allclose(got, wanted, atol=1e-12 * max(1, spread))
        assert got.min() >= 0
        assert abs(got.sum() - 1) <= noise(T, 1, spread)


def test_on_simplex_leaves_a_point_of_the_simplex_where_it_is():
    inside = np.array([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]])
    np.testing.assert_array_equal(solvers.on_simplex(inside, everyone(3, 2)), inside)


# ---------------------------------------------------------------------------------------------------------------------
# The cone


def check_cone(cosine: Array, q: Array, found: solvers.Cone) -> None:
    """The KKT conditions of ``min 0.5 y'Cy - q'y, y >= 0``, or a ray along which it falls for ever."""
    y, T = found.y, len(q)
    assert np.isfinite(y).all()
    assert (y >= 0).all()
    if found.bounded:
        slack = cosine @ y - q
        level = noise(T, np.abs(q).max(), np.abs(cosine) @ y @ np.ones(T))
        assert slack.min() >= -level, "U d >= q"
        assert np.abs(slack[y > 0]).max(initial=0.0) <= level, "equality where y > 0"
    else:
        assert abs(y.sum() - 1) <= noise(T, 1)
        assert np.abs(cosine @ y).max() <= noise(T, 1), "the ray is in the null space"
        assert q @ y > 0, "and along it the objective falls"


def first(found: solvers.Cone, b: int = 0) -> solvers.Cone:
    return solvers.Cone(found.y[b], found.bounded[b], found.exact[b])


TARGETS: dict[str, Callable[[int, int], Array]] = {
    "ones": lambda T, seed: np.ones((1, T)),
    "mixed": lambda T, seed: numbers(T, seed + 50),
    "uneven": lambda T, seed: numbers(T, seed + 60) * 10.0 ** np.linspace(-8, 8, T),
    "nothing to do": lambda T, seed: -np.abs(numbers(T, seed)),
    "single": lambda T, seed: np.eye(T)[:1] - 0.5,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "T", "seed"), CASES)
def test_cone(name, T, seed, target):
    J = rows(name, T, seed)
    cosine, q = cosines(J), TARGETS[target](T, seed)
    found = first(solvers.cone(cosine, q))
    assert found.exact
    check_cone(cosine[0], q[0], found)
    if target == "nothing to do":
        assert not found.y.any()
    if target == "uneven":
        return  # the oracle decides with an absolute tolerance what can be reached, which is lost beside 1e8
    reference = geometry.shortest(units(J), q[0])
    assert bool(found.bounded) == (reference is not None)
    if reference is not None:
        # d = U'y is unique; its coefficients are too only where the active rows are independent
        assert_agrees(units(J).T @ found.y, reference[0], terms=found.y.sum(), T=T)


@pytest.mark.parametrize("T", [2, 5])
def test_cone_equals_scipy(T):
    """``min ||A y - b||`` over ``y >= 0`` with unit columns: the problem that scipy's nnls solves."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        A = rng.standard_normal((T + 2, T))
        A /= np.linalg.norm(A, axis=0)
        b = rng.standard_normal(T + 2)
        found = solvers.cone((A.T @ A)[None], (A.T @ b)[None])
        # condition of A below 1e3: squared in the Gramian, 1e6 eps
        np.testing.assert_allclose(found.y[0], nnls(A, b)[0], atol=1e-9)
        assert found.bounded[0]
        assert found.exact[0]


@pytest.mark.parametrize(("T", "P"), [(3, 1), (3, 2), (4, 2), (5, 3), (8, 3)])
def test_cone_of_small_whole_numbers(T, P):
    """Exact dependences, opposites and ties in every combination."""
    for seed in range(60):
        J = matrices.integers(T, P, seed).numpy()
        for kind, target in TARGETS.items():
            if kind == "uneven":
                continue
            q = target(T, seed)
            found = first(solvers.cone(cosines(J), q))
            assert found.exact
            check_cone(cosines(J)[0], q[0], found)
            assert bool(found.bounded) == (geometry.shortest(units(J), q[0]) is not None)


def test_cone_where_no_minimiser_exists():
    """Opposite gradients that are both asked to gain: y grows for ever along (1, 1)."""
    cosine = np.array([[[1.0, -1.0], [-1.0, 1.0]]])
    found = solvers.cone(cosine, np.ones((1, 2)))
    assert not found.bounded[0]
    assert found.exact[0]
    np.testing.assert_allclose(found.y, [[0.5, 0.5]], rtol=4 * EPS)


def test_cone_shares_equally_between_copies():
    cosine = np.ones((1, 3, 3))
    cosine[0, 2] = cosine[0, :, 2] = [0.0, 0.0, 1.0]
    found = solvers.cone(cosine, np.array([[1.0, 1.0, 2.0]]))
    np.testing.assert_allclose(found.y, [[0.5, 0.5, 2.0]], rtol=1e-14)  # one solve with 1 + 48 eps on the diagonal


def test_cone_of_many_targets_on_one_matrix():
    """[1, T, T] serves all rows of the targets."""
    cosine = cosines(rows("conflicting", 20))
    q = np.random.default_rng(0).standard_normal((40, 20))
    found = solvers.cone(cosine, q)
    assert found.exact.all()
    for b in range(40):
        check_cone(cosine[0], q[b], first(found, b))
        alone = solvers.cone(cosine, q[b : b + 1])
        np.testing.assert_allclose(found.y[b], alone.y[0], rtol=1e-9, atol=1e-9)  # another start, the same support


# ---------------------------------------------------------------------------------------------------------------------
# Weights on the simplex


@pytest.mark.parametrize(("name", "T", "seed"), CASES)
def test_min_norm(name, T, seed):
    J = rows(name, T, seed)
    weights, exact = solvers.min_norm(block(J), everyone(T))
    w = weights[0]
    assert exact[0]
    assert w.min() >= 0
    assert abs(w.sum() - 1) <= noise(T, 1)
    reference, shortest = geometry.min_norm(J)
    assert_agrees(J.T @ w, shortest, terms=reference @ geometry.norms(J), T=T)


@pytest.mark.parametrize("T", [2, 3, 4])
def test_min_norm_by_enumeration_of_the_faces(T):
    for seed in range(20):
        J = rows("random" if seed % 2 else "conflicting", T, seed)
        w = solvers.min_norm(block(J), everyone(T))[0][0]
        # faces of a hull in T + 7 dimensions, whose condition is below 1e3
        np.testing.assert_allclose(J.T @ w, geometry.min_norm_by_enumeration(J), atol=1e-10)


def test_min_norm_of_a_living_zero_row_is_that_row():
    J = rows("random", 4)
    J[[1, 3]] = 0
    weights, exact = solvers.min_norm(block(J), everyone(4))
    np.testing.assert_array_equal(weights, [[0, 0.5, 0, 0.5]])
    assert exact.all()
    third = np.zeros((1, 3, 3))
    for array in (third, torch.from_numpy(third)):
        weights = solvers.min_norm(array, solvers.diagonal(array) == 0)[0]
        assert abs(float(weights[0, 0]) - 1 / 3) <= EPS, "a third in float64, not in float32"


def check_qp(cosine: Array, b: Array, a: Array, y: Array) -> None:
    """``0.5 y'Cy + b'y`` over ``y >= 0``, ``a'y = 1``: Cy + b = level a on the support and above it elsewhere."""
    T = len(y)
    assert (y >= 0).all()
    assert abs(a @ y - 1) <= 1e-9  # one scalar product of the size 1, and the refinement of y
    product = cosine @ y + b
    level = y @ product
    error = noise(T, np.abs(b).max(), abs(level) * a.max(), (np.abs(cosine) @ y).max())
    assert (product - level * a).min() >= -error
    assert np.abs((product - level * a)[y > 0]).max() <= error


@pytest.mark.parametrize("pull", [0.0, 1.0, 100.0])
@pytest.mark.parametrize(("name", "T", "seed"), CASES)
def test_simplex_qp(name, T, seed, pull):
    J = rows(name, T, seed)
    cosine = cosines(J)
    b = pull * numbers(T, seed)
    a = np.random.default_rng(seed).uniform(0.1, 1.0, (1, T))
    y, exact = solvers.simplex_qp(cosine, b, a)
    assert exact[0]
    check_qp(cosine[0], b[0], a[0], y[0])
    # convexity: no feasible point is better
    rng = np.random.default_rng(7)
    others = rng.dirichlet(np.full(T, 0.3), 200) / a
    value = 0.5 * np.einsum("ki,ij,kj->k", others, cosine[0], others) + others @ b[0]
    best = 0.5 * y[0] @ cosine[0] @ y[0] + b[0] @ y[0]
    assert value.min() >= best - 1e-12 * (1 + np.abs(value).max())  # rounding of both values


@pytest.mark.parametrize(("name", "T", "seed"), [c for c in CASES if c[0] in REGULAR])
def test_simplex_qp_without_a_pull_is_min_norm(name, T, seed):
    J = rows(name, T, seed)
    norms, cosine = solvers.unit(block(J))
    shares = norms.min() / norms
    y, exact = solvers.simplex_qp(cosine, np.zeros((1, T)), shares)
    assert exact[0]
    _, d = geometry.min_norm(J)
    assert_agrees(J.T @ (y * shares)[0], d, terms=(y * shares)[0] @ geometry.norms(J), T=T)


# ---------------------------------------------------------------------------------------------------------------------
# The dual cone and the ball


@pytest.mark.parametrize(("name", "T", "seed"), CASES)
def test_projected(name, T, seed):
    J = rows(name, T, seed)
    sizes = geometry.norms(J)
    points = np.concatenate([np.eye(T), np.full((1, T), 1 / T), numbers(T, seed) / sizes])[None]
    found, exact = solvers.projected(block(J), points, everyone(T))
    assert exact[0]
    for point, a in zip(points[0], found[0], strict=True):
        g = J.T @ point
        d = J.T @ a
        terms = np.abs(a) @ sizes
        assert (a >= point).all(), "a projection only adds"
        assert (units(J) @ d).min() >= -conditioning(np.linalg.norm(d), terms, T) - 1e-8 * np.linalg.norm(d)
        assert_agrees(d, geometry.project_on_dual_cone(J, g), terms=terms, T=T)


def best_level(J: Array, pull: Array, radius: float) -> float:
    """``max min_i (p_i + g_i . x)`` over ``||x|| <= r``: bisection on the level, whose shortest x the oracle finds."""
    sizes = geometry.norms(J)
    moving = sizes > 0
    U = J[moving] / sizes[moving, None]

    def reachable(level: float) -> bool:
        wanted = (level - pull[moving]) / sizes[moving] / radius
        found = geometry.shortest(U, wanted)
        # next to a level that cannot be reached the oracle's x falls short of it
        return found is not None and np.linalg.norm(found[0]) <= 1 and (U @ found[0] - wanted).min() >= -1e-9

    low = pull.min()
    high = min((pull + radius * sizes)[moving].min(), pull[~moving].min(initial=np.inf))
    if reachable(high):
        return float(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reachable(middle) else (low, middle)
    return float(low)


@pytest.mark.parametrize("radius", [0.1, 1.0, 30.0])
@pytest.mark.parametrize(("name", "T", "seed"), [c for c in CASES if c[1] < 10 and c[0] != "row_scaled"])
def test_ball(name, T, seed, radius):
    J = rows(name, T, seed)
    pull = numbers(T, seed + 3)[0]
    found, exact = solvers.ball(block(J), pull[None], np.array([radius]), everyone(T))
    x = J.T @ found[0]
    assert exact[0]
    assert (found >= 0).all()
    terms = float(found[0] @ geometry.norms(J))
    # the length is a root of x'x = a'Ga, known to eps times the squared terms
    assert np.linalg.norm(x) <= radius * (1 + 1e-9) + conditioning(radius, terms, T)
    level = (pull + J @ x).min()
    size = np.abs(pull).max() + radius * geometry.norms(J).max()
    # the oracle's own residual is 1e-9 of the step, the Gramian's conditioning comes on top
    assert level >= best_level(J, pull, radius) - 1e-8 * size - conditioning(radius, terms, T) * size


@pytest.mark.parametrize("T", [2, 3, 6])
def test_ball_of_uneven_gradients_has_no_duality_gap(T):
    """Weak duality: no x in the ball does better than ``w . p + r ||J'w||``, whatever w on the simplex."""
    for seed in range(5):
        J = rows("row_scaled", T, seed)
        centre = np.full((1, T), 1 / T)
        pull = (centre @ J @ J.T)[0]
        radius = 0.5 * np.linalg.norm(centre @ J)
        found, exact = solvers.ball(block(J), pull[None], np.array([radius]), everyone(T))
        assert exact[0]
        x, w = J.T @ found[0], found[0] / found[0].sum()
        dual = w @ pull + radius * np.linalg.norm(J.T @ w)
        # the level is measured in units of the shortest gradient's own gain; forming p_i + g_i . x costs eps of it
        gain = geometry.norms(J) * np.linalg.norm(x)
        rounding = 1e-9 * gain.min() + 4 * T * EPS * (np.abs(pull) + gain)
        assert (pull + J @ x >= dual - rounding).all()


def test_ball_beside_a_zero_row_stops_at_its_pull():
    """Task 1 cannot move; once task 0 has come up to it nothing is gained, and the shortest such step is taken."""
    J = np.array([[2.0, 0.0], [0.0, 0.0]])
    found, exact = solvers.ball(block(J), np.array([[0.0, 1.0]]), np.array([5.0]), everyone(2))
    assert exact[0]
    np.testing.assert_allclose(J.T @ found[0], [0.5, 0.0], atol=1e-14)  # one division
    found, _ = solvers.ball(block(J), np.array([[3.0, 1.0]]), np.array([5.0]), everyone(2))
    assert not (J.T @ found[0]).any(), "task 0 is above it from the start"


def test_ball_of_opposites_ends_where_both_are_equal():
    J = np.array([[1.0, 0.0], [-1.0, 0.0]])
    found, exact = solvers.ball(block(J), np.array([[0.0, 1.0]]), np.array([5.0]), everyone(2))
    assert exact[0]
    np.testing.assert_allclose(J.T @ found[0], [0.5, 0.0], atol=1e-12)  # bounded level: ends by a cone problem


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_ball_of_opposites_whose_level_is_known_to_rounding_stays(kind):
    """The end of a run at a Pareto-stationary point: pulls that are the rounding of g - g, a radius of their size."""
    gramian = np.array([[[1.9581569627496782, -1.9581569627496769], [-1.9581569627496769, 1.9581569627496782]]])
    pull = gramian.mean(-1)
    found, exact = solvers.ball(kind(gramian), kind(pull), kind(np.array([5.16e-9])), kind(everyone(2)))
    assert bool(exact.all())
    np.testing.assert_array_equal(np.asarray(found), 0)


def test_ball_without_radius_or_gradients_stays():
    J = rows("random", 3)
    for gramian, radius in ((block(J), 0.0), (0 * block(J), 1.0)):
        found, exact = solvers.ball(gramian, numbers(3), np.array([radius]), everyone(3))
        assert not found.any()
        assert exact.all()


# ---------------------------------------------------------------------------------------------------------------------
# Bargaining


@pytest.mark.parametrize("power", [0.25, 1.0, 3.0])
@pytest.mark.parametrize(("name", "T", "seed"), CASES)
def test_bargain(name, T, seed, power):
    J = rows(name, T, seed)
    cosine = cosines(J)
    rate = np.random.default_rng(seed).uniform(0.2, 5.0, (1, T))
    found, exact = solvers.bargain(cosine, rate, power, everyone(T))
    y = found[0]
    assert exact[0]
    distance = np.linalg.norm(geometry.min_norm(units(J))[1])
    product = cosine[0] @ y
    if distance > 1e-7:
        assert (y > 0).all()
        wanted = rate[0] * y**-power
        # the equation up to rounding of its own terms
        assert (np.abs(product - wanted) <= noise(T, 1) * (wanted + np.abs(cosine[0]) @ y)).all()
    else:  # Pareto-stationary: no solution, U'y = 0 up to what the Gramian sees, sqrt(eps) of its terms
        assert (y >= 0).all()
        assert np.linalg.norm(units(J).T @ y) <= 1e-6 * y.sum()


@pytest.mark.parametrize("T", [1, 2, 5])
def test_bargain_of_orthogonal_gradients(T):
    """``y = p y**-s``: each for itself."""
    rate = 10.0 ** np.linspace(-3, 3, T)[None]
    for power in (0.5, 1.0, 2.0):
        y, exact = solvers.bargain(np.eye(T)[None], rate, power, everyone(T))
        np.testing.assert_allclose(y, rate ** (1 / (1 + power)), rtol=1e-12)  # Newton's last step squares 1e-9
        assert exact[0]


# ---------------------------------------------------------------------------------------------------------------------
# Spectra


@pytest.mark.parametrize(("name", "T", "seed"), CASES)
def test_equal_products(name, T, seed):
    J = rows(name, T, seed)
    x = solvers.equal_products(cosines(J), everyone(T))[0]
    # by the gradients: U U'x = 1 in the least-squares sense; the rank is decided at 1e-7 of the singular values
    inverse = np.linalg.pinv(units(J), rcond=1e-7)
    wanted = inverse.T @ inverse @ np.ones(T)
    # eigenvalues of the cosines are known to T eps; condition of the kept ones below 1e5
    np.testing.assert_allclose(x, wanted, atol=1e-9 * (1 + np.abs(wanted).max()))


def check_spectrum(J: Array, found: solvers.Spectrum, b: int = 0) -> None:
    T = len(J)
    scale = geometry.norms(J)
    kept = found.kept[b]
    left, lengths = found.left[b][:, kept], found.lengths[b][kept]
    assert not found.lengths[b][~kept].any() or np.isfinite(found.lengths[b]).all()
    np.testing.assert_allclose(left.T @ left, np.eye(kept.sum()), atol=1e-12)  # rotations, each to T eps
    whole = (left * lengths**2) @ left.T
    # every entry of G to its own scale, n_i n_j: what makes it accurate for the small gradients too
    assert (np.abs(whole - J @ J.T) <= 1e-12 * np.outer(scale, scale)).all()
    # the right singular vectors, made of the gradients: orthonormal up to what the cosines know of them
    right = J.T @ found.back[b][:, kept]
    floor = min(1.0, np.linalg.svd(units(J), compute_uv=False)[: kept.sum()].min())
    np.testing.assert_allclose(right.T @ right, np.eye(kept.sum()), atol=64 * T * EPS / floor**2)
    products = J @ right
    assert (np.abs(products - left * lengths) <= 64 * T * EPS / floor**2 * scale[:, None]).all()


@pytest.mark.parametrize(("name", "T", "seed"), CASES)
def test_spectrum(name, T, seed):
    J = rows(name, T, seed)
    found = solvers.spectrum(block(J))
    check_spectrum(J, found)
    assert found.kept.sum() == np.linalg.matrix_rank(units(J), 1e-7)
    got = np.sort(found.lengths[0][found.kept[0]])[::-1]
    if name in REGULAR:
        _, wanted = baselines.svd(J)
        np.testing.assert_allclose(got, wanted.astype(float), rtol=1e-9)  # cosines of condition below 1e4


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_spectrum_of_orthogonal_gradients_of_any_scale(kind):
    """Singular values are the lengths, 1e-8 beside 1e8, each to full accuracy."""
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((9, 4)))[0].T
    scales = np.array([1e8, 1e-8, 1.0, 1e3])
    J = scales[:, None] * Q
    found = solvers.spectrum(kind(block(J)))
    got = np.sort(np.asarray(found.lengths)[0])
    np.testing.assert_allclose(got, np.sort(scales), rtol=1e-12)  # relative errors of the cosines: T eps
    assert np.asarray(found.kept).all()


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_spectrum_beside_zero_gradients(kind):
    J = rows("random", 4)
    J[[0, 2]] = 0
    found = solvers.Spectrum(*(np.asarray(part) for part in solvers.spectrum(kind(block(J)))))
    assert found.kept.sum() == 2
    assert not found.back[0][:, ~found.kept[0]].any()
    wanted = np.linalg.svd(J[[1, 3]], compute_uv=False)
    # condition below 10
    np.testing.assert_allclose(np.sort(found.lengths[0][found.kept[0]])[::-1], wanted, rtol=1e-12)
    nothing = solvers.spectrum(kind(np.zeros((1, 3, 3))))
    assert not bool(nothing.kept.any())
    assert bool((nothing.back == 0).all())


# ---------------------------------------------------------------------------------------------------------------------
# All of them: masks, batches, devices


def each(index: Array) -> Array:
    """A positive number of its own for every task."""
    return 0.5 + 0.1 * index


def problem(
    J: Array, alive: Array, kind: Callable[[Array], Any] = np.asarray, index: Array | None = None
) -> dict[str, Callable[[], Any]]:
    """Every solver on gradients ``[B, T, P]``, as arrays or as tensors; ``index`` says which tasks the T are."""
    B, T, _ = J.shape
    index = np.arange(T) if index is None else index
    G = J @ J.transpose(0, 2, 1)
    norms, cosine = (kind(part) for part in solvers.unit(G))
    mask, G = kind(alive), kind(G)
    pull = np.tile(each(index) * (-1.0) ** index, (B, 1))
    sure = kind(np.ones(B, dtype=bool))
    return {
        "cone": lambda: solvers.cone(cosine, kind(np.where(alive, 1.0 + 0.3 * pull, -1.0)))[::2],
        "min_norm": lambda: solvers.min_norm(G, mask),
        "simplex_qp": lambda: solvers.simplex_qp(cosine, kind(pull), kind(np.where(alive, np.abs(pull), 0.0))),
        "on_simplex": lambda: (solvers.on_simplex(kind(pull), mask), sure),
        "projected": lambda: _summed(solvers.projected(G, kind(np.where(alive[:, None, :], np.eye(T), 0.0)), mask)),
        "ball": lambda: solvers.ball(G, kind(pull), kind(np.full(B, 0.7)), mask),
        "bargain": lambda: solvers.bargain(cosine, norms, 1.0, mask),
        "equal_products": lambda: (solvers.equal_products(cosine, mask), sure),
        "normalised": lambda: (solvers.normalised(kind(np.abs(pull)), mask), sure),
    }


def _summed(found: tuple[Any, Any]) -> tuple[Any, Any]:
    return found[0].sum(1), found[1]


SOLVERS = list(problem(np.ones((1, 1, 1)), everyone(1)))


def vector(J: Array, name: str, coefficients: Array) -> Array:
    """What the coefficients stand for: a vector that is unique even where they are not."""
    over_units = name in ("cone", "simplex_qp", "bargain", "equal_products")
    if name in ("on_simplex", "normalised"):
        return coefficients
    return (units(J) if over_units else J).T @ coefficients


def terms(J: Array, name: str, coefficients: Array) -> float:
    over_units = name in ("cone", "simplex_qp", "bargain", "equal_products")
    if over_units:  # of the size 1 where opposites leave coefficients of rounding
        return max(1.0, float(np.abs(coefficients).sum()))
    return float(np.abs(coefficients) @ geometry.norms(J))


# a cone takes no mask: there a row is left out by being orthogonal to all others
MASKS = [("zero", solver) for solver in SOLVERS] + [("any gradient", solver) for solver in SOLVERS if solver != "cone"]


@pytest.mark.parametrize(("masked", "solver"), MASKS)
@pytest.mark.parametrize("name", matrices.SAMPLERS)
def test_a_masked_task_is_not_there(name, solver, masked):
    """The problem with a task masked out is the problem without it, whether or not its gradient is zero."""
    T = 5
    J = rows(name, T)
    for gone in ([0], [4], [1, 3], [0, 1, 2, 3]):
        alive = everyone(T)
        alive[0, gone] = False
        here = np.flatnonzero(alive[0])
        whole, exact = problem((J * alive[0][:, None] if masked == "zero" else J)[None], alive)[solver]()
        assert exact[0]
        # the null space of the living rows' cosines is found up to rounding
        assert np.abs(whole[0, gone]).max() <= (noise(T, 1) if solver == "equal_products" else 0)
        part = problem(J[None, here], everyone(len(here)), index=here)[solver]()[0][0]
        if solver == "bargain" and np.linalg.norm(geometry.min_norm(units(J[here]))[1]) < 1e-6:
            continue  # no solution: both are huge and cancel
        # two computations of one vector, which differ by their rounding
        a, b = vector(J[here], solver, whole[0, here]), vector(J[here], solver, part)
        assert_agrees(a, b, terms=terms(J[here], solver, part), T=T)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("T", [1, 2, 3, 6])
def test_a_batch_is_the_loop_over_its_blocks(solver, T):
    """Hard blocks beside easy ones, with masks of their own: no block feels another."""
    J = [rows(name, T, seed) for name in matrices.SAMPLERS for seed in range(2)]
    widest = max(j.shape[1] for j in J)
    J = np.stack([np.pad(j, ((0, 0), (0, widest - j.shape[1]))) for j in J])
    alive = np.random.default_rng(T).random((len(J), T)) < 0.8
    alive[:, 0] = True
    J = J * alive[:, :, None]
    whole, exact = problem(J, alive)[solver]()
    assert exact.all()
    for b in range(len(J)):
        part, _ = problem(J[b : b + 1], alive[b : b + 1])[solver]()
        here = J[b][alive[b]]
        if solver == "bargain" and np.linalg.norm(geometry.min_norm(units(here))[1]) < 1e-6:
            continue  # no solution: both are huge and cancel
        a, c = vector(here, solver, whole[b, alive[b]]), vector(here, solver, part[0, alive[b]])
        assert_agrees(a, c, terms=terms(here, solver, part[0, alive[b]]), T=T)


@pytest.mark.parametrize("T", [2, 5])
def test_a_batch_of_spectra_is_the_loop(T):
    J = [rows(name, T) for name in matrices.SAMPLERS]
    found = solvers.spectrum(np.stack([j @ j.T for j in J]))
    for b, j in enumerate(J):
        check_spectrum(j, found, b)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("T", [1, 2, 3, 6, 10])
def test_tensors_give_what_arrays_give(solver, T):
    """The path without decisions of the host, which is the same on the CPU."""
    J = np.stack([np.pad(rows(n, T, s), ((0, 0), (0, 25)))[:, :25] for n in REGULAR for s in range(3)])
    alive = np.random.default_rng(T).random((len(J), T)) < 0.8
    alive[:, 0] = True
    J = J * alive[:, :, None]
    wanted, _ = problem(J, alive)[solver]()
    found, exact = problem(J, alive, torch.from_numpy)[solver]()
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float64
    sure = exact.numpy()
    # a pull and a radius of 1 beside gradients of 1e8 and 1e-8: the host walks such a ball, the device says it cannot
    assert sure[: 3 * 2 if solver == "ball" else None].all()
    # regular problems: other orders of summation, at conditions of the cosines below 1e4
    assert (np.abs(found.numpy() - wanted)[sure] <= 1e-8 * np.abs(wanted[sure]).max(-1, keepdims=True)).all()


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "normalised"])
@pytest.mark.parametrize("name", ["parallel", "antiparallel", "low_rank", "duplicated"])
def test_tensors_of_degenerate_problems_are_exact_or_say_so(name, solver):
    """What the host treats one by one the device may leave, but never in silence."""
    for T in (2, 3, 6):
        drawn = [rows(name, T, seed) for seed in range(6)]
        J = np.stack(drawn)
        wanted, _ = problem(J, everyone(T, 6))[solver]()
        found, exact = problem(J, everyone(T, 6), torch.from_numpy)[solver]()
        assert bool(found.isfinite().all())
        for j, sure, x, y in zip(drawn, exact, found.numpy(), wanted, strict=True):
            if sure:
                assert_agrees(vector(j, solver, x), vector(j, solver, y), terms=terms(j, solver, y), T=T)


@pytest.mark.parametrize(("name", "T", "seed"), SMALL)
def test_tensors_give_the_spectrum_too(name, T, seed):
    J = rows(name, T, seed)
    found = solvers.spectrum(torch.from_numpy(block(J)))
    assert all(isinstance(part, Tensor) for part in found)
    check_spectrum(J, solvers.Spectrum(*(part.numpy() for part in found)))


def test_results_are_of_the_kind_and_device_that_came_in():
    G = torch.from_numpy(block(rows("random", 3)))
    for array in (G, G.numpy()):
        values = solvers.like(array, [1, 2, 3])
        assert type(values) is type(array)
        assert str(values.dtype).endswith("float64")
    assert solvers.like(G.numpy(), torch.ones(2)).tolist() == [1.0, 1.0]


# ---------------------------------------------------------------------------------------------------------------------
# A device never waits for the host

# Operations that torch documents as synchronising a device with the host: they look at an info code or at a count
# PyTorch's own decompositions on CUDA look at LAPACK's info code: the one wait that remains, and where
DECOMPOSED = {"equal_products", "spectrum", "aligned_mtl", "config", "gdod", "gradops", "imtl", "imtl_g"}
WAITING = ("eigh", "svd", "pinv", "inv_ex", "linalg_solve.", "_local_scalar_dense", "nonzero", "masked_select", "item")


class Unattended(TorchDispatchMode):
    """Names of the operations that ran and that would hold up a device."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(word in name for word in WAITING) and "solve_ex" not in name:
            self.waited.append(name)
        return func(*args, **(kwargs or {}))


def decomposition_only(waited: list[str]) -> bool:
    return len(waited) == 1 and any(word in waited[0] for word in ("linalg_eigh", "linalg_pinv"))


def on(device: str, T: int, B: int = 3) -> dict[str, Callable[[], Any]]:
    """Every solver on tensors. Those of the meta device have no data: whoever asks for a value gets an error."""
    J = np.stack([rows("random", T, seed) for seed in range(B)])

    def kind(array: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    G = kind(J @ J.transpose(0, 2, 1))
    return problem(J, everyone(T, B), kind) | {"spectrum": lambda: solvers.spectrum(G), "unit": lambda: solvers.unit(G)}


ON_DEVICE = [*SOLVERS, "spectrum", "unit"]


@pytest.mark.parametrize(("solver", "T"), [*((solver, 3) for solver in ON_DEVICE), ("min_norm", 2), ("spectrum", 1)])
def test_no_solver_asks_the_device_for_a_value(solver, T):
    for part in on("meta", T)[solver]():
        assert part.device.type == "meta"
        assert part.dtype in (torch.float64, torch.bool)


@pytest.mark.parametrize("solver", ON_DEVICE)
def test_no_solver_runs_an_operation_that_waits(solver):
    calls = on("cpu", 3)
    with Unattended() as mode:
        calls[solver]()
    assert decomposition_only(mode.waited) if solver in DECOMPOSED else mode.waited == []


GRAMIAN = {name: cls for name, cls in registry().items() if issubclass(cls, GramianMethod) and "model" not in cls.needs}
# state that the default options leave empty: several batches, or an old solution reused
OPTIONAL_STATE = {"nash_mtl": {"update_every": 2}, "sdmgrad": {"batches": 3}}
RULES = sorted({n for n, c in GRAMIAN.items() if not c.state and not c.stochastic} | set(OPTIONAL_STATE))


def moved(name: str, **options: Any) -> GramianMethod:
    """A method that was moved to a device. It then works wherever the Gramian is: here without data, or on the CPU."""
    method = detente.get_method(name, **options).to("meta")
    assert isinstance(method, GramianMethod)
    return method


def test_methods_without_history_run_on_the_device():
    assert [name for name in GRAMIAN if moved(name).on_device] == RULES
    assert len(RULES) >= 15
    assert not any(detente.get_method(name).on_device for name in GRAMIAN)
    for name, options in OPTIONAL_STATE.items():
        assert not moved(name, **options).on_device


def context(T: int) -> Context:
    return Context(tuple("abcdefghij"[:T]), losses=torch.from_numpy(each(np.arange(T))))


@pytest.mark.parametrize(("name", "T"), [*((name, 3) for name in RULES), ("mgda", 2), ("edm", 2)])
def test_no_method_asks_the_device_for_a_value(name, T):
    weights = moved(name).weights(torch.empty(4, 2, T, T, dtype=torch.float64, device="meta"), context(T))
    assert (weights.device.type, weights.dtype, weights.shape) == ("meta", torch.float64, (4, 2, T))


@pytest.mark.parametrize("name", RULES)
def test_no_method_runs_an_operation_that_waits(name):
    method, gramian = moved(name), torch.from_numpy(block(rows("random", 3)))
    with Unattended() as mode:
        method.weights(gramian, replace(context(3), losses=None) if "losses" not in method.needs else context(3))
    assert decomposition_only(mode.waited) if name in DECOMPOSED else mode.waited == []


OPTIONS = {
    "aligned_mtl": [{"scale": "median"}, {"scale": "rmse"}, {"preference": [0.2, 0.3, 0.5]}],
    "cagrad": [{"c": 0.0}, {"c": 3.0}, {"preference": [0.2, 0.3, 0.5]}, {"rescale": 1}],
    "config": [{"length": length} for length in ("min", "max", "mean", "harmonic")],
    "conicgrad": [{"c": 0.0}, {"c": 1.0}, {"preference": [0.2, 0.3, 0.5]}],
    "dualproj": [{"preference": [0.2, 0.3, 0.5]}],
    "fairgrad": [{"alpha": 0.5}, {"alpha": 1.0}],
    "mgda": [{"normalise": how} for how in ("l2", "loss", "loss+")],
    "nash_mtl": [{"max_norm": 1.0}],
    "sdmgrad": [{"strength": 0.0}, {"preference": [0.2, 0.3, 0.5]}],
    "upgrad": [{"preference": [0.2, 0.3, 0.5]}],
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sampler", matrices.SAMPLERS)
def test_methods_on_the_device_give_what_they_give_on_the_host(name, sampler):
    """The rule on tensors, through all of ``weights`` (masks, finiteness), against the rule on arrays."""
    for T in (1, 2, 3, 6):
        J = rows(sampler, T, 1)
        G = torch.from_numpy(block(J))
        wanted = detente.get_method(name).weights(G, context(T))
        seen = context(T)
        found = moved(name).weights(G, seen)
        assert found.dtype == torch.float64
        if int(seen.stats.get("unsolved", 0)):  # row scales are what the device may leave to the host
            assert sampler not in ("random", "conflicting")
            continue
        same_update(name, J, found[0].numpy(), wanted[0].numpy())


@pytest.mark.parametrize("name", OPTIONS)
def test_options_on_the_device(name):
    for options in OPTIONS[name]:
        for sampler in ("conflicting", "row_scaled"):
            J = rows(sampler, 3, 2)
            G = torch.from_numpy(block(J))
            wanted = detente.get_method(name, **options).weights(G, context(3))
            same_update(name, J, moved(name, **options).weights(G, context(3))[0].numpy(), wanted[0].numpy())


def same_update(name: str, J: Array, a: Array, b: Array) -> None:
    """Both updates, in units of what is added up; those of bargains without a solution are both zero up to it."""
    assert np.isfinite(a).all()
    size = max(np.abs(w) @ geometry.norms(J) for w in (a, b))
    assert_agrees(J.T @ a, J.T @ b, terms=size, T=len(J))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("zero_rows", ["drop", "keep"])
def test_zero_rows_on_the_device(name, zero_rows):
    J = rows("random", 4)
    J[2] = 0
    empty = np.zeros_like(J)
    one = np.zeros_like(J)
    one[1] = rows("random", 4)[1]
    G = torch.from_numpy(np.stack([j @ j.T for j in (J, empty, one)]))
    wanted = detente.get_method(name, zero_rows=zero_rows).weights(G, context(4))
    found = moved(name, zero_rows=zero_rows).weights(G, context(4))
    if zero_rows == "drop":
        assert not bool(found[0, 2])
        assert not bool(found[1].any())
    for j, a, b in zip((J, empty, one), found.numpy(), wanted.numpy(), strict=True):
        same_update(name, j, a, b)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_on_the_device_becomes_nan_there(name, value):
    G = torch.from_numpy(np.stack([block(rows("random", 3, seed))[0] for seed in range(2)]))
    G[1, 0, 2] = value
    assert bool(moved(name).weights(G, context(3)).isnan().all())


@pytest.mark.parametrize("name", RULES)
def test_many_blocks_on_the_device_are_the_loop(name):
    J = [rows(sampler, 4) for sampler in REGULAR]
    G = torch.stack([torch.from_numpy(j @ j.T) for j in J])
    whole = moved(name).weights(G, context(4)).numpy()
    for j, g, found in zip(J, G, whole, strict=True):
        same_update(name, j, found, moved(name).weights(g, context(4)).numpy())
