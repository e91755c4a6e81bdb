"""Baselines with history: whole runs by plain loops. One list entry per step; a step counts from k = 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from reference.geometry import Array, norms

SPENT = 1e-12  # GradVac: a p_i this short against g_i is what rounding left of a gradient corrected away
EVEN = 1e-12  # GradNorm: norms this close to their target are on it; the sign of the rest would be rounding


class Adam:
    """Kingma and Ba with decay added to the gradient, one entry per task."""

    def __init__(self, T: int, lr: float, decay: float = 0.0) -> None:
        self.lr, self.decay, self.step = lr, decay, 0
        self.m, self.v = [0.0] * T, [0.0] * T

    def __call__(self, x: list[float], slopes: Sequence[float]) -> None:
        self.step += 1
        for i, slope in enumerate(slopes):
            g = slope + self.decay * x[i]
            self.m[i] = 0.9 * self.m[i] + 0.1 * g
            self.v[i] = 0.999 * self.v[i] + 0.001 * g * g
            m = self.m[i] / (1 - 0.9**self.step)
            v = self.v[i] / (1 - 0.999**self.step)
            x[i] -= self.lr * m / (math.sqrt(v) + 1e-8)


def softmax(x: Sequence[float]) -> list[float]:
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


def project_on_simplex(x: Array) -> Array:
    """Nearest point of the simplex: max(x_i - tau, 0), tau from the sorted entries."""
    total, tau = 0.0, 0.0
    for count, value in enumerate(sorted(x, reverse=True), 1):
        total += value
        if value - (total - 1) / count > 0:
            tau = (total - 1) / count
    w = np.array([max(value - tau, 0.0) for value in x])
    scale = 1 + np.abs(x).max()
    assert abs(w.sum() - 1) <= 1e-13 * len(x) * scale
    moved = x - w  # KKT: the same on the support, no more elsewhere
    assert np.abs(moved[w > 0] - tau).max() <= 1e-14 * scale
    assert (moved <= tau + 1e-14 * scale).all()
    return w


def gradvac(
    J: Array, orders: Sequence[Sequence[int]], rho: Array, beta: float, limit: float = 1.0 - 1e-8
) -> tuple[Array, Array]:
    """(d, new rho) of one step; orders[i]: the other tasks in the order in which p_i meets them.

    The moving average follows every pair, with the cosine before the correction; |rho| is clamped at the limit.
    Pairs with a zero gradient (or with a p_i corrected down to rounding) are skipped and keep their rho.
    """
    n, rho = norms(J), rho.copy()
    d = np.zeros(J.shape[1])
    for i in range(len(J)):
        p = J[i].copy()
        for j in orders[i]:
            assert j != i
            size = np.sqrt(np.dot(p, p))
            if n[j] == 0 or size <= SPENT * n[i]:
                continue
            u, q = J[j] / n[j], p / size
            phi = min(max(np.dot(q, u), -1.0), 1.0)
            target = min(max(rho[i, j], -limit), limit)
            if phi < target:
                across = q - phi * u
                sine = np.sqrt(np.dot(across, across))
                p = p + size * (target * sine / math.sqrt(1 - target * target) - phi) * u
                now = np.sqrt(np.dot(p, p))
                assert now <= 1e-7 * size or abs(np.dot(p, u) / now - target) <= 1e-8
            rho[i, j] = (1 - beta) * rho[i, j] + beta * phi
        d = d + p
    return d, rho


def imtl_l(losses: Sequence[Sequence[float]], lr: float) -> list[list[float]]:
    """Weights exp(s_i) of every step; Adam then moves every s_i down exp(s) L - s."""
    s = [0.0] * len(losses[0])
    adam = Adam(len(s), lr)
    history = []
    for values in losses:
        history.append([math.exp(x) for x in s])
        # difference quotients, so that no formula is shared
        h, slopes = 1e-3, []
        for x, loss in zip(s, values, strict=True):
            f = [math.exp(x + k * h) * loss - (x + k * h) for k in (-2, -1, 1, 2)]
            slopes.append((8 * (f[2] - f[1]) - (f[3] - f[0])) / (12 * h))
        adam(s, slopes)
    return history


def moco(
    steps: Sequence[Array], beta: float, gamma: float, rho: float = 0.0, sigma: float = 0.5
) -> list[tuple[Array, Array]]:
    """(lambda, d) of every step, both after the update; y starts at 0 and lambda uniform. Zero rows take part."""
    T = len(steps[0])
    Y, lam = np.zeros_like(steps[0], dtype=float), np.full(T, 1.0 / T)
    history = []
    for k, J in enumerate(steps, 1):
        for i in range(T):
            Y[i] = Y[i] - beta / k**sigma * (Y[i] - J[i])
        tracked = sum(lam[i] * Y[i] for i in range(T))
        slope = np.array([np.dot(Y[i], tracked) + rho * lam[i] for i in range(T)])
        lam = project_on_simplex(lam - gamma / k**sigma * slope)
        history.append((lam, sum(lam[i] * Y[i] for i in range(T))))
    return history


def modo(
    steps: Sequence[Array | tuple[Array, Array, Array]], gamma: float, rho: float = 0.0
) -> list[tuple[Array, Array]]:
    """(lambda, d) of every step; a step is one batch, or three: two for lambda, the third for d.

    Zero rows take part.
    """
    lam: Array | None = None
    history = []
    for step in steps:
        J1, J2, J3 = step if isinstance(step, tuple) else (step, step, step)
        T = len(J1)
        lam = np.full(T, 1.0 / T) if lam is None else lam
        mixed = sum(lam[i] * J2[i] for i in range(T))
        slope = np.array([np.dot(J1[i], mixed) + rho * lam[i] for i in range(T)])
        lam = project_on_simplex(lam - gamma * slope)
        history.append((lam, sum(lam[i] * J3[i] for i in range(T))))
    return history


def excess_mtl(steps: Sequence[Array], eta: float = 1e-2, eps: float = 1e-7) -> list[tuple[Array, Array]]:
    """(w, d) of every step; sum w = T. A task needs a gradient in the first step."""
    T = len(steps[0])
    S, w = np.zeros_like(steps[0], dtype=float), np.ones(T)
    first: list[float] = []
    history = []
    for J in steps:
        S = S + J**2
        e = [float(np.sum(J[i] ** 2 / np.sqrt(S[i] + eps))) for i in range(T)]
        if not first:
            first = e
        else:
            w = np.array([w[i] * math.exp(eta * e[i] / first[i]) for i in range(T)])
            w = w * T / w.sum()
        history.append((w, sum(w[i] * J[i] for i in range(T))))
    return history


def db_mtl(
    steps: Sequence[tuple[Array, Sequence[float]]], beta: float = 0.9, sigma: float = 0.0, eps: float = 0.0
) -> list[Array]:
    """d of every step (J, losses): gradients of log(L + 1e-8), averaged from 0, all stretched to the longest one.

    eps is added to the norms; 0 leaves an average of length 0 out.
    """
    m = np.zeros_like(steps[0][0], dtype=float)
    history = []
    for k, (J, losses) in enumerate(steps, 1):
        b = beta / k**sigma
        for i, loss in enumerate(losses):
            m[i] = b * m[i] + (1 - b) * J[i] / (loss + 1e-8)
        n = norms(m)
        parts = [row / (size + eps) for row, size in zip(m, n, strict=True) if size > 0]
        history.append(n.max() * sum(parts, np.zeros(J.shape[1])))
    return history


def gradnorm(
    steps: Sequence[tuple[Sequence[float], Sequence[float]]], alpha: float = 1.5, lr: float = 0.025
) -> list[list[float]]:
    """Weights T softmax(z) of every step (norms, losses), before its update; L_i(0) are the losses of the first step.

    Adam moves z down sum_i |w_i n_i - target_i|, the targets held fixed.
    """
    T = len(steps[0][0])
    z, adam, start = [0.0] * T, Adam(T, lr), steps[0][1]
    history = []
    for n, losses in steps:
        w = [T * x for x in softmax(z)]
        history.append(w)
        N = [w_i * n_i for w_i, n_i in zip(w, n, strict=True)]
        pace = [loss / first for loss, first in zip(losses, start, strict=True)]
        r = [x / (sum(pace) / T) for x in pace]
        target = [sum(N) / T * r_i**alpha for r_i in r]
        by_weight = []
        for N_i, t_i, n_i in zip(N, target, n, strict=True):
            near = abs(N_i - t_i) <= EVEN * max(N_i, t_i)
            by_weight.append(0.0 if near else math.copysign(n_i, N_i - t_i))
        slopes = []
        for k in range(T):  # dw_i / dz_k = w_i ([i = k] - w_k / T)
            slopes.append(sum(by_weight[i] * w[i] * ((i == k) - w[k] / T) for i in range(T)))
        adam(z, slopes)
    return history


def famo(
    steps: Sequence[tuple[Sequence[float], Sequence[float]]],
    gamma: float = 1e-3,
    lr: float = 0.025,
    least: Sequence[float] | None = None,
) -> list[list[float]]:
    """Weights c z_i / D_i of every step (losses before, losses after); least: lower bounds of the losses."""
    T = len(steps[0][0])
    xi, adam = [0.0] * T, Adam(T, lr, decay=gamma)
    low = [0.0] * T if least is None else list(least)
    history = []
    for before, after in steps:
        z = softmax(xi)
        D = [loss - bound + 1e-8 for loss, bound in zip(before, low, strict=True)]
        D_after = [loss - bound + 1e-8 for loss, bound in zip(after, low, strict=True)]
        total = sum(z_i / D_i for z_i, D_i in zip(z, D, strict=True))
        history.append([z_i / D_i / total for z_i, D_i in zip(z, D, strict=True)])
        delta = [math.log(x) - math.log(y) for x, y in zip(D, D_after, strict=True)]
        slopes = []
        for k in range(T):
            slopes.append(sum(z[i] * ((i == k) - z[k]) * delta[i] for i in range(T)))
        adam(xi, slopes)
    return history
