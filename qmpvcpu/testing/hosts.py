"""Hosts with real VMs and real agents for tests, and the changes that their QEMUs were really asked for."""

import asyncio
import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Literal, Self

from qmpvcpu.given import checked
from qmpvcpu.testing.microguest import MicroGuest
from qmpvcpu.testing.netns import Host, HostProcess, Network
from qmpvcpu.testing.qemu import best_qemu, probe_accelerator
from qmpvcpu.testing.vms import TRACE_ARGUMENTS, TRACE_FILE, QmpMessage, read_transcript

__all__ = ["Change", "HostVm", "Hosts", "VmHost", "read_changes"]

_AT_ONCE: Final = 8  # QEMUs that start
_REMOVALS: Final = (3, 0x103)  # the sources in ACPI_DEVICE_OST that are about removals
_GOES_ON: Final = (0, 0x84, 0x85)  # done, in progress, will be done


@dataclass(frozen=True, slots=True)
class Change:
    """A plug or an unplug that QEMU was asked for.

    Attributes:
        command: ``device_add`` or ``device_del``.
        device: The device's id, or its QOM path if it has none.
        at: When QEMU read it, in seconds since the epoch.
        accepted: Whether QEMU accepted it; None: it has not answered.
        is_repeated: True if it was asked for twice: the plugged device is there already, or the unplugged one is on
            its way out. Not another unplug after a refusal. Nor a plug that QEMU accepts, even if an earlier client
            asked for it and hung up: since a slot cannot be taken twice, the earlier one was dropped.
    """

    command: Literal["device_add", "device_del"]
    device: str
    at: float
    accepted: bool | None = None
    is_repeated: bool = False


def read_changes(transcript: Iterable[QmpMessage]) -> tuple[Change, ...]:
    """Return every ``device_add`` and ``device_del`` in a transcript, in order, from any client.

    What was plugged before the transcript began counts as absent.
    """
    reading = _Reading()
    for message in transcript:
        reading.take(message)
    return tuple(reading.changes)


class _Reading:
    def __init__(self) -> None:
        self.changes: list[Change] = []
        self._asked: dict[tuple[int, str], int] = {}  # index of the change, by monitor and id
        self._slots: dict[str, frozenset[tuple[str, Any]]] = {}  # where each device is
        self._leaving: set[str] = set()

    def take(self, message: QmpMessage) -> None:
        content = message.content
        if message.sender == "client":
            if content.get("execute") in {"device_add", "device_del"}:
                self._take_request(message)
        elif "event" in content:
            self._take_event(content["event"], content.get("data", {}))
        elif (index := self._asked.pop((message.monitor, str(content.get("id"))), None)) is not None:
            self._take_answer(index, accepted="return" in content)

    def _take_request(self, message: QmpMessage) -> None:
        content = message.content
        arguments = content.get("arguments", {})
        device = _name(str(arguments.get("id", "")))
        self._asked[message.monitor, str(content.get("id"))] = len(self.changes)
        if content["execute"] == "device_del":
            self.changes.append(Change("device_del", device, message.at, is_repeated=device in self._leaving))
            return
        slot = frozenset((name, value) for name, value in arguments.items() if name.endswith("-id"))
        is_there = device in self._slots or (bool(slot) and slot in self._slots.values())
        self.changes.append(Change("device_add", device, message.at, is_repeated=is_there))
        self._slots.setdefault(device, slot)

    def _take_answer(self, index: int, *, accepted: bool) -> None:
        change = self.changes[index] = replace(self.changes[index], accepted=accepted)
        if change.command == "device_del" and accepted:
            self._leaving.add(change.device)
        elif change.command == "device_add" and accepted:
            self.changes[index] = replace(change, is_repeated=False)
        elif change.command == "device_add" and not accepted and not change.is_repeated:
            self._slots.pop(change.device, None)

    def _take_event(self, event: str, data: Mapping[str, Any]) -> None:
        if event == "ACPI_DEVICE_OST":
            info = data.get("info", {})
            if info.get("source") in _REMOVALS and info.get("status") not in _GOES_ON:
                self._leaving.discard(str(info.get("device", "")))
        elif event in {"DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"}:
            device = str(data.get("device") or _name(str(data.get("path", ""))))
            self._leaving.discard(device)
            if event == "DEVICE_DELETED":
                self._slots.pop(device, None)


def _name(device: str) -> str:
    return device.removeprefix("/machine/peripheral/")


class HostVm:
    """A VM on a host.

    Attributes:
        name: Its name, which is also QEMU's ``-name``.
        guest: The QEMU with the micro-guest. The test may use its second QMP socket.
        socket: Its QMP socket for the host's agent, in the host's directory.
    """

    def __init__(self, name: str, guest: MicroGuest, socket: Path) -> None:
        self.name = name
        self.guest = guest
        self.socket = socket
        self._kept: tuple[QmpMessage, ...] | None = None

    @property
    def transcript(self) -> tuple[QmpMessage, ...]:
        """Everything said on its QMP sockets so far, by any client; kept after the VM has ended."""
        if self._kept is not None:
            return self._kept
        try:
            trace = (self.guest.process.directory / TRACE_FILE).read_text(errors="replace")
        except FileNotFoundError:
            return ()
        return tuple(read_transcript(trace))

    @property
    def changes(self) -> tuple[Change, ...]:
        """Every plug and unplug that its QEMU was asked for so far: see :func:`read_changes`."""
        return read_changes(self.transcript)

    async def end(self) -> None:
        """Kill its QEMU, as a crash would. Its transcript is kept."""
        self.guest.process.kill()
        await self.guest.process.wait()
        self._kept = self.transcript
        await self.guest.process.aclose()


class VmHost:
    """A host with VMs, on which agents can be started.

    Attributes:
        name: Its name.
        host: The host itself: its address, its cable and its processes.
        sockets: The directory of its VMs' QMP sockets, ``NAME.qmp`` each.
        records: The directory of its VMs' records.
    """

    def __init__(self, host: Host, options: Mapping[str, Any], starting: asyncio.Semaphore) -> None:
        self.name = host.name
        self.host = host
        self.sockets = host.directory / "vms"
        self.records = host.directory / "records"
        self.sockets.mkdir()
        self.records.mkdir()
        self._options = options
        self._starting = starting
        self._vms: dict[str, HostVm] = {}
        self._resources = contextlib.AsyncExitStack()

    @property
    def vms(self) -> Mapping[str, HostVm]:
        """Its VMs by name."""
        return MappingProxyType(self._vms)

    async def add_vm(self, name: str, **options: Any) -> HostVm:
        """Start a VM; if there is one with this name, replace it.

        Args:
            name: What it is called.
            options: Options of :class:`~qmpvcpu.testing.MicroGuest` that differ from the other VMs'.

        Raises:
            QemuStartError: It does not come up.
        """
        chosen = {**self._options, **options}
        extra = ("-name", name, *TRACE_ARGUMENTS, *chosen.pop("extra_args", ()))
        if name in self._vms:
            await self.end_vm(name)
        guest = MicroGuest(extra_args=extra, **chosen)
        async with self._starting:
            await self._resources.enter_async_context(guest)
        vm = self._vms[name] = HostVm(name, guest, self.sockets / f"{name}.qmp")
        vm.socket.symlink_to(guest.qmp)
        return vm

    async def end_vm(self, name: str) -> None:
        """Kill a VM's QEMU, as a crash would, and remove its socket. Its record stays."""
        vm = self._vms.pop(name)
        vm.socket.unlink()
        await vm.end()

    async def start_agent(
        self, nats: str, *options: str | Path, env: Mapping[str, str] | None = None, clock_offset: float = 0.0
    ) -> HostProcess:
        """Start the host's agent, ``qmpvcpu agent``; returns at once, before it is connected.

        Args:
            nats: The server's address.
            options: More options of the command.
            env: As of :meth:`~qmpvcpu.testing.netns.Host.run`.
            clock_offset: As of :meth:`~qmpvcpu.testing.netns.Host.run`.

        Raises:
            ClockError: Its clock cannot be shifted here.
        """
        return await self.host.run(
            *(sys.executable, "-m", "qmpvcpu", "agent", "--nats", nats, "--host", self.name),
            *("--dir", self.sockets, "--record", self.records, *options),
            env=env,
            clock_offset=clock_offset,
        )

    async def crash(self) -> None:
        """Kill everything on the host, VMs included, as a power failure does. Its records stay."""
        for vm in self._vms.values():
            vm.guest.process.kill()
        await self.host.crash()
        for name in list(self._vms):
            await self.end_vm(name)

    async def aclose(self) -> None:
        """End its VMs."""
        await self._resources.aclose()


class Hosts:
    """Hosts with VMs: an async context manager that kills everything on them when it ends.

    Args:
        hosts: Their names; a number: ``host0`` and so on.
        vms: The names of each host's VMs; a number: ``vm0`` and so on.
        separate: Whether each is a network namespace: see :class:`~qmpvcpu.testing.netns.Network`.
        options: Options of :class:`~qmpvcpu.testing.MicroGuest`, for all VMs.

    Attributes:
        network: The network that joins them; a server for them should listen on its ``address``.

    Raises:
        NetworkError: They cannot be joined.
        QemuStartError: A VM does not come up.

    Example:
        >>> async def all_agents_come():
        ...     async with Hosts(3, vms=2) as hosts, NatsServer(host=hosts.network.address) as server:
        ...         for host in hosts:
        ...             await host.start_agent(server.url)
    """

    @checked
    def __init__(
        self,
        hosts: int | Iterable[str] = 2,
        vms: int | Iterable[str] = 2,
        *,
        separate: bool | None = None,
        **options: Any,
    ) -> None:
        self.network = Network(separate=separate)
        self._names = _names(hosts, "host")
        self._vm_names = _names(vms, "vm")
        self._options = options
        self._hosts: dict[str, VmHost] = {}
        self._starting = asyncio.Semaphore(_AT_ONCE)
        self._resources = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with self._resources:
            await self._resources.enter_async_context(self.network)
            qemu = self._options.get("qemu") or best_qemu()
            if self._options.get("accel") is None:
                self._options |= {"accel": await probe_accelerator(qemu)}  # once for all
            self._options["qemu"] = qemu
            async with asyncio.TaskGroup() as starting:
                for name in self._names:
                    host = await self.add_host(name)
                    for vm in self._vm_names:
                        starting.create_task(host.add_vm(vm))
            self._resources = self._resources.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._resources.aclose()

    def __iter__(self) -> Iterator[VmHost]:
        return iter(self._hosts.values())

    def __getitem__(self, name: str) -> VmHost:
        return self._hosts[name]

    @property
    def vms(self) -> Mapping[str, HostVm]:
        """All VMs, by ``HOST/NAME``."""
        return MappingProxyType({f"{host.name}/{vm.name}": vm for host in self for vm in host.vms.values()})

    async def add_host(self, name: str) -> VmHost:
        """Add a host without VMs.

        Raises:
            NetworkError: It cannot be joined to the others.
            ValueError: The name cannot be a directory's, or is taken.
        """
        if name in self._hosts:
            raise ValueError(f"there is a host {name} already")
        host = VmHost(await self.network.host(name), self._options, self._starting)
        self._hosts[name] = host
        self._resources.push_async_callback(host.aclose)
        return host


def _names(given: int | Iterable[str], word: str) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(given)) if isinstance(given, int) else tuple(given)
