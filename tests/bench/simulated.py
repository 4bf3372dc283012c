"""Many simulated QEMUs in one process: what a real one answered in this run, for a few microseconds a command.

`ScriptedPeer` is made for dialogues: it keeps all that is said, makes a directory and a task for each VM, and decodes
each piece again from its start. Here a process holds thousands of VMs, whose cost must not hide that of who attaches.

What depends on which vCPUs are plugged is rendered anew (slots, threads); every other query has the recorded answer.
A plug and an unplug are answered, and told of, as a QEMU with the micro-guest does: see ``fixtures/captures``.

The process takes lines on its standard input, answers each with one line, and ends with its input::

    python -m tests.bench.simulated RECORDING DIRECTORY VMS FIRST LAST   ->  (ready); DIRECTORY/hostN/vmM.qmp
    emit COUNT RATE   ->  how many stops and resumes were told: COUNT by each VM, RATE a second in all
    count             ->  how often there was a device_add so far, and a device_del
"""

import asyncio
import functools
import json
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qmpvcpu.testing import MicroGuest
from qmpvcpu.testing.vms import TRACE_ARGUMENTS, TRACE_FILE, read_transcript
from qmpvcpu.vm.attaching import attach
from tests.bench.helpers import allow_many_files, serve

__all__ = ["SLOTS", "host_name", "record", "socket_of"]

SLOTS = 8
_DECODER = json.JSONDecoder()


async def record(path: Path, qemu: Path, accel: str) -> None:
    """Have a real QEMU attached to, plugged and unplugged, and write what it answered to *path*."""
    async with MicroGuest(qemu, accel=accel, max_vcpus=SLOTS, extra_args=TRACE_ARGUMENTS) as guest:  # type: ignore[arg-type]  # a literal
        async with attach(guest.qmp) as vm:
            numbers = dict(zip(("major", "minor", "micro"), vm.layout.vm.qemu_version, strict=True))
            greeting = {
                "QMP": {"version": {"qemu": numbers, "package": vm.layout.vm.package}, "capabilities": ["oob"]}
            }
            await vm.plug(1)
            await vm.refresh()
        said = tuple(read_transcript((guest.process.directory / TRACE_FILE).read_text()))
    answers = {one.content["id"]: one.content for one in said if one.sender == "qemu" and "id" in one.content}
    replies: dict[str, Any] = {}
    for one in said:
        if one.sender == "client" and "execute" in one.content:
            answer = answers[one.content["id"]]
            known = {key: answer[key] for key in ("return", "error") if key in answer}
            replies.setdefault(_key(one.content["execute"], one.content.get("arguments")), known)
    path.write_text(json.dumps({"greeting": greeting, "replies": replies}))


def host_name(number: int) -> str:
    """Return the name of a simulated host."""
    return f"host{number:04}"


def socket_of(directory: Path, host: int, vm: int) -> Path:
    """Return the path of a simulated VM's socket."""
    return directory / host_name(host) / f"vm{vm:02}.qmp"


def _key(command: str, arguments: Mapping[str, Any] | None) -> str:
    return f"{command} {json.dumps(arguments or {}, sort_keys=True)}"


class _Machine:
    """What all VMs of this process have in common: the recording, and what is rendered of it.

    A plugged vCPU is (number of its slot, its id).
    """

    def __init__(self, recording: Mapping[str, Any], tids: Sequence[int]) -> None:
        replies = {key: json.dumps(answer)[1:-1].encode() for key, answer in recording["replies"].items()}
        self.greeting = json.dumps(recording["greeting"]).encode() + b"\r\n"
        self.replies = replies
        self._slots = recording["replies"]["query-hotpluggable-cpus {}"]["return"][::-1]
        self._boot = recording["replies"]["query-cpus-fast {}"]["return"][0]
        self._tids = tids
        self._by_props = {json.dumps(slot["props"], sort_keys=True): at for at, slot in enumerate(self._slots)}
        self.slots = functools.lru_cache(maxsize=None)(self._render_slots)
        self.threads = functools.lru_cache(maxsize=None)(self._render_threads)

    def slot(self, arguments: Mapping[str, Any]) -> int:
        """Return the number of the slot that a device_add is for."""
        props = {key: value for key, value in arguments.items() if key.endswith("-id")}
        return self._by_props[json.dumps(props, sort_keys=True)]

    def _render_slots(self, plugged: frozenset[tuple[int, str]]) -> bytes:
        paths = {0: self._boot["qom-path"], **{at: f"/machine/peripheral/{name}" for at, name in plugged}}
        slots = [{**slot, "qom-path": paths[at]} if at in paths else slot for at, slot in enumerate(self._slots)]
        return b'"return": ' + json.dumps(slots[::-1]).encode()

    def _render_threads(self, plugged: tuple[tuple[int, str], ...]) -> bytes:
        threads = [{**self._boot, "thread-id": self._tids[0]}]
        threads += [
            {
                **self._boot,
                "thread-id": self._tids[at],
                "props": self._slots[at]["props"],
                "qom-path": f"/machine/peripheral/{name}",
                "cpu-index": at,
            }
            for at, name in plugged
        ]
        return b'"return": ' + json.dumps(threads).encode()


class _Vm:
    """One VM; it serves one client at a time, which is all that it ever has here."""

    def __init__(self, machine: _Machine, name: str) -> None:
        self.plugged: dict[str, int] = {}  # by id, in the order of their plugs
        self.device_adds = 0
        self.device_dels = 0
        self._machine = machine
        self._running = True
        self._transport: asyncio.Transport | None = None
        self._own = {
            "query-name": b'"return": {"name": "%s"}' % name.encode(),
            "query-uuid": b'"return": {"UUID": "%s"}' % str(uuid.uuid5(uuid.NAMESPACE_OID, name)).encode(),
        }

    def serve(self) -> "_Session":
        """Return what serves the client that has come."""
        return _Session(self)

    def greeted(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        transport.write(self._machine.greeting)

    def left(self, transport: asyncio.Transport) -> None:
        if self._transport is transport:
            self._transport = None

    def answer(self, message: Mapping[str, Any]) -> bytes:
        """Return the reply to *message*, and the events that follow it."""
        told: Iterable[bytes] = ()
        match message["execute"]:
            case "qmp_capabilities":
                reply = b'"return": {}'
            case "query-hotpluggable-cpus":
                reply = self._machine.slots(frozenset((at, name) for name, at in self.plugged.items()))
            case "query-cpus-fast":
                reply = self._machine.threads(tuple((at, name) for name, at in self.plugged.items()))
            case "query-status":
                reply = _STATUS[self._running]
            case "device_add":
                reply, told = self._plug(message["arguments"])
            case "device_del":
                reply, told = self._unplug(message["arguments"]["id"])
            case "guest-sync":  # of who takes a silent VM for a guest agent: the machine is busy
                reply = b'"error": {"class": "CommandNotFound", "desc": "The command guest-sync has not been found"}'
            case command:
                found = self._own.get(command) or self._machine.replies.get(_key(command, message.get("arguments")))
                if found is None:
                    raise LookupError(f"the recorded QEMU was not asked {message}")
                reply = found
        return b"".join([b"{%s, %s}\r\n" % (reply, b'"id": %s' % json.dumps(message["id"]).encode()), *told])

    def _plug(self, arguments: Mapping[str, Any]) -> tuple[bytes, list[bytes]]:
        name, at = arguments["id"], self._machine.slot(arguments)
        assert name not in self.plugged, f"{name} is plugged twice"
        self.plugged[name] = at
        self.device_adds += 1
        return b'"return": {}', [_ost(at, 1, 0, name)]

    def _unplug(self, name: str) -> tuple[bytes, list[bytes]]:
        at = self.plugged.pop(name)
        self.device_dels += 1
        path = f"/machine/peripheral/{name}"
        events = (
            _ost(at, 3, 132, name),
            _event("DEVICE_DELETED", {"path": f"{path}/lapic"}),
            _event("DEVICE_DELETED", {"device": name, "path": path}),
            _ost(at, 3, 0),
        )
        return b'"return": {}', [*events]

    def toggle(self) -> bool:
        """Stop if it runs, else run again, and tell the client; return False if there is none."""
        self._running = not self._running
        if self._transport is None:
            return False
        self._transport.write(_event("RESUME" if self._running else "STOP"))
        return True


_STATUS = {
    True: b'"return": {"status": "running", "running": true}',
    False: b'"return": {"status": "paused", "running": false}',
}


def _event(name: str, data: Mapping[str, Any] | None = None) -> bytes:
    seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
    message: dict[str, Any] = {"timestamp": {"seconds": seconds, "microseconds": microseconds}, "event": name}
    return json.dumps(message if data is None else {**message, "data": data}).encode() + b"\r\n"


def _ost(at: int, source: int, status: int, name: str | None = None) -> bytes:
    info = {"source": source, "status": status, "slot": str(at), "slot-type": "CPU"}
    return _event("ACPI_DEVICE_OST", {"info": info if name is None else {"device": name, **info}})


class _Session(asyncio.Protocol):
    """One client."""

    def __init__(self, vm: _Vm) -> None:
        self._vm = vm
        self._rest = ""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._vm.greeted(transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self._transport is not None:
            self._vm.left(self._transport)

    def data_received(self, data: bytes) -> None:
        text, at = self._rest + data.decode(), 0
        replies = []
        while at < len(text):
            try:
                message, at = _DECODER.raw_decode(text, at)
            except json.JSONDecodeError:
                break
            replies.append(self._vm.answer(message))
        self._rest = text[at:]
        if self._transport is not None:
            self._transport.write(b"".join(replies))


async def _emit(vms: Sequence[_Vm], count: int, rate: float) -> int:
    """Have all *vms* tell of *count* stops and resumes each, *rate* a second in all; return how many were told."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    told = 0
    for number, vm in enumerate(vm for _ in range(count) for vm in vms):
        told += vm.toggle()
        if (ahead := number / rate - (loop.time() - start)) > 0:
            await asyncio.sleep(ahead)
        elif not number % 100:
            await asyncio.sleep(0)
    return told


async def _main(recording: Path, directory: Path, hosts: Sequence[int], vms_each: int) -> None:
    loop = asyncio.get_running_loop()
    machine = _Machine(json.loads(recording.read_text()), _threads())
    vms = []
    for host in hosts:
        socket_of(directory, host, 0).parent.mkdir()
        for number in range(vms_each):
            vm = _Vm(machine, f"vm{host:04}-{number:02}")
            await loop.create_unix_server(vm.serve, socket_of(directory, host, number))
            vms.append(vm)

    async def answer(words: list[str]) -> Iterable[float]:
        match words:
            case ["emit", count, rate]:
                return [await _emit(vms, int(count), float(rate))]
            case ["count"]:
                return [sum(vm.device_adds for vm in vms), sum(vm.device_dels for vm in vms)]
        raise ValueError(words)

    await serve(answer)


def _threads() -> list[int]:
    """Start the threads that the vCPUs of all VMs here are said to run on: who attaches looks for them in /proc."""
    threads = [threading.Thread(target=threading.Event().wait, daemon=True) for _ in range(SLOTS)]
    for thread in threads:
        thread.start()
    return [thread.native_id or 0 for thread in threads]


if __name__ == "__main__":
    allow_many_files()
    given, where, each, first, last = sys.argv[1:]
    asyncio.run(_main(Path(given), Path(where), range(int(first), int(last)), int(each)))
