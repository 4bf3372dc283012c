"""Wishes for VMs on other hosts, who carries them out, and what came of them: values that are sent as JSON."""

import enum
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Final, cast

from qmpvcpu.errors import counted
from qmpvcpu.model.codec import KNOWN_SCHEMA, SCHEMA
from qmpvcpu.model.options import Affect, ChangeOptions, CheckedOptions, OnFailure, Proof
from qmpvcpu.model.placement import PlacementPolicy
from qmpvcpu.model.vcpumap import VcpuMap

DROP_AFTER_S: Final = 600.0
"""How long a wish that says nothing else may take, from when it was written, in seconds."""

GRACE_S: Final = 30.0
"""How much longer, in seconds, what was begun may take to come to a safe point, or to be undone."""

_MOST_LETTERS: Final = 1000


@dataclass(frozen=True)
class WishOptions:
    """The options of a change, as they are sent; None: not given, so the VM's host uses its own default.

    They are those of ``ChangeOptions``. Of a placement only the policy is sent, since each host has its own CPUs.
    """

    closed: ClassVar[bool] = True

    on_failure: OnFailure | None = None
    timeout: float | None = None
    total_timeout: float | None = None
    revert_timeout: float | None = None
    in_flight: int | None = None
    proof: Proof | None = None
    require_proof: bool | None = None
    online: bool | None = None
    offline_first: bool | None = None
    placement: PlacementPolicy | None = None
    allow_fatal: bool | None = None
    allow_boot_vcpus: bool | None = None
    affect: Affect | None = None

    @classmethod
    def of(cls, options: ChangeOptions) -> "WishOptions":
        """Return *options*, checked, as they travel.

        Raises:
            TypeError: There is no such option, or one is of a wrong type.
            ValueError: One has a wrong value, or is a placement of threads, which is of one host.
        """
        checked = CheckedOptions.of(options)
        if checked.placement is not None:
            raise ValueError("placement: host CPUs are of one host, so only 'required' or 'preferred' travels")
        given: dict[str, Any] = {name: getattr(checked, name) for name in options}
        if "placement" in given:
            given["placement"] = checked.placement_policy
        return cls(**given)

    def check_foreign(self) -> None:
        """Raise ValueError if they are no options of a change."""
        self.given()

    def given(self) -> ChangeOptions:
        """Return those that were given, for a change."""
        options = {each.name: getattr(self, each.name) for each in fields(self)}
        given = cast("ChangeOptions", {name: value for name, value in options.items() if value is not None})
        CheckedOptions.of(given)
        return given


@dataclass(frozen=True)
class Claim:
    """Which agent has begun a wish: written into the wish before anything is sent to QEMU.

    Attributes:
        revision: The wish's revision when it was claimed, which its answer names.
        written: When that revision was written, by the server's clock, in seconds since 1970.
        agent: The instance of the agent that claimed it.
        saves: How often the VM's record had been written by then (``RecordInfo.saves``): if it still says so after
            a crash, nothing was sent.
    """

    revision: int
    written: float
    agent: str
    saves: int


@dataclass(frozen=True)
class Wish:
    """What a VM should have: the value of its key in the bucket of wishes.

    Give exactly one of *map* and *count*. Any client can write a wish, with any JSON library: keys that are left out
    have their defaults. A wish with an unknown key is rejected, since ignoring it might do something else than was
    meant.

    Attributes:
        id: Its unique id.
        map: The vCPUs, or None.
        count: How many, or None.
        include_boot: Whether a count may take boot vCPUs out.
        options: How it is carried out.
        drop_after: How long it may take from when it was written, by the server's clock, in seconds: nothing is sent
            for it after that.
        who: Who wrote it, for people.
        why: The reason, for people.
        campaign: The campaign that it is part of; "": none.
        claim: Who carries it out; None: nobody has begun.
        schema: The format.
    """

    closed: ClassVar[bool] = True

    id: str
    map: VcpuMap | None = None
    count: int | None = None
    include_boot: bool = False
    options: WishOptions = field(default_factory=WishOptions)
    drop_after: float = DROP_AFTER_S
    who: str = ""
    why: str = ""
    campaign: str = ""
    claim: Claim | None = None
    schema: Annotated[str, KNOWN_SCHEMA] = SCHEMA

    def check_foreign(self) -> None:
        """Raise ValueError if it contradicts itself."""
        if not self.id:
            raise ValueError("'id' is empty: it tells this wish from every other")
        check_target(self.map, self.count, include_boot=self.include_boot)
        if max(len(self.id), len(self.who), len(self.why), len(self.campaign)) > _MOST_LETTERS:
            raise ValueError(f"a text in it is longer than {_MOST_LETTERS} letters")
        if self.drop_after <= 0:
            raise ValueError("'drop_after' is 0: it would be dropped at once")

    def __str__(self) -> str:
        return f"{self.map}" if self.count is None else counted(self.count, "vCPU")


def check_target(vcpus: VcpuMap | None, count: int | None, *, include_boot: bool) -> None:
    """Raise ValueError if these do not say what a VM is to have: a map, or a count."""
    if (vcpus is None) == (count is None):
        raise ValueError("it has both or neither of 'map' and 'count': it has one of them")
    if vcpus is not None and not vcpus:
        raise ValueError("'map' is empty, and vCPU 0 never leaves")
    if include_boot and count is None:
        raise ValueError("'include_boot' goes with a count: a map says itself which vCPUs stay")


class WishPhase(enum.Enum):
    """How far a wish got.

    WAITING: it cannot be begun yet, but will be. RUNNING: it is being carried out. ENDED: it was carried out, as the
    report or the error says. REJECTED: it cannot be read, or the agent may not carry it out; nothing was sent.
    SUPERSEDED: a newer wish replaced it; the report has what had been sent by then. EXPIRED: it was not begun in
    time; nothing was sent. WITHDRAWN: it was deleted before it had ended.
    """

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"
    REJECTED = "rejected"
    SUPERSEDED = "superseded"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"

    @property
    def is_over(self) -> bool:
        """True if nothing more is done for it."""
        return self not in (WishPhase.WAITING, WishPhase.RUNNING)


@dataclass(frozen=True)
class Answer:
    """What a VM's state says of the wish that was answered last.

    Attributes:
        revision: The wish's revision.
        id: Its id; "" where it could not be read.
        phase: How far it got.
        code: The exit code that the command would have had, as in ``docs/command-line.md``; 0 while it is not over.
        why: In words, why it waits, was rejected, or failed; "": nothing to say.
    """

    revision: int
    id: str
    phase: WishPhase
    code: int = 0
    why: str = ""
