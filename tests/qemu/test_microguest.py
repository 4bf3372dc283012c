"""Each behaviour of the micro-guest, by the events that QEMU sends for it."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import ExecuteError

from qmpvcpu.testing import UNTIL_TOLD, Behaviour, MicroGuest, QemuProcessError, QemuStartError, rom_image

if TYPE_CHECKING:
    from tests.qemu.conftest import StartVm
    from tests.substrates import Substrate

pytestmark = pytest.mark.qemu

TAKEN = 3, 0x84  # source and status of "ejection in progress"
DONE = 3, 0


async def test_a_complying_guest_takes_a_cpu_and_gives_it_back(start: "StartVm", on: "Substrate") -> None:
    vm = await start()
    await vm.plugged(5)
    assert await vm.present() == {0, 5}
    await vm.unplug(5)
    assert await vm.ost() == (5, *TAKEN)
    deleted = []
    while (event := await vm.event())["event"] == "DEVICE_DELETED":
        deleted.append(event["data"]["path"])
    assert event["data"]["info"]["status"] == 0
    assert deleted[0] == "/machine/peripheral/vcpu5/lapic"
    assert deleted[1:] == (["/machine/peripheral/vcpu5"] if on.accel == "kvm" else [])
    assert await vm.present() == {0}


async def test_a_slot_can_be_used_again_and_again(start: "StartVm", on: "Substrate") -> None:
    vm = await start()
    for _ in range(5 if on.survives_plug_after_unplug else 1):
        await vm.plugged(3)
        await vm.unplug(3)
        assert [await vm.ost(), await vm.ost()] == [(3, *TAKEN), (3, *DONE)]
    assert await vm.present() == {0}


async def test_a_slow_guest_says_at_once_that_it_works_on_it_and_takes_its_time(start: "StartVm") -> None:
    vm = await start(behaviour=Behaviour.slow(200))
    await vm.plugged(2)
    clock = asyncio.get_running_loop().time
    began = clock()
    await vm.unplug(2)
    assert await vm.ost() == (2, *TAKEN)
    assert await vm.present() == {0, 2}
    assert await vm.ost() == (2, *DONE)
    assert 0.19 < clock() - began < 2
    assert await vm.present() == {0}


async def test_a_guest_that_is_held_up_while_it_starts_its_timer_answers_all_the_same(
    start: "StartVm", monkeypatch: pytest.MonkeyPatch
) -> None:
    def held_up(*args: Any, **options: Any) -> bytes:
        image = bytearray(rom_image(*args, **options))
        window = image.index(b"\xfb\x90\x90\xfa")  # sti, nop, nop, cli: where the tick of an earlier shot is taken
        # There it now waits until the timer's output is high (8254 read-back command), as if a busy host had let the
        # vCPU run no earlier: sti; again: mov al, 0xe2; out 0x43, al; in al, 0x40; test al, 0x80; jz again; cli; ret
        waiting = b"\xfb\xb0\xe2\xe6\x43\xe4\x40\xa8\x80\x74\xf6\x90\x90\xfa\xc3"
        spare = image.rindex(bytes(len(waiting)), 0, 0xFF00)
        image[spare : spare + len(waiting)] = waiting
        image[window : window + 4] = b"\xe8" + (spare - window - 3).to_bytes(2, "little") + b"\x90"  # call; nop
        return bytes(image)

    monkeypatch.setattr("qmpvcpu.testing.microguest.rom_image", held_up)
    vm = await start(behaviour=Behaviour.slow(10))
    await vm.plugged(2)
    await vm.unplug(2)
    assert [await vm.ost(), await vm.ost()] == [(2, *TAKEN), (2, *DONE)]


async def test_a_held_guest_decides_when_told(start: "StartVm") -> None:
    vm = await start(boot={0, 1, 2, 4}, behaviour=Behaviour.hanging())
    await vm.unplug(4)
    assert await vm.ost() == (4, *TAKEN)
    await vm.guest.set_behaviour(Behaviour.refusing(0x82).for_slot(4))
    assert await vm.ost() == (4, 3, 0x82)
    assert await vm.present() == {0, 1, 2, 4}
    await vm.guest.set_behaviour(Behaviour.hanging())
    await vm.unplug(4)
    assert await vm.ost() == (4, *TAKEN)
    await vm.guest.set_behaviour()
    assert await vm.ost() == (4, *DONE)
    assert await vm.present() == {0, 1, 2}


@pytest.mark.parametrize("status", [1, 0x80, 0x81, 0x82, 0x83])
@pytest.mark.parametrize("announce", [True, False], ids=["after 0x84", "at once"])
async def test_a_refusing_guest_keeps_the_cpu(start: "StartVm", status: int, announce: bool) -> None:
    vm = await start(behaviour=Behaviour.refusing(status, announce=announce))
    await vm.plugged(7)
    await vm.unplug(7)
    if announce:
        assert await vm.ost() == (7, *TAKEN)
    assert await vm.ost() == (7, 3, status)
    assert await vm.present() == {0, 7}


async def test_a_guest_that_refuses_the_first_two_requests_complies_with_the_third(start: "StartVm") -> None:
    vm = await start(behaviour=Behaviour.refusing(0x81, announce=False).for_first(2))
    await vm.plugged(1)
    for answer in (0x81, 0x81, 0x84, 0):
        if answer != 0:
            await vm.unplug(1)
        assert await vm.ost() == (1, 3, answer)
    assert await vm.present() == {0}


async def test_answers_can_carry_the_source_event_of_the_os_itself(start: "StartVm") -> None:
    vm = await start(behaviour=Behaviour(source=0x103))
    await vm.plugged(1)
    await vm.unplug(1)
    assert [await vm.ost(), await vm.ost()] == [(1, 0x103, 0x84), (1, 0x103, 0)]


async def test_a_silent_guest_says_nothing_and_serves_it_when_it_wakes_up(start: "StartVm") -> None:
    vm = await start(behaviour=Behaviour.silent())
    await vm.plugged(1)
    await vm.unplug(1)
    await vm.plugged(2)  # the very next _OST is another slot's: nothing came for the first
    assert await vm.present() == {0, 1, 2}
    await vm.guest.set_behaviour()
    await vm.unplug(2)
    answers = [await vm.ost() for _ in range(4)]
    assert answers == [(1, *TAKEN), (1, *DONE), (2, *TAKEN), (2, *DONE)]


async def test_a_silent_guest_can_be_made_to_look(start: "StartVm") -> None:
    vm = await start(behaviour=Behaviour.silent())
    await vm.plugged(6)
    await vm.unplug(6)
    await vm.guest.set_behaviour()
    await vm.guest.scan_slots()
    assert [await vm.ost(), await vm.ost()] == [(6, *TAKEN), (6, *DONE)]


async def test_what_a_guest_ignored_before_a_reset_leaves_with_the_next_plug_of_another_cpu(
    start: "StartVm",
) -> None:
    vm = await start(behaviour=Behaviour.silent_until_reset())
    await vm.plugged(1)
    await vm.unplug(1)
    await vm.execute("system_reset")
    await vm.guest.wait_ready()
    assert await vm.present() == {0, 1}
    await vm.plug(2)
    answers = [await vm.ost() for _ in range(3)]
    assert answers == [(1, *TAKEN), (1, *DONE), (2, 1, 0)]
    assert await vm.present() == {0, 2}


async def test_behaviours_given_at_run_time_outlive_a_reset(start: "StartVm") -> None:
    vm = await start()
    await vm.guest.set_behaviour(Behaviour.refusing(0x80, announce=False))
    await vm.execute("system_reset")
    await vm.guest.wait_ready()
    await vm.plugged(1)
    await vm.unplug(1)
    assert await vm.ost() == (1, 3, 0x80)


async def test_a_lying_guest_claims_success_and_keeps_the_cpu(start: "StartVm") -> None:
    vm = await start(behaviour=Behaviour.lying())
    await vm.plugged(4)
    await vm.unplug(4)
    assert [await vm.ost(), await vm.ost()] == [(4, *TAKEN), (4, *DONE)]
    assert await vm.present() == {0, 4}


async def test_a_wordless_guest_ejects_without_an_ost(start: "StartVm", on: "Substrate") -> None:
    vm = await start(behaviour=Behaviour.wordless())
    await vm.plugged(4)
    await vm.unplug(4)
    paths = [(await vm.event())["data"]["path"] for _ in range(2 if on.accel == "kvm" else 1)]
    assert paths == ["/machine/peripheral/vcpu4/lapic", "/machine/peripheral/vcpu4"][: len(paths)]
    assert await vm.present() == {0}
    if on.survives_plug_after_unplug:
        await vm.plugged(5)  # the next _OST is this one


async def test_a_guest_can_be_silent_about_inserts(start: "StartVm") -> None:
    vm = await start(behaviour=Behaviour.silent_about_inserts())
    await vm.plug(3)
    await vm.unplug(3)
    assert [await vm.ost(), await vm.ost()] == [(3, *TAKEN), (3, *DONE)]


async def test_a_guest_can_refuse_inserts_and_qemu_keeps_the_cpu(start: "StartVm") -> None:
    vm = await start(behaviour=Behaviour.refusing_inserts())
    await vm.plug(3)
    assert await vm.ost() == (3, 1, 1)
    assert await vm.present() == {0, 3}


async def test_qemu_refuses_a_removal_until_the_guest_is_ready(start: "StartVm", on: "Substrate") -> None:
    vm = await start(boot={0, 2}, ready_after_ms=UNTIL_TOLD, wait=False)
    if on.has_legacy_mode:
        with pytest.raises(ExecuteError, match="not supported device type"):
            await vm.unplug(2)
    await vm.guest.set_behaviour()
    await vm.guest.wait_ready()
    await vm.unplug(2)
    assert [await vm.ost(), await vm.ost()] == [(2, *TAKEN), (2, *DONE)]


async def test_a_plug_before_the_guest_is_ready_is_never_acknowledged(start: "StartVm", on: "Substrate") -> None:
    vm = await start(ready_after_ms=UNTIL_TOLD, wait=False)
    await vm.plug(6)
    await vm.guest.set_behaviour()
    await vm.guest.wait_ready()
    await vm.plugged(3)
    if not on.has_legacy_mode:
        assert await vm.ost() == (6, 1, 0)
    await vm.unplug(3)
    assert [await vm.ost(), await vm.ost()] == [(3, *TAKEN), (3, *DONE)]
    assert await vm.present() == {0, 6}


async def test_a_guest_can_take_its_time_to_get_ready(on: "Substrate") -> None:
    clock = asyncio.get_running_loop().time
    began = clock()
    async with MicroGuest(on.qemu, machine=on.machine, accel=on.accel, ready_after_ms=300) as guest:
        assert clock() - began > 0.3
        with pytest.raises(QemuProcessError, match=r"did not say that it is ready within 0\.1 s") as caught:
            await guest.wait_ready(timeout=0.1)  # it said it once
        assert caught.value.__suppress_context__  # a report would show how it was waited for
        assert caught.value.__cause__ is None


async def test_each_slot_can_have_a_behaviour_of_its_own(start: "StartVm") -> None:
    vm = await start(
        boot={0, 1, 3, 5, 6},
        behaviour=[
            Behaviour.refusing(0x82).for_slot(1),
            Behaviour.lying().for_slot(3),
            Behaviour.silent().for_slot(5),
        ],
    )
    slots = await vm.slots()
    for number in (5, 3, 6):
        await vm.execute("device_del", id=slots[number]["qom-path"])
        if number != 5:
            assert [await vm.ost(), await vm.ost()] == [(number, *TAKEN), (number, *DONE)]
    await vm.execute("device_del", id=slots[1]["qom-path"])  # a boot CPU has no id
    assert [await vm.ost(), await vm.ost()] == [(1, *TAKEN), (1, 3, 0x82)]
    assert await vm.present() == {0, 1, 3, 5}


async def test_a_second_request_while_the_guest_works_on_the_first_takes_the_next_cpu_in_the_slot(
    start: "StartVm", on: "Substrate"
) -> None:
    vm = await start(behaviour=Behaviour.hanging())
    await vm.plugged(1)
    await vm.unplug(1)
    assert await vm.ost() == (1, *TAKEN)
    await vm.unplug(1)
    await vm.guest.set_behaviour()
    assert await vm.ost() == (1, *DONE)
    assert await vm.present() == {0}
    if on.survives_plug_after_unplug:
        await vm.plug(1)
        assert [await vm.ost() for _ in range(3)] == [(1, 1, 0), (1, *TAKEN), (1, *DONE)]
        assert await vm.present() == {0}


async def test_sixty_three_cpus_come_and_go_at_once(start: "StartVm") -> None:
    vm = await start(max_vcpus=64)
    slots = await vm.slots()
    await asyncio.gather(
        *(
            vm.execute("device_add", driver=slot["type"], id=f"vcpu{number}", **slot["props"])
            for number, slot in slots.items()
            if number
        )
    )
    assert sorted([await vm.ost() for _ in range(63)]) == [(number, 1, 0) for number in range(1, 64)]
    await asyncio.gather(*(vm.unplug(number) for number in range(1, 64)))
    answers = [await vm.ost() for _ in range(126)]
    assert sorted(answers) == sorted((number, 3, status) for number in range(1, 64) for status in (0, 0x84))
    assert await vm.present() == {0}


async def test_an_idle_guest_costs_no_cpu_time(start: "StartVm") -> None:
    vm = await start(behaviour=Behaviour.slow(60))  # the timer was used, and the serial port
    await vm.guest.set_behaviour(Behaviour.slow(30))
    await vm.plugged(1)
    await vm.unplug(1)
    assert [await vm.ost(), await vm.ost()] == [(1, *TAKEN), (1, *DONE)]

    def ticks() -> int:
        fields = Path(f"/proc/{vm.guest.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    await asyncio.sleep(1)  # the time over which it is measured
    assert ticks() - before <= 2  # of 100 per second and CPU


async def test_kvm_is_tried_first_and_what_runs_is_told(on: "Substrate") -> None:
    async with MicroGuest(on.qemu, machine=on.machine) as guest:
        assert guest.accelerator in {"kvm", "tcg"}
        assert guest.accelerator in guest.process.argv


async def test_a_qemu_that_does_not_start_tells_its_own_words(on: "Substrate") -> None:
    with pytest.raises(QemuStartError, match="invalid option") as caught:
        async with MicroGuest(on.qemu, accel=on.accel, extra_args=["-no-such-option"]):
            pass
    assert "-no-such-option" in caught.value.argv
    assert caught.value.returncode == 1
