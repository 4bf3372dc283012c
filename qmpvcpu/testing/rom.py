"""What the micro-guest does when QEMU asks it to give up a CPU, and the ROM image that does it.

Pure: bytes in, bytes out. The code of the guest is assembled from ``fixtures/microguest/microguest.asm``.
"""

import dataclasses
import enum
import struct
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Self

from qmpvcpu.given import at_least, checked, values

UNTIL_TOLD = 0xFFFF
"""A delay that ends only when the guest is given other behaviours."""

MAX_RULES = 8
"""Behaviours that one guest can hold."""

RULE_SIZE = 16
"""Bytes of a packed behaviour."""

_BIOS_SIZE = 0x10000  # QEMU takes multiples of 64 KiB
_RULES_OFFSET = 0xFF00
_READY_OFFSET = _RULES_OFFSET + (MAX_RULES + 1) * RULE_SIZE  # the ninth rule is built in: comply
_ANY_SLOT = 0xFFFF
_NO_REFUSAL = {0: "the CPU has left", 0x84: "the guest works on it"}  # _OST of an ejection request
_NO_REFUSED_INSERT = {0: "the CPU is taken", 0x80: "the guest works on it"}
_SOURCES = (3, 0x103)
_RULE = struct.Struct("<HBBIHHHH")
_WORD = struct.Struct("<H")


class RemovalAction(enum.Enum):
    """What the guest does with a removal when its time has come; the values are the ROM's."""

    EJECT = 0
    IGNORE = 1
    REFUSE = 2
    LIE = 3


class _Flag(enum.IntFlag):
    """Bits of a rule's flags byte; the values are the ROM's."""

    ANNOUNCE = 1
    ANSWER = 2
    UNTIL_RESET = 4
    INSERT_MUTE = 8
    START = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How the guest answers the hot-plug of one slot, or of all.

    Made by the named constructors; limited by :meth:`for_slot` and :meth:`for_first`; with :meth:`starting` the guest
    also starts what is plugged. Of several behaviours the guest
    follows the first that fits a slot, and complies if none does.

    Units: delays in milliseconds; slots are QEMU's ``cpu-index``, which is the vCPU id on x86.

    Attributes:
        removal: What the guest does with a removal.
        announce: Say _OST 0x84 (ejection in progress) when a removal is taken up, as Linux does.
        answer: Say _OST 0 after the eject.
        status: _OST status of a refusal.
        source: _OST source event of all answers to removals: 3 (ejection request) or 0x103 (the OS's own).
        delay_ms: Time between taking a removal up and acting; :data:`UNTIL_TOLD`: until the guest is told otherwise.
            The guest serves one slot at a time, as Linux does: others wait meanwhile.
        times: How many removals this holds for, then the next behaviour that fits; 0: all.
        holds_until_reset: It holds until the first reset of the VM.
        insert_answer: Answer inserts at all.
        insert_status: _OST status of inserts: 0 taken, anything else not.
        starts: Start inserted CPUs.
        slot: The slot it is for; None: every one.

    Raises:
        ValueError: A value does not fit its field, or says something that the others contradict.
    Source:
        QEMU docs/specs/acpi_cpu_hotplug.rst; ACPI 6.5 section 6.3.5, _OST.
    """

    removal: RemovalAction = RemovalAction.EJECT
    announce: bool = True
    answer: bool = True
    status: int = 0
    source: int = 3
    delay_ms: int = 0
    times: int = 0
    holds_until_reset: bool = False
    insert_answer: bool = True
    insert_status: int = 0
    starts: bool = False
    slot: int | None = None

    def __post_init__(self) -> None:
        fields = [each.name for each in dataclasses.fields(self)]
        given = values(Behaviour.__init__, {name: getattr(self, name) for name in fields})
        for name, limit in (
            ("status", 0xFFFFFFFF),
            ("source", 0xFFFF),
            ("delay_ms", UNTIL_TOLD),
            ("times", 0xFFFF),
            ("insert_status", 0xFFFF),
        ):
            value = given[name]
            if not 0 <= value <= limit:
                raise ValueError(f"{name} is {value}, must be in 0..{limit:#x}")
        if self.slot is not None and not 0 <= self.slot < _ANY_SLOT - 1:
            raise ValueError(f"slot is {self.slot}, must be in 0..{_ANY_SLOT - 2:#x}")
        self._refuse_nonsense()

    def _refuse_nonsense(self) -> None:
        """Refuse what no guest can mean: it would answer otherwise than its name promises."""
        if self.removal is RemovalAction.IGNORE and (self.times or self.delay_ms):
            what = "times" if self.times else "delay_ms"
            raise ValueError(f"a silent guest looks at no removal, so it cannot have {what}={getattr(self, what)}")
        if self.removal is RemovalAction.REFUSE:
            _check_refusal(self.status, _NO_REFUSAL, "0x82 (device is busy), for example")
        elif self.status:
            raise ValueError(f"status is {self.status:#x}, which only a refusal says, and removal is {self.removal}")
        if self.source not in _SOURCES:
            raise ValueError(f"source is {self.source:#x}, must be 3 (ejection request) or 0x103 (the OS's own)")
        if self.insert_status and not self.insert_answer:
            raise ValueError(f"insert_status is {self.insert_status:#x}, and insert_answer=False says nothing")
        if self.insert_status and self.starts:
            raise ValueError(f"insert_status is {self.insert_status:#x}: a CPU that is not taken cannot be started")

    @classmethod
    def complying(cls) -> Self:
        """Ejects at once: _OST 0x84, eject, _OST 0."""
        return cls()

    @classmethod
    def slow(cls, ms: int) -> Self:
        """Ejects *ms* milliseconds after _OST 0x84."""
        return cls(delay_ms=ms)

    @classmethod
    def hanging(cls) -> Self:
        """Says _OST 0x84 and decides only when told: its next behaviours apply to the removal under way."""
        return cls(delay_ms=UNTIL_TOLD)

    @classmethod
    def refusing(cls, status: int, *, announce: bool = True, delay_ms: int = 0) -> Self:
        """Keeps the CPU and answers _OST *status* (0x80 to 0x83, 1, ...), after 0x84 if *announce*.

        Raises:
            ValueError: The status is 0 or 0x84, which are no refusals.
        """
        return cls(removal=RemovalAction.REFUSE, status=status, announce=announce, delay_ms=delay_ms)

    @classmethod
    def silent(cls) -> Self:
        """Does not look at removals: no event at all, QEMU keeps the request.

        A guest that is told to comply later serves it at the next hot-plug event of any CPU.
        """
        return cls(removal=RemovalAction.IGNORE)

    @classmethod
    def silent_until_reset(cls) -> Self:
        """Silent, until the VM is reset; what is pending then leaves at the next hot-plug event of any CPU.

        Linux after a panic and a reboot, measured on QEMU 7.2, 10.0 and 11.1.
        """
        return cls(removal=RemovalAction.IGNORE, holds_until_reset=True)

    @classmethod
    def lying(cls) -> Self:
        """Answers _OST 0x84 and 0 (success) and keeps the CPU."""
        return cls(removal=RemovalAction.LIE)

    @classmethod
    def wordless(cls) -> Self:
        """Ejects without a word: no _OST for removals."""
        return cls(announce=False, answer=False)

    @classmethod
    def silent_about_inserts(cls) -> Self:
        """Takes inserted CPUs without an _OST, as an OS in early boot; complies with removals."""
        return cls(insert_answer=False)

    @classmethod
    def refusing_inserts(cls, status: int = 1) -> Self:
        """Answers inserts with _OST *status*; QEMU keeps the CPU all the same. Complies with removals.

        Raises:
            ValueError: The status is 0 or 0x80, which are no refusals of an insert.
        """
        _check_refusal(status, _NO_REFUSED_INSERT, "1, for example")
        return cls(insert_status=status)

    def for_slot(self, slot: int) -> Self:
        """The same, for one slot only."""
        return dataclasses.replace(self, slot=slot)

    def starting(self) -> Self:
        """The same, and it starts CPUs as they are inserted; without, no plugged vCPU executes code.

        A started CPU counts, for some 60 ms under TCG and 0.3 s under KVM, and halts. Under KVM the vCPUs need
        x2apic, which they have by default.

        Raises:
            ValueError: It refuses inserts.
        """
        return dataclasses.replace(self, starts=True)

    def for_first(self, times: int) -> Self:
        """The same, for the first *times* removals it fits only.

        Raises:
            ValueError: *times* is less than 1.
        """
        return dataclasses.replace(self, times=at_least("times", times, 1))

    def pack(self) -> bytes:
        """The rule of 16 bytes that the ROM reads."""
        flags = (
            _Flag.ANNOUNCE * self.announce
            | _Flag.ANSWER * self.answer
            | _Flag.UNTIL_RESET * self.holds_until_reset
            | _Flag.INSERT_MUTE * (not self.insert_answer)
            | _Flag.START * self.starts
        )
        return _RULE.pack(
            _ANY_SLOT if self.slot is None else self.slot,
            self.removal.value,
            flags,
            self.status,
            self.delay_ms,
            self.times,
            self.source,
            self.insert_status,
        )


def _check_refusal(status: int, others: Mapping[int, str], example: str) -> None:
    if status in others:
        raise ValueError(f"status is {status:#x}, which says that {others[status]}; a refusal is {example}")


def pack_rules(behaviours: Behaviour | Iterable[Behaviour], *, slots: int = _ANY_SLOT - 1) -> bytes:
    """The rules of *behaviours*, 16 bytes each, first match first.

    Args:
        behaviours: One, or several.
        slots: How many slots the VM has.

    Raises:
        TypeError: They are no behaviours.
        ValueError: There are more than :data:`MAX_RULES`, or one can never apply: the VM has no such slot, or an
            earlier one fits always.
    """
    named = (behaviours,) if isinstance(behaviours, str) or not isinstance(behaviours, Iterable) else behaviours
    given: list[Behaviour] = []
    for one in named:
        if not isinstance(one, Behaviour):
            raise TypeError(f"behaviour is {one!r}, must be made by a constructor, such as Behaviour.silent()")
        given.append(one)
    if len(given) > MAX_RULES:
        raise ValueError(f"{len(given)} behaviours, the micro-guest holds {MAX_RULES}")
    for place, one in enumerate(given):
        if one.slot is not None and one.slot >= slots:
            raise ValueError(f"a behaviour is for slot {one.slot}, the VM has slots 0 to {slots - 1}")
        for earlier in given[:place]:
            if earlier.slot in {None, one.slot} and not earlier.times and not earlier.holds_until_reset:
                where = "every slot" if earlier.slot is None else f"slot {earlier.slot}"
                raise ValueError(f"behaviour {place + 1} never applies: an earlier one fits {where}, and comes first")
    return b"".join(behaviour.pack() for behaviour in given)


@checked
def rom_image(
    behaviours: Behaviour | Iterable[Behaviour] = (), *, ready_after_ms: int = 0, slots: int = _ANY_SLOT - 1
) -> bytes:
    """A 64 KiB image for QEMU's ``-bios``: the micro-guest with *behaviours*.

    Runs on q35 and i440fx (``pc``), under KVM and TCG; needs no more than ``-m 1``. On COM1 it writes ``B`` when it
    listens there and ``R`` when it is ready; ``R`` also goes to ``-debugcon`` (port 0xe9).

    Args:
        behaviours: One, or several; for each slot the first that fits applies.
        ready_after_ms: Time until it takes over ACPI CPU hot-plug; until then QEMU before 11 refuses ``device_del``.
            :data:`UNTIL_TOLD`: when it is given behaviours.
        slots: How many slots the VM has.

    Returns:
        The image.

    Raises:
        TypeError: They are no behaviours.
        ValueError: Too many behaviours, one that never applies, or a time that does not fit 16 bits.
    """
    if not 0 <= ready_after_ms <= UNTIL_TOLD:
        raise ValueError(f"ready_after_ms is {ready_after_ms}, must be in 0..{UNTIL_TOLD:#x}")
    code = resources.files(__package__).joinpath("microguest.rom").read_bytes()
    image = bytearray(_BIOS_SIZE - len(code)) + code
    rules = pack_rules(behaviours, slots=slots)
    image[_RULES_OFFSET : _RULES_OFFSET + len(rules)] = rules
    _WORD.pack_into(image, _READY_OFFSET, ready_after_ms)
    return bytes(image)
