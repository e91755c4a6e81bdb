from __future__ import annotations

import csv
import io
import json

import pytest
from rich.console import Console

from benchmark.synthetic import DIGITS, SCENES, make_job, write_comparison, write_job
from detente.benchmark import tables
from detente.benchmark.results import load_comparison


@pytest.fixture
def digits(tmp_path):
    return load_comparison(write_comparison(tmp_path / "digits"))


@pytest.fixture
def scenes(tmp_path):
    return load_comparison(write_comparison(tmp_path / "scenes", "scenes", SCENES))


def printed(*found, width=100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(*found, sep="")
    return console.file.getvalue()


def test_the_grid_marks_the_best_multi_task_mean_in_its_direction(scenes):
    grid = tables.result_grid(scenes)
    for index, column in enumerate(grid.columns):
        values = {label: cells[index].value for label, cells in grid.rows if label != "single"}
        best = {label for label, cells in grid.rows if cells[index].best}
        if column.direction is None:
            assert not best
        else:
            pick = max if column.direction == "max" else min
            assert best == {label for label, value in values.items() if value == pick(values.values())}


def test_delta_m_per_task_shows_only_where_it_differs(digits, scenes):
    names = [[column.name for column in tables.result_grid(c).columns if not column.group] for c in (digits, scenes)]
    assert names == [["Δm %", "rank", "conflicts"], ["Δm %", "Δm % by task", "rank", "conflicts"]]


def test_one_seed_shows_a_dash_for_its_interval(tmp_path):
    comparison = load_comparison(write_comparison(tmp_path, seeds=(0,)))
    grid = tables.result_grid(comparison)
    assert all(cells[0].text.endswith(" ± -") for _, cells in grid.rows)
    assert "1 seed, so no intervals" in printed(*tables.result_tables(comparison))


def test_a_diverged_method_is_named_so_and_never_best(tmp_path):
    write_comparison(tmp_path, epochs=2)
    job = make_job("digits", DIGITS, "mgda", 0, 2, 0.0)
    job["metrics"]["left"]["accuracy"] = float("nan")
    write_job(tmp_path, "mgda", job)
    cells = dict(tables.result_grid(load_comparison(tmp_path)).rows)["mgda"]
    assert [cell.text for cell in cells if cell.text == "diverged"] == ["diverged"] * 2  # the metric and delta-m
    assert not any(cell.best for cell in cells)


def test_two_tasks_with_a_metric_each_are_one_table_of_100_columns(digits):
    (table,) = tables.result_tables(digits)
    text = printed(table)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for word in ("left", "right", "accuracy ↑", "Δm % ↓", "cagrad(c=0.8)"):
        assert word in text


def test_many_metrics_are_split_per_task_and_nothing_is_cut(scenes):
    found = tables.result_tables(scenes)
    text = printed(*found)
    assert len(found) == 4
    assert "…" not in text
    for task, metrics in SCENES.items():
        assert f": {task}" in text
        assert all(metric in text for metric in metrics)


def test_one_task_too_wide_for_the_terminal_is_cut_into_several_tables(tmp_path):
    tasks = {"all": {name: "min" for names in SCENES.values() for name in names}, "left": {"accuracy": "max"}}
    found = tables.result_tables(load_comparison(write_comparison(tmp_path, tasks=tasks)))
    assert len(found) == 4  # summary, two for "all", one for "left"
    assert "…" not in printed(*found)


def test_csv_has_every_figure_in_full_precision_and_comes_back(scenes):
    rows = list(csv.DictReader(io.StringIO(tables.results_csv(scenes))))
    read = {(r["label"], r["task"], r["metric"], r["seed"]): float(r["value"]) for r in rows}
    assert len(read) == len(rows)
    for row in scenes.rows:
        for (task, metric), estimate in row.metrics.items():
            for seed, value in estimate.by_seed.items():
                assert read[row.label, task, metric, str(seed)] == value
            assert read[row.label, task, metric, "mean"] == estimate.mean
            assert read[row.label, task, metric, "high"] == estimate.interval[1]
        assert read[row.label, "", "delta_m", "mean"] == row.delta_m.mean
    assert {r["direction"] for r in rows if r["metric"] == "absolute_error"} == {"min"}


def test_csv_is_the_same_to_the_byte_whatever_the_timings(tmp_path):
    texts = []
    for factor in (1.0, 7.0):
        write_comparison(tmp_path)
        for file in tmp_path.glob("runs/*/*/result.json"):
            job = json.loads(file.read_text())
            job["cost"]["step_ms"] *= factor
            file.write_text(json.dumps(job))
        comparison = load_comparison(tmp_path)
        texts.append((tables.results_csv(comparison), tables.cost_csv(comparison)))
    assert texts[0][0] == texts[1][0]
    assert texts[0][1] != texts[1][1]


def test_cost_csv_comes_back(digits):
    rows = list(csv.DictReader(io.StringIO(tables.cost_csv(digits))))
    for row, cost in zip(rows, digits.costs, strict=True):
        assert (row["label"], float(row["step_ms"]), float(row["ratio"])) == (cost.label, cost.step_ms, cost.ratio)
        assert (float(row["peak_mb"]), int(row["parameters"])) == (cost.peak_mb, cost.parameters)


def test_markdown_is_a_regular_table_with_the_best_in_bold(scenes):
    grid = tables.result_grid(scenes)
    head, rule, *body = tables.markdown(grid).splitlines()
    assert head.count("|") == rule.count("|") == body[0].count("|") == len(grid.columns) + 2
    assert len(body) == len(grid.rows)
    assert "depth absolute_error ↓" in head
    best = next(cells for label, cells in grid.rows if label == "cagrad(c=0.8)")[0]
    assert f"| cagrad(c=0.8) | **{best.text}** |" in body[1]


def test_latex_uses_booktabs_and_escapes(scenes):
    text = tables.latex(tables.result_grid(scenes))
    for part in (r"\toprule", r"\midrule", r"\bottomrule", r"\multicolumn{2}{c}{depth}", r"pixel\_accuracy $\uparrow$",
                 r"$\Delta$m \% $\downarrow$", r"\textbf{", r"$\pm$"):  # fmt: skip
        assert part in text
    columns = len(tables.result_grid(scenes).columns)
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:]
    assert all(line.count("&") == columns and line.endswith(r"\\") for line in body)
    assert not {"±", "Δ", "↑", "↓"} & set(text)


def test_labels_are_text_in_every_form(tmp_path):
    comparison = load_comparison(write_comparison(tmp_path, methods=("gd", "a|b[bold]&_x")))
    grid = tables.result_grid(comparison)
    assert "a\\|b[bold]&_x" in tables.markdown(grid)
    assert r"a|b[bold]\&\_x" in tables.latex(grid)
    assert "a|b[bold]&_x" in printed(*tables.result_tables(comparison), tables.cost_table(comparison))
