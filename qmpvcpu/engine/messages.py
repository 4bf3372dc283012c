"""What enters the core, and what it asks for: inputs and effects, as values.

``Engine.receive`` takes one input and returns effects. ``vm.driver`` carries each effect out, and hands what comes of
it back as an input.
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from qmpvcpu import qapi
from qmpvcpu.engine.removal import Removal
from qmpvcpu.engine.steprun import StepRun
from qmpvcpu.engine.vmstate import Read
from qmpvcpu.errors import MonitorLostError, QmpVcpuError, RecordError
from qmpvcpu.events import Event
from qmpvcpu.model.guest import GuestOs
from qmpvcpu.model.layout import Slot
from qmpvcpu.model.options import CheckedOptions
from qmpvcpu.model.transition import ConfigReport, Intent
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import OstAnswer
from qmpvcpu.model.vm import VmStatus
from qmpvcpu.planning.checks import Situation
from qmpvcpu.planning.plan import Plan
from qmpvcpu.qapi import ThreadReading

if TYPE_CHECKING:
    from qmpvcpu.engine.intents import Promised
    from qmpvcpu.model.placement import HostFacts, Place, Placement

NO_VCPUS: Final = VcpuMap()

# Requests: what callers want. Each is settled once, with a result or an error (``Settle``).


class ConfigChange(Protocol):
    """A change of the next boot that is to follow one of the running VM."""

    def promise(self, plan: Plan) -> None:
        """Make sure that the change is possible, and promise it from here on.

        Raises:
            ConfigDeniedError: It is not possible.
        """

    def not_tried(self) -> ConfigReport:
        """Return the report of a change that is not made, since the running VM is not as wanted."""

    async def write(self, done: str) -> tuple[ConfigReport, RecordError | None]:
        """Make the change, now that *done* is; for who carries effects out."""

    @property
    def promised(self) -> "Promised | None":
        """What the next boot is to have once everything promised is done; None: nothing is promised."""


class Result(enum.Enum):
    """What a change is settled with.

    REPORT: the report, or TransitionError. IDS: the vCPU ids of its steps, or the error of its one step. REMOVAL: the
    removal, once QEMU has accepted it.
    """

    REPORT = "report"
    IDS = "ids"
    REMOVAL = "removal"


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """A change of the running VM: one transition.

    Attributes:
        plan: Plans it for the VM as it is when its turn comes; raises PlanError if it cannot be done.
        options: How it is carried out.
        result: What it is settled with. A REPORT is of a whole map, which runs alone and is looked at before and
            after; all others run side by side, and their evidence is QEMU's replies and events.
        config: What is changed in the next boot once the target is reached, or None.
        intent: What is recorded as under way, if that is not the plan itself: an earlier transition goes on.
        rebuilds: True if it brings back what an earlier QEMU had, which any other change supersedes.
        tries: How often it is planned anew, if every step went well and the target is not reached all the same.
        slot: First vCPU id of its one slot, where that is known beforehand.
        joins: True if it joins a removal of *slot* that is under way instead of waiting for its turn.
        waits_for_plug: True if it waits for a plug of *slot* that is in flight.
        subject: What it is called in messages, such as ``unplug of vCPU 3``.
        call: The method that asked for it, for traces.
    """

    plan: Callable[[Situation], Plan]
    options: CheckedOptions = field(default_factory=CheckedOptions)
    result: Result = Result.REPORT
    config: ConfigChange | None = None
    intent: Intent | None = None
    rebuilds: bool = False
    tries: int = 1
    slot: int | None = None
    joins: bool = False
    waits_for_plug: bool = False
    subject: str = ""
    call: str = ""


class Hold:
    """Keep every change out until ``Release``; settled when it holds."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, eq=False)
class Wait:
    """Wait for the end of a removal; settled with its verdict, PENDING after *timeout* seconds (None: never)."""

    removal: Removal
    timeout: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Refresh:
    """Read the VM; settled with True. *status* also asks what it does."""

    read: Read = Read.FULL
    status: bool = True


class StopRunning:
    """Stop the map that runs, at the next safe point; settled with its report, None if none runs."""

    __slots__ = ()


class Persist:
    """Write the record with what is known; settled when it is on disk."""

    __slots__ = ()


class DropPrevious:
    """Keep nothing of an earlier QEMU any more; settled when that is on disk."""

    __slots__ = ()


Request = Change | Hold | Wait | Refresh | StopRunning | Persist | DropPrevious


# Inputs: what happened.


class Heard(NamedTuple):
    """An event of QEMU's."""

    event: qapi.QemuEvent


class Accepted(NamedTuple):
    """QEMU carried the command *number* out.

    *in_place*: it was the last plug under way, and every vCPU thread of theirs was born where it is to run.
    """

    number: int
    in_place: bool = False


class Rejection(NamedTuple):
    """QEMU answered the command *number* with an error."""

    number: int
    error_class: str
    desc: str


class Unanswered(NamedTuple):
    """The command *number* has no reply that can be understood: the connection was lost, or it was nonsense."""

    number: int
    error: Exception


class Looked(NamedTuple):
    """The look *number* is over. What it did not ask for is None.

    *places* tells where the host runs each thread, by vCPU id, QEMU's main thread as ``EMULATOR``.
    """

    number: int
    slots: Sequence[Slot] | None
    threads: Sequence[ThreadReading] | None
    status: VmStatus | None
    other_paths: frozenset[str] | None
    started: frozenset[int] | None = None
    places: "Mapping[int, Place] | None" = None


class LookFailed(NamedTuple):
    """The look *number* came to nothing."""

    number: int
    error: Exception


class GuestTold(NamedTuple):
    """The guest's agent was asked by the effect *number*.

    Attributes:
        number: Of the effect; None: somebody else has asked.
        online: The guest's list of its CPUs, as vCPU ids; True: that one is online. None: it told none.
        changed: The vCPUs that it brought online, or took offline.
        error: Why it did not do that, or tell; None: it did.
    """

    number: int | None
    online: Mapping[int, bool] | None
    changed: VcpuMap = NO_VCPUS
    error: QmpVcpuError | None = None


class GuestIs(NamedTuple):
    """The guest's agent has told which system runs in the guest."""

    system: GuestOs


class HostIs(NamedTuple):
    """What the host allows for QEMU's threads now.

    Attributes:
        facts: What it allows.
        places: Where it runs each, by vCPU id, QEMU's main thread as ``EMULATOR``; None: nobody looked.
    """

    facts: "HostFacts"
    places: "Mapping[int, Place] | None" = None


class Wanted(NamedTuple):
    """The threads are to run there from now on."""

    placement: "Placement | None"


class NotBorn(NamedTuple):
    """The command *number* was not sent: QEMU's main thread could not be given the birthplace of the vCPU."""

    number: int
    why: str


class ThreadsPlaced(NamedTuple):
    """The effect *number* is over.

    Attributes:
        number: Of the effect.
        why_not: By the first vCPU id of each slot: why its threads are not in their place; "": they are.
        error: Why none could be looked for, or None.
        single_threaded: Whether one thread was found to run all vCPUs; None: that cannot be told.
    """

    number: int
    why_not: Mapping[int, str]
    error: Exception | None = None
    single_threaded: bool | None = None


class Saved(NamedTuple):
    """The save *number* is over; *error* is None if it is on disk."""

    number: int
    error: RecordError | None


class ConfigWritten(NamedTuple):
    """The next boot was written for the effect *number*; *error* says why not, where it was not."""

    number: int
    report: ConfigReport
    error: RecordError | None


class Cancelled(NamedTuple):
    """Nobody waits for *request* any more."""

    request: Request


class Release(NamedTuple):
    """*hold* ends."""

    hold: Hold


class ExportLock(NamedTuple):
    """Deny all changes from now on, or no longer: the VM is exported."""

    locked: bool


class Arrived(NamedTuple):
    """The VM has migrated into this QEMU with these removals pending; *desired* was asked for on the other side."""

    pending: VcpuMap
    answers: Mapping[int, OstAnswer]
    desired: VcpuMap | None


class Lost(NamedTuple):
    """The connection is lost; *may_return* if somebody looks for QEMU."""

    error: MonitorLostError
    may_return: bool


class Returned(NamedTuple):
    """The connection is back, and this is the VM; not *same_instance*: another QEMU runs it now."""

    slots: Sequence[Slot]
    threads: Sequence[ThreadReading]
    status: VmStatus
    answers: Mapping[int, OstAnswer]
    same_instance: bool


class WantRead(NamedTuple):
    """Something may have been missed: have the slots read."""

    read: Read


class Stop(NamedTuple):
    """This side is about to close: a map that runs stops at the next safe point."""


class Tick(NamedTuple):
    """Time has passed."""


Input = (
    Request
    | Heard
    | Accepted
    | Rejection
    | Unanswered
    | Looked
    | LookFailed
    | GuestTold
    | GuestIs
    | HostIs
    | Wanted
    | NotBorn
    | ThreadsPlaced
    | Saved
    | ConfigWritten
    | Cancelled
    | Release
    | ExportLock
    | Arrived
    | Lost
    | Returned
    | WantRead
    | Stop
    | Tick
)


# Effects: what is to be done.


class Send(NamedTuple):
    """Send a command; answered with ``Accepted``, ``Rejection``, ``Unanswered`` or ``NotBorn``.

    Attributes:
        number: Its number.
        command: The command.
        arguments: Its arguments.
        born_on: The host CPUs of QEMU's main thread until the reply comes; None leaves it where it is.
        threads: How many threads QEMU makes for it.
    """

    number: int
    command: str
    arguments: Mapping[str, Any]
    born_on: VcpuMap | None = None
    threads: int = 0


class Look(NamedTuple):
    """Read the VM; answered with ``Looked`` or ``LookFailed``.

    Attributes:
        number: Its number.
        read: Which slots query, if any.
        status: Ask what the VM does.
        other_paths: Ask which QOM paths other devices have.
        started: The slots whose vCPUs are looked at to see whether they have run.
    """

    number: int
    read: Read
    status: bool = False
    other_paths: bool = False
    started: tuple[Slot, ...] = ()


class Ask(NamedTuple):
    """Ask the guest's agent; answered with ``GuestTold``.

    Attributes:
        number: Its number.
        ids: The vCPUs to bring online or to take offline.
        online: Which of these; None only asks for the guest's list.
        limit: How long the agent has, in seconds.
    """

    number: int
    ids: VcpuMap
    online: bool | None
    limit: float


class PlaceThreads(NamedTuple):
    """Put the threads of these slots where they are to run by then; answered with ``ThreadsPlaced``."""

    number: int
    slots: tuple[Slot, ...]


class Save(NamedTuple):
    """Write the record, durably, as ``Engine.recorded`` is now; answered with ``Saved``."""

    number: int


class WriteConfig(NamedTuple):
    """Write the next boot; answered with ``ConfigWritten``. *done* says what has been done, for an error."""

    number: int
    config: ConfigChange
    done: str


class Publish(NamedTuple):
    """Tell subscribers."""

    events: Sequence[Event]


class Finished(NamedTuple):
    """A transition of *change* is over; only told for traces. A change may take several.

    Attributes:
        change: What was asked for.
        began: When it was planned, by the caller's clock.
        runs: Its steps, in order.
        undoing: What undid them, by the step that it undid.
        errors: Why steps, or what undid them, are not as wanted.
        stopped: True if its caller has stopped it, or has gone.
    """

    change: Change
    began: float
    runs: Sequence[StepRun]
    undoing: Mapping[StepRun, StepRun]
    errors: Mapping[StepRun, QmpVcpuError]
    stopped: bool


class Settle(NamedTuple):
    """Give *request* its result, or its error."""

    request: Request
    result: object = None
    error: BaseException | None = None


class BackgroundRead(NamedTuple):
    """A read that nobody in particular waits for is over; *error* says why it failed, if it did."""

    error: Exception | None


class LetGo(NamedTuple):
    """The connection does not come back: end everything that waits, and close the record."""

    error: MonitorLostError


Effect = Send | Look | Ask | PlaceThreads | Save | WriteConfig | Publish | Finished | Settle | BackgroundRead | LetGo
