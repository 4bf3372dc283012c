"""`GuestAgent`: asks the guest agent, one question at a time, and says why there is no answer."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, NamedTuple, TypeVar

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, Runstate, StateError
from qemu.qmp.qmp_client import BadReplyError

from qmpvcpu.agent import answers
from qmpvcpu.agent.client import LONGEST_LINE, SYNC, AgentClient, GreetedError, NoIdsError, TooManyStraysError
from qmpvcpu.errors import (
    AgentConnectError,
    AgentForbiddenError,
    AgentLostError,
    AgentSilentError,
    GuestAgentError,
    GuestRefusedError,
    MalformedAnswerError,
    MonitorConnectError,
    Outcome,
    QmpVcpuError,
    Unreachable,
    printable,
    shorten,
)
from qmpvcpu.model.guest import GuestCpu, GuestOs
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.qmp.address import (
    Address,
    connect,
    connected_socket,
    describe_process,
    find_clients,
    is_accepted,
    peer_name,
    peer_pid,
    why_silent,
)
from qmpvcpu.qmp.client import end, explain, random_token
from qmpvcpu.qmp.monitor import Target, is_address, wait_ended

_log = logging.getLogger("qmpvcpu.agent")
_CHANGES: Final = frozenset({"guest-set-vcpus"})
_LONGEST_FILE: Final = 4096  # bytes; what is read in /sys and /proc has a line
_LOGGED: Final = 1000
_ASKING_QEMU_S: Final = 1.0  # of the deadline, what is kept to ask QEMU why there is no answer; at most a tenth
_GIVE_PORT: Final = (
    "give QEMU -device virtio-serial -chardev socket,id=ga,path=PATH,server=on,wait=off"
    " -device virtserialport,chardev=ga,name=org.qemu.guest_agent.0"
)
_IS_ANOTHER: Final = f"name the agent's own socket; if it has none, {_GIVE_PORT}"
_HELD: Final = (
    "an agent's socket serves one client at a time, and qmpvcpu watch --agent and libvirt keep it: ask there, or end"
    " that client"
)
_START: Final = "in the guest: install qemu-guest-agent and start it"
_RESTART: Final = "in the guest: restart qemu-guest-agent"

_T = TypeVar("_T")


class QemuSays(NamedTuple):
    """What QEMU says of a silent guest.

    Attributes:
        port: The state of the agent's port; None: unknown.
        rests: The VM's run state if it does not run, such as ``paused``; else "".
    """

    port: answers.Port | None = None
    rests: str = ""


class GuestAgent:
    """The agent of one guest. It connects when it is first asked, and again after a loss.

    A connection proves nothing, as QEMU accepts it without an agent. So each exchange that follows a connect, a
    silence or a cancellation begins with a synchronisation.

    Each method takes ``timeout``, in seconds for all of it, the connecting included; None: that of the agent. What
    every method raises: ``GuestAgentError``.

    Args:
        target: As ``attach`` takes it: an address, a connected socket, or a QMPClient, which was connected with
            ``await_greeting`` and ``negotiate`` off.
        timeout: For each question, in seconds.
        ask_qemu: Asked after a silence, with the socket's ``peer_name``: what QEMU says of it. It may raise
            QmpVcpuError.
        qmp: Where the VM's QMP is: it is refused as *target* before anybody is connected to.

    Attributes:
        address: The target, as text for messages.
    """

    def __init__(
        self,
        target: Target,
        *,
        timeout: float = 5.0,
        ask_qemu: Callable[[str], Awaitable[QemuSays]] | None = None,
        qmp: Target | None = None,
    ) -> None:
        self._target = target
        self._timeout = timeout
        self._ask_qemu = ask_qemu
        self._lock = asyncio.Lock()
        self._client: QMPClient | None = None
        self._sock: socket.socket | None = None
        self._pid: int | None = None
        self._place: str | None = None  # as QEMU names it
        self._spent = False  # a socket that was given, and has ended
        self._synchronised = False
        self._closed = False
        self.address = self._read_target(target)
        if _is_same(target, qmp):
            raise AgentConnectError(self.address, "it is the VM's QMP socket, not an agent's", hint=_IS_ANOTHER)

    def _read_target(self, target: Target) -> str:
        if isinstance(target, QMPClient):
            return f"the given QMPClient {target.name!r}" if target.name else "the given QMPClient"
        try:
            if isinstance(target, socket.socket):
                return connected_socket(target)[0]
            return str(Address.parse(target))
        except MonitorConnectError as error:
            raise _of_agent(error) from None

    # Questions.

    async def cpus(self, *, timeout: float | None = None) -> tuple[GuestCpu, ...]:
        """Return the guest's CPUs by number, as its system lists them now; pseries also lists absent ones."""
        return await self._ask("guest-get-vcpus", None, timeout, answers.parse_vcpus)

    async def set_cpus(self, wanted: Mapping[int, bool], *, timeout: float | None = None) -> int:
        """Have CPUs of the guest go online (True) or offline, by the guest's numbers.

        The agent does them in order, up to the first that the guest refuses.

        Returns:
            How many were done. Fewer than all: the one after them was refused, and asking for it alone tells why.

        Raises:
            GuestRefusedError: The guest refused the first of them.
            GuestAgentError: As all; ``outcome`` UNKNOWN if it may have been carried out.
        """
        entries = [{"logical-id": number, "online": online} for number, online in wanted.items()]
        return await self._ask(
            "guest-set-vcpus", {"vcpus": entries}, timeout, lambda answer: answers.parse_count(answer, len(entries))
        )

    async def os(self, *, timeout: float | None = None) -> GuestOs:
        """Return what system runs in the guest."""
        return await self._ask("guest-get-osinfo", None, timeout, answers.parse_osinfo)

    async def commands(self, *, timeout: float | None = None) -> frozenset[str]:
        """Return the commands that the agent carries out."""
        return await self._ask("guest-info", None, timeout, answers.parse_commands)

    async def read_file(self, path: str, *, limit: int = _LONGEST_FILE, timeout: float | None = None) -> bytes:
        """Return the first *limit* bytes of a file of the guest.

        Raises:
            GuestRefusedError: It cannot be opened; ``errno`` says why, such as ``ENOENT``.
            AgentForbiddenError: The agent may not read files, which some distributions have as their default.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (self._timeout if timeout is None else timeout)

        def rest() -> float:
            return max(0.0, deadline - loop.time())

        arguments = {"path": path, "mode": "r"}
        handle = await self._ask("guest-file-open", arguments, rest(), answers.parse_handle)
        try:
            data = b""
            ended = False
            while not ended and len(data) < limit:
                left = limit - len(data)

                def parse(answer: object, left: int = left) -> tuple[bytes, bool]:
                    return answers.parse_read(answer, left)

                wanted = {"handle": handle, "count": left}
                piece, ended = await self._ask("guest-file-read", wanted, rest(), parse)
                data += piece
                ended = ended or not piece
            return data
        finally:
            with contextlib.suppress(GuestAgentError):
                await self._ask("guest-file-close", {"handle": handle}, rest(), lambda answer: answer)

    async def _ask(
        self,
        command: str,
        arguments: Mapping[str, Any] | None,
        timeout: float | None,
        parse: Callable[[object], _T],
    ) -> _T:
        answer = await self.execute(command, arguments, timeout=timeout)
        try:
            return parse(answer)
        except answers.NonsenseError as error:
            outcome = Outcome.UNKNOWN if command in _CHANGES else Outcome.UNCHANGED
            raise MalformedAnswerError(self.address, command, str(error), answer, outcome=outcome) from None

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> Any:
        """Ask any question, and return what the agent returned. Questions of several tasks wait for each other.

        Raises:
            GuestRefusedError: The agent answered with an error.
            GuestAgentError: As all.
        """
        limit = self._timeout if timeout is None else timeout
        deadline = asyncio.get_running_loop().time() + limit - min(_ASKING_QEMU_S, limit / 10)
        try:
            async with asyncio.timeout_at(deadline):
                await self._lock.acquire()
        except TimeoutError:
            raise AgentSilentError(self.address, "it is still busy with earlier questions", timeout=limit) from None
        try:
            return await self._exchange(command, arguments, deadline, limit)
        finally:
            self._lock.release()

    async def _exchange(
        self, command: str, arguments: Mapping[str, Any] | None, deadline: float, limit: float
    ) -> Any:
        client = await self._connected(deadline)
        sent = ""
        try:
            async with asyncio.timeout_at(deadline):
                if isinstance(client, AgentClient):
                    client.begin()
                if not self._synchronised:
                    await self._synchronise(client, deadline)
                self._synchronised = False  # until the answer is there
                sent = command
                self._log("sent", {"execute": command, **({"arguments": arguments} if arguments else {})})
                answer = await self._answer(client, command, arguments, deadline)
        except TimeoutError:
            error = await self._silence(sent, limit)
            await self._drop()
            raise error from None
        except ExecuteError as error:
            self._synchronised = bool(sent)
            self._log("received", error.received)
            raise self._refusal(sent or SYNC, error) from None
        except BadReplyError as error:
            await self._drop()
            raise MalformedAnswerError(self.address, command, error.error_message, dict(error.msg)) from None
        except (ExecInterruptedError, StateError):
            raise await self._ended(sent) from None
        self._synchronised = True
        self._log("received", {"return": answer})
        return answer

    async def _answer(
        self, client: QMPClient, command: str, arguments: Mapping[str, Any] | None, deadline: float
    ) -> object:
        """Ask, and after half of the time ask whether anybody is there.

        An agent answers in order. So if it answers the second question and not the first, it never got the first: it
        was started again meanwhile.
        """
        is_first, answer = await _first_of(
            lambda: client.execute(command, arguments), lambda: self._have_returned(client), deadline
        )
        if is_first:
            return answer
        if isinstance(client, AgentClient) and client.without_id is not None:
            why, outcome = "it does not carry the question's id", self._outcome(command)
            await self._drop()
            raise MalformedAnswerError(self.address, command, why, client.without_id, outcome=outcome)
        self._synchronised = True
        why = f"it restarted before it answered {command}"
        raise AgentLostError(self.address, why, outcome=self._outcome(command))

    async def _synchronise(self, client: QMPClient, deadline: float) -> None:
        """Have the agent return a number, so that what it says next is about our next question.

        It is asked twice, in case it is started again meanwhile.
        """
        await _first_of(lambda: self._have_returned(client), lambda: self._have_returned(client), deadline)
        if isinstance(client, AgentClient):
            client.synchronised = True
        self._synchronised = True

    async def _have_returned(self, client: QMPClient) -> None:
        token = random_token()
        ours = isinstance(client, AgentClient)
        if isinstance(client, AgentClient):
            client.token = token
        question = SYNC if ours else "guest-sync"
        self._log("sent", {"execute": question, "arguments": {"id": token}})
        returned = await client.execute(question, {"id": token})
        self._log("received", {"return": returned})
        if type(returned) is not int or returned != token:
            raise MalformedAnswerError(self.address, SYNC, "it is not the number that was sent", returned)

    # The connection.

    async def _connected(self, deadline: float) -> QMPClient:
        """Return a client that is connected."""
        if self._closed:
            raise AgentLostError(self.address, "it was closed on this side")
        if isinstance(self._target, QMPClient):
            return self._check_given(self._target)
        if self._client is not None:
            if self._client.runstate is Runstate.RUNNING:
                return self._client
            await self._drop()
        if self._spent:
            raise AgentLostError(self.address, "the given socket has ended, and cannot be opened again")
        client, sock = await self._open(deadline)
        self._client, self._sock = client, sock
        if self._closed:  # meanwhile
            raise await self._ended("")
        return client

    async def _open(self, deadline: float) -> tuple[AgentClient, socket.socket]:
        """Connect; after a failure or a cancellation nothing is left open."""
        client = AgentClient()
        try:
            if isinstance(self._target, socket.socket):
                sock = self._target
            else:
                sock = await connect(Address.parse(self._target), deadline=deadline)
        except MonitorConnectError as error:
            raise _of_agent(error) from None
        try:
            self._pid = peer_pid(sock)
            self._place = peer_name(sock)
            await client.connect(sock)
        except AssertionError:  # qemu.qmp's, where the end comes at once
            raise self._why_ended(await end(client, sock, grace_s=0), "") from None
        except BaseException as error:
            await end(client, sock, grace_s=0)
            if isinstance(error, ConnectError | OSError):
                cause = error.exc if isinstance(error, ConnectError) else error
                raise AgentConnectError(self.address, explain(cause)) from None
            raise
        return client, sock

    def _check_given(self, client: QMPClient) -> QMPClient:
        """Return the client of somebody else's if it can be asked."""
        if client.greeting is not None:
            raise AgentConnectError(self.address, "it is a QMP session, not an agent's")
        if client.runstate is not Runstate.RUNNING:
            why = f"it is not connected (runstate {client.runstate.name})"
            hint = "connect() it first, with await_greeting and negotiate off; it was not touched"
            raise AgentConnectError(self.address, why, hint=hint)
        return client

    async def _drop(self) -> BaseException | None:
        """End the connection, which takes back what QEMU has not passed on yet; return what ended it before."""
        client, sock = self._client, self._sock
        self._client = self._sock = None
        self._synchronised = False
        if client is None or sock is None:
            return None
        if not is_address(self._target):
            self._spent = True
        return await end(client, sock, grace_s=0)

    async def close(self) -> None:
        """Let go of the agent; never raises because of it, and may be called again. A given QMPClient stays open."""
        self._closed = True
        if isinstance(self._target, socket.socket) and self._client is None:
            self._target.close()
        await self._drop()

    # Why there is no answer.

    async def _ended(self, command: str) -> GuestAgentError:
        """Return the error for a session that ended with *command* in flight; "" while it was synchronised."""
        return self._why_ended(await self._drop(), command)

    def _why_ended(self, cause: BaseException | None, command: str) -> GuestAgentError:
        outcome = self._outcome(command)
        match cause:
            case GreetedError():
                why = "it is a QMP socket, not an agent's"
                return AgentConnectError(self.address, why, hint=_IS_ANOTHER)
            case NoIdsError():
                why = "the agent is too old: its answers carry no id"
                return AgentConnectError(self.address, why, hint="update qemu-guest-agent in the guest")
            case TooManyStraysError():
                return MalformedAnswerError(self.address, command or None, str(cause), outcome=outcome)
            case None | EOFError() | OSError():
                flight = f" with {command} in flight" if command else ""
                why = explain(cause) if cause is not None else "the session ended"
                return AgentLostError(self.address, f"the connection is lost{flight}: {why}", outcome=outcome)
            case _:
                why = explain(cause, LONGEST_LINE)
                return MalformedAnswerError(self.address, command or None, why, outcome=outcome)

    async def _silence(self, command: str, limit: float) -> GuestAgentError:
        """Return the error for a silence: what the kernel and QEMU know of it."""
        outcome = self._outcome(command)
        if self._sock is not None and (why := why_silent(self._pid)):
            return AgentSilentError(self.address, why, timeout=limit, outcome=outcome)
        is_served = None if self._sock is None else is_accepted(self._sock)
        waits = is_served is False
        port, rests = await self._qemu_says(min(_ASKING_QEMU_S, limit / 10))
        if waits and (port is None or port.has_client):
            return await self._held()
        is_open = None if port is None else port.is_open
        asked = f" to {command}" if command else ""
        if waits:
            why, hint = "QEMU has not accepted the connection yet", "try again"
        elif rests:
            why, hint = f"the VM is not running: QEMU says {rests}", "let it run"
        elif is_open is False:
            why = "no process in the guest has the agent's port open: no agent is installed, or it does not run yet"
            hint = _START
        elif is_open and is_served is None:  # as with TCP
            why = (
                f"the agent has its port open but does not answer{asked}: it is stopped, or busy with another client"
            )
            hint = f"{_RESTART}, or end the other client"
        elif is_open:
            why = f"the agent has its port open but does not answer{asked}: it is stopped, or hangs"
            hint = _RESTART
        else:
            why = "no agent runs in the guest, it is stopped, or another client holds the socket"
            hint = f"{_START}; {_HELD}"
        return AgentSilentError(self.address, why, timeout=limit, port_open=is_open, hint=hint, outcome=outcome)

    async def _held(self) -> AgentConnectError:
        """Return the error for a socket that serves another client, and name that one if the kernel does."""
        holders = [] if self._sock is None else await asyncio.to_thread(find_clients, self._sock)
        why = "another client holds this socket"
        if holders:
            why += f": {describe_process(holders[0])}"
        elif self._pid is not None:
            why += f", which is that of {describe_process(self._pid)}"
        return AgentConnectError(self.address, why, hint=_HELD)

    async def _qemu_says(self, limit: float) -> QemuSays:
        if self._ask_qemu is None or self._place is None:
            return QemuSays()
        with contextlib.suppress(QmpVcpuError, TimeoutError):  # this is only to say more
            async with asyncio.timeout(limit):
                return await self._ask_qemu(self._place)
        return QemuSays()

    def _refusal(self, command: str, error: ExecuteError) -> GuestAgentError:
        """Return what an error of the agent means."""
        desc = error.error.error.desc
        if answers.is_forbidden(error.error_class, desc):
            hint = "qemu-ga's options -b and -a, or block-rpcs and allow-rpcs in qemu-ga.conf, say what it may do"
            return AgentForbiddenError(self.address, command, "is forbidden by the agent's configuration", hint=hint)
        if answers.is_unsupported(error.error_class, desc):
            return AgentForbiddenError(self.address, command, "is not supported by this agent")
        said = answers.explain_error(command, desc)
        return GuestRefusedError(
            self.address, said.reason, errno=said.errno, number=said.number, ids=VcpuMap(), done=VcpuMap()
        )

    @staticmethod
    def _outcome(command: str) -> Outcome:
        return Outcome.UNKNOWN if command in _CHANGES else Outcome.UNCHANGED

    def _log(self, direction: str, message: Mapping[str, Any]) -> None:
        if _log.isEnabledFor(logging.DEBUG):
            address = printable(self.address)
            extra = {"vm": address, "direction": direction, "qmp": dict(message)}
            _log.debug("%s %s %s", address, direction, printable(shorten(dict(message), _LOGGED)), extra=extra)


async def _first_of(
    first: Callable[[], Coroutine[Any, Any, Any]], second: Callable[[], Coroutine[Any, Any, Any]], deadline: float
) -> tuple[bool, Any]:
    """Wait for *first*, and after half of the time until *deadline* for *second* too; the other is cancelled.

    Returns:
        Whether *first* ended first, and the result of the one that did.
    """
    half = (deadline - asyncio.get_running_loop().time()) / 2
    tasks = [asyncio.create_task(first())]
    try:
        if not await wait_ended(tasks[0], max(0.0, half)):
            tasks.append(asyncio.create_task(second()))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        ended = next(task for task in tasks if task.done())
        return ended is tasks[0], ended.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _is_same(one: Target, other: Target | None) -> bool:
    """Return True if both lead to one socket."""
    if one is other or not is_address(one) or other is None or not is_address(other):
        return one is other
    try:
        return Address.parse(one).leads_to(Address.parse(other))
    except (MonitorConnectError, TypeError):  # connecting to it says so
        return False


def _of_agent(error: MonitorConnectError) -> AgentConnectError:
    """Return the error for an address of an agent, from that for one of QMP."""
    match error.reason:
        case Unreachable.HELD:
            hint = f"SIGCONT lets a stopped QEMU go on; {_HELD}"
        case Unreachable.ABSENT | Unreachable.UNFIT:
            hint = _GIVE_PORT
        case _:
            hint = error.hint
    return AgentConnectError(error.address, error.why, hint=hint)
