"""One connection to the server, which opens itself again; each question has a deadline, and an answer or a reason.

What nats-py does not do, and this adds: the server's refusals reach whoever asked (NATS answers a forbidden message
with an error that names a subject, and the question with silence); a question ends when the connection is lost;
nothing is kept to be sent later, when nobody wants it any more; ``tls://`` never goes on unencrypted; and a
connection that the server closed for good (its user was taken away, say) is opened anew.
"""

import asyncio
import contextlib
import json
import logging
import re
import ssl
import uuid
from collections.abc import Awaitable, Callable, Collection
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
    from nats.aio.client import Client
    from nats.aio.msg import Msg

_LOGGER = logging.getLogger("qmpvcpu.bus")

CALL_S: Final = 15.0
"""How long a call may take that says nothing else: a cluster that has lost its leader answers again after 5 s."""

_TRY_S: Final = 3.0  # one question; a new leader does not know of those that the old one got
_PAUSE_S: Final = 0.1
_NO_API_S: Final = 1.0
_PING_S: Final = 2  # a partition is noticed after three of them
_CONNECT_S: Final = 2
_REOPEN_S: Final = 1.0
_DENIED: Final = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"')
_UNAVAILABLE: Final = 503
_LAST_SEQUENCE: Final = (10071, 10164)  # JSStreamWrongLastSequence(Constant)Err in errors.json of nats-server
_NO_JETSTREAM: Final = (10039, 10076)  # not enabled for this account; not enabled
_AGAIN: Final = (10158, 10201)  # the same message is being written; this one's predecessor is
_ENABLE: Final = "nats-server -js, or jetstream {} in its configuration"


class ApiError(HostsError):
    """JetStream answered with an error.

    Attributes:
        number: Its number in the server's errors.json.
        status: The number as of HTTP.
        sent_before: True if an earlier try may have been carried out.
    """

    sent_before = False

    def __init__(self, asked: str, error: dict[str, Any]) -> None:
        super().__init__(f"{asked}: the server says {printable(str(error.get('description', error)))}")
        self.number = int(error.get("err_code", 0))
        self.status = int(error.get("code", 0))

    @property
    def is_stale(self) -> bool:
        """True if the revision that was to be replaced is no longer the last."""
        return self.number in _LAST_SEQUENCE

    @property
    def is_missing(self) -> bool:
        """True if there is no such thing."""
        return self.status == 404  # noqa: PLR2004 - as of HTTP


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
    """A connection; see the module."""

    def __init__(
        self,
        address: ServerAddress,
        name: str,
        on_lost: Callable[[], None] | None = None,
        on_back: Callable[[], None] | None = None,
    ) -> None:
        self.address = address
        self._name = name
        self._on_lost = on_lost
        self._on_back = on_back
        self._client: Client | None = None
        self._waiting: dict[asyncio.Future[Any], str] = {}
        self._denied: dict[str, str] = {}
        self._connected = asyncio.Event()
        self._failures: list[str] | None = None
        self._reopening: asyncio.Task[None] | None = None
        self._is_closing = False
        self.anew: set[Callable[[], None]] = set()
        """Called when the connection is there again: whatever was not delivered meanwhile is lost."""
        self.starts: set[Callable[[], Awaitable[None]]] = set()
        """Called for each client that takes the place of this one."""

    # --- opening and closing

    async def open(self, timeout: float) -> Self:
        """Open it.

        Raises:
            ServerConnectError: No server can be reached, or none lets us in; each has been tried once.
        """
        self._failures = []
        try:
            async with asyncio.timeout(timeout):
                await self._open_client()
        except TimeoutError:
            why = "; ".join(self._failures) or f"no answer in {timeout:g} s"
            raise ServerConnectError(str(self.address), why, _remedy(why)) from None
        except _AllFailedError as error:
            why = "; ".join(self._failures)
            raise ServerConnectError(str(self.address), why, _remedy(why)) from error.__cause__
        self._failures = None
        self._connected.set()
        return self

    async def _open_client(self) -> None:
        """Make a client, and connect it."""
        client = _client_class()()
        client.must_encrypt = self.address.must_encrypt
        self._denied.clear()

        async def on_error(error: Exception) -> None:
            self._failed(error)

        async def on_disconnect() -> None:
            if self._client is client:
                self._lost()

        async def on_reconnect() -> None:
            if self._client is client:
                self._back()

        async def on_closed() -> None:
            if self._client is client and not self._is_closing:
                self._reopening = asyncio.create_task(self._reopen())

        try:
            await client.connect(
                list(self.address.urls),
                name=self._name,
                error_cb=on_error,
                disconnected_cb=on_disconnect,
                reconnected_cb=on_reconnect,
                closed_cb=on_closed,
                connect_timeout=_CONNECT_S,
                reconnect_time_wait=1,
                max_reconnect_attempts=-1,
                ping_interval=_PING_S,
                max_outstanding_pings=2,
                pending_size=0,  # nothing is kept for later
                **self._login(),
            )
        except BaseException:
            with contextlib.suppress(Exception):
                await client.close()
            raise
        self._client = client

    def _login(self) -> dict[str, Any]:
        """Return the options of nats-py for the files of the address.

        Raises:
            ServerConnectError: One cannot be read.
        """
        address = self.address
        options: dict[str, Any] = {}
        try:
            if address.creds is not None:
                address.creds.read_bytes()
                options["user_credentials"] = str(address.creds)
            if address.nkey is not None:
                address.nkey.read_bytes()
                options["nkeys_seed"] = str(address.nkey)
            if address.login is not None:
                # Read again with each connection, so that a new password needs no restart.
                login = address.login
                user, password = _user_and_password(login.read_text())
                if password:
                    options["user"] = lambda: _user_and_password(login.read_text())[0]
                    options["password"] = lambda: _user_and_password(login.read_text())[1]
                else:
                    options["token"] = lambda: _user_and_password(login.read_text())[0]
                if not user:
                    raise ServerConnectError(str(address), f"{login} is empty", "its first line is USER:PASSWORD")
            if address.must_encrypt:
                context = ssl.create_default_context(cafile=address.tls_ca)
                if address.tls_cert is not None:
                    context.load_cert_chain(address.tls_cert, address.tls_key)
                options["tls"] = context
        except (OSError, ssl.SSLError, UnicodeDecodeError) as error:
            name = getattr(error, "filename", None)
            why = f"{name + ': ' if name else ''}{error.strerror if isinstance(error, OSError) else error}"
            raise ServerConnectError(
                str(address), f"a file for logging in cannot be used: {why}", "check its path, owner and format"
            ) from error
        return options

    async def close(self) -> None:
        """Close it."""
        self._is_closing = True
        if self._reopening is not None:
            self._reopening.cancel()
        self._end_waiting(CutError("the connection was closed", sent=True))
        if self._client is not None:
            with contextlib.suppress(Exception):
                await self._client.close()

    # --- what nats-py reports

    def _failed(self, error: Exception) -> None:
        """An error that belongs to no question: it is what the server refused, or why it cannot be reached."""
        text = printable(str(error) or type(error).__name__)
        found = _DENIED.search(text)
        if found is not None:
            action, subject = found[1], found[2]
            if action == "subscription":
                self._denied[subject] = "subscribe to"
            waiting = [each for each, of in self._waiting.items() if of == subject or action == "subscription"]
            what = "publish to" if action == "publish" else "subscribe to"
            for each in waiting:
                if not each.done() and (action == "publish" or subject.startswith("_inbox.")):
                    each.set_exception(_DeniedError(subject, what))
            if not waiting:
                _LOGGER.warning("%s: not allowed to %s %s", self._name, what, subject)
            return
        if self._failures is None:
            _LOGGER.info("%s: %s", self._name, text)
            return
        self._failures.append(text)
        if len(self._failures) >= len(self.address.urls):
            raise _AllFailedError from error

    def _lost(self) -> None:
        if self._connected.is_set() and not self._is_closing:
            self._connected.clear()
            _LOGGER.warning("%s: the connection to %s is lost", self._name, self.address)
            if self._on_lost is not None:
                self._on_lost()
        self._end_waiting(CutError("the connection was lost", sent=True))

    def _back(self) -> None:
        self._denied.clear()
        self._connected.set()
        _LOGGER.warning("%s: connected to %s again", self._name, self.server_name)
        for each in tuple(self.anew):
            each()
        if self._on_back is not None:
            self._on_back()

    def _end_waiting(self, error: Exception) -> None:
        for each in self._waiting:
            if not each.done():
                each.set_exception(error)

    async def _reopen(self) -> None:
        """Open it anew: nats-py has given up, since the server closed it with an error."""
        self._lost()
        while True:
            await asyncio.sleep(_REOPEN_S)
            try:
                await self._open_client()
                for each in tuple(self.starts):
                    await each()
            except (QmpVcpuError, OSError, TimeoutError) as error:
                _LOGGER.info("%s: %s", self._name, error)
            else:
                break
        self._back()

    # --- what it is connected to

    @property
    def client(self) -> "Client":
        """nats-py's client: another one after the server closed the connection with an error."""
        if self._client is None:
            raise ServerLostError("connection", "it was never opened", maybe_done=False)
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
        """The longest message that it takes, in bytes."""
        return self.client.max_payload

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

    async def ask(
        self, subject: str, data: bytes, *, timeout: float, headers: dict[str, str] | None = None, asked: str = ""
    ) -> "Msg":
        """Ask once, and return the answer.

        Raises:
            NobodyError: Nobody listens to it.
            CutError: No answer came.
            ServerForbiddenError: The server does not let us ask.
            TooLongError: It is longer than the server takes.
        """
        import nats.errors

        asked = asked or subject
        self.check_length(asked, data)
        for inbox in self._denied:
            if inbox.startswith("_inbox."):
                raise ServerForbiddenError(asked, inbox, "subscribe to")
        if not self.is_connected:
            raise CutError("there is no connection", sent=False)
        try:
            return await self._answer(subject, data, timeout, headers)
        except _DeniedError as error:
            raise ServerForbiddenError(asked, error.subject, error.action) from None
        except nats.errors.NoRespondersError:
            raise NobodyError from None
        except (nats.errors.OutboundBufferLimitError, nats.errors.ConnectionClosedError):
            raise CutError("there is no connection", sent=False) from None
        except nats.errors.TimeoutError:
            raise CutError(f"no answer in {timeout:g} s", sent=True) from None

    async def _answer(self, subject: str, data: bytes, timeout: float, headers: dict[str, str] | None) -> "Msg":
        """Return the answer; raise what nats-py raises, and what else ended the waiting."""
        refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[refused] = subject.lower()  # as nats-py has it in its errors
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
    ) -> tuple[dict[str, Any], bool]:
        """Ask JetStream until it answers, through a change of leader and a lost connection.

        For *nobody_s* it may be that nobody listens, as without a leader.

        Returns:
            The answer, and whether an earlier try may have been carried out.

        Raises:
            ApiError: It answered with an error that another try does not change.
            ServerLostError: No answer came in time.
            ServerForbiddenError: The server does not let us ask.
            TooLongError: It is longer than the server takes.
            UnfitServerError: Nobody answers there, so there is no JetStream, or no such bucket.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        sent, why = False, ""
        alone_since: float | None = None
        while (left := deadline - loop.time()) > 0:
            try:
                async with asyncio.timeout(left):
                    await self.wait_connected()
                answer = await self.ask(subject, data, timeout=min(_TRY_S, left), headers=headers, asked=asked)
            except TimeoutError:
                why = "there is no connection"
                break
            except NobodyError:
                why = "nobody answers"
                alone_since = alone_since or loop.time()
                if loop.time() - alone_since >= min(nobody_s, timeout - 2 * _PAUSE_S):
                    raise UnfitServerError(
                        asked, why, f"enable JetStream ({_ENABLE}), and run 'qmpvcpu hosts init'"
                    ) from None
            except CutError as error:
                sent, why, alone_since = sent or error.sent, str(error), None
            else:
                alone_since = None
                try:
                    return _checked(asked, answer), sent
                except ApiError as error:
                    if error.number in _NO_JETSTREAM:
                        raise UnfitServerError(asked, "it has no JetStream", f"enable it: {_ENABLE}") from None
                    if error.status != _UNAVAILABLE and error.number not in _AGAIN:
                        error.sent_before = sent
                        raise
                    why = str(error)
            await asyncio.sleep(min(_PAUSE_S, max(0.0, deadline - loop.time())))
        raise ServerLostError(asked, why or f"no answer in {timeout:g} s", maybe_done=sent)

    async def api(self, what: str, request: dict[str, Any], *, asked: str, timeout: float = CALL_S) -> dict[str, Any]:
        """Ask JetStream's API; as `insist`."""
        answer, _ = await self.insist(
            f"$JS.API.{what}",
            json.dumps(request).encode() if request else b"",
            asked=asked,
            timeout=timeout,
            nobody_s=_NO_API_S,
        )
        return answer

    async def check_subscribed(self, asked: str, subjects: Collection[str]) -> None:
        """Wait until the server has taken our subscriptions.

        Raises:
            ServerForbiddenError: It refused one of *subjects*.
            ServerLostError: It does not answer.
        """
        import nats.errors

        try:
            await self.client.flush(timeout=_CONNECT_S)  # it refuses before it answers to this
        except nats.errors.Error as error:
            raise ServerLostError(asked, str(error), maybe_done=False) from None
        for subject in subjects:
            if subject.lower() in self._denied:
                raise ServerForbiddenError(asked, subject, "subscribe to")


class _AllFailedError(Exception):
    """Each server was tried once."""


class _DeniedError(Exception):
    def __init__(self, subject: str, action: str) -> None:
        super().__init__(subject)
        self.subject = subject
        self.action = action


def _client_class() -> "type[Any]":
    """Return nats-py's client; one that refuses a server without TLS if it must.

    Raises:
        HostsError: nats-py is not installed.
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
            # nats-py encrypts if the server asks for it, and otherwise sends the password as it is.
            if self.must_encrypt and not self._server_info.get("tls_required"):
                raise errors.Error("nats: the server does not encrypt")
            return super()._connect_command()

    return _Client


def _checked(asked: str, answer: "Msg") -> dict[str, Any]:
    """Return what JetStream answered.

    Raises:
        ApiError: An error.
    """
    try:
        document = json.loads(answer.data)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise ApiError(asked, {"description": f"something that is no JSON object: {answer.data[:100]!r}"})
    error = document.get("error")
    if isinstance(error, dict):
        raise ApiError(asked, error)
    return document


def _user_and_password(text: str) -> tuple[str, str]:
    """Return the user and the password in a file's first line; a token has none."""
    line = text.partition("\n")[0].strip()
    user, _, password = line.partition(":")
    return user, password


def _remedy(why: str) -> str:
    """Return what to do about *why* no server let us in."""
    low = why.lower()
    if "authorization" in low or "authentication" in low:
        return "give the file that this server's administrator gave you: --creds, --nkey or --login"
    if "does not encrypt" in low:
        return "enable TLS in its configuration (tls {}), or write nats:// if you trust the network"
    if "certificate" in low or "ssl" in low or "tls" in low:
        return "give the CA that signed the server's certificate (tls_ca), and the host name that is in it"
    return "start it (nats-server -js), or check the address"
