"""One vCPU's change did not happen as asked."""

from collections.abc import Collection, Mapping
from typing import Any

from qmpvcpu.errors.base import Outcome, QmpVcpuError, describe


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
