"""`ScriptedAgent`: a guest agent that does what a test tells it to, faults included.

It plays qemu-ga and the guest's Linux behind it, as recorded from real ones::

    async with ScriptedAgent(vcpus=(0, 1)) as agent, attach(qemu.qmp, agent=agent.path) as vm:
        agent.plugged(5)  # as an offline CPU, which is what Linux does
        await vm.guest.set_online(5)

It may follow a VM by itself (``look``), and does not care in which process its client is.
"""

import asyncio
import base64
import codecs
import contextlib
import enum
import inspect
import json
import socket
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from qmpvcpu.testing.directory import vm_directory
from qmpvcpu.testing.peer import first_message

_COMMANDS: Final = (
    "guest-sync-delimited",
    "guest-sync",
    "guest-ping",
    "guest-info",
    "guest-get-vcpus",
    "guest-set-vcpus",
    "guest-get-osinfo",
    "guest-file-open",
    "guest-file-read",
    "guest-file-close",
)
_SYNCS: Final = frozenset({"guest-sync-delimited", "guest-sync"})
_BUSY: Final = "Device or resource busy"
_CPU_FILES: Final = "/sys/devices/system/cpu/cpu"
_CHUNK: Final = 65536


class Mood(enum.Enum):
    """What a scripted agent does with what it is asked.

    NORMAL: answers. SILENT: takes it and never answers. LATE: answers when the mood changes. RESTARTING: loses the
    next command that is no synchronisation, as one that is killed and started again, and is NORMAL then. REFUSING:
    the guest refuses every change. FORBIDDING: carries out nothing of ``forbidden``. LYING: the list of CPUs is
    ``lie``.
    """

    NORMAL = "normal"
    SILENT = "silent"
    LATE = "late"
    RESTARTING = "restarting"
    REFUSING = "refusing"
    FORBIDDING = "forbidding"
    LYING = "lying"


@dataclass(slots=True)
class ScriptedCpu:
    """A CPU of the scripted guest.

    Attributes:
        vcpu: The vCPU that it is.
        online: True if the guest uses it.
        can_offline: True if the guest can stop using it.
    """

    vcpu: int
    online: bool
    can_offline: bool = True


class _AgentError(Exception):
    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.error_class = error_class


class ScriptedAgent:
    """A guest agent on a UNIX socket; an async context manager, which raises at its end what an answer raised.

    Like QEMU it accepts one client at a time.

    Args:
        vcpus: The vCPUs that the guest boots with.
        rule: How its kernel numbers CPUs: ``"arrival"``, as Linux 6.1 does, or ``"fixed"``, as Linux 6.12.
        maximum: How many vCPUs the VM can have.
        path: Of the socket; None: one in a temporary directory.
        look: Returns the vCPUs that are plugged, itself or awaited. It is asked before each command, and the guest
            has them then.
        onlines: Whether the guest uses a CPU that comes by itself.

    Attributes:
        mood: What it does with what it is asked; set it with `turn`.
        look: As the argument; may be changed at any time.
        cpus: The guest's CPUs, by the guest's numbers; may be changed at any time.
        received: The name of each command that it was sent, but for synchronisations.
        changes: Each CPU that it was told to change, by the guest's number, and to what.
        answers: What to answer by itself, by command: JSON, raw bytes, or an exception to raise.
        forbidden: The commands that it does not carry out when FORBIDDING.
        lie: What it answers to ``guest-get-vcpus`` when LYING: JSON, or raw bytes.
        refusal: What the guest's kernel says when REFUSING.
        refuses: The numbers that it refuses then; None: all.
        kernel: The guest's release.
        boot_id: Which boot of the guest it is.
    """

    def __init__(
        self,
        vcpus: Iterable[int] = (0,),
        *,
        rule: Literal["arrival", "fixed"] = "fixed",
        maximum: int = 8,
        path: str | Path | None = None,
        look: Callable[[], Iterable[int] | Awaitable[Iterable[int]]] | None = None,
        onlines: bool = False,
    ) -> None:
        self.mood = Mood.NORMAL
        self.cpus: dict[int, ScriptedCpu] = {}
        self.received: list[str] = []
        self.changes: list[tuple[int, bool]] = []
        self.answers: dict[str, Any] = {}
        self.forbidden = frozenset({"guest-file-open", "guest-file-read", "guest-file-close"})
        self.lie: Any = []
        self.refusal = _BUSY
        self.refuses: frozenset[int] | None = None
        self.kernel = "6.1.0-40-amd64" if rule == "arrival" else "6.12.48+deb13-amd64"
        self.boot_id = ""
        self._rule = rule
        self._maximum = maximum
        self.look = look
        self._onlines = onlines
        self._numbers: dict[int, int] = {}
        self._files: dict[int, bytes] = {}
        self._handle = 999
        self._late: list[bytes] = []
        self._connection: socket.socket | None = None
        self._server: asyncio.Task[None] | None = None
        self._resources = contextlib.ExitStack()
        self.path = "" if path is None else str(path)
        self.reboot(vcpus)

    async def __aenter__(self) -> Self:
        if not self.path:
            self.path = f"{self._resources.enter_context(vm_directory())}/ga"
        listener = self._resources.enter_context(socket.socket(socket.AF_UNIX))
        listener.setblocking(False)  # noqa: FBT003 - it is how a socket takes it
        listener.bind(self.path)
        listener.listen()
        self._server = asyncio.create_task(self._serve(listener))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()
        if self._server is not None:
            self._server.cancel()
            (fault,) = await asyncio.gather(self._server, return_exceptions=True)
            if error is None and isinstance(fault, Exception):  # and not its cancellation
                raise fault

    # The guest.

    def reboot(self, vcpus: Iterable[int]) -> None:
        """Have the guest boot anew, with these vCPUs plugged."""
        booted = sorted(vcpus)
        rest = [] if self._rule == "arrival" else [each for each in range(self._maximum) if each not in booted]
        self._numbers = {vcpu: number for number, vcpu in enumerate(booted + rest)}
        self.cpus = {
            self._numbers[vcpu]: ScriptedCpu(vcpu, online=True, can_offline=self._numbers[vcpu] != 0)
            for vcpu in booted
        }
        self.boot_id = str(uuid.uuid4())

    def plugged(self, vcpu: int, *, online: bool | None = None) -> int:
        """Have the guest find a CPU; return its number there.

        Args:
            vcpu: The vCPU that it is.
            online: Whether the guest uses it at once; None: as ``onlines`` says.
        """
        number = self._numbers.setdefault(vcpu, len(self._numbers))
        self.cpus[number] = ScriptedCpu(vcpu, self._onlines if online is None else online)
        return number

    def unplugged(self, vcpu: int) -> None:
        """Have the guest lose a CPU."""
        self.cpus = {number: cpu for number, cpu in self.cpus.items() if cpu.vcpu != vcpu}

    def number_of(self, vcpu: int) -> int:
        """Return the guest's number of a vCPU that it has."""
        return next(number for number, cpu in self.cpus.items() if cpu.vcpu == vcpu)

    def is_online(self, vcpu: int) -> bool:
        """Tell whether the guest uses a vCPU."""
        return any(cpu.online for cpu in self.cpus.values() if cpu.vcpu == vcpu)

    # The agent.

    async def turn(self, mood: Mood) -> None:
        """Change the mood; one that was LATE answers now, to the client of now."""
        self.mood = mood
        late, self._late = self._late, []
        for data in late:
            await self.send(data)

    async def send(self, data: bytes) -> None:
        """Send raw bytes to the client of now; they are lost if there is none."""
        if self._connection is not None:
            await asyncio.get_running_loop().sock_sendall(self._connection, data)

    def hang_up(self) -> None:
        """Close the connection, as a QEMU that ends does."""
        if self._connection is not None:
            self._connection.shutdown(socket.SHUT_RDWR)

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            with connection, contextlib.suppress(OSError):
                self._connection = connection
                try:
                    await self._listen(connection)
                finally:
                    self._connection = None

    async def _listen(self, connection: socket.socket) -> None:
        text = ""
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        while data := await asyncio.get_running_loop().sock_recv(connection, _CHUNK):
            before, flush, after = data.rpartition(b"\xff")
            if flush:  # what came before is dropped, and the agent's parser complains of the byte
                text = ""
                utf8.reset()
                data = after
                await self._take_all(before.replace(b"\xff", b"").decode(errors="replace"))
                error = {"class": "GenericError", "desc": "JSON parse error, stray '\\xff'"}
                if self.mood not in (Mood.SILENT, Mood.LATE):
                    await self.send(json.dumps({"error": error}).encode() + b"\n")
            text = await self._take_all(text + utf8.decode(data))

    async def _take_all(self, text: str) -> str:
        """Take the messages that *text* begins with, and return the rest."""
        while (found := first_message(text := text.lstrip())) is not None:
            message, used = found
            text = text[used:]
            await self._take(message)
        return text

    async def _take(self, message: Mapping[str, Any]) -> None:
        name = str(message.get("execute"))
        if name not in _SYNCS:
            self.received.append(name)
            if self.mood is Mood.RESTARTING:
                self.mood = Mood.NORMAL
                return
        if self.mood is Mood.SILENT:
            return
        reply = await self._reply(name, message.get("arguments") or {}, message)
        if self.mood is Mood.LATE:
            self._late.append(reply)
        else:
            await self.send(reply)

    async def _reply(self, name: str, arguments: Mapping[str, Any], message: Mapping[str, Any]) -> bytes:
        own_id = {"id": message["id"]} if "id" in message else {}
        try:
            value = await self._value(name, arguments)
        except _AgentError as error:
            content: dict[str, Any] = {"error": {"class": error.error_class, "desc": str(error)}}
        else:
            if isinstance(value, bytes):
                return value
            content = {"return": value}
        data = json.dumps({**content, **own_id}).encode() + b"\n"
        return b"\xff" + data if name == "guest-sync-delimited" else data

    async def _value(self, name: str, arguments: Mapping[str, Any]) -> Any:
        if self.look is not None:
            await self._follow(self.look())
        if name in self.answers:
            answer = self.answers[name]
            if isinstance(answer, Exception):
                raise _AgentError(str(answer))
            return answer
        if self.mood is Mood.FORBIDDING and name in self.forbidden:
            desc = f"Command {name} has been disabled: the command is not allowed"
            raise _AgentError(desc, "CommandNotFound")
        if name not in _COMMANDS:
            raise _AgentError(f"The command {name} has not been found", "CommandNotFound")
        return getattr(self, "_" + name.replace("-", "_"))(**arguments)

    async def _follow(self, plugged: Iterable[int] | Awaitable[Iterable[int]]) -> None:
        there = set(await plugged if inspect.isawaitable(plugged) else plugged)
        known = {cpu.vcpu for cpu in self.cpus.values()}
        for vcpu in sorted(known - there):
            self.unplugged(vcpu)
        for vcpu in sorted(there - known):
            self.plugged(vcpu)

    # Its commands, as QEMU's qga/qapi-schema.json has them.

    def _guest_sync(self, id: int) -> int:  # noqa: A002 - the argument's name
        return id

    _guest_sync_delimited = _guest_sync

    def _guest_ping(self) -> dict[str, Any]:
        return {}

    def _guest_info(self) -> dict[str, Any]:
        forbidden = self.forbidden if self.mood is Mood.FORBIDDING else frozenset()
        commands = [{"name": each, "enabled": each not in forbidden, "success-response": True} for each in _COMMANDS]
        return {"version": "10.0.2", "supported_commands": commands}

    def _guest_get_osinfo(self) -> dict[str, Any]:
        return {"id": "debian", "name": "Debian GNU/Linux", "kernel-release": self.kernel, "machine": "x86_64"}

    def _guest_get_vcpus(self) -> Any:
        if self.mood is Mood.LYING:
            return self.lie
        return [
            {"logical-id": number, "online": cpu.online, "can-offline": cpu.can_offline}
            for number, cpu in reversed(self.cpus.items())
        ]

    def _guest_set_vcpus(self, vcpus: list[dict[str, Any]]) -> int:
        for done, wanted in enumerate(vcpus):
            try:
                self._set(wanted["logical-id"], online=wanted["online"])
            except _AgentError:
                if done:
                    return done
                raise
        return len(vcpus)

    def _set(self, number: int, *, online: bool) -> None:
        cpu = self.cpus.get(number)
        if cpu is None:
            raise _AgentError(f'open("{_CPU_FILES}{number}/"): No such file or directory')
        if not online and not cpu.can_offline:
            raise _AgentError(f"logical processor #{number} can't be offlined")
        if self.mood is Mood.REFUSING and (self.refuses is None or number in self.refuses):
            raise _AgentError(f'pwrite("{_CPU_FILES}{number}//online"): {self.refusal}')
        self.changes.append((number, online))
        cpu.online = online

    def _guest_file_open(self, path: str, mode: str = "r") -> int:
        content = self._file(path)
        if content is None:
            raise _AgentError(f"failed to open file '{path}' (mode: '{mode}'): No such file or directory")
        self._handle += 1
        self._files[self._handle] = content
        return self._handle

    def _file(self, path: str) -> bytes | None:
        if path == "/proc/sys/kernel/random/boot_id":
            return f"{self.boot_id}\n".encode()
        for number, cpu in self.cpus.items():
            if path == f"{_CPU_FILES}{number}/firmware_node/path":
                return f"\\_SB_.CPUS.C{cpu.vcpu:03X}\n".encode()
        return None

    def _guest_file_read(self, handle: int, count: int = 4096) -> dict[str, Any]:
        content = self._files[handle]
        piece, self._files[handle] = content[:count], content[count:]
        return {"count": len(piece), "buf-b64": base64.b64encode(piece).decode(), "eof": len(piece) < count}

    def _guest_file_close(self, handle: int) -> dict[str, Any]:
        del self._files[handle]
        return {}
