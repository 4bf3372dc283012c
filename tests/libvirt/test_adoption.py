"""A VM of libvirt's is taken over while libvirtd is gone, changed, and handed back, as docs/libvirt.md says."""

import json
import re
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import Layout, StepDeniedError, qapi
from qmpvcpu.domainxml import render
from qmpvcpu.errors import DenialReason, MonitorConnectError
from qmpvcpu.qapi import build_slots, creation_order
from qmpvcpu.testing import MicroGuest
from tests.docs.blocks import block
from tests.libvirt.daemon import Libvirt
from tests.libvirt.microguests import Domain, Shape, microguest_domain, start, vcpu_side
from tests.libvirt.twins import plugged
from tests.substrates import Substrate, substrates

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu]

SHAPE = Shape(boot=2, topology="sockets='2' dies='1' cores='2' threads='2'", plugged=(5,))
KVM = substrates(["q35"], accels=["kvm"])
# To save, libvirt 9 sends migrate with "detach", which QEMU 11.1 has no more.
SAVED_BY_LIBVIRT = [on for on in KVM if on.values[0].version in {"7.2", "10.0"}]


def running(libvirt: Libvirt, on: Substrate, shape: Shape) -> Domain:
    domain, document = microguest_domain(libvirt, "adopted", on.qemu, accel=on.accel, shape=shape)
    start(domain, document, define=True)
    return domain


async def seen(domain: Domain) -> Layout:
    """What its QEMU has, past libvirt."""
    async with qmpvcpu.attach(domain.qmp) as vm:
        return vm.layout


def others(xml: bytes) -> list[str]:
    """The lines of a document apart from ``<vcpu>``, ``<vcpus>`` and ``<metadata>``."""
    side = vcpu_side(xml).splitlines()
    text = re.sub(r"  <metadata>.*?</metadata>\n", "", xml.decode(), flags=re.DOTALL)
    return [line for line in text.splitlines() if line not in side]


@pytest.mark.parametrize("on", KVM)
async def test_a_vm_of_libvirts_is_taken_over_changed_and_handed_back(
    libvirt: Libvirt, on: Substrate, tmp_path: Path
) -> None:
    domain = running(libvirt, on, SHAPE)
    base = libvirt.inactive(domain.name)
    monitor = libvirt.monitor_socket(domain.name)
    with pytest.raises(MonitorConnectError):  # libvirtd has it
        await qmpvcpu.attach(monitor, reply_timeout=0.5)

    libvirt.stop("KILL")
    async with qmpvcpu.attach(monitor) as vm:
        assert vm.layout.vm.name == domain.name
        assert vm.layout.enabled == {0, 1, 5}
        await vm.plug(7)
        await vm.unplug(5)
    document = tmp_path / "vm.xml"
    document.write_bytes(base)
    change = block("docs/libvirt.md", "a VM is taken over, and its document follows").module().change
    await change(str(monitor), str(document), "0-1,3,6-7")
    handed_back = document.read_bytes()
    left = await seen(domain)
    assert left.creation == (0, 1, 7, 3, 6)
    assert others(handed_back) == others(base)

    libvirt.start()
    assert domain.virsh("domstate").strip() == "running"
    assert vcpu_side(domain.live()) == vcpu_side(handed_back)
    libvirt.define(handed_back)
    assert libvirt.inactive(domain.name) == handed_back

    domain.virsh("setvcpu", "4", "--enable", "--live")
    domain.virsh("setvcpu", "7", "--disable", "--live")
    now = await seen(domain)
    assert now.creation == (0, 1, 3, 6, 4)
    assert vcpu_side(domain.live()) == vcpu_side(render(now))
    for _ in range(2):
        libvirt.stop()
        libvirt.start()
        assert vcpu_side(domain.live()) == vcpu_side(render(now))

    domain.virsh("destroy")
    domain.virsh("start")
    assert plugged(await seen(domain)) == plugged(left)


@pytest.mark.parametrize("on", SAVED_BY_LIBVIRT)
async def test_what_was_handed_back_outlives_a_save_and_a_restore(libvirt: Libvirt, on: Substrate) -> None:
    domain = running(libvirt, on, SHAPE)
    monitor = libvirt.monitor_socket(domain.name)
    libvirt.stop()
    async with qmpvcpu.attach(monitor) as vm:
        await vm.set_map([0, 1, 7, 3])
        left = vm.layout
    libvirt.start()
    image = libvirt.folder / "image"
    domain.virsh("save", image)
    libvirt.virsh("restore", image)
    async with qmpvcpu.attach(domain.qmp) as vm:
        assert plugged(vm.layout) == plugged(left)
        await vm.unplug(7)  # its guest goes on
        assert vm.layout.enabled == {0, 1, 3}


@pytest.mark.parametrize("on", KVM)
async def test_a_boot_vcpu_of_an_adopted_vm_stays_since_libvirtd_comes_back(libvirt: Libvirt, on: Substrate) -> None:
    domain = running(libvirt, on, SHAPE)
    monitor = libvirt.monitor_socket(domain.name)
    libvirt.stop()
    async with qmpvcpu.attach(monitor) as vm:
        assert vm.layout.vm.libvirt_owned
        for unplug in (vm.unplug(1), vm.set_map([0, 5])):
            with pytest.raises(StepDeniedError) as denied:
                await unplug
            assert denied.value.reason is DenialReason.LIBVIRT_OWNED
        assert (await vm.refresh()).enabled == {0, 1, 5}
    libvirt.start()
    assert domain.virsh("domstate").strip() == "running"


@pytest.mark.parametrize("on", KVM)
async def test_a_libvirtd_that_is_back_too_early_waits_for_the_vm(libvirt: Libvirt, on: Substrate) -> None:
    domain = running(libvirt, on, SHAPE)
    monitor = libvirt.monitor_socket(domain.name)
    libvirt.stop()
    async with qmpvcpu.attach(monitor) as vm:
        libvirt.start()
        await vm.plug(3)
        left = vm.layout
    assert domain.virsh("domstate").strip() == "running"
    assert vcpu_side(domain.live()) == vcpu_side(render(left))


@pytest.mark.parametrize("on", KVM)
async def test_libvirt_prints_the_holes_of_a_vm_without_vcpus_from_its_next_plug_on(
    libvirt: Libvirt, on: Substrate
) -> None:
    domain = running(libvirt, on, Shape(boot=2))
    base = libvirt.inactive(domain.name)
    assert b"<vcpus>" not in base
    monitor = libvirt.monitor_socket(domain.name)
    libvirt.stop()
    async with qmpvcpu.attach(monitor) as vm:
        await vm.set_map([0, 1, 6, 3])
        handed_back = render(vm.layout, base=base)
    libvirt.start()
    libvirt.define(handed_back)
    assert libvirt.inactive(domain.name) == handed_back
    assert "<vcpus>" not in vcpu_side(domain.live())
    domain.virsh("setvcpu", "2", "--enable", "--live")
    domain.virsh("setvcpu", "2", "--disable", "--live")
    assert vcpu_side(domain.live()) == vcpu_side(handed_back)


@pytest.mark.parametrize("on", KVM)
async def test_a_vm_of_ours_with_holes_is_what_libvirt_starts_from_its_document(
    libvirt: Libvirt, on: Substrate
) -> None:
    async with (
        MicroGuest(on.qemu, accel=on.accel, boot=3) as guest,
        qmpvcpu.attach(guest.qmp, name="ours") as vm,
    ):
        await vm.set_map([0, 2, 6, 4, 7])
        await vm.unplug(6)
        await vm.plug(1)
        ours = vm.layout
    assert ours.creation == (0, 2, 4, 7, 1)
    xml = render(ours, emulator=str(on.qemu))
    name = libvirt.define(xml)
    libvirt.virsh("start", name, "--paused")
    assert vcpu_side(libvirt.virsh("dumpxml", name).encode()) == vcpu_side(xml)

    def ask(command: str) -> object:
        return json.loads(libvirt.virsh("qemu-monitor-command", name, json.dumps({"execute": command})))["return"]

    threads = qapi.parse_cpus_fast(ask("query-cpus-fast"))
    slots = build_slots(qapi.parse_hotpluggable_cpus(ask("query-hotpluggable-cpus")), threads)
    assert creation_order(slots, threads) == ours.creation
    assert [(each.present, each.type, each.props) for each in slots] == [
        (each.present, each.type, each.props) for each in ours.slots
    ]
