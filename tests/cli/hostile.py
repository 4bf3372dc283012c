"""A peer at a QMP socket that says whatever would do harm where it is printed, logged, or evaluated by a shell."""

from collections.abc import Mapping
from typing import Any

from qmpvcpu.testing import ScriptedPeer

_BOOT = "/machine/unattached/device[0]"


def small_vm(**answers: Any) -> ScriptedPeer:
    """A peer that plays a VM with vCPU 0 of 3, but for what *answers* says, by command with ``_`` for ``-``."""
    said = {
        "query-hotpluggable-cpus": slots({}),
        "query-cpus-fast": [{"qom-path": _BOOT, "thread-id": 1, "cpu-index": 0, "target": "x86_64", "props": {}}],
        "query-status": {"status": "running", "running": True},
    }
    return ScriptedPeer(
        answers={**said, **{name.replace("_", "-"): each for name, each in answers.items()}}, reject_others=True
    )


def slots(props: Mapping[str, Any], *, kind: str = "qemu64-x86_64-cpu") -> list[dict[str, Any]]:
    """What query-hotpluggable-cpus says of such a VM whose slots have *props* too."""
    return [
        {
            "type": kind,
            "vcpus-count": 1,
            "props": {"core-id": core, **props},
            **({"qom-path": _BOOT} if core == 0 else {}),
        }
        for core in range(3)
    ]
