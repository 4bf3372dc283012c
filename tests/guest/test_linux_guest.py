"""The Linux guest does what a test needs of it: says what it sees, takes CPUs, gives them up, refuses when told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import EventListener, QMPClient

from qmpvcpu import VcpuMap
from qmpvcpu.testing.linuxguest import LinuxGuest, LinuxGuestMissingError
from qmpvcpu.testing.qemu import Accelerator, QemuProcessError, QemuStartError

pytestmark = pytest.mark.guest

PLUG, UNPLUG = 1, 3  # the source in ACPI_DEVICE_OST
DONE, BUSY, IN_PROGRESS = 0, 0x82, 0x84


class RawVm:
    """The VM through nothing but QMP, so that the guest is tested and not the package."""

    def __init__(self, client: QMPClient, answers: EventListener) -> None:
        self.client = client
        self.answers = answers

    async def plug(self, slot: int) -> None:
        # QEMU lists slots from the last to the first.
        slots: Any = await self.client.execute("query-hotpluggable-cpus")
        place = slots[-1 - slot]
        await self.client.execute("device_add", {"driver": place["type"], "id": f"vcpu{slot}", **place["props"]})

    async def request_unplug(self, slot: int) -> None:
        await self.client.execute("device_del", {"id": f"vcpu{slot}"})

    async def answer_to_plug(self, slot: int) -> int:
        """The status of the guest's next word about an insert."""
        return await self._answer(slot, PLUG)

    async def unplug_answer(self, slot: int) -> int:
        """The status of the guest's next final word about a removal."""
        return await self._answer(slot, UNPLUG)

    async def _answer(self, slot: int, source: int) -> int:
        async with asyncio.timeout(10):
            while True:
                data: Any = (await self.answers.get())["data"]
                info = data["info"]
                if info["slot"] == str(slot) and info["source"] == source and info["status"] != IN_PROGRESS:
                    return int(info["status"])


@contextlib.asynccontextmanager
async def raw_vm(guest: LinuxGuest) -> AsyncIterator[RawVm]:
    client = QMPClient("raw")
    with client.listener("ACPI_DEVICE_OST") as answers:
        await client.connect(str(guest.qmp))
        try:
            yield RawVm(client, answers)
        finally:
            await client.disconnect()


async def test_the_guest_boots_with_its_boot_cpus_online(guest: LinuxGuest) -> None:
    await guest.ping()
    assert await guest.online() == VcpuMap([0, 1])
    assert await guest.present() == VcpuMap([0, 1])


async def test_a_plugged_cpu_comes_online_and_goes_with_the_unplug(
    guest: LinuxGuest, third: Callable[[int], int]
) -> None:
    async with raw_vm(guest) as vm:
        await vm.plug(5)
        assert await guest.wait_online(lambda cpus: len(cpus) == 3) == VcpuMap([0, 1, third(5)])
        assert await guest.present() == VcpuMap([0, 1, third(5)])
        await vm.request_unplug(5)
        assert await vm.unplug_answer(5) == DONE
        assert await guest.wait_online(lambda cpus: len(cpus) == 2) == VcpuMap([0, 1])
        assert await guest.online() == VcpuMap([0, 1])


async def test_a_guest_told_to_refuse_answers_busy_until_told_to_comply(guest: LinuxGuest) -> None:
    async with raw_vm(guest) as vm:
        await vm.plug(2)
        await guest.wait_online(lambda cpus: len(cpus) == 3)
        await guest.refuse()
        await vm.request_unplug(2)
        assert await vm.unplug_answer(2) == BUSY
        assert await guest.online() == VcpuMap([0, 1, 2])
        await guest.comply()
        await vm.request_unplug(2)
        assert await vm.unplug_answer(2) == DONE
        assert await guest.online() == VcpuMap([0, 1])


@pytest.mark.parametrize("which", ["all", "one"])
async def test_a_guest_told_to_refuse_right_after_a_plug_keeps_the_new_cpu(
    guest: LinuxGuest, third: Callable[[int], int], which: str
) -> None:
    async with raw_vm(guest) as vm:
        await vm.plug(2)
        await guest.refuse(None if which == "all" else third(2))
        await vm.request_unplug(2)
        assert await vm.unplug_answer(2) == BUSY
        assert await guest.online() == VcpuMap([0, 1, third(2)])


async def test_linux_takes_cpus_of_any_model(qemu: Path, accel: Accelerator, kernel: str) -> None:
    extra = ["-cpu", "Skylake-Client" if accel == "tcg" else "max"]
    async with LinuxGuest(qemu, accel=accel, kernel=kernel, extra_args=extra) as guest, raw_vm(guest) as vm:
        await vm.plug(2)
        assert len(await guest.wait_online(lambda cpus: len(cpus) == 3)) == 3


async def test_boot_vcpus_may_have_holes(qemu: Path, accel: Accelerator, kernel: str) -> None:
    async with LinuxGuest(qemu, accel=accel, kernel=kernel, boot={0, 2, 5}) as guest:
        assert await guest.online() == VcpuMap([0, 1, 2])
        assert await guest.process.count_vcpus() == 3


async def test_a_linux_that_is_reset_is_waited_for(guest: LinuxGuest) -> None:
    async with raw_vm(guest) as vm:
        await vm.plug(5)
        await guest.wait_online(lambda cpus: len(cpus) == 3)
        for _ in range(2):
            await vm.client.execute("system_reset")
            await guest.wait_ready()
            assert await guest.online() == VcpuMap([0, 1, 2])
        with pytest.raises(QemuProcessError, match=r"Linux did not report that it is up within 0\.1 s"):
            await guest.wait_ready(timeout=0.1)


async def test_a_plugged_cpu_stays_offline_where_linux_is_told_to_leave_it(
    guest: LinuxGuest, third: Callable[[int], int]
) -> None:
    await guest.set_auto_online(False)
    async with raw_vm(guest) as vm:
        await vm.plug(2)
        await vm.answer_to_plug(2)
        assert await guest.present() == VcpuMap([0, 1, third(2)])
        assert await guest.online() == VcpuMap([0, 1])
        await guest.set_auto_online(True)
        await vm.plug(3)
        assert len(await guest.wait_online(lambda cpus: len(cpus) == 3)) == 3


async def test_a_linux_may_leave_cpus_offline_from_the_start(qemu: Path, accel: Accelerator, kernel: str) -> None:
    async with LinuxGuest(qemu, accel=accel, kernel=kernel, auto_online=False) as guest, raw_vm(guest) as vm:
        await vm.plug(2)
        await vm.answer_to_plug(2)
        await vm.client.execute("system_reset")
        await guest.wait_ready()
        assert await guest.online() == VcpuMap([0, 1, 2])  # it boots all that are there
        await vm.plug(3)
        await vm.answer_to_plug(3)
        assert await guest.online() == VcpuMap([0, 1, 2])


async def test_a_linux_that_detects_no_hypervisor_takes_cpus_only_if_it_is_old(
    qemu: Path, accel: Accelerator, kernel: str, fixed_at_boot: bool
) -> None:
    verbose = "loglevel=7"
    async with (
        LinuxGuest(qemu, accel=accel, kernel=kernel, boot=1, hypervisor=False, kernel_options=verbose) as guest,
        raw_vm(guest) as vm,
    ):
        allowed = "1 present CPUs plus 0 hotplug CPUs" if fixed_at_boot else "8 CPUs, 7 hotplug CPUs"
        assert f"smpboot: Allowing {allowed}" in guest.console or f"CPU topo: Allowing {allowed}" in guest.console
        await vm.plug(5)
        await vm.answer_to_plug(5)
        assert await guest.present() == VcpuMap([0] if fixed_at_boot else [0, 1])


async def test_a_series_that_was_not_made_is_told_with_those_that_were(qemu: Path) -> None:
    with pytest.raises(LinuxGuestMissingError, match=r"no Linux 2\.4 in .*/linux, which has \d+\.\d+"):
        async with LinuxGuest(qemu, kernel="2.4"):
            pass


async def test_a_cpu_that_linux_does_not_bring_online_cannot_be_made_to_stay(qemu: Path, accel: Accelerator) -> None:
    async with LinuxGuest(qemu, accel=accel, kernel_options="nr_cpus=2") as guest, raw_vm(guest) as vm:
        await vm.plug(2)
        with pytest.raises(QemuProcessError, match="it ran on CPUs 0-1 only, QEMU has 3 vCPUs"):
            await guest.refuse()


async def test_a_refusing_guest_keeps_a_cpu_plugged_after_it_was_told(
    guest: LinuxGuest, third: Callable[[int], int]
) -> None:
    await guest.refuse()
    async with raw_vm(guest) as vm:
        await vm.plug(3)
        await guest.wait_online(lambda cpus: len(cpus) == 3)
        await guest.ping()  # commands and changes are served in turn, so the new reservation is made
        await vm.request_unplug(3)
        assert await vm.unplug_answer(3) == BUSY
        assert await guest.online() == VcpuMap([0, 1, third(3)])
        await guest.comply()
        await vm.request_unplug(3)
        assert await vm.unplug_answer(3) == DONE


async def test_a_guest_refuses_one_cpu_and_gives_up_another_until_told_to_comply(guest: LinuxGuest) -> None:
    async with raw_vm(guest) as vm:
        await vm.plug(2)
        await guest.wait_online(lambda cpus: len(cpus) == 3)
        await guest.refuse(2)
        await vm.plug(3)
        await guest.wait_online(lambda cpus: len(cpus) == 4)
        for slot, answer in ((2, BUSY), (3, DONE)):
            await vm.request_unplug(slot)
            assert await vm.unplug_answer(slot) == answer
        await guest.comply()
        await vm.request_unplug(2)
        assert await vm.unplug_answer(2) == DONE


@pytest.mark.parametrize("cpu", [2, 7, 99])
async def test_a_cpu_that_is_not_there_cannot_be_made_to_stay(guest: LinuxGuest, cpu: int) -> None:
    for _ in range(2):
        with pytest.raises(QemuProcessError, match=f"Linux cannot be made to refuse CPU {cpu}"):
            await guest.refuse(cpu)
    await guest.comply()


async def test_what_the_guest_never_reports_is_an_error_with_what_it_did_report(guest: LinuxGuest) -> None:
    with pytest.raises(QemuProcessError, match=r"within 0.1 s; it reported CPUs 0-1; the console ends with"):
        await guest.wait_online(lambda cpus: 7 in cpus, timeout=0.1)


async def test_a_qemu_that_dies_ends_every_wait_with_an_error(guest: LinuxGuest) -> None:
    wait = asyncio.create_task(guest.wait_online(lambda cpus: 7 in cpus))
    await guest.ping()
    guest.process.kill()
    with pytest.raises(QemuProcessError, match="QEMU ended, and Linux did not report the awaited CPUs"):
        await wait
    with pytest.raises(QemuProcessError, match="QEMU ended, and Linux did not answer 'online'"):
        await guest.online()
    with pytest.raises(QemuProcessError, match="QEMU ended, and Linux did not answer 'ping'"):
        await guest.ping()


async def test_a_guest_that_does_not_come_up_is_an_error_with_its_console(qemu: Path, accel: Accelerator) -> None:
    with pytest.raises(QemuStartError, match=r"\[ +\d+\.\d{6}\] ") as caught:
        async with LinuxGuest(qemu, accel=accel, kernel_options="rdinit=/missing", timeout=10):
            pass
    assert "Linux did not come up" in str(caught.value)


async def test_a_guest_that_was_never_made_names_what_makes_it(
    tmp_path: Path, qemu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QMPVCPU_CACHE", str(tmp_path))
    with pytest.raises(
        LinuxGuestMissingError, match=r"vmlinuz: make the Linux guest with `python -m qmpvcpu.testing.linuxguest`"
    ):
        async with LinuxGuest(qemu):
            pass
