"""One QMP session with a QEMU, and what is read over it. Only `agent` and this package import qemu.qmp.

It adds what `qemu.qmp.QMPClient` leaves to its user: a deadline on everything, a clear error for each way of failing
to connect, a loss that is noticed at once and explained, and events as calls in wire order.

- `address`: reading an address, connecting to it, and who is at the other end: sockets, no QMP.
- `client`: a QMPClient of our own on such a socket: greeting, negotiation, its end and the reason for it.
- `monitor`: `Monitor`, a session on a client of our own or on one that was given.
- `queries`: the queries that read a VM, and what their replies mean.

Logging: ``qmpvcpu.qmp`` has the exchange at DEBUG, one line per message, with the extra fields ``vm`` (address),
``direction`` (``sent``, ``received`` or ``event``) and ``qmp`` (the message). qemu.qmp itself reports failures of our
own connections, at ERROR, on ``qemu.qmp.protocol.qmpvcpu``. As each also reaches the caller as an exception, that
logger has a `logging.NullHandler`: nothing is printed unless the application configured logging.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder

_LIBRARY = "qemu.qmp"
_MOVE_IT = "rename it, or remove its directory from sys.path (PYTHONPATH)"


def _provide_library() -> None:
    """Make sure that qemu.qmp can be imported, even if something else on ``sys.path`` is called ``qemu``.

    qemu.qmp is in a namespace package. An ordinary package or module of that name, such as a folder of tests or an
    old QEMU's source tree, hides it. That one stays as it is and keeps its name; qemu.qmp is then loaded from where
    it is installed, under its own name, and imports nothing of ``qemu`` but itself.

    Raises:
        ImportError: It is not installed; or what hides it has a ``qmp`` of its own, which the error names.
    """
    found, is_whole = _find(None)
    if is_whole and _LIBRARY not in sys.modules:
        return
    if _LIBRARY not in sys.modules and (found is None or found.name == "qemu"):
        for place in sys.path:
            spec, is_whole = _find([place])
            if is_whole and spec is not None:
                _load(spec)
                return
    try:
        from qemu.qmp import QMPClient  # noqa: F401 - found by other means, as an editable installation is
    except Exception as error:  # the other one may do anything when it is imported
        loaded = getattr(sys.modules.get(_LIBRARY), "__spec__", None)
        found = loaded or found
        if found is None or not found.has_location:
            if not isinstance(error, ImportError):
                raise
            raise ImportError("qemu.qmp is not installed: pip install qemu.qmp", name=_LIBRARY) from None
        what = "hides the library qemu.qmp, which qmpvcpu needs"
        raise ImportError(f"{found.origin} {what}: {_MOVE_IT}", name=_LIBRARY, path=found.origin) from None


def check_version(connect: Callable[..., object]) -> None:
    """Make sure that ``QMPClient.connect`` takes a socket, as it does since 0.0.3.

    The source tree of QEMU 7 has an older one, with no version to ask for.

    Raises:
        ImportError: It does not.
    """
    if "socket.socket" not in str(connect.__annotations__.get("address", "socket.socket")):
        file = sys.modules[_LIBRARY].__file__
        raise ImportError(
            f"{file} is older than qemu.qmp 0.0.3, which qmpvcpu needs: pip install -U qemu.qmp, or {_MOVE_IT}",
            name=_LIBRARY,
            path=file,
        )


def _find(places: Sequence[str] | None) -> tuple[ModuleSpec | None, bool]:
    """Return the innermost of qemu, qemu.qmp and its client that is in *places* (None: where Python looks).

    The second is True if all of them are there, and the first is then qemu.qmp. Nothing is imported.
    """
    loaded = sys.modules.get("qemu") if places is None else None
    found = getattr(loaded, "__spec__", None) if loaded is not None else PathFinder.find_spec("qemu", places)
    for name in (_LIBRARY, f"{_LIBRARY}.qmp_client"):
        within = None if found is None else found.submodule_search_locations
        spec = None if within is None else PathFinder.find_spec(name, within)
        if spec is None:
            return found, False
        if name == _LIBRARY:
            found = spec
    return found, True


def _load(spec: ModuleSpec) -> None:
    """Load qemu.qmp alone, without the package around it."""
    from importlib.util import module_from_spec  # not at the top: rarely needed

    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        if spec.loader is not None:
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise


_provide_library()
