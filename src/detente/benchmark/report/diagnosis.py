"""The page of a recording: what it means, and its figures."""

from __future__ import annotations

import base64
import html
import io
import re
from pathlib import Path

import numpy as np
from markupsafe import Markup

from detente.benchmark.report.page import environment
from detente.diagnostics import Diagnosis, Recording, figures

__all__ = ["write_diagnosis"]


def write_diagnosis(recording: Recording, diagnosis: Diagnosis, path: Path, title: str) -> Path:
    """Write one self-contained HTML file, without scripts, and return its path."""
    shown = []
    for number, (name, about, figure) in enumerate(figures(recording)):
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=170)
        data = base64.b64encode(content.getvalue()).decode("ascii")
        shown.append({"key": f"figure-{number}", "title": name, "about": about, "data": data})
    step = recording.steps[1] - recording.steps[0] if len(recording.steps) > 1 else 0
    facts = {
        "file": str(recording.path),
        "records": f"{len(recording.steps)}, of steps {recording.steps[0]} to {recording.steps[-1]}"
        + (f", one in {step} at first" if step else ""),
        "tasks": ", ".join(recording.tasks),
        "layers with shared parameters": str(len(recording.layers)),
        "methods": ", ".join(dict.fromkeys(name or "none" for name in recording.methods)),
        "curvature along the step": _curvature(recording),
    }
    page = environment().get_template("diagnosis.html.j2")
    path.write_text(
        page.render(
            title=title,
            headline=_code(diagnosis.headline),
            answers=[(a.question, _code(a.answer), _code(a.evidence)) for a in diagnosis.answers],
            figures=shown,
            facts={key: value for key, value in facts.items() if value},
        ),
        encoding="utf-8",
    )
    return path


def _code(text: str) -> Markup:
    """Text in backticks and commands as code."""
    safe = html.escape(text)
    safe = re.sub(r"(detente compare \S+ --methods.*)$", r"<code>\1</code>", safe)
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", safe))


def _curvature(recording: Recording) -> str:
    found = []
    for t, task in enumerate(recording.tasks):
        values = recording.curvature[:, t]
        values = values[np.isfinite(values)]
        if len(values):
            found.append(f"{task} {np.median(values):.3g}")
    return "; ".join(found) + " (medians)" if found else ""
