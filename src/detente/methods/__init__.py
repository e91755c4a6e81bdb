"""One file per published method; adding a method touches this folder alone.

The classes are found from the files; ``__init__.pyi`` beside this file lists them for type checkers and is written
by ``scripts/generate.py``.
"""

from detente.method import registry

_classes = {cls.__name__: cls for cls in registry().values()}
globals().update(_classes)
__all__ = sorted(_classes)
