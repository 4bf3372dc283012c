"""vCPUs plugged in their place on the host: raw QMP leaves them anywhere, libvirt pins them too."""

import os
from collections.abc import AsyncIterator, Mapping

import qmpvcpu
from qmpvcpu import Placement
from qmpvcpu.testing import MicroGuest
from tests.bench.libvirtd import Peer, peer
from tests.bench.raw import Raw, raw_client
from tests.bench.row import LIBVIRT, OURS, RAW, Goal, Row, Samples
from tests.bench.setting import Setting, timed

__all__ = ["measure"]

SINGLE = 16
LARGEST = 240
ONE = (
    "from the call until QEMU has the vCPU, and its thread was seen to be born on its host CPUs; raw: a device_add"
    " alone; libvirt: setVcpu with the same vcpupin"
)
ALL = "the same for a whole map; raw: a device_add each, eight in flight; libvirt: setVcpus with the same vcpupin"


async def measure(setting: Setting) -> AsyncIterator[Row]:
    """Compare single plugs and whole maps with pins under KVM, on every QEMU."""
    cpus = sorted(os.sched_getaffinity(0))
    for version in setting.qemus if setting.kvm else ():
        spread = {vcpu: [cpus[vcpu % len(cpus)]] for vcpu in range(LARGEST)}
        one = await _singles(setting, version, spread)
        yield Row(
            "plug one, pinned", setting.named(version, SINGLE), ONE, one["plug"], goals=(Goal(OURS, 1.25, RAW),)
        )
        for how, pins in (("alike", dict.fromkeys(spread, cpus[-1:])), ("one by one", spread)):
            samples = await _maps(setting, version, pins)
            name = setting.named(version, LARGEST)
            goals = (Goal(OURS, 1.15, RAW),)
            yield Row(f"plug 1 -> {LARGEST}, pinned {how}", name, ALL, samples["plug"], goals=goals)


async def _singles(setting: Setting, version: str, pins: Mapping[int, list[int]]) -> Samples:
    samples = Samples()
    qemu = setting.qemus[version]
    async with (
        MicroGuest(qemu, accel="kvm", max_vcpus=SINGLE) as one,
        MicroGuest(qemu, accel="kvm", max_vcpus=SINGLE) as two,
        qmpvcpu.attach(two.qmp, placement=Placement.pinned(_below(pins, SINGLE))) as vm,
        raw_client(one.qmp) as client,
    ):
        with client.listener("DEVICE_DELETED") as listener, peer(setting.libvirt, qemu, SINGLE) as theirs:
            raw = Raw(client, vm.layout.slots[1:], listener, tcg=False)
            _pin(theirs, _below(pins, SINGLE))
            for number in range(2 * setting.rounds + 1):
                noted = samples if number else Samples()  # the first round warms everybody up
                for vcpu in range(1, SINGLE):
                    noted.note("plug", RAW, await timed(raw.plug(vcpu)))
                    noted.note("plug", OURS, await timed(vm.plug(vcpu)))
                    if theirs is not None:
                        noted.note("plug", LIBVIRT, theirs.set_state(vcpu, enabled=True))
                for vcpu in range(1, SINGLE):
                    await raw.unplug(vcpu)
                    await vm.unplug(vcpu)
                    if theirs is not None:
                        theirs.set_state(vcpu, enabled=False)
    return samples


async def _maps(setting: Setting, version: str, pins: Mapping[int, list[int]]) -> Samples:
    samples = Samples()
    qemu = setting.qemus[version]
    everything = range(1, LARGEST)
    async with (
        MicroGuest(qemu, accel="kvm", max_vcpus=LARGEST) as one,
        MicroGuest(qemu, accel="kvm", max_vcpus=LARGEST) as two,
        qmpvcpu.attach(two.qmp, placement=Placement.pinned(pins)) as vm,
        raw_client(one.qmp) as client,
    ):
        with client.listener("DEVICE_DELETED") as listener, peer(setting.libvirt, qemu, LARGEST) as theirs:
            raw = Raw(client, vm.layout.slots[1:], listener, tcg=False)
            _pin(theirs, pins)
            for number in range(setting.rounds + 1):
                noted = samples if number else Samples()
                noted.note("plug", RAW, await timed(raw.plug_all(everything)))
                noted.note("plug", OURS, await timed(vm.set_map(f"0-{LARGEST - 1}")))
                if theirs is not None and number:
                    noted.note("plug", LIBVIRT, theirs.set_count(LARGEST))
                    theirs.set_count(1)
                await raw.unplug_all(everything)
                await vm.set_map("0", on_failure=qmpvcpu.OnFailure.CONTINUE)
    return samples


def _below(pins: Mapping[int, list[int]], most: int) -> dict[int, list[int]]:
    return {vcpu: cpus for vcpu, cpus in pins.items() if vcpu < most}


def _pin(theirs: Peer | None, pins: Mapping[int, list[int]]) -> None:
    if theirs is not None:
        for vcpu, cpus in pins.items():
            theirs.pin(vcpu, cpus)
