"""A whole map at once: all vCPUs in, and all but the first out, taking turns."""

from collections.abc import AsyncIterator

import qmpvcpu
from qmpvcpu import OnFailure
from qmpvcpu.testing import MicroGuest
from tests.bench.libvirtd import peer
from tests.bench.raw import Raw, raw_client
from tests.bench.row import LIBVIRT, OURS, RAW, RECORDED, Goal, Row, Samples
from tests.bench.setting import Setting, timed

__all__ = ["measure"]

SIZES = (8, 64, 240)
PLUGS = (
    "from the call until QEMU has all; raw: a device_add each, eight in flight; libvirt: setVcpus, one at a time. "
    "qmpvcpu reads the VM before, and reports each slot"
)
TOGETHER = (
    "from the call until all are gone for certain, under on_failure=CONTINUE, which asks for all at once, as REVERT "
    "does; raw: eight unanswered at a time, each CPU's own DEVICE_DELETED awaited; libvirt: setVcpus, one at a time"
)
ONE_BY_ONE = (
    "the same under STOP, the default: the next is asked for when the one before has left; raw: one at a time too"
)


async def measure(setting: Setting) -> AsyncIterator[Row]:
    """Compare whole maps under KVM, on every QEMU; under TCG no VM survives as many rounds."""
    for version in setting.qemus if setting.kvm else ():
        for vcpus in SIZES:
            samples = await _compare(setting, version, vcpus)
            name = setting.named(version, vcpus)
            largest = vcpus == max(SIZES)
            into = (Goal(OURS, 1.08, RAW), Goal(OURS, 1 / 5, LIBVIRT)) if largest else ()
            out = (Goal(OURS, 1.10, RAW), Goal(OURS, 1 / 7, LIBVIRT)) if largest else ()
            yield Row(f"plug 1 -> {vcpus}", name, PLUGS, samples["plug"], goals=into)
            yield Row(f"unplug {vcpus} -> 1, CONTINUE", name, TOGETHER, samples["CONTINUE"], goals=out)
            yield Row(f"unplug {vcpus} -> 1, STOP", name, ONE_BY_ONE, samples["STOP"])


async def _compare(setting: Setting, version: str, vcpus: int) -> Samples:
    samples = Samples()
    qemu = setting.qemus[version]
    everything, wish = range(1, vcpus), f"0-{vcpus - 1}"
    async with (
        MicroGuest(qemu, accel="kvm", max_vcpus=vcpus) as one,
        MicroGuest(qemu, accel="kvm", max_vcpus=vcpus) as two,
        MicroGuest(qemu, accel="kvm", max_vcpus=vcpus) as three,
        qmpvcpu.attach(two.qmp) as plain,
        qmpvcpu.attach(three.qmp, record=setting.folder / f"bulk-{version}-{vcpus}.xml") as recorded,
        raw_client(one.qmp) as client,
    ):
        with client.listener("DEVICE_DELETED") as listener, peer(setting.libvirt, qemu, vcpus) as theirs:
            raw = Raw(client, plain.layout.slots[1:], listener, tcg=False)
            for number in range(2 * setting.rounds + 1):  # how long QEMU takes differs by a third from round to round
                noted = samples if number else Samples()  # the first round warms everybody up
                for policy in (OnFailure.CONTINUE, OnFailure.STOP):
                    out = raw.unplug_all if policy is OnFailure.CONTINUE else raw.unplug_each
                    noted.note("plug", RAW, await timed(raw.plug_all(everything)))
                    noted.note(policy.name, RAW, await timed(out(everything)))
                    for who, vm in ((OURS, plain), (RECORDED, recorded)):
                        noted.note("plug", who, await timed(vm.set_map(wish, on_failure=policy)))
                        noted.note(policy.name, who, await timed(vm.set_map("0", on_failure=policy)))
                if theirs is not None and number:
                    samples.note("plug", LIBVIRT, theirs.set_count(vcpus))
                    out_by_libvirt = theirs.set_count(1)
                    for policy in (OnFailure.CONTINUE, OnFailure.STOP):
                        samples.note(policy.name, LIBVIRT, out_by_libvirt)
    return samples
