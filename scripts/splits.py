"""Draws the splits that detente ships, for data sets that have none: ``python scripts/splits.py``.

They are files because a generator's stream may change with its library; this script says where they come from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

SPLITS = Path(__file__).parents[1] / "src/detente/benchmark/splits"


def write(name: str, samples: list[str], share: float) -> list[str]:
    """A share of the samples, drawn with seed 0, one per line; returns the others."""
    drawn = np.random.default_rng(0).permutation(len(samples))[: round(share * len(samples))]
    (SPLITS / f"{name}.txt").write_text("\n".join(samples[k] for k in sorted(drawn)) + "\n")
    return [samples[k] for k in sorted(set(range(len(samples))).difference(drawn.tolist()))]


if __name__ == "__main__":
    write("nyuv2", [str(k) for k in range(795)], 0.1)
    write("cityscapes", [str(k) for k in range(2975)], 0.1)
    write("cifar100", [str(k) for k in range(50_000)], 0.1)
    write("mnist", [str(k) for k in range(60_000)], 0.1)
    rest = write("qm9_test", [str(k) for k in range(130_831)], 10_000 / 130_831)
    write("qm9_val", rest, 10_000 / len(rest))
