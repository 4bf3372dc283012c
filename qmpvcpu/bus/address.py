"""Where the NATS server is, and how to log in there. Pure."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from qmpvcpu.given import checked

_SCHEMES: Final = ("nats", "tls")
_PORT: Final = 4222


@dataclass(frozen=True, init=False)
class ServerAddress:
    """One server, or the servers of a cluster, and the files to log in with.

    Secrets are only in files, since every user of the host can read command lines. The files are read for each
    connection, so they can be renewed.

    Attributes:
        urls: ``nats://HOST:PORT``, or ``tls://HOST:PORT`` to send nothing unencrypted. Given as a list, or as one
            text with commas.
        creds: A credentials file of NATS (a JWT and its seed).
        nkey: A file with the seed of an nkey.
        login: A file whose first line is ``USER:PASSWORD``, or a token.
        tls_ca: The CA certificates to trust; None: the system's. If given, nothing is sent unencrypted.
        tls_cert: The client's certificate.
        tls_key: Its key; None: in *tls_cert*.

    Raises:
        ValueError: There is no server, or one has a password in its URL; or the files do not go together.

    Example:
        >>> server = ServerAddress("tls://nats1,tls://nats2", nkey="alice.nkey", tls_ca="ca.pem")
        >>> server.urls
        ('tls://nats1:4222', 'tls://nats2:4222')
    """

    urls: tuple[str, ...]
    creds: Path | None
    nkey: Path | None
    login: Path | None
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None

    @checked
    def __init__(
        self,
        urls: str | Iterable[str],
        *,
        creds: str | os.PathLike[str] | None = None,
        nkey: str | os.PathLike[str] | None = None,
        login: str | os.PathLike[str] | None = None,
        tls_ca: str | os.PathLike[str] | None = None,
        tls_cert: str | os.PathLike[str] | None = None,
        tls_key: str | os.PathLike[str] | None = None,
    ) -> None:
        each = urls.split(",") if isinstance(urls, str) else urls
        servers = tuple(_checked_url(url) for url in map(str.strip, each) if url)
        if not servers:
            raise ValueError("no server is given: write nats://HOST:PORT")
        ways = {"creds": creds, "nkey": nkey, "login": login}
        used = [name for name, file in ways.items() if file is not None]
        if len(used) > 1:
            raise ValueError(f"{' and '.join(used)} are ways to log in, and one is enough")
        if tls_key is not None and tls_cert is None:
            raise ValueError("tls_key goes with tls_cert")
        object.__setattr__(self, "urls", servers)
        for name, file in {**ways, "tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key}.items():
            object.__setattr__(self, name, None if file is None else Path(file))

    @property
    def must_encrypt(self) -> bool:
        """True if nothing must be sent unencrypted."""
        return (
            self.tls_ca is not None or self.tls_cert is not None or any(url.startswith("tls:") for url in self.urls)
        )

    def __str__(self) -> str:
        return ",".join(self.urls)


def _checked_url(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        raise ValueError(
            "a server's URL has a user or password in it, which other users of this host can read: "
            "write USER:PASSWORD into a file, and name it as the login"
        )
    try:
        host, port = parts.hostname, parts.port or _PORT
    except ValueError:
        host, port = None, 0
    has_more = parts.path.strip("/") or parts.query or parts.fragment
    if parts.scheme not in _SCHEMES or not host or has_more or not url.isprintable():  # urlsplit drops newlines
        raise ValueError(f"{url[:100]!r} is no address of a server: write nats://HOST:PORT or tls://HOST:PORT")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
