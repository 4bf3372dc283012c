"""What was found of a guest's abilities with vCPUs: each row, and all of them as a certificate."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qmpvcpu.errors import printable
from qmpvcpu.model.codec import from_json, to_json
from qmpvcpu.model.guest import GuestOs
from qmpvcpu.model.vm import VmInfo


class Ability(enum.Enum):
    """What is tried, in this order; the value is the text for people.

    PLUG: QEMU takes a vCPU. ACKNOWLEDGED: the guest says that it took it. STARTED: the vCPU has run guest code.
    ONLINE: the guest's own list has it online, by itself or once its agent was told to. IN_A_HOLE: one is plugged
    with a free one below it. ALL_AT_ONCE: several are plugged in one map. UNPLUG: the guest gives one up.
    OFFLINE_FIRST: the same, once its agent has taken the vCPU offline. PLUG_AGAIN: another is plugged into a slot
    that was emptied. REFUSAL: a guest that cannot give one up says so. AFTER_REBOOT: one is plugged after a reset of
    the VM. PENDING_OVER_RESET: a removal that was asked for before the reset comes about after it. PUT_BACK: what was
    plugged for all this leaves, in one map.
    """

    PLUG = "plug"
    ACKNOWLEDGED = "acknowledged"
    STARTED = "started"
    ONLINE = "online in the guest"
    IN_A_HOLE = "plug, leaving a hole"
    ALL_AT_ONCE = "several at once"
    UNPLUG = "unplug"
    OFFLINE_FIRST = "unplug, offline first"
    PLUG_AGAIN = "plug again in that slot"
    REFUSAL = "refusal"
    AFTER_REBOOT = "plug after a reboot"
    PENDING_OVER_RESET = "removal over a reset"
    PUT_BACK = "all out again"


class AbilityVerdict(enum.Enum):
    """How a trial ended; the value is the text for people.

    WORKS: proven. REFUSED: the guest, or QEMU, said no. NEVER: nothing came within the deadline. NOT_POSSIBLE: it was
    not tried, since it cannot work here, or is known to end this QEMU. LOST: QEMU died or went silent in the middle.
    """

    WORKS = "works"
    REFUSED = "refused"
    NEVER = "never"
    NOT_POSSIBLE = "not possible"
    LOST = "QEMU lost"


@dataclass(frozen=True, slots=True)
class AbilityRow:
    """How one ability was found.

    Attributes:
        ability: What was tried.
        verdict: How it ended.
        seconds: How long it took, or how long it was waited for in vain; None where there is no such time.
        detail: The reason, or what was seen; "" where the verdict says all.
    """

    ability: Ability
    verdict: AbilityVerdict
    seconds: float | None = None
    detail: str = ""

    @property
    def ok(self) -> bool:
        """True unless something failed that could have worked."""
        return self.verdict in (AbilityVerdict.WORKS, AbilityVerdict.NOT_POSSIBLE)

    @property
    def said(self) -> str:
        """The verdict with its evidence, in words of one line."""
        took = "" if self.seconds is None else f"{self.seconds:.3f} s"
        if took and self.verdict is AbilityVerdict.NEVER:
            took = f"waited {self.seconds:.1f} s"
        why = printable(" ".join(self.detail.split()))
        evidence = ": ".join(filter(None, (took, why)))
        return f"{self.verdict.value} ({evidence})" if evidence else self.verdict.value

    def __str__(self) -> str:
        return f"{self.ability.value}: {self.said}"


@dataclass(frozen=True)
class Certificate:
    """What was found of one guest.

    Attributes:
        name: What the VM is called.
        machine: QEMU's machine type.
        accelerator: What it runs under.
        qemu: QEMU's version.
        guest: What system runs in it, as its agent tells; "" where none does.
        rows: What was tried, in order.
    """

    name: str
    machine: str
    accelerator: str
    qemu: str
    guest: str
    rows: tuple[AbilityRow, ...]

    @classmethod
    def of(cls, vm: VmInfo, rows: Sequence[AbilityRow], guest: GuestOs | None = None) -> "Certificate":
        """Return what *rows* say of *vm* (``vm.capabilities``), with *guest* in it."""
        version = ".".join(map(str, vm.qemu_version))
        told = () if guest is None else (guest.full_name or guest.name or guest.id, guest.kernel)
        return cls(vm.name, vm.machine, vm.accelerator, version, ", ".join(filter(None, told)), tuple(rows))

    @property
    def ok(self) -> bool:
        """True if everything that can work did."""
        return all(row.ok for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return the certificate as a JSON object; ``from_json`` reads it back."""
        shown: dict[str, Any] = to_json(self)
        return shown

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> "Certificate":
        """Return the certificate that ``to_json`` was given, from the object or from its text.

        Raises:
            ValueError: It has another shape; the text names the key.
        """
        return from_json(cls, data)
