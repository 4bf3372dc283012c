"""Public test kit: real QEMUs with guests that answer as a test wants.

Floor 6: may use the whole package except ``cli``, and never ``qemu.qmp``: what it starts is for any client.
Names are imported when they are asked for: every pytest of a machine loads ``qmpvcpu.testing.pytest_plugin``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from qmpvcpu.testing.rom import UNTIL_TOLD, Personality, Removal, rom_image
    from qmpvcpu.testing.transcript import QmpMessage
    from qmpvcpu.testing.vms import LinuxVm, LinuxVmFactory, QemuVm, QemuVmFactory

__all__ = [
    "UNTIL_TOLD",
    "LinuxGuest",
    "LinuxVm",
    "LinuxVmFactory",
    "MicroGuest",
    "Personality",
    "QemuNotFoundError",
    "QemuProcess",
    "QemuProcessError",
    "QemuStartError",
    "QemuVm",
    "QemuVmFactory",
    "QmpMessage",
    "Removal",
    "ScriptedPeer",
    "best_qemu",
    "find_qemus",
    "probe_accelerator",
    "rom_image",
]

_HOMES = {
    "linuxguest": ("LinuxGuest",),
    "microguest": ("MicroGuest",),
    "peer": ("ScriptedPeer",),
    "qemu": (
        "QemuNotFoundError",
        "QemuProcess",
        "QemuProcessError",
        "QemuStartError",
        "best_qemu",
        "find_qemus",
        "probe_accelerator",
    ),
    "rom": ("UNTIL_TOLD", "Personality", "Removal", "rom_image"),
    "transcript": ("QmpMessage",),
    "vms": ("LinuxVm", "LinuxVmFactory", "QemuVm", "QemuVmFactory"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name's module when the name is first used."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
