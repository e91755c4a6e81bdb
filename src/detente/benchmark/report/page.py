"""The page around the figures."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from detente.benchmark.protocol import PROTOCOLS
from detente.benchmark.report.against import against
from detente.benchmark.report.figures import Section, figure_sections, metric_choices
from detente.benchmark.report.styles import drawn_first, styles
from detente.benchmark.results import Comparison, verdict
from detente.benchmark.tables import cost_grid, result_grid, tuning_rows

__all__ = ["environment", "write_report"]

IMAGES = {".svg": "image/svg+xml", ".png": "image/png"}
CONTROLS = {
    "sweep": "control: the best of the fixed weightings, chosen on validation",
    "extracted": "control: the mean weights of a method, fixed from the start",
    "wider": "control: equal weights on a wider network",
}


def environment() -> Environment:
    """The templates of all pages."""
    found = Environment(
        loader=PackageLoader("detente.benchmark", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return found


def write_report(
    comparison: Comparison, directory: str | Path, headline: str | None = None, other: Comparison | None = None
) -> Path:
    """Write ``report.html`` into `directory` and return its path; the same comparison gives the same bytes.

    `headline` stands at the top; None is the verdict on the methods. `other` is a run to lay this one beside.

    Pictures that a problem has left in ``figures/*.svg`` or ``*.png`` of the comparison are embedded.
    """
    sections = figure_sections(comparison)
    template = environment().get_template("report.html.j2")
    page = template.render(
        comparison=comparison,
        verdict=verdict(comparison) if headline is None else headline,
        protocol=PROTOCOLS.get(comparison.protocol, "unknown"),
        styles=styles(comparison),
        drawn=drawn_first(comparison),
        controls={row.label: CONTROLS[row.control] for row in comparison.rows if row.control},
        tables={"results": result_grid(comparison), "cost": cost_grid(comparison)},
        sections=sections,
        metrics=metric_choices(comparison),
        figures=_figures(comparison, sections),
        tuning=_tuning(comparison.config.get("tuning")),
        against=None if other is None else against(comparison, other),
        pictures=list(_pictures(comparison.directory / "figures")),
        configuration=_configuration(comparison.config),
        plotly=Markup(get_plotlyjs()),
    )
    path = Path(directory) / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _figures(comparison: Comparison, sections: Iterable[Section]) -> dict[str, Any]:
    """What the script of the page needs: the views of every figure, and what each control stands at first."""
    state: dict[str, str] = {}
    if found := metric_choices(comparison):
        state["metric"] = found[0].value
    number = 0
    for task, metrics in enumerate(comparison.tasks.values()):
        state[f"metric:{task}"] = str(number)
        number += len(metrics)
    plots = {}
    for section in sections:
        if section.choices:
            state["method"] = section.choices[0].value
        for figure in section.figures:
            views = {
                key: {"data": v.data, "layout": v.layout, "caption": v.caption, "alt": v.alt, "note": v.note}
                for key, v in figure.views.items()
            }
            plots[figure.key] = {"controls": list(figure.controls), "views": views}
    return {"state": state, "plots": plots}


def _tuning(content: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Rows of the table, and the ranges with the runs that share them."""
    if content is None:
        return None
    ranges: dict[tuple[str, str], list[str]] = {}
    for name, space in content["ranges"].items():
        for key, where in space.items():
            ranges.setdefault((key.removeprefix("option "), where), []).append(name)
    everyone = list(content["ranges"])
    scores = {name: [run["trials"][k]["score"] for k in (0, run["trial"])] for name, run in content["runs"].items()}
    return {
        "trials": content["trials"],
        "seed": content["seed"],
        "sampler": content["sampler"],
        "rows": [(row, scores[row[0]]) for row in tuning_rows(content)],
        "ranges": [
            (key, where, "all" if names == everyone else ", ".join(names)) for (key, where), names in ranges.items()
        ],
    }


def _configuration(config: Mapping[str, Any]) -> dict[str, str]:
    """What was asked for and where it ran, as lines of text."""

    def text(value: object) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    lines = {key: text(config[key]) for key in ("problem", "methods", "seeds")}
    if config.get("controls"):
        lines["controls"] = text(list(config["controls"]))
    for part in ("settings", "environment"):
        lines |= {str(key): text(value) for key, value in config.get(part, {}).items()}
    return lines


def _pictures(directory: Path) -> Iterable[tuple[str, str]]:
    """Caption and data URI of every picture. As an image, an SVG can neither run scripts nor load anything."""
    for path in sorted(directory.glob("*")):
        if path.suffix in IMAGES:
            content = base64.b64encode(path.read_bytes()).decode("ascii")
            yield path.stem.replace("_", " "), f"data:{IMAGES[path.suffix]};base64,{content}"
