"""Plug and unplug specific vCPUs of a running QEMU, on evidence, straight over QMP.

The way in is ``attach``::

    async with qmpvcpu.attach("/run/vm.qmp") as vm:
        await vm.plug(3)
        await vm.unplug(3, timeout=30)

Other names are in their modules:
``qmpvcpu.errors``, ``qmpvcpu.events``, ``qmpvcpu.migration``, ``qmpvcpu.certify``, ``qmpvcpu.domainxml``,
``qmpvcpu.launch``, ``qmpvcpu.fleet``, ``qmpvcpu.testing``.
"""

from typing import TYPE_CHECKING

from qmpvcpu.lazy import lazily

if TYPE_CHECKING:
    from qmpvcpu.errors import (
        AgentSilentError,
        CommandRejectedError,
        ConfigDeniedError,
        DenialReason,
        DomainXmlError,
        GuestAgentError,
        GuestRefusedError,
        InvalidMapError,
        MalformedReplyError,
        MigrationError,
        MonitorConnectError,
        MonitorError,
        MonitorLostError,
        MonitorTimeoutError,
        Outcome,
        OutcomeUnknownError,
        PlacementError,
        PlanError,
        QmpVcpuError,
        RecordCorruptError,
        RecordError,
        RecordLockedError,
        StalePlanError,
        StepDeniedError,
        StepError,
        TransitionError,
        UnplugPendingError,
        UnplugRefusedError,
        UnprovenError,
        WaitTimeoutError,
    )
    from qmpvcpu.model.guest import GuestOs, GuestVcpu, KnownBy
    from qmpvcpu.model.layout import Layout, Slot, Vcpu
    from qmpvcpu.model.options import Affect, ChangeOptions, OnFailure, Proof, Recovery
    from qmpvcpu.model.placement import Place, Placement, PlacementPolicy, SchedPolicy, Scheduler
    from qmpvcpu.model.transition import StepReport, TransitionOutcome, TransitionReport
    from qmpvcpu.model.vcpumap import VcpuMap
    from qmpvcpu.model.verdicts import Denied, Pending, Plugged, Refused, Rejected, Unknown, Unplugged, Verdict
    from qmpvcpu.planning.plan import Plan
    from qmpvcpu.record.config import DomainConfig
    from qmpvcpu.vm.attaching import attach
    from qmpvcpu.vm.controller import UnplugRequest, VcpuController
    from qmpvcpu.vm.guest import Guest
    from qmpvcpu.vm.host import Host

__version__ = "0.1.0"

# A name is imported when it is first used (PEP 562): importing all of the package takes longer than most commands.
_HOMES = {
    "qmpvcpu.errors": (
        "AgentSilentError CommandRejectedError ConfigDeniedError DenialReason DomainXmlError GuestAgentError "
        "GuestRefusedError InvalidMapError MalformedReplyError MigrationError MonitorConnectError "
        "MonitorError MonitorLostError MonitorTimeoutError Outcome OutcomeUnknownError PlacementError PlanError "
        "QmpVcpuError RecordCorruptError RecordError RecordLockedError StalePlanError StepDeniedError StepError "
        "TransitionError UnplugPendingError UnplugRefusedError UnprovenError WaitTimeoutError"
    ),
    "qmpvcpu.model.guest": "GuestOs GuestVcpu KnownBy",
    "qmpvcpu.model.layout": "Layout Slot Vcpu",
    "qmpvcpu.model.options": "Affect ChangeOptions OnFailure Proof Recovery",
    "qmpvcpu.model.placement": "Place Placement PlacementPolicy SchedPolicy Scheduler",
    "qmpvcpu.model.transition": "StepReport TransitionOutcome TransitionReport",
    "qmpvcpu.model.vcpumap": "VcpuMap",
    "qmpvcpu.model.verdicts": "Denied Pending Plugged Refused Rejected Unknown Unplugged Verdict",
    "qmpvcpu.planning.plan": "Plan",
    "qmpvcpu.record.config": "DomainConfig",
    "qmpvcpu.vm.attaching": "attach",
    "qmpvcpu.vm.controller": "UnplugRequest VcpuController",
    "qmpvcpu.vm.guest": "Guest",
    "qmpvcpu.vm.host": "Host",
}

__all__ = [
    "Affect",
    "AgentSilentError",
    "ChangeOptions",
    "CommandRejectedError",
    "ConfigDeniedError",
    "DenialReason",
    "Denied",
    "DomainConfig",
    "DomainXmlError",
    "Guest",
    "GuestAgentError",
    "GuestOs",
    "GuestRefusedError",
    "GuestVcpu",
    "Host",
    "InvalidMapError",
    "KnownBy",
    "Layout",
    "MalformedReplyError",
    "MigrationError",
    "MonitorConnectError",
    "MonitorError",
    "MonitorLostError",
    "MonitorTimeoutError",
    "OnFailure",
    "Outcome",
    "OutcomeUnknownError",
    "Pending",
    "Place",
    "Placement",
    "PlacementError",
    "PlacementPolicy",
    "Plan",
    "PlanError",
    "Plugged",
    "Proof",
    "QmpVcpuError",
    "RecordCorruptError",
    "RecordError",
    "RecordLockedError",
    "Recovery",
    "Refused",
    "Rejected",
    "SchedPolicy",
    "Scheduler",
    "Slot",
    "StalePlanError",
    "StepDeniedError",
    "StepError",
    "StepReport",
    "TransitionError",
    "TransitionOutcome",
    "TransitionReport",
    "Unknown",
    "UnplugPendingError",
    "UnplugRefusedError",
    "UnplugRequest",
    "Unplugged",
    "UnprovenError",
    "Vcpu",
    "VcpuController",
    "VcpuMap",
    "Verdict",
    "WaitTimeoutError",
    "__version__",
    "attach",
]

if not TYPE_CHECKING:  # so that type checkers still find a name that is missing
    __getattr__, __dir__ = lazily(__name__, _HOMES)
