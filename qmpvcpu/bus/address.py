"""Where the NATS server is, and how to log in there. Pure."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import os

_SCHEMES: Final = ("nats", "tls")
_PORT: Final = 4222


@dataclass(frozen=True)
class ServerAddress:
    """One server, or the servers of a cluster, and the files to log in with.

    Secrets are only in files, since every user of the host can read command lines.

    Attributes:
        urls: ``nats://HOST:PORT``, or ``tls://HOST:PORT`` to send nothing unencrypted.
        creds: A credentials file of NATS (a JWT and its seed).
        nkey: A file with the seed of an nkey.
        login: A file whose first line is ``USER:PASSWORD``, or a token.
        tls_ca: The CA certificates to trust; None: the system's. If given, nothing is sent unencrypted.
        tls_cert: The client's certificate.
        tls_key: Its key; None: in *tls_cert*.
    """

    urls: tuple[str, ...]
    creds: Path | None = None
    nkey: Path | None = None
    login: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        if not self.urls:
            raise ValueError("no server is given: write nats://HOST:PORT")
        object.__setattr__(self, "urls", tuple(map(_checked_url, self.urls)))
        given = [name for name in ("creds", "nkey", "login") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are ways to log in, and one is enough")
        if self.tls_key is not None and self.tls_cert is None:
            raise ValueError("tls_key goes with tls_cert")

    @classmethod
    def of(cls, text: str, **files: "str | os.PathLike[str] | None") -> "ServerAddress":
        """Return the servers that *text* names, with commas between them; *files* are the attributes.

        Raises:
            ValueError: It names no server, or has a password in it.
            TypeError: There is no such file.
        """
        known = {each.name for each in fields(cls)} - {"urls"}
        if unknown := sorted(set(files) - known):
            raise TypeError(f"{', '.join(unknown)}: there is no such file of a server; there are {sorted(known)}")
        paths: dict[str, Any] = {name: Path(path) for name, path in files.items() if path is not None}
        return cls(tuple(filter(None, (each.strip() for each in text.split(",")))), **paths)

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
    if parts.scheme not in _SCHEMES or not host or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(f"{url[:100]!r} is no address of a server: write nats://HOST:PORT or tls://HOST:PORT")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
