"""A peer whose words would do harm if they were printed, logged or evaluated by a shell as they are."""

from collections.abc import Mapping
from typing import Any

from qmpvcpu.testing.peer import GREETING, Failure, ScriptedPeer

HOSTILE = "\x1b]0;owned\x07\x1b[31;5m[bold]\r\nFORGED ok\x9b1;1H\u202ecod\u2066\u2028FORGED too\x85\x7f"
"""Sets a terminal's title and colours, moves its cursor, turns the direction of text, and begins lines of its own."""

_BOOT = "/machine/unattached/device[0]"
_PLUGGED = "/machine/peripheral/vcpu1"


def small_vm(greeting: Mapping[str, Any] = GREETING, **answers: Any) -> ScriptedPeer:
    """A peer that plays a VM with vCPUs 0-1 of 4, but for what *answers* says, by command with ``_`` for ``-``."""
    said: dict[str, Any] = {
        "query-hotpluggable-cpus": slots({}),
        "query-cpus-fast": [
            {"qom-path": path, "thread-id": 1 + index, "cpu-index": index, "target": "x86_64", "props": {}}
            for index, path in enumerate((_BOOT, _PLUGGED))
        ],
        "query-status": {"status": "running", "running": True},
        "query-memory-size-summary": {"base-memory": 2**30},
        "qom-get": "pc-machine",
    }
    said |= {name if name.startswith("device_") else name.replace("_", "-"): each for name, each in answers.items()}
    return ScriptedPeer(answers=said, greeting=greeting, reject_others=True)


def hostile_vm(**answers: Any) -> ScriptedPeer:
    """The same with a hostile word wherever a QEMU has text of its own: its name, package and errors."""
    version = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": HOSTILE}
    failure = Failure(HOSTILE, HOSTILE)
    return small_vm(
        greeting={"QMP": {"version": version, "capabilities": [HOSTILE]}},
        **{"query_name": {"name": HOSTILE}, "device_add": failure, "device_del": failure, **answers},
    )


def impossible_vms() -> list[ScriptedPeer]:
    """Peers whose replies no QEMU could give, for a hostile word in them."""
    return [
        hostile_vm(query_hotpluggable_cpus=slots({HOSTILE: HOSTILE, "node-id": HOSTILE})),
        hostile_vm(query_hotpluggable_cpus=slots({}, kind=HOSTILE)),
        hostile_vm(query_hotpluggable_cpus=HOSTILE),
        hostile_vm(query_cpus_fast=[{HOSTILE: HOSTILE, "qom-path": HOSTILE, "thread-id": 1, "cpu-index": 0}]),
        hostile_vm(qom_get=f"{HOSTILE}-machine", query_uuid={"UUID": HOSTILE}, query_migrate={"status": HOSTILE}),
        hostile_vm(query_status=Failure(HOSTILE, HOSTILE)),
    ]


def slots(props: Mapping[str, Any], *, kind: str = "qemu64-x86_64-cpu") -> list[dict[str, Any]]:
    """What query-hotpluggable-cpus says of such a VM whose slots have *props* too."""
    paths = {0: _BOOT, 1: _PLUGGED}
    return [
        {
            "type": kind,
            "vcpus-count": 1,
            "props": {"core-id": core, **props},
            **({"qom-path": paths[core]} if core in paths else {}),
        }
        for core in range(4)
    ]
