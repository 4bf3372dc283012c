"""A whole map at once: all vCPUs in, and all but the first out, by raw QMP, by us, and by libvirt, taking turns."""

import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qemu.qmp import QMPClient

import qmpvcpu
from qmpvcpu import OnFailure
from qmpvcpu.testing import MicroGuest
from tests.bench.libvirtd import Peer, peer
from tests.bench.raw import Raw, timed
from tests.libvirt.daemon import Libvirt

__all__ = ["Row", "measure"]

# libvirt needs five seconds for 239 vCPUs in and out again.
LIBVIRT_ROUNDS = {64: 7, 240: 3}


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds."""

    work: str
    who: str
    times: tuple[float, ...]
    raw: float
    libvirt: float | None

    @property
    def median(self) -> float:
        """The median of all times."""
        return statistics.median(self.times)


async def measure(qemu: Path, vcpus: int, rounds: int, libvirt: Libvirt | None) -> list[Row]:
    """Plug vCPUs 1 to *vcpus* - 1 and unplug them again, *rounds* times each, everybody in turn (KVM)."""
    taken: dict[tuple[str, str], list[float]] = {}

    def note(who: str, plugged: float, unplugged: float) -> None:
        taken.setdefault((f"plug 1 -> {vcpus}", who), []).append(plugged)
        taken.setdefault((f"unplug {vcpus} -> 1", who), []).append(unplugged)

    everything = range(1, vcpus)
    async with (
        MicroGuest(qemu, accel="kvm", max_vcpus=vcpus) as one,
        MicroGuest(qemu, accel="kvm", max_vcpus=vcpus) as two,
        MicroGuest(qemu, accel="kvm", max_vcpus=vcpus) as three,
        qmpvcpu.attach(two.qmp) as plain,
    ):
        client = QMPClient("bench")
        await client.connect(str(one.qmp))
        with (
            tempfile.TemporaryDirectory() as folder,
            client.listener("DEVICE_DELETED") as listener,
            _maybe(libvirt, qemu, vcpus) as theirs,
        ):
            raw = Raw(client, plain.layout.slots[1:], listener, tcg=False)
            async with qmpvcpu.attach(three.qmp, record=Path(folder) / "vm.xml") as recorded:
                for number in range(rounds):
                    note("raw QMP", await timed(raw.plug_all(everything)), await timed(raw.unplug_all(everything)))
                    for who, vm in (("qmpvcpu", plain), ("qmpvcpu, recorded", recorded)):
                        wish = f"0-{vcpus - 1}"
                        note(who, await timed(vm.set_map(wish)), await timed(vm.set_map("0")))
                    plugged = await timed(plain.set_map(wish))
                    note("qmpvcpu, CONTINUE", plugged, await timed(plain.set_map("0", on_failure=OnFailure.CONTINUE)))
                    if theirs is not None and number < LIBVIRT_ROUNDS[vcpus]:
                        note("libvirt-python", theirs.set_vcpus(vcpus), theirs.set_vcpus(1))
        await client.disconnect()
    return list(_rows(taken))


def _maybe(libvirt: Libvirt | None, qemu: Path, vcpus: int) -> "contextlib.AbstractContextManager[Peer | None]":
    return contextlib.nullcontext() if libvirt is None else peer(libvirt, qemu, vcpus)


def _rows(taken: dict[tuple[str, str], list[float]]) -> Iterator[Row]:
    for (work, who), times in sorted(taken.items(), key=lambda item: item[0][0]):
        theirs = taken.get((work, "libvirt-python"))
        raw = statistics.median(taken[work, "raw QMP"])
        yield Row(work, who, tuple(times), raw, None if theirs is None else statistics.median(theirs))
