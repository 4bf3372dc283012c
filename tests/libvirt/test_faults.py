"""Where libvirt's record of a VM goes wrong, and ours does not: both look at one and the same QEMU."""

import asyncio
import contextlib
import re
import time

import pytest
from qemu.qmp import ExecInterruptedError, QMPClient

import qmpvcpu
from qmpvcpu import StepDeniedError, UnplugRefusedError
from qmpvcpu.domainxml import render
from qmpvcpu.errors import DenialReason
from qmpvcpu.testing import Behaviour
from tests.libvirt.daemon import Libvirt, VirshError
from tests.libvirt.microguests import Domain, Shape, microguest_domain, start, vcpu_side
from tests.substrates import Substrate, substrates

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu]

NEWEST_ON_KVM, NEWEST_ON_TCG = (
    substrates(["q35"], accels=[accel], that_survive=True)[-1:] for accel in ("kvm", "tcg")
)
LIBVIRT_WAITS_S = 5.0
TIMED_OUT = "vcpu unplug request timed out"


def running(libvirt: Libvirt, on: Substrate, shape: Shape) -> Domain:
    domain, document = microguest_domain(libvirt, "vm", on.qemu, accel=on.accel, shape=shape)
    start(domain, document)
    return domain


def orders(xml: bytes) -> dict[int, int]:
    """Each vCPU's order, where it has one."""
    found = re.findall(r"<vcpu id='(\d+)' [^>]*order='(\d+)'/>", vcpu_side(xml))
    return {int(vcpu): int(order) for vcpu, order in found}


async def unplug_by_libvirt(domain: Domain, vcpu: int) -> str:
    """What virsh says against it."""
    with pytest.raises(VirshError) as refused:
        await asyncio.to_thread(domain.virsh, "setvcpu", str(vcpu), "--disable", "--live")
    return str(refused.value)


@pytest.mark.parametrize("on", NEWEST_ON_KVM)
async def test_a_guest_that_refuses_is_heard_at_once_and_not_a_timeout(libvirt: Libvirt, on: Substrate) -> None:
    domain = running(libvirt, on, Shape(plugged=(3,), behaviour=(Behaviour.refusing(0x82),)))
    async with qmpvcpu.attach(domain.qmp) as vm:
        begun = time.monotonic()
        assert TIMED_OUT in await unplug_by_libvirt(domain, 3)
        assert time.monotonic() - begun >= LIBVIRT_WAITS_S
        with pytest.raises(UnplugRefusedError) as refused:
            await vm.unplug(3, timeout=50)
        assert (refused.value.code, refused.value.reason) == (0x82, "device is busy")
        assert time.monotonic() - begun < 50


@pytest.mark.parametrize("on", NEWEST_ON_KVM)
async def test_a_vcpu_that_leaves_late_leaves_no_order_behind(libvirt: Libvirt, on: Substrate) -> None:
    late = int(LIBVIRT_WAITS_S * 1000) + 800
    domain = running(libvirt, on, Shape(plugged=(3, 5, 4), behaviour=(Behaviour.slow(late),)))
    async with qmpvcpu.attach(domain.qmp) as vm:
        assert TIMED_OUT in await unplug_by_libvirt(domain, 3)
        await vm.wait_for(lambda layout: 3 not in layout.enabled, timeout=10)
        await asyncio.to_thread(wait_until_off, domain, 3)
        theirs, ours = domain.live(), render(vm.layout)
        assert orders(theirs) == {0: 1, 3: 2, 5: 3, 4: 4}
        assert "<vcpu id='3' enabled='no' hotpluggable='yes' order='2'/>" in vcpu_side(theirs)
        assert orders(ours) == {0: 1, 5: 2, 4: 3}


def wait_until_off(domain: Domain, vcpu: int) -> None:
    """Wait until libvirt has taken in that a vCPU is gone, which it does in a thread of its own."""
    deadline = time.monotonic() + 30
    while f"<vcpu id='{vcpu}' enabled='yes'" in vcpu_side(domain.live()):
        assert time.monotonic() < deadline


@pytest.mark.parametrize("on", NEWEST_ON_TCG)
async def test_a_vcpu_that_leaves_without_an_event_is_gone_and_no_order_is_given_twice(
    libvirt: Libvirt, on: Substrate
) -> None:
    domain = running(libvirt, on, Shape(plugged=(3, 5)))
    async with qmpvcpu.attach(domain.qmp) as vm:
        assert TIMED_OUT in await unplug_by_libvirt(domain, 3)
        await vm.wait_for(lambda layout: 3 not in layout.enabled, timeout=5)
        assert orders(domain.live()) == {0: 1, 3: 2, 5: 3}
        assert "the cause is unknown" in await unplug_by_libvirt(domain, 3)
        await asyncio.to_thread(domain.virsh, "setvcpu", "6", "--enable", "--live")
        await vm.refresh()
        theirs = orders(domain.live())
        assert theirs.keys() == {0, 3, 5, 6}
        assert len(set(theirs.values())) < len(theirs), theirs
        assert orders(render(vm.layout)) == {0: 1, 5: 2, 6: 3}
        assert await vm.unplug(5) == {5}
        assert orders(render(vm.layout)) == {0: 1, 6: 2}


@pytest.mark.parametrize("on", NEWEST_ON_KVM)
async def test_holes_outlive_a_restart_of_libvirtd(libvirt: Libvirt, on: Substrate) -> None:
    domain = running(libvirt, on, Shape(boot=2))
    async with qmpvcpu.attach(domain.qmp) as vm:
        await vm.set_map([0, 1, 6, 3])
        libvirt.stop()
        libvirt.start()
        theirs, ours = domain.live(), render(vm.layout)
        assert vcpu_side(theirs) == "  <vcpu placement='static' current='4'>8</vcpu>\n"
        assert "<vcpus>" not in domain.virsh("dumpxml", "--migratable")
        assert vcpu_side(ours).startswith(vcpu_side(theirs))
        assert orders(ours) == {0: 1, 1: 2, 3: 3, 6: 4}


@pytest.mark.parametrize("on", NEWEST_ON_KVM)
async def test_libvirtd_forgets_a_vm_whose_boot_vcpu_left_so_that_is_denied(libvirt: Libvirt, on: Substrate) -> None:
    domain = running(libvirt, on, Shape(boot=3, plugged=(5,)))  # its <vcpus> are what libvirtd stumbles over
    async with qmpvcpu.attach(domain.qmp) as vm:
        with pytest.raises(StepDeniedError) as denied:
            await vm.unplug(1)
        assert denied.value.reason is DenialReason.LIBVIRT_OWNED
        await vm.unplug(1, allow_boot_vcpus=True)
        listed = []
        for _ in range(2):
            libvirt.stop()
            libvirt.start()
            listed.append(libvirt.virsh("list", "--name").split())
        assert listed == [["vm"], []]
        assert (await vm.refresh()).enabled == {0, 2, 5}  # it runs, and nobody but us knows
        await vm.close()
        client = QMPClient()
        await client.connect(str(domain.qmp))
        with contextlib.suppress(EOFError, OSError, ExecInterruptedError):  # it ends before it has said all
            await client.execute("quit")
            await client.disconnect()
