"""The same update on one process and on many: a part of the matrix that matrix.py prints as a whole."""

from __future__ import annotations

import pytest

from distributed.matrix import KINDS, METHODS, MIXED, matrix, missed, shown

NAMED = ("gd", "cagrad", "pcgrad", "wpcgrad", "cdtt", "strength 1", "strength 2", "nash_mtl", "famo", "gradnorm")
FEW = ("cagrad", "strength 1", "strength 2")
SOME = ("cagrad", "pcgrad", "uw")
# processes, set-up, methods, divisions of the batch; four processes share two cores here
PARTS = [
    (2, "bare", tuple(METHODS), KINDS),
    (2, "ddp", NAMED, KINDS),
    (2, "ddp, find_unused", FEW, ("missing",)),
    (2, "ddp, static_graph", FEW, ("missing",)),
    (2, "ddp, bucket_view", FEW, ("missing",)),
    (2, "ddp, compiled", SOME, ("even", "missing")),
    (2, "amp, float16", SOME, ("uneven",)),
    (2, "amp, bfloat16", SOME, ("missing",)),
    (2, "fsdp2", NAMED, KINDS),
    (2, "fsdp2, resharding", FEW, ("missing",)),
    (2, "tp", NAMED, ("even",)),
    (4, "bare", NAMED, ("missing",)),
    (4, "hsdp", FEW, ("missing",)),
    (4, "fsdp2 x tp", FEW, ("missing",)),
]
pytestmark = pytest.mark.long


@pytest.mark.parametrize(("size", "setup", "methods", "kinds"), PARTS, ids=[f"{n} {setup}" for n, setup, *_ in PARTS])
def test_the_update_is_that_of_one_process(size, setup, methods, kinds):
    dtypes = ("float32",) if setup in MIXED else ("float64", "float32") if setup == "ddp" else ("float64",)
    rows = matrix(size, [setup], methods, kinds, dtypes)
    assert len(rows) >= len(kinds) * 2
    assert not missed(rows), shown(rows)
