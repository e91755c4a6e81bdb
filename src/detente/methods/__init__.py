"""One file per published method; adding a method touches this folder alone.

The classes are found from the files; ``__init__.pyi`` beside this file lists them for type checkers and is written
by ``scripts/generate.py``. Methods of your own are found the same way in the folders that the environment variable
``DETENTE_METHODS`` names (separated as in ``PATH``): they are then in ``detente.list_methods()``, on the command line
and in the conformance suite like all others.
"""

import os
from pathlib import Path

from detente.method import registry

for _folder in filter(None, os.environ.get("DETENTE_METHODS", "").split(os.pathsep)):
    if not Path(_folder).is_dir():
        raise ImportError(
            f"DETENTE_METHODS names the folder {_folder!r}, which does not exist. Name folders with method files."
        )
    __path__.append(_folder)

_classes = {cls.__name__: cls for cls in registry().values()}
globals().update(_classes)
__all__ = sorted(_classes)
