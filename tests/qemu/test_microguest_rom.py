"""The ROM image: what it is built from, and what cannot be put into it."""

import asyncio
import contextlib
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.testing import MicroGuest, QemuProcess, RemovalAction, best_qemu
from qmpvcpu.testing.rom import MAX_RULES, RULE_SIZE, Behaviour, pack_rules, rom_image

BUILD = Path(__file__).parents[2] / "fixtures" / "microguest" / "build.sh"


def test_the_shipped_guest_is_what_its_source_assembles_to(tmp_path: Path) -> None:
    subprocess.run([BUILD, tmp_path / "rom"], check=True)
    shipped = resources.files("qmpvcpu.testing").joinpath("microguest.rom").read_bytes()
    assert (tmp_path / "rom").read_bytes() == shipped


def test_the_image_is_a_bios_of_64_kib_that_starts_at_the_reset_vector() -> None:
    image = rom_image()
    assert len(image) == 0x10000
    assert image[0xFFF0] == 0xEA  # a far jump
    assert image[0xFFF3:0xFFF5] == b"\x00\xf0"


def test_behaviours_differ_in_the_configuration_alone() -> None:
    plain, refusing = rom_image(), rom_image(Behaviour.refusing(0x82).for_slot(3), ready_after_ms=300)
    changed = {offset for offset in range(len(plain)) if plain[offset] != refusing[offset]}
    assert changed
    assert changed <= {*range(0xFF00, 0xFF10), 0xFF90, 0xFF91}


def test_eight_behaviours_fit_and_a_ninth_is_refused() -> None:
    eight = [Behaviour.slow(number).for_slot(number) for number in range(MAX_RULES)]
    assert len(pack_rules(eight)) == MAX_RULES * RULE_SIZE
    with pytest.raises(ValueError, match="9 behaviours"):
        pack_rules([*eight, Behaviour.complying()])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("status", -1),
        ("status", 1 << 32),
        ("source", 1 << 16),
        ("delay_ms", 1 << 16),
        ("times", -1),
        ("insert_status", 1 << 16),
        ("slot", -1),
        ("slot", 0xFFFE),
    ],
)
def test_a_value_that_does_not_fit_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        Behaviour(**{field: value})


def test_a_silent_guest_cannot_count_what_it_does_not_look_at() -> None:
    with pytest.raises(ValueError, match="looks at no removal"):
        Behaviour.silent().for_first(2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Behaviour.refusing(0), "status is 0x0, which says that the CPU has left; a refusal is 0x82"),
        (
            lambda: Behaviour.refusing(0x84),
            "status is 0x84, which says that the guest works on it; a refusal is 0x82",
        ),
        (lambda: Behaviour(removal=RemovalAction.REFUSE), "status is 0x0, which says that the CPU has left"),
        (lambda: Behaviour.refusing_inserts(0), "status is 0x0, which says that the CPU is taken; a refusal is 1"),
        (lambda: Behaviour.refusing_inserts(0x80), "status is 0x80, which says that the guest works on it"),
        (
            lambda: Behaviour(status=0x82),
            "status is 0x82, which only a refusal says, and removal is RemovalAction.EJECT",
        ),
        (lambda: Behaviour(source=1), "source is 0x1, must be 3 .* or 0x103"),
        (lambda: Behaviour(insert_answer=False, insert_status=1), "insert_status is 0x1, and insert_answer=False"),
        (lambda: Behaviour.refusing_inserts().starting(), "insert_status is 0x1: a CPU that is not taken cannot be"),
        (
            lambda: Behaviour(removal=RemovalAction.IGNORE, delay_ms=5),
            "looks at no removal, so it cannot have delay_ms=5",
        ),
        (lambda: Behaviour.lying().for_first(0), "times is at least 1, not 0"),
        (lambda: rom_image([Behaviour.silent(), Behaviour.lying()]), "behaviour 2 never applies: .* every slot"),
        (
            lambda: rom_image([Behaviour.silent().for_slot(2), Behaviour.lying().for_slot(2)]),
            "behaviour 2 never applies: an earlier one fits slot 2",
        ),
        (lambda: MicroGuest(behaviour=Behaviour.silent().for_slot(8)), "for slot 8, the VM has slots 0 to 7"),
    ],
)
def test_what_no_guest_can_mean_is_refused_by_its_name(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_behaviours_that_each_have_their_turn_are_taken() -> None:
    rom_image([Behaviour.silent().for_slot(2), Behaviour.lying().for_first(1), Behaviour.slow(5)])
    rom_image([Behaviour.silent_until_reset(), Behaviour.refusing(0x82)])


@pytest.mark.parametrize("given", ["silent", Behaviour.silent, Behaviour, 0x82, [Behaviour.silent], {"slot": 2}])
def test_what_is_no_behaviour_is_named(given: Any) -> None:
    with pytest.raises(TypeError, match=r"behaviour is .*, must be made by a constructor, such as Behaviour.silent"):
        MicroGuest(behaviour=given)


def test_a_time_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="ready_after_ms is 65536"):
        rom_image(ready_after_ms=0x10000)


@pytest.mark.qemu
async def test_the_image_alone_tells_on_the_debug_console_that_it_is_ready() -> None:
    args = ["-accel", "tcg", "-machine", "q35", "-bios", "rom"]
    args += ["-chardev", "file,id=console,path=console", "-device", "isa-debugcon,iobase=0xe9,chardev=console"]
    async with QemuProcess(best_qemu(), args, files={"rom": rom_image()}) as process, asyncio.timeout(10):
        console = process.directory / "console"
        said = b""
        while not said:
            await asyncio.sleep(0.01)
            with contextlib.suppress(FileNotFoundError):
                said = console.read_bytes()
    assert said == b"R"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"delay_ms": 0.5}, "delay_ms is a whole number, not 0.5"),
        ({"delay_ms": "50"}, 'delay_ms is a whole number, not "50"'),
        ({"times": True}, "times is a whole number, not True"),
        ({"slot": "3"}, 'slot is a whole number, not "3"'),
        ({"announce": "no"}, 'announce is True or False, not "no"'),
        ({"removal": 1}, "removal is one of RemovalAction.EJECT, "),
    ],
)
def test_what_is_no_behaviour_is_refused_before_a_guest_starts(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        Behaviour(**fields)


@pytest.mark.parametrize("given", ["0", 0.5, True, None])
def test_a_time_until_ready_that_is_no_whole_number_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="ready_after_ms is a whole number"):
        rom_image(ready_after_ms=given)
