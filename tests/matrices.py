"""Gradient samplers: J [T, P] in float64, one for every way in which task gradients can be awkward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(T: int, P: int, seed: int = 0) -> Tensor:
    return torch.randn(T, P, generator=generator(seed), dtype=torch.float64)


def random(T: int, seed: int = 0) -> Tensor:
    return normal(T, T + 7, seed)


def conflicting(T: int, seed: int = 0) -> Tensor:
    """Most pairs point against each other (mean cosine near -1 / T) and rows stay independent."""
    J = normal(T, 2 * T + 5, seed)
    return J if T == 1 else J - 0.95 * J.mean(0)


def parallel(T: int, seed: int = 0) -> Tensor:
    lengths = torch.rand(T, 1, generator=generator(seed), dtype=torch.float64) + 0.5
    return lengths * normal(1, 9, seed + 1)


def antiparallel(T: int, seed: int = 0) -> Tensor:
    signs = torch.tensor([(-1.0) ** i for i in range(T)], dtype=torch.float64)
    return signs[:, None] * parallel(T, seed)


def low_rank(T: int, seed: int = 0) -> Tensor:
    """Fewer parameters than tasks."""
    return normal(T, max(1, T // 2), seed)


def duplicated(T: int, seed: int = 0) -> Tensor:
    """Every second row repeats the one before it."""
    return random(T, seed)[[i - i % 2 for i in range(T)]]


def row_scaled(T: int, seed: int = 0) -> Tensor:
    """Row norms from 1e-8 to 1e8."""
    scales = torch.logspace(-8, 8, T, dtype=torch.float64) if T > 1 else torch.tensor([1e8], dtype=torch.float64)
    return scales[:, None] * random(T, seed)


def integers(T: int, P: int, seed: int = 0) -> Tensor:
    """Small whole numbers without a zero row: with P < T full of exact dependences, opposites and ties."""
    draw = generator(1000 * T + 100 * P + seed)
    J = torch.zeros(T, P, dtype=torch.float64)
    while bool((J == 0).all(1).any()):
        J = torch.randint(-3, 4, (T, P), generator=draw).double()
    return J


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "random": random,
    "conflicting": conflicting,
    "parallel": parallel,
    "antiparallel": antiparallel,
    "low_rank": low_rank,
    "duplicated": duplicated,
    "row_scaled": row_scaled,
}
SIZES = (1, 2, 3, 10, 40)
CASES = [(name, T) for name in SAMPLERS for T in SIZES]


def listed() -> dict[str, Tensor]:
    """The cases that break one peer or another, by name."""
    J = normal(3, 40, 11)
    cases = {
        "random": J,
        "random T=2": normal(2, 40, 12),
        "random T=10": normal(10, 60, 13),
        "conflicting": conflicting(3, 14),
        "conflicting T=10": conflicting(10, 15),
        "duplicate rows": J[[0, 1, 1]],
        "one zero row": torch.stack([J[0], 0 * J[1], J[2]]),
        "all rows zero": 0 * J,
        "all x 1e-8": 1e-8 * J,
        "all x 1e8": 1e8 * J,
        "rows x (1e-3, 1, 1)": torch.tensor([[1e-3], [1.0], [1.0]]).double() * J,
        "rows x (1e-2, 1, 1e2)": torch.tensor([[1e-2], [1.0], [1e2]]).double() * J,
        "rows x (1e-8, 1, 1e8)": torch.tensor([[1e-8], [1.0], [1e8]]).double() * J,
        "T = 1": J[:1],
        "g, -g": torch.stack([J[0], -J[0]]),
        "g, -g + 1e-5 noise": torch.stack([J[0], -J[0] + 1e-5 * normal(1, 40, 16)[0]]),
        "T = 100, n = 1000": normal(100, 1000, 17),
        "T = 100, n = 20": normal(100, 20, 18),
    }
    scales = torch.tensor([[1e-8], [1.0], [1e8]]).double()
    cases["conflicting, rows x (1e-8, 1, 1e8)"] = scales * conflicting(3, 14)
    return cases


LISTED = listed()
