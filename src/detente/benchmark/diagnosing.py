"""`detente diagnose`: train a problem while a recorder looks on, and a page of what it saw."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detente.benchmark.job import Job, Progress
from detente.benchmark.problem import Problem
from detente.benchmark.specs import Spec
from detente.benchmark.supervised import Supervised
from detente.diagnostics import Recorder

__all__ = ["record"]

NEVER = 1 << 60  # steps between the comparison's own looks at the gradients


def record(
    problem: Problem,
    spec: Spec,
    settings: Mapping[str, Any],
    path: Path,
    progress: Progress,
    *,
    every: int,
    data: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> str | None:
    """Train once on the training split, and write a recording; the test split is never looked at.

    Returns:
        Why it ended early, which leaves the recording of the steps so far; else None.

    Raises:
        ValueError: the problem has no losses on batches that could be recorded.
    """
    if not problem.supervised:
        raise ValueError(
            f"problem {problem.name!r} trains in a way of its own. Attach a detente.Recorder to a loop instead, and "
            "give its file to `detente diagnose`."
        )
    job = Job(
        problem.source,
        label=spec.label,
        method=spec.label,
        task=None,
        seed=seed,
        settings={**settings, "probe_every": NEVER},
        data=None if data is None else str(data),
        device=device,
        trial=0,
    )
    training = Supervised(job)
    if path.exists():  # a recording is worth hours; the one before is kept
        os.replace(path, path.with_stem(path.stem + "-before"))

    def say(fraction: float, text: str) -> None:
        progress(job.event(fraction, text))

    try:
        with Recorder(training.model, path, every, realised_every=1):
            while not training.done():
                training.run_epoch(say)
                say(training.epoch / settings["epochs"], training.line())
    except KeyboardInterrupt:
        return "Interrupted"
    except FloatingPointError as error:
        return f"Diverged: {error}"
    finally:
        progress(job.end())
    return None
