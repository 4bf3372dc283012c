"""Floor 0: the values that everything else speaks in.

Rule of this floor: frozen values and pure functions; no I/O, no clock, nothing of the wire's spelling beyond the
names of QEMU's properties, which are passed through unchanged.
"""

from qmpvcpu.model.events import (
    Disconnected,
    Event,
    LayoutChanged,
    MigrationChanged,
    Origin,
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
from qmpvcpu.model.vm import Capabilities, KnownFault, Topology, VmInfo, VmStatus, needs_x2apic

__all__ = [
    "Capabilities",
    "CpuProps",
    "Denied",
    "Disconnected",
    "Event",
    "KnownFault",
    "Layout",
    "LayoutChanged",
    "MigrationChanged",
    "Origin",
    "OstAnswer",
    "OstStatus",
    "Pending",
    "Plugged",
    "Proof",
    "Refused",
    "Rejected",
    "Slot",
    "SlotReading",
    "ThreadReading",
    "Topology",
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
    "VmStatus",
    "VmStopped",
    "as_json",
    "build_fixed_slots",
    "build_slots",
    "creation_order",
    "needs_x2apic",
    "runs_single_threaded",
    "verdict_of",
]
