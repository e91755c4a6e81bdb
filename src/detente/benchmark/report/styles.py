"""How a label looks in every figure, and which labels are drawn before the reader asks for more."""

from __future__ import annotations

from dataclasses import dataclass

from detente.benchmark.results import EQUAL, SINGLE, Comparison

__all__ = ["Style", "drawn_first", "styles"]

COLOURS = 7
"""Colours ``--m0`` to ``--m6`` of the page: the first, grey, is that of equal weights."""
MARKERS = (
    ("circle", "●"), ("square", "■"), ("diamond", "◆"), ("triangle-up", "▲"), ("cross", "✚"), ("star", "★"),
    ("triangle-down", "▼"), ("circle-open", "○"), ("square-open", "□"), ("diamond-open", "◇"),
    ("triangle-up-open", "△"), ("cross-open", "✛"), ("star-open", "☆"), ("triangle-down-open", "▽"),
)  # fmt: skip
"""Plotly's name and the character of each marker."""
CONTROL_MARKERS = (
    ("diamond-tall-open", "◊"), ("triangle-right-open", "▷"), ("triangle-left-open", "◁"), ("circle-cross-open", "⊕"),
    ("square-x-open", "⊠"), ("circle-x-open", "⊗"), ("square-cross-open", "⊞"), ("bowtie-open", "⋈"),
)  # fmt: skip
"""Those of controls; the first is that of the best fixed weights."""
DASHES = ("solid", "dash", "dashdot")
MISSION = ("cagrad", "wpcgrad", "cdtt", "connection_strength")
FEW = 12
"""Up to so many labels are all drawn at first."""
BEST = 6


@dataclass(frozen=True)
class Style:
    """How a label looks in every figure."""

    label: str
    colour: str
    dash: str
    marker: str
    glyph: str


def styles(comparison: Comparison) -> dict[str, Style]:
    """Label -> style, in the order of the rows. It depends on the order asked for, not on who won."""
    listed = [label for label in comparison.config["methods"] if label not in (SINGLE, EQUAL)]
    labels = [row.label for row in comparison.rows if row.control is None]
    order = [EQUAL, *listed, *sorted(set(labels) - {EQUAL, SINGLE, *listed})]
    asked = [label for label, kind in comparison.config.get("controls", {}).items() if kind != "sweep"]
    found = {}
    for row in comparison.rows:
        label = row.label
        if label == SINGLE:
            found[label] = Style(label, "var(--ink)", "dot", "x", "✖")
        elif row.control is not None:
            place = 0 if row.control == "sweep" else 1 + asked.index(label)
            marker, glyph = CONTROL_MARKERS[place % len(CONTROL_MARKERS)]
            found[label] = Style(label, "var(--control)", "dot", marker, glyph)
        else:
            place = order.index(label)
            marker, glyph = MARKERS[place % len(MARKERS)]
            dash = DASHES[place // COLOURS % len(DASHES)]
            found[label] = Style(label, f"var(--m{place % COLOURS})", dash, marker, glyph)
    return found


def drawn_first(comparison: Comparison) -> set[str]:
    """All labels where they are few, else the baselines, the best methods and those this package is about."""
    labels = [row.label for row in comparison.rows]
    if len(labels) <= FEW:
        return set(labels)
    best = [row.label for row in comparison.methods if row.label != EQUAL][:BEST]
    mission = [label for label in labels if label.partition("(")[0] in MISSION]
    return {label for label in (SINGLE, EQUAL, *best, *mission) if label in labels}
