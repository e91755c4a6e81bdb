"""One self-contained HTML file that shows a comparison or a diagnosis: it needs no network, server or other file.

Figures are plain plotly.js specifications, built here and drawn in the page. A colour is written as the name of a CSS
variable (``var(--m1)``) and looked up when a figure is drawn, so that one specification serves light, dark and print.
A method keeps its colour, dash and marker in every figure; the marker tells methods apart without colour.
"""

from detente.benchmark.report.diagnosis import write_diagnosis
from detente.benchmark.report.figures import figure_sections
from detente.benchmark.report.page import write_report
from detente.benchmark.report.styles import styles

__all__ = ["figure_sections", "styles", "write_diagnosis", "write_report"]
