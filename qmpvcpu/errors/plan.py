"""Nothing was sent: it could be known beforehand."""

import enum
from collections.abc import Collection

from qmpvcpu.errors.base import Outcome, QmpVcpuError, describe


class DenialReason(enum.Enum):
    """Why a step was never sent; the value is what a person reads."""

    UNKNOWN_VCPU = "no such vCPU"
    PART_OF_SLOT = "part of a slot that moves whole"
    SLOT_OCCUPIED = "already plugged"
    SLOT_EMPTY = "not plugged"
    IN_PROGRESS = "another change of it is in flight"
    BOOT_VCPU = "vCPU 0 never leaves"
    MACHINE_FULL = "no free slot"
    MACHINE_NOT_BUILT = "QEMU has not built the machine yet"
    MACHINE_CANNOT_PLUG = "the machine cannot plug CPUs"
    MACHINE_CANNOT_UNPLUG = "the machine cannot unplug CPUs"
    MIGRATING = "the VM is migrating"
    MIGRATED_AWAY = "the VM has migrated away"
    EXPORTED = "the VM is exported, to be migrated"
    FATAL = "this QEMU would not survive it"
    CONFIDENTIAL = "a confidential VM takes no vCPU once it has been launched"
    LIBVIRT_OWNED = "a running libvirtd would lose the VM"
    COUNT_KEEPS_BOOT = "a count takes no boot vCPU out"
    COUNT_SPLITS_SLOT = "no whole slots make up this count"
    NO_CONFIG = "there is nothing that the next boot is kept in"
    TOPOLOGY_MISMATCH = "the topology is of another number of vCPUs"
    NUMA_MISMATCH = "a NUMA cell has vCPUs beyond it"
    RECORD_MAXIMUM = "a record says how many vCPUs the running VM can have"


class PlanError(QmpVcpuError):
    """What was asked cannot be planned; nothing was sent."""


class StepDeniedError(PlanError):
    """A change was not sent, because it could be known beforehand that it cannot or must not be.

    Attributes:
        action: ``"plug"``, ``"unplug"``, ``"count"`` or ``"export"``.
        vcpus: The vCPU ids that were named (empty for "the first free one", and for a count).
        reason: Why, as a word to branch on.
        detail: Why, as a sentence.
    """

    def __init__(self, action: str, vcpus: Collection[int], reason: DenialReason, detail: str) -> None:
        super().__init__(f"{describe(action, vcpus)} denied, nothing was sent: {detail}")
        self.action = action
        self.vcpus = tuple(vcpus)
        self.reason = reason
        self.detail = detail


class ConfigDeniedError(PlanError):
    """The next boot cannot be what was asked; nothing was sent, and the document is as it was.

    Attributes:
        asked: What was asked, in words.
        vcpus: The vCPU ids that it is about; empty where it is about none in particular.
        reason: Why, as a word to branch on.
        detail: Why, as a sentence.
    """

    def __init__(self, asked: str, vcpus: Collection[int], reason: DenialReason, detail: str) -> None:
        super().__init__(f"{asked} at the next boot denied, nothing was changed: {detail}")
        self.asked = asked
        self.vcpus = tuple(vcpus)
        self.reason = reason
        self.detail = detail


class UnsupportedMachineError(StepDeniedError):
    """The VM's machine cannot do this to any of its CPUs, whichever is named.

    Attributes:
        machine: The machine type, as in QEMU's ``-machine``.
    """

    def __init__(
        self, action: str, vcpus: Collection[int], reason: DenialReason, detail: str, *, machine: str
    ) -> None:
        super().__init__(action, vcpus, reason, detail)
        self.machine = machine


class StalePlanError(PlanError):
    """The VM has changed since the plan was made; nothing was sent. Plan again.

    Attributes:
        planned: What the plan starts from, as text.
        observed: What is so now, as text.
    """

    def __init__(self, planned: str, observed: str) -> None:
        super().__init__(
            f"the plan is stale, nothing was sent: it starts from {planned}, the VM is at {observed} now; plan again"
        )
        self.planned = planned
        self.observed = observed


class ReplayMismatchError(PlanError):
    """A QEMU is not the one that a VM's vCPUs are to be built again in; nothing was sent.

    Or, with ``outcome`` CHANGED, all was sent and accepted, and a look at the end showed something else.

    Attributes:
        differences: In what it is another, one sentence each.
    """

    def __init__(self, differences: Collection[str], *, outcome: Outcome = Outcome.UNCHANGED) -> None:
        what = "replay denied, nothing was sent" if outcome is Outcome.UNCHANGED else "what came of the replay"
        super().__init__(f"{what}: {'; '.join(differences)}")
        self.outcome = outcome
        self.differences = tuple(differences)
