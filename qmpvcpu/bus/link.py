"""One connection to the server, which opens itself again; each question has a deadline, and an answer or a reason.

nats-py carries the messages. This adds what it does not have:

- The server's refusals reach the one who asked. NATS answers a forbidden message with an error that names a subject,
  and the question with silence.
- A question ends when the connection is lost, and nothing is kept to be sent later, when nobody wants it any more.
- ``tls://`` never goes on unencrypted.
- A connection is opened anew even if the server closed it with an error, or takes no more bytes. nats-py's own
  reconnecting is off, so each connection is a client of its own.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import random
import re
import socket
import ssl
import uuid
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from qmpvcpu.bus.address import ServerAddress
from qmpvcpu.errors import (
    HostsError,
    QmpVcpuError,
    ServerConnectError,
    ServerForbiddenError,
    ServerLostError,
    TooLongError,
    UnfitServerError,
    printable,
)

if TYPE_CHECKING:
    from urllib.parse import ParseResult

    from nats.aio.client import Client
    from nats.aio.msg import Msg

_LOGGER = logging.getLogger("qmpvcpu.bus")

DEFAULT_INBOX: Final = "_INBOX"
"""Below which subject everything arrives that is for a user without permissions of its own."""
CALL_S: Final = 15.0
"""How long a call may take that says nothing else: a cluster that has lost its leader answers again after 5 s."""

_TRY_S: Final = 3.0  # one question; a new leader does not know of those that the old one got
_NO_API_S: Final = 1.0  # a server that has JetStream answers at once, if only that it has no leader
_PAUSE_S: Final = 0.1
_DIAL_S: Final = 3.0
_ROUND_S: Final = 0.5
_PING_S: Final = 2.0
_PONG_S: Final = 4.0  # a loaded machine is late by a second or two
_CLOSE_S: Final = 2.0
_NATS_PING_S: Final = 60  # nats-py's own, which is not needed
_ROOM: Final = 512  # for headers, which count
_MOST_LINE: Final = 4096  # the server's max_control_line, which it does not tell
_LINE_ROOM: Final = 100  # for what a line has besides its subject and our inbox

_DENIED: Final = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"')
_PLAIN: Final = "the server does not encrypt"
_ENABLE: Final = "nats-server -js, or jetstream {} in its configuration"

# Numbers in the server's errors.json.
_LAST_SEQUENCE: Final = (10071, 10164)  # wrong last sequence
_NO_JETSTREAM: Final = (10039, 10076)  # not enabled for this account; not enabled
_AGAIN: Final = (10158, 10201)  # the same message, or one before it, is just being written
_NO_STREAM: Final = 10059
_NOT_FOUND: Final = 404
_UNAVAILABLE: Final = 503


class ApiError(UnfitServerError):
    """JetStream answered with an error.

    Attributes:
        number: Its number in the server's errors.json.
        status: The number as of HTTP.
        sent_before: True if an earlier try may have been carried out.
    """

    def __init__(self, asked: str, error: dict[str, Any], *, sent_before: bool) -> None:
        said = printable(str(error.get("description", error)))
        super().__init__(asked, f"JetStream says: {said}", "see to it on the server, and try again")
        self.number = int(error.get("err_code", 0))
        self.status = int(error.get("code", 0))
        self.sent_before = sent_before

    @property
    def is_stale(self) -> bool:
        """True if the revision that was to be replaced is no longer the last."""
        return self.number in _LAST_SEQUENCE

    @property
    def is_missing(self) -> bool:
        """True if there is no such thing."""
        return self.status == _NOT_FOUND

    @property
    def is_without_stream(self) -> bool:
        """True if there is no such bucket, or stream."""
        return self.number == _NO_STREAM


def shown(stream: str) -> str:
    """Return what people call *stream*: most are buckets."""
    return stream.replace("KV_", "bucket ")


def missing(stream: str) -> UnfitServerError:
    """Return the error that says that there is no such bucket, or stream."""
    return UnfitServerError(shown(stream), "it is not there", "run 'qmpvcpu hosts init'")


class NobodyError(Exception):
    """Nobody listens to the subject: raised inside this package only."""


class CutError(Exception):
    """There was no answer to a question: raised inside this package only.

    Attributes:
        sent: True if it may have arrived.
    """

    def __init__(self, why: str, *, sent: bool) -> None:
        super().__init__(why)
        self.sent = sent


class Link:
    """A connection; see the module.

    Args:
        address: The servers.
        name: What their administrator sees.
        inbox: The subject below which everything arrives that is for us.
        on_lost: Called when the connection is lost.
        on_back: Called when it is there again.
    """

    def __init__(
        self,
        address: ServerAddress,
        name: str,
        inbox: str = DEFAULT_INBOX,
        on_lost: Callable[[], None] | None = None,
        on_back: Callable[[], None] | None = None,
    ) -> None:
        self.address = address
        self._name = name
        self._inbox = inbox
        self._inbox_as_told = f"{inbox}.".lower()  # as nats-py has it in its errors
        self._on_lost = on_lost
        self._on_back = on_back
        self._client: Client | None = None
        self._connected = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()
        self._is_closing = False
        self._waiting: dict[asyncio.Future[None], str] = {}
        self._denied: set[str] = set()
        self.on_cut: set[Callable[[], None]] = set()
        """Called when the connection is lost: what would have been delivered is not delivered later."""
        self.on_client: set[Callable[[], Awaitable[None]]] = set()
        """Called for each later client: the subscriptions of the one before are gone."""

    # --- opening, keeping and closing

    async def open(self, timeout: float) -> Self:
        """Open it, and keep it open.

        Raises:
            ServerConnectError: No server lets us in; each was tried once.
            UnfitServerError: nats-py is not installed.
        """
        try:
            async with asyncio.timeout(timeout):
                self._client = await self._dial_any(self.address.urls)
        except TimeoutError:
            raise ServerConnectError(str(self.address), f"no answer in {timeout:g} s", _remedy("")) from None
        self._connected.set()
        self._keeping = asyncio.create_task(self._keep(), name=f"connection of {self._name}")
        return self

    async def close(self) -> None:
        """Close it."""
        self._is_closing = True
        if self._client is not None:
            await _close(self._client)
        while self._keeping is not None and not self._keeping.done():
            self._keeping.cancel()  # nats-py sometimes goes on as if nothing had been said
            await asyncio.wait((self._keeping,), timeout=_PAUSE_S)
        self._connected.clear()
        self._end_waiting()
        if self._client is not None:
            await _close(self._client)  # another one, if it had just been dialled

    async def _keep(self) -> None:
        """Open it anew whenever it ends."""
        while True:
            await self._until_gone()
            if self._is_closing:
                return
            self._connected.clear()
            _LOGGER.warning("%s: the connection to %s is lost", self._name, self.address)
            self._end_waiting()
            for cut in tuple(self.on_cut):
                cut()
            if self._on_lost is not None:
                self._on_lost()
            lost = self.client
            await asyncio.gather(_close(lost), self._dial_until_in(_urls(self.address, lost)))
            self._connected.set()
            _LOGGER.warning("%s: connected to %s again", self._name, self.server_name)
            if self._on_back is not None:
                self._on_back()

    async def _until_gone(self) -> None:
        """Wait until nats-py says that the connection has ended, or the server no longer answers."""
        import nats.errors

        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PING_S):
                    await self._gone.wait()
                    return
            try:
                await self.client.rtt(timeout=int(_PONG_S))
            except (OSError, nats.errors.Error) as error:
                _LOGGER.info("%s: the server does not answer: %s", self._name, type(error).__name__)
                return

    async def _dial_until_in(self, urls: Collection[str]) -> None:
        while True:
            try:
                self._client = await self._dial_any(urls)
                if await self._subscribed_again():
                    return
                await _close(self._client)
            except HostsError as error:
                _LOGGER.info("%s: %s", self._name, error)
            except Exception:  # a fault, ours or nats-py's: an agent must come back all the same
                _LOGGER.exception("%s: the connection could not be opened again", self._name)
            await asyncio.sleep(_ROUND_S * (1 + random.random()))  # noqa: S311 - so that not all hosts come at once

    async def _subscribed_again(self) -> bool:
        """Make the subscriptions of the connection before; return False if this one is lost or refuses one."""
        import nats.errors

        try:
            for start in tuple(self.on_client):
                await start()
        except (HostsError, OSError, nats.errors.Error) as error:
            _LOGGER.warning("%s: its subscriptions could not be made again: %s", self._name, in_words(error))
            return False
        return True

    async def _dial_any(self, urls: Collection[str]) -> "Client":
        """Return a client of the first server that lets us in, in any order.

        Raises:
            ServerConnectError: None does.
        """
        failures = []
        for url in random.sample(list(urls), len(urls)):
            try:
                return await self._dial(url)
            except _DialError as error:
                failures.append(f"{url}: {error}" if len(urls) > 1 else str(error))
        why = "; ".join(failures)
        raise ServerConnectError(str(self.address), why, _remedy(why))

    async def _dial(self, url: str) -> "Client":
        """Return a client of the server at *url*.

        Raises:
            _DialError: It does not let us in.
        """
        client = _client_class()()
        client.must_encrypt = self.address.must_encrypt
        gone = asyncio.Event()

        async def on_error(error: Exception) -> None:
            if self._client is client:
                self._refused(str(error))
            elif not client.is_connected:
                raise _DialError(in_words(error)) from error  # or nats-py would go on trying

        async def on_end() -> None:
            gone.set()

        try:
            await client.connect(
                url,
                name=self._name,
                inbox_prefix=self._inbox,
                error_cb=on_error,
                disconnected_cb=on_end,
                closed_cb=on_end,
                allow_reconnect=False,
                connect_timeout=_DIAL_S,
                ping_interval=_NATS_PING_S,
                tls_hostname=None if url in self.address.urls else _certified_name(self.address, url),
                **_login(self.address),
            )
        except BaseException as error:
            await _close(client)
            if not isinstance(error, Exception) or isinstance(error, (QmpVcpuError, _DialError)):
                raise
            raise _DialError(in_words(error)) from error  # nats-py has errors of many kinds
        _end_without_a_warning(client)
        self._gone, self._denied = gone, set()
        return client  # type: ignore[no-any-return]

    def _refused(self, text: str) -> None:
        """Note what the server says that belongs to no question; a refusal ends those that it is about."""
        found = _DENIED.search(text)
        if found is None:
            _LOGGER.info("%s: %s", self._name, printable(text))
            return
        is_publish, subject = found[1] == "publish", found[2]
        if not is_publish:
            self._denied.add(subject)
        error = _DeniedError(subject, "publish to" if is_publish else "subscribe to")
        # Answers come to an inbox; who may not subscribe to it gets none.
        about = [
            waiting
            for waiting, asked in self._waiting.items()
            if (asked == subject if is_publish else subject.startswith(self._inbox_as_told))
        ]
        for waiting in about:
            if not waiting.done():
                waiting.set_exception(error)
        if not about:
            _LOGGER.warning("%s may not %s %s", self._name, error.action, printable(subject))

    def _end_waiting(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(CutError("the connection was lost", sent=True))

    # --- what it is connected to

    @property
    def client(self) -> "Client":
        """nats-py's client, which is another one after each loss of the connection."""
        if self._client is None:
            raise ServerLostError("ask", "the connection was never opened", maybe_done=False)
        return self._client

    @property
    def _info(self) -> dict[str, Any]:
        return self.client._server_info  # noqa: SLF001 - nats-py has no other name for it

    @property
    def server_name(self) -> str:
        """What the server calls itself."""
        return printable(str(self._info.get("server_name", "")))

    @property
    def server_version(self) -> str:
        """The server's version, such as ``2.15.1``."""
        return printable(str(self._info.get("version", "")))

    @property
    def in_cluster(self) -> bool:
        """True if it is one server of a cluster."""
        return bool(self._info.get("cluster"))

    @property
    def most_bytes(self) -> int:
        """The longest message that it takes, in bytes, beside what headers need."""
        return max(0, self.client.max_payload - _ROOM)

    @property
    def is_connected(self) -> bool:
        """True while there is a connection."""
        return self._connected.is_set()

    async def wait_connected(self) -> None:
        """Wait until there is a connection."""
        await self._connected.wait()

    @staticmethod
    def unique() -> str:
        """Return what no other message is called."""
        return uuid.uuid4().hex

    # --- questions

    def check_length(self, asked: str, data: bytes) -> None:
        """Raise TooLongError if *data* is longer than the server takes."""
        if len(data) > self.most_bytes:
            raise TooLongError(asked, len(data), self.most_bytes)

    def _check_line(self, asked: str, subject: str) -> None:
        """Raise TooLongError if the server would end the connection, since *subject* does not fit into a line."""
        size, most = len(subject.encode()), _MOST_LINE - _LINE_ROOM - len(self._inbox)
        if size > most:
            raise TooLongError(f"the subject to {asked[:100]}", size, most, bound="max_control_line")

    async def check_subscribed(self, asked: str, subjects: Collection[str]) -> None:
        """Wait until the server has taken our subscriptions.

        Raises:
            ServerForbiddenError: It refused one of *subjects*.
            ServerLostError: It does not answer.
        """
        import nats.errors

        try:
            # The server refuses before it answers to a ping. nats-py sends a ping before what it has not yet sent, so
            # only the second one comes after the subscriptions.
            for _ in range(2):
                await self.client.rtt(timeout=int(_PONG_S))
        except nats.errors.Error as error:
            raise ServerLostError(asked, in_words(error), maybe_done=False) from None
        for subject in subjects:
            if subject.lower() in self._denied:  # nats-py has all errors in small letters
                raise ServerForbiddenError(asked, subject, "subscribe to")

    async def ask(
        self, subject: str, data: bytes, *, timeout: float, asked: str, headers: dict[str, str] | None = None
    ) -> "Msg":
        """Ask once, and return the answer.

        Raises:
            NobodyError: Nobody listens to it.
            CutError: No answer came.
            ServerForbiddenError: The server does not let us ask.
            TooLongError: It is longer than the server takes.
        """
        import nats.errors

        self.check_length(asked, data)
        self._check_line(asked, subject)
        for inbox in self._denied:
            if inbox.startswith(self._inbox_as_told):
                raise ServerForbiddenError(asked, f"{self._inbox}.>", "subscribe to")
        if not self.is_connected:
            raise CutError("there is no connection", sent=False)
        try:
            return await self._answer(subject, data, timeout, headers)
        except _DeniedError as error:
            denied = subject if error.action == "publish to" else f"{self._inbox}.>"
            raise ServerForbiddenError(asked, denied, error.action) from None
        except nats.errors.NoRespondersError:
            raise NobodyError from None
        except nats.errors.ConnectionClosedError:
            raise CutError("there is no connection", sent=False) from None
        except nats.errors.TimeoutError:
            raise CutError(f"no answer in {timeout:g} s", sent=True) from None

    async def _answer(self, subject: str, data: bytes, timeout: float, headers: dict[str, str] | None) -> "Msg":
        """Return the answer; raise what nats-py raises, and what else ended the waiting."""
        refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[refused] = subject.lower()
        asking = asyncio.ensure_future(self.client.request(subject, data, timeout=timeout, headers=headers))
        try:
            await asyncio.wait((asking, refused), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                await refused
            return await asking
        finally:
            del self._waiting[refused]
            for each in (refused, asking):
                if not each.cancel() and not each.cancelled():
                    each.exception()  # seen

    async def insist(
        self,
        subject: str,
        data: bytes,
        *,
        asked: str,
        timeout: float = CALL_S,
        nobody_s: float = CALL_S,
        headers: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """Ask JetStream until it answers, through a change of leader and a lost connection; return the answer.

        For *nobody_s* it may be that nobody listens, as while a stream has no leader.

        Raises:
            ApiError: It answered with an error that another try does not change.
            ServerLostError: No answer came in time.
            ServerForbiddenError: The server does not let us ask.
            TooLongError: It is longer than the server takes.
            UnfitServerError: Nobody listens there, so there is no JetStream, or no such bucket.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        alone_since: float | None = None
        why, sent = f"no answer in {timeout:g} s", False
        while (left := deadline - loop.time()) > 0:
            try:
                await self._connected_within(left)
                answer = await self.ask(subject, data, timeout=min(_TRY_S, left), headers=headers, asked=asked)
                return _checked(asked, answer, sent_before=sent)
            except NobodyError:
                why = "nobody listens"
                alone_since = alone_since or loop.time()
                if loop.time() - alone_since + _PAUSE_S >= min(nobody_s, timeout):
                    raise UnfitServerError(
                        asked, why, f"enable JetStream ({_ENABLE}), then run 'qmpvcpu hosts init'"
                    ) from None
            except (CutError, _AgainError) as error:
                why, alone_since = str(error), None
                sent = sent or (isinstance(error, CutError) and error.sent)
            await asyncio.sleep(min(_PAUSE_S, max(0.0, deadline - loop.time())))
        raise ServerLostError(asked, why, maybe_done=sent)

    async def _connected_within(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self.wait_connected()
        except TimeoutError:
            raise CutError("there is no connection", sent=False) from None

    async def api(self, what: str, request: dict[str, Any], *, asked: str, timeout: float = CALL_S) -> dict[str, Any]:
        """Ask JetStream's API; as ``insist``."""
        return await self.insist(
            f"$JS.API.{what}",
            json.dumps(request).encode() if request else b"",
            asked=asked,
            timeout=timeout,
            nobody_s=_NO_API_S,
        )


class _DialError(Exception):
    """A server does not let us in."""


class _AgainError(Exception):
    """JetStream cannot do it now."""


class _DeniedError(Exception):
    def __init__(self, subject: str, action: str) -> None:
        super().__init__(subject)
        self.subject = subject
        self.action = action


def _client_class() -> "type[Any]":
    """Return nats-py's client; it refuses a server without TLS if it must encrypt.

    Raises:
        UnfitServerError: nats-py is not installed.
    """
    try:
        from nats import errors
        from nats.aio.client import Client
    except ImportError as error:
        raise UnfitServerError(
            "nats-py", f"it cannot be imported ({error})", "it is an extra: pip install 'qmpvcpu[hosts]'"
        ) from error

    class _Client(Client):
        must_encrypt = False

        def _connect_command(self) -> bytes:
            # nats-py encrypts if the server asks for it, and else would send the password as it is.
            if self.must_encrypt and not self._server_info.get("tls_required"):
                raise errors.Error(_PLAIN)
            return super()._connect_command()

    return _Client


def _end_without_a_warning(client: Any) -> None:
    """Tell asyncio that TLS is below the client's stream, which nats-py does not; else it warns of each end."""
    stream = client._transport._io_writer.transport  # noqa: SLF001 - nats-py has no other name for it
    if stream.get_extra_info("ssl_object") is not None:
        stream.get_protocol()._over_ssl = True  # noqa: SLF001 - as StreamWriter.start_tls does


async def _close(client: "Client") -> None:
    """Close it; one whose bytes nobody takes is left alone, since it would wait for that."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(_CLOSE_S):
            await client.close()


def _login(address: ServerAddress) -> dict[str, Any]:
    """Return nats-py's options for the files of *address*: read for each connection, so that they can be renewed.

    Raises:
        ServerConnectError: One cannot be used.
    """
    options: dict[str, Any] = {}
    try:
        if address.creds is not None:
            _read(address.creds, "-BEGIN NATS USER JWT-", "-BEGIN USER NKEY SEED-")
            options["user_credentials"] = str(address.creds)
        if address.nkey is not None:
            _read(address.nkey, "SU")
            options["nkeys_seed"] = str(address.nkey)
        if address.login is not None:
            user, colon, password = _read(address.login).partition("\n")[0].strip().partition(":")
            options |= {"user": user, "password": password} if colon else {"token": user}
        if address.must_encrypt:
            context = ssl.create_default_context(cafile=address.tls_ca)
            if address.tls_cert is not None:
                context.load_cert_chain(address.tls_cert, address.tls_key)
            options["tls"] = context
    except (OSError, ValueError) as error:  # an ssl.SSLError is an OSError
        files = [address.creds, address.nkey, address.login, address.tls_ca, address.tls_cert, address.tls_key]
        named = getattr(error, "filename", None) or ", ".join(str(each) for each in files if each is not None)
        raise ServerConnectError(
            str(address), f"{named}: {in_words(error)}", "check the file's name, owner and format"
        ) from error
    return options


def _read(path: Path, *marks: str) -> str:
    text = path.read_text()
    if not text.strip():
        raise ValueError("the file is empty")
    for mark in marks:
        if mark not in text:
            raise ValueError(f"there is no {mark!r} in it")
    return text


def in_words(error: Exception) -> str:
    """Return what went wrong with a connection."""
    if isinstance(error, TimeoutError):
        return f"no answer in {_DIAL_S:g} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, socket.gaierror | UnicodeError):  # UnicodeError: a label that no host name can have
        return "the host name cannot be resolved"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ssl.SSLError):
        return os.strerror(error.errno)
    return printable(str(error).removeprefix("nats: ") or type(error).__name__)


def _remedy(why: str) -> str:
    """Return what to do about *why* no server let us in."""
    low = why.lower()
    if "authorization" in low or "authentication" in low:
        return "give the file with which you may log in there: creds, nkey or login"
    if _PLAIN in low:
        return "enable TLS in its configuration, or write nats:// if you trust the network"
    if "certificate" in low or "ssl" in low or "tls" in low:
        return "give the CA that signed the server's certificate (tls_ca), and use the host name that is in it"
    return "start the server (nats-server -js), or check the address"


def _urls(address: ServerAddress, client: "Client") -> list[str]:
    """Return the servers that were given, and those that one of them told of."""
    told: list[ParseResult] = client.discovered_servers
    scheme = address.urls[0].partition(":")[0]
    return list(dict.fromkeys([*address.urls, *(f"{scheme}://{each.netloc}" for each in told)]))


def _certified_name(address: ServerAddress, url: str) -> str | None:
    """Return which name a server's certificate must have that was told of by its number; None: what is in *url*."""
    if not _is_number(url):
        return None
    return next((_host(each) for each in address.urls if not _is_number(each)), None)


def _host(url: str) -> str:
    return url.partition("://")[2].rpartition(":")[0].strip("[]")


def _is_number(url: str) -> bool:
    try:
        ipaddress.ip_address(_host(url))
    except ValueError:
        return False
    return True


def _checked(asked: str, answer: "Msg", *, sent_before: bool) -> dict[str, Any]:
    """Return what JetStream answered.

    Raises:
        _AgainError: It cannot do it now.
        ApiError: Another error.
        UnfitServerError: There is no JetStream.
    """
    try:
        document = json.loads(answer.data)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise ApiError(asked, {"description": f"no JSON object: {answer.data[:100]!r}"}, sent_before=sent_before)
    said = document.get("error")
    if not isinstance(said, dict):
        return document
    error = ApiError(asked, said, sent_before=sent_before)
    if error.number in _NO_JETSTREAM:
        raise UnfitServerError(asked, "the server has no JetStream, or not for this account", f"enable it: {_ENABLE}")
    if error.status == _UNAVAILABLE or error.number in _AGAIN:
        raise _AgainError(f"JetStream says: {printable(str(said.get('description')))}")
    raise error
