"""Real QEMUs, started with the arguments under test."""

import contextlib
from collections.abc import AsyncIterator

import qmpvcpu
from qmpvcpu import VcpuController
from qmpvcpu.domainxml import DomainVcpus
from qmpvcpu.launch import LaunchArguments
from qmpvcpu.model.layout import Layout
from qmpvcpu.testing import QemuProcess, rom_image
from tests.substrates import Substrate


def qemu_of(on: Substrate, built: LaunchArguments, *argv: str) -> QemuProcess:
    """A QEMU on *on* with *argv*, whose cells have the memory that they need; its guest is the micro-guest."""
    memory = str(built.memory_mib or 16)
    machine = ["-machine", on.machine, "-accel", on.accel, "-m", memory, "-bios", "microguest.rom"]
    return QemuProcess(on.qemu, [*machine, *argv], files={"microguest.rom": rom_image()})


@contextlib.asynccontextmanager
async def started(on: Substrate, built: LaunchArguments, *argv: str) -> AsyncIterator[VcpuController]:
    """Start a QEMU with *argv*, and attach to it."""
    async with qemu_of(on, built, *argv) as process:
        await process.wait_ready()
        async with qmpvcpu.attach(process.qmp) as vm:
            yield vm


def assert_is(layout: Layout, domain: DomainVcpus) -> None:
    """Assert that *layout* is what *domain* says: slot for slot, and in its order of creation."""
    assert layout.max == domain.max
    assert layout.enabled == domain.enabled
    assert layout.order == (*domain.started_with, *domain.order)
    assert [first for first in layout.order if layout.slot_of(first).is_boot] == list(domain.started_with)
    assert {first: layout[first].device_id for first in domain.order} == {
        each: f"vcpu{each}" for each in domain.order
    }
    cells = {each: cell.id for cell in domain.numa for each in cell.cpus}
    assert {slot.first: slot.props.number("node-id") for slot in layout.slots} == {
        each: cells.get(each) for each in range(domain.max)
    }
    if domain.topology is not None:
        assert layout.vm.topology == domain.topology
