"""A QMPClient of our own on a connected socket: greeting, negotiation, its end, and the reason for it."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import socket
import string
from collections.abc import Sequence
from typing import Final

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, Message, QMPClient, Runstate, StateError
from qemu.qmp.message import DeserializationError, UnexpectedTypeError
from qemu.qmp.qmp_client import BadReplyError, GreetingError, ServerParseError

from qmpvcpu.errors import MalformedReplyError, MonitorConnectError, clip, shorten
from qmpvcpu.qapi import parse_version
from qmpvcpu.qmp import check_version
from qmpvcpu.qmp.address import describe_peer, first_bytes, peer_pid

check_version(QMPClient.connect)

CLIENT_NAME: Final = "qmpvcpu"  # names its logger too
logging.getLogger(f"qemu.qmp.protocol.{CLIENT_NAME}").addHandler(logging.NullHandler())

_SHOWN: Final = 80  # how much of a peer's nonsense an error quotes
_LEFTOVERS: Final = (b'{"timestamp": ', b'{"return": ', b'{"error": ')  # how QEMU's events and replies begin
_LONGEST_LEFTOVER: Final = 1 << 20  # bytes; a reply of query-hotpluggable-cpus for 4,096 slots is half of that
_CHUNK: Final = 1 << 16
_GREETING_S: Final = 1.0  # how long a peer may take to greet before it is asked whether it is an agent
_LETTERS: Final = string.ascii_letters + "-_@#+*.:,;=~"  # no digits: what follows is a number


_IN_A_ROW: Final = 64  # messages of one VM, until others have their turn; each takes some 20 us
_READBUFLEN: Final = 10 << 20  # bytes; the longest line of every client until 0.0.5, which made it an attribute


class TunedClient(QMPClient):
    """A client that sends faster than `QMPClient`, and takes no reply meant for the last client.

    It overrides private methods of qemu.qmp. Each override is a gain and nothing more: a version that no longer has
    one of these methods, or an attribute that they use, behaves like its own `QMPClient` there.
    tests/peer/test_private_parts.py checks which of them the installed version has, and takes them away.

    - ``_get_exec_id``: ids that are short and belong to this session alone. QEMU sends a reply that the last client
      did not wait for to the next one, after its greeting too (measured on 7.2 and 10.0: after every third hang-up
      with queries in flight). qemu.qmp counts from 0 in every session, and would take it for the reply to its own
      command. Short, because QEMU reads QMP byte by byte (monitor/monitor.c, ``monitor_can_read``), each in a turn of
      its loop: 4 us of its CPU time, which is most of what a query costs.
    - ``_bh_send_message``, with ``_outgoing`` and ``_writer``: one system call for all messages that wait.
    - ``_recv``: after some messages others have their turn. qemu.qmp takes in all that has come, so that a QEMU that
      never stops telling events keeps the whole event loop, and with it all other VMs, waiting.
    - ``_cb_inbound`` and ``_cb_outbound``: messages are rendered only if somebody reads the log. qemu.qmp always
      renders them, which is a fifth of our time in bulk.
    """

    def __init__(self) -> None:
        super().__init__(CLIENT_NAME)
        # Done by establish(): qemu.qmp asserts the reply, so a refusal has no text, and under -O goes unnoticed.
        self.negotiate = False
        self.events.event_filter = lambda _event: False  # the default listener would keep every event for ever
        session = "".join(_LETTERS[byte % len(_LETTERS)] for byte in os.urandom(4))  # one in 16 million
        self._received = itertools.count(1)
        self._ids = (f"{session}{number}" for number in itertools.count())

    def _get_exec_id(self) -> str:
        return next(self._ids)

    async def _bh_send_message(self) -> None:
        outgoing, writer = getattr(self, "_outgoing", None), getattr(self, "_writer", None)
        if outgoing is None or writer is None:
            await super()._bh_send_message()
            return
        waiting = [await outgoing.get()]
        while not outgoing.empty():
            waiting.append(outgoing.get_nowait())
        try:
            self.write_all(writer, [self._cb_outbound(message) for message in waiting])
        finally:
            for _ in waiting:
                outgoing.task_done()

    @staticmethod
    def write_all(writer: asyncio.StreamWriter, messages: Sequence[Message]) -> None:
        """Write *messages* in one piece."""
        writer.write(b"".join(map(bytes, messages)))

    async def _recv(self) -> Message:
        if next(self._received) % _IN_A_ROW == 0:
            await asyncio.sleep(0)
        return await super()._recv()

    def _cb_inbound(self, msg: Message) -> Message:
        self.logger.debug("<-- %s", msg)
        return msg

    def _cb_outbound(self, msg: Message) -> Message:
        self.logger.debug("--> %s", msg)
        return msg


def longest_line(client: QMPClient) -> int:
    """Return the length, in bytes, of the longest line that *client* reads."""
    return getattr(client, "readbuflen", _READBUFLEN)


async def establish(client: QMPClient, sock: socket.socket, name: str, *, deadline: float, timeout_s: float) -> None:
    """Read the greeting and negotiate. After a failure the caller must still `end` the client.

    Args:
        client: Ours. Register listeners before this, so that no event is missed.
        sock: A connected non-blocking socket.
        name: The address, for messages.
        deadline: Time of the running loop's clock at which to give up.
        timeout_s: The whole time there was, for messages.

    Raises:
        MonitorConnectError: The peer is silent, hangs up, speaks something else, or refuses.
    """
    start = b""
    pid = peer_pid(sock)  # asked now: qemu.qmp closes the socket on failure
    token = random_token()
    patience = min(_GREETING_S, timeout_s * 3 / 4)
    probe = asyncio.get_running_loop().call_later(patience, _ask_for_agent, sock, token)
    try:
        async with asyncio.timeout_at(deadline):
            # Look before qemu.qmp reads: it waits for a newline no matter what arrives, and forgets what it has read.
            start = await _skip_leftovers(sock, name, token)
            probe.cancel()
            _check_start(name, start)
            await client.connect(sock)
            await _negotiate(client)
    except TimeoutError:
        why = _silence(client, start, timeout_s)
        reason, hint = describe_peer(pid)
        raise MonitorConnectError(name, why, reason=reason, hint=hint) from None
    except ConnectError as err:
        if isinstance(err.exc, GreetingError):
            raise _nonsense(name, start) from err
        raise MonitorConnectError(name, f"in its greeting: {explain(err.exc, longest_line(client))}") from err
    except OSError as err:
        raise MonitorConnectError(name, explain(err)) from err
    except ExecuteError as err:
        raise MonitorConnectError(name, f"it rejects qmp_capabilities: {clip(f'{err.error_class}: {err}')}") from None
    except BadReplyError as err:
        why = f"its reply to qmp_capabilities is malformed: {shorten(dict(err.msg))}"
        raise MonitorConnectError(name, why) from err
    except (ExecInterruptedError, StateError, AssertionError) as err:
        # AssertionError: qemu.qmp's, where the end comes right behind the greeting.
        why = f"after its greeting: {explain(await end(client, sock, grace_s=0), longest_line(client))}"
        raise MonitorConnectError(name, why) from err
    finally:
        probe.cancel()


def random_token() -> int:
    """Return a number that nobody else asks for; `secrets` takes longer to import than all of this module."""
    return int.from_bytes(os.urandom(4), "big") >> 1


def _ask_for_agent(sock: socket.socket, token: int) -> None:
    """Ask a silent peer what only a guest agent answers: one does not greet, and would be silent for ever.

    A QEMU that greets after all answers with an error to this id, which nobody waits for.
    """
    question = {"execute": "guest-sync", "arguments": {"id": token}, "id": f"agent{token}"}
    with contextlib.suppress(OSError):
        sock.send(json.dumps(question).encode())


async def _negotiate(client: QMPClient) -> None:
    """Leave the negotiation mode.

    A command that the last client hung up on may still wait in QEMU, and is then carried out in this session (7.2 and
    10.0; on a busy machine, after 4 of 1,500 hang-ups). If it was ``qmp_capabilities``, ours comes too late
    (monitor/qmp-cmds-control.c, ``qmp_qmp_capabilities``: CommandNotFound, "Capabilities negotiation is already
    complete"). The session is then ready all the same, except that ``oob`` is as that client wanted it.
    """
    try:
        await client.execute("qmp_capabilities", _capabilities(client))
    except ExecuteError as err:
        if err.error_class != "CommandNotFound":
            raise


def _capabilities(client: QMPClient) -> dict[str, list[str]] | None:
    """Return what to enable.

    We send nothing out of band. But without ``oob`` QEMU stops reading after each command until its main loop has
    carried it out; with it, up to 8 wait in QEMU's queue (qmp-spec, "Capabilities negotiation"), which makes
    pipelined plugs a quarter faster.
    """
    offered = client.greeting.QMP.capabilities if client.greeting else ()
    return {"enable": ["oob"]} if "oob" in offered else None


async def _skip_leftovers(sock: socket.socket, name: str, token: int) -> bytes:
    """Drop what QEMU still had for the last client; return the first bytes of what follows, which stay on the socket.

    Where a connection is cut while QEMU writes, whole events and replies reach the next client before its greeting.
    They are of no use here, since attaching reads everything anew. A guest agent returns *token* (`_ask_for_agent`).
    """
    while (start := await first_bytes(sock)).startswith(_LEFTOVERS):
        line = b""
        while not line.endswith(b"\n"):
            chunk = await first_bytes(sock, _CHUNK)
            line += sock.recv(chunk.find(b"\n") + 1 or len(chunk))
            if not chunk or len(line) > _LONGEST_LEFTOVER:
                raise _nonsense(name, line)
        try:
            said = json.loads(line)
        except (ValueError, RecursionError) as err:  # too many digits are a ValueError
            raise _nonsense(name, line) from err
        if said.get("return") == token:
            why = "it is the socket of a guest agent, and no QMP"
            raise MonitorConnectError(name, why, hint="attach(agent=...) takes that one; QMP has another")
    return start


def _check_start(name: str, start: bytes) -> None:
    """Refuse at once what cannot be the start of a greeting."""
    if not start:
        raise MonitorConnectError(name, "it hung up without a greeting", hint="QEMU may have ended this moment")
    if start.lstrip() and not start.lstrip().startswith(b"{"):
        raise _nonsense(name, start)


def _nonsense(name: str, start: bytes) -> MonitorConnectError:
    """Return the error for a peer that speaks something else."""
    hint = ""
    if b"monitor - type 'help'" in start:
        hint = "this is QEMU's monitor for people (HMP); programs need one made with -qmp"
    elif start.startswith((b"{\r\n", b"{\n")):
        hint = "is it a monitor with pretty=on? a program needs one without"
    return MonitorConnectError(name, f"what it sends is not a QMP greeting: {_quote(start)}", hint=hint)


def _silence(client: QMPClient, start: bytes, timeout_s: float) -> str:
    """Say what the peer failed to send before the deadline."""
    if client.greeting is not None:
        return f"it greeted, but did not reply to qmp_capabilities within {timeout_s:g} s"
    if start:
        return f"its greeting was not finished within {timeout_s:g} s: {_quote(start)}"
    return (
        f"no greeting within {timeout_s:g} s: another client holds this QMP socket, or QEMU is stopped"
        " (or it is not a QMP server)"
    )


def read_version(name: str, version: object) -> tuple[tuple[int, int, int], str]:
    """Return QEMU's version and package name, from a greeting or from ``query-version``.

    Raises:
        MonitorConnectError: It is neither.
    """
    try:
        return parse_version("query-version", version)
    except MalformedReplyError as err:
        raise MonitorConnectError(name, f"it names no QEMU version: {shorten(version)}") from err


async def end(client: QMPClient, sock: socket.socket, *, grace_s: float) -> BaseException | None:
    """Disconnect our own client and close its socket; never raises because of the peer.

    Args:
        client: Ours, in any state.
        sock: Its socket.
        grace_s: Seconds after which a peer that does not read is cut off.

    Returns:
        What ended the session earlier, or None.
    """

    def cut() -> None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    # disconnect() waits until all is sent: for ever, if the peer reads nothing.
    timer = asyncio.get_running_loop().call_later(grace_s, cut)
    try:
        if client.runstate is not Runstate.IDLE:
            await client.disconnect()
    except Exception as err:  # noqa: BLE001 - it raises what ended its reader or writer: that is the answer
        return err
    finally:
        timer.cancel()
        sock.close()
    return None


def has_hung_up(cause: BaseException | None) -> bool:
    """Return True if *cause*, which ended a session, is that the peer closed it, perhaps while it was writing."""
    match cause:
        case EOFError() | ConnectionResetError():
            return True
        case DeserializationError(raw=raw):
            return not raw.endswith(b"\n")
    return False


def explain(cause: BaseException | None, limit: int = 0) -> str:
    """Say what ended a session.

    Args:
        cause: What ended qemu.qmp's reader or writer.
        limit: The client's longest line, in bytes.

    Returns:
        A sentence without a full stop, such as ``the peer hung up (end of file)``.
    """
    match cause:
        case EOFError():
            why = "the peer hung up (end of file)"
        case ConnectionResetError():
            why = "the peer reset the connection (ECONNRESET)"
        case OSError():
            why = cause.strerror or str(cause)
        case ServerParseError():
            why = f"the peer could not read a message of ours: {shorten(dict(cause.msg))}"
        case UnexpectedTypeError():
            why = f"the peer sent JSON that is not an object: {shorten(cause.value, _SHOWN)}"
        case _:
            why = _explain_line(cause, limit)
    return why


def _explain_line(cause: BaseException | None, limit: int) -> str:
    """Say what is wrong with a line that could not be read."""
    match cause:
        case DeserializationError(raw=raw) if has_hung_up(cause):
            return f"the peer hung up in the middle of a message: {_quote(raw)}"
        case DeserializationError(raw=raw):
            return f"the peer sent a line that is not JSON: {_quote(raw)}"
        case UnicodeDecodeError():
            return f"the peer sent a line that is not UTF-8: {_quote(cause.object)}"
        case ValueError() if isinstance(cause.__context__, asyncio.LimitOverrunError):
            return f"the peer sent a line of more than {limit} bytes"
        case _:
            return f"the peer sent a message of the wrong shape: {type(cause).__name__}: {clip(str(cause))}"


def _quote(data: bytes) -> str:
    """Show the beginning of a peer's bytes."""
    return repr(data[:_SHOWN]) + ("..." if len(data) > _SHOWN else "")
