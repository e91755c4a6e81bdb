"""The report in a real browser: what a reader would see, not what the template says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import plotly.graph_objects as go
import pytest

from benchmark.synthetic import METHODS, SCENES, write_comparison
from detente.benchmark.report import figure_sections, styles, write_report
from detente.benchmark.results import load_comparison, verdict
from detente.benchmark.tables import result_grid

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# CI installs Chromium and sets the variable, so that there these tests fail rather than skip
browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("DETENTE_REQUIRE_CHROMIUM"), reason="no Chromium or Chrome on this machine"
)
PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 200 100" width="900"><circle r="40"/></svg>'
HOSTILE = '<img src=x onerror="console.error(1)"></script>'


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The report of three tasks with nine metrics, six methods and three seeds, and one picture."""
    directory = write_comparison(tmp_path_factory.mktemp("scenes"), "scenes", SCENES)
    (directory / "figures").mkdir()
    (directory / "figures" / "loss_surface.svg").write_text(PICTURE)
    return write_report(load_comparison(directory), directory)


def browse(page: Path, tmp_path: Path, script: str = "", width: int = 1280, dark: bool = False) -> tuple[str, str]:
    """The DOM of `page` in a frame of `width` pixels (a window cannot be as narrow as a phone), and the console.

    `script` runs in the loaded page with `report` (its window) and `say(object)`, which leaves JSON for `said`.
    """
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f"""<!doctype html><body style="margin:0"><iframe id="frame" style="border:0;width:{width}px;height:3000px"
        src="{page.as_uri()}"></iframe><pre id="said"></pre><script>
        const say = value => document.getElementById("said").textContent = JSON.stringify(value);
        frame.onload = () => {{ const report = frame.contentWindow, page = report.document; {script};
          const copy = document.createElement("template"); copy.id = "copy";
          page.querySelectorAll("script").forEach(each => each.remove());
          copy.innerHTML = page.documentElement.outerHTML; document.body.append(copy); }};
        </script>"""
    )
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run", "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--window-size=1400,3000", *scheme,
            "--virtual-time-budget=20000", "--dump-dom", wrapper.as_uri(),
        ],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, console


def said(dom: str) -> object:
    return json.loads(re.search(r'<pre id="said">(.*?)</pre>', dom, re.S).group(1))


def heads_of(grid) -> list[str]:
    return ["method", *(column.name for column in grid.columns)]


@browser
def test_every_plot_is_drawn_and_the_console_stays_silent(report, tmp_path):
    # the page's own policy forbids every request, so a silent console also means that none was tried
    dom, console = browse(report, tmp_path, "say([...page.querySelectorAll('.plot')].map(p => p.id))")
    assert console == ""
    plots = said(dom)
    comparison = load_comparison(report.parent)
    assert plots == [f"plot-{figure.key}" for section in figure_sections(comparison) for figure in section.figures]
    drawn = re.findall(r'id="(plot-[\w-]+)".{0,900}?class="main-svg"', dom, re.S)
    assert drawn == plots


@browser
def test_the_console_check_would_notice_a_request(report, tmp_path):
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(report.read_text().replace("<main>", '<main><img src="https://example.org/x.png" alt="">', 1))
    assert "Content Security Policy" in browse(spoilt, tmp_path)[1]


@browser
@pytest.mark.parametrize("width", [390, 320])
def test_nothing_is_wider_than_a_phone(report, tmp_path, width):
    script = """
        const wide = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll > *, .legend > *, svg svg"))
            .filter(e => e.getBoundingClientRect().width && e.getBoundingClientRect().right > report.innerWidth + 0.5)
            .filter(e => !e.closest("defs, .draglayer, .infolayer, .layer-below, .layer-above"));
        const {scrollWidth, clientWidth} = page.documentElement;
        say({inner: report.innerWidth, over: scrollWidth - clientWidth, wide: wide.map(e => e.outerHTML.slice(0, 200)),
             tables: [...page.querySelectorAll(".scroll")].map(e => [e.scrollWidth, e.clientWidth])})"""
    found = said(browse(report, tmp_path, script, width=width)[0])
    assert (found["inner"], found["over"], found["wide"]) == (width, 0, [])
    results = found["tables"][0]
    assert results[0] > results[1]  # the wide table scrolls in its own box


@browser
def test_a_click_on_a_heading_sorts_by_its_column(report, tmp_path):
    comparison = load_comparison(report.parent)
    grid = result_grid(comparison)
    place = heads_of(grid).index("mean_angle")
    script = f"""
        const table = page.querySelector("table.sortable");
        const head = table.tHead.rows[table.tHead.rows.length - 1].cells[{place}];
        const order = () => [...table.tBodies[0].rows].map(r => r.cells[0].textContent.trim().replace(/^\\S+\\s+/, ""));
        const states = [[order(), null]];
        for (let i = 0; i < 2; i++) {{
          head.querySelector("button").click(); states.push([order(), head.getAttribute("aria-sort")]); }}
        say(states)"""
    before, once, twice = said(browse(report, tmp_path, script)[0])
    up = [label for label, cells in sorted(grid.rows, key=lambda row: row[1][place - 1].value)]
    assert before[0] == [row.label for row in comparison.rows]
    assert once == [up, "ascending"]
    assert twice == [up[::-1], "descending"]


@browser
def test_values_that_are_not_there_sort_last_both_ways(report, tmp_path):
    place = heads_of(result_grid(load_comparison(report.parent))).index("rank")
    script = f"""
        const table = page.querySelector("table.sortable"), last = [];
        const button = table.tHead.rows[table.tHead.rows.length - 1].cells[{place}].querySelector("button");
        for (let i = 0; i < 2; i++) {{
          button.click(); last.push(table.tBodies[0].rows[6].cells[0].textContent.trim()); }}
        say(last)"""
    assert all(label.endswith("single") for label in said(browse(report, tmp_path, script)[0]))


@browser
def test_the_legend_hides_a_method_in_every_figure(report, tmp_path):
    script = """
        const traces = () => [...page.querySelectorAll(".plot")].flatMap(p => p._fullData)
            .filter(t => t.meta === "mgda").map(t => t.visible);
        const button = page.querySelector('.legend button[data-label="mgda"]'), before = traces();
        button.click();
        say([before, traces(), button.getAttribute("aria-pressed")])"""
    before, after, pressed = said(browse(report, tmp_path, script)[0])
    assert len(before) > 15
    assert all(before)
    assert not any(after)
    assert pressed == "false"


@browser
def test_dark_mode_and_print_have_their_own_colours(report, tmp_path):
    script = """
        const look = () => [report.getComputedStyle(page.body).backgroundColor,
                            page.getElementById("plot-price")._fullLayout.font.color];
        const screen = look();
        report.dispatchEvent(new Event("beforeprint")); const paper = look();
        report.dispatchEvent(new Event("afterprint")); say([screen, paper, look()])"""
    light, paper, _ = said(browse(report, tmp_path, script)[0])
    dark, paper_from_dark, again = said(browse(report, tmp_path, script, dark=True)[0])
    assert light[1] != dark[1]
    assert light[0] != dark[0]
    assert paper_from_dark == paper
    assert paper[1] == light[1]
    assert again == dark


@browser
def test_names_are_text_never_markup(tmp_path):
    directory = write_comparison(tmp_path / "hostile", HOSTILE, methods=("gd", HOSTILE), epochs=3)
    path = write_report(load_comparison(directory), directory)
    dom, console = browse(
        path, tmp_path, "say([page.querySelectorAll('img').length, page.querySelector('h1').textContent])"
    )
    assert console == ""
    assert said(dom.replace("&lt;", "<").replace("&gt;", ">")) == [0, HOSTILE]


def test_it_is_one_file_without_addresses_to_load(report):
    page = report.read_text()
    assert [path.name for path in report.parent.glob("*.html")] == ["report.html"]
    own = page.replace(page[page.index("/**\n* plotly.js") : page.index('<script id="plots"')], "")
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", own)
    assert "http" not in own.replace("http-equiv", "")
    assert page.count("* plotly.js v") == 1
    assert page.count("data:image/svg+xml;base64,") == 1
    assert "<figcaption>loss surface</figcaption>" in page


def test_it_says_the_verdict_the_command_and_how_to_read_it(report):
    comparison, page = load_comparison(report.parent), report.read_text()
    assert verdict(comparison) in page
    assert comparison.command in page
    assert "How to read this" in page
    levels = [int(level) for level in re.findall(r"<h([1-6])", page[: page.index("<script>")])]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    assert all(re.findall(r'role="img" aria-label="([^"]*)"', page))


def test_the_same_comparison_gives_the_same_bytes(report, tmp_path):
    assert write_report(load_comparison(report.parent), tmp_path).read_bytes() == report.read_bytes()


def test_every_figure_is_a_valid_plotly_figure(report):
    """Plotly's own schema catches a misspelt property, which plotly.js would silently ignore."""
    for section in figure_sections(load_comparison(report.parent)):
        for figure in section.figures:
            text = re.sub(r"var\(--\w+\)", "#123456", json.dumps([figure.data, figure.layout]))
            data, layout = json.loads(text)
            assert go.Figure(data=data, layout=layout).data


def test_a_method_looks_the_same_everywhere_and_unlike_the_others(tmp_path):
    methods = ("gd", *(f"cagrad(c={k / 20})" for k in range(1, 20)))
    comparison = load_comparison(write_comparison(tmp_path, methods=methods, epochs=2))
    looks = styles(comparison)
    assert len({(look.colour, look.dash, look.marker) for look in looks.values()}) == len(methods) + 1
    for section in figure_sections(comparison):
        for figure in section.figures:
            for trace in figure.data:
                if "meta" in trace and trace.get("mode") == "markers":
                    assert trace["marker"]["symbol"] == looks[trace["meta"]].marker
                elif "meta" in trace and trace.get("fill") is None:
                    assert trace["line"]["color"] == looks[trace["meta"]].colour


def test_colours_do_not_depend_on_who_won(tmp_path):
    first = styles(load_comparison(write_comparison(tmp_path / "a")))
    second = styles(load_comparison(write_comparison(tmp_path / "b", single=False)))
    assert all(first[label] == second[label] for label in METHODS)


def test_curves_are_the_mean_over_seeds_with_the_span_of_the_seeds(tmp_path):
    comparison = load_comparison(write_comparison(tmp_path, epochs=4))
    curves = next(section for section in figure_sections(comparison) if section.key == "curves").figures
    traces = [trace for trace in curves[0].data if trace["meta"] == "gd"]
    losses = [[row["loss"]["left"] for row in job.history] for job in comparison.jobs if job.label == "gd"]
    band, line = traces
    # six significant digits are drawn
    assert line["y"] == pytest.approx([sum(seeds) / 3 for seeds in zip(*losses, strict=True)], rel=1e-5)
    low, high = ([pick(seeds) for seeds in zip(*losses, strict=True)] for pick in (min, max))
    assert band["y"] == pytest.approx([*low, *high[::-1]], rel=1e-5)


@pytest.mark.parametrize("options", [{"seeds": (0,)}, {"single": False}, {"methods": ("gd",)}, {"epochs": 1}])
def test_small_comparisons_have_a_report_too(tmp_path, options):
    comparison = load_comparison(write_comparison(tmp_path, **options))
    page = write_report(comparison, tmp_path).read_text()
    assert verdict(comparison) in page
    assert ("delta-m per method" in page) == ("single" not in options)


def test_five_tasks_have_a_heat_map_per_method(tmp_path):
    tasks = {name: {"accuracy": "max"} for name in "abcde"}
    comparison = load_comparison(write_comparison(tmp_path, tasks=tasks, epochs=3))
    sections = {section.key: section.figures for section in figure_sections(comparison)}
    maps = [figure for figure in sections["conflict"] if figure.key.startswith("cosine")]
    assert [figure.caption.split(":")[0] for figure in maps] == [
        row.label for row in comparison.rows if row.label != "single"
    ]
    assert all(figure.data[0]["z"][k][k] is None for figure in maps for k in range(5))
    assert "trade" not in sections


def test_a_loss_over_many_orders_of_magnitude_is_on_a_log_scale(tmp_path):
    directory = write_comparison(tmp_path, methods=("gd",), epochs=4)
    for file in directory.glob("runs/*/*/result.json"):
        job = json.loads(file.read_text())
        for row in job["history"]:
            row["loss"] = dict.fromkeys(row["loss"], 10.0 ** (-row["epoch"]))
        file.write_text(json.dumps(job))
    sections = {section.key: section.figures for section in figure_sections(load_comparison(directory))}
    assert [figure.layout["yaxis"]["type"] for figure in sections["curves"]] == ["log", "linear"] * 2
