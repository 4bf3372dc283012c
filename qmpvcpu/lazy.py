"""Packages that import a module of theirs when a name of it is asked for (PEP 562).

Below all floors: nothing here knows of vCPUs. ``qmpvcpu list`` needs a third of the package, and a command's time is
mostly that of its imports. Type checkers and editors see the plain imports that each package has under
``TYPE_CHECKING``; nothing else differs for whoever imports a name.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

__all__ = ["lazily"]


def lazily(
    package: str, names: Sequence[str], modules: Sequence[str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: Its name.
        names: What it exports, its ``__all__``.
        modules: Where to look for that, lowest first: those before the one whose ``__all__`` has a name are imported
            too. None may be called as a name is.

    Returns:
        Both functions, for the package to bind.
    """

    def get(name: str) -> object:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name in names:
            for module in modules:
                home = import_module(f"{package}.{module}")
                if name in home.__all__:
                    found = getattr(home, name)
                    setattr(sys.modules[package], name, found)  # it is not asked for again
                    return found
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted({*vars(sys.modules[package]), *names, *modules})
