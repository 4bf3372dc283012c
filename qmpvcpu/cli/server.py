"""Where the NATS server of many hosts is, and how this program shows who it is."""

import contextlib
import os
from typing import TYPE_CHECKING, Any, Final

from qmpvcpu.cli.options import File, named_on_the_line, option
from qmpvcpu.cli.result import BadUsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qmpvcpu.bus import Bus, ServerAddress

_FILES: Final = {
    "creds": "Log in with this NATS credentials file.",
    "nkey": "Log in with the nkey whose seed is in this file.",
    "login": "Log in with the USER:PASSWORD, or the token, in this file.",
    "tls_ca": "CA certificates to check the server with; else the system's.",
    "tls_cert": "A client certificate.",
    "tls_key": "The key of --tls-cert.",
}

NATS: Final = option(
    "--nats",
    metavar="URL",
    envvar="QMPVCPU_NATS",
    help="The NATS server: nats://HOST:PORT or tls://HOST:PORT; several with commas. Else $QMPVCPU_NATS.",
)
SERVER_OPTIONS: Final = (
    NATS,
    *(
        option(
            f"--{name.replace('_', '-')}",
            metavar="FILE",
            type=File(),
            envvar=f"QMPVCPU_NATS_{name.upper()}",
            help=f"{text} Else $QMPVCPU_NATS_{name.upper()}.",
        )
        for name, text in _FILES.items()
    ),
)


@contextlib.asynccontextmanager
async def connected(
    server: "ServerAddress", name: str, *, inbox: str | None = None, **how: Any
) -> "AsyncIterator[Bus]":
    """Connect to *server* inside; what hosts meet under is there.

    Args:
        server: The server that was named.
        name: What the server's administrator sees.
        inbox: Below which subject it listens; None: that of who asks.
        how: How what is missing is made, as of ``Bus.prepare``.

    Raises:
        HostsError: It cannot be reached, or is not fit.
    """
    from qmpvcpu.bus import Bus  # not at the top: most commands have no server
    from qmpvcpu.model.hosts import client_inbox

    async with await Bus.connect(server, name=name, inbox=inbox or client_inbox(who())) as bus:
        await bus.prepare(**how)
        yield bus


def who() -> str:
    """Return who asks: ``QMPVCPU_WHO``, as a server with permissions knows them; else the user's name."""
    from qmpvcpu.fleet.remote import user_name  # not at the top: most commands have no server

    return os.environ.get("QMPVCPU_WHO") or user_name()


def take_server(given: dict[str, Any]) -> "ServerAddress":
    """Take the options of the server out of *given*.

    Raises:
        BadUsageError: None is named, or it cannot be one.
    """
    server = find_server(given)
    if server is None:
        raise BadUsageError("which server? Name it: --nats nats://HOST:4222, or QMPVCPU_NATS in the environment")
    return server


def find_server(given: dict[str, Any]) -> "ServerAddress | None":
    """Take the options of the server out of *given*; None if no server is named.

    Raises:
        BadUsageError: It cannot be one, or there is a file to log in with, and no server.
    """
    url = given.pop("nats")
    files = {name: given.pop(name) for name in _FILES}
    if not url:
        typed = next((name for name in files if files[name] is not None and named_on_the_line(name)), None)
        if typed is not None:
            raise BadUsageError(f"--{typed.replace('_', '-')} is for a server: name it with --nats")
        return None
    from qmpvcpu.bus import ServerAddress  # as above

    try:
        return ServerAddress(url, **files)
    except ValueError as error:
        raise BadUsageError(f"--nats: {error}") from error
