"""What the reference pages read of the sources, for Griffe: docstrings as Markdown, and functions that hide modules."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Module, Object


class Docstrings(Extension):
    """Roles, literal blocks and examples as the Markdown pages have them."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """``detente.backward`` is the function, as in Python, and not the module of that name which defines it."""
        for module in [pkg, *(each for each in pkg.modules.values() if not each.is_alias)]:
            for name in set(map(str, module.exports or ())) & set(module.modules):
                hidden = module.members[name]
                if name in hidden.members:
                    module.members[name] = hidden.members[name]


def markdown(text: str) -> str:
    text = re.sub(r":(?:class|meth|func|attr|mod):`[~.]?([^`]+)`", r"`\1`", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # the name by which Griffe knows it
    return re.sub(r"\s*::$", ":", text, flags=re.MULTILINE)
