"""The command line, in this process and in one that can be killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import detente
from detente.benchmark import cli

PATIENCE = 120.0  # seconds until a test gives up waiting; a loaded machine starts a process in 10


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
    text: str
    """Both, in the order they were printed."""


class _Both(io.StringIO):
    def __init__(self, text: io.StringIO) -> None:
        super().__init__()
        self.text = text

    def write(self, part: str) -> int:
        self.text.write(part)
        return super().write(part)


def run(*arguments: str | Path) -> Outcome:
    """Exit code and output of ``detente ARGUMENTS``."""
    text = io.StringIO()
    out, err = _Both(text), _Both(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["detente", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue(), text.getvalue())


@contextlib.contextmanager
def started(problem: Path, out: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The real command in a process group of its own, slowed down by sleeping; killed at the end if it still lives."""
    source = str(Path(detente.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "detente.benchmark", "compare", str(problem), *more, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "TINY_SLEEP": "0.09"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # a shell that runs the tests in the background has SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(condition: Callable[[], Any], what: str, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process is None or process.poll() is None, f"ended before {what}: {process.communicate()[0]}"
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.01)


def children(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.add(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for being noticed does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def results(out: Path) -> dict[str, dict[str, Any]]:
    """Everything in the result files but what was timed."""
    found = {}
    for path in sorted(out.glob("runs/*/*/result.json")):
        content = json.loads(path.read_text())
        del content["cost"]
        found[str(path.relative_to(out))] = content
    return found
