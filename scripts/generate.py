"""Write what follows from the method files: the stub for type checkers and the table in the docs.

``python scripts/generate.py`` writes both; ``--check`` fails where one is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path

from detente.method import registry

ROOT = Path(__file__).parents[1]


def stub() -> str:
    """``detente/methods/__init__.pyi``: every class by name, for checkers that cannot run the discovery."""
    found = sorted(((cls.__name__, cls.__module__) for cls in registry().values()), key=lambda pair: pair[::-1])
    lines = ["# Written by scripts/generate.py from the files in this folder; do not edit.", ""]
    lines += [f"from {module} import {name} as {name}" for name, module in found]
    return "\n".join(lines) + "\n\n__all__: list[str]\n"


def table() -> str:
    """``docs/methods.md``: one line per method."""
    head = """# Methods

Written by `scripts/generate.py` from the method files; `detente methods` prints the same.
Kind: *gramian* methods need every task's gradient (T backward passes), *losses* methods weight the losses (one).
`help(detente.CAGrad)` has formula, options and a runnable example; `detente.cite("cagrad")` the BibTeX.

| name | class | what it is | kind | needs | backward passes | heads follow | never conflicts | random | paper |
|---|---|---|---|---|---|---|---|---|---|
"""
    rows = []
    for name, cls in sorted(registry().items()):
        line = (cls.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        paper = f"{cls.paper.title} ({cls.paper.year})"
        if cls.paper.arxiv:
            paper = f"[{paper}](https://arxiv.org/abs/{cls.paper.arxiv})"
        cells = (
            f"`{name}`",
            f"`{cls.__name__}`",
            line,
            cls.kind,
            ", ".join(sorted(cls.needs)) or "-",
            cls.backwards,
            f"{cls.heads} loss",
            "yes" if cls.nonconflicting else "",
            "yes" if cls.stochastic else "",
            paper,
        )
        rows.append("| " + " | ".join(cells) + " |")
    return head + "\n".join(rows) + "\n"


def main() -> int:
    targets = {ROOT / "src/detente/methods/__init__.pyi": stub(), ROOT / "docs/methods.md": table()}
    stale = [path for path, text in targets.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale; run python scripts/generate.py", file=sys.stderr)
        return bool(stale)
    for path, text in targets.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
