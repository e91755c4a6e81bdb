"""Every framework on two processes, where each sees half of a batch: the parameters of one process on all of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from distributed.matrix import launch
from integrations.worker import RUNS, error

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("framework", RUNS)
# Lightning asks for what torch has renamed, and for more workers of the data loader
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*does not have many workers")
def test_two_processes_give_what_one_gives(framework, tmp_path, monkeypatch):
    pytest.importorskip(framework if framework != "torchrun" else "torch")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wanted = RUNS[framework](1, tmp_path)
    finally:
        torch.set_default_dtype(before)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    done = launch(2, "-m", "integrations.worker", framework, str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert list(found) == list(wanted)
    for variant, parameters in wanted.items():
        assert error(found[variant], parameters) < 1e-10, variant
