"""What methods and sources remember, in one piece."""

from __future__ import annotations

import io
from typing import Any, Protocol

import torch

__all__ = ["History"]


class _Remembers(Protocol):
    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class History:
    """The histories of methods and sources as one entry of a ``torch.distributed.checkpoint``.

    That loads only what a new object has room for, and the history of a new method is empty: its own ``state_dict()``
    would come back as it was. With ``torch.save`` and ``torch.load`` no such thing is needed. A history is the same on
    all processes, so that a run may go on with another number of them.

    Args:
        parts: methods, :class:`detente.Every`, :class:`detente.Sampled`, loss weightings.

    Raises:
        ValueError: on loading, where the checkpoint has another number of parts.

    Example:
        >>> import detente
        >>> method, source = detente.CDTT(), detente.Every(4)
        >>> state = {"history": detente.History(method, source)}  # beside "model" and "optimizer"; dcp.save(state, ...)
        >>> sorted(state["history"].state_dict())
        ['history']
    """

    def __init__(self, *parts: _Remembers) -> None:
        self.parts = parts

    def state_dict(self) -> dict[str, Any]:
        """All histories as bytes."""
        data = io.BytesIO()
        torch.save([part.state_dict() for part in self.parts], data)
        return {"history": data.getvalue()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved histories."""
        saved = torch.load(io.BytesIO(state["history"]), weights_only=True)
        if len(saved) != len(self.parts):
            raise ValueError(f"the checkpoint has the histories of {len(saved)} objects; expected {len(self.parts)}.")
        for part, history in zip(self.parts, saved, strict=True):
            part.load_state_dict(history)
