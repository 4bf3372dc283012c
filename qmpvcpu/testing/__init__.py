"""Public test kit: real QEMUs with guests that answer as a test wants.

Floor 6: may use the whole package except ``cli``, and never ``qemu.qmp``: what it starts is for any client.
"""

from qmpvcpu.testing.microguest import MicroGuest
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

__all__ = [
    "UNTIL_TOLD",
    "MicroGuest",
    "Personality",
    "QemuNotFoundError",
    "QemuProcess",
    "QemuProcessError",
    "QemuStartError",
    "Removal",
    "best_qemu",
    "find_qemus",
    "probe_accelerator",
    "rom_image",
]
