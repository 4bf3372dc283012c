"""A QMP peer that keeps a VM's truth, and tells it, garbles it, withholds it, lies, or talks nonsense.

Two things it never does, so that there is something to check: of vCPU `KEPT` it never shows that it left, and of vCPU
`NEVER` never that it came.
"""

import asyncio
import contextlib
import copy
import json
import random
from typing import Any, Final, Self

SLOTS: Final = 8
BOOT: Final = (0, 1)
KEPT: Final = 1  # as vCPU 0, which can never leave
NEVER: Final = 7
UUID: Final = "4a1b2f7e-0000-4000-8000-000000000001"

_JUNK: Final[list[Any]] = [
    None,
    True,
    -1,
    0.5,
    10**30,
    10**18,
    float("inf"),
    float("nan"),
    "",
    "x" * 5000,
    "\ud800",
    "\x1b]0;x\x07\n",
    [],
    {},
    [[[[]]]],
    {"a": {"b": {}}},
]
_NONSENSE: Final = [
    b"\n",
    b"}{\r\n",
    b'"text"\r\n',
    b"[]\r\n",
    b"\xff\xfe\r\n",
    b'{"return": ' + b"[" * 20_000 + b"]" * 20_000 + b"}\r\n",
    b'{"return": 1' + b"0" * 5000 + b"}\r\n",
    b'{"return": {}, "id": []}\r\n',
    b'{"error": {"class": "GenericError", "desc": "no id"}}\r\n',
    b'{"event": "RESET", "timest',
]
_DULL: Final = ("BLOCK_JOB_COMPLETED", "RTC_CHANGE", "SHUTDOWN", "", "ACPI_DEVICE_OST", "DEVICE_DELETED", "MIGRATION")


class HostilePeer:
    """A server on a UNIX socket; an async context manager.

    Attributes:
        hostility: How likely an answer is garbled, from 0, which is an honest QEMU, to 1.
        sent: How many messages it has sent.
        shown_gone: How often it has shown, truly or not, that a vCPU left.
        plugged: The truth: the CPU's path in each occupied slot, in the order of their creation.
    """

    def __init__(self, path: str, seed: int) -> None:
        self.path = path
        self.hostility = 0.0
        self.sent = 0
        self.shown_gone = dict.fromkeys(range(SLOTS), 0)
        self.plugged = {each: f"/machine/unattached/device[{each}]" for each in BOOT}
        self._random = random.Random(seed)  # noqa: S311 - a seeded game
        self._answers: dict[int, dict[str, Any]] = {}
        self._unanswered: set[int] = set()  # slots whose device_add had no reply: nobody else plugs there
        self._late: list[dict[str, Any]] = []
        self._writer: asyncio.StreamWriter | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in tuple(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._late.clear()
        try:
            self._greet()
            text, decoder = "", json.JSONDecoder()
            while data := await reader.read(65536):
                text += data.decode()
                while text := text.lstrip():
                    try:
                        message, used = decoder.raw_decode(text)
                    except ValueError:
                        break
                    text = text[used:]
                    self._receive(message)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    @property
    def clients(self) -> int:
        """How many connections are open."""
        return len(self._serving)

    # What it says.

    def _chance(self, share: float = 1.0) -> bool:
        return self._random.random() < self.hostility * share

    def _write(self, data: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self.sent += 1
            self._writer.write(data)

    def _say(self, message: dict[str, Any]) -> None:
        self._write(json.dumps(message).encode() + b"\r\n")

    def _greet(self) -> None:
        greeting: Any = {
            "QMP": {
                "version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""},
                "capabilities": ["oob"],
            }
        }
        if self._chance(0.3):
            self._write(self._random.choice(_NONSENSE[:-1]) if self._chance(0.3) else b'{"timestamp": {}}\r\n')
        self._say(self._garbled(greeting) if self._chance(0.3) else greeting)

    def _receive(self, message: dict[str, Any]) -> None:
        name, arguments = message["execute"], message.get("arguments") or {}
        reply = {**self._reply_to(name, arguments), "id": message.get("id")}
        for _ in range(self._random.choice((0, 0, 1, 3)) if self._chance() else 0):
            self.chatter()
        if self._chance(0.05) and self._late:
            self._say(self._late.pop(self._random.randrange(len(self._late))))
        if name == "qmp_capabilities" or not self._chance(0.5):
            self._say(reply)
        else:
            self._misanswer(name, reply)

    def _misanswer(self, name: str, reply: dict[str, Any]) -> None:
        changes = name.startswith("device_")
        match self._random.randrange(8):
            case 0:
                self._say({"error": {"class": "GenericError", "desc": self._text()}, "id": reply["id"]})
            case 1 if not changes and name != "query-machines":
                self._say({"return": self._garbled(reply.get("return")), "id": reply["id"]})
            case 2:
                self._late.append(reply)
                del self._late[:-20]
            case 3:
                self._say(reply)
                self._say(reply)
            case 4:
                self._say({**reply, "id": self._random.choice(("x0", 7, None))})
                self._say(reply)
            case 5:
                self._say({"error": self._random.choice(_JUNK), "id": reply["id"]})
            case 6 if self._chance(0.2):
                self._write(self._random.choice(_NONSENSE))
            case 7 if self._chance(0.2) and self._writer is not None:
                self._write(json.dumps(reply).encode()[:-5])
                self._writer.close()
            case _:
                self._say(reply)

    def _text(self) -> str:
        return self._random.choice(("not now", "\ud800", "x" * 10_000, "\x1b[2J\nforged line", ""))

    def _garbled(self, value: Any) -> Any:
        """Return *value* with junk in the place of one thing in it."""
        if not isinstance(value, (dict, list)) or not value:
            return self._random.choice(_JUNK)
        value = copy.copy(value)
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = self._random.choice(list(keys))
        value[key] = self._garbled(value[key]) if self._random.random() < 0.8 else self._random.choice(_JUNK)
        return value

    def chatter(self) -> None:
        """Send one event that nobody asked for: nonsense, or about a slot, true or not."""
        vcpu = self._random.randrange(SLOTS)
        kind = self._random.randrange(8)
        if kind == 0:
            self._event(self._random.choice(_DULL), self._random.choice(_JUNK))
        elif kind == 1:
            self._event("DEVICE_DELETED", {"path": f"/machine/peripheral/x{self._random.randrange(10**9)}"})
        elif kind == 2 and 2 <= vcpu < NEVER:
            self._delete(vcpu)
        elif kind == 3:
            self._event(self._random.choice(("RESET", "RESUME", "DEVICE_UNPLUG_GUEST_ERROR")), {})
        elif kind == 4:
            self._event("MIGRATION", {"status": self._random.choice(("setup", "completed", "none"))})
        else:
            source, status = (
                self._random.choice((1, 3, 0x103, 0x200, 77)),
                self._random.choice((0, 1, 0x80, 0x82, 0x84)),
            )
            self._ost(self._random.choice((vcpu, vcpu, 16_000, 10**6)), source, status)

    def come_and_go(self) -> None:
        """Let somebody else plug or unplug, mostly without a word."""
        vcpu = self._random.randrange(2, NEVER)
        if vcpu in self._unanswered:
            return
        if vcpu in self.plugged:
            path = self.plugged.pop(vcpu)
            if self._random.random() < 0.5:
                self._delete(vcpu, path)
        else:
            self.plugged[vcpu] = f"/machine/peripheral/other{self._random.randrange(1000)}-{vcpu}"

    def hang_up(self) -> None:
        """Close the connection."""
        if self._writer is not None:
            self._writer.close()

    def _event(self, name: str, data: Any) -> None:
        self._say({"timestamp": {"seconds": 1, "microseconds": 0}, "event": name, "data": data})

    def _ost(self, vcpu: int, source: int, status: int) -> None:
        info: dict[str, Any] = {"slot": str(vcpu), "slot-type": "CPU", "source": source, "status": status}
        path = self.plugged.get(vcpu, "")
        if path.startswith("/machine/peripheral/"):
            info["device"] = path.rpartition("/")[2]
        if vcpu in range(SLOTS):
            self._answers[vcpu] = {key: info[key] for key in ("slot", "slot-type", "source", "status")}
        self._event("ACPI_DEVICE_OST", {"info": info})

    def _delete(self, vcpu: int, path: str | None = None) -> None:
        self.shown_gone[vcpu] += 1
        self._event("DEVICE_DELETED", {"path": path or self.plugged.get(vcpu, f"/machine/peripheral/vcpu{vcpu}")})

    # What it knows.

    def _reply_to(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if name == "device_add":
            return self._plug(arguments)
        if name == "device_del":
            return self._unplug(str(arguments.get("id")))
        none = {"slot-type": "CPU", "source": 0, "status": 0}
        machine: dict[str, Any] = {
            "smp": {"maxcpus": SLOTS, "cpus": 2, "sockets": SLOTS, "cores": 1, "threads": 1},
            "type": "pc-q35-10.0-machine",
        }
        facts: dict[str, Any] = {
            "query-hotpluggable-cpus": self._slots,
            "query-cpus-fast": lambda: [self._thread(each) for each in self.plugged],
            "query-acpi-ospm-status": lambda: [
                self._answers.get(each, {"slot": str(each), **none}) for each in range(SLOTS)
            ],
            "qom-get": lambda: machine.get(arguments["property"], False),
            "query-status": lambda: {"status": "running", "running": True},
            "query-machines": lambda: [{"name": "pc-q35-10.0", "hotpluggable-cpus": True}],
            "query-kvm": lambda: {"enabled": True, "present": True},
            "query-stats": list,
            "query-uuid": lambda: {"UUID": UUID},
            "query-name": lambda: {"name": "hostile"},
            "query-memory-size-summary": lambda: {"base-memory": 1 << 27},
            "qom-list": list,
        }
        return {"return": facts.get(name, dict)()}

    @staticmethod
    def _props(vcpu: int) -> dict[str, int]:
        return {"socket-id": vcpu, "core-id": 0, "thread-id": 0}

    def _slots(self) -> list[dict[str, Any]]:
        """Return the slots; of those that may be lied about, one may be shown empty or occupied by somebody."""
        liar = self._random.randrange(2, NEVER) if self._chance(0.3) else None
        slots = []
        for each in reversed(range(SLOTS)):
            path = self.plugged.get(each)
            if each == liar:
                path = None if path else f"/machine/peripheral/lie{each}"
            slot = {"type": "qemu64-x86_64-cpu", "vcpus-count": 1, "props": self._props(each)}
            slots.append({**slot, "qom-path": path} if path else slot)
            self.shown_gone[each] += path is None
        return slots

    def _thread(self, vcpu: int) -> dict[str, Any]:
        known = {"cpu-index": vcpu, "thread-id": 5000 + vcpu, "target": "x86_64", "props": self._props(vcpu)}
        return {**known, "qom-path": self.plugged[vcpu]}

    def _plug(self, arguments: dict[str, Any]) -> dict[str, Any]:
        vcpu = arguments["socket-id"]
        if vcpu == NEVER or vcpu in self.plugged:
            return {"error": {"class": "GenericError", "desc": "cannot be plugged"}}
        self.plugged[vcpu] = f"/machine/peripheral/{arguments['id']}"
        self._unanswered.add(vcpu)
        if self._random.random() < 0.7:
            self._ost(vcpu, 1, self._random.choice((0, 0, 0x81)))
        return {"return": {}}

    def _unplug(self, name: str) -> dict[str, Any]:
        path = name if name.startswith("/") else f"/machine/peripheral/{name}"
        vcpu = next((each for each, held in self.plugged.items() if held == path), None)
        if vcpu is None or vcpu == 0:
            return {"error": {"class": "DeviceNotFound", "desc": "no such device"}}
        guest = self._random.randrange(5)
        if guest < 4:
            self._ost(vcpu, 3, 0x84)
        if guest == 0:
            self._ost(vcpu, 3, 0x82)
        elif guest == 1:
            self._ost(vcpu, 3, 0)  # it lies
        elif guest >= 3 and vcpu != KEPT:
            if guest == 3:
                self._delete(vcpu, self.plugged.pop(vcpu))
                self._ost(vcpu, 3, 0)
            else:
                del self.plugged[vcpu]  # without a word
        return {"return": {}}
