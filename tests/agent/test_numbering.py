"""Whose number is whose, with kernels of both rules, holes, and guests that do not say."""

import base64
from dataclasses import replace

import pytest

from qmpvcpu import Layout, VcpuMap
from qmpvcpu.agent import answers
from qmpvcpu.agent.numbering import Numbering, place_file, read_place
from qmpvcpu.model.guest import GuestCpu, KnownBy
from qmpvcpu.model.layout import CpuProps
from qmpvcpu.model.verdicts import OstAnswer
from tests.agent.recorded import answers as recorded
from tests.agent.recorded import exchanges
from tests.layouts import KVM, layout

OLD, NEW, UNTOLD = "6.1.0-40-amd64", "6.12.48+deb13-amd64", ""
ACKNOWLEDGED = OstAnswer(1, 0)


def cpus(*numbers: int) -> tuple[GuestCpu, ...]:
    return tuple(GuestCpu(number, online=True, can_offline=number != 0) for number in numbers)


def boot(plugged: str, *, acknowledged: bool = True, booted: str = "0") -> Layout:
    """A layout in which *booted* are QEMU's own, and all others ours and acknowledged."""
    origins = {each: "boot" if each in VcpuMap.parse(booted) else "ours" for each in VcpuMap.parse(plugged)}
    made = layout(origins, slots=8)
    slots = tuple(
        slot.answered(ACKNOWLEDGED) if acknowledged and slot.present and not slot.is_boot else slot
        for slot in made.slots
    )
    return replace(made, slots=slots)


def mapping(numbering: Numbering, numbers: tuple[int, ...], now: Layout, release: str) -> dict[int, int | None]:
    return {each.number: each.vcpu for each in numbering.resolve(cpus(*numbers), now, release)}


# Measured: Linux 6.1 numbers in the order of arrival; Linux 6.12 has fixed the numbers at boot.
@pytest.mark.parametrize(
    ("release", "booted", "arrived", "expected"),
    [
        (OLD, "0", (5, 2, 7), {0: 0, 1: 5, 2: 2, 3: 7}),
        (NEW, "0", (5, 2, 7), {0: 0, 5: 5, 2: 2, 7: 7}),
        (OLD, "0,5", (1, 2, 7), {0: 0, 1: 5, 2: 1, 3: 2, 4: 7}),
        (NEW, "0,5", (1, 2, 7), {0: 0, 1: 5, 2: 1, 3: 2, 7: 7}),
        (NEW, "0-1", (2, 5), {0: 0, 1: 1, 2: 2, 5: 5}),
        ("5.10.0-30-amd64", "0", (3,), {0: 0, 1: 3}),
        ("7.2.13+deb14-amd64", "0", (3,), {0: 0, 3: 3}),
    ],
)
def test_a_rule_tells_where_the_boot_was_seen(
    release: str, booted: str, arrived: tuple[int, ...], expected: dict[int, int]
) -> None:
    numbering = Numbering()
    numbering.rebooted(VcpuMap.parse(booted))
    for each in arrived:
        numbering.plugged([each])
    now = boot(str(VcpuMap(expected.values())))
    assert mapping(numbering, tuple(expected), now, release) == expected


def test_a_cpu_that_comes_again_has_its_old_number() -> None:
    for release, expected in ((OLD, {0: 0, 1: 5, 2: 2}), (NEW, {0: 0, 5: 5, 2: 2})):
        numbering = Numbering()
        numbering.rebooted([0])
        numbering.plugged([5])
        numbering.plugged([2])
        numbering.unplugged([5])
        numbering.plugged([5])
        assert mapping(numbering, tuple(expected), boot("0,2,5"), release) == expected


def test_a_number_that_was_left_stays_a_hole() -> None:
    numbering = Numbering()
    numbering.rebooted([0])
    numbering.plugged([5])
    numbering.plugged([2])
    numbering.unplugged([5])
    assert mapping(numbering, (0, 2), boot("0,2"), OLD) == {0: 0, 2: 2}


@pytest.mark.parametrize("release", [OLD, NEW])
def test_a_list_that_is_not_as_the_rule_says_is_not_explained_by_it(release: str) -> None:
    numbering = Numbering()
    numbering.rebooted([0])
    numbering.plugged([5])
    assert mapping(numbering, (0, 3), boot("0,5"), release) == {0: 0, 3: None}


def test_a_plug_that_the_guest_did_not_acknowledge_may_have_been_part_of_its_boot() -> None:
    numbering = Numbering()
    numbering.rebooted([0])
    numbering.plugged([5])
    numbering.plugged([1])
    assert mapping(numbering, (0, 1, 2), boot("0,1,5", acknowledged=False), OLD) == {0: 0, 1: None, 2: None}


@pytest.mark.parametrize("release", [UNTOLD, "3.10.0-1160.el7.x86_64", "5.14.0-503.el9.x86_64", "nonsense", "4.4.0"])
def test_a_kernel_whose_rule_is_not_known_is_not_explained(release: str) -> None:
    numbering = Numbering()
    numbering.rebooted([0])
    numbering.plugged([2])
    numbering.plugged([3])
    assert mapping(numbering, (0, 1, 2), boot("0,2-3"), release)[1] is None


def test_without_the_boot_only_the_first_boot_cpus_are_known() -> None:
    numbering = Numbering()
    now = layout({0: "boot", 1: "boot", 3: "boot", 5: "ours", 6: "ours"})
    known = numbering.resolve(cpus(0, 1, 2, 5, 6), now, NEW)
    assert [(each.vcpu, each.known_by) for each in known] == [
        (0, KnownBy.RULE),
        (1, KnownBy.RULE),
        (None, KnownBy.UNKNOWN),
        (None, KnownBy.UNKNOWN),
        (None, KnownBy.UNKNOWN),
    ]


def test_a_number_is_learnt_where_one_vcpu_came_and_one_number() -> None:
    numbering = Numbering()
    assert mapping(numbering, (0,), boot("0"), UNTOLD) == {0: None}
    numbering.plugged([5])
    known = numbering.resolve(cpus(0, 1), boot("0,5"), UNTOLD)
    assert (known[1].vcpu, known[1].known_by) == (5, KnownBy.LEARNT)
    numbering.plugged([2])
    assert mapping(numbering, (0, 1, 2), boot("0,2,5"), UNTOLD) == {0: None, 1: 5, 2: 2}


def test_a_number_is_learnt_though_the_guest_takes_the_vcpu_later() -> None:
    numbering = Numbering()
    mapping(numbering, (0, 1), boot("0,2"), UNTOLD)
    numbering.plugged([5])
    assert mapping(numbering, (0, 1), boot("0,2,5"), UNTOLD)[1] is None
    assert mapping(numbering, (0, 1, 2), boot("0,2,5"), UNTOLD) == {0: None, 1: None, 2: 5}
    numbering.plugged([6])
    assert mapping(numbering, (0, 1, 2), boot("0,2,5-6"), UNTOLD)[2] == 5
    numbering.plugged([7])
    assert mapping(numbering, (0, 1, 2, 3), boot("0,2,5-7"), UNTOLD)[3] is None


def test_nothing_is_learnt_of_a_number_that_may_be_that_of_an_earlier_plug() -> None:
    numbering = Numbering()
    mapping(numbering, (0,), boot("0"), UNTOLD)
    for each in (5, 2):
        numbering.plugged([each])
    mapping(numbering, (0, 1), boot("0,2,5"), UNTOLD)  # it has taken one of them so far
    numbering.plugged([7])
    assert mapping(numbering, (0, 1, 2), boot("0,2,5,7"), UNTOLD) == {0: None, 1: None, 2: None}


def test_nothing_is_learnt_of_a_number_that_may_be_that_of_a_plug_before_an_unplug() -> None:
    numbering = Numbering()
    mapping(numbering, (0, 1), boot("0,3"), UNTOLD)
    numbering.plugged([5])
    numbering.unplugged([3])
    mapping(numbering, (0,), boot("0,5"), UNTOLD)
    numbering.plugged([2])
    assert mapping(numbering, (0, 1), boot("0,2,5"), UNTOLD) == {0: None, 1: None}
    # Once it has taken both, the next one is told apart again.
    mapping(numbering, (0, 1, 2), boot("0,2,5"), UNTOLD)
    numbering.plugged([7])
    assert mapping(numbering, (0, 1, 2, 3), boot("0,2,5,7"), UNTOLD)[3] == 7


def test_a_plug_is_unanswered_until_the_guest_says_that_it_took_the_vcpu() -> None:
    numbering = Numbering()
    assert numbering.unanswered(boot("0,5", acknowledged=False)) == []  # it was there before us
    numbering.plugged([5])
    assert numbering.unanswered(boot("0,5", acknowledged=False)) == [5]
    assert numbering.unanswered(boot("0,5")) == []
    assert numbering.unanswered(boot("0")) == []


# Measured: Linux 6.1 under load finds vCPUs 7 and 3 at once, and takes 3 first.
@pytest.mark.parametrize(
    ("arrived", "release", "expected"),
    [
        ((7, 3), OLD, {0: 0, 1: None, 2: None}),
        ((3, 7), OLD, {0: 0, 1: 3, 2: 7}),
        ((7, 3), NEW, {0: 0, 3: 3, 7: 7}),
    ],
)
def test_the_order_of_plugs_that_the_guest_may_find_at_once_is_that_of_their_slots(
    arrived: tuple[int, int], release: str, expected: dict[int, int | None]
) -> None:
    numbering = Numbering()
    numbering.rebooted([0])
    first, second = arrived
    numbering.plugged([first])
    numbering.plugged([second], unanswered=[first, second])
    assert mapping(numbering, tuple(expected), boot("0,3,7"), release) == expected
    numbering.rebooted([0, 3])
    numbering.plugged([7])
    assert mapping(numbering, (0, 1, 2), boot("0,3,7"), OLD) == {0: 0, 1: 3, 2: 7}


def test_a_list_from_before_a_change_teaches_nothing() -> None:
    numbering = Numbering()
    mapping(numbering, (0, 1), boot("0,2"), UNTOLD)
    numbering.plugged([5])
    late = numbering.resolve(cpus(0, 1, 2), boot("0,2,5"), UNTOLD, is_current=False)
    assert [each.vcpu for each in late] == [None, None, None]
    assert mapping(numbering, (0, 1, 2), boot("0,2,5"), UNTOLD) == {0: None, 1: None, 2: 5}


def test_a_guest_that_came_from_another_qemu_may_have_booted_with_other_vcpus() -> None:
    numbering = Numbering()
    numbering.booted_here = False
    now = layout({0: "boot", 1: "boot", 2: "boot"})
    assert mapping(numbering, (0, 1, 2), now, OLD) == {0: 0, 1: None, 2: None}
    numbering.rebooted([0, 1, 2])
    assert mapping(numbering, (0, 1, 2), now, OLD) == {0: 0, 1: 1, 2: 2}


def test_two_at_once_are_not_learnt() -> None:
    numbering = Numbering()
    mapping(numbering, (0,), boot("0"), UNTOLD)
    numbering.plugged([5])
    numbering.plugged([2])
    assert mapping(numbering, (0, 1, 2), boot("0,2,5"), UNTOLD) == {0: None, 1: None, 2: None}


def test_nothing_is_learnt_where_one_left_meanwhile() -> None:
    numbering = Numbering()
    mapping(numbering, (0, 1), boot("0,3"), UNTOLD)
    numbering.unplugged([3])
    numbering.plugged([5])
    assert mapping(numbering, (0, 1, 2), boot("0,5"), UNTOLD) == {0: None, 1: None, 2: None}


def test_the_last_number_is_the_last_vcpus_once_nothing_moves() -> None:
    numbering = Numbering()
    assert mapping(numbering, (0, 1), boot("0,5"), NEW) == {0: 0, 1: None}
    assert mapping(numbering, (0, 1), boot("0,5"), NEW) == {0: 0, 1: 5}


def test_what_a_vcpu_was_is_forgotten_when_it_leaves_and_all_when_the_guest_boots() -> None:
    numbering = Numbering()
    numbering.told(3, 5)
    numbering.told(1, 2)
    numbering.unplugged([5])
    assert numbering.unknown(cpus(1, 3)) == [3]
    numbering.rebooted(None)
    assert numbering.unknown(cpus(1, 3)) == [1, 3]


def test_two_numbers_for_one_vcpu_are_a_lie() -> None:
    numbering = Numbering()
    numbering.told(1, 5)
    with pytest.raises(ValueError, match="CPUs 1 and 2 both say that they are vCPU 5"):
        numbering.told(2, 5)


def test_the_guests_files_go_before_what_was_learnt() -> None:
    numbering = Numbering()
    mapping(numbering, (0,), boot("0"), UNTOLD)
    numbering.plugged([5])
    mapping(numbering, (0, 1), boot("0,5"), UNTOLD)
    numbering.told(2, 5)
    numbering.told(1, 4)
    assert mapping(numbering, (0, 1, 2), boot("0,4-5"), UNTOLD) == {0: None, 1: 4, 2: 5}


# Files.


def test_recorded_files_name_their_slots() -> None:
    for name, arch in (
        ("q35-linux6.1", "x86_64"),
        ("q35-linux6.12", "x86_64"),
        ("loongarch-linux7.2", "loongarch64"),
    ):
        vm = replace(KVM, arch=arch)
        now = layout("0-7", vm=vm)
        opened = [each for each in exchanges(name) if each.command == "guest-file-open"]
        for question, answer in zip(opened, recorded(name, "guest-file-read"), strict=True):
            number = int(question.arguments["path"].split("cpu/cpu")[1].split("/")[0])
            assert question.arguments["path"] == place_file(arch, number)
            text, _ = answers.parse_read(answer["return"], 4096)
            assert read_place(now, number, text) == (1 if arch == "loongarch64" else 5)
    assert base64.b64decode("XF9TQl8uQ1BVUy5DMDA1Cg==") == b"\\_SB_.CPUS.C005\n"


@pytest.mark.parametrize(
    ("text", "vcpu"),
    [
        (b"\\_SB_.CPUS.C003\n", 3),
        (b"\\_SB.CPUS.C003", 3),
        (b"\\_SB_.CPUS.C007\n", None),  # an empty slot
        (b"\\_SB_.CPUS.CFFF\n", None),
        (b"\\_SB_.PCI0.ISA0\n", None),
        (b"", None),
        (b"\xff\x00", None),
        (b"3\n", None),
    ],
)
def test_a_firmware_name_is_a_slot_that_has_a_cpu(text: bytes, vcpu: int | None) -> None:
    assert read_place(layout("0,3"), 9, text) == vcpu


def pseries(*, threads: int) -> Layout:
    vm = replace(KVM, arch="ppc64", machine="pseries-11.1")
    made = layout({0: "boot", 2 * threads: "ours"}, slots=4, count=threads, vm=vm)
    slots = tuple(replace(slot, props=CpuProps({"core-id": slot.first})) for slot in made.slots)
    return replace(made, slots=slots)


@pytest.mark.parametrize(
    ("threads", "number", "text", "vcpu"),
    [
        (1, 0, b"0\n", 0),
        (1, 1, b"2\n", 2),
        (1, 3, b"0\n", None),  # listed, and not plugged
        (1, 3, b"-1\n", None),
        (2, 1, b"1\n", 1),
        (2, 4, b"4\n", 4),
        (2, 5, b"5\n", 5),
        (2, 6, b"6\n", None),
    ],
)
def test_pseries_tells_the_physical_id(threads: int, number: int, text: bytes, vcpu: int | None) -> None:
    assert place_file("ppc64", number) == f"/sys/devices/system/cpu/cpu{number}/physical_id"
    assert read_place(pseries(threads=threads), number, text) == vcpu


def test_s390x_tells_the_address() -> None:
    assert place_file("s390x", 1) == "/sys/devices/system/cpu/cpu1/address"
    vm = replace(KVM, arch="s390x", machine="s390-ccw-virtio-11.1", can_unplug=False)
    made = layout("0,5", vm=vm)
    now = replace(made, slots=tuple(replace(slot, props=CpuProps({"core-id": slot.first})) for slot in made.slots))
    assert [read_place(now, number, text) for number, text in enumerate([b"0\n", b"5\n", b"2\n"])] == [0, 5, None]


def test_another_machine_has_no_such_file() -> None:
    assert place_file("riscv64", 1) is None
