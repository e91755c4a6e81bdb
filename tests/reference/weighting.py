"""Rules that map losses, metrics or chance to task weights."""

from __future__ import annotations

import math
from collections.abc import Sequence


def dwa(epochs: Sequence[Sequence[float]], temperature: float = 2.0) -> list[float]:
    """Weights of the epoch after `epochs` (mean losses of each): w = T softmax(r / tau), r = L(e-1) / L(e-2)."""
    T = len(epochs[-1]) if epochs else 0
    if len(epochs) < 2:
        return [1.0] * T
    total = sum(math.exp(epochs[-1][k] / epochs[-2][k] / temperature) for k in range(T))
    return [T * math.exp(epochs[-1][k] / epochs[-2][k] / temperature) / total for k in range(T)]


def uw_objective(s: float, loss: float) -> float:
    return 0.5 * (math.exp(-s) * loss + s)


def uw_weight(s: float) -> float:
    """d/dL of the objective."""
    return 0.5 * math.exp(-s)


def uw_slope(s: float, loss: float) -> float:
    """d/ds of the objective by a central difference of high order, so that no formula is shared."""
    h = 1e-3
    near = uw_objective(s + h, loss) - uw_objective(s - h, loss)
    far = uw_objective(s + 2 * h, loss) - uw_objective(s - 2 * h, loss)
    return (8 * near - far) / (12 * h)


def dtp(kpi: float, gamma: float = 2.0) -> float:
    return -((1 - kpi) ** gamma) * math.log(kpi)


def gls(losses: Sequence[float]) -> list[float]:
    """Derivative of (prod L)^(1/T) with respect to each loss, GM / (T L_i)."""
    T = len(losses)
    mean = math.exp(sum(math.log(loss) for loss in losses) / T)
    return [mean / (T * loss) for loss in losses]


def loss_power(losses: Sequence[float], gamma: float = 1.0) -> list[float]:
    total = sum(loss**gamma for loss in losses)
    return [loss**gamma / total for loss in losses]


def uw(losses: Sequence[Sequence[float]], lr: float = 0.025, init: float = 0.0) -> list[list[float]]:
    """Weights of every step; after each, Adam (0.9, 0.999, 1e-8) moves every s_i down its own slope."""
    T = len(losses[0])
    s, m, v = [init] * T, [0.0] * T, [0.0] * T
    history = []
    for step, values in enumerate(losses, 1):
        history.append([uw_weight(s_i) for s_i in s])
        for i in range(T):
            slope = uw_slope(s[i], values[i])
            m[i] = 0.9 * m[i] + 0.1 * slope
            v[i] = 0.999 * v[i] + 0.001 * slope**2
            s[i] -= lr * (m[i] / (1 - 0.9**step)) / (math.sqrt(v[i] / (1 - 0.999**step)) + 1e-8)
    return history
