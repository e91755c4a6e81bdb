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
from scipy import stats

from benchmark.synthetic import METHODS, SCENES, write_comparison
from detente.benchmark.report import figure_sections, styles, write_report
from detente.benchmark.report.against import against, difference
from detente.benchmark.report.styles import drawn_first
from detente.benchmark.results import load_comparison, verdict
from detente.benchmark.statistics import Estimate
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
    """The report of three tasks with nine metrics, six methods, two controls and three seeds, and one picture."""
    directory = write_comparison(
        tmp_path_factory.mktemp("scenes"), "scenes", SCENES, sweep=5, extract=("pcgrad",), tuned=True
    )
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
    places = [heads_of(grid).index(name) for name in ("mean_angle", "rank")]
    script = f"""
        const table = page.querySelector("table.sortable");
        const order = () => [...table.tBodies[0].rows].map(r => r.dataset.label), states = [[order(), null]];
        for (const place of {places}) {{
          const head = table.tHead.rows[table.tHead.rows.length - 1].cells[place];
          for (let i = 0; i < 2; i++) {{
            head.querySelector("button").click(); states.push([order(), head.getAttribute("aria-sort")]); }} }}
        say(states)"""
    before, once, twice, up_rank, down_rank = said(browse(report, tmp_path, script)[0])
    up = [label for label, cells in sorted(grid.rows, key=lambda row: row[1][places[0] - 1].value)]
    assert before[0] == [row.label for row in comparison.rows]
    assert once == [up, "ascending"]
    assert twice == [up[::-1], "descending"]
    assert [order[-1] for order, _ in (up_rank, down_rank)] == ["single", "single"]  # it has no rank
    assert up_rank[0][:-1] != down_rank[0][:-1]


@browser
def test_the_controls_change_what_is_drawn(report, tmp_path):
    """One visit: the legend, the choice of metric and of method, and sorting the tuning table."""
    script = """
        const plot = key => page.getElementById("plot-" + key), full = key => plot(key)._fullData;
        const of = label => [...page.querySelectorAll(".plot")].flatMap(p => p._fullData).filter(t => t.meta === label);
        const grey = key => { const t = full(key).find(t => t.name === "ghosts");
            return t.ids.filter((_, k) => t.marker.size[k] > 0); };
        const choose = (id, value) => { const select = page.getElementById(id); select.value = value;
            select.dispatchEvent(new Event("change")); };
        const gain = () => ({caption: plot("gain").closest("figure").querySelector("figcaption").textContent,
            alt: plot("gain").getAttribute("aria-label"), rows: plot("gain")._fullLayout.yaxis.ticktext,
            means: full("gain").filter(t => t.error_x.visible).map(t => t.x[0])});
        const axes = key => [plot(key)._fullLayout.xaxis.title.text, plot(key)._fullLayout.yaxis.title.text];
        const found = {legend: [of("mgda").map(t => t.visible)], grey: [grey("price")]};
        const pill = page.querySelector('.legend button[data-label="mgda"]');
        pill.click();
        found.legend.push(of("mgda").map(t => t.visible)); found.grey.push(grey("price"));
        found.pressed = pill.getAttribute("aria-pressed");
        page.querySelector('.legend button[data-set="all"]').click();
        found.legend.push(of("mgda").map(t => t.visible));
        found.gain = [gain()]; found.axes = [["trade-0", "trade-1"].map(axes)];
        choose("metric", "3");
        found.gain.push(gain()); found.axes.push(["trade-0", "trade-1"].map(axes));
        choose("metric", "delta_m");
        found.gain.push(gain()); found.axes.push(["trade-0", "trade-1"].map(axes));
        found.heat = [full("cosine")[0].z[0][0]];
        choose("method", "mgda");
        found.heat.push(full("cosine")[0].z[0][0]);
        const tuning = page.querySelector("#tuning table");
        tuning.tHead.rows[0].cells[2].querySelector("button").click();
        found.tuning = [...tuning.tBodies[0].rows].map(r => r.dataset.label);
        say(found)"""
    dom, console = browse(report, tmp_path, script)
    assert console == ""
    found = said(dom)
    comparison = load_comparison(report.parent)
    before, hidden, again = found["legend"]
    assert len(before) > 15
    assert all(before)
    assert not any(hidden)
    assert all(again)
    assert found["grey"] == [[], ["mgda"]]
    assert found["pressed"] == "false"
    first, switched, back = found["gain"]
    assert back == first
    column = ("depth", "relative_error")
    rows = sorted(comparison.rows, key=lambda row: row.metrics[column].mean)
    assert switched["rows"] == [row.label for row in rows]
    assert switched["means"] == pytest.approx([row.metrics[column].mean for row in rows], rel=1e-5)
    assert "relative_error" in switched["caption"]
    assert "relative_error" in switched["alt"]
    assert first["means"] == pytest.approx(sorted(row.delta_m.mean for row in comparison.rows), rel=1e-5, abs=1e-9)
    before, after, kept = found["axes"]
    assert [y for _, y in before] == ["depth absolute_error ↓", "normals mean_angle ↓"]
    assert [y for _, y in after] == ["depth relative_error ↓", "normals mean_angle ↓"]
    assert kept == after  # delta-m is no metric of a task, so the planes stay
    cosines = [mean_cosine(comparison, label, epoch=1)[0][1] for label in (comparison.rows[1].label, "mgda")]
    assert found["heat"] == pytest.approx(cosines, abs=2e-3)
    scores = {name: run["trials"][run["trial"]]["score"] for name, run in comparison.config["tuning"]["runs"].items()}
    assert found["tuning"] == sorted(scores, key=lambda name: -scores[name])


def mean_cosine(comparison, label: str, epoch: int) -> list[list[float]]:
    found = [job.history[epoch - 1]["cosine"] for job in comparison.jobs if job.label == label]
    return [[sum(m[i][j] for m in found) / len(found) for j in range(len(found[0]))] for i in range(len(found[0]))]


@browser
def test_dark_mode_and_print_have_their_own_colours(report, tmp_path):
    script = """
        const look = () => [report.getComputedStyle(page.body).backgroundColor,
                            page.getElementById("plot-price")._fullLayout.font.color,
                            [...page.querySelectorAll(".plot")].map(p => [p.id, p._fullLayout.width - p.clientWidth])
                                .filter(([_, gap]) => Math.abs(gap) > 1)];
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
    assert light[2] == paper[2] == dark[2] == []  # every plot is as wide as its place


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
    for view in views(load_comparison(report.parent)):
        text = re.sub(r"var\(--\w+\)", "#123456", json.dumps([view.data, view.layout]))
        data, layout = json.loads(text)
        assert go.Figure(data=data, layout=layout).data


def views(comparison):
    return [view for s in figure_sections(comparison) for figure in s.figures for view in figure.views.values()]


def figures_of(comparison, section: str):
    return {s.key: s.figures for s in figure_sections(comparison)}[section]


def test_a_method_looks_the_same_everywhere_and_unlike_the_others(tmp_path):
    methods = ("gd", *(f"cagrad(c={k / 20})" for k in range(1, 20)))
    comparison = load_comparison(write_comparison(tmp_path, methods=methods, epochs=2, sweep=3, extract=methods[1:4]))
    looks = styles(comparison)
    assert len({(look.colour, look.dash, look.marker) for look in looks.values()}) == len(methods) + 1 + 1 + 3
    assert [label for label, look in looks.items() if look.colour == "var(--control)"] == [
        row.label for row in comparison.rows if row.control
    ]
    for view in views(comparison):
        for trace in view.data:
            if "meta" in trace and trace.get("mode") == "markers":
                assert trace["marker"]["symbol"] == looks[trace["meta"]].marker
            elif "meta" in trace:
                assert trace["line"]["color"] == looks[trace["meta"]].colour


def test_colours_do_not_depend_on_who_won(tmp_path):
    first = styles(load_comparison(write_comparison(tmp_path / "a")))
    second = styles(load_comparison(write_comparison(tmp_path / "b", single=False)))
    assert all(first[label] == second[label] for label in METHODS)


def test_of_many_methods_the_baselines_the_best_and_the_mission_are_drawn_first(tmp_path):
    methods = ("gd", *(f"mgda(k={k})" for k in range(20)), "wpcgrad", "cdtt", "connection_strength(a=1)")
    comparison = load_comparison(write_comparison(tmp_path, methods=methods, epochs=2, seeds=(0, 1)))
    drawn = drawn_first(comparison)
    best = {row.label for row in comparison.methods[:6]}
    assert best | {"single", "gd", "wpcgrad", "cdtt", "connection_strength(a=1)"} == drawn
    assert drawn_first(load_comparison(write_comparison(tmp_path / "few"))) == {"single", *METHODS}


def test_a_curve_is_the_mean_over_seeds_beside_the_seeds(tmp_path):
    comparison = load_comparison(write_comparison(tmp_path, epochs=4))
    curve = figures_of(comparison, "curves")[0].first
    seeds, line = [trace for trace in curve.data if trace["meta"] == "gd"]
    losses = [[row["loss"]["left"] for row in job.history] for job in comparison.jobs if job.label == "gd"]
    # six significant digits are drawn of the mean and four of a seed
    assert line["y"] == pytest.approx([sum(values) / 3 for values in zip(*losses, strict=True)], rel=1e-5)
    gaps = [k for k, value in enumerate(seeds["y"]) if value is None]
    assert gaps == [4, 9]
    drawn = [value for value in seeds["y"] if value is not None]
    assert drawn == pytest.approx([value for run in losses for value in run], rel=1e-3)


def test_error_bars_are_the_interval_even_where_it_is_lopsided(tmp_path):
    comparison = load_comparison(write_comparison(tmp_path, seeds=tuple(range(6)), noise=0.02, epochs=3))
    means = [trace for trace in figures_of(comparison, "gain")[0].first.data if "error_x" in trace]
    rows = sorted(comparison.rows, key=lambda row: row.delta_m.mean)
    lopsided = 0.0
    for trace, row in zip(means, rows, strict=True):
        bar, (low, high) = trace["error_x"], row.delta_m.interval
        assert not bar["symmetric"]
        x, up, down = trace["x"][0], bar["array"][0], bar["arrayminus"][0]
        assert [x - down, x + up] == pytest.approx([low, high], abs=1e-4)
        lopsided = max(lopsided, abs(up - down))
    assert lopsided > 0.1


def test_ranks_count_every_metric_and_seed_and_ties_share(tmp_path):
    directory = write_comparison(tmp_path, methods=("gd", "mgda", "pcgrad"), seeds=(0, 1), epochs=2)
    values = {"gd": (0.9, 0.5), "mgda": (0.9, 0.7), "pcgrad": (0.1, 0.6)}
    for file in directory.glob("runs/*/*/result.json"):
        job = json.loads(file.read_text())
        if job["label"] in values:
            left, right = values[job["label"]]
            job["metrics"] = {"left": {"accuracy": left}, "right": {"accuracy": right}}
            file.write_text(json.dumps(job))
    (figure,) = figures_of(load_comparison(directory), "ranks")
    ranks = {trace["name"]: trace["x"] for trace in figure.first.data}
    assert figure.first.layout["yaxis"]["ticktext"] == ["mgda", "gd", "pcgrad"]
    assert ranks == {"1": [75, 25, 0], "2": [25, 25, 50], "3": [0, 50, 50]}


def test_the_plane_names_the_methods_that_no_fixed_weighting_beats(tmp_path):
    directory = write_comparison(tmp_path, methods=("gd", "mgda", "pcgrad", "cdtt"), sweep=3, epochs=2)
    places = {
        "fixed(0.25, 0.75)": (0.8, 0.9), "fixed(0.50, 0.50)": (0.7, 0.7), "fixed(0.75, 0.25)": (0.9, 0.8),
        "mgda": (0.85, 0.85), "pcgrad": (0.75, 0.75), "cdtt": (0.8, 0.9),
    }  # fmt: skip
    for file in directory.glob("runs/*/*/result.json"):
        job = json.loads(file.read_text())
        if job["label"] in places:
            left, right = places[job["label"]]
            job["metrics"] = {"left": {"accuracy": left}, "right": {"accuracy": right}}
            file.write_text(json.dumps(job))
    (figure,) = figures_of(load_comparison(directory), "trade")
    note, data = figure.first.note, figure.first.data
    assert note.startswith("Not beaten by any fixed weighting: 2 of 3 (")
    assert set(note[note.index("(") + 1 : -2].split(", ")) == {"mgda", "cdtt"}
    line = next(trace for trace in data if trace.get("mode") == "lines")
    assert (line["x"], line["y"]) == ([0.8, 0.7, 0.9], [0.9, 0.7, 0.8])
    points = next(trace for trace in data if "fixed(0.25, 0.75)" in trace.get("text", ()) and "ids" not in trace)
    assert points["marker"]["symbol"] == ["circle", "circle-open", "circle"]


def test_one_far_out_does_not_squeeze_the_rest(tmp_path):
    methods = ("gd", *(f"cagrad(c={k / 20})" for k in range(1, 12)), "mgda")
    directory = write_comparison(tmp_path, methods=methods, epochs=2)
    for file in directory.glob("runs/mgda/*/result.json"):
        job = json.loads(file.read_text())
        job["metrics"] = {"left": {"accuracy": 0.01}, "right": {"accuracy": 0.01}}
        file.write_text(json.dumps(job))
    comparison = load_comparison(directory)
    for section, axis in (("gain", "xaxis"), ("price", "yaxis")):
        view = figures_of(comparison, section)[0].first
        assert view.note.startswith("Outside the plot: mgda")
        assert max(view.layout[axis]["range"]) < 20
    assert max(figures_of(comparison, "trade")[0].first.layout["xaxis"]["range"]) > 0.8


@pytest.mark.parametrize("options", [{"seeds": (0,)}, {"single": False}, {"methods": ("gd",)}, {"epochs": 1}])
def test_small_comparisons_have_a_report_too(tmp_path, options):
    comparison = load_comparison(write_comparison(tmp_path, **options))
    page = write_report(comparison, tmp_path).read_text()
    assert verdict(comparison) in page
    assert ("delta-m per method" in page) == ("single" not in options)
    assert "left accuracy per method" in page
    assert 'id="tuning"' not in page


def test_two_tasks_have_one_heat_map_and_more_one_to_choose(tmp_path):
    two = load_comparison(write_comparison(tmp_path / "two", epochs=150, methods=("gd", "mgda"), seeds=(0,)))
    figure, _ = figures_of(two, "conflict")
    (heat,) = figure.first.data
    assert (len(heat["z"]), len(heat["z"][0]), heat["x"][0]) == (2, 60, "1-3")
    label = heat["y"][0]
    bins = [mean_cosine(two, label, epoch)[0][1] for epoch in (1, 2, 3)]
    assert heat["z"][0][0] == pytest.approx(sum(bins) / 3, abs=1e-3)
    tasks = {name: {"accuracy": "max"} for name in "abcdefgh"}
    many = load_comparison(write_comparison(tmp_path / "many", tasks=tasks, epochs=3))
    section = next(section for section in figure_sections(many) if section.key == "conflict")
    time, mean, _ = section.figures
    labels = [row.label for row in many.rows if row.label != "single"]
    assert [choice.value for choice in section.choices] == list(time.views) == list(mean.views) == labels
    assert len(time.first.data[0]["z"]) == 24  # of 28 pairs, those that conflict most
    assert all(mean.first.data[0]["z"][k][k] is None for k in range(8))
    assert "trade" not in {section.key for section in figure_sections(many)}


def test_a_loss_over_many_orders_of_magnitude_is_on_a_log_scale(tmp_path):
    directory = write_comparison(tmp_path, methods=("gd",), epochs=4)
    for file in directory.glob("runs/*/*/result.json"):
        job = json.loads(file.read_text())
        for row in job["history"]:
            row["loss"] = dict.fromkeys(row["loss"], 10.0 ** (-row["epoch"]))
        file.write_text(json.dumps(job))
    figures = figures_of(load_comparison(directory), "curves")
    assert [figure.first.layout["yaxis"]["type"] for figure in figures] == ["log", "linear"] * 2


def test_protocol_controls_and_tuning_are_explained(report, tmp_path):
    page = report.read_text()
    assert "Protocol val-selected: test figures of the epoch that was best on the validation split" in page
    assert page.count('class="tag"') == 2 * 2  # two controls in two tables
    assert "the same budget: 3 trials" in page
    assert "<summary>Ranges that were searched</summary>" in page
    assert "no estimate for unseen data" not in page
    other = write_comparison(tmp_path, protocol="last-10-test", epochs=2)
    assert "no estimate for unseen data" in write_report(load_comparison(other), tmp_path).read_text()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two runs of one problem: other seeds, fewer methods, another learning rate; one method with the same seeds."""
    first = write_comparison(tmp_path_factory.mktemp("a"), noise=0.01, seeds=(0, 1, 2))
    second = write_comparison(tmp_path_factory.mktemp("b"), noise=0.02, seeds=(0, 1, 2, 3), methods=METHODS[:3])
    shutil.rmtree(second / "runs" / "gd" / "seed-3")
    config = json.loads((second / "comparison.json").read_text())
    config["settings"]["lr"] = 0.01
    config["environment"]["commit"] = "abc1234"
    (second / "comparison.json").write_text(json.dumps(config))
    return load_comparison(first), load_comparison(second)


def test_two_runs_are_compared_by_paired_or_welch_intervals(pair):
    here, there = pair
    for label in ("gd", "mgda"):
        one, two = (c.row(label).delta_m for c in pair)
        mean, half = difference(one, two)
        assert mean == pytest.approx(one.mean - two.mean)
        same = one.by_seed.keys() == two.by_seed.keys()
        assert same == (label == "gd")
        a, b = list(one.values), list(two.values)
        test = stats.ttest_rel(a, b) if same else stats.ttest_ind(a, b, equal_var=False)
        interval = test.confidence_interval(0.95)
        assert [mean - half, mean + half] == pytest.approx(list(interval))
    assert difference(here.row("gd").delta_m, Estimate({0: 1.0}))[1] is None
    assert difference(here.row("gd").delta_m, here.row("gd").delta_m) == (0.0, 0.0)
    found = against(here, there)
    assert [label for label, _ in found.grid.rows] == [r.label for r in here.rows if there.row(r.label)]
    assert [column.name for column in found.grid.columns] == [
        "Δm % here", "Δm % there", "difference", "accuracy", "accuracy",
    ]  # fmt: skip
    assert {key: values for key, *values in found.changes if key in ("lr", "commit")} == {
        "lr": ["0.001", "0.01"],
        "commit": ["-", "abc1234"],
    }
    assert "torch" not in [key for key, *_ in found.changes]
    alone = [row.label for row in here.rows if there.row(row.label) is None]
    assert f"Only here: {', '.join(alone)}." in found.notes


def test_a_run_of_another_problem_is_no_error(pair, tmp_path):
    here, _ = pair
    other = load_comparison(write_comparison(tmp_path, "scenes", SCENES, single=False, methods=("gd", "x"), epochs=2))
    found = against(here, other)
    assert "The other run is of another problem, scenes." in found.notes
    assert not found.grid.rows
    write_report(here, tmp_path, other=other)


@browser
def test_a_page_with_another_run_fits_a_phone_and_stays_silent(pair, tmp_path):
    here, there = pair
    path = write_report(here, tmp_path, other=there)
    script = """const {scrollWidth, clientWidth} = page.documentElement;
        const table = page.querySelector("#against table.sortable");
        table.tHead.rows[1].cells[1].querySelector("button").click();
        say([scrollWidth - clientWidth, table.tBodies[0].rows.length, table.tBodies[0].rows[0].dataset.label])"""
    dom, console = browse(path, tmp_path, script, width=390)
    assert console == ""
    over, rows, first = said(dom)
    assert over == 0
    assert rows == 4
    assert first == min((r for r in here.rows if there.row(r.label)), key=lambda r: r.delta_m.mean).label


def test_forty_methods_stay_below_12_megabytes(tmp_path):
    methods = ("gd", *(f"cagrad(c={k / 50})" for k in range(1, 38)))
    comparison = load_comparison(write_comparison(tmp_path, methods=methods, seeds=tuple(range(5)), epochs=200))
    assert write_report(comparison, tmp_path).stat().st_size < 12e6
