"""The global random generators: seeding, saving and restoring all of them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "seed", "set_random_state"]


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002
    random.seed(number)


def random_state(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    assert isinstance(keys, np.ndarray)
    state = {"torch": torch.get_rng_state(), "numpy": [str(name), keys.tolist(), *rest], "python": random.getstate()}
    return state if device.type != "cuda" else {**state, "cuda": torch.cuda.get_rng_state(device)}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
