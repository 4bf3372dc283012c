"""A peer at a QMP socket that says whatever would do harm where it is printed, logged, or evaluated by a shell."""

from collections.abc import Mapping
from typing import Any

from qmpvcpu.testing.peer import GREETING, Failure, ScriptedPeer

HOSTILE = "\x1b]0;owned\x07\x1b[31;5m[bold]\r\nFORGED ok\x9b1;1H\u202ecod\u2066\u2028FORGED too\x85\x7f\ud800"
"""Sets a terminal's title and colours, moves its cursor, turns the direction of text, and begins lines of its own."""

_BOOT = "/machine/unattached/device[0]"


def small_vm(greeting: Mapping[str, Any] = GREETING, **answers: Any) -> ScriptedPeer:
    """A peer that plays a VM with vCPU 0 of 3, but for what *answers* says, by command with ``_`` for ``-``."""
    said = {
        "query-hotpluggable-cpus": slots({}),
        "query-cpus-fast": threads(),
        "query-status": {"status": "running", "running": True},
    }
    said |= {name if name.startswith("device_") else name.replace("_", "-"): each for name, each in answers.items()}
    return ScriptedPeer(answers=said, greeting=greeting, reject_others=True)


def named_vm(name: str) -> ScriptedPeer:
    """The same with this name, which is all that is foreign about it."""
    return small_vm(query_name={"name": name}, query_memory_size_summary={"base-memory": 2**30}, qom_get="pc-machine")


def hostile_vm() -> ScriptedPeer:
    """The same with a hostile word wherever a QEMU could say one and still be listed."""
    version = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": HOSTILE}
    names = {("/machine", "type"): f"{HOSTILE}-machine", ("/machine", "smp"): {"maxcpus": 3, HOSTILE: HOSTILE}}
    return small_vm(
        greeting={"QMP": {"version": version, "capabilities": [HOSTILE]}},
        query_hotpluggable_cpus=slots({f"{HOSTILE}-id": HOSTILE, "node-id": HOSTILE}, kind=HOSTILE, path=HOSTILE),
        query_cpus_fast=threads(path=HOSTILE, arch=HOSTILE),
        query_name={"name": HOSTILE},
        query_uuid={"UUID": HOSTILE},
        qom_get=lambda command: names.get(tuple(command.arguments.values()), Failure(HOSTILE, HOSTILE)),
        device_add=Failure(HOSTILE, HOSTILE),
        device_del=Failure(HOSTILE, HOSTILE),
    )


def slots(props: Mapping[str, Any], *, kind: str = "qemu64-x86_64-cpu", path: str = "") -> list[dict[str, Any]]:
    """What query-hotpluggable-cpus says of such a VM whose slots have *props*, with vCPU 1 at *path*."""
    paths = {0: _BOOT} | ({1: f"/machine/peripheral/{path}"} if path else {})
    return [
        {
            "type": kind,
            "vcpus-count": 1,
            "props": {"core-id": core, **props},
            **({"qom-path": paths[core]} if core in paths else {}),
        }
        for core in range(3)
    ]


def threads(*, path: str = "", arch: str = "x86_64") -> list[dict[str, Any]]:
    """What query-cpus-fast says of such a VM."""
    paths = [_BOOT] + ([f"/machine/peripheral/{path}"] if path else [])
    return [
        {"qom-path": each, "thread-id": 1 + index, "cpu-index": index, "target": arch, "props": {}}
        for index, each in enumerate(paths)
    ]
