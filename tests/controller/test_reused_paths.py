"""DEVICE_DELETED that comes late, of a CPU whose id and QOM path another one has taken: real, and in every order."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import CommandRejectedError, VcpuController
from qmpvcpu.engine.messages import Returned
from qmpvcpu.events import VcpuUnplugged
from qmpvcpu.testing.peer import Command, ScriptedPeer
from tests.controller.test_scripted import CAPTURES, capture_answers, ost
from tests.controller.vms import other_client, present, running
from tests.substrates import Substrate, substrates

# ``QMPVCPU_REPLUGS=3000 pytest tests/controller/test_reused_paths.py`` replugs as often under KVM.
REPLUGS = int(os.environ.get("QMPVCPU_REPLUGS", "60"))
_TCG_SLOTS = 240  # under TCG a QEMU dies of more vCPUs than it has slots, counted from its start
PATH = "/machine/peripheral/vcpu5"


@pytest.mark.qemu
@pytest.mark.timeout(300 + REPLUGS)
@pytest.mark.parametrize("on", substrates(["q35"], that_survive=True))
async def test_a_slot_filled_right_after_a_read_that_shows_it_empty_is_not_called_empty(on: Substrate) -> None:
    slots, replugs = (8, REPLUGS) if on.accel == "kvm" else (_TCG_SLOTS, min(REPLUGS, _TCG_SLOTS - 40))
    options: dict[str, Any] = {"max_vcpus": slots, "boot": 1, "attach": {"resync_interval": None}}
    wrong = 0
    async with running(on, **options) as (guest, vm), other_client(guest) as other:
        for _ in range(replugs):
            with contextlib.suppress(CommandRejectedError):  # QEMU may hold the id for a moment: then it is not there
                await vm.plug(5)
            await vm.wait_for(lambda _: True)
            told = vm.layout.enabled
            wrong += (5 in told) is not (PATH in await present(other))
            if 5 in vm.layout.enabled:
                await vm.request_unplug(5)
            while 5 in vm.layout.enabled:
                await vm.refresh()
        await vm.plug(5)
    assert wrong == 0


@pytest.mark.qemu
@pytest.mark.parametrize("on", substrates(["q35"], that_survive=True))
async def test_a_vcpu_that_comes_goes_and_comes_in_sessions_of_their_own_is_there_at_the_end(on: Substrate) -> None:
    async with running(on, boot=1) as (guest, vm):
        await vm.close()
        async with qmpvcpu.attach(guest.qmp) as first:
            await first.plug(5)
        async with qmpvcpu.attach(guest.qmp) as second:
            await second.unplug(5)
        async with qmpvcpu.attach(guest.qmp) as third:
            await third.plug(5)
            await third.refresh()
            assert third.layout.enabled == {0, 5}
            assert third.layout[5].host_tid is not None


class Reused:
    """A QEMU that says what it is told to, of vCPU 5 of a recorded machine."""

    def __init__(self) -> None:
        capture = CAPTURES["11.1.3-q35-sct-2x2x2-boot3"]
        self._slots: list[dict[str, Any]] = [dict(slot) for slot in capture.replies("query-hotpluggable-cpus")[0]]
        answers = {
            **capture_answers(capture),
            "query-hotpluggable-cpus": lambda _: self._slots,
            "device_add": self._add,
            "device_del": {},
        }
        self.peer = ScriptedPeer.from_capture(capture.data, answers=answers)
        self.told_of_late = 0

    @property
    def _slot(self) -> dict[str, Any]:
        return self._slots[len(self._slots) - 1 - 5]

    async def _add(self, _: Command) -> dict[str, Any]:
        self._slot["qom-path"] = PATH
        if self.told_of_late:  # the CPU that was there before, as 11.1 says it under TCG
            await self.deleted()
        return {}

    def eject(self) -> None:
        self._slot.pop("qom-path", None)

    async def deleted(self) -> None:
        await self.peer.event("DEVICE_DELETED", {"device": "vcpu5", "path": PATH})


@contextlib.asynccontextmanager
async def reused() -> AsyncIterator[tuple[Reused, VcpuController]]:
    qemu = Reused()
    async with qemu.peer, qmpvcpu.attach(qemu.peer.address, resync_interval=None) as vm:
        yield qemu, vm


async def replug(qemu: Reused, vm: VcpuController) -> None:
    """Plug vCPU 5, have a read find it gone, and plug it again."""
    await vm.plug(5)
    await vm.request_unplug(5)
    qemu.eject()
    await vm.refresh()
    assert 5 not in vm.layout.enabled
    await vm.plug(5)


async def test_the_event_that_comes_with_the_next_plug_is_of_the_cpu_before() -> None:
    async with reused() as (qemu, vm):
        qemu.told_of_late = True
        events = vm.events()
        await replug(qemu, vm)
        await vm.refresh()
        assert 5 in vm.layout.enabled
        assert vm.capabilities.machine  # it is still attached
        gone = 0
        while (event := events.take()) is not None:
            gone += isinstance(event, VcpuUnplugged)
        assert gone == 1


async def test_the_event_that_comes_after_the_next_plug_ends_no_removal_of_the_new_cpu() -> None:
    async with reused() as (qemu, vm):
        await replug(qemu, vm)
        request = await vm.request_unplug(5)
        await qemu.deleted()
        waiting = asyncio.create_task(request.wait(10))
        await qemu.peer.event("ACPI_DEVICE_OST", ost(5, 0x84))
        await vm.wait_for(lambda layout: 5 in layout.pending, timeout=5)
        await vm.refresh()
        assert 5 in vm.layout.enabled
        assert not waiting.done()
        qemu.eject()
        await qemu.deleted()
        assert (await waiting).name == "UNPLUGGED"


async def test_an_event_of_a_cpu_that_nobody_asked_for_is_a_reason_to_read_and_no_more() -> None:
    async with reused() as (qemu, vm):
        await vm.plug(5)
        await qemu.deleted()  # of whatever had that path before
        await vm.refresh()
        assert 5 in vm.layout.enabled
        qemu.eject()
        await qemu.deleted()
        await vm.wait_for(lambda layout: 5 not in layout.enabled, timeout=5)


async def test_who_waits_for_a_removal_of_an_earlier_qemu_is_told_at_once() -> None:
    async with reused() as (_, vm):
        await vm.plug(5)
        request = await vm.request_unplug(5)
        reader = vm._driver.connection.reader
        (slots, threads), status, answers, _info = await reader.everything()
        vm._driver.put(Returned(slots, threads or (), status, answers, same_instance=False))
        async with asyncio.timeout(10):
            with pytest.raises(qmpvcpu.MonitorLostError):
                await request.wait()
