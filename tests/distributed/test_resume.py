"""A process is killed in the middle of a run, and the run goes on, on fewer processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distributed.matrix import launch

STEPS, KILLED = 12, 6
SCRIPT = Path(__file__).with_name("resume.py")
pytestmark = pytest.mark.long


def losses(folder: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    found = {row["step"]: [*row["losses"], *row["weights"].values()] for row in rows}
    assert sorted(found) == list(range(STEPS))
    return [found[step] for step in range(STEPS)]


@pytest.mark.parametrize("setup", ["ddp", "fsdp2"])
def test_a_killed_run_goes_on_with_fewer_processes(setup, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    done = launch(1, SCRIPT, str(whole), "bare", str(STEPS))
    assert done.returncode == 0, done.stderr[-3000:]

    monkeypatch.setenv("DETENTE_TEST_KILL", str(KILLED))
    killed = launch(4, SCRIPT, str(broken), setup, str(STEPS))
    assert killed.returncode != 0
    assert len((broken / "losses.jsonl").read_text().splitlines()) == KILLED
    monkeypatch.delenv("DETENTE_TEST_KILL")
    resumed = launch(2, SCRIPT, str(broken), setup, str(STEPS))
    assert resumed.returncode == 0, resumed.stderr[-3000:]

    for before, after in zip(losses(whole), losses(broken), strict=True):
        # float32: a step rounds at 1e-7, and twelve of them with momentum add up
        assert after == pytest.approx(before, rel=2e-6)
