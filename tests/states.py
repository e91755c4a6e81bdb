"""States made comparable."""

from __future__ import annotations

from torch import Tensor


def plain(state: object) -> object:
    """A state as lists and numbers, every entry of every tensor, so that == compares all of it."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain(value) for value in state]
    return state.tolist() if isinstance(state, Tensor) else state
