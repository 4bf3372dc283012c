"""Every error of qmpvcpu, in one tree, each with its evidence as attributes.

Floor 0: imports nothing of the package.

::

    QmpVcpuError
     ├ InvalidMapError (ValueError)      a set of vCPU ids that cannot be read
     ├ DomainXmlError (ValueError)       a domain document that is not what libvirt means
     ├ PlanError
     │  └ StepDeniedError                not sent: known beforehand that it cannot or must not be
     │     └ UnsupportedMachineError     the machine cannot do this to any of its CPUs
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
     ├ WaitTimeoutError (TimeoutError)   a condition did not come true in time
     └ RecordError                       the record on disk

``outcome`` tells what became of the VM: unchanged, changed, or unknown.
"""

import enum
import json
from collections.abc import Collection, Mapping
from typing import Any


class Outcome(enum.Enum):
    """What became of the VM when an error was raised."""

    UNCHANGED = "unchanged"
    CHANGED = "changed"
    UNKNOWN = "unknown"


class DenialReason(enum.Enum):
    """Why a step was never sent; the value is what a person reads."""

    UNKNOWN_VCPU = "no such vCPU"
    PART_OF_SLOT = "part of a slot that moves whole"
    SLOT_OCCUPIED = "already plugged"
    SLOT_EMPTY = "not plugged"
    IN_PROGRESS = "another change of it is in flight"
    BOOT_VCPU = "vCPU 0 never leaves"
    MACHINE_FULL = "no free slot"
    MACHINE_CANNOT_PLUG = "the machine cannot plug CPUs"
    MACHINE_CANNOT_UNPLUG = "the machine cannot unplug CPUs"
    MIGRATING = "the VM is migrating"
    MIGRATED_AWAY = "the VM has migrated away"
    FATAL = "this QEMU would not survive it"
    LIBVIRT_OWNED = "a running libvirtd would lose the VM"


class QmpVcpuError(Exception):
    """Base of all errors of qmpvcpu.

    Attributes:
        outcome: What became of the VM.
    """

    outcome: Outcome = Outcome.UNCHANGED


class InvalidMapError(QmpVcpuError, ValueError):
    """A set of vCPU ids cannot be read.

    Attributes:
        text: What was given.
    """

    def __init__(self, text: object, why: str) -> None:
        super().__init__(f"{text!r} is no set of vCPU ids: {why}")
        self.text = text


class DomainXmlError(QmpVcpuError, ValueError):
    """A domain document is not well-formed, not safe to read, or not what libvirt means.

    Attributes:
        line: Line of the document, from 1, or None.
    """

    def __init__(self, message: str, *, line: int | None = None) -> None:
        super().__init__(message if line is None else f"line {line}: {message}")
        self.line = line


class PlanError(QmpVcpuError):
    """What was asked cannot be planned; nothing was sent."""


class StepDeniedError(PlanError):
    """A change was not sent, because it could be known beforehand that it cannot or must not be.

    Attributes:
        action: ``"plug"`` or ``"unplug"``.
        vcpus: The vCPU ids that were named (empty for "the first free one").
        reason: Why, as a word to branch on.
        detail: Why, as a sentence.
    """

    def __init__(self, action: str, vcpus: Collection[int], reason: DenialReason, detail: str) -> None:
        super().__init__(f"{describe(action, vcpus)} denied, nothing was sent: {detail}")
        self.action = action
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
        super().__init__(f"cannot speak QMP on {address}: {why}" + (f" ({hint})" if hint else ""))
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


class RecordError(QmpVcpuError):
    """The record on disk cannot be read, written or trusted; the file there is as it was.

    Attributes:
        path: The record's path.
        why: What is wrong.
    """

    def __init__(self, path: object, why: str, *, outcome: Outcome = Outcome.UNCHANGED) -> None:
        super().__init__(f"record {path}: {why}")
        self.path = str(path)
        self.why = why
        self.outcome = outcome


def describe(action: str, vcpus: Collection[int]) -> str:
    """Name a step as errors and logs do, such as ``unplug of vCPU 3``."""
    if not vcpus:
        return f"{action} of a vCPU"
    if len(vcpus) == 1:
        return f"{action} of vCPU {next(iter(vcpus))}"
    return f"{action} of vCPUs {min(vcpus)}-{max(vcpus)}"


def shorten(value: object, limit: int = 300) -> str:
    """Return *value* as JSON text of at most about *limit* characters, for messages."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
