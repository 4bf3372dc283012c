"""Floor 0: the values that everything else speaks in.

Rule of this floor: frozen values and pure functions; no I/O, no clock, nothing of the wire's spelling beyond the
names of QEMU's properties, which are passed through unchanged.
"""

from typing import TYPE_CHECKING

from qmpvcpu.lazy import lazily

if TYPE_CHECKING:
    from qmpvcpu.model.events import (
        Disconnected,
        Event,
        InstanceChanged,
        LayoutChanged,
        MigrationChanged,
        Origin,
        Reconnected,
        UnplugAcknowledged,
        UnplugPending,
        UnplugRefused,
        UnplugRequested,
        VcpuPlugged,
        VcpuUnplugged,
        VmReset,
        VmResumed,
        VmStopped,
    )
    from qmpvcpu.model.layout import CpuProps, Layout, Slot, Vcpu
    from qmpvcpu.model.mapping import (
        SlotReading,
        ThreadReading,
        build_fixed_slots,
        build_slots,
        creation_order,
        runs_single_threaded,
    )
    from qmpvcpu.model.ost import OstAnswer, OstStatus
    from qmpvcpu.model.previous import PreviousVcpus
    from qmpvcpu.model.report import (
        ConfigOutcome,
        ConfigReport,
        StepReport,
        TransitionError,
        TransitionOutcome,
        TransitionReport,
        succeeded,
    )
    from qmpvcpu.model.transition import Action, Affect, Direction, Intent, OnFailure, Step
    from qmpvcpu.model.vcpumap import VcpuMap
    from qmpvcpu.model.verdicts import (
        Denied,
        Pending,
        Plugged,
        Proof,
        Refused,
        Rejected,
        Unknown,
        Unplugged,
        Verdict,
        as_json,
        verdict_of,
    )
    from qmpvcpu.model.vm import Capabilities, KnownFault, Topology, VmInfo, VmStatus, apic_id, needs_x2apic
    from qmpvcpu.model.vmstate import VmState

__all__ = [
    "Action",
    "Affect",
    "Capabilities",
    "ConfigOutcome",
    "ConfigReport",
    "CpuProps",
    "Denied",
    "Direction",
    "Disconnected",
    "Event",
    "InstanceChanged",
    "Intent",
    "KnownFault",
    "Layout",
    "LayoutChanged",
    "MigrationChanged",
    "OnFailure",
    "Origin",
    "OstAnswer",
    "OstStatus",
    "Pending",
    "Plugged",
    "PreviousVcpus",
    "Proof",
    "Reconnected",
    "Refused",
    "Rejected",
    "Slot",
    "SlotReading",
    "Step",
    "StepReport",
    "ThreadReading",
    "Topology",
    "TransitionError",
    "TransitionOutcome",
    "TransitionReport",
    "Unknown",
    "UnplugAcknowledged",
    "UnplugPending",
    "UnplugRefused",
    "UnplugRequested",
    "Unplugged",
    "Vcpu",
    "VcpuMap",
    "VcpuPlugged",
    "VcpuUnplugged",
    "Verdict",
    "VmInfo",
    "VmReset",
    "VmResumed",
    "VmState",
    "VmStatus",
    "VmStopped",
    "apic_id",
    "as_json",
    "build_fixed_slots",
    "build_slots",
    "creation_order",
    "needs_x2apic",
    "runs_single_threaded",
    "succeeded",
    "verdict_of",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazily(
        __name__,
        __all__,
        (
            "vcpumap",
            "ost",
            "vm",
            "layout",
            "mapping",
            "events",
            "transition",
            "verdicts",
            "report",
            "vmstate",
            "previous",
        ),
    )
