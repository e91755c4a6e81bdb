"""Those who look on while steps are taken, such as a recorder. They change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from detente.engine.distributed import Processes
from detente.engine.graph import Reach
from detente.method import Method, Update

__all__ = ["Seen", "Watcher", "watchers", "watching"]


@dataclass(frozen=True)
class Seen:
    """The losses of a step, before anything is written.

    Attributes:
        named: losses by task, whose graph is still there; with several processes, this one's part of them.
        found: the leaves behind them.
        among: the processes that take the step together.
        scale: factor that is already inside the losses.
    """

    named: dict[str, Tensor]
    found: Reach
    among: Processes | None
    scale: float = 1.0


class Watcher(Protocol):
    """What is told of every step, in this order."""

    def losses(self, seen: Seen) -> None:
        """A step is about to be taken; the graph must be left as it is."""

    def sequence(self, seen: Callable[[], Seen]) -> None:
        """As `losses`, before a sequence of steps for one task each; ``seen`` computes what `losses` would be told."""

    def updated(self, method: Method, update: Update) -> None:
        """What the step wrote."""

    def stepped(self, again: Callable[[], Mapping[str, float]] | None) -> None:
        """The optimizer has stepped; ``again`` computes the losses once more on the same samples."""


_WATCHERS: ContextVar[tuple[Watcher, ...]] = ContextVar("detente_watchers", default=())


def watchers() -> tuple[Watcher, ...]:
    """Who looks on here."""
    return _WATCHERS.get()


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Let somebody look on at the steps taken inside."""
    token = _WATCHERS.set((*_WATCHERS.get(), watcher))
    try:
        yield
    finally:
        _WATCHERS.reset(token)
