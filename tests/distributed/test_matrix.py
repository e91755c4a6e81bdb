"""The same update on one process and on many; see matrix.py, which prints the whole table."""

from __future__ import annotations

import pytest

from distributed.matrix import DTYPES, KINDS, METHODS, REPLICATED, SHARDED, matrix, missed, refused, shown

NAMED = ("gd", "cagrad", "pcgrad", "wpcgrad", "cdtt", "strength 1", "strength 2", "nash_mtl", "famo", "gradnorm")
# four processes share two cores here, so that they take what two do not show
CELLS = {
    2: [(setup, tuple(METHODS) if setup in ("bare", "fsdp2", "tp") else NAMED) for setup in (*REPLICATED, *SHARDED)],
    4: [("bare", NAMED), ("hsdp", NAMED), ("fsdp2 x tp", NAMED)],
}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "setup"),
    [(s, setup) for s in CELLS for setup, _ in CELLS[s] if any(not refused(setup, m, "even", s) for m in METHODS)],
)
def test_the_update_is_that_of_one_process(size, setup):
    methods = dict(CELLS[size])[setup]
    kinds = KINDS if size == 2 else ("uneven", "missing")
    dtypes = tuple(DTYPES) if size == 2 and setup in ("bare", "fsdp2") else ("float64",)
    rows = matrix(size, [setup], methods, kinds, dtypes)
    assert len(rows) >= len(NAMED)
    assert not missed(rows), shown(rows)
