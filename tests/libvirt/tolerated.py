"""Where libvirt and we differ, and why; docs/libvirt.md has these very rows."""

from typing import Final, NamedTuple

from qmpvcpu.errors import DenialReason

__all__ = [
    "FAULTS",
    "MAP",
    "NO_SUCH_COUNT",
    "OF_PLACES",
    "OTHER_THREADS",
    "QUERIES",
    "READING",
    "REFUSALS",
    "TOLERATED",
    "VCPUS_UNNEEDED",
    "VCPUS_UNSAID",
    "Difference",
    "Fault",
]


class Difference(NamedTuple):
    """Both are right; they differ on purpose.

    Attributes:
        what: What it is about.
        libvirt: What libvirt does.
        ours: What we do.
        reason: Why that is to stay.
    """

    what: str
    libvirt: str
    ours: str
    reason: str


class Fault(NamedTuple):
    """libvirt is wrong, and we are not.

    Attributes:
        when: What brings it about.
        libvirt: What libvirt 9.0.0 says or does then.
        ours: What we say or do.
        shown_by: The test in test_faults.py that brings it about.
    """

    when: str
    libvirt: str
    ours: str
    shown_by: str


VCPUS_UNSAID: Final = Difference(
    "`<vcpus>` in a document that is written anew",
    "printed once a vCPU was plugged",
    "always there",
    "whoever reads it finds holes and order without knowing what happened before",
)
VCPUS_UNNEEDED: Final = Difference(
    "`<vcpus>` in a document that had none, once all that was plugged has left again",
    "printed for good",
    "gone again",
    "nothing but `<vcpu current>` differs from before then, so nothing but that is changed in a `base`",
)
MAP: Final = Difference(
    "several vCPUs, named, in a running VM",
    'refused: "only one hotpluggable entity can be selected"',
    "`set_map` takes any set",
    "it is what the map is for; single `setvcpu` calls in the plan's order send the same commands",
)
QUERIES: Final = Difference(
    "questions to QEMU",
    "`query-hotpluggable-cpus` and `query-cpus-fast` after each vCPU",
    "none after a plug; a constant number for a whole map",
    "the accepted command and the event are the evidence, so no reply's size is paid for each vCPU",
)
OTHER_THREADS: Final = Difference(
    "emulator threads other than the main thread, after a live `emulatorpin`",
    "stay where they are, unless libvirt moves them by a cpuset cgroup",
    "move with the main thread",
    "`emulatorpin` is meant for them, and qmpvcpu changes no cgroup",
)
# Of a document that is read, by what it is about; test_generated_domains.py shows each.
READING: Final = {
    "uuid": "libvirt makes one up where there is none: a document read twice must read alike",
    "machine": "libvirt resolves an alias (q35), and fills in a default, from its own QEMU: we ask none",
    "emulator": "libvirt fills in the QEMU that it has for the architecture",
    "arch": "libvirt fills in its host's",
    "cpu": "where no model is named libvirt fills in the machine's default one, which only QEMU knows",
    "clusters": "libvirt 9.0.0 does not read the attribute and leaves it out of the product; since 10.1 it counts",
    "no vCPUs": "libvirt has no words for <vcpu>0</vcpu>: it refuses whatever it stumbles over first",
    "negative": "libvirt takes -1 for 4294967295 vCPUs, which kills libvirtd 9.0.0, and -4294967295 for 1: refused",
    "document type": "libvirt takes one; no domain has use for it, and each attack by entities needs it",
    "too much": "libvirt reads any amount; we read cpusets of 200,000 characters, and a million CPUs in all of them",
    "no memory": "libvirt refuses a domain without <memory> or <os>; a part of a document is read for its vCPUs",
}

TOLERATED: Final = (VCPUS_UNSAID, VCPUS_UNNEEDED, MAP, QUERIES)
OF_PLACES: Final = (OTHER_THREADS,)
"""Where threads run."""

REFUSALS: Final = {
    DenialReason.SLOT_OCCUPIED: "is already in requested state",
    DenialReason.SLOT_EMPTY: "is already in requested state",
    DenialReason.BOOT_VCPU: "can't be unplugged",
    DenialReason.LIBVIRT_OWNED: "can't be unplugged",
    DenialReason.COUNT_KEEPS_BOOT: "failed to find appropriate hotpluggable vcpus",
    DenialReason.UNKNOWN_VCPU: "is not present in live config",
}
"""What libvirt says where we deny."""

NO_SUCH_COUNT: Final = ("Can't set 0 processors for a VM", "requested vcpus is greater than max allowable vcpus")
"""What it says to a count of nothing, and to one beyond the machine's: UNKNOWN_VCPU too."""

FAULTS: Final = (
    Fault(
        "the guest refuses through ACPI `_OST`",
        'not heard: 5 s, then "vcpu unplug request timed out"',
        "`UnplugRefusedError` with the guest's code and reason, in milliseconds",
        "test_a_guest_that_refuses_is_heard_at_once_and_not_a_timeout",
    ),
    Fault(
        "a vCPU leaves after libvirt's 5 s",
        "its row keeps its `order` beside `enabled='no'`, the others keep a gap",
        "gone when it goes; `order` is counted anew over what is plugged",
        "test_a_vcpu_that_leaves_late_leaves_no_order_behind",
    ),
    Fault(
        "a vCPU leaves without `DEVICE_DELETED` of its own (TCG)",
        "times out, `enabled='yes'` for good; asked again: \"the cause is unknown\"",
        "`UNPLUGGED` by a read of the slots",
        "test_a_vcpu_that_leaves_without_an_event_is_gone_and_no_order_is_given_twice",
    ),
    Fault(
        "a plug after that",
        "the same `order` twice, which no restore and no start takes",
        "each `order` once",
        "test_a_vcpu_that_leaves_without_an_event_is_gone_and_no_order_is_given_twice",
    ),
    Fault(
        "a vCPU was plugged behind libvirt's back, then libvirtd restarts",
        "the count is right; `<vcpus>` is not printed if it was not before, so the holes are lost",
        "`<vcpus>` with its holes and its order",
        "test_holes_outlive_a_restart_of_libvirtd",
    ),
    Fault(
        "a boot vCPU left a VM whose `<vcpus>` is printed, then libvirtd restarts twice",
        "refuses its own status file and forgets the VM, which runs on",
        "`LIBVIRT_OWNED` before anything is sent, unless `allow_boot_vcpus=True`",
        "test_libvirtd_forgets_a_vm_whose_boot_vcpu_left_so_that_is_denied",
    ),
)
