"""Packages that import their modules when a name of theirs is first used (PEP 562).

Most commands need a third of the package, and their time is mostly that of imports. Type checkers and editors see
the plain imports that each such package has under ``TYPE_CHECKING``.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of *package*; *homes* has the names of each module, as words."""
    own = vars(sys.modules[package])
    home_of = {name: module for module, names in homes.items() for name in names.split()}

    def get(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        own[name] = getattr(import_module(home_of[name]), name)
        return own[name]

    return get, lambda: sorted({*own, *home_of})
