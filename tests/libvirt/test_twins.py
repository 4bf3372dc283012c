"""libvirt and we change twin VMs alike: the same commands to QEMU, the same refusals, the same ``<vcpus>``."""

from collections.abc import Callable

import pytest

from qmpvcpu.testing import Behaviour, best_qemu
from tests.figures import OPERATIONS
from tests.libvirt.daemon import Libvirt
from tests.libvirt.microguests import Shape
from tests.libvirt.tolerated import MAP, QUERIES, TOLERATED, VCPUS_UNNEEDED, VCPUS_UNSAID
from tests.libvirt.twins import Operation, Twins, running_twins, story
from tests.substrates import Substrate, substrates

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu]

LENGTH = 20
SHAPES = {
    "flat": Shape(),
    "half of them there from the start": Shape(boot=4),
    "sockets, cores and threads": Shape(boot=2, topology="sockets='2' cores='2' threads='2'"),
    "dies": Shape(boot=3, topology="sockets='2' dies='2' cores='2' threads='1'", plugged=(6, 4)),
    "NUMA cells": Shape(boot=2, topology="sockets='2' cores='4' threads='1'", cells=("0-3", "4-7"), plugged=(7, 2)),
    "a slow guest": Shape(vcpus=12, boot=1, plugged=(3, 5, 4), behaviour=(Behaviour.slow(40).for_slot(5),)),
}
Record = Callable[[str, object], None]


def report(twins: Twins, record_property: Record) -> None:
    record_property(OPERATIONS, (twins.compared, len(twins.unexplained)))
    assert not twins.unexplained, "\n\n".join(twins.unexplained)


@pytest.mark.parametrize("on", substrates(["q35"], accels=["kvm"]))
@pytest.mark.parametrize("shape", SHAPES)
async def test_whatever_is_asked_for_libvirt_and_we_do_the_same(
    libvirt: Libvirt, shape: str, on: Substrate, record_property: Record
) -> None:
    async with running_twins(libvirt, on.qemu, SHAPES[shape]) as twins:
        for operation, expected in story(f"{shape} {on.version}", SHAPES[shape], LENGTH):
            await twins.compare(operation)
            assert set(twins.ours.layout.enabled) == expected, str(operation)
    report(twins, record_property)


@pytest.mark.parametrize("on", substrates(["q35"], accels=["tcg"]))
async def test_without_kvm_they_plug_alike(libvirt: Libvirt, on: Substrate, record_property: Record) -> None:
    # libvirt cannot see a vCPU leave under TCG, and QEMU 7.2 dies of the plug after it: nothing leaves here.
    shape = SHAPES["sockets, cores and threads"]
    async with running_twins(libvirt, on.qemu, shape, accel="tcg") as twins:
        for operation, expected in story(on.version, shape, LENGTH // 2, unplugs=False):
            await twins.compare(operation)
            assert set(twins.ours.layout.enabled) == expected, str(operation)
    report(twins, record_property)


@pytest.mark.parametrize("on", substrates(["q35"], accels=["kvm"]))
async def test_every_tolerated_difference_is_met(libvirt: Libvirt, on: Substrate, record_property: Record) -> None:
    async with running_twins(libvirt, on.qemu, Shape(boot=2)) as twins:
        for operation, difference in (
            (Operation("unplug", 0), VCPUS_UNSAID),
            (Operation("plug", 3), QUERIES),
            (Operation("unplug", 3), VCPUS_UNNEEDED),
            (Operation("map", (0, 1, 4, 5)), MAP),
        ):
            assert difference not in twins.tolerated
            await twins.compare(operation)
            assert difference in twins.tolerated
    report(twins, record_property)
    assert twins.tolerated == set(TOLERATED)


@pytest.mark.kvm
async def test_what_is_not_on_the_list_is_told(libvirt: Libvirt) -> None:
    async with running_twins(libvirt, best_qemu(), Shape(boot=2, plugged=(3,))) as twins:
        await twins.ours.plug(4)
        await twins.compare(Operation("plug", 4))
        assert [told.split("\n")[0] for told in twins.unexplained] == [
            "refusal after plug 4 (no. 1)",
            "commands after plug 4 (no. 1)",
        ]
        await twins.ours.plug(6)
        await twins.compare(Operation("plug", 5))
        assert [told.split("\n")[0] for told in twins.unexplained[2:]] == [
            "<vcpus> after plug 5 (no. 2)",
            "<vcpus> written anew after plug 5 (no. 2)",
            "QEMU after plug 5 (no. 2)",
        ]
