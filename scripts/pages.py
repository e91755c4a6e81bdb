"""Write the pages that follow from the code, beside those of ``generate.py``: the problems, and the list of classes.

``python scripts/pages.py`` writes them; ``--check`` fails where one is stale. It needs the extra ``compare``.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from generate import markdown, settle

from detente.benchmark.problem import DEFAULTS, Problem, list_problems, load_problem
from detente.benchmark.protocol import PROTOCOLS
from detente.method import registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
HEAD = "Written by `scripts/pages.py` from the module"
GROUPS = {
    "Made on the spot": ("toy", "logic", "digits", "scenes"),
    "Robots": ("mt4", "mt10", "mt50", "mt10_bc", "mt50_bc"),
    "From official files": (),
}
MANY = 5
"""Tasks from which on a table of all of them says nothing any more."""


def metrics(tasks: dict[str, dict[str, str]]) -> list[str]:
    """What is measured, and in which direction it is better."""
    arrows = {"max": "higher is better", "min": "lower is better"}
    written = {
        task: ", ".join(f"{metric} ({arrows[way]})" for metric, way in measured.items())
        for task, measured in tasks.items()
    }
    if len(tasks) >= MANY and len(set(written.values())) == 1:
        names = ", ".join(f"`{task}`" for task in tasks)
        return [f"{len(tasks)} tasks, of each {next(iter(written.values()))}: {names}."]
    return ["| task | metrics |", "|---|---|", *(f"| `{task}` | {text} |" for task, text in written.items())]


def value(setting: Any) -> str:
    return f"`{str(setting).lower() if isinstance(setting, bool) else setting}`" if setting != "" else "none"


def summary(function: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return markdown(" ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split()))


def size(problem: Problem) -> str:
    """Parameters of the model for all tasks, at the defaults."""
    with torch.device("meta"):
        model = problem.make_model(tuple(problem.tasks), problem.settle({}))
    return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters with all tasks"


def page(problem: Problem) -> str:
    """``docs/problems/<name>.md``."""
    module, command = problem.module, problem.name.replace("_", "-")
    source = f"../../src/detente/benchmark/problems/{problem.name}.py"
    lead, _, rest = markdown(inspect.getdoc(module) or "").partition("\n")
    lines = [f"# {problem.name}", "", lead, "", "```sh", f"detente compare {command}"]
    lines += [f"detente compare {command} --preset {preset}" for preset in problem.presets]
    lines += [f"detente compare {command} --download-help"] if problem.download else []
    lines += ["```", "", rest.strip(), ""] if rest.strip() else ["```", ""]
    lines += ["## Tasks and metrics", "", *metrics(problem.tasks), ""]
    if problem.supervised:
        lines += ["## Data and model", ""]
        if text := summary(module.make_data):
            lines += [f"Data: {text}", ""]
        text = summary(module.make_model)
        lines += [f"Model: {text + ' ' if text else ''}It has {size(problem)}, at the default settings.", ""]
    if problem.download:
        lines += ["## Files", "", "```text", inspect.cleandoc(problem.download), "```", ""]
    own = {key: setting for key, setting in problem.settings.items() if DEFAULTS.get(key) != setting}
    columns = {"default": problem.settings}
    columns |= {f"`{name}`": {**problem.settings, **preset} for name, preset in problem.presets.items()}
    preset_too = {key for preset in problem.presets.values() for key in preset}
    shown = [key for key in problem.settings if (key in own or key in preset_too) and key != "seeds"]
    lines += ["## Settings and presets" if problem.presets else "## Settings", ""]
    lines += [
        "Change one with `--set NAME=VALUE`. Those that are not listed are",
        "[as for every problem](index.md#settings-of-every-problem).",
    ]
    if problem.presets:
        lines += ["A preset is chosen with `--preset`."]
    if "seeds" in problem.settings:
        lines += [f"Without `--seeds` there are {problem.settings['seeds']}."]
    lines.append("")
    lines += ["| setting | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for key in shown:
        lines.append(f"| `{key}` | " + " | ".join(value(column[key]) for column in columns.values()) + " |")
    used = dict.fromkeys(column.get("protocol", "val-selected") for column in columns.values())
    if problem.presets:
        lines += ["", *(f"* `{protocol}`: {PROTOCOLS[protocol]}" for protocol in used)]
    if (DOCS / f"results/{problem.name}.md").exists():
        lines += ["", "## Measured", "", f"[Our own comparison on {problem.name}](../results/{problem.name}.md)."]
    lines += ["", f"{HEAD} [{problem.name}.py]({source})."]
    return "\n".join(lines) + "\n"


def index(problems: dict[str, Problem]) -> str:
    """``docs/problems/index.md``."""
    lines = [
        "# Problems",
        "",
        f"{HEAD}s in `src/detente/benchmark/problems`; `detente problems` prints the same list.",
        "Each is a problem file like [your own](../own_problem.md). What we measured ourselves, and what we did not:",
        "[Reproducing the papers](../reproduce.md).",
        "",
    ]
    grouped = {name for names in GROUPS.values() for name in names}
    for title, names in GROUPS.items():
        lines += [f"## {title}", ""]
        if title == "From official files":
            names = tuple(name for name in problems if name not in grouped)
            lines += [
                "Nothing is downloaded. `detente compare NAME --download-help` says which archives to fetch and where",
                "they go; `--data` names another folder.",
                "",
            ]
        if title == "Robots":
            lines += ["These need `pip install 'detente[compare,metaworld]'`.", ""]
        lines += ["| problem | what it is | tasks | presets |", "|---|---|---|---|"]
        for name in names:
            problem = problems[name]
            presets = ", ".join(f"`{preset}`" for preset in problem.presets) or "-"
            text = markdown(problem.description).rstrip(".").replace("|", "\\|")
            lines.append(f"| [`{name}`]({name}.md) | {text} | {len(problem.tasks)} | {presets} |")
        lines.append("")
    lines += [
        "## Settings of every problem",
        "",
        "`--epochs`, `--batch-size`, `--lr` and `--protocol` are options of their own, the others go with",
        "`--set NAME=VALUE`. A problem may have other defaults. [What they do](../reference/benchmark.md).",
        "",
        "| setting | default |",
        "|---|---|",
        *(f"| `{key}` | {value(default)} |" for key, default in DEFAULTS.items()),
    ]
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- classes: scripts/pages.py -->", "<!-- end of classes -->"


def with_classes(text: str) -> str:
    """The reference page of methods, with a link to the page of every class."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    found = sorted((cls.__name__, name) for name, cls in registry().items())
    links = ",\n".join(f"[`{cls}`](../methods/{name}.md)" for cls, name in found)
    return f"{before}{BEGIN}\n{links}.\n{END}{after}"


def main() -> int:
    problems = {name: load_problem(name) for name in list_problems()}
    targets = {DOCS / "problems/index.md": index(problems)}
    targets |= {DOCS / f"problems/{name}.md": page(problem) for name, problem in problems.items()}
    reference = DOCS / "reference/methods.md"
    targets[reference] = with_classes(reference.read_text())
    return settle(targets, DOCS / "problems")


if __name__ == "__main__":
    raise SystemExit(main())
