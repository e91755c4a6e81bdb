"""Methods as a user writes them: ``cagrad``, ``cagrad(c=0.8)``, ``wpcgrad(priority=loss_power(gamma=2))``."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from detente.method import (
    GramianMethod,
    LossWeighting,
    Method,
    check_options,
    get_method,
    list_methods,
    method_class,
)

__all__ = ["Spec", "parse_methods"]


@dataclass(frozen=True)
class Spec:
    """One method with its options.

    Attributes:
        label: canonical text, such as ``cagrad(c=0.8)``: the row in tables and the name of the run's directory.
        method: registered name.
    """

    label: str
    method: str

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Check a method's text by building it (without a model, where it needs one).

        Raises:
            ValueError: it cannot be parsed, the method is unknown, or an option is impossible.
        """
        node = _parse(text)
        method = method_class(_name(node, text)).name
        keywords = _keywords(node, text)
        options = ", ".join(f"{key}={ast.unparse(value)}" for key, value in keywords.items())
        spec = cls(f"{method}({options})" if options else method, method)
        if "model" in method_class(method).needs:
            # it cannot be built before there is a model
            try:
                check_options(method_class(method), keywords)
            except TypeError as error:
                raise ValueError(str(error)) from error
        else:
            spec.build()
        return spec

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that are written out."""
        return tuple(_keywords(_parse(self.label), self.label))

    def having(self, options: Mapping[str, Any]) -> Spec:
        """The same method with further options; the name of a method stands for that method."""
        known = {key: ast.unparse(value) for key, value in _keywords(_parse(self.label), self.label).items()}
        known |= {key: value if value in list_methods() else repr(value) for key, value in options.items()}
        return Spec.parse(f"{self.method}({', '.join(f'{key}={value}' for key, value in known.items())})")

    def build(self, model: nn.Module | None = None, epochs: int | None = None, seed: int = 0) -> Method:
        """The method; those that draw random numbers are seeded with ``seed`` unless the options say otherwise."""
        extra: dict[str, Any] = {}
        if "model" in method_class(self.method).needs:
            extra = {"model": model, "epochs": epochs}
        try:
            return _build(_parse(self.label), self.label, extra, seed)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{self.label}: {error}") from error


def parse_methods(text: str) -> list[Spec]:
    """Methods of a comma-separated list; ``all`` is every method with its defaults. ``gd`` always comes first."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text + ","):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append((text + ",")[start:i].strip())
            start = i + 1
    if depth or not any(parts):
        raise ValueError(f"cannot read the methods {text!r}; write them as cagrad,pcgrad or 'cagrad(c=0.8),mgda'.")
    names = [name for part in parts if part for name in (list_methods() if part == "all" else [part])]
    specs = {spec.label: spec for spec in [Spec.parse("gd"), *map(Spec.parse, names)]}
    return list(specs.values())


def _parse(text: str) -> ast.expr:
    text = re.sub(r"^\s*[\w-]+", lambda name: name.group().strip().replace("-", "_"), text)
    for name in list_methods():  # nested ones
        text = text.replace(name.replace("_", "-"), name)
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(f"cannot read the method {text!r}; write it as cagrad or 'cagrad(c=0.8)'.") from None


def _name(node: ast.expr, text: str) -> str:
    func = node.func if isinstance(node, ast.Call) else node
    if not isinstance(func, ast.Name):
        raise ValueError(f"cannot read the method {text!r}; write it as cagrad or 'cagrad(c=0.8)'.")
    return func.id


def _keywords(node: ast.expr, text: str) -> dict[str, ast.expr]:
    """Options of a method, each named once."""
    if not isinstance(node, ast.Call):
        return {}
    keywords: dict[str, ast.expr] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in keywords:
            raise ValueError(f"{text!r}: name every option once, as in {_name(node, text)}(option=value).")
        keywords[keyword.arg] = keyword.value
    if node.args:
        raise ValueError(f"{text!r}: name every option, as in {_name(node, text)}(option=value).")
    return keywords


def _build(node: ast.expr, text: str, extra: dict[str, Any], seed: int) -> Method:
    name = _name(node, text)
    options = dict(extra)
    for key, value in _keywords(node, text).items():
        if isinstance(value, ast.Call) or (isinstance(value, ast.Name) and value.id in list_methods()):
            options[key] = _build(value, text, {}, seed)
        else:
            try:
                options[key] = ast.literal_eval(value)
            except ValueError:
                raise ValueError(f"{text!r}: cannot read the value of {key}; quote strings.") from None
    if method_class(name).stochastic:
        options.setdefault("seed", seed)
    method = get_method(name, **options)
    assert isinstance(method, GramianMethod | LossWeighting)
    return method
