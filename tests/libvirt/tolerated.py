"""Where libvirt and we differ, and why; docs/libvirt.md has these very rows."""

from typing import Final, NamedTuple

from qmpvcpu.errors import DenialReason

__all__ = ["FAULTS", "MAP", "QUERIES", "REFUSALS", "TOLERATED", "VCPUS_UNSAID", "Difference", "Fault"]


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
    """

    when: str
    libvirt: str
    ours: str


VCPUS_UNSAID: Final = Difference(
    "`<vcpus>` of a VM whose document had none",
    "printed once a vCPU was plugged",
    "always printed",
    "without it a document has no holes and no order, so a VM made from it could be another one",
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
TOLERATED: Final = (VCPUS_UNSAID, MAP, QUERIES)

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
