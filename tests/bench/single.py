"""One vCPU in, and out again."""

from collections.abc import AsyncIterator
from typing import Any

import qmpvcpu
from qmpvcpu import Proof
from qmpvcpu.testing import MicroGuest
from tests.bench.libvirtd import Peer, peer
from tests.bench.raw import Raw, raw_client
from tests.bench.row import LIBVIRT, OURS, RAW, Goal, Row, Samples
from tests.bench.setting import Setting, timed

__all__ = ["measure"]

VCPUS = 15
WARM_UP = 3  # of each fifteen
TCG_UNPLUGS = 2  # lives with one of libvirt's: it waits five seconds for it, in vain

PLUG, ACKNOWLEDGED, UNPLUG = "plug one", "plug one, acknowledged", "unplug one, proven"
READS = {
    PLUG: "from the call until QEMU has the vCPU: one device_add. libvirt: setVcpu, which reads the VM again too",
    ACKNOWLEDGED: "the same, until the guest has said that it has it (ACPI _OST); libvirt does not ask",
    UNPLUG: "from the call until the vCPU is gone for certain; raw waits for the CPU's own DEVICE_DELETED (TCG: the "
    "guest's answer and one query). libvirt under TCG: five seconds, then it says that the unplug timed out",
}
GOALS = {
    PLUG: (Goal(OURS, 1.08, RAW),),
    UNPLUG: (Goal(OURS, 1.10, RAW),),
}


async def measure(setting: Setting) -> AsyncIterator[Row]:
    """Compare single plugs and unplugs: every QEMU, under KVM and TCG."""
    for version in setting.qemus:
        for accel in ("kvm", "tcg") if setting.kvm else ("tcg",):
            samples = await _compare(setting, version, accel)
            for work, reads in READS.items():
                goals = GOALS.get(work, ()) if accel == "kvm" else ()
                name = setting.named(version, VCPUS + 1, accel)
                yield Row(work, name, reads, samples[work], goals=goals)


async def _compare(setting: Setting, version: str, accel: Any) -> Samples:
    samples = Samples()
    qemu = setting.qemus[version]
    # QEMU under TCG does not survive more CPUs than maxcpus in its life (7.2: none after an unplug): VMs for a round.
    lives, rounds = (1, 2 * setting.rounds) if accel == "kvm" else (max(setting.rounds // 2, 1), 1)
    for life in range(lives):
        async with (
            MicroGuest(qemu, accel=accel, max_vcpus=VCPUS + 1) as one,
            MicroGuest(qemu, accel=accel, max_vcpus=VCPUS + 1) as two,
            qmpvcpu.attach(two.qmp) as vm,
            raw_client(one.qmp) as client,
        ):
            # Only TCG has no event of the CPU's own; under KVM the guest's answers are of no interest.
            proof_of_unplug = "ACPI_DEVICE_OST" if accel == "tcg" else "DEVICE_DELETED"
            with (
                client.listener(proof_of_unplug) as listener,
                peer(setting.libvirt, qemu, VCPUS + 1, accel=accel) as theirs,
            ):
                raw = Raw(client, [slot for slot in vm.layout.slots if slot.first], listener, tcg=accel == "tcg")
                for _ in range(rounds):
                    await _plug_all(samples, raw, vm, theirs)
                    await _unplug_all(
                        samples, raw, vm, theirs, tries=VCPUS if accel == "kvm" else int(life < TCG_UNPLUGS)
                    )
    return samples


async def _plug_all(samples: Samples, raw: Raw, vm: qmpvcpu.VcpuController, theirs: Peer | None) -> None:
    for vcpu in range(1, VCPUS + 1):
        proven = vcpu % 3 == 0
        took = {RAW: await timed(raw.plug_acknowledged(vcpu) if proven else raw.plug(vcpu))}
        took[OURS] = await timed(vm.plug(vcpu, proof=Proof.ACKNOWLEDGED if proven else Proof.PRESENT))
        if theirs is not None:
            libvirt = theirs.set_state(vcpu, enabled=True)
            took |= {} if proven else {LIBVIRT: libvirt}
        _note(samples, ACKNOWLEDGED if proven else PLUG, vcpu, took)


async def _unplug_all(
    samples: Samples, raw: Raw, vm: qmpvcpu.VcpuController, theirs: Peer | None, *, tries: int
) -> None:
    for vcpu in range(1, VCPUS + 1):
        took = {RAW: await timed(raw.unplug(vcpu)), OURS: await timed(vm.unplug(vcpu))}
        if theirs is not None and (tries == VCPUS or WARM_UP < vcpu <= WARM_UP + tries):
            took[LIBVIRT] = theirs.set_state(vcpu, enabled=False)
        _note(samples, UNPLUG, vcpu, took)


def _note(samples: Samples, work: str, vcpu: int, took: dict[str, float]) -> None:
    if vcpu > WARM_UP:
        for who, milliseconds in took.items():
            samples.note(work, who, milliseconds)
