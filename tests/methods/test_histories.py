"""Baselines with a history, over whole runs, against plain loops; and those that need a whole training step."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import detente
import matrices
from reference import bargaining, baselines, directions, geometry, stateful
from reference.geometry import Array

STEPS = 12
EXACT = 1e-12  # the same arithmetic in another order, over a dozen steps
SOLVED = 1e-8  # a T x T problem is solved in between, on cosines of a condition up to 1e6
NAMES = "abcde"


def close(actual, expected, tolerance: float) -> None:
    a, b = np.asarray(actual, dtype=float), np.asarray(expected, dtype=float)
    assert a.shape == b.shape
    off, size = np.linalg.norm(a - b), np.linalg.norm(b)
    assert off <= tolerance * size, f"off by {off / max(size, 1e-300):.1e}"


def gradients(T: int, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    """Slowly turning, half of them conflicting."""
    base = matrices.conflicting(T, seed)
    return [scale * (base + 0.7 * matrices.normal(*base.shape, 100 * seed + k + 1)) for k in range(STEPS)]


def loss_values(T: int, seed: int = 0) -> list[list[float]]:
    return (10 ** (0.5 * matrices.normal(STEPS, T, 50 + seed))).tolist()


def arrays(steps: list[Tensor]) -> list[Array]:
    return [J.numpy() for J in steps]


def updates(method, steps: list[Tensor], losses=None) -> list[Array]:
    losses = [None] * len(steps) if losses is None else losses
    return [detente.aggregate(J, method, losses=L).numpy() for J, L in zip(steps, losses, strict=True)]


def weights(method, losses: list[float], names: str | None = None) -> list[float]:
    context = None if names is None else detente.method.Context(tuple(names))
    return method.weights(torch.tensor(losses, dtype=torch.float64), context).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Runs with all tasks


@pytest.mark.parametrize("T", [2, 3, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.9, "gamma": 0.02, "decay": 0.0, "rho": 0.3},
        {"beta": 1.0, "gamma": 0.5, "decay": 0.75},
        {"beta": 0.1, "gamma": 0.0},
    ],
    ids=str,
)
def test_moco(T, options):
    steps = gradients(T, 1, 0.3)
    given = {"beta": 0.5, "gamma": 0.1, "decay": 0.5, "rho": 0.0} | options
    expected = stateful.moco(arrays(steps), given["beta"], given["gamma"], given["rho"], given["decay"])
    method = detente.MoCo(**options)
    for d, (lam, wanted) in zip(updates(method, steps), expected, strict=True):
        close(d, wanted, EXACT)
        assert lam.sum() == pytest.approx(1, abs=1e-12)
    close([float(method.shares[str(i)]) for i in range(T)], expected[-1][0], EXACT)


@pytest.mark.parametrize("T", [2, 3, 5])
@pytest.mark.parametrize(("gamma", "rho"), [(0.1, 0.0), (0.01, 0.5), (3.0, 0.1)])
def test_modo(T, gamma, rho):
    steps = gradients(T, 2, 0.3)
    expected = stateful.modo(arrays(steps), gamma, rho)
    for d, (_, wanted) in zip(updates(detente.MoDo(gamma=gamma, rho=rho), steps), expected, strict=True):
        close(d, wanted, EXACT)


@pytest.mark.parametrize("T", [1, 2, 3, 5])
@pytest.mark.parametrize("eta", [0.0, 0.01, 1.0])
def test_excess_mtl(T, eta):
    steps = gradients(T, 3)
    expected = stateful.excess_mtl(arrays(steps), eta)
    for d, (w, wanted) in zip(updates(detente.ExcessMTL(eta=eta), steps), expected, strict=True):
        close(d, wanted, EXACT)
        assert w.sum() == pytest.approx(T, rel=1e-12)


def test_excess_mtl_ignores_the_unit_of_a_loss():
    """Up to the 1e-7 under the root, which is 1e-7 of the smallest squared gradients here."""
    steps, s = gradients(3, 3), torch.tensor([[30.0], [1.0], [0.5]], dtype=torch.float64)
    one, other = detente.ExcessMTL(eta=0.5), detente.ExcessMTL(eta=0.5)
    for J in steps:
        detente.aggregate(J, one)
        detente.aggregate(s * J, other)
        assert list(other.shares.values()) == pytest.approx(list(one.shares.values()), rel=1e-4)


@pytest.mark.parametrize("T", [1, 2, 3, 5])
@pytest.mark.parametrize(("beta", "decay"), [(0.9, 0.0), (0.5, 0.5), (0.1, 1.0), (0.0, 0.0)])
def test_db_mtl(T, beta, decay):
    steps, losses = gradients(T, 4), loss_values(T, 4)
    if T > 1:
        steps[0][1] = 0.0  # an average of length 0 is left out
        steps[5][0] = 0.0  # one with a past is not
    expected = stateful.db_mtl(list(zip(arrays(steps), losses, strict=True)), beta, decay)
    for d, wanted in zip(updates(detente.DBMTL(beta=beta, decay=decay), steps, losses), expected, strict=True):
        close(d, wanted, EXACT)


@pytest.mark.parametrize("T", [2, 3, 5])
@pytest.mark.parametrize(("alpha", "lr"), [(1.5, 0.025), (0.0, 0.1), (0.12, 0.05)])
def test_gradnorm(T, alpha, lr):
    steps, losses = gradients(T, 5), loss_values(T, 5)
    history = [(geometry.norms(J.numpy()).tolist(), L) for J, L in zip(steps, losses, strict=True)]
    expected = stateful.gradnorm(history, alpha, lr)
    found = updates(detente.GradNorm(alpha=alpha, lr=lr), steps, losses)
    for d, w, J in zip(found, expected, steps, strict=True):
        close(d, directions.gd(J.numpy(), w), EXACT)
        assert sum(w) == pytest.approx(T, rel=1e-12)


def test_gradnorm_measures_the_layer_it_is_told():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 5).double(), nn.Linear(5, 4).double()
    x, y = matrices.normal(9, 4, 1), matrices.normal(9, 4, 2)
    method, history, wanted = detente.GradNorm(lr=0.1, layer=second.weight), [], []
    for k in range(STEPS):
        out = second(first(x).tanh())
        losses = {t: (1 + i + 0.2 * k) * (out[:, i] - y[:, i]).square().mean() for i, t in enumerate("abc")}
        rows = [torch.autograd.grad(loss, second.weight, retain_graph=True)[0] for loss in losses.values()]
        history.append(([float(g.norm()) for g in rows], [float(v.detach()) for v in losses.values()]))
        wanted = stateful.gradnorm(history, 1.5, 0.1)[-1]
        update = detente.backward(losses, method)
        close([float(update.weights[t]) for t in "abc"], wanted, EXACT)
    assert max(wanted) - min(wanted) > 0.1


@pytest.mark.parametrize("T", [2, 3, 5])
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.5, 1.0])
def test_gradvac(T, beta):
    steps = gradients(T, 6)
    steps[3][0] = 0.0  # skipped, and its targets stay
    method, rho = detente.GradVac(beta=beta, seed=3), np.zeros((T, T))
    twin = torch.Generator().manual_seed(3)
    for J in steps:
        orders = torch.rand(T, T, generator=twin).fill_diagonal_(-1).argsort(1)[:, 1:].tolist()
        wanted, rho = stateful.gradvac(J.numpy(), orders, rho, beta)
        close(detente.aggregate(J, method), wanted, SOLVED)
        assert np.abs(method.targets[:, :, 0].numpy() - rho).max() <= 1e-10  # cosines of rounded Gramians
    assert beta == 0 or np.abs(rho).max() > 0.01  # the targets have moved


@pytest.mark.parametrize("lr", [0.025, 0.2])
def test_imtl_l(lr):
    losses = loss_values(4, 7)
    method = detente.IMTLL(lr=lr)
    for L, expected in zip(losses, stateful.imtl_l(losses, lr), strict=True):
        # the oracle's slope is a difference quotient, right to about 1e-11; Adam's first steps only use its sign
        assert weights(method, L) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("T", [2, 3, 5])
def test_imtl(T):
    """IMTL-L scales the losses, IMTL-G combines the gradients of the scaled losses."""
    steps, losses = gradients(T, 8), loss_values(T, 8)
    scales = stateful.imtl_l(losses, 0.1)
    for d, J, s in zip(updates(detente.IMTL(lr=0.1), steps, losses), steps, scales, strict=True):
        _, wanted, margin = baselines.imtl_g(J.numpy() * np.array(s)[:, None])
        close(d, wanted, SOLVED / margin)  # divided by a sum that may cancel


@pytest.mark.parametrize("gamma", [0.0, 0.001, 0.1])
@pytest.mark.parametrize("least", [None, [0.001, 0.0, -2.0]])
def test_famo(gamma, least):
    before, after = loss_values(3, 9), loss_values(3, 10)
    history = list(zip(before, after, strict=True))
    expected = stateful.famo(history, gamma, 0.05, least)
    minimum = None if least is None else {str(i): v for i, v in enumerate(least)}
    method = detente.FAMO(lr=0.05, weight_decay=gamma, minimum=minimum)
    for (old, new), wanted in zip(history, expected, strict=True):
        close(weights(method, old), wanted, EXACT)
        assert sum(wanted) == pytest.approx(1, rel=1e-14)
        method.after_step(new)


def test_famo_where_all_losses_fall_alike():
    """The Jacobian of softmax takes out what all tasks share.

    The 1e-8 of the definition leaves 1e-14 of losses as large as these; Adam, whose own epsilon is 1e-8, makes that
    1e-6 lr per step.
    """
    method = detente.FAMO(lr=0.5, weight_decay=0.0)
    for _ in range(STEPS):
        w = weights(method, [1e6, 4e6])
        assert w == pytest.approx([0.8, 0.2], rel=1e-5)
        method.after_step([0.5e6, 2e6])


@pytest.mark.parametrize("mu", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("warmup", [0, 2])
def test_stch(mu, warmup):
    losses = loss_values(3, 11)  # four epochs of three steps
    by_hand, by_window = detente.STCH(mu=mu, warmup=warmup), detente.STCH(mu=mu, warmup=warmup, window=3)
    nadir = np.mean(losses[3 * warmup : 3 * warmup + 3], axis=0).tolist()
    for k, L in enumerate(losses):
        wanted = baselines.si(L) if k // 3 <= warmup else baselines.stch(L, nadir, mu)
        close(weights(by_hand, L), wanted, EXACT)
        close(weights(by_window, L), wanted, EXACT)
        if k % 3 == 2:
            by_hand.next_epoch()
    assert list(by_hand.nadir.values()) == pytest.approx(nadir, rel=1e-14)


def test_stch_tends_to_the_worst_loss():
    method = detente.STCH(mu=1e-3, warmup=0)
    weights(method, [1.0, 0.7, 3.0])
    method.next_epoch()
    assert weights(method, [0.4, 1.3, 2.2]) == pytest.approx([0, 3 / 1.3, 0], abs=1e-12)  # e^-1000 is all that is left


def test_si():
    for L in loss_values(4, 12):
        close(weights(detente.SI(), L), baselines.si(L), EXACT)


@pytest.mark.parametrize(("leak", "slope"), [(0.0, 1.0), (0.4, 2.5), (0.0, 0.3)])
def test_graddrop(leak, slope):
    steps, twin = gradients(3, 13), torch.Generator().manual_seed(5)
    steps[2][:, 4] = 0.0
    for J, d in zip(steps, updates(detente.GradDrop(leak, slope, seed=5), steps), strict=True):
        U = torch.rand(J.shape[1], generator=twin, dtype=torch.float64).numpy()
        close(d, baselines.graddrop(J.numpy(), U, leak, slope), EXACT)


@pytest.mark.parametrize("max_norm", [None, 1.0, 100.0])
@pytest.mark.parametrize("T", [2, 3])
def test_nash_mtl_reuses_its_weights(T, max_norm):
    """Solved in every third step; every update, not only the solved ones, is cut to the longest length allowed."""
    lengths = [1.0, 3.0, 0.2] * 4  # else the reused coefficients would give about the same length
    steps = [s * J for s, J in zip(lengths, gradients(T, 14), strict=True)]
    found = updates(detente.NashMTL(update_every=3, max_norm=max_norm), steps)
    a = np.zeros(T)
    for k, (J, d) in enumerate(zip(steps, found, strict=True)):
        if k % 3 == 0:
            a = bargaining.nash(J.numpy()).a
        wanted = a @ J.numpy()
        size = np.linalg.norm(wanted)
        close(d, wanted * min(1.0, max_norm / size) if max_norm else wanted, SOLVED)


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1.5, 100.0])
def test_nash_mtl_cuts_its_length(max_norm):
    for J, d in zip(gradients(3, 15), updates(detente.NashMTL(max_norm=max_norm), gradients(3, 15)), strict=True):
        close(d, bargaining.nash(J.numpy()).d * min(1.0, max_norm / math.sqrt(3)), SOLVED)


# RLW in distribution: 4000 seeded draws, bounds of 4.5 sigma


def draws(distribution: str, T: int) -> Array:
    method = detente.RLW(distribution, seed=2)
    w = np.array([weights(method, [1.0] * T) for _ in range(4000)])
    assert np.abs(w.sum(1) - 1).max() <= 1e-12
    assert (w >= 0).all()
    assert np.abs(w.mean(0) - 1 / T).max() <= 4.5 * w.std() / np.sqrt(len(w))
    return w


def test_rlw_uniform():
    """log w_i - log w_j = z_i - z_j: triangular on (-1, 1), variance 1/6, fourth moment 1/15, eighth 1/45."""
    w = draws("uniform", 4)
    z = np.log(w[:, 0]) - np.log(w[:, 1])
    assert np.abs(z).max() < 1
    assert abs((z**2).mean() - 1 / 6) <= 4.5 * np.sqrt((1 / 15 - 1 / 36) / len(z))
    assert abs((z**4).mean() - 1 / 15) <= 4.5 * np.sqrt((1 / 45 - 1 / 225) / len(z))


def test_rlw_dirichlet():
    """Each weight of a flat Dirichlet: P(w <= x) = 1 - (1 - x)^(T - 1); the largest gap by Kolmogorov."""
    w = draws("dirichlet", 4)
    for column in w.T:
        x = np.sort(column)
        gap = np.abs(1 - (1 - x) ** 3 - (np.arange(len(x)) + 0.5) / len(x)).max()
        assert gap <= 2.3 / np.sqrt(len(x))  # exceeded with a chance of 2 exp(-2 2.3^2) = 5e-5
    # Dirichlet(1): covariance -1 / (T^2 (T + 1))
    product = (w[:, 0] - 0.25) * (w[:, 1] - 0.25)
    assert abs(product.mean() + 1 / 80) <= 4.5 * product.std() / np.sqrt(len(w))


def test_rlw_bernoulli():
    """Each of the 2^T - 1 non-empty choices of tasks, equally likely and equally shared."""
    w = draws("bernoulli", 3)
    chosen = (w > 0).astype(int)
    assert np.abs(w - chosen / chosen.sum(1, keepdims=True)).max() <= 1e-15  # one division
    counts = np.bincount(chosen @ [1, 2, 4], minlength=8)
    assert counts[0] == 0
    chance = 1 / 7
    assert (np.abs(counts[1:] / len(w) - chance) <= 4.5 * np.sqrt(chance * (1 - chance) / len(w))).all()


# ---------------------------------------------------------------------------------------------------------------------
# Tasks that come and go: histories are kept by name. Losses linear in the parameters have whatever gradients one wants.

PRESENT = ["abc", "ab", "ca", "bc", "cba", "ac", "bca", "ab", "ba", "cab", "bc", "abc"]


def named_steps(seed: int, scale: float = 1.0) -> list[tuple[str, dict[str, Array], dict[str, float]]]:
    """(tasks in the order of the step, gradients, losses)."""
    steps = gradients(3, seed, scale)
    values = loss_values(3, seed)
    return [
        (names, {t: steps[k]["abc".index(t)].numpy() for t in names}, {t: values[k]["abc".index(t)] for t in names})
        for k, names in enumerate(PRESENT)
    ]


def backward(method, names: str, g: dict[str, Array], losses: dict[str, float]) -> Array:
    theta = torch.zeros(len(g[names[0]]), dtype=torch.float64, requires_grad=True)
    detente.backward({t: losses[t] + torch.from_numpy(g[t]) @ theta for t in names}, method)
    assert theta.grad is not None
    return theta.grad.numpy()


def on_simplex(names: str, lam: dict[str, float]) -> dict[str, float]:
    """Weights of the tasks of a step, uniform for new ones, brought back to the simplex of these tasks."""
    point = np.array([lam.get(t, 1 / len(names)) for t in names])
    return dict(zip(names, stateful.project_on_simplex(point), strict=True))


def combine(names: str, w: dict[str, float], vectors: dict[str, Array]) -> Array:
    return sum(w[t] * vectors[t] for t in names)


def test_moco_by_name():
    method, y, lam = detente.MoCo(beta=0.6, gamma=0.05, decay=0.5, rho=0.1), {}, {}
    for k, (names, g, losses) in enumerate(named_steps(21, 0.3), 1):
        for t in names:
            y[t] = y.get(t, 0.0) - 0.6 / k**0.5 * (y.get(t, 0.0) - g[t])
        now = on_simplex(names, lam)
        tracked = combine(names, now, y)
        point = [now[t] - 0.05 / k**0.5 * (y[t] @ tracked + 0.1 * now[t]) for t in names]
        lam |= dict(zip(names, stateful.project_on_simplex(np.array(point)), strict=True))
        close(backward(method, names, g, losses), combine(names, lam, y), EXACT)


def test_modo_by_name():
    method, lam = detente.MoDo(gamma=0.05, rho=0.1), {}
    for names, g, losses in named_steps(22, 0.3):
        now = on_simplex(names, lam)
        mixed = combine(names, now, g)
        point = [now[t] - 0.05 * (g[t] @ mixed + 0.1 * now[t]) for t in names]
        lam |= dict(zip(names, stateful.project_on_simplex(np.array(point)), strict=True))
        close(backward(method, names, g, losses), combine(names, lam, g), EXACT)


def test_excess_mtl_by_name():
    method, S, first, w = detente.ExcessMTL(eta=0.3), {}, {}, {}
    for names, g, losses in named_steps(23):
        for t in names:
            S[t] = S.get(t, 0.0) + g[t] ** 2
            e = float((g[t] ** 2 / np.sqrt(S[t] + 1e-7)).sum())
            if t in first:
                w[t] *= math.exp(0.3 * e / first[t])
            else:
                first[t], w[t] = e, 1.0
        total = sum(w[t] for t in names)
        w |= {t: w[t] * len(names) / total for t in names}
        close(backward(method, names, g, losses), combine(names, w, g), EXACT)


def test_db_mtl_by_name():
    method, m = detente.DBMTL(beta=0.8, decay=0.3), {}
    for k, (names, g, losses) in enumerate(named_steps(24), 1):
        b = 0.8 / k**0.3
        for t in names:
            m[t] = b * m.get(t, 0.0) + (1 - b) * g[t] / (losses[t] + 1e-8)
        n = {t: float(np.linalg.norm(m[t])) for t in names}
        close(backward(method, names, g, losses), combine(names, {t: max(n.values()) / n[t] for t in names}, m), EXACT)


def test_gradvac_by_name():
    method, rho, twin = detente.GradVac(beta=0.3), np.zeros((3, 3)), torch.Generator().manual_seed(0)
    for names, g, losses in named_steps(25):
        T, at = len(names), ["abc".index(t) for t in names]
        orders = torch.rand(T, T, generator=twin).fill_diagonal_(-1).argsort(1)[:, 1:].tolist()
        wanted, rho[np.ix_(at, at)] = stateful.gradvac(
            np.array([g[t] for t in names]), orders, rho[np.ix_(at, at)], 0.3
        )
        close(backward(method, names, g, losses), wanted, SOLVED)


def test_gradnorm_by_name():
    method, z, adam, first = detente.GradNorm(lr=0.1), {}, {}, {}
    for names, g, losses in named_steps(26):
        for t in names:
            z.setdefault(t, [0.0])
            adam.setdefault(t, stateful.Adam(1, 0.1))
            first.setdefault(t, losses[t])
        T = len(names)
        w = dict(zip(names, T * np.array(stateful.softmax([z[t][0] for t in names])), strict=True))
        close(backward(method, names, g, losses), combine(names, w, g), EXACT)
        n = {t: float(np.linalg.norm(g[t])) for t in names}
        pace = {t: losses[t] / first[t] for t in names}
        even = sum(pace.values()) / T
        mean = sum(w[t] * n[t] for t in names) / T
        slope = {t: math.copysign(n[t], w[t] * n[t] - mean * (pace[t] / even) ** 1.5) for t in names}
        for t in names:
            adam[t](z[t], [w[t] * (slope[t] - sum(w[s] / T * slope[s] for s in names))])


def test_imtl_l_by_name():
    """No task sees another: each follows the run of its own losses."""
    method, seen = detente.IMTLL(lr=0.1), {t: [] for t in "abc"}
    for names, _, losses in named_steps(27):
        for t, w in zip(names, weights(method, [losses[t] for t in names], names), strict=True):
            seen[t].append([losses[t]])
            # the oracle's slopes are difference quotients, right to about 1e-11
            assert w == pytest.approx(stateful.imtl_l(seen[t], 0.1)[-1][0], rel=1e-8)


def test_famo_by_name():
    method, xi, adam = detente.FAMO(lr=0.1, weight_decay=0.01), {}, {}
    for names, _, losses in named_steps(28):
        for t in names:
            xi.setdefault(t, [0.0])
            adam.setdefault(t, stateful.Adam(1, 0.1, 0.01))
        z = dict(zip(names, stateful.softmax([xi[t][0] for t in names]), strict=True))
        share = {t: z[t] / (losses[t] + 1e-8) for t in names}
        wanted = [share[t] / sum(share.values()) for t in names]
        close(weights(method, [losses[t] for t in names], names), wanted, EXACT)
        after = {t: losses[t] * (0.9 if t == "a" else 0.7) for t in names}
        method.after_step(after)
        delta = {t: math.log(losses[t] + 1e-8) - math.log(after[t] + 1e-8) for t in names}
        mean = sum(z[t] * delta[t] for t in names)
        for t in names:
            adam[t](xi[t], [z[t] * (delta[t] - mean)])


def test_stch_by_name():
    method, sums, nadir = detente.STCH(warmup=1, window=3), {}, {}
    for k, (names, _, losses) in enumerate(named_steps(29)):
        known = all(t in nadir for t in names)
        values = [losses[t] for t in names]
        wanted = baselines.stch(values, [nadir[t] for t in names]) if known else baselines.si(values)
        close(weights(method, values, names), wanted, EXACT)
        for t in names:
            sums.setdefault(t, []).append(losses[t])
        if k % 3 == 2:
            if k // 3 == 1:
                nadir = {t: sum(x) / len(x) for t, x in sums.items()}
            sums = {}
    assert sorted(nadir) == list("abc")


def test_stch_of_a_task_that_comes_late():
    method = detente.STCH(warmup=0)
    assert weights(method, [2.0], "a") == [0.5]
    method.next_epoch()
    assert weights(method, [1.0, 4.0], "ab") == [1.0, 0.25]  # no nadir yet for b
    method.next_epoch()
    close(weights(method, [1.0, 3.0], "ab"), baselines.stch([1.0, 3.0], [2.0, 4.0]), EXACT)


def test_nash_mtl_solves_again_for_a_task_it_has_no_weight_for():
    method = detente.NashMTL(update_every=4)
    kept: dict[str, float] = {}
    age = 0
    for names, g, losses in named_steps(30):
        if age % 4 == 0 or any(t not in kept for t in names):
            a = bargaining.nash(np.array([g[t] for t in names])).a
            kept, age = dict(zip(names, a, strict=True)), 0
        age += 1
        close(backward(method, names, g, losses), combine(names, kept, g), SOLVED)


# ---------------------------------------------------------------------------------------------------------------------
# Whole steps: several batches, losses after the step, Auto-Lambda. A linear trunk, one linear head per task.

TASKS = ("a", "b", "c")
INPUTS, FEATURES = 5, 4


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.trunk = nn.Linear(INPUTS, FEATURES).double()
            self.heads = nn.ModuleDict({t: nn.Linear(FEATURES, 1).double() for t in TASKS})
        self.dropout = Masks(dropout)

    def losses(self, batch: tuple[Tensor, Tensor], tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        x, y = batch
        h = self.dropout(self.trunk(x))
        return {t: (self.heads[t](h)[:, 0] - y[:, TASKS.index(t)]).square().mean() for t in tasks or TASKS}


class Masks(nn.Module):
    """Dropout that remembers its masks, or takes one that it is given."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.drawn, self.given = p, [], None

    def forward(self, h: Tensor) -> Tensor:
        if self.p == 0:
            return h
        mask = self.given if self.given is not None else (torch.rand_like(h) >= self.p).double() / (1 - self.p)
        self.drawn.append(mask.detach().clone())
        return h * mask


def batch(k: int, size: int = 7) -> tuple[Tensor, Tensor]:
    """Targets that are nearly linear in the inputs, and contradict each other."""
    x = matrices.normal(size, INPUTS, 900 + k)
    y = x @ torch.tensor([[1.0, -1.0, 0.5]] * INPUTS, dtype=torch.float64) + 0.3 * matrices.normal(size, 3, 700 + k)
    return x, y


def trunk_rows(net: Net, data: tuple[Tensor, Tensor]) -> Array:
    losses = net.losses(data)
    parameters = list(net.trunk.parameters())
    rows = [torch.autograd.grad(losses[t], parameters, retain_graph=True) for t in TASKS]
    return np.array([torch.cat([g.reshape(-1) for g in row]).numpy() for row in rows])


def head_gradients(net: Net, data: tuple[Tensor, Tensor]) -> dict[str, Array]:
    losses = net.losses(data)
    return {t: torch.autograd.grad(losses[t], net.heads[t].weight)[0].numpy() for t in TASKS}


def flat_grad(module: nn.Module) -> Array:
    return torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None]).numpy()


class Batches:
    """A closure that takes a fresh batch every time."""

    def __init__(self, net: Net) -> None:
        self.net, self.taken = net, 0

    def __call__(self, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        self.taken += 1
        return self.net.losses(batch(self.taken - 1), tasks)


def over_batches(method, count: int, expected: Callable[[Array, Array, Array], Array], tolerance: float) -> None:
    """``expected(J1, J2, J3)`` gives the weights: products of J1 and J2, the update from J3 (the batch drawn first)."""
    net = Net()
    closure, optimizer = Batches(net), torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(STEPS):
        taken = [count * step + k for k in range(count)]
        rows = [trunk_rows(net, batch(k)) for k in taken]
        own = head_gradients(net, batch(taken[0]))
        J3, J1, J2 = rows[0], rows[-2], rows[-1]
        w = expected(J1, J2, J3)
        update = detente.step(closure, optimizer, method)
        assert closure.taken == count * (step + 1)
        assert update.stats["backwards"] == 3 * count
        close([float(update.weights[t]) for t in TASKS], w, tolerance)
        close(flat_grad(net.trunk), w @ J3, tolerance)
        for i, t in enumerate(TASKS):
            factor = w[i] if method.heads == "weighted" else 1.0
            close(net.heads[t].weight.grad.numpy(), factor * own[t], tolerance)


@pytest.mark.parametrize("batches", [2, 3])
@pytest.mark.parametrize(("gamma", "rho"), [(0.02, 0.0), (0.1, 0.1)])
def test_modo_over_batches(batches, gamma, rho):
    history: list[tuple[Array, Array, Array]] = []

    def expected(J1, J2, J3):
        history.append((J1, J2, J3))
        return stateful.modo(history, gamma, rho)[-1][0]

    over_batches(detente.MoDo(gamma=gamma, rho=rho, batches=batches), batches, expected, EXACT)


def inner_loop(G: Array, w: Array, strength: float, iterations: int, lr: float, momentum: float) -> Array:
    """The authors' loop: momentum on G (w + l / T), each step projected on the simplex."""
    T = len(w)
    scale = sum(math.sqrt(max(G[i, i], 0.0)) for i in range(T)) / T + 1e-8
    velocity = np.zeros(T)
    for _ in range(iterations):
        slope = G / scale**2 @ w + strength * G / scale**2 @ np.full(T, 1 / T)
        velocity = momentum * velocity + slope
        w = stateful.project_on_simplex(w - lr * velocity)
    return w


@pytest.mark.parametrize("batches", [2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"strength": 0.6, "lr": 0.3, "iterations": 5, "momentum": 0.9}, {"strength": 0.0, "lr": 0.5}],
    ids=str,
)
def test_sdmgrad_over_batches(batches, options):
    given = {"strength": 0.3, "iterations": 20, "lr": 10.0, "momentum": 0.5} | options
    kept = [np.full(3, 1 / 3)]

    def expected(J1, J2, J3):
        kept.append(inner_loop(J1 @ J2.T, kept[-1], **given))
        return (kept[-1] + given["strength"] / 3) / (1 + given["strength"])

    # twenty steps of a long rate may multiply the rounding of G
    over_batches(detente.SDMGrad(batches=batches, **options), batches, expected, SOLVED)


def test_sdmgrads_loop_ends_at_the_exact_answer():
    """On one batch, with a short rate, the inner loop and the exact solution are the same."""
    net, data = Net(), batch(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    method = detente.SDMGrad(0.5, batches=2, iterations=3000, lr=0.2)
    update = detente.step(lambda tasks=None: net.losses(data, tasks), optimizer, method)
    expected = baselines.sdmgrad(trunk_rows(net, data), 0.5)[1]
    close(flat_grad(net.trunk), expected, 1e-6)  # linear convergence, stopped after 3000 steps
    assert sum(float(w) for w in update.weights.values()) == pytest.approx(1, abs=1e-12)


def test_famo_by_steps():
    """The losses after the step, on the same batch, from detente.step; the parameters by a loop written out."""
    net, twin = Net(), Net()
    method, optimizer = detente.FAMO(lr=0.1), torch.optim.SGD(net.parameters(), lr=0.05)
    history: list[tuple[list[float], list[float]]] = []
    for k in range(STEPS):
        losses = twin.losses(batch(k))
        before = [float(v.detach()) for v in losses.values()]
        w = stateful.famo([*history, (before, before)], 1e-3, 0.1)[-1]
        twin.zero_grad()
        sum(x * v for x, v in zip(w, losses.values(), strict=True)).backward()
        with torch.no_grad():
            for p in twin.parameters():
                p -= 0.05 * p.grad
        after = [float(v.detach()) for v in twin.losses(batch(k)).values()]
        history.append((before, after))
        update = detente.step(lambda tasks=None, k=k: net.losses(batch(k), tasks), optimizer, method)
        close([float(update.weights[t]) for t in TASKS], w, 1e-10)  # 1e-8 / rounding: Adam near a zero slope
        same_parameters(net, twin)


def test_famo_looks_again_through_the_same_mask():
    net = Net(0.5)
    method, optimizer = detente.FAMO(), torch.optim.SGD(net.parameters(), lr=0.05)
    for k in range(3):
        net.dropout.drawn = []
        detente.step(lambda tasks=None, k=k: net.losses(batch(k), tasks), optimizer, method)
        before, after = net.dropout.drawn
        assert torch.equal(before, after)


def same_parameters(net: nn.Module, twin: nn.Module) -> None:
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        close(p.detach(), q.detach(), 1e-10)  # a dozen steps of float64


# Auto-Lambda


class Loop:
    """Auto-Lambda written out: SGD with momentum and weight decay by hand, finite differences, Adam on lambda."""

    def __init__(self, net: Net, lr: float, momentum: float, decay: float, rate: float, primary=TASKS) -> None:
        self.net, self.lr, self.momentum, self.decay, self.primary = net, lr, momentum, decay, primary
        self.lam, self.adam = [0.1] * len(TASKS), stateful.Adam(len(TASKS), rate)
        self.velocity = [torch.zeros_like(p) for p in net.parameters()]
        self.slopes: list[float] = []

    def values(self, data) -> list[float]:
        with torch.no_grad():
            return [float(v) for v in self.net.losses(data).values()]

    def slope(self, losses: dict[str, Tensor], w: dict[str, float]) -> list[Tensor]:
        total = sum(w[t] * losses[t] for t in w)
        found = torch.autograd.grad(total, list(self.net.parameters()), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.net.parameters(), found, strict=True)]

    def put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for p, v in zip(self.net.parameters(), values, strict=True):
                p.copy_(v)

    def heavy(self, gradient: list[Tensor], theta: list[Tensor]) -> list[Tensor]:
        return [self.momentum * v + g + self.decay * p for v, g, p in zip(self.velocity, gradient, theta, strict=True)]

    def learn(self, data, second, masks=(None, None, None)) -> None:
        """Move lambda; masks of the dropout layer in the three kinds of forward passes."""
        theta = [p.detach().clone() for p in self.net.parameters()]
        self.net.dropout.given = masks[0]
        virtual = self.heavy(self.slope(self.net.losses(data), dict(zip(TASKS, self.lam, strict=True))), theta)
        self.put([p - self.lr * v for p, v in zip(theta, virtual, strict=True)])
        self.net.dropout.given = masks[1]
        v = self.slope(self.net.losses(second), dict.fromkeys(self.primary, 1.0))
        eps = 0.01 / math.sqrt(sum(float((x**2).sum()) for x in v))
        self.net.dropout.given = masks[2]
        sides = []
        for sign in (1, -1):
            self.put([p + sign * eps * x for p, x in zip(theta, v, strict=True)])
            sides.append(self.values(data))
        self.put(theta)
        self.slopes = [-self.lr * (up - down) / (2 * eps) for up, down in zip(*sides, strict=True)]
        self.adam(self.lam, self.slopes)

    def train(self, data, mask=None) -> None:
        theta = [p.detach().clone() for p in self.net.parameters()]
        self.net.dropout.given = mask
        self.velocity = self.heavy(self.slope(self.net.losses(data), dict(zip(TASKS, self.lam, strict=True))), theta)
        self.put([p - self.lr * v for p, v in zip(theta, self.velocity, strict=True)])


OPTIMIZERS = [(0.05, 0.0, 0.0), (0.05, 0.9, 0.0), (0.03, 0.8, 0.01)]


@pytest.mark.parametrize(("lr", "momentum", "decay"), OPTIMIZERS)
@pytest.mark.parametrize("primary", [None, ("b",), ("a", "c")])
@pytest.mark.parametrize("fresh", [True, False])
def test_auto_lambda(lr, momentum, decay, primary, fresh):
    """``fresh``: the meta gradient comes from a second batch."""
    net, twin = Net(), Net()
    loop = Loop(twin, lr, momentum, decay, 0.02, primary or TASKS)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    step = 0
    method = detente.AutoLambda(
        lr=0.02, primary=primary, meta=(lambda tasks=None: net.losses(batch(step + 100), tasks)) if fresh else None
    )
    for step in range(STEPS):
        loop.learn(batch(step), batch(step + 100) if fresh else batch(step))
        loop.train(batch(step))
        update = detente.step(lambda tasks=None: net.losses(batch(step), tasks), optimizer, method)  # noqa: B023
        # the difference of two losses keeps 1e-13 of it, which Adam passes on relative to the slope
        close([float(update.weights[t]) for t in TASKS], loop.lam, 1e-9)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            close(p.detach(), q.detach(), 1e-9)
    assert max(abs(x - 0.1) for x in loop.lam) > 0.05


def test_auto_lambdas_slope_is_the_derivative_of_the_meta_loss():
    """Without momentum: d(meta loss after the virtual step) / d(lambda), here by moving lambda itself."""
    net, data, second = Net(), batch(0), batch(100)
    loop = Loop(net, 0.05, 0.0, 0.0, 0.02)
    loop.learn(data, second)
    theta = [p.detach().clone() for p in net.parameters()]

    def meta(lam: list[float]) -> float:
        g = loop.slope(net.losses(data), dict(zip(TASKS, lam, strict=True)))
        loop.put([p - 0.05 * x for p, x in zip(theta, g, strict=True)])
        value = sum(loop.values(second))
        loop.put(theta)
        return value

    numeric = [baselines.slope_of(meta, [0.1] * 3, i) for i in range(3)]
    assert loop.slopes == pytest.approx(numeric, rel=1e-3)  # the method's own difference is of second order in 0.01


@pytest.mark.parametrize("fresh", [True, False])
def test_auto_lambda_compares_losses_under_one_mask(fresh):
    """Both sides of the finite difference drop the same units, and drawing goes on as if they had not been asked."""
    net, twin = Net(0.5), Net(0.5)
    loop = Loop(twin, 0.05, 0.9, 0.01, 0.02)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    step = 0
    meta = (lambda tasks=None: net.losses(batch(step + 100), tasks)) if fresh else None
    method = detente.AutoLambda(lr=0.02, meta=meta)
    for step in range(STEPS):
        torch.manual_seed(step)
        net.dropout.drawn = []
        update = detente.step(lambda tasks=None: net.losses(batch(step), tasks), optimizer, method)  # noqa: B023
        first, ahead, above, below, last = net.dropout.drawn
        assert torch.equal(above, below)
        torch.manual_seed(step)
        drawn = [(torch.rand(7, FEATURES, dtype=torch.float64) >= 0.5).double() / 0.5 for _ in range(3)]
        assert all(map(torch.equal, drawn, (first, ahead, last)))
        loop.learn(batch(step), batch(step + 100) if fresh else batch(step), (first, ahead, above))
        loop.train(batch(step), last)
        close([float(update.weights[t]) for t in TASKS], loop.lam, 1e-9)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            close(p.detach(), q.detach(), 1e-9)


def test_auto_lambda_with_a_task_missing():
    """Its weight waits, and Adam counts its steps alone."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    method = detente.AutoLambda(lr=0.02)
    before = {}
    for step, names in enumerate(PRESENT):
        data = batch(step)
        update = detente.step(lambda tasks=None: net.losses(data, tasks or tuple(names)), optimizer, method)  # noqa: B023
        assert set(update.weights) == set(names)
        now = {t: float(v) for t, v in method.lambdas.values.items()}
        for t, value in before.items():
            assert (now[t] == value) == (t not in names)
        before = now


@pytest.mark.parametrize("first", [1e-4, 3e-5, 1e-20, 1e-150])
def test_excess_mtl_survives_a_tiny_first_gradient(first):
    """Its excess grows by more than an exponential can hold; the weights stay finite, and can come back."""
    method = detente.ExcessMTL()
    J = torch.eye(2, dtype=torch.float64)
    detente.aggregate(torch.diag(torch.tensor([first, 1.0], dtype=torch.float64)), method)
    for _ in range(3):
        d = detente.aggregate(J, method)
        assert d.isfinite().all()
        assert float(d.sum()) == pytest.approx(2)
