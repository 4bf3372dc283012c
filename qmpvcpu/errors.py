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

import enum
import json
from collections.abc import Collection, Mapping
from typing import Any, Final

_MOST_NAMED: Final = 8


class Outcome(enum.Enum):
    """What became of the VM when an error was raised."""

    UNCHANGED = "unchanged"
    CHANGED = "changed"
    UNKNOWN = "unknown"


class QmpVcpuError(Exception):
    """Base of all errors of qmpvcpu.

    Attributes:
        outcome: What became of the VM.
    """

    outcome: Outcome = Outcome.UNCHANGED

    def __str__(self) -> str:
        return printable(super().__str__())


class InvalidMapError(QmpVcpuError, ValueError):
    """A set of vCPU ids cannot be read.

    Attributes:
        text: What was given.
    """

    def __init__(self, text: object, why: str) -> None:
        super().__init__(f"{shorten(text)} is no set of vCPU ids: {why}")
        self.text = text


class DomainXmlError(QmpVcpuError, ValueError):
    """A domain document is not well-formed, not safe to read, or not what libvirt means.

    Attributes:
        line: Line of the document, from 1, or None.
    """

    def __init__(self, message: str, *, line: int | None = None) -> None:
        super().__init__(message if line is None else f"line {line}: {message}")
        self.line = line


class WaitTimeoutError(QmpVcpuError, TimeoutError):
    """A condition that was waited for did not come true in time; nothing was changed by waiting.

    Attributes:
        timeout: The deadline, in seconds.
        enabled: The vCPUs that are plugged, as text.
        pending: The vCPUs whose removal is unanswered, as text.
    """

    def __init__(self, timeout: float, enabled: str, pending: str) -> None:
        waiting = f", of which {pending} pending" if pending else ""
        super().__init__(f"the condition did not hold within {timeout:g} s; plugged are {enabled}{waiting}")
        self.timeout = timeout
        self.enabled = enabled
        self.pending = pending


def describe(action: str, vcpus: Collection[int]) -> str:
    """Name a step as errors and logs do, such as ``unplug of vCPU 3``."""
    if not vcpus:
        return action
    if len(vcpus) == 1:
        return f"{action} of vCPU {next(iter(vcpus))}"
    if max(vcpus) - min(vcpus) == len(vcpus) - 1:
        return f"{action} of vCPUs {min(vcpus)}-{max(vcpus)}"
    shown = sorted(vcpus)[:_MOST_NAMED]
    return f"{action} of vCPUs {','.join(map(str, shown))}{',...' if len(vcpus) > _MOST_NAMED else ''}"


def printable(text: str, *, lines: bool = False) -> str:
    """Return *text* from outside as it may reach a terminal, a log or a report: what is not printable is escaped.

    Escaped as in Python are control characters (ESC, 0x80 to 0x9f, line breaks), characters that turn the direction
    of text or take no room, and bytes of file names that are no text. Printable text stays as it is, backslashes too,
    so that escaping twice changes nothing.

    Args:
        text: The text.
        lines: Leave line breaks and tabs, for text of our own that has several lines.

    Returns:
        The text in printable characters.
    """
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode() for each in text
    )


def shorten(value: object, limit: int = 300) -> str:
    """Return *value* as JSON text of at most about *limit* characters, for messages."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        try:
            text = repr(value)
        except (ValueError, RecursionError):  # an int of thousands of digits, or a list in a list in a list ...
            text = f"a very large {type(value).__name__}"
    return clip(text, limit)


def clip(text: str, limit: int = 300) -> str:
    """Return at most about *limit* characters of a peer's *text*, which can be encoded.

    JSON can say half of a surrogate pair, and then no file, terminal or socket takes the text.
    """
    shown = text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
    return shown.encode(errors="backslashreplace").decode()


_MOST_QUOTED = 60


class DomainRule(enum.Enum):
    """A rule of libvirt's; the value is the rule as a person reads it."""

    # What it is that is read.
    NAME = "a domain has a name"
    UUID = "a UUID is 32 hexadecimal digits, with dashes between bytes"
    TYPE = "a domain of QEMU's is of the type kvm or qemu"
    # The words that values are made of.
    ATTRIBUTE_MISSING = "this attribute cannot be left out"
    NOT_A_NUMBER = "it is a whole number, 0 to 4294967295, without space after it"
    NOT_AN_INTEGER = "it is a whole number, -2147483648 to 2147483647, without space after it"
    NOT_YES_OR_NO = "it is yes or no, in small letters"
    NOT_A_CHOICE = "it is one of the words that libvirt knows here"
    CPUSET_UNREADABLE = (
        "a cpuset is ids and ranges from 0 to 16383 with commas between them, and ^ before one to leave out"
    )
    CPUSET_EMPTY = "a cpuset has at least one CPU"
    # <memory>, and the memory of a cell.
    MEMORY_NOT_A_NUMBER = "memory is a whole number, without space after it"
    MEMORY_UNIT = "a unit of memory is bytes, or K, M, G, T, P or E, alone (1024) or with iB (1024) or B (1000)"
    MEMORY_TOO_LARGE = "memory is less than 2^53 KiB"
    # <vcpu>
    COUNT_NOT_A_NUMBER = "the number of vCPUs is a whole number, without space around it"
    COUNT_ZERO = "a VM has at least one vCPU"
    COUNT_NEGATIVE = "the number of vCPUs has no minus before it"
    COUNT_TOO_HIGH = "no machine has more than 16384 vCPUs; libvirt takes memory for each first, and dies of too many"
    CURRENT_ABOVE_MAX = "no more vCPUs are on than there can be"
    # <vcpus>
    ID_ABOVE_MAX = "vCPU ids run from 0 to one below the number in <vcpu>"
    VCPU_0_OFF = "vCPU 0 is always on"
    VCPU_0_HOTPLUGGABLE = "vCPU 0 is not hotpluggable"
    VCPU_0_NOT_FIRST = "vCPU 0 is the first in the order"
    ORDER_INCOMPLETE = "either every vCPU that is on has an order, or none has"
    STARTED_WITH_AFTER_HOTPLUGGABLE = (
        "a vCPU that QEMU starts with does not follow, by its id, one that is hotpluggable"
    )
    STARTED_WITH_DESCENDING = "vCPUs that QEMU starts with are in order by their ids"
    OFF_NOT_HOTPLUGGABLE = "a vCPU that is off is hotpluggable"
    ORDER_TWICE = "no two vCPUs (or slots of vCPUs) have the same order, be they on or off"
    ORDER_ABOVE_MAX = "an order is no higher than the number of vCPUs, be they on or off"
    PART_OF_CORE = "on pseries the vCPUs that are on make up whole cores"
    CORE_DIFFERS = "on pseries the vCPUs of one core are alike"
    # <cputune>
    TUNE_NOT_A_NUMBER = "it is a whole number"
    TUNE_OUT_OF_RANGE = "it is 0, or in the kernel's range"
    PIN_WITHOUT_CPUSET = "a pin has a cpuset"
    PIN_TWICE = "a vCPU is pinned once"
    EMULATORPIN_TWICE = "there is one <emulatorpin> at most"
    SCHED_ABOVE_MAX = "a scheduler is for vCPUs that there can be"
    SCHED_TWICE = "a vCPU has one scheduler"
    # <cpu>
    MIGRATABLE_MODE = "only a host-passthrough or maximum CPU is migratable or not"
    FEATURE_WITHOUT_MODEL = "features are those of a model, which must be named"
    FEATURE_WITHOUT_NAME = "a feature has a name"
    FEATURE_TWICE = "a feature is named once"
    TOPOLOGY_ZERO = "a level of the topology has at least one member"
    TOPOLOGY_PRODUCT = "sockets, dies, clusters, cores and threads multiply to the number of vCPUs that there can be"
    # <numa>
    NUMA_WITHOUT_CELLS = "<numa> has at least one <cell>"
    NUMA_ID_GAP = "the ids of cells run from 0 without a gap"
    NUMA_ID_TWICE = "no two cells have the same id"
    NUMA_OVERLAP = "a vCPU is in one cell"
    NUMA_TOO_MANY = "the cells have no more vCPUs than there can be"
    NUMA_ABOVE_MAX = "the cells have no vCPU but those that there can be"
    # The machine.
    MACHINE_LIMIT = "a machine type has a highest number of vCPUs"
    EIM_MISSING = "more than 255 vCPUs of x86 need a q35 with an <iommu> whose <driver> has eim='on'"


class RuleStage(enum.Enum):
    """When libvirt refuses what breaks a rule."""

    DEFINE = "define"
    START = "start"


class DomainRuleError(DomainXmlError):
    """A domain document breaks one of libvirt's rules for vCPUs.

    Attributes:
        rule: Which, as a word to branch on.
        element: The way to the element from ``<domain>`` down, such as ``vcpus/vcpu``; ``domain`` for that itself.
        attribute: The attribute's name, or None where it is the element, or its text.
        value: What stands there, or None where nothing does.
        stage: Whether libvirt refuses it at define, or only at start.
        libvirt_says: What libvirt says, in its own words (9.0.0), or what becomes of it.
    """

    def __init__(
        self,
        rule: DomainRule,
        *,
        element: str,
        attribute: str | None = None,
        value: str | None = None,
        line: int | None = None,
        stage: RuleStage = RuleStage.DEFINE,
        detail: str = "",
        libvirt_says: str,
    ) -> None:
        what = f" {attribute}" if attribute else ""
        given = "" if value is None else f" {shorten(value, _MOST_QUOTED)}"
        why = f"{rule.value} ({detail})" if detail else rule.value
        super().__init__(
            f"<{element}>{what}{given}: {why}; libvirt at {stage.value}: {_shortened(libvirt_says)}", line=line
        )
        self.rule = rule
        self.element = element
        self.attribute = attribute
        self.value = value
        self.stage = stage
        self.libvirt_says = libvirt_says


def _shortened(text: str) -> str:
    # libvirt quotes what it was given, whole, in the middle or at the end.
    return text if len(text) <= 4 * _MOST_QUOTED else f"{text[: 2 * _MOST_QUOTED]}...{text[-2 * _MOST_QUOTED :]}"


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


class MonitorError(QmpVcpuError):
    """Something is wrong with the QMP connection."""


class MonitorConnectError(MonitorError):
    """No QMP session came about.

    Attributes:
        address: What was connected to, as text.
        why: What happened.
        hint: What the kernel tells about the peer and what to do about it, or "".
    """

    def __init__(self, address: str, why: str, *, hint: str = "") -> None:
        super().__init__(f"cannot speak QMP on {clip(address)}: {why}" + (f" ({hint})" if hint else ""))
        self.address = address
        self.why = why
        self.hint = hint


class MonitorTimeoutError(MonitorError, TimeoutError):
    """QEMU did not reply to a command within its deadline; it may still carry it out.

    Attributes:
        command: The QMP command.
        timeout: The deadline, in seconds.
    """

    outcome = Outcome.UNKNOWN

    def __init__(self, command: str, timeout: float) -> None:
        super().__init__(f"QEMU did not reply to {command} within {timeout:g} s")
        self.command = command
        self.timeout = timeout


class MonitorLostError(MonitorError, ConnectionError):
    """The QMP session ended: QEMU died, hung up, or this side closed it.

    Attributes:
        why: What ended it.
        last_sent: The QMP command that was in flight, or None.
    """

    outcome = Outcome.UNKNOWN

    def __init__(self, why: str, *, last_sent: str | None = None) -> None:
        flight = f" with {last_sent} in flight" if last_sent else ""
        super().__init__(f"the QMP connection is lost{flight}: {why}")
        self.why = why
        self.last_sent = last_sent


class MalformedReplyError(MonitorError):
    """A reply is not of the shape that QEMU's schema promises.

    Attributes:
        command: The QMP command.
        reply: What came back.
    """

    outcome = Outcome.UNKNOWN

    def __init__(self, command: str, why: str, reply: object) -> None:
        super().__init__(f"malformed reply to {command}: {why}: {shorten(reply)}")
        self.command = command
        self.reply = reply


class StepError(QmpVcpuError):
    """One vCPU's change did not happen as asked.

    Attributes:
        action: ``"plug"`` or ``"unplug"``, or None where a plain QMP command failed.
        vcpus: The vCPU ids concerned.
    """

    def __init__(self, message: str, *, action: str | None = None, vcpus: Collection[int] = ()) -> None:
        super().__init__(message)
        self.action = action
        self.vcpus = tuple(vcpus)


class CommandRejectedError(StepError):
    """QEMU answered a command with an error.

    Nearly every error of QEMU is a GenericError, and its text changes between versions: it is kept as
    evidence, never branched on.

    Attributes:
        error_class: QEMU's error class, such as ``GenericError`` or ``DeviceNotFound``.
        desc: QEMU's text.
        sent: The message that was sent.
        hint: What it means, as far as a look at the VM afterwards tells, or "".
    """

    def __init__(
        self,
        error_class: str,
        desc: str,
        sent: Mapping[str, Any],
        *,
        action: str | None = None,
        vcpus: Collection[int] = (),
        hint: str = "",
    ) -> None:
        what = describe(action, vcpus) if action else str(sent.get("execute", "command"))
        message = f"{what} rejected by QEMU: {error_class}: {desc}" + (f" ({hint})" if hint else "")
        super().__init__(message, action=action, vcpus=vcpus)
        self.error_class = error_class
        self.desc = desc
        self.sent = dict(sent)
        self.hint = hint


class UnplugRefusedError(StepError):
    """The guest refused to give a vCPU up; it is still plugged, and may be asked for again.

    Attributes:
        code: ACPI _OST status code, or None where the machine has no such code.
        reason: The code in words.
    """

    def __init__(self, vcpus: Collection[int], code: int | None, reason: str) -> None:
        shown = "" if code is None else f" with OST status {code:#04x}"
        super().__init__(
            f"{describe('unplug', vcpus)} refused by the guest{shown}: {reason}; still plugged, may be asked again",
            action="unplug",
            vcpus=vcpus,
        )
        self.code = code
        self.reason = reason


class UnplugPendingError(StepError):
    """The guest had not answered when the deadline passed; its answer may still come, at any time.

    Attributes:
        deadline_s: The deadline, in seconds from QEMU's acceptance of the request.
        acknowledged: True if the guest said that it works on it, False if it has not reacted at all.
    """

    outcome = Outcome.UNKNOWN

    def __init__(self, vcpus: Collection[int], deadline_s: float, *, acknowledged: bool) -> None:
        seen = "the guest works on it" if acknowledged else "the guest has not reacted"
        super().__init__(
            f"{describe('unplug', vcpus)} pending after {deadline_s:g} s: {seen}; still plugged. QEMU never forgets"
            " the request: it may be answered at any time, even after a reset, or with the next hotplug of any vCPU",
            action="unplug",
            vcpus=vcpus,
        )
        self.deadline_s = deadline_s
        self.acknowledged = acknowledged


class PlugUnprovenError(StepError):
    """A vCPU is plugged, but the guest's acknowledgement that was required did not come or was a no.

    Attributes:
        code: ACPI _OST status code of the guest's answer, or None if it did not answer.
        reason: The same in words.
    """

    outcome = Outcome.CHANGED

    def __init__(self, vcpus: Collection[int], code: int | None, reason: str) -> None:
        shown = "" if code is None else f" (OST status {code:#04x})"
        super().__init__(
            f"{describe('plug', vcpus)}: plugged, but not acknowledged by the guest: {reason}{shown}",
            action="plug",
            vcpus=vcpus,
        )
        self.code = code
        self.reason = reason


class PlugUndoneError(StepError):
    """A vCPU was plugged, and at once ejected by an earlier removal that had been asked for twice."""

    def __init__(self, vcpus: Collection[int]) -> None:
        super().__init__(
            f"{describe('plug', vcpus)}: plugged, then ejected by the guest, which still had a second removal of this"
            " slot queued (another QMP client asked for it too); the slot is empty, and may be plugged again",
            action="plug",
            vcpus=vcpus,
        )


class OutcomeUnknownError(StepError):
    """A change was sent, and nobody knows whether QEMU carried it out; the next read tells."""

    outcome = Outcome.UNKNOWN

    def __init__(self, action: str, vcpus: Collection[int], why: str) -> None:
        super().__init__(
            f"{describe(action, vcpus)} was sent, its outcome is unknown: {why}", action=action, vcpus=vcpus
        )


class MigrationError(QmpVcpuError):
    """A VM cannot be moved, or cannot be said to have arrived."""


class TargetLostError(MigrationError):
    """The destination did not take the VM over, as far as can be told: it is gone, silent, or still waiting.

    Attributes:
        vm: The VM's name.
        why: What was seen of the destination.
    """

    outcome = Outcome.UNKNOWN

    def __init__(self, vm: str, why: str) -> None:
        super().__init__(
            f"the destination of VM {vm!r} has not taken it over: {why}. The source still has the VM, even where it"
            " reports completed and postmigrate: do not quit it; make sure that the destination is dead, then"
            " take_back(destination_is_gone=True) on the source"
        )
        self.vm = vm
        self.why = why


class TakeBackError(MigrationError):
    """The source was not made to run the VM again; or it was, and does not.

    Attributes:
        vm: The VM's name.
        why: What stands against it.
        run_state: What QEMU says that the VM does, or None if it was not asked.
    """

    def __init__(
        self, vm: str, why: str, *, run_state: str | None = None, outcome: Outcome = Outcome.UNCHANGED
    ) -> None:
        super().__init__(f"VM {vm!r} is not taken back: {why}")
        self.vm = vm
        self.why = why
        self.run_state = run_state
        self.outcome = outcome


class RecordError(QmpVcpuError):
    """The record, or the document of the next boot, cannot be read, written or trusted; the file is as it was.

    Attributes:
        path: The file's path.
        why: What is wrong.
    """

    def __init__(self, path: object, why: str, *, outcome: Outcome = Outcome.UNCHANGED) -> None:
        super().__init__(f"{path}: {why}")
        self.path = str(path)
        self.why = why
        self.outcome = outcome


class RecordCorruptError(RecordError):
    """What is on disk is no record that can be trusted or replaced without loss; it is left alone.

    Torn, hostile, damaged, too large, written by a newer version, or a document that is not ours.
    """


class RecordLockedError(RecordError):
    """Somebody else keeps this record.

    Attributes:
        pid: The process that holds it, or None where that cannot be told.
    """

    def __init__(self, path: object, pid: int | None, who: str) -> None:
        super().__init__(path, f"locked by {who}: it has one keeper at a time")
        self.pid = pid


class SameVmError(QmpVcpuError):
    """Two addresses of a fleet lead to one VM, which is worked on once, under the other address; nothing was sent.

    Attributes:
        address: This address.
        other: The address under which the fleet has the VM.
    """

    def __init__(self, address: str, other: str, *, same_socket: bool) -> None:
        what = "the same socket as" if same_socket else "another QMP socket of the VM that this fleet has as"
        super().__init__(f"{address} is {what} {other}: it is worked on once, and nothing was sent here")
        self.address = address
        self.other = other


class SocketDirectoryError(QmpVcpuError):
    """A directory cannot be looked into for sockets.

    Attributes:
        path: The directory.
        why: What the kernel said.
    """

    def __init__(self, path: object, why: str) -> None:
        super().__init__(f"cannot look into {path} for QMP sockets: {why}")
        self.path = str(path)
        self.why = why
