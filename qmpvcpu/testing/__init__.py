"""Public test kit: real QEMUs with guests that answer as a test wants.

It may use the whole package except ``cli``, and never imports ``qemu.qmp``: what it starts is for any client.
Names are imported when they are asked for: every pytest of a machine loads ``qmpvcpu.testing.pytest_plugin``.
"""

from typing import TYPE_CHECKING

from qmpvcpu.lazy import lazily

if TYPE_CHECKING:
    from qmpvcpu.testing.agent import Mood, ScriptedAgent
    from qmpvcpu.testing.linuxguest import LinuxGuest
    from qmpvcpu.testing.microguest import MicroGuest
    from qmpvcpu.testing.peer import ScriptedPeer
    from qmpvcpu.testing.qemu import (
        QemuNotFoundError,
        QemuProcess,
        QemuProcessError,
        QemuStartError,
        best_qemu,
        find_qemus,
        probe_accelerator,
    )
    from qmpvcpu.testing.rom import UNTIL_TOLD, Behaviour, RemovalAction, rom_image
    from qmpvcpu.testing.vms import LinuxVm, LinuxVmFactory, QemuVm, QemuVmFactory, QmpMessage, SharedVms

__all__ = [
    "UNTIL_TOLD",
    "Behaviour",
    "LinuxGuest",
    "LinuxVm",
    "LinuxVmFactory",
    "MicroGuest",
    "Mood",
    "QemuNotFoundError",
    "QemuProcess",
    "QemuProcessError",
    "QemuStartError",
    "QemuVm",
    "QemuVmFactory",
    "QmpMessage",
    "RemovalAction",
    "ScriptedAgent",
    "ScriptedPeer",
    "SharedVms",
    "best_qemu",
    "find_qemus",
    "probe_accelerator",
    "rom_image",
]

_HOMES = {
    "qmpvcpu.testing.agent": "Mood ScriptedAgent",
    "qmpvcpu.testing.linuxguest": "LinuxGuest",
    "qmpvcpu.testing.microguest": "MicroGuest",
    "qmpvcpu.testing.peer": "ScriptedPeer",
    "qmpvcpu.testing.qemu": (
        "QemuNotFoundError QemuProcess QemuProcessError QemuStartError best_qemu find_qemus probe_accelerator"
    ),
    "qmpvcpu.testing.rom": "Behaviour RemovalAction UNTIL_TOLD rom_image",
    "qmpvcpu.testing.vms": "LinuxVm LinuxVmFactory QemuVm QemuVmFactory QmpMessage SharedVms",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazily(__name__, _HOMES)
