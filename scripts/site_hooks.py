"""What MkDocs is told beyond ``mkdocs.yml``: the pages are those of the repository, links included.

A page in ``docs/`` may link to any text file of the repository, by its place there: the link works on GitHub, and here
the file becomes a page of the site, below ``repository/``. ``nav`` may name such files too, and groups of pages by a
pattern such as ``methods/*.md``.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".sh": "sh"}
FENCED = re.compile(r"(^(`{3,}).*?^\2$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def prose(markdown: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is prose (and not code)."""
    end = 0
    for code in FENCED.finditer(markdown):
        yield markdown[end : code.start()], True
        yield code.group(), False
        end = code.end()
    yield markdown[end:], True


def linked(markdown: str, path: str) -> Iterator[str]:
    """The files that a text at ``path`` links to, by their place in the repository."""
    for text, readable in prose(markdown):
        for _, target, _ in LINK.findall(text) if readable else ():
            if "://" not in target and not target.startswith("mailto:"):
                yield resolve(target, path)


def resolve(target: str, path: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def place(path: str) -> str:
    """Where a file of the repository lies on the site: its source file's name for MkDocs."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    if path == "README.md":
        return "index.md"
    return f"repository/{path}" + (".md" if Path(path).suffix in LANGUAGES else "")


def origin(source: str) -> str:
    """The file of the repository behind a page: the inverse of :func:`place`."""
    if source.startswith("repository/"):
        path = source.removeprefix("repository/")
        return path if (ROOT / path).exists() else path.removesuffix(".md")
    return DOCS + source


def content(path: str) -> str:
    """A file of the repository as a page."""
    text = (ROOT / path).read_text()
    language = LANGUAGES.get(Path(path).suffix)
    return text if language is None else f"# {Path(path).name}\n\n`{path}`\n\n````{language}\n{text}````\n"


def expand(nav: Any) -> Any:
    """The navigation with its patterns written out, and with files of the repository where the site has them."""
    if isinstance(nav, dict):
        return {title: expand(entry) for title, entry in nav.items()}
    if isinstance(nav, list):
        return [page for entry in nav for page in (pages(entry) if isinstance(entry, str) else [expand(entry)])]
    return pages(nav)[0]


def pages(entry: str) -> list[str]:
    """Source files, by MkDocs' names, of one entry of ``nav``."""
    base = ROOT / DOCS
    if not (found := sorted(base.glob(entry))):
        base = ROOT
        found = sorted(base.glob(entry))
    paths = [path.relative_to(ROOT).as_posix() for path in found]
    if "*" in entry:
        paths = [path for path in paths if not path.endswith("/index.md")]
    return [place(path) for path in paths] or [entry]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write the navigation out, and give headings the anchors that GitHub gives them."""
    from pymdownx.slugs import slugify

    config.nav = expand(config.nav)
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the navigation and the pages link to outside of ``docs/``, and what that links to."""
    from mkdocs.structure.files import File, InclusionLevel

    known = {DOCS + file.src_uri for file in files}
    waiting = [path for path in map(origin, named(config.nav)) if not path.startswith(DOCS)]
    for path in known:
        if path.endswith(".md"):
            waiting += linked((ROOT / path).read_text(), path)
    while waiting:
        path = waiting.pop()
        if path in known or path == "README.md" or not (ROOT / path).is_file():
            continue  # what does not exist is left to MkDocs to complain about
        known.add(path)
        source = place(path)
        if source.endswith(".md"):
            text = content(path)
            file = File.generated(config, source, content=text)
            file.inclusion = InclusionLevel.INCLUDED if source in named(config.nav) else InclusionLevel.NOT_IN_NAV
            waiting += linked(text, path)
        else:
            file = File.generated(config, source, abs_src_path=str(ROOT / path))
        files.append(file)
    return files


def named(nav: Any) -> list[str]:
    """All pages of a navigation."""
    if isinstance(nav, dict):
        return [page for entry in nav.values() for page in named(entry)]
    if isinstance(nav, list):
        return [page for entry in nav for page in named(entry)]
    return [nav]


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between places in the repository become links between places on the site."""
    if not re.search("^(##|:::) ", markdown, re.MULTILINE):
        page.meta["hide"] = ["toc"]  # which would be empty, and tables like the room
    source = page.file.src_uri
    path = origin(source)

    def move(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match.group()
        to = posixpath.relpath(place(resolve(target, path)), posixpath.dirname(source))
        return before + to + after

    return "".join(LINK.sub(move, text) if readable else text for text, readable in prose(markdown))
