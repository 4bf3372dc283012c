"""Which CPU of the guest is which vCPU: by its files, by its kernel's rule, learnt around a plug, or unknown. Pure.

A guest's number is no vCPU id: vCPUs 0, 2 and 5 are CPUs 0, 1 and 2 of many a Linux. Nothing here is a guess: a rule
counts only where the guest's list is exactly as the rule says.

Source: QEMU hw/acpi/cpu.c, ``CPU_NAME_FMT``, for the firmware's names; Linux arch/s390/kernel/smp.c for ``address``,
arch/x86/kernel/cpu/topology.c (6.9 and newer: numbers are fixed at boot, those present first, then by ascending APIC
id) and arch/x86/kernel/apic/apic.c (before: in the order of arrival, kept for a CPU that comes again). Measured with
Linux 6.1, 6.12 and 7.2 on x86, and with 7.2 on pseries, s390x and LoongArch.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final

from qmpvcpu.model.guest import GuestCpu, GuestVcpu, KnownBy
from qmpvcpu.model.layout import Layout, Slot
from qmpvcpu.model.vm import X86

_FIRMWARE_NAME: Final = re.compile(rb"\\_SB_?\.CPUS\.C([0-9A-F]{3,4})\s*")
_PHYSICAL_ID: Final = re.compile(rb"(-?[0-9]{1,9})\s*")
_RELEASE: Final = re.compile(r"([0-9]{1,3})\.([0-9]{1,3})")
_ENTERPRISE: Final = re.compile(r"\.el[0-9]")  # an old number on newer code
_FIXED_AT_BOOT_SINCE: Final = (6, 9)
_KEPT_SINCE: Final = (4, 9)
_BY_FIRMWARE_PATH: Final = (*X86, "loongarch64")


def place_file(arch: str, number: int) -> str | None:
    """Return the file of the guest that says which slot its CPU *number* is in; None where it has no such file."""
    if arch in _BY_FIRMWARE_PATH:
        return f"/sys/devices/system/cpu/cpu{number}/firmware_node/path"
    if arch.startswith("ppc"):
        return f"/sys/devices/system/cpu/cpu{number}/physical_id"
    if arch == "s390x":
        return f"/sys/devices/system/cpu/cpu{number}/address"
    return None


def read_place(layout: Layout, number: int, text: bytes) -> int | None:
    """Return the vCPU that *text*, from the file of the guest's CPU *number*, names; None if it names none.

    pseries and s390x tell QEMU's core-id. A CPU that pseries lists and that is not plugged has the physical id 0,
    which is that of CPU 0.
    """
    if found := _FIRMWARE_NAME.fullmatch(text):
        index = int(found[1], 16)
        return next((slot.first for slot in layout.slots if slot.cpu_index == index and slot.present), None)
    arch = layout.vm.arch
    if (arch == "s390x" or arch.startswith("ppc")) and (found := _PHYSICAL_ID.fullmatch(text)):
        physical = int(found[1])
        if arch != "s390x" and physical <= 0 < number:
            return None
        return next((_thread(slot, physical) for slot in layout.slots if _holds(slot, physical)), None)
    return None


def _holds(slot: Slot, physical: int) -> bool:
    core = slot.props.number("core-id")
    return slot.present and core is not None and core <= physical < core + slot.count


def _thread(slot: Slot, physical: int) -> int:
    return slot.first + physical - slot.props["core-id"]


class Numbering:
    """What is known of one boot of a guest.

    Attributes:
        changes: How often something happened; what the guest answered before that is out of date.
        booted_here: False if the guest may have booted in another QEMU, with other vCPUs, and come from there.
    """

    def __init__(self) -> None:
        self.changes = 0
        self.booted_here = True
        self._known: dict[int, tuple[int, KnownBy]] = {}  # vCPU and how it is known, by number
        self._booted_with: tuple[int, ...] | None = None  # vCPUs; None: not seen
        self._arrived: list[int] = []  # vCPUs that came since, each once
        self._is_in_order = True  # whether the guest took them in that order for certain
        self._listed: frozenset[int] | None = None  # the last list that had a number for each vCPU
        self._plugged: list[Sequence[int]] = []  # since that list
        self._left = False  # whether one left since that list

    # What happens.

    def plugged(self, ids: Iterable[int], unanswered: Iterable[int] = ()) -> None:
        """Note that vCPUs were plugged while the guest had not answered the plugs of others, *unanswered*, yet."""
        self.changes += 1
        came = tuple(ids)
        # A guest that finds several at once takes the lowest first.
        if any(each > min(came) for each in unanswered if each not in came):
            self._is_in_order = False
        self._arrived += [each for each in came if each not in self._arrived]
        self._plugged.append(came)
        self._forget_vcpus(came)

    def unplugged(self, ids: Iterable[int]) -> None:
        """Note that vCPUs left."""
        self.changes += 1
        self._left = True
        self._forget_vcpus(ids)

    def _forget_vcpus(self, ids: Iterable[int]) -> None:
        gone = set(ids)
        self._known = {number: known for number, known in self._known.items() if known[0] not in gone}

    def rebooted(self, enabled: Iterable[int] | None) -> None:
        """Note that the guest boots anew, with the vCPUs that are *enabled*; None: it is not known with which."""
        self.changes += 1
        self.booted_here = self.booted_here or enabled is not None
        self._known.clear()
        self._booted_with = None if enabled is None else tuple(enabled)
        self._arrived.clear()
        self._is_in_order = True
        self._plugged.clear()
        self._listed = None
        self._left = False

    # What the guest tells.

    def unanswered(self, layout: Layout) -> list[int]:
        """Return those vCPUs that came since the boot, are there, and whose plug the guest has not answered yet."""
        return [each for each in self._arrived if each in layout.enabled and layout[each].acknowledged is None]

    def unknown(self, cpus: Iterable[GuestCpu]) -> list[int]:
        """Return the numbers of those *cpus* that are not known."""
        return [cpu.number for cpu in cpus if cpu.number not in self._known]

    def told(self, number: int, vcpu: int) -> None:
        """Note that the guest's files name *vcpu* for its CPU *number*.

        Raises:
            ValueError: They name it for another one too.
        """
        other = next((each for each, (known, how) in self._known.items() if known == vcpu and each != number), None)
        if other is not None and self._known[other][1] is KnownBy.FIRMWARE:
            raise ValueError(f"CPUs {other} and {number} both say that they are vCPU {vcpu}")
        if other is not None:
            del self._known[other]
        self._known[number] = vcpu, KnownBy.FIRMWARE

    def resolve(
        self, cpus: Sequence[GuestCpu], layout: Layout, release: str, *, is_current: bool = True
    ) -> tuple[GuestVcpu, ...]:
        """Return which vCPUs the guest's *cpus*, all of its list, are.

        Args:
            cpus: The guest's list, of now.
            layout: The VM, of the same moment.
            release: Release of the guest's Linux, such as ``6.12.1``; "" where that is unknown, or it is none.
            is_current: False if the VM has changed since the list was asked for: nothing follows from it then.
        """
        numbers = frozenset(cpu.number for cpu in cpus)
        self._known = {
            number: known for number, known in self._known.items() if number in numbers and known[0] in layout.enabled
        }
        if is_current and not layout.vm.arch.startswith("ppc"):  # that one lists CPUs that are not there
            self._learn(numbers)
            self._apply_rules(numbers, layout, release)
            self._complete(numbers, layout)
        # A guest takes a vCPU some time after it was plugged. Until then the last whole list is the one to compare.
        if is_current and len(numbers) == len(layout.enabled):
            self._listed = numbers
            self._plugged.clear()
            self._left = False
        return tuple(self._vcpu(cpu) for cpu in cpus)

    def _vcpu(self, cpu: GuestCpu) -> GuestVcpu:
        vcpu, how = self._known.get(cpu.number, (None, KnownBy.UNKNOWN))
        return GuestVcpu(vcpu, cpu.number, cpu.online, cpu.can_offline, how)

    def _learn(self, numbers: frozenset[int]) -> None:
        """Between two whole lists one vCPU came, none left, and one number came: it is that one's."""
        if self._listed is None or self._left or len(self._plugged) != 1 or len(self._plugged[0]) != 1:
            return
        if self._listed < numbers and len(numbers - self._listed) == 1:
            (number,) = numbers - self._listed
            self._know(number, self._plugged[0][0], KnownBy.LEARNT)

    def _complete(self, numbers: frozenset[int], layout: Layout) -> None:
        """The last number is the last vCPU's, if the list is that of before and nothing happened meanwhile."""
        if self._listed != numbers or self._plugged or self._left or len(numbers) != len(layout.enabled):
            return
        unknown = numbers - self._known.keys()
        rest = layout.enabled - {vcpu for vcpu, _ in self._known.values()}
        if len(unknown) == len(rest) == 1:
            self._know(next(iter(unknown)), next(iter(rest)), KnownBy.LEARNT)

    def _apply_rules(self, numbers: frozenset[int], layout: Layout, release: str) -> None:
        if layout.vm.arch not in X86 or _RELEASE.match(release) is None:
            return
        for number, vcpu in _first_ones(layout):
            if number in numbers and (number == 0 or self.booted_here):
                self._know(number, vcpu, KnownBy.RULE)
        ruled = self._by_boot(layout, release)
        if ruled.keys() == numbers:
            for number, vcpu in ruled.items():
                self._know(number, vcpu, KnownBy.RULE)

    def _by_boot(self, layout: Layout, release: str) -> dict[int, int]:
        """Return the vCPU of each number by the kernel's rule; nothing where that, or the boot, is not known."""
        version = _version(release)
        if self._booted_with is None or version is None or version < _KEPT_SINCE:
            return {}
        booted = sorted(self._booted_with)
        came = [each for each in self._arrived if each not in self._booted_with]
        # One that came while the guest was booting may have been counted with those that were there.
        if not all(layout[each].acknowledged for each in came if each in layout.enabled):
            return {}
        if version >= _FIXED_AT_BOOT_SINCE:
            came = [each for each in range(layout.max) if each not in self._booted_with]
        elif not self._is_in_order:
            return {}
        return {number: vcpu for number, vcpu in enumerate(booted + came) if vcpu in layout.enabled}

    def _know(self, number: int, vcpu: int, how: KnownBy) -> None:
        """Note what is known, unless it contradicts what is known better."""
        if number not in self._known and all(known != vcpu for known, _ in self._known.values()):
            self._known[number] = vcpu, how


def _first_ones(layout: Layout) -> Iterable[tuple[int, int]]:
    """Yield number and vCPU of the machine's first CPUs that QEMU started with and that never left.

    They were there at every boot, and nothing can come before them.
    """
    for number, slot in enumerate(layout.slots):
        if not slot.is_boot or slot.count != 1 or slot.cpu_index != number:
            return
        yield number, slot.first


def _version(release: str) -> tuple[int, int] | None:
    """Return the version of a kernel's *release*; None where the number does not tell what code it has."""
    found = _RELEASE.match(release)
    return None if found is None or _ENTERPRISE.search(release) else (int(found[1]), int(found[2]))
