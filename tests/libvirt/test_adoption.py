"""A VM that libvirt started is taken over while libvirtd is gone, changed, and handed back: a story with an end."""

import pytest

import qmpvcpu
from qmpvcpu import Layout
from qmpvcpu.domainxml import render
from qmpvcpu.errors import MonitorConnectError
from tests.libvirt.daemon import Libvirt
from tests.libvirt.microguests import Domain, Shape, microguest_domain, start, vcpu_side
from tests.libvirt.twins import plugged
from tests.substrates import Substrate, substrates

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu]

SHAPE = Shape(boot=2, topology="sockets='2' dies='1' cores='2' threads='2'", plugged=(5,))


def running(libvirt: Libvirt, on: Substrate, shape: Shape) -> Domain:
    domain, document = microguest_domain(libvirt, "adopted", on.qemu, accel=on.accel, shape=shape)
    start(domain, document, define=True)
    return domain


async def seen(domain: Domain) -> Layout:
    """What its QEMU has, past libvirt."""
    async with qmpvcpu.attach(domain.qmp) as vm:
        return vm.layout


def restart(libvirt: Libvirt) -> None:
    libvirt.stop()
    libvirt.start()


@pytest.mark.parametrize("on", substrates(["q35"], accels=["kvm"]))
async def test_a_vm_of_libvirts_is_taken_over_changed_and_handed_back(libvirt: Libvirt, on: Substrate) -> None:
    domain = running(libvirt, on, SHAPE)
    base = libvirt.inactive(domain.name)
    monitor = libvirt.monitor_socket(domain.name)
    with pytest.raises(MonitorConnectError):
        await qmpvcpu.attach(monitor, timeout=1)

    libvirt.stop("KILL")
    async with qmpvcpu.attach(monitor) as vm:
        assert vm.layout.enabled == {0, 1, 5}
        assert vm.layout.vm.name == domain.name
        await vm.plug(7)
        await vm.unplug(5)
        await vm.set_map("0-1,3,6-7")
        handed_back = render(vm.layout)
        left = vm.layout

    libvirt.start()
    assert domain.virsh("domstate").strip() == "running"
    assert vcpu_side(domain.live()) == vcpu_side(handed_back)
    libvirt.define(handed_back)
    assert vcpu_side(libvirt.inactive(domain.name)) == vcpu_side(handed_back)

    domain.virsh("setvcpu", "4", "--enable", "--live")
    domain.virsh("setvcpu", "7", "--disable", "--live")
    now = await seen(domain)
    assert now.creation == (0, 1, 3, 6, 4)
    assert vcpu_side(domain.live()) == vcpu_side(render(now))
    for _ in range(2):
        restart(libvirt)
        assert vcpu_side(domain.live()) == vcpu_side(render(now))

    image = libvirt.folder / "image"
    domain.virsh("save", image)
    libvirt.virsh("restore", image)
    assert plugged(await seen(domain)) == plugged(now)

    domain.virsh("destroy")
    domain.virsh("start")
    assert plugged(await seen(domain)) == plugged(left)
