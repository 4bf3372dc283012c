"""Campaigns, a change of many VMs within bounds, as values: they are kept as JSON where every client reads them.

::

    bucket qmpvcpu_campaigns   ID                   Ledger: what was asked for, and how far it is
                               ID.vms.N             SelectedVms: up to 500 of the VMs it is for, from N = 0 on
                               ID.ended.HOST.VM     Ended: what one VM came to

A VM of a campaign is *waiting* until it is in the ledger's ``in_flight``, which it enters once; its wish is written
only while it is in there; and it leaves when its result has been written, so that it has *ended*. So the ledger
alone, which is changed by compare-and-set, keeps every bound, no matter how many programs carry the campaign out, or
think that they do.

::

    RUNNING ⇄ PAUSED        nothing is begun while paused
       │ ╲      │ ╲
       │  ╲     │  STOPPING → STOPPED    stop was asked for: what was begun ends, or is withdrawn
       │   HALTED                        stop_after VMs have failed: the same
      DONE                               every VM has ended
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Final

from qmpvcpu.errors import counted
from qmpvcpu.model.codec import KNOWN_SCHEMA, SCHEMA
from qmpvcpu.model.hosts import VmKey, token
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.wish import DROP_AFTER_S, Wish, WishOptions, WishPhase

MOST_AT_ONCE: Final = 500
"""The highest ``at_once``: the ledger names each VM in flight, and is written anew with each change."""

MOST_VMS: Final = 100_000
"""The most VMs of one campaign."""

VMS_IN_A_PART: Final = 500
"""How many VMs one key holds."""

_MOST_LETTERS: Final = 1000


@dataclass(frozen=True)
class CampaignSpec:
    """What a campaign does. It never changes.

    Attributes:
        map: The vCPUs that each VM should have, or None.
        count: How many, or None; exactly one of the two is given.
        include_boot: Whether a count may take boot vCPUs out.
        options: How each VM is changed.
        drop_after: How many seconds one VM may take, counted from when its wish was written.
        where: How its VMs were selected, for people: the selection itself is kept.
        at_once: How many VMs may be in flight at once.
        per_host: How many of them on one host.
        stop_after: After so many failed VMs no more are begun; None: always go on.
        who: Who asked for it, for people.
        why: The reason, for people.
    """

    closed: ClassVar[bool] = True

    map: VcpuMap | None = None
    count: int | None = None
    include_boot: bool = False
    options: WishOptions = field(default_factory=WishOptions)
    drop_after: float = DROP_AFTER_S
    where: str = ""
    at_once: int = 50
    per_host: int = 2
    stop_after: int | None = 3
    who: str = ""
    why: str = ""

    def check_foreign(self) -> None:
        """Raise ValueError if it contradicts itself."""
        self.wish("campaign", VmKey("host", "vm")).check_foreign()
        if not 1 <= self.at_once <= MOST_AT_ONCE:
            raise ValueError(f"'at_once' is {self.at_once}: it is from 1 to {MOST_AT_ONCE}")
        if self.per_host < 1:
            raise ValueError("'per_host' is 0: no VM would ever be begun")
        if self.stop_after is not None and self.stop_after < 1:
            raise ValueError("'stop_after' is 0: no VM would ever be begun")
        if len(self.where) > _MOST_LETTERS:
            raise ValueError(f"'where' is longer than {_MOST_LETTERS} letters")

    def wish(self, campaign: str, vm: VmKey) -> Wish:
        """Return the wish for one VM. Its id is the same for everybody who carries the campaign out."""
        return Wish(
            wish_id(campaign, vm.key),
            map=self.map,
            count=self.count,
            include_boot=self.include_boot,
            options=self.options,
            drop_after=self.drop_after,
            who=self.who,
            why=self.why,
            campaign=campaign,
        )

    def __str__(self) -> str:
        return f"{self.map}" if self.count is None else counted(self.count, "vCPU")


def wish_id(campaign: str, key: str) -> str:
    """Return the id of the wish for the VM with *key*."""
    host, _, vm = key.partition(".")
    return f"{campaign}/{host}/{vm}"


class CampaignStatus(enum.Enum):
    """How far a campaign is; see the module."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    HALTED = "halted"
    DONE = "done"

    @property
    def may_begin(self) -> bool:
        """True if further VMs are begun now."""
        return self is CampaignStatus.RUNNING

    @property
    def may_go_on(self) -> bool:
        """True if further VMs are begun, now or once it is resumed."""
        return self in (CampaignStatus.RUNNING, CampaignStatus.PAUSED)


@dataclass(frozen=True)
class Ledger:
    """How far a campaign is: the value of its key, changed by compare-and-set only.

    Attributes:
        id: The campaign's id.
        spec: What it does.
        created: When it was made, by the server's clock, in seconds since 1970.
        vms: How many VMs it is for.
        status: How far it is.
        epoch: How many controllers have taken it on, one after the other.
        in_flight: The VMs that may have been begun and have not ended, by their keys, each with the revision that its
            wish replaces (0: there was none before). The wish is written as the successor of that revision, so only
            once.
        ended: How many VMs have ended and left ``in_flight``.
        failed: How many of these do not have the vCPUs that were asked for.
        withdrawn: How many of these were not begun or not finished, because their wishes were withdrawn.
        schema: The format.
    """

    closed: ClassVar[bool] = True

    id: str
    spec: CampaignSpec
    created: float
    vms: int
    status: CampaignStatus = CampaignStatus.RUNNING
    epoch: int = 0
    in_flight: Mapping[str, int] = field(default_factory=dict)
    ended: int = 0
    failed: int = 0
    withdrawn: int = 0
    schema: Annotated[str, KNOWN_SCHEMA] = SCHEMA

    def check_foreign(self) -> None:
        """Raise ValueError if it contradicts itself."""
        if not self.id or token(self.id) != self.id:
            raise ValueError(f"'id' is {self.id[:60]!r}: it has letters, digits, '_' and '-' only")
        if not 1 <= self.vms <= MOST_VMS:
            raise ValueError(f"'vms' is {self.vms}: it is from 1 to {MOST_VMS}")
        if self.ended + len(self.in_flight) > self.vms or self.failed + self.withdrawn > self.ended:
            raise ValueError("it counts more VMs than it is for")
        for key in self.in_flight:
            _check_key(key)

    @property
    def waiting(self) -> int:
        """How many VMs were not begun."""
        return self.vms - self.ended - len(self.in_flight)

    @property
    def reached(self) -> int:
        """How many VMs have the vCPUs that were asked for."""
        return self.ended - self.failed - self.withdrawn

    @property
    def is_over(self) -> bool:
        """True if it has ended: it is stopped, halted or done, and no VM is in flight."""
        return not self.status.may_go_on and self.status is not CampaignStatus.STOPPING and not self.in_flight

    def settled(self) -> "Ledger":
        """Return it with the status that follows from the rest of it."""
        stop_after = self.spec.stop_after
        status = self.status
        if status.may_go_on:
            if stop_after is not None and self.failed >= stop_after and self.ended < self.vms:
                status = CampaignStatus.HALTED
            elif self.ended == self.vms:
                status = CampaignStatus.DONE
        elif status is CampaignStatus.STOPPING and not self.in_flight:
            status = CampaignStatus.STOPPED
        return self if status is self.status else replace(self, status=status)

    def paused(self) -> "Ledger":
        """Return it paused: no VM is begun until it is resumed, and VMs that were begun are finished.

        Raises:
            ValueError: It has been stopped, has halted, or is done.
        """
        return self._with(CampaignStatus.PAUSED)

    def resumed(self) -> "Ledger":
        """Return it running.

        Raises:
            ValueError: It has been stopped, has halted, or is done.
        """
        return self._with(CampaignStatus.RUNNING)

    def stopped(self) -> "Ledger":
        """Return it stopping: no more VMs are begun, and wishes that no host has begun are withdrawn.

        Raises:
            ValueError: It has halted or is done.
        """
        if self.status in (CampaignStatus.STOPPING, CampaignStatus.STOPPED):
            return self
        return self._with(CampaignStatus.STOPPING).settled()

    def _with(self, status: CampaignStatus) -> "Ledger":
        if not self.status.may_go_on:
            raise ValueError(f"it is {self.status.value}: begin another for the VMs that are left")
        return replace(self, status=status)


@dataclass(frozen=True)
class SelectedVms:
    """Some of the VMs that a campaign is for, by their keys."""

    vms: tuple[str, ...]
    schema: Annotated[str, KNOWN_SCHEMA] = SCHEMA

    def check_foreign(self) -> None:
        """Raise ValueError if it contradicts itself."""
        for key in self.vms:
            _check_key(key)


@dataclass(frozen=True)
class Ended:
    """The result of one VM in a campaign. The first one that is written stays.

    Attributes:
        host: The host's name.
        vm: The VM's name.
        phase: How far its wish got. ENDED: its host carried it out, as *code* says. EXPIRED: its host did not begin
            it in time. WITHDRAWN: the campaign was stopped before it was begun, or somebody deleted the wish.
            SUPERSEDED: another wish took its place. RUNNING: its host began it, then fell silent until its time was
            over, so nobody knows.
        code: The exit code that the command would have had, as in ``docs/command-line.md``.
        why: In words, why it failed; "": it did not, or the state says so.
        time: When this was found out, by the server's clock, in seconds since 1970.
        state: The VM's state with its report, as its host wrote it; empty where the host said nothing.
        schema: The format.
    """

    host: str
    vm: str
    phase: WishPhase
    code: int
    why: str
    time: float
    state: Mapping[str, Any]
    schema: Annotated[str, KNOWN_SCHEMA] = SCHEMA

    def check_foreign(self) -> None:
        """Raise ValueError if it contradicts itself."""
        if not self.host or not self.vm:
            raise ValueError("it does not say which VM it is about")

    @property
    def key(self) -> VmKey:
        """Which VM."""
        return VmKey(self.host, self.vm)

    @property
    def has_failed(self) -> bool:
        """True if the VM does not have what was asked for; if its wish was withdrawn, it has not failed."""
        return self.code != 0 and self.phase is not WishPhase.WITHDRAWN


def campaign_key(campaign: str) -> str:
    """Return the key of a campaign's ledger.

    Raises:
        ValueError: It is no campaign's id.
    """
    if not campaign or token(campaign) != campaign:
        raise ValueError(f"{campaign[:60]!r} is no campaign's id: `qmpvcpu campaign list` has them")
    return campaign


def part_key(campaign: str, number: int | str) -> str:
    """Return the key of the part *number* of a campaign's VMs, or of all with ``*``."""
    return f"{campaign}.vms.{number}"


def ended_key(campaign: str, vm: str) -> str:
    """Return the key of the result of the VM with key *vm*, or of all with ``>``."""
    return f"{campaign}.ended.{vm}"


def lease_key(campaign: str) -> str:
    """Return the key of the lease that is held while a campaign is carried out."""
    return f"campaign.{campaign}"


def _check_key(key: str) -> None:
    if key != VmKey.parse(key).key:
        raise ValueError(f"{key[:60]!r} is no VM's key")
