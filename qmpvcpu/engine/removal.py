r"""One removal, from ``device_del`` to its answer. The table below is the code.

::

                 ACCEPTED            IN_PROGRESS (OST 0x84)
         SENT ------------> REQUESTED ------------> WORKING
          |  \                  |    <------------     |
          |   \                 |        RESET         |
          |    \                |                      |
     REJECTION  \--- GONE (DEVICE_DELETED, or a read without it) --> UNPLUGGED
        LOST    \--- FAILURE (OST refusal, guest error) -----------> REFUSED
          |
          v
      REJECTED / UNKNOWN

The happy path is SENT, REQUESTED, WORKING, UNPLUGGED. Events can overtake the reply: from SENT every answer of the
guest is possible, and the reply that comes after it (LATE_REPLY below) changes nothing. OST success (3/0) is no
evidence and not in the table: it only makes the caller read again. A deadline is no evidence either: QEMU never
forgets a request, so there is no state for "given up".

REQUESTED and WORKING last until the guest answers, or for ever. After RESET the guest has forgotten what it was
working on. QEMU has not, and the request is latent; unless the guest had told it that the request is taken up (the
remove event is cleared in the register block), which no reply shows: then nobody remembers it.

Source: QEMU docs/specs/acpi_cpu_hotplug.rst; ACPI 6.5, 6.3.5 (_OST); measured on QEMU 7.2.22, 10.0.2 and 11.1.3.
"""

import enum
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from qmpvcpu.events import Origin
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Rejected


class State(enum.Enum):
    """Where a removal stands."""

    SENT = "device_del sent, no reply yet"
    REQUESTED = "QEMU accepted, the guest has not reacted"
    WORKING = "the guest works on it"
    UNPLUGGED = "gone, on evidence"
    REFUSED = "the guest said no"
    REJECTED = "QEMU said error"
    UNKNOWN = "the connection was lost before the reply, or QEMU was replaced before the answer"

    __hash__ = object.__hash__  # members compare by identity; Enum's own hash is a call of Python for each look-up

    @property
    def is_final(self) -> bool:
        """True if nothing more is expected."""
        return self in _FINAL


_FINAL: Final = frozenset({State.UNPLUGGED, State.REFUSED, State.REJECTED, State.UNKNOWN})


class Evidence(enum.Enum):
    """What can be learnt about a removal."""

    ACCEPTED = "QEMU replied that it took the request"
    REJECTION = "QEMU replied with an error"
    IN_PROGRESS = "OST 0x84: the guest works on it"
    FAILURE = "OST failure or guest error: the guest refuses"
    GONE = "DEVICE_DELETED for the exact path, or a read without it"
    RESET = "the VM was reset"
    LOST = "the connection was lost"
    VOID = "another QEMU runs the VM now"

    __hash__ = object.__hash__


_S, _E = State, Evidence

#: (state, evidence) -> state. An absent pair cannot happen; if it does, IllegalEvidenceError, and nothing changes.
TRANSITIONS: Final = MappingProxyType(
    {
        (_S.SENT, _E.ACCEPTED): _S.REQUESTED,
        (_S.SENT, _E.REJECTION): _S.REJECTED,
        (_S.SENT, _E.IN_PROGRESS): _S.WORKING,
        (_S.SENT, _E.FAILURE): _S.REFUSED,
        (_S.SENT, _E.GONE): _S.UNPLUGGED,
        (_S.SENT, _E.RESET): _S.SENT,
        (_S.SENT, _E.LOST): _S.UNKNOWN,
        (_S.SENT, _E.VOID): _S.UNKNOWN,
        (_S.REQUESTED, _E.ACCEPTED): _S.REQUESTED,  # 0x84 and a reset both overtook the reply
        (_S.REQUESTED, _E.REJECTION): _S.REQUESTED,  # likewise: the request that was taken is somebody else's
        (_S.REQUESTED, _E.IN_PROGRESS): _S.WORKING,
        (_S.REQUESTED, _E.FAILURE): _S.REFUSED,
        (_S.REQUESTED, _E.GONE): _S.UNPLUGGED,
        (_S.REQUESTED, _E.RESET): _S.REQUESTED,
        (_S.REQUESTED, _E.LOST): _S.REQUESTED,
        (_S.REQUESTED, _E.VOID): _S.UNKNOWN,
        (_S.WORKING, _E.ACCEPTED): _S.WORKING,  # 0x84 overtook the reply
        (_S.WORKING, _E.REJECTION): _S.WORKING,  # the guest works on a request of somebody else's
        (_S.WORKING, _E.IN_PROGRESS): _S.WORKING,
        (_S.WORKING, _E.FAILURE): _S.REFUSED,
        (_S.WORKING, _E.GONE): _S.UNPLUGGED,
        (_S.WORKING, _E.RESET): _S.REQUESTED,
        (_S.WORKING, _E.LOST): _S.WORKING,
        (_S.WORKING, _E.VOID): _S.UNKNOWN,
        # The reply came last: the guest's answer stands.
        (_S.UNPLUGGED, _E.ACCEPTED): _S.UNPLUGGED,
        (_S.UNPLUGGED, _E.REJECTION): _S.UNPLUGGED,
        (_S.UNPLUGGED, _E.LOST): _S.UNPLUGGED,
        (_S.REFUSED, _E.ACCEPTED): _S.REFUSED,
        (_S.REFUSED, _E.REJECTION): _S.REFUSED,
        (_S.REFUSED, _E.LOST): _S.REFUSED,
    }
)


class IllegalEvidenceError(RuntimeError):
    """Evidence reached a removal in a state where it cannot be: a fault of qmpvcpu, not of the VM."""


@dataclass(slots=True, eq=False)
class Removal:
    """One removal of one slot.

    Attributes:
        ids: The vCPU ids of the slot.
        qom_path: The CPU that is to go; another one in the same slot is not it.
        origin: Who asked.
        requested_at: When it was sent (or first heard of), by the caller's clock in seconds.
        state: Where it stands.
        settled_at: When it became final, or None.
        overdue: True once a deadline for it has passed.
        may_ask_again: True if only the record tells of it, or the VM was reset since: no guest is known to work on
            it, and one that had taken it up may have left QEMU nothing to remember.
        claimed: Since when, as the engine counts, the guest says that it is done; None: it does not.
        code: The guest's OST status when it refused, or None.
        reason: The same in words, or "".
        rejection: How QEMU rejected it, or None.
        since: When it first came into each state, by the caller's clock.
    """

    ids: VcpuMap
    qom_path: str
    origin: Origin
    requested_at: float
    state: State = State.SENT
    settled_at: float | None = None
    overdue: bool = False
    may_ask_again: bool = False
    claimed: int | None = None
    code: int | None = None
    reason: str = ""
    rejection: Rejected | None = None
    since: dict[State, float] = field(default_factory=dict)

    def advance(self, evidence: Evidence, now: float) -> State:
        """Take *evidence* in and return the state from before.

        Raises:
            IllegalEvidenceError: It cannot come in this state; nothing was changed.
        """
        before = self.state
        try:
            self.state = TRANSITIONS[before, evidence]
        except KeyError:
            raise IllegalEvidenceError(f"{evidence.name} for a removal that is {before.name}") from None
        self.since.setdefault(self.state, now)
        if evidence in {Evidence.IN_PROGRESS, Evidence.RESET}:
            self.claimed = None
        if self.state is State.WORKING:
            self.may_ask_again = False
        elif evidence is Evidence.RESET and self.state is State.REQUESTED:
            self.may_ask_again = True
        if self.state.is_final and not before.is_final:
            self.settled_at = now
        return before

    @property
    def is_joined(self) -> bool:
        """True if a new request joins this one: nothing is sent, and its end is theirs."""
        return not (self.may_ask_again or self.state.is_final)

    @property
    def seconds(self) -> float:
        """From the request to its end; 0 while it has none."""
        return 0.0 if self.settled_at is None else self.settled_at - self.requested_at
