"""Every error of qmpvcpu, in one tree, each with its evidence as attributes.

Floor 0: imports nothing of the package.

::

    QmpVcpuError
     ├ InvalidMapError (ValueError)      text or ids that are not a set of vCPU ids
     ├ DomainXmlError (ValueError)       a domain document that cannot be read as libvirt reads it
     │  └ DomainRuleError                it breaks a rule of libvirt, which the error names
     ├ PlanError                         the request cannot be planned; nothing was sent
     │  ├ StepDeniedError                a change that cannot work, or must not be made
     │  │  └ UnsupportedMachineError     the machine cannot do this to any of its CPUs
     │  ├ ConfigDeniedError              a change of the next boot that is not possible
     │  ├ StalePlanError                 the VM has changed since the plan was made
     │  └ ReplayMismatchError            this QEMU cannot get the vCPUs of the VM
     ├ MonitorError                      the QMP connection
     │  ├ MonitorConnectError            no session could be opened
     │  ├ MonitorTimeoutError            no reply within the command's deadline
     │  ├ MonitorLostError               the session ended
     │  └ MalformedReplyError            the reply is not what QEMU's schema promises
     ├ GuestAgentError                   the guest agent; QMP goes on without it
     │  ├ AgentConnectError              no agent can be reached on this address
     │  ├ AgentSilentError               no answer by the deadline
     │  ├ AgentLostError                 the agent, or the connection to it, went away meanwhile
     │  ├ AgentForbiddenError            the agent may not, or cannot, carry out the command
     │  ├ GuestRefusedError              the guest's system said no
     │  ├ MalformedAnswerError           the answer is not what the agent's schema promises
     │  └ GuestNumberUnknownError        it is not known which of the guest's CPUs a vCPU is
     ├ StepError                         one vCPU's change did not happen as requested
     │  ├ CommandRejectedError           QEMU answered with an error
     │  ├ UnplugRefusedError             the guest said no
     │  ├ UnplugPendingError             no answer by the deadline; it may still come
     │  ├ UnprovenError                  plugged, but the required proof did not come
     │  ├ PlacementError                 its threads are not in their place on the host
     │  ├ PlugUndoneError                plugged, then ejected by an earlier removal requested twice
     │  └ OutcomeUnknownError            sent, and the outcome is unknown
     ├ TransitionError                   a map was not reached; carries the report
     ├ HostError                         the host refuses what was asked for a QEMU thread
     │  ├ HostBusyError                  another program does the same just now
     │  └ ThreadGoneError                the thread has ended
     ├ SameVmError                       two addresses of a fleet lead to one VM
     ├ SameNameError                     VMs of several hosts have the name that was to tell one
     ├ SocketDirectoryError              a directory of sockets cannot be read
     ├ MigrationError                    moving a VM to another QEMU
     │  ├ TargetMismatchError            source and target differ
     │  ├ TargetLostError                the destination has not taken the VM over
     │  └ TakeBackError                  the source does not run the VM again
     ├ HostsError                        the NATS server, or another host
     │  ├ ServerConnectError             no connection to it could be opened
     │  ├ ServerLostError                it did not answer in time, or cannot be reached any more
     │  ├ UnfitServerError               it lacks something that many hosts need
     │  ├ ServerForbiddenError           it does not let this user do it
     │  ├ StaleError                     another writer was faster
     │  ├ LeaseTakenError                somebody else holds the lease
     │  ├ TooLongError (ValueError)      a message is longer than the server takes
     │  ├ HostSilentError                no agent answered there
     │  ├ RequestRefusedError            an agent refuses what it was asked for
     │  ├ NameTakenError                 several VMs of one host have one name
     │  ├ HostFailedError                an agent failed while it answered
     │  ├ CampaignError                  there is no such campaign, or this cannot be done to it
     │  └ WishError                      a wish was not carried out, or its outcome is unknown
     ├ WaitTimeoutError (TimeoutError)   a condition did not become true in time
     └ RecordError                       the record on disk
        ├ RecordCorruptError             the file is not a record that can be trusted
        └ RecordLockedError              another process or attachment holds the record

``outcome`` says what happened to the VM: unchanged, changed, or unknown. ``ids`` is always a ``VcpuMap``, as in
verdicts, events and reports.
"""

import contextlib
import enum
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qmpvcpu.domainxml.domainrule import DomainRule, RuleStage
    from qmpvcpu.model.options import Proof
    from qmpvcpu.model.transition import TransitionReport
    from qmpvcpu.model.vcpumap import VcpuMap
    from qmpvcpu.model.wish import WishPhase
    from qmpvcpu.planning.compatibility import Difference

_MOST_NAMED: Final = 8
_MOST_QUOTED: Final = 60


class Outcome(enum.Enum):
    """What happened to the VM by the time an error was raised."""

    UNCHANGED = "unchanged"
    CHANGED = "changed"
    UNKNOWN = "unknown"


class QmpVcpuError(Exception):
    """Base of all errors of qmpvcpu.

    Attributes:
        outcome: What happened to the VM.
    """

    outcome: Outcome = Outcome.UNCHANGED

    def __str__(self) -> str:
        return printable(super().__str__())


class InvalidMapError(QmpVcpuError, ValueError):
    """The input is not a set of vCPU ids.

    Attributes:
        text: The input.
    """

    def __init__(self, text: object, why: str) -> None:
        super().__init__(f"{shorten(text)} is not a set of vCPU ids: {why}")
        self.text = text


class DomainXmlError(QmpVcpuError, ValueError):
    """A domain document is not well-formed, not safe to read, or not a domain as libvirt reads it.

    Attributes:
        line: Line of the document, from 1, or None.
        path: The file that it was read from, or None where it came as bytes.
    """

    path: str | None = None

    def __init__(self, message: str, *, line: int | None = None) -> None:
        super().__init__(message if line is None else f"line {line}: {message}")
        self.line = line

    def __str__(self) -> str:
        """Return the message; the file's name comes first."""
        said = super().__str__()
        return said if self.path is None else f"{printable(self.path)}: {said}"


@contextlib.contextmanager
def naming_file(path: "str | os.PathLike[str]") -> Iterator[None]:
    """Have each ``DomainXmlError`` of the block name the file at *path*, which its document was read from."""
    try:
        yield
    except DomainXmlError as error:
        error.path = os.fspath(path)
        raise


class DomainRuleError(DomainXmlError):
    """A domain document breaks one of libvirt's rules for vCPUs.

    Attributes:
        rule: The rule, as a word to branch on.
        element: The path of the element below ``<domain>``, such as ``vcpus/vcpu``; ``domain`` for the root.
        attribute: The attribute's name, or None if it is about the element or its text.
        value: The value in the document, or None if it is missing.
        stage: Whether libvirt refuses the document at define, or only at start.
        libvirt_says: libvirt's own message (9.0.0), or what happens instead of one.
    """

    def __init__(
        self,
        rule: "DomainRule",
        *,
        element: str,
        attribute: str | None = None,
        value: str | None = None,
        line: int | None = None,
        stage: "RuleStage",
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
    # libvirt quotes the whole value, in the middle or at the end.
    return text if len(text) <= 4 * _MOST_QUOTED else f"{text[: 2 * _MOST_QUOTED]}...{text[-2 * _MOST_QUOTED :]}"


class DenialReason(enum.Enum):
    """Why a step was never sent; the value is the text for people."""

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
    MACHINE_CANNOT_ACKNOWLEDGE = "guests of this machine acknowledge no plug"
    CANNOT_TELL_STARTED = "nothing tells whether a vCPU of this VM has started"
    NO_AGENT = "there is no guest agent to ask"
    CANNOT_PLACE = "its threads cannot be put in their place on the host"
    MIGRATING = "the VM is migrating"
    MIGRATED_AWAY = "the VM has migrated away"
    EXPORTED = "the VM is exported, to be migrated"
    FATAL = "this QEMU would not survive it"
    CONFIDENTIAL = "a confidential VM takes no vCPU once it has been launched"
    GUEST_CANNOT_UNPLUG = "the guest's system releases no vCPU"
    LIBVIRT_OWNED = "a running libvirtd would lose the VM"
    COUNT_KEEPS_BOOT = "a count takes no boot vCPU out"
    COUNT_SPLITS_SLOT = "no whole slots make up this count"
    NO_CONFIG = "nothing keeps the next boot"
    TOPOLOGY_MISMATCH = "the topology is for another number of vCPUs"
    NUMA_MISMATCH = "a NUMA cell has vCPUs beyond it"
    RECORD_MAXIMUM = "a record says how many vCPUs the running VM can have"


class PlanError(QmpVcpuError):
    """The request cannot be planned; nothing was sent."""


class StepDeniedError(PlanError):
    """A change was not sent, because it cannot work or must not be made.

    Attributes:
        action: ``"plug"``, ``"unplug"``, ``"count"``, ``"export"`` or ``"placing"``.
        ids: The vCPUs that were named; empty for "the first free one", for a count, and where no VM can have the id.
        reason: Why, as a word to branch on.
        detail: Why, as a sentence.
    """

    def __init__(self, action: str, ids: "VcpuMap", reason: DenialReason, detail: str) -> None:
        super().__init__(f"{describe(action, ids)} denied, nothing was sent: {detail}")
        self.action = action
        self.ids = ids
        self.reason = reason
        self.detail = detail


class UnsupportedMachineError(StepDeniedError):
    """The VM's machine cannot do this to any of its CPUs.

    Attributes:
        machine: The machine type, as in QEMU's ``-machine``.
    """

    def __init__(self, action: str, ids: "VcpuMap", reason: DenialReason, detail: str, *, machine: str) -> None:
        super().__init__(action, ids, reason, detail)
        self.machine = machine


class ConfigDeniedError(PlanError):
    """The next boot cannot be what was requested; nothing was sent, and the document is as it was.

    Attributes:
        asked: The request, in words.
        ids: The vCPUs concerned; empty if it is about none in particular, or no VM can have the id.
        reason: Why, as a word to branch on.
        detail: Why, as a sentence.
    """

    def __init__(self, asked: str, ids: "VcpuMap", reason: DenialReason, detail: str) -> None:
        super().__init__(f"{asked} at the next boot denied, nothing was changed: {detail}")
        self.asked = asked
        self.ids = ids
        self.reason = reason
        self.detail = detail


class StalePlanError(PlanError):
    """The VM has changed since the plan was made; nothing was sent. Plan again.

    Attributes:
        planned: The vCPUs that were plugged when the plan was made.
        observed: Those that are plugged now; equal if other CPUs, or other pending removals, make the difference.
        why: The difference, in words.
    """

    def __init__(self, planned: "VcpuMap", observed: "VcpuMap", why: str) -> None:
        super().__init__(f"the plan is stale, nothing was sent: {why}; plan again")
        self.planned = planned
        self.observed = observed
        self.why = why


class ReplayMismatchError(PlanError):
    """This QEMU cannot get the vCPUs of the VM; nothing was sent.

    With ``outcome`` CHANGED everything was sent and accepted, but the last read shows other vCPUs.

    Attributes:
        differences: How this QEMU differs, one sentence each.
    """

    def __init__(self, differences: Collection[str], *, outcome: Outcome = Outcome.UNCHANGED) -> None:
        what = "replay denied, nothing was sent" if outcome is Outcome.UNCHANGED else "the replay failed"
        super().__init__(f"{what}: {'; '.join(differences)}")
        self.outcome = outcome
        self.differences = tuple(differences)


class MonitorError(QmpVcpuError):
    """Something is wrong with the QMP connection."""


class Unreachable(enum.Enum):
    """What keeps a session from being opened, for programs that act on it."""

    HELD = "held"
    """Most likely another client has the socket, which serves one at a time."""
    FORBIDDEN = "forbidden"
    """This user may not use the socket."""
    ABSENT = "absent"
    """Nobody listens there."""
    LEFT_BEHIND = "left behind"
    """The socket is that of a process that has ended."""
    UNFIT = "unfit"
    """QEMU has no such server there, or one that must be started otherwise."""
    OTHER = "other"
    """None of these."""


class MonitorConnectError(MonitorError):
    """No QMP session could be opened.

    Attributes:
        address: The address, as text.
        why: What happened.
        reason: The same for programs.
        hint: What the kernel knows about the peer and what to do about it, or "".
    """

    def __init__(self, address: str, why: str, *, reason: Unreachable = Unreachable.OTHER, hint: str = "") -> None:
        super().__init__(f"cannot speak QMP on {clip(address)}: {why}" + (f" ({hint})" if hint else ""))
        self.address = address
        self.why = why
        self.reason = reason
        self.hint = hint


class MonitorTimeoutError(MonitorError, TimeoutError):
    """QEMU did not reply to a command within its deadline; it may still carry it out.

    Attributes:
        command: The QMP command.
        timeout: The deadline, in seconds.
        hint: Why QEMU is silent where the kernel knows, such as that it is stopped; or "".
    """

    def __init__(self, command: str, timeout: float, *, hint: str = "") -> None:
        why = f" ({hint})" if hint else ""
        super().__init__(f"QEMU did not reply to {command} within {timeout:g} s{why}")
        self.command = command
        self.timeout = timeout
        self.hint = hint
        self.outcome = _outcome_of(command)


class MonitorLostError(MonitorError, ConnectionError):
    """The QMP session ended: QEMU died, hung up, or this side closed it.

    ``outcome`` is UNCHANGED if nothing had been sent that changes a VM.

    Attributes:
        why: What ended it.
        hung_up: True if QEMU closed it, as it does when it dies.
        last_sent: The QMP command that was in flight, or None.
    """

    def __init__(
        self, why: str, *, hung_up: bool = False, last_sent: str | None = None, outcome: Outcome | None = None
    ) -> None:
        flight = f" with {last_sent} in flight" if last_sent else ""
        super().__init__(f"the QMP connection is lost{flight}: {why}")
        self.why = why
        self.hung_up = hung_up
        self.last_sent = last_sent
        self.outcome = outcome or _outcome_of(last_sent)


class MalformedReplyError(MonitorError):
    """A reply does not have the shape that QEMU's schema promises.

    Attributes:
        command: The QMP command.
        reply: The reply.
    """

    def __init__(self, command: str, why: str, reply: object) -> None:
        super().__init__(f"malformed reply to {command}: {why}: {shorten(reply)}")
        self.command = command
        self.reply = reply
        self.outcome = _outcome_of(command)


WITHOUT_AGENT: Final = "an unplug without offline_first=True does not need the agent"
"""What to do where the agent cannot take a vCPU offline."""


class GuestAgentError(QmpVcpuError):
    """Something is wrong with the guest agent, or it cannot do what was asked. QMP goes on without it.

    ``outcome`` is about the guest's CPUs here: UNKNOWN if a command that changes them was sent and not answered.

    Attributes:
        address: The agent's address, as text; "" where none was given.
        why: What happened.
        hint: What to do about it, or "".
    """

    def __init__(self, address: str, why: str, *, hint: str = "", outcome: Outcome = Outcome.UNCHANGED) -> None:
        super().__init__()
        self.address = address
        self.why = why
        self.hint = hint
        self.outcome = outcome
        self._say("")

    def concern(self, about: str, *, timeout: float | None = None, hint: str = "") -> None:  # noqa: ARG002 - below
        """Say in the message what the agent was asked for, such as ``offline of vCPU 3``, and in what time."""
        self.hint = f"{self.hint}; {hint}" if self.hint and hint else self.hint or hint
        self._say(about)

    def _say(self, about: str) -> None:
        where = f"guest agent on {clip(self.address)}" if self.address else "guest agent"
        subject = f"{where}: {about}" if about else where
        self.args = (f"{subject}: {self.why}" + (f" ({self.hint})" if self.hint else ""),)


class AgentConnectError(GuestAgentError):
    """No agent can be reached there: nobody listens, another client holds the socket, it speaks something else."""


class AgentSilentError(GuestAgentError, TimeoutError):
    """The agent did not answer by the deadline. Where its port is open, it may still carry out what it was asked.

    Attributes:
        timeout: The deadline, in seconds.
        port_open: Whether a process in the guest has the agent's port open: False: no agent runs; True: it is
            stopped, or hangs; None: QEMU was not asked, or does not know this port.
    """

    def __init__(
        self,
        address: str,
        why: str,
        *,
        timeout: float,
        port_open: bool | None = None,
        hint: str = "",
        outcome: Outcome = Outcome.UNCHANGED,
    ) -> None:
        super().__init__(address, f"no answer within {timeout:.3g} s: {why}", hint=hint, outcome=outcome)
        self.timeout = timeout
        self.port_open = port_open

    def concern(self, about: str, *, timeout: float | None = None, hint: str = "") -> None:  # noqa: D102 - as above
        if timeout is not None:
            self.timeout = timeout
            cause = self.why.partition(": ")[2]
            self.why = f"no answer within {timeout:.3g} s: {cause}"
        super().concern(about, hint=hint)


class AgentLostError(GuestAgentError, ConnectionError):
    """The agent went away with the question, or the connection to it ended."""


class AgentForbiddenError(GuestAgentError):
    """The agent does not carry out this command: its configuration forbids it, or it does not have it.

    Attributes:
        command: The command.
    """

    def __init__(self, address: str, command: str, why: str, *, hint: str = "") -> None:
        super().__init__(address, f"{command} {why}", hint=hint)
        self.command = command


class GuestRefusedError(GuestAgentError):
    """The guest's system refused, or does not show what it was told to do.

    Attributes:
        ids: The vCPUs concerned; empty where only the guest's number is known.
        number: The guest's number for the CPU, or None.
        errno: The name of the guest's error, such as ``EBUSY``; "" where it named none.
        reason: What the guest said, in words.
        done: The vCPUs that were changed before that, and stay so; empty where only numbers are known.
    """

    def __init__(
        self,
        address: str,
        reason: str,
        *,
        ids: "VcpuMap",
        done: "VcpuMap",
        errno: str = "",
        number: int | None = None,
        what: str = "",
    ) -> None:
        subject = f"{describe(what, ids)} refused by the guest: " if what else "refused by the guest: "
        outcome = Outcome.CHANGED if done else Outcome.UNCHANGED
        self.reason = reason
        self.errno = errno
        super().__init__(address, subject + self.said, outcome=outcome)
        self.number = number
        self.ids = ids
        self.done = done

    @property
    def said(self) -> str:
        """What the guest said: ``reason``, and the name of its error."""
        return f"{self.reason} ({self.errno})" if self.errno else self.reason


class MalformedAnswerError(GuestAgentError):
    """The agent's answer does not have the shape that its schema promises, or is beyond all bounds.

    Attributes:
        command: The command, or None where what came answers none.
        answer: The answer, shortened.
    """

    def __init__(
        self,
        address: str,
        command: str | None,
        why: str,
        answer: object = None,
        *,
        outcome: Outcome = Outcome.UNCHANGED,
    ) -> None:
        shown = "" if answer is None else f": {shorten(answer)}"
        about = f"malformed answer to {command}" if command else "malformed answer"
        super().__init__(address, f"{about}: {why}{shown}", outcome=outcome)
        self.command = command
        self.answer = "" if answer is None else shorten(answer)


class GuestNumberUnknownError(GuestAgentError):
    """Nothing tells which CPU of the guest a vCPU is, so nothing was done: it would have been a guess.

    Attributes:
        ids: The vCPUs.
    """

    def __init__(self, address: str, ids: "VcpuMap", why: str, *, hint: str = "") -> None:
        super().__init__(address, f"{describe('CPU number', ids)} in the guest is unknown: {why}", hint=hint)
        self.ids = ids


def _outcome_of(command: str | None) -> Outcome:
    """Return what is known of the VM when the reply to *command* did not come, or makes no sense."""
    reads = command is None or command.startswith(("query-", "qom-get", "qom-list", "qmp_capabilities"))
    return Outcome.UNCHANGED if reads else Outcome.UNKNOWN


class StepError(QmpVcpuError):
    """One vCPU's change did not happen as requested.

    Attributes:
        action: ``"plug"`` or ``"unplug"``, or None if a plain QMP command failed.
        ids: The vCPUs concerned; empty if a plain QMP command failed.
    """

    def __init__(self, message: str, *, action: str | None, ids: "VcpuMap") -> None:
        super().__init__(message)
        self.action = action
        self.ids = ids


class CommandRejectedError(StepError):
    """QEMU answered a command with an error.

    Nearly every error of QEMU is a GenericError, and its text changes between versions: it is kept as
    evidence, never branched on.

    Attributes:
        error_class: QEMU's error class, such as ``GenericError`` or ``DeviceNotFound``.
        desc: QEMU's text.
        sent: The message that was sent.
        hint: What it means, judging by a read of the VM afterwards, or "".
    """

    def __init__(
        self,
        error_class: str,
        desc: str,
        sent: Mapping[str, Any],
        *,
        ids: "VcpuMap",
        action: str | None = None,
        hint: str = "",
    ) -> None:
        what = describe(action, ids) if action else str(sent.get("execute", "command"))
        message = f"{what} rejected by QEMU: {error_class}: {desc}" + (f" ({hint})" if hint else "")
        super().__init__(message, action=action, ids=ids)
        self.error_class = error_class
        self.desc = desc
        self.sent = dict(sent)
        self.hint = hint


class UnplugRefusedError(StepError):
    """The guest refused to give a vCPU up; it is still plugged, and may be asked for again.

    Attributes:
        code: ACPI _OST status code, or None if the machine has no such code, or the agent refused.
        reason: The code in words, or what the agent said.
        by_agent: True if the guest's agent refused to take it offline: nothing was sent to QEMU, nothing is pending.
    """

    def __init__(self, ids: "VcpuMap", code: int | None, reason: str, *, by_agent: bool = False) -> None:
        shown = "" if code is None else f" with OST status {code:#04x}"
        what = f"refused by the guest{shown}: {reason}; still plugged, may be asked again"
        if by_agent:
            what = (
                f"refused by the guest, which keeps it online: {reason}; nothing was sent to QEMU, you may ask again"
            )
        super().__init__(f"{describe('unplug', ids)} {what}", action="unplug", ids=ids)
        self.code = code
        self.reason = reason
        self.by_agent = by_agent


class UnplugPendingError(StepError):
    """The guest had not answered when the deadline passed; its answer may still come, at any time.

    Attributes:
        timeout: The deadline, in seconds from QEMU's acceptance of the request.
        acknowledged: True if the guest said that it works on it, False if it has not reacted at all.
    """

    outcome = Outcome.UNKNOWN

    def __init__(self, ids: "VcpuMap", timeout: float, *, acknowledged: bool) -> None:
        seen = "the guest works on it" if acknowledged else "the guest has not reacted"
        super().__init__(
            f"{describe('unplug', ids)} pending after {timeout:g} s: {seen}; still plugged. QEMU never forgets"
            " the request: it may be answered at any time, even after a reset, or with the next hotplug of any vCPU",
            action="unplug",
            ids=ids,
        )
        self.timeout = timeout
        self.acknowledged = acknowledged


class UnprovenError(StepError):
    """A vCPU is plugged, and stays so, but the proof that was required did not come.

    Attributes:
        wanted: The rung that was required.
        reached: The highest rung that is known of it.
        code: ACPI _OST status code of the guest's answer to the plug, or None if it did not answer.
        reason: What is missing and why, in words.
        hint: What usually causes that, or "".
    """

    outcome = Outcome.CHANGED

    def __init__(
        self,
        ids: "VcpuMap",
        wanted: "Proof",
        reached: "Proof",
        reason: str,
        *,
        code: int | None = None,
        hint: str = "",
    ) -> None:
        told = f"OST status {code:#04x}" if code else ""
        shown = f" ({told or hint})" if told or hint else ""
        super().__init__(
            f"{describe('plug', ids)}: plugged and {reached.value}, never {wanted.value}: {reason}{shown}",
            action="plug",
            ids=ids,
        )
        self.wanted = wanted
        self.reached = reached
        self.code = code
        self.reason = reason
        self.hint = hint


LOOK: Final = "look at threads"
"""The action of a PlacementError where QEMU's threads cannot even be found."""


class PlacementError(StepError):
    """QEMU's threads are not in their place on the host.

    Attributes:
        why: Why not.
        taken_out: After a plug: True if the vCPU was taken out again, False if that failed and it is still there,
            None if it is not known yet. Also None if existing threads were to be moved.
    """

    def __init__(
        self, ids: "VcpuMap", why: str, *, action: str = "plug", taken_out: bool | None = None, now: str = ""
    ) -> None:
        words = {
            True: "it was taken out again",
            False: "it could not be taken out again and is still there",
            None: "whether it leaves again is not known yet",
        }
        told = f"plugged, but not in its place on the host: {why}; {words[taken_out]}" if action == "plug" else why
        asked = "QEMU's threads cannot be looked at" if action == LOOK else describe(action, ids)
        super().__init__(f"{asked}: {told}{f'; {now}' if now else ''}", action=action, ids=ids)
        self.why = why
        self.taken_out = taken_out
        if action == "plug":
            self.outcome = {True: Outcome.UNCHANGED, False: Outcome.CHANGED, None: Outcome.UNKNOWN}[taken_out]


class PlugUndoneError(StepError):
    """A vCPU was plugged, and has left again before it was proven.

    Attributes:
        by_second_removal: True if an earlier removal that had been requested twice ejected it; False: it was
            unplugged, by another call or client.
    """

    def __init__(self, ids: "VcpuMap", *, by_second_removal: bool) -> None:
        how = "unplugged again, by another call or another QMP client, before it was proven"
        if by_second_removal:
            how = (
                "then ejected by the guest, which still had a second removal of this slot queued (another QMP client"
                " asked for it too)"
            )
        super().__init__(
            f"{describe('plug', ids)}: plugged, {how}; the slot is empty, and may be plugged again",
            action="plug",
            ids=ids,
        )
        self.by_second_removal = by_second_removal


class OutcomeUnknownError(StepError):
    """A change was sent, and it is unknown whether QEMU carried it out; the next read tells.

    Attributes:
        why: What happened to the connection.
    """

    outcome = Outcome.UNKNOWN

    def __init__(self, action: str, ids: "VcpuMap", why: str) -> None:
        super().__init__(f"{describe(action, ids)} was sent, its outcome is unknown: {why}", action=action, ids=ids)
        self.why = why


class TransitionError(QmpVcpuError):
    """A map was not reached; the report says slot by slot what happened.

    Attributes:
        report: The report.
    """

    def __init__(self, report: "TransitionReport") -> None:
        super().__init__(report.failure)
        self.report = report
        self.outcome = report.vm_outcome


class SameVmError(QmpVcpuError):
    """Two addresses of a fleet lead to one VM, which is changed only under the other address; nothing was sent.

    Attributes:
        address: This address.
        other: The address under which the fleet has the VM.
    """

    def __init__(self, address: str, other: str, *, same_socket: bool) -> None:
        what = "the same socket as" if same_socket else "another QMP socket of the VM that this fleet has as"
        super().__init__(f"{address} is {what} {other}: it is worked on once, and nothing was sent here")
        self.address = address
        self.other = other


class SameNameError(QmpVcpuError):
    """VMs of several hosts have the name that was given without a host; nothing was sent.

    Attributes:
        name: The name.
        hosts: Two of the hosts.
    """

    def __init__(self, name: str, hosts: tuple[str, str]) -> None:
        super().__init__(
            f"hosts {' and '.join(map(shorten, hosts))} both have a VM {shorten(name)}:"
            f" say which with host={hosts[0]}, or host=* for all"
        )
        self.name = name
        self.hosts = hosts


class SocketDirectoryError(QmpVcpuError):
    """A directory of sockets cannot be read.

    Attributes:
        path: The directory.
        why: What the kernel said.
    """

    def __init__(self, path: object, why: str) -> None:
        super().__init__(f"cannot look into {path} for QMP sockets: {why}")
        self.path = str(path)
        self.why = why


class HostError(QmpVcpuError):
    """The host's kernel refuses what was asked for one of QEMU's threads.

    Attributes:
        why: The reason, and what would help.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class HostBusyError(HostError):
    """Another program does to QEMU's threads what only one can do at a time."""


class ThreadGoneError(HostError):
    """A thread of QEMU has ended.

    Attributes:
        tid: Its number on this host.
    """

    def __init__(self, tid: int) -> None:
        super().__init__(f"thread {tid} has ended")
        self.tid = tid


class MigrationError(QmpVcpuError):
    """A VM cannot be moved, or it is not certain that it has arrived."""


class TargetMismatchError(MigrationError):
    """Source and target differ in a way that loses the VM, or a part of it.

    Attributes:
        vm: The VM's name.
        differences: Those that rule the migration out.
        notes: Those that are harmless, or that the caller accepted.
    """

    def __init__(self, vm: str, differences: "Collection[Difference]", notes: "Collection[Difference]" = ()) -> None:
        said = "; ".join(f"({number}) {each}" for number, each in enumerate(differences, start=1))
        super().__init__(f"the target is not what VM {vm!r} needs: {said}")
        self.vm = vm
        self.differences = tuple(differences)
        self.notes = tuple(notes)


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
    """The source was not told to run the VM again; or it was, and does not.

    Attributes:
        vm: The VM's name.
        why: What prevents it.
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


class HostsError(QmpVcpuError):
    """Base of what can go wrong with the NATS server, and with another host."""


class ServerConnectError(HostsError):
    """No connection to the server could be opened.

    Attributes:
        address: The servers' URLs.
        why: What each of them answered.
    """

    def __init__(self, address: str, why: str, remedy: str) -> None:
        super().__init__(f"no connection to {address}: {clip(why)}; {remedy}")
        self.address = address
        self.why = why


class ServerLostError(HostsError):
    """The server did not answer in time, or cannot be reached any more.

    Attributes:
        asked: What was asked.
        maybe_done: True if it may have been done all the same.
    """

    def __init__(self, asked: str, why: str, *, maybe_done: bool) -> None:
        known = "it may have been done, so look before you ask again" if maybe_done else "it was not done"
        super().__init__(f"{asked}: {clip(why)}; {known}")
        self.asked = asked
        self.maybe_done = maybe_done
        if maybe_done:
            self.outcome = Outcome.UNKNOWN


class UnfitServerError(HostsError):
    """The server lacks something that many hosts need, or has something else of that name.

    Attributes:
        what: What is missing or different, such as a bucket's name.
    """

    def __init__(self, what: str, why: str, remedy: str) -> None:
        super().__init__(f"{what}: {clip(why)}; {remedy}")
        self.what = what


class ServerForbiddenError(HostsError):
    """The server does not let this user do it; it was not done.

    Attributes:
        asked: What was asked.
        subject: The subject that the user may not publish or subscribe to.
    """

    def __init__(self, asked: str, subject: str, action: str) -> None:
        own = re.match(r"_INBOX\.(who|host)\.([^.]+)", subject)  # the server knows the user by another name
        advice = ""
        if own is not None:
            option = "QMPVCPU_WHO" if own[1] == "who" else "--host"
            advice = f"if the server knows it by another name than {clip(own[2])}, say which ({option}); else "
        super().__init__(
            f"{asked}: the server does not let this user {action} {clip(subject)}; "
            f"{advice}allow it in the user's permissions"
        )
        self.asked = asked
        self.subject = subject


class StaleError(HostsError):
    """Another writer was faster: the key no longer has the revision that was to be replaced; nothing was written.

    Attributes:
        key: The key.
        last: The revision that was to be replaced; 0: there was to be none.
    """

    def __init__(self, bucket: str, key: str, last: int) -> None:
        expected = f"no longer has revision {last}" if last else "is there already"
        super().__init__(f"{bucket}: {key} {expected}; read it again")
        self.key = key
        self.last = last


class LeaseTakenError(HostsError):
    """Somebody else holds the lease.

    Attributes:
        key: The lease.
        holder: Who holds it, in its own words: the lease's value.
    """

    def __init__(self, key: str, holder: bytes) -> None:
        said = clip(holder.decode(errors="backslashreplace"))
        super().__init__(f"lease {key} is held by {said}; it is free when that ends, or some seconds after it dies")
        self.key = key
        self.holder = holder


class TooLongError(HostsError, ValueError):
    """A message is longer than the server takes; nothing was sent.

    Attributes:
        size: Its size in bytes.
        most: The largest that is taken.
    """

    def __init__(self, what: str, size: int, most: int, *, bound: str = "max_payload") -> None:
        super().__init__(f"{what}: {size} bytes, and the server takes at most {most} (its {bound})")
        self.size = size
        self.most = most


class HostSilentError(HostsError):
    """No agent answered there.

    Attributes:
        subject: The request's subject.
        is_there: True if an agent took the request, and did not answer in time; it may have carried it out.
    """

    def __init__(self, subject: str, timeout: float | None = None) -> None:
        if timeout is None:
            what = f"no agent answers to {subject}"
            hint = "start the agent of that host with 'qmpvcpu agent', and check its name"
        else:
            what = f"no answer to {subject} in {timeout:g} s"
            hint = "it may have been carried out, so look before you ask again"
        super().__init__(f"{what}: {hint}")
        self.subject = subject
        self.is_there = timeout is not None
        if self.is_there:
            self.outcome = Outcome.UNKNOWN


class RequestRefusedError(HostsError):
    """An agent refuses a request: it cannot read it, may not do it, or has no such VM."""


class NameTakenError(HostsError):
    """Several VMs of one host have one name, so none of them is served.

    Attributes:
        host: The host.
        name: The name.
        addresses: Their QMP sockets.
    """

    def __init__(self, host: str, name: str, addresses: Collection[str]) -> None:
        where = " and ".join(map(clip, addresses))
        super().__init__(f"VMs of host {shorten(host)} share the name {shorten(name)}: {where}; give each a -name")
        self.host = host
        self.name = name
        self.addresses = tuple(addresses)


class HostFailedError(HostsError):
    """An agent failed while it answered, which is a fault in it; it may have carried the request out.

    Attributes:
        subject: The request's subject.
        said: What it said.
    """

    outcome = Outcome.UNKNOWN

    def __init__(self, subject: str, said: str) -> None:
        super().__init__(f"{subject}: the agent failed: {clip(said)}; its log says more")
        self.subject = subject
        self.said = said


class WishError(HostsError):
    """A wish for a VM of another host was not carried out, or its outcome is unknown.

    Attributes:
        vm: The VM, as HOST/NAME.
        phase: How far the wish got.
        why: Why it got no further, in words; "": unknown.
        code: The exit code of a command with this result.
    """

    def __init__(self, vm: str, phase: "WishPhase", why: str, code: int) -> None:
        super().__init__(f"{vm}: {_CAME_TO[phase.value]}" + (f": {clip(why)}" if why else ""))
        self.vm = vm
        self.phase = phase
        self.why = why
        self.code = code
        if phase.value in _MAYBE_SENT:
            self.outcome = Outcome.UNKNOWN


_MAYBE_SENT: Final = ("running", "ended", "superseded")
_CAME_TO: Final = {
    "waiting": "the wish still waits, and nothing was sent",
    "running": "the wish was begun, and may have been carried out",
    "ended": "the wish has ended, and what came of it is not known",
    "rejected": "the wish was rejected, and nothing was sent",
    "superseded": "a newer wish took the place of this one",
    "expired": "the wish was not begun in time, and nothing was sent",
    "withdrawn": "the wish was withdrawn",
}


class CampaignError(HostsError):
    """There is no such campaign, it cannot be read, or this cannot be done to it; nothing was changed.

    Attributes:
        campaign: Its id.
        why: In words.
    """

    def __init__(self, campaign: str, why: str) -> None:
        super().__init__(f"campaign {clip(campaign)}: {clip(why)}")
        self.campaign = campaign
        self.why = why


class WaitTimeoutError(QmpVcpuError, TimeoutError):
    """A condition did not become true in time; waiting changed nothing.

    Attributes:
        timeout: The deadline, in seconds.
        enabled: The vCPUs that are plugged.
        pending: The vCPUs whose removal is unanswered.
    """

    def __init__(self, timeout: float, enabled: "VcpuMap", pending: "VcpuMap") -> None:
        waiting = f", pending {pending}" if pending else ""
        super().__init__(f"the condition did not hold within {timeout:g} s; plugged now: {enabled}{waiting}")
        self.timeout = timeout
        self.enabled = enabled
        self.pending = pending


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
    """The file is not a record that can be trusted, or replaced without loss; it is left alone.

    It is torn, hostile, damaged, too large, written by a newer version, or a document that is not ours.
    """


class RecordLockedError(RecordError):
    """Another process or attachment holds this record.

    Attributes:
        pid: The process that holds it, or None if that cannot be told.
    """

    def __init__(self, path: object, pid: int | None, who: str) -> None:
        super().__init__(path, f"locked by {who}: only one can hold it at a time")
        self.pid = pid


# How errors, logs and reports name things, and quote text from outside.


def describe(action: str, ids: Collection[int]) -> str:
    """Name a step as errors and logs do, such as ``unplug of vCPU 3``."""
    if not ids:
        return action
    if len(ids) == 1:
        return f"{action} of vCPU {next(iter(ids))}"
    if max(ids) - min(ids) == len(ids) - 1:
        return f"{action} of vCPUs {min(ids)}-{max(ids)}"
    shown = sorted(ids)[:_MOST_NAMED]
    return f"{action} of vCPUs {','.join(map(str, shown))}{',...' if len(ids) > _MOST_NAMED else ''}"


def counted(number: int, noun: str) -> str:
    """Return ``1 VM``, ``2 VMs``: how many there are of *noun*, which takes an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def milliseconds(seconds: float) -> str:
    """Return a duration as people read it: in milliseconds below one second."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.1f} ms" if seconds * 10 < 1 else f"{seconds * 1000:.0f} ms"


def printable(text: str, *, lines: bool = False) -> str:
    """Return *text* from outside in printable characters, fit for a terminal, a log or a report.

    It escapes, as Python does, control characters (ESC, 0x80 to 0x9f, line breaks), characters that turn the
    direction of text or take no room, and bytes of file names that are not text. Printable text is returned as it is,
    backslashes included, so escaping twice changes nothing.

    Args:
        text: The text.
        lines: Keep line breaks and tabs, for our own text of several lines.
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
    """Return at most about *limit* characters of a peer's *text*, in a form that can be encoded.

    JSON can hold half of a surrogate pair, and no file, terminal or socket takes such text.
    """
    shown = text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
    return shown.encode(errors="backslashreplace").decode()
