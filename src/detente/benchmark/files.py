"""Files of a run, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe", "read_checkpoint", "write_checkpoint", "write_json"]


def write_json(path: Path, content: Any) -> None:
    """Write JSON; numbers that it does not have become null."""
    with _whole(path) as scratch:
        scratch.write_text(json.dumps(_plain(content), indent=1) + "\n")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write that then takes the place of ``path``.

    Its name is its own: a worker that outlives its driver for a moment (Ray's do) may write the same file as the one
    that has taken over.
    """
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    yield scratch
    os.replace(scratch, path)


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write what :func:`read_checkpoint` reads."""
    with _whole(path) as scratch:
        torch.save(content, scratch)


@contextmanager
def read_checkpoint(path: Path) -> Iterator[dict[str, Any]]:
    """The content of a checkpoint; whatever goes wrong while it is taken over is an error that names the file."""
    try:
        yield torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"the checkpoint {path} cannot be used ({describe(error)}). "
            "Delete this file to train from the start; finished runs are not touched."
        ) from error


def describe(error: BaseException) -> str:
    """Type and first line of an error."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
