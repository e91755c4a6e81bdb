"""Impartial multi-task learning."""

from __future__ import annotations

from typing import Literal

from detente.methods.imtl_g import IMTLG
from detente.methods.imtl_l import IMTLL

__all__ = ["IMTL"]


class IMTL(IMTLG):
    """IMTL: losses scaled to equal size, then gradients combined with equal projections.

    Both halves of Liu et al. (2021): :class:`IMTLL` on the losses, whose scaled gradients :class:`IMTLG` combines. ::

        w_i = exp(s_i)                        s_i learned to minimise exp(s_i) L_i - s_i
        d   = IMTL-G of the gradients w_i g_i

    Task-specific parameters follow their own scaled loss.

    Args:
        lr: learning rate of the loss scales.
        zero_rows: ``"drop"`` or ``"keep"`` tasks with a zero gradient.
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Raises:
        ValueError: ``lr`` is not positive, or a loss is not.

    Limits:
        The half for the losses does not change the direction of the shared update, which in :class:`IMTLG` does not
        depend on loss scales; it changes the length, and the heads. Losses that tend to 0 get scales without bound, and
        with them the update its length. For the rest see the limits of :class:`IMTLG` and :class:`IMTLL`.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> detente.aggregate(J, detente.IMTL(), losses=[1.0, 1.0]).tolist()  # scales start at 1
        [0.75, 0.75]
    """

    name = "imtl"
    ranges = IMTLL.ranges
    needs = frozenset({"gramian", "losses"})
    memory = "T scales, Adam"

    def __init__(
        self,
        lr: float = 0.025,
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(zero_rows=zero_rows, heads=heads)
        self.own_weighting = IMTLL(lr)
