"""Write what follows from the method files: the stub for type checkers, and the pages of the docs.

``python scripts/generate.py`` writes them; ``--check`` fails where one is stale.
"""

from __future__ import annotations

import html
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from detente.method import Method, describe, registry

ROOT = Path(__file__).parents[1]
HEADINGS = {"Args": "Options", "Limits": "When it fails"}
TOY = "its trajectories on the toy problem"
RIGHT = {"connection_strength": "how strongly two tasks use the channels of a trained layer"}


def stub() -> str:
    """``detente/methods/__init__.pyi``: every class by name, for checkers that cannot run the discovery."""
    found = sorted(((cls.__name__, cls.__module__) for cls in registry().values()), key=lambda pair: pair[::-1])
    lines = ["# Written by scripts/generate.py from the files in this folder; do not edit.", ""]
    lines += [f"from {module} import {name} as {name}" for name, module in found]
    return "\n".join(lines) + "\n\n__all__: list[str]\n"


def table() -> str:
    """``docs/methods.md``: one line per method."""
    head = """# Methods

Written by `scripts/generate.py` from the method files; `detente methods` prints the same, `detente methods cagrad` or
`help(detente.CAGrad)` explains one, `detente.cite("cagrad")` gives its BibTeX.

Kind: *gramian* methods need the inner products of the tasks' gradients, *jacobian* methods the gradients themselves,
both T backward passes (one through the trunk with `source="features"`); *losses* methods weight the losses, one
backward pass. T tasks, P shared parameters, B blocks (layers or channels with coefficients of their own). Heads:
task-specific parameters follow their own loss or the weighted one. Properties are checked by the conformance suite,
present and absent ones alike.

"""
    columns = ("what it is", "paper", "kind", "needs", "backward passes", "extra state", "heads", "properties")
    lines = ["| name | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for name, cls in sorted(registry().items()):
        row = describe(cls)
        cells = [markdown(row[column]).replace("|", "\\|") for column in columns]
        lines.append(f"| [`{name}`](methods/{name}.md) | " + " | ".join(cells) + " |")
    return head + "\n".join(lines) + "\n"


def page(cls: type[Method]) -> str:
    """``docs/methods/<name>.md``: picture, formula, options, limits, example, properties and citation of one method."""
    row = describe(cls)
    lines = [
        f"# {row['class']}",
        "",
        "Written by `scripts/generate.py` from the docstring; [all methods](../methods.md).",
        "",
        "```python",
        f"detente.{row['class']}({signature(cls)})",
        "```",
        "",
        *picture(cls),
        "",
        *body(inspect.getdoc(cls) or ""),
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {markdown(value)} |" for key, value in row.items() if key not in ("class", "what it is")),
        "",
        "```bibtex",
        cls.paper.bibtex(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def signature(cls: type[Method]) -> str:
    """The options with their defaults, without types."""
    parts = []
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}".replace("'", '"')
        parts.append(parameter.name + default)
    return ", ".join(parts)


def picture(cls: type[Method]) -> list[str]:
    """The drawing of ``scripts/pictures.py``, and its caption, which is the title in the file."""
    path = ROOT / f"docs/images/methods/{cls.name}.svg"
    if not path.exists():
        raise SystemExit(f"{path.relative_to(ROOT)} is missing; run python scripts/pictures.py {cls.name}")
    found = re.search("<title>(.*?)</title>", path.read_text(), re.DOTALL)
    assert found is not None
    caption = html.unescape(found[1])
    alt = f"Two panels: what {cls.__name__} makes of conflicting gradients, and {RIGHT.get(cls.name, TOY)}"
    return [f"![{alt}](../images/methods/{cls.name}.svg)", "", f"*{caption}*"]


def markdown(text: str) -> str:
    """The docstrings' reStructuredText marks as Markdown."""
    text = re.sub(r":(?:class|meth|func|attr|mod):`[~.]?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def body(doc: str) -> list[str]:
    """A Google-style docstring as Markdown."""
    lines: list[str] = []
    section, fenced = "", False
    for line in [*doc.splitlines(), ""]:
        indented = line.startswith("    ")
        if fenced and line.strip() and not indented:
            fenced = False
            while lines and not lines[-1]:
                lines.pop()
            lines += ["```", ""]
        if line in ("Args:", "Raises:", "Limits:", "Example:"):
            section = line[:-1]
            lines += [f"## {HEADINGS.get(section, section)}", ""]
            if section == "Example":
                lines.append("```python")
        elif section == "Example" and line.strip():
            lines.append(line[4:])
        elif section in ("Args", "Raises") and line.strip():
            text = line[4:]
            name, colon, rest = text.partition(": ")
            start = f"- `{name}`: {rest}" if colon and not text.startswith(" ") else f"  {text.strip()}"
            lines.append(markdown(start))
        elif section == "Limits" and line.strip():
            lines.append(markdown(line[4:]))
        elif line.rstrip().endswith("::"):
            lines += [markdown(line.rstrip()[:-2].rstrip()), "", "```text"]
            fenced = True
        elif fenced:
            if line.strip() or lines[-1] != "```text":
                lines.append(line[4:])
        else:
            lines.append(line if section == "Example" else markdown(line))
    while lines and not lines[-1]:
        lines.pop()
    return [*lines, "```"] if section == "Example" else lines


def settle(targets: Mapping[Path, str], folder: Path) -> int:
    """Write the targets and delete other pages in the folder; with ``--check`` say which are stale instead."""
    stale = [path for path, text in targets.items() if not path.exists() or path.read_text() != text]
    left = [path for path in folder.glob("*.md") if path not in targets]
    if "--check" in sys.argv:
        for path in [*stale, *left]:
            script = Path(sys.argv[0]).name
            print(f"{path.relative_to(ROOT)} is stale; run python scripts/{script}", file=sys.stderr)
        return bool(stale or left)
    for path, text in targets.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in left:
        path.unlink()
    return 0


def main() -> int:
    pages = ROOT / "docs/methods"
    targets = {ROOT / "src/detente/methods/__init__.pyi": stub(), ROOT / "docs/methods.md": table()}
    targets |= {pages / f"{name}.md": page(cls) for name, cls in registry().items()}
    return settle(targets, pages)


if __name__ == "__main__":
    raise SystemExit(main())
