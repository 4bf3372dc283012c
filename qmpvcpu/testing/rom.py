"""What the micro-guest does when QEMU asks it to give up a CPU, and the ROM image that does it.

Pure: bytes in, bytes out. The code of the guest is assembled from ``fixtures/microguest/microguest.asm``.
"""

import dataclasses
import enum
import struct
from collections.abc import Iterable
from importlib import resources
from typing import Self

from qmpvcpu.given import checked, values

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
_RULE = struct.Struct("<HBBIHHHH")
_WORD = struct.Struct("<H")


class RemovalAction(enum.IntEnum):
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How the guest answers the hot-plug of one slot, or of all.

    Made by the named constructors; limited by :meth:`for_slot` and :meth:`for_first`. Of several behaviours the guest
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
        slot: The slot it is for; None: every one.

    Raises:
        ValueError: A value does not fit its field, or a silent guest should count removals (it looks at none).
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
        if self.times and self.removal is RemovalAction.IGNORE:
            raise ValueError("a silent guest looks at no removal, so it cannot count them")

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
        """Keeps the CPU and answers _OST *status* (0x80 to 0x83, 1, ...), after 0x84 if *announce*."""
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
        """Answers inserts with _OST *status*; QEMU keeps the CPU all the same. Complies with removals."""
        return cls(insert_status=status)

    def for_slot(self, slot: int) -> Self:
        """The same, for one slot only."""
        return dataclasses.replace(self, slot=slot)

    def for_first(self, times: int) -> Self:
        """The same, for the first *times* removals it fits only."""
        return dataclasses.replace(self, times=times)

    def pack(self) -> bytes:
        """The rule of 16 bytes that the ROM reads."""
        flags = (
            _Flag.ANNOUNCE * self.announce
            | _Flag.ANSWER * self.answer
            | _Flag.UNTIL_RESET * self.holds_until_reset
            | _Flag.INSERT_MUTE * (not self.insert_answer)
        )
        return _RULE.pack(
            _ANY_SLOT if self.slot is None else self.slot,
            self.removal,
            flags,
            self.status,
            self.delay_ms,
            self.times,
            self.source,
            self.insert_status,
        )


def pack_rules(behaviours: Behaviour | Iterable[Behaviour]) -> bytes:
    """The rules of *behaviours*, 16 bytes each, first match first.

    Raises:
        ValueError: More than :data:`MAX_RULES`.
    """
    given = (behaviours,) if isinstance(behaviours, Behaviour) else tuple(behaviours)
    if len(given) > MAX_RULES:
        raise ValueError(f"{len(given)} behaviours, the micro-guest holds {MAX_RULES}")
    return b"".join(behaviour.pack() for behaviour in given)


@checked
def rom_image(behaviours: Behaviour | Iterable[Behaviour] = (), *, ready_after_ms: int = 0) -> bytes:
    """A 64 KiB image for QEMU's ``-bios``: the micro-guest with *behaviours*.

    Runs on q35 and i440fx (``pc``), under KVM and TCG; needs no more than ``-m 1``. On COM1 it writes ``B`` when it
    listens there and ``R`` when it is ready; ``R`` also goes to ``-debugcon`` (port 0xe9).

    Args:
        behaviours: One, or several; for each slot the first that fits applies.
        ready_after_ms: Time until it takes over ACPI CPU hot-plug; until then QEMU before 11 refuses ``device_del``.
            :data:`UNTIL_TOLD`: when it is given behaviours.

    Returns:
        The image.

    Raises:
        ValueError: Too many behaviours, or a time that does not fit 16 bits.
    """
    if not 0 <= ready_after_ms <= UNTIL_TOLD:
        raise ValueError(f"ready_after_ms is {ready_after_ms}, must be in 0..{UNTIL_TOLD:#x}")
    code = resources.files(__package__).joinpath("microguest.rom").read_bytes()
    image = bytearray(_BIOS_SIZE - len(code)) + code
    rules = pack_rules(behaviours)
    image[_RULES_OFFSET : _RULES_OFFSET + len(rules)] = rules
    _WORD.pack_into(image, _READY_OFFSET, ready_after_ms)
    return bytes(image)
