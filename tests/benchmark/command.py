"""The command line in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from detente.benchmark import cli


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
