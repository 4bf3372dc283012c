"""Where the NATS server of many hosts is, and how this program shows who it is."""

import contextlib
import getpass
import os
import socket
from typing import TYPE_CHECKING, Any, Final

from qmpvcpu.cli.options import File, option
from qmpvcpu.cli.result import BadUsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qmpvcpu.bus import Bus, ServerAddress

_FILES: Final = {
    "creds": "Who this is: a NATS credentials file.",
    "nkey": "Who this is: a file with an nkey's seed.",
    "login": "Who this is: a file with USER:PASSWORD, or a token.",
    "tls_ca": "The certificates that vouch for the server; else the system's.",
    "tls_cert": "This program's own certificate.",
    "tls_key": "The key of --tls-cert.",
}

NATS: Final = option(
    "--nats",
    metavar="URL",
    envvar="QMPVCPU_NATS",
    help="The NATS server: nats://HOST:PORT or tls://HOST:PORT, several with commas. Else $QMPVCPU_NATS.",
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


def take_server(given: dict[str, Any], *, required: bool = True) -> "ServerAddress | None":
    """Take the options of the server out of *given*; None if no server is named.

    Raises:
        BadUsageError: It is *required*, or it cannot be one.
    """
    url = given.pop("nats")
    files = {name: given.pop(name) for name in _FILES}
    if not url:
        if required:
            raise BadUsageError("which server? Name it: --nats nats://HOST:4222, or QMPVCPU_NATS in the environment")
        return None
    from qmpvcpu.bus import ServerAddress  # not at the top: most commands have no server

    try:
        return ServerAddress.of(url, **{name: value for name, value in files.items() if value is not None})
    except ValueError as error:
        raise BadUsageError(f"--nats: {error}") from error


def who() -> str:
    """Return who asks: ``QMPVCPU_WHO``, as a server with permissions knows them; else the user's and host's names."""
    if named := os.environ.get("QMPVCPU_WHO"):
        return named
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


@contextlib.asynccontextmanager
async def connected(address: "ServerAddress", name: str, inbox: str) -> "AsyncIterator[Bus]":
    """Connect to the server inside, with all that hosts meet under on it.

    Args:
        address: The server.
        name: What its administrator sees.
        inbox: ``host_inbox`` or ``client_inbox``.

    Raises:
        HostsError: It cannot be reached, or is not fit for it.
    """
    from qmpvcpu.bus import Bus  # as above

    async with await Bus.connect(address, name=name, inbox=inbox) as bus:
        await bus.prepare()
        yield bus
