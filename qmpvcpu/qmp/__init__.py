"""One QMP session with a QEMU, and what is read over it. The only package that imports qemu.qmp.

It adds what `qemu.qmp.QMPClient` leaves to its user: a deadline on everything, a clear error for each way of failing
to connect, a loss that is noticed at once and explained, and events as calls in wire order.

- `address`: reading an address, connecting to it, and who is at the other end: sockets and /proc, no QMP.
- `client`: a QMPClient of our own on such a socket: greeting, negotiation, its end and the reason for it.
- `monitor`: `Monitor`, a session on a client of our own or on one that was given.
- `queries`: the queries that read a VM, and what their replies mean.

Logging: ``qmpvcpu.qmp`` has the exchange at DEBUG, one line per message, with the extra fields ``vm`` (address),
``direction`` (``sent``, ``received`` or ``event``) and ``qmp`` (the message). qemu.qmp itself reports failures of our
own connections, at ERROR, on ``qemu.qmp.protocol.qmpvcpu``. As each also reaches the caller as an exception, that
logger has a `logging.NullHandler`: nothing is printed unless the application configured logging.
"""

from importlib.machinery import PathFinder


def _check_library() -> None:
    """Make sure that qemu.qmp can be imported, without importing it; else name the file that is in the way.

    qemu.qmp is in a namespace package, which any ordinary package or module of that name on ``sys.path`` hides: a
    folder of tests, or an old QEMU's source tree.
    """
    found, places = None, None
    for name in ("qemu", "qemu.qmp", "qemu.qmp.qmp_client"):
        spec = PathFinder.find_spec(name, places)
        if spec is None:
            break
        found, places = spec, spec.submodule_search_locations or []
    else:
        return
    try:
        from qemu.qmp import QMPClient  # noqa: F401 - found by other means, as an editable installation is
    except ImportError:
        if found is None or not found.has_location:
            raise ImportError("qemu.qmp is not installed: pip install qemu.qmp", name="qemu.qmp") from None
        raise ImportError(
            f"{found.origin} hides the library qemu.qmp, which qmpvcpu needs: rename it, or remove its directory from"
            " sys.path (PYTHONPATH)",
            name="qemu.qmp",
            path=found.origin,
        ) from None


_check_library()
