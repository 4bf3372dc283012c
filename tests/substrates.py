"""What a VM can run on in these tests: every QEMU of the machine, under every accelerator."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.testing import find_qemus


@dataclasses.dataclass(frozen=True)
class Substrate:
    """What a VM runs on; the version is that of QEMU's series, such as "10.0"."""

    version: str
    qemu: Path
    accel: Any
    machine: str

    @property
    def survives_plug_after_unplug(self) -> bool:
        """QEMU 7.2 under TCG crashes on it."""
        return self.accel == "kvm" or int(self.version.split(".")[0]) >= 10

    @property
    def has_legacy_mode(self) -> bool:
        """Before QEMU 11 the register block starts in a mode without removals, and without memory of inserts."""
        return int(self.version.split(".")[0]) < 11


def qemus() -> dict[str, Path]:
    """The machine's QEMUs by series, such as "10.0": what machine types are named after."""
    found: dict[str, Path] = {}
    for version, path in find_qemus().items():
        found.setdefault(".".join(version.split(".")[:2]), path)
    return found


def substrates(
    machines: Collection[str] = ("q35", "pc"), *, that_survive: bool = False, accels: Collection[str] = ("kvm", "tcg")
) -> list[Any]:
    """A parameter for each combination; those under KVM are marked so.

    *that_survive* leaves out the one that dies at a plug after an unplug.
    """
    found = qemus()
    assert found, "no QEMU to test with: run fixtures/install.sh"
    every = [
        Substrate(version, qemu, accel, machine)
        for version, qemu in found.items()
        for accel in accels
        for machine in machines
    ]
    return [
        pytest.param(
            on,
            id=f"{on.version}-{on.accel}-{on.machine}",
            marks=[pytest.mark.kvm] if on.accel == "kvm" else [],
        )
        for on in every
        if on.survives_plug_after_unplug or not that_survive
    ]
