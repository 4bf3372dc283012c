"""Every error of qmpvcpu, in one tree, each with its evidence as attributes.

Floor 0: imports nothing of the package.

::

    QmpVcpuError
     ├ InvalidMapError (ValueError)      a set of vCPU ids that cannot be read
     ├ DomainXmlError (ValueError)       a domain document that is not what libvirt means
     │  └ DomainRuleError                it breaks a rule of libvirt's, which it names
     ├ PlanError
     │  ├ StepDeniedError                not sent: known beforehand that it cannot or must not be
     │  │  └ UnsupportedMachineError     the machine cannot do this to any of its CPUs
     │  ├ ConfigDeniedError              the next boot cannot be what was asked
     │  ├ StalePlanError                 the VM has changed since the plan was made
     │  └ ReplayMismatchError            not the QEMU that a VM can be built again in
     ├ MonitorError                      the QMP connection
     │  ├ MonitorConnectError            no session came about
     │  ├ MonitorTimeoutError            no reply within the command's deadline
     │  ├ MonitorLostError               the session ended under us
     │  └ MalformedReplyError            QEMU (or what poses as it) spoke nonsense
     ├ StepError                         one vCPU's change did not happen as asked
     │  ├ CommandRejectedError           QEMU answered with an error
     │  ├ UnplugRefusedError             the guest said no
     │  ├ UnplugPendingError             no answer by the deadline; it may still come
     │  ├ PlugUnprovenError              plugged, but the proof that was required did not come
     │  ├ PlugUndoneError                plugged, and ejected again by a removal asked for twice
     │  └ OutcomeUnknownError            sent, and nobody knows what became of it
     ├ TransitionError                   a map was not reached; carries the report (qmpvcpu.model.report)
     ├ SameVmError                       two addresses of a fleet lead to one VM
     ├ SocketDirectoryError              a directory cannot be looked into for sockets
     ├ MigrationError                    a VM that moves to another QEMU
     │  ├ TargetMismatchError            source and target differ (qmpvcpu.planning.migrating)
     │  ├ TargetLostError                the destination has not taken the VM over
     │  └ TakeBackError                  the source was not made to run it again
     ├ WaitTimeoutError (TimeoutError)   a condition did not come true in time
     └ RecordError                       the record on disk
        ├ RecordCorruptError             what is there is no record that can be trusted
        └ RecordLockedError              another process, or attachment, keeps it

``outcome`` tells what became of the VM: unchanged, changed, or unknown.
"""

from qmpvcpu.errors.base import (
    DomainXmlError,
    InvalidMapError,
    Outcome,
    QmpVcpuError,
    WaitTimeoutError,
    clip,
    describe,
    printable,
    shorten,
)
from qmpvcpu.errors.domainxml import DomainRule, DomainRuleError, RuleStage
from qmpvcpu.errors.fleet import SameVmError, SocketDirectoryError
from qmpvcpu.errors.migration import MigrationError, TakeBackError, TargetLostError
from qmpvcpu.errors.monitor import (
    MalformedReplyError,
    MonitorConnectError,
    MonitorError,
    MonitorLostError,
    MonitorTimeoutError,
)
from qmpvcpu.errors.plan import (
    ConfigDeniedError,
    DenialReason,
    PlanError,
    ReplayMismatchError,
    StalePlanError,
    StepDeniedError,
    UnsupportedMachineError,
)
from qmpvcpu.errors.record import RecordCorruptError, RecordError, RecordLockedError
from qmpvcpu.errors.step import (
    CommandRejectedError,
    OutcomeUnknownError,
    PlugUndoneError,
    PlugUnprovenError,
    StepError,
    UnplugPendingError,
    UnplugRefusedError,
)

__all__ = [
    "CommandRejectedError",
    "ConfigDeniedError",
    "DenialReason",
    "DomainRule",
    "DomainRuleError",
    "DomainXmlError",
    "InvalidMapError",
    "MalformedReplyError",
    "MigrationError",
    "MonitorConnectError",
    "MonitorError",
    "MonitorLostError",
    "MonitorTimeoutError",
    "Outcome",
    "OutcomeUnknownError",
    "PlanError",
    "PlugUndoneError",
    "PlugUnprovenError",
    "QmpVcpuError",
    "RecordCorruptError",
    "RecordError",
    "RecordLockedError",
    "ReplayMismatchError",
    "RuleStage",
    "SameVmError",
    "SocketDirectoryError",
    "StalePlanError",
    "StepDeniedError",
    "StepError",
    "TakeBackError",
    "TargetLostError",
    "UnplugPendingError",
    "UnplugRefusedError",
    "UnsupportedMachineError",
    "WaitTimeoutError",
    "clip",
    "describe",
    "printable",
    "shorten",
]
