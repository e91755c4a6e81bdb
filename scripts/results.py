"""Write a finished comparison into docs/results: ``python scripts/results.py runs/digits "what to know"``."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from detente.benchmark import tables
from detente.benchmark.problem import load_problem
from detente.benchmark.protocol import PROTOCOLS
from detente.benchmark.results import Row, differences, load_comparison, verdict

RESULTS = Path(__file__).parents[1] / "docs/results"


def page(directory: Path, remark: str) -> str:
    comparison = load_comparison(directory)
    config = comparison.config
    lines = [
        f"# {comparison.problem}",
        "",
        remark,
        "",
        f"```sh\n{comparison.command}\n```",
        "",
        verdict(comparison),
        "",
    ]
    lines += [f"- {note}" for note in comparison.notes]
    lines += ["", "## Results", "", tables.markdown(tables.result_grid(comparison))]
    lines += [
        f"Mean ± distance to the farther end of the 95% interval over {len(comparison.seeds)} seeds; delta-m in "
        f"percent against single-task training, lower is better. Protocol {comparison.protocol}: "
        f"{PROTOCOLS[comparison.protocol]}. Controls, not methods: "
        f"{', '.join(row.label for row in comparison.rows if row.control) or 'none'}.",
        "",
        "## Against equal weights, seed by seed",
        "",
        "| method | points of delta-m | 95% interval | p | p (Holm) |",
        "|---|---:|---:|---:|---:|",
    ]
    for item in differences(comparison):
        low, high = item.points.student()
        mean = item.points.mean
        lines.append(f"| {item.label} | {mean:.2f} | {low:.2f} to {high:.2f} | {item.p:.4f} | {item.p_holm:.3f} |")
    if comparison.sweep:
        lines += ["", "## Fixed weights", "", *_sweep(comparison.sweep)]
    if config.get("tuning"):
        lines += ["", f"## Tuning: {config['tuning']['trials']} trials each", ""]
        lines += ["| run | defaults | best | chosen |", "|---|---:|---:|---|"]
        lines += [f"| {' | '.join(row)} |" for row in tables.tuning_rows(config["tuning"])]
    problem = load_problem(config["source"]).module
    if hasattr(problem, "summary"):
        for table in problem.summary([json.loads(job.path.read_text()) for job in comparison.jobs]):
            columns = [list(column.cells) for column in table.columns]
            lines += ["", f"## {str(table.title).capitalize()}", ""]
            lines += [f"| {' | '.join(str(column.header) for column in table.columns)} |"]
            lines += ["|---|" + "---:|" * (len(columns) - 1)]
            lines += [f"| {' | '.join(map(str, row))} |" for row in zip(*columns, strict=True)]
    lines += ["", "## Cost", "", tables.markdown(tables.cost_grid(comparison))]
    environment = ", ".join(f"{key} {value}" for key, value in config["environment"].items())
    settings = ", ".join(f"{key} {value}" for key, value in config["settings"].items())
    return "\n".join([*lines, f"Settings: {settings}.", "", f"Environment: {environment}.", ""])


def _sweep(rows: tuple[Row, ...]) -> list[str]:
    columns = list(rows[0].metrics)
    lines = [
        f"| weights | delta-m | {' | '.join(' '.join(column) for column in columns)} |",
        "|---|" + "---:|" * (1 + len(columns)),
    ]
    for row in rows:
        delta = "-" if row.delta_m is None else f"{row.delta_m.mean:.2f}"
        figures = " | ".join(f"{row.metrics[column].mean:.4f}" for column in columns)
        lines.append(f"| {row.label} | {delta} | {figures} |")
    return lines


if __name__ == "__main__":
    source = Path(sys.argv[1])
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = load_comparison(source).problem
    (RESULTS / f"{name}.md").write_text(page(source, sys.argv[2]))
    shutil.copy(source / "results.csv", RESULTS / f"{name}.csv")
