"""Baselines against the oracles on every listed case, and the identities that their papers promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import detente
import matrices
from reference import bargaining, baselines, directions, geometry, projections, stateful, weighting
from reference.agreement import EPS, assert_agrees, nearest
from reference.geometry import Array

ACCURATE = 1e-6  # what the project promises on every listed case
ZERO = 1e-13  # an oracle's update this short, against the shortest gradient, is what rounding left of 0

fast = settings(max_examples=40, deadline=None, derandomize=True)
generic = st.sampled_from(["random", "conflicting"])
uneven = st.sampled_from(["random", "conflicting", "row_scaled"])
samplers = st.sampled_from(sorted(matrices.SAMPLERS))
tasks = st.integers(2, 6)
seeds = st.integers(0, 10_000)


def losses_for(T: int) -> list[float]:
    """From 0.02 to 3."""
    return [0.7, 3.0, 0.02][:T] if T <= 3 else np.linspace(0.1, 3, T).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Every method on every listed case


class Rule(NamedTuple):
    make: Callable[[], detente.method.Method]
    oracle: Callable[[Array], Array]


def of_living(oracle: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The oracle on the tasks with a gradient."""

    def answer(rows: Array) -> Array:
        kept = baselines.live(rows)
        return oracle(rows[kept]) if kept.size else np.zeros(rows.shape[1])

    return answer


def cutoff(rows: Array) -> float | None:
    """The rank is that of the unit gradients: where they are independent the shortest one counts too."""
    kept = rows[baselines.live(rows)]
    if not len(kept):
        return None
    units = np.array([g / n for g, n in zip(kept, geometry.norms(kept), strict=True)])
    # sqrt(eps): what a float64 Gramian can tell from dependent
    return 0.0 if np.linalg.matrix_rank(units, tol=np.sqrt(EPS)) == len(kept) else None


def rising(T: int) -> list[float]:
    """A preference that is not uniform."""
    return (np.arange(1.0, T + 1) / np.arange(1.0, T + 1).sum()).tolist()


class Preferring(NamedTuple):
    """A method that takes a preference."""

    cls: type
    oracle: Callable[[Array, list[float]], Array]


def gdod(rows: Array) -> Array:
    """The oracle's; where norms differ by more than 1e4 with g_i . v_k = s_k Q_ik in place of the product itself.

    Of v_k the product with a gradient 1e16 times longer than s_k keeps no digit even in long double.
    """
    kept = rows[baselines.live(rows)]
    if not len(kept) or geometry.norms(kept).max() <= 1e4 * geometry.norms(kept).min():
        return baselines.gdod(rows, cutoff=cutoff(rows))
    Q, s = baselines.svd(kept)
    d = np.zeros(rows.shape[1], dtype=baselines.LONG)
    for k in range(baselines.resolved(s, cutoff(rows))):
        c = s[k] * Q[:, k]
        cosines = c / geometry.norms(kept)
        if min(cosines.max(), -cosines.min()) <= 1e-10:
            v = Q[:, k] @ kept.astype(baselines.LONG)
            d += c.sum() * v / np.sqrt(np.dot(v, v))
    return d.astype(float)


def drawn_orders(T: int) -> list[list[int]]:
    """What PCGrad and GradVac draw first from the seed 0: for each task the others in the order it meets them."""
    keys = torch.rand(T, T, generator=torch.Generator().manual_seed(0))
    return keys.fill_diagonal_(-1).argsort(1)[:, 1:].tolist()


def drawn_uniforms(P: int) -> Array:
    return torch.rand(P, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()


RULES = {
    "gd": Rule(detente.GD, directions.gd),
    "gd mean": Rule(lambda: detente.GD(reduction="mean"), lambda J: directions.gd(J) / len(J)),
    "mgda": Rule(detente.MGDA, lambda J: baselines.mgda(J)[1]),
    "mgda l2": Rule(lambda: detente.MGDA("l2"), lambda J: baselines.mgda(J, "l2")[1]),
    "mgda loss": Rule(lambda: detente.MGDA("loss"), lambda J: baselines.mgda(J, "loss", losses_for(len(J)))[1]),
    "mgda loss+": Rule(lambda: detente.MGDA("loss+"), lambda J: baselines.mgda(J, "loss+", losses_for(len(J)))[1]),
    "edm": Rule(detente.EDM, of_living(lambda J: directions.edm(J)[1])),
    "cdtt, warming up": Rule(detente.CDTT, of_living(lambda J: directions.edm(J)[1])),
    "cagrad c=0.4": Rule(lambda: detente.CAGrad(c=0.4), of_living(lambda J: directions.cagrad(J, 0.4))),
    "cagrad c=0.9": Rule(lambda: detente.CAGrad(c=0.9), of_living(lambda J: directions.cagrad(J, 0.9))),
    "nash_mtl": Rule(detente.NashMTL, lambda J: bargaining.nash(J).d),
    "fairgrad 0.5": Rule(lambda: detente.FairGrad(0.5), lambda J: bargaining.fairgrad(J, 0.5).d),
    "fairgrad 1": Rule(lambda: detente.FairGrad(1.0), lambda J: bargaining.fairgrad(J, 1.0).d),
    "fairgrad 2": Rule(lambda: detente.FairGrad(2.0), lambda J: bargaining.fairgrad(J, 2.0).d),
    "imtl_g": Rule(detente.IMTLG, lambda J: baselines.imtl_g(J)[1]),
    "imtl, first step": Rule(detente.IMTL, lambda J: baselines.imtl_g(J)[1]),
    "config": Rule(detente.ConFIG, baselines.config),
    "aligned_mtl min": Rule(detente.AlignedMTL, lambda J: baselines.aligned_mtl(J, cutoff=cutoff(J))[1]),
    "aligned_mtl median": Rule(
        lambda: detente.AlignedMTL("median"), lambda J: baselines.aligned_mtl(J, "median", cutoff=cutoff(J))[1]
    ),
    "aligned_mtl rmse": Rule(
        lambda: detente.AlignedMTL("rmse"), lambda J: baselines.aligned_mtl(J, "rmse", cutoff=cutoff(J))[1]
    ),
    "upgrad": Rule(detente.UPGrad, baselines.upgrad),
    "dualproj": Rule(detente.DualProj, baselines.dualproj),
    "gradops": Rule(detente.GradOPS, baselines.gradops),
    "gdod": Rule(detente.GDOD, lambda J: gdod(J)),
    "sdmgrad 0": Rule(lambda: detente.SDMGrad(0.0), lambda J: baselines.sdmgrad(J, 0.0)[1]),
    "sdmgrad 0.3": Rule(lambda: detente.SDMGrad(0.3), lambda J: baselines.sdmgrad(J, 0.3)[1]),
    "sdmgrad 2": Rule(lambda: detente.SDMGrad(2.0), lambda J: baselines.sdmgrad(J, 2.0)[1]),
    "conicgrad 0.5": Rule(lambda: detente.ConicGrad(0.5), lambda J: baselines.conicgrad(J, 0.5)[0]),
    "conicgrad 0.9": Rule(lambda: detente.ConicGrad(0.9), lambda J: baselines.conicgrad(J, 0.9)[0]),
    "pcgrad, drawn orders": Rule(detente.PCGrad, lambda J: projections.pcgrad(J, drawn_orders(len(J)))),
    "gradvac, drawn orders": Rule(
        detente.GradVac, lambda J: stateful.gradvac(J, drawn_orders(len(J)), np.zeros((len(J), len(J))), 0.5)[0]
    ),
    "graddrop, drawn": Rule(detente.GradDrop, lambda J: baselines.graddrop(J, drawn_uniforms(J.shape[1]))),
    "graddrop leak, slope": Rule(
        lambda: detente.GradDrop(leak=0.3, slope=2.0),
        lambda J: baselines.graddrop(J, drawn_uniforms(J.shape[1]), 0.3, 2.0),
    ),
    "modo, first step": Rule(
        lambda: detente.MoDo(gamma=0.01, rho=0.1, zero_rows="keep"), lambda J: stateful.modo([J], 0.01, 0.1)[0][1]
    ),
    "excess_mtl, first step": Rule(detente.ExcessMTL, directions.gd),
    "db_mtl, first step": Rule(detente.DBMTL, lambda J: stateful.db_mtl([(J, losses_for(len(J)))])[0]),
    "si": Rule(detente.SI, lambda J: directions.gd(J, baselines.si(losses_for(len(J))))),
    "gls": Rule(detente.GLS, lambda J: directions.gd(J, weighting.gls(losses_for(len(J))))),
}
PREFERRING = {
    "upgrad": Preferring(detente.UPGrad, baselines.upgrad),
    "dualproj": Preferring(detente.DualProj, baselines.dualproj),
    "aligned_mtl": Preferring(
        detente.AlignedMTL,
        # a preference p of T tasks stands for the weights T p, T the number of living ones
        lambda J, p: len(baselines.live(J)) * baselines.aligned_mtl(J, "min", baselines_shares(J, p), cutoff(J))[1],
    ),
}

NOT_UNIQUE = "0 lies in the hull of the scaled gradients: many weights reach it, and the raw gradients tell them apart"
EXCLUDED = {
    ("mgda l2", "T = 100, n = 20"): NOT_UNIQUE,
    ("mgda loss", "T = 100, n = 20"): NOT_UNIQUE,
    ("mgda loss+", "T = 100, n = 20"): NOT_UNIQUE,
}


def baselines_shares(J: Array, p: list[float]) -> Array:
    """A preference divided by its sum over the living tasks, one entry per row."""
    kept = baselines.live(J)
    return baselines.spread(baselines.shares(kept, p), kept, len(J))


def error(d: Array, expected: Array, rows: Array, degree: float = 1.0) -> float:
    """Relative to the expected update; where that is 0, to the sum of the gradients' lengths."""
    n = geometry.norms(rows)
    unit = n[n > 0].min() ** degree if (n > 0).any() else 1.0  # what the update is measured in
    length, off = float(np.linalg.norm(expected)), float(np.linalg.norm(d - expected))
    if length <= ZERO * unit:
        return off / n.sum() if off > 0 else 0.0
    return off / length


def check(make: Callable[[], detente.method.Method], expected: Array, J: Tensor) -> float:
    method = make()
    d = detente.aggregate(J, method, losses=losses_for(len(J))).numpy()
    assert np.isfinite(d).all()
    return error(d, expected, J.numpy(), 1.0 if method.homogeneity is None else method.homogeneity)


@pytest.mark.parametrize("case", matrices.LISTED)
@pytest.mark.parametrize("name", RULES)
def test_listed_cases(name, case):
    if (name, case) in EXCLUDED:
        check_optimal(name, matrices.LISTED[case])
        return
    J = matrices.LISTED[case]
    off = check(RULES[name].make, RULES[name].oracle(J.numpy()), J)
    assert off <= ACCURATE, f"{name} on {case}: off by {off:.1e}"


def check_optimal(name: str, J: Tensor) -> None:
    """Where the weights are not unique: they lie on the simplex and reach the hull's shortest point, 0."""
    rows, L = J.numpy(), np.array(losses_for(len(J)))
    n = geometry.norms(rows)
    context = detente.method.Context(tuple(map(str, range(len(J)))), losses=torch.from_numpy(L))
    w = RULES[name].make().weights(J @ J.T, context).numpy()
    scale = {"mgda l2": n, "mgda loss": L, "mgda loss+": L * n}[name]
    assert w.min() >= 0
    assert w.sum() == pytest.approx(1, abs=1e-12)  # a sum of 100 rounded numbers
    # sqrt(eps): a vector of which only the squared length can be seen
    assert np.linalg.norm((w / scale) @ rows) <= 10 * np.sqrt(EPS) * (w / scale) @ n


def test_the_excluded_cases_exist():
    assert all(name in RULES and case in matrices.LISTED for name, case in EXCLUDED)


@pytest.mark.parametrize("case", matrices.LISTED)
@pytest.mark.parametrize("name", PREFERRING)
def test_listed_cases_with_a_preference(name, case):
    J = matrices.LISTED[case]
    rule, p = PREFERRING[name], rising(len(J))
    off = check(lambda: rule.cls(preference=p), rule.oracle(J.numpy(), p), J)
    assert off <= ACCURATE, f"{name} on {case}: off by {off:.1e}"


FEW = [case for case, J in matrices.LISTED.items() if len(J) <= 3]
ORDERED: dict[str, tuple[Callable[[int], detente.method.Method], Callable[[Array], Array]]] = {
    "pcgrad": (lambda seed: detente.PCGrad(seed=seed), projections.pcgrad_results),
    # the first target is 0, which makes every correction PCGrad's
    "gradvac": (lambda seed: detente.GradVac(seed=seed), projections.pcgrad_results),
    **{
        f"wpcgrad {mode}": (
            lambda seed, mode=mode: detente.WPCGrad(mode=mode, seed=seed),
            lambda J, mode=mode: projections.wpcgrad_results(J, mode),
        )
        for mode in ("sequence", "anchor", "sequence_original")
    },
}


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("name", ORDERED)
def test_listed_cases_in_every_order(name, case):
    J = matrices.LISTED[case]
    make, every = ORDERED[name]
    results = every(J.numpy())
    for seed in range(4):
        d = detente.aggregate(J, make(seed)).numpy()
        off = error(d, nearest(d, results), J.numpy())
        assert off <= ACCURATE, f"{name} on {case}: off by {off:.1e}"


@pytest.mark.parametrize("case", [c for c in matrices.LISTED if c not in FEW])
@pytest.mark.parametrize("mode", ["sequence", "anchor", "sequence_original"])
def test_wpcgrad_on_many_tasks(mode, case):
    """In the order that the method itself draws."""
    J = matrices.LISTED[case]
    order = detente.WPCGrad(mode=mode).draw(torch.full((len(J),), 1 / len(J), dtype=torch.float64))
    off = check(lambda: detente.WPCGrad(mode=mode), projections.wpcgrad(J.numpy(), order, mode), J)
    assert off <= ACCURATE, f"wpcgrad {mode} on {case}: off by {off:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# Identities. Coefficients come from cosines that are rounded at eps, so that a product u_i . d is known to
# `noise` = 64 T eps times the length of what d adds up, and no better than 1e-9 of its own size where conditioning
# enters (the generic samplers stay below a condition of about 1e6).


def sample(name: str, T: int, seed: int) -> tuple[Tensor, Array, Array, Array]:
    """J as a tensor and an array, norms and unit gradients."""
    J = matrices.SAMPLERS[name](T, seed)
    rows = J.numpy()
    n = geometry.norms(rows)
    return J, rows, n, rows / n[:, None]


def solve(method, J: Tensor, losses=None) -> tuple[Array, Array]:
    """(coefficients, d); d from the coefficients of unit gradients, small ones first to the digit."""
    context = detente.method.Context(
        tuple(map(str, range(len(J)))), losses=None if losses is None else torch.tensor(losses, dtype=torch.float64)
    )
    a = method.weights(J @ J.T, context).numpy()
    return a, a @ J.numpy()


def noise(T: int, terms: float) -> float:
    return 64 * T * EPS * terms


def aligned(a: Array, b: Array) -> float:
    """Length of the difference of the directions."""
    return float(np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b)))


def condition(U: Array) -> float:
    return float(np.linalg.cond(U)) ** 2


@fast
@given(uneven, tasks, seeds)
def test_imtl_g_has_equal_projections(name, T, seed):
    J, _, n, U = sample(name, T, seed)
    a, d = solve(detente.IMTLG(), J)
    along = U @ d
    terms = np.abs(a) @ n
    assert np.ptp(along) <= 1e-9 * abs(along).max() + noise(T, terms)
    assert a.sum() == pytest.approx(1, abs=8 * T * EPS * np.abs(a).sum())  # the sum's own rounding


@fast
@given(uneven, tasks, seeds)
def test_nash_bargains_equal_gains(name, T, seed):
    J, rows, n, U = sample(name, T, seed)
    a, d = solve(detente.NashMTL(), J)
    gains = (a * n) * (U @ d)
    allowed = 1e-9 + noise(T, (a @ n) * (a * n).max())
    assert (a > 0).all()
    assert np.abs(gains - 1).max() <= allowed
    assert np.linalg.norm(d) == pytest.approx(np.sqrt(T), rel=allowed)
    # rescaling a loss changes nothing at all
    s = 10 ** np.linspace(-3, 3, T)
    b, e = solve(detente.NashMTL(), torch.from_numpy(s[:, None] * rows))
    assert np.linalg.norm(e - d) <= allowed * np.sqrt(T)
    assert np.abs(b * s / a - 1).max() <= allowed * condition(U)


@fast
@given(uneven, tasks, seeds, st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_fairgrad_equation(name, T, seed, alpha):
    J, _, n, U = sample(name, T, seed)
    w, d = solve(detente.FairGrad(alpha), J)
    assert (w > 0).all()
    wanted = w ** (-1 / alpha)
    assert (np.abs(n * (U @ d) - wanted) <= 1e-9 * wanted + noise(T, w @ n) * n).all()
    total = (w ** (1 - 1 / alpha)).sum()
    assert d @ d == pytest.approx(total, abs=1e-9 * total + noise(T, w @ n) * (w @ n))
    homogeneous = solve(detente.FairGrad(alpha), 10 * J)[1] / 10 ** ((1 - alpha) / (1 + alpha))
    # J and 10 J round differently, at eps, which the condition of the cosines amplifies
    assert np.linalg.norm(homogeneous - d) <= 1e-9 * np.linalg.norm(d) + noise(T, w @ n) * condition(U)


@fast
@given(uneven, tasks, seeds)
def test_nash_is_fairgrad_of_alpha_one(name, T, seed):
    J, _, n, _ = sample(name, T, seed)
    a, d = solve(detente.NashMTL(), J)
    assert_agrees(solve(detente.FairGrad(1.0), J)[1], d, terms=a @ n, T=T)


@fast
@given(uneven, tasks, seeds, st.sampled_from(["min", "median", "rmse"]))
def test_aligned_gradients_have_equal_singular_values(name, T, seed, scale):
    J, _, _, U = sample(name, T, seed)
    # with the preference e_i the coefficients are T B e_i
    B = np.array([solve(detente.AlignedMTL(scale, np.eye(T)[i].tolist()), J)[0] / T for i in range(T)])
    s = np.linalg.svd(B @ J.numpy(), compute_uv=False)
    # B undoes the spectrum of J, each part of which is known relative to itself, to eps times the cosines' condition
    assert np.ptp(s) <= 64 * T * EPS * condition(U) * s[0]
    d = solve(detente.AlignedMTL(scale), J)[1]
    assert np.linalg.norm(B.sum(0) @ J.numpy() - d) <= 64 * T * EPS * condition(U) * s[0] * np.sqrt(T)


@fast
@given(tasks, seeds, st.floats(0.01, 100))
def test_orthogonal_gradients_of_one_length_are_aligned_already(T, seed, length):
    J = length * torch.from_numpy(np.linalg.qr(matrices.normal(T + 3, T, seed).numpy())[0].T.copy())
    for scale in ("min", "median", "rmse"):
        d = detente.aggregate(J, detente.AlignedMTL(scale))
        assert torch.allclose(d, J.sum(0), rtol=0, atol=1e-13 * length * T)  # a few roundings of T terms


@fast
@given(samplers, tasks, seeds)
def test_dual_cone_optimality(name, T, seed):
    """v >= p, u_i . d >= 0, and one of both with equality: DualProj with p = 1/T, UPGrad's projections with p = e_i."""
    J, rows, n, U = sample(name, T, seed)
    parts = []
    for method, p in [
        (detente.DualProj(), np.full(T, 1 / T)),
        (detente.DualProj(rising(T)), np.array(rising(T))),
        *((detente.UPGrad(np.eye(T)[i].tolist()), np.eye(T)[i]) for i in range(T)),
    ]:
        v, d = solve(method, J)
        parts.append((v, d))
        terms = np.abs(v) @ n
        along = U @ d
        pull = (v - p) * n
        size = max(np.linalg.norm(p @ rows), n.min())
        assert pull.min() >= -noise(T, terms)
        assert along.min() >= -noise(T, terms)
        # 1e-8: exactly dependent gradients leave single multipliers to rounding
        assert (np.minimum(np.abs(pull), np.abs(along)) <= 1e-8 * size + noise(T, terms)).all()
    # UPGrad is the average of the projections, and weighted with s where row i is scaled by s_i
    each = np.array([v for v, _ in parts[2:]])
    vectors = np.array([d for _, d in parts[2:]])
    reach = (np.abs(each) @ n).mean()
    assert_agrees(detente.aggregate(J, detente.UPGrad()), vectors.mean(0), terms=reach, T=T)
    s = 10 ** np.linspace(-2, 2, T)
    scaled = detente.aggregate(torch.from_numpy(s[:, None] * rows), detente.UPGrad())
    assert_agrees(scaled, s @ vectors / T, terms=s @ (np.abs(each) @ n) / T, T=T)
    assert_agrees(detente.aggregate(J, detente.UPGrad(rising(T))), np.array(rising(T)) @ vectors, terms=T * reach, T=T)


@fast
@given(uneven, tasks, seeds)
def test_config_has_equal_positive_cosines(name, T, seed):
    J, rows, n, U = sample(name, T, seed)
    a, d = solve(detente.ConFIG(), J)
    size = np.linalg.norm(d)
    cosines = U @ d / size
    allowed = 1e-9 + noise(T, np.abs(a) @ n / size)
    assert np.ptp(cosines) <= allowed
    assert cosines.min() > 0
    assert size == pytest.approx((rows @ d).sum() / size, rel=allowed / cosines.min())
    by_length = {"min": n.min(), "max": n.max(), "mean": n.mean(), "harmonic": T / (1 / n).sum()}
    for length, wanted in by_length.items():
        e = solve(detente.ConFIG(length), J)[1]
        assert np.linalg.norm(e) == pytest.approx(wanted, rel=allowed * condition(U))
        assert aligned(e, d) <= allowed


@fast
@given(uneven, st.integers(3, 6), seeds)
def test_imtl_g_config_and_edm_share_a_line(name, T, seed):
    """IMTL-G up to sign; EDM where it holds every task."""
    J, _, n, U = sample(name, T, seed)
    d = solve(detente.ConFIG(), J)[1]
    e = solve(detente.IMTLG(), J)[1]
    allowed = 1e-9 + noise(T, condition(U))
    assert aligned(d, np.sign(e @ d) * e) <= allowed
    beta, f = solve(detente.EDM(), J)
    if (beta * n).min() > 1e-6 * (beta * n).max():
        assert aligned(d, f) <= allowed


@fast
@given(uneven, seeds)
def test_two_tasks_share_the_bisector(name, seed):
    J, rows, n, U = sample(name, 2, seed)
    bisector = n[1] * rows[0] / n.max() + n[0] * rows[1] / n.max()
    for method in (detente.EDM(), detente.IMTLG(), detente.NashMTL(), detente.ConFIG(), detente.FairGrad(1.0)):
        d = detente.aggregate(J, method).numpy()
        # u_1 + u_2 cancels: its length is known to eps times the condition
        assert aligned(d, bisector) <= 1e-12 + 64 * EPS * condition(U), method.name


SCALE_FREE = {
    "edm": detente.EDM,
    "imtl_g": detente.IMTLG,
    "nash_mtl": detente.NashMTL,
    "config": detente.ConFIG,
    "fairgrad": lambda: detente.FairGrad(1.0),
}


@pytest.mark.parametrize("method", SCALE_FREE)
def test_rescaling_one_loss_keeps_the_direction(method):
    for seed in range(10):
        for T in (2, 3, 5):
            J, rows, _, U = sample("conflicting" if seed % 2 else "random", T, seed)
            d = detente.aggregate(J, SCALE_FREE[method]()).numpy()
            for s in (1e-8, 1e-3, 1e4):
                scaled = rows.copy()
                scaled[T // 2] *= s
                e = detente.aggregate(torch.from_numpy(scaled), SCALE_FREE[method]()).numpy()
                if method == "imtl_g":
                    e = np.sign(e @ d) * e  # its coefficients sum to 1 whatever the sign of the direction
                assert aligned(e, d) <= 1e-9 + 64 * T * EPS * condition(U)


@fast
@given(generic, tasks, seeds)
def test_gradops_conflicts_with_nobody(name, T, seed):
    J, rows, n, U = sample(name, T, seed)
    a, d = solve(detente.GradOPS(), J)
    allowed = noise(T, np.abs(a) @ n) * condition(U)
    for i in range(T):
        # strongly: g_k . d is its own part's share plus unchanged gradients that conflict with nobody
        friends = [j for j in range(T) if (rows[j] @ rows.T >= 0).all() and j != i]
        assert U[i] @ d >= sum(U[i] @ rows[j] for j in friends) - allowed
    if T == 2:
        assert_agrees(detente.aggregate(J, detente.PCGrad()), d, terms=np.abs(a) @ n, T=2)
    assert_agrees(detente.aggregate(J.abs(), detente.GradOPS()), np.abs(rows).sum(0), terms=n.sum(), T=T)


@fast
@given(uneven, tasks, seeds, st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_conicgrad_stays_in_its_cone(name, T, seed, c):
    J, rows, n, U = sample(name, T, seed)
    g0 = rows.mean(0)
    length = np.linalg.norm(g0)
    a, d = solve(detente.ConicGrad(c), J)
    allowed = 1e-9 + noise(T, np.abs(a) @ n / length)
    size = np.linalg.norm(d)
    assert size == pytest.approx(length, rel=allowed)
    assert g0 @ d / length / size >= c - allowed
    # no worse for the worst-off task than the mean gradient, or than MGDA's direction if that is in the cone
    floor = allowed * n.min() + noise(T, n.min())
    assert (rows @ d).min() >= (rows @ g0).min() - (floor + 64 * EPS * n.max()) * length
    v = geometry.min_norm(rows)[1]
    if g0 @ v >= c * length * np.linalg.norm(v):
        assert aligned(d, v) <= 1e-9 + 64 * T * EPS * condition(U)


@fast
@given(uneven, tasks, seeds)
def test_conicgrad_limits(name, T, seed):
    J, rows, n, U = sample(name, T, seed)
    assert_agrees(detente.aggregate(J, detente.ConicGrad(1.0)), rows.mean(0), terms=n.mean(), T=T)
    p = rising(T)
    assert_agrees(detente.aggregate(J, detente.ConicGrad(1.0, p)), np.array(p) @ rows, terms=n.mean() * T, T=T)
    half = detente.aggregate(J, detente.ConicGrad(0.0)).numpy()  # the half space never binds: g0 . v >= ||v||^2
    assert aligned(half, geometry.min_norm(rows)[1]) <= 1e-9 + 64 * T * EPS * condition(U)


@fast
@given(samplers, tasks, seeds)
def test_sdmgrad_between_mgda_and_the_mean(name, T, seed):
    J, rows, n, _ = sample(name, T, seed)
    w, v = geometry.min_norm(rows)
    assert_agrees(detente.aggregate(J, detente.SDMGrad(0.0)), v, terms=w @ n, T=T)
    for strength in (0.1, 1.0, 10.0):
        if name == "row_scaled":
            break  # g_w is read off d - g0 below, where 1e8 hides what 1e-8 decides; the oracle has these cases
        a, d = solve(detente.SDMGrad(strength), J)
        assert a.sum() == pytest.approx(1, abs=1e-9)  # the solver's own tolerance on the constraint
        assert a.min() >= strength / (1 + strength) / T - 1e-12
        # optimal: no single gradient improves on g_w, in units of the gradient
        g_w = (1 + strength) * d - strength * rows.mean(0)
        terms = (1 + strength) * (np.abs(a) @ n)
        best = (g_w / np.linalg.norm(g_w)) @ d if np.linalg.norm(g_w) > 0 else 0.0
        share = np.linalg.norm(g_w) / n
        assert (rows @ d / n >= best * share - 1e-8 * np.linalg.norm(d) * share - noise(T, terms)).all()
    far = detente.aggregate(J, detente.SDMGrad(1e8)).numpy()
    assert np.linalg.norm(far - rows.mean(0)) <= 1e-8 * 2 * n.max() + noise(T, n.mean())  # the hull's share: 1 / 1e8


@fast
@given(uneven, tasks, seeds)
def test_mgda_of_unit_gradients_has_edms_weights(name, T, seed):
    J, rows, n, _ = sample(name, T, seed)
    w = solve(detente.MGDA("l2"), J)[0]
    beta, d = solve(detente.EDM(), J)
    shares = w / n / (w / n).sum()
    assert np.linalg.norm(shares @ rows - d) <= 1e-9 * np.linalg.norm(d) + noise(T, beta @ n) * 1e3
    L = 10 ** np.linspace(-1, 1, T)
    by_loss = solve(detente.MGDA("loss"), J, L.tolist())[0]
    assert_agrees(by_loss @ (rows / L[:, None]), geometry.min_norm(rows / L[:, None])[1], terms=(n / L).min(), T=T)


@fast
@given(samplers, st.integers(1, 6), seeds)
def test_gradvac_starts_as_pcgrad(name, T, seed):
    """Target 0 and one seed: the same orders, the same corrections; with beta = 0 in every step."""
    one, other = detente.GradVac(beta=0.0, seed=seed), detente.PCGrad(seed=seed)
    for step in range(4):
        J, _, n, _ = sample(name, T, seed + step)
        assert_agrees(detente.aggregate(J, one), detente.aggregate(J, other), terms=n.sum(), T=T)


@fast
@given(samplers, tasks, seeds)
def test_gdod_conflicts_with_nobody(name, T, seed):
    J, _, n, U = sample(name, T, seed)
    a, d = solve(detente.GDOD(), J)
    # components of less than 1e-10 of a gradient count as none
    assert (U @ d).min() >= -noise(T, np.abs(a) @ n) - T * 1e-10 * n.sum()


def test_gdod_keeps_orthogonal_gradients():
    J = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    assert detente.aggregate(J, detente.GDOD()).tolist() == pytest.approx([3.0, 2.0, 1.0], rel=1e-14)  # few roundings


AGREEING = {
    "pcgrad": (detente.PCGrad, "sum"),
    "wpcgrad": (detente.WPCGrad, "sum"),
    "gradvac": (detente.GradVac, "sum"),
    "gradops": (detente.GradOPS, "sum"),
    "graddrop": (detente.GradDrop, "sum"),
    "gd": (detente.GD, "sum"),
    "upgrad": (detente.UPGrad, "mean"),
    "dualproj": (detente.DualProj, "mean"),
}


@pytest.mark.parametrize("method", AGREEING)
def test_without_conflict(method):
    make, reduction = AGREEING[method]
    for T in (1, 2, 3, 6):
        for seed in range(5):
            J = matrices.random(T, seed).abs()
            wanted = J.sum(0) if reduction == "sum" else J.mean(0)
            # sums of T terms in another order
            assert torch.allclose(detente.aggregate(J, make()), wanted, rtol=0, atol=4 * T * EPS * float(J.norm()))


CONFLICT_FREE = {
    "mgda": detente.MGDA,
    "edm": detente.EDM,
    "nash_mtl": detente.NashMTL,
    "fairgrad": detente.FairGrad,
    "upgrad": detente.UPGrad,
    "dualproj": detente.DualProj,
    "config": detente.ConFIG,
    "gradops": detente.GradOPS,
    "gdod": detente.GDOD,
}
STRICTLY = ("nash_mtl", "fairgrad", "config")


@pytest.mark.parametrize("method", CONFLICT_FREE)
def test_full_rank_gradients_are_never_hurt(method):
    for name in ("random", "conflicting", "row_scaled"):
        for T in (2, 3, 5):
            for seed in range(6):
                J, _, n, U = sample(name, T, seed)
                a, d = solve(CONFLICT_FREE[method](), J)
                along = U @ d
                assert along.min() >= -noise(T, np.abs(a) @ n)
                if method in STRICTLY:
                    assert along.min() > 0


DEGREES = {
    "gd": 1, "mgda": 1, "edm": 1, "cagrad": 1, "pcgrad": 1, "wpcgrad": 1, "cdtt": None, "imtl_g": 1, "nash_mtl": 0,
    "fairgrad": -1 / 3, "aligned_mtl": 1, "upgrad": 1, "dualproj": 1, "config": 1, "gradvac": 1, "gradops": 1,
    "graddrop": 1, "gdod": 1, "conicgrad": 1, "sdmgrad": 1,
}  # fmt: skip


def test_declared_degrees_are_those_of_the_papers():
    """The conformance suite holds every method to the degree it declares; here is what they have to declare."""
    for name, degree in DEGREES.items():
        assert detente.get_method(name).homogeneity == (None if degree is None else pytest.approx(degree)), name


ROTATABLE = ["mgda", "edm", "cagrad", "nash_mtl", "fairgrad", "imtl_g", "config", "aligned_mtl", "upgrad", "dualproj",
             "gradops", "gdod", "sdmgrad", "conicgrad", "pcgrad", "wpcgrad", "gradvac"]  # fmt: skip


@pytest.mark.parametrize("method", ROTATABLE)
def test_rotating_the_parameters_rotates_the_update(method):
    for seed in range(4):
        J = matrices.conflicting(4, seed)
        P = J.shape[1]
        Q = torch.from_numpy(np.linalg.qr(matrices.normal(P, P, 50 + seed).numpy())[0])
        d, e = (detente.aggregate(X, detente.get_method(method)) for X in (J, J @ Q))
        # the rotation rounds every entry at eps; the samples' condition is below 1e4
        assert torch.allclose(e, d @ Q, rtol=0, atol=1e-11 * float(d.norm()))


# GradDrop, per coordinate


@fast
@given(tasks, seeds)
def test_graddrop_keeps_one_sign(T, seed):
    J = matrices.normal(T, 30, seed)
    J[:, :5], J[:, 5:10], J[:, 10] = J[:, :5].abs(), -J[:, 5:10].abs(), 0.0
    d = detente.aggregate(J, detente.GradDrop(seed=seed))
    up, down = J.clamp_min(0).sum(0), J.clamp_max(0).sum(0)
    # one sign: unchanged, but for the order of the sums
    assert torch.allclose(d[:10], J[:, :10].sum(0), rtol=1e-14, atol=0)
    assert d[10] == 0
    near = torch.minimum((d - up).abs(), (d - down).abs())
    assert bool((near <= 4 * T * EPS * J.abs().sum(0)).all())  # the order of sums
    leaking = detente.aggregate(J, detente.GradDrop(leak=1.0, seed=seed))
    assert torch.allclose(leaking, J.sum(0), rtol=0, atol=4 * T * EPS * float(J.abs().max()))
    order = torch.randperm(T, generator=matrices.generator(seed))
    assert torch.allclose(detente.aggregate(J[order], detente.GradDrop(seed=seed)), d, rtol=1e-13, atol=1e-13)
    partly = detente.aggregate(J, detente.GradDrop(leak=0.25, seed=seed))
    assert torch.allclose(partly, 0.25 * J.sum(0) + 0.75 * d, rtol=0, atol=8 * T * EPS * float(J.abs().sum(0).max()))


def test_graddrop_chances():
    """The positive side survives with f(P); 4.5 sigma of a binomial, seeded."""
    J = torch.tensor([[3.0], [-1.0]], dtype=torch.float64).expand(2, 20_000)
    for slope, chance in ((1.0, 0.75), (0.5, 0.625), (1.6, 0.9), (4.0, 1.0)):
        kept = (detente.aggregate(J, detente.GradDrop(slope=slope)) == 3).double().mean()
        assert abs(float(kept) - chance) <= 4.5 * np.sqrt(chance * (1 - chance) / 20_000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("drawn", [0.0, 2.0**-60, 1 - 2.0**-53])
def test_graddrop_passes_agreement_whatever_it_draws(monkeypatch, drawn, dtype):
    """Also where the number drawn is nearer to 1 than the gradients' precision can tell."""
    J = torch.tensor([[1.0, -1.0], [2.0, -0.5]], dtype=dtype)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, drawn, dtype=torch.float64))
    assert detente.aggregate(J, detente.GradDrop()).tolist() == [3.0, -1.5]


# Losses


def test_si_and_gls_share_their_direction_and_ignore_units():
    J, L = matrices.random(3), np.array(losses_for(3))
    s = np.array([3.0, 0.01, 700.0])
    si = detente.aggregate(J, detente.SI(), losses=L).numpy()
    assert aligned(si, detente.aggregate(J, detente.GLS(), losses=L).numpy()) <= 1e-14  # few roundings
    scaled = detente.aggregate(torch.from_numpy(s)[:, None] * J, detente.SI(), losses=s * L).numpy()
    assert np.linalg.norm(scaled - si) <= 1e-14 * np.linalg.norm(si)
