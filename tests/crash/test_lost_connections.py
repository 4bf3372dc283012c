"""The connection is lost, or QEMU is replaced by another, in the middle of a transition, with ``reconnect=True``."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import (
    MonitorLostError,
    Recovery,
    Rejected,
    TransitionError,
    TransitionOutcome,
    TransitionReport,
    Unknown,
    VcpuController,
)
from qmpvcpu.events import Disconnected, InstanceChanged, Reconnected
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.controller.vms import until
from tests.crash.points import Points, acting_at
from tests.crash.proxy import Proxy
from tests.crash.stage import CONTINUE_SLOWLY, REVERT_REFUSED, START, STOP, TARGET, Stage, Story, check_record, stage
from tests.crash.zygote import NAME

# The first is many tests in one.
pytestmark = pytest.mark.qemu

_TRIES = 10
_NOBODY_HANGS_S = 20


class Lossy:
    """A story on a VM behind a proxy, played again and again."""

    def __init__(self, story: Story, folder: Path) -> None:
        self.story = story
        self._folder = folder
        self._runs = 0
        self._stages = contextlib.AsyncExitStack()
        self._kept: Stage | None = None

    async def run(self, point: str | None) -> list[str]:
        """Play it, and cut the connection at *point*; return the points that were crossed."""
        at = await self._at_start()
        self._runs += 1
        folder = self._folder / str(self._runs)
        folder.mkdir()
        record = folder / "vm.xml"
        async with (
            Proxy(self._folder / "proxy", at.guest.sockets[2]) as proxy,
            qmpvcpu.attach(proxy.path, name=NAME, record=record, reconnect=True) as vm,
        ):
            points = proxy.points = Points(acting_at(point, proxy.cut))
            async with asyncio.timeout(_NOBODY_HANGS_S):
                report = await self._play(vm)
            proxy.points = None
            if _came_too_early(report):
                await _go_back(vm)
                return []
            await self._check(at, vm, report, record)
        return points.crossed

    async def end(self) -> None:
        """Stop the VM."""
        await self._stages.aclose()

    async def _play(self, vm: VcpuController) -> TransitionReport:
        try:
            return await vm.set_map(TARGET, on_failure=self.story.policy, timeout=10)
        except TransitionError as error:
            return error.report

    async def _check(self, at: Stage, vm: VcpuController, report: TransitionReport, record: Path) -> None:
        wanted = TransitionOutcome.REVERTED if self.story.refused else TransitionOutcome.REACHED
        if self.story.refused and report.outcome is TransitionOutcome.REVERT_INCOMPLETE:
            # After the refusal nothing is sent again, not even what may not have reached QEMU.
            kept = [step for step in report.steps if step.undone is False]
            assert all(isinstance(step.verdict, Unknown) for step in kept), str(report)
            assert vm.interrupted is not None
            ended = await vm.recover(Recovery.REVERT)
            assert ended is not None
            report = ended
        assert report.outcome is wanted, str(report)
        await at.agrees(vm)
        assert vm.layout.enabled == self.story.result
        assert not vm.layout.pending
        assert vm.interrupted is None
        # Had a removal been doubled, it would take what is plugged there next, as soon as the guest looks.
        await _go_back(vm)
        await vm.plug(7)
        await vm.unplug(7)
        await at.agrees(vm)
        assert vm.layout.enabled == START
        await vm.close()
        check_record(record, START)

    async def _at_start(self) -> Stage:
        if self._kept is None or self._kept.guest.accelerator == "tcg":  # which can create only so many vCPUs
            await self._stages.aclose()
            self._kept = await self._stages.enter_async_context(stage(self.story, qmp_sockets=3))
        if self.story.refused:  # or what it answers were what it had answered before, which tells nothing
            await self._kept.guest.set_behaviour()
            async with qmpvcpu.attach(self._kept.guest.qmp) as vm:
                await vm.unplug(6)
        await self._kept.to_start()
        await self._kept.guest.set_behaviour(self.story.guest)
        return self._kept


def _came_too_early(report: TransitionReport) -> bool:
    """While QEMU joins the thread of a vCPU that has left, its slot is empty and its id is still taken."""
    undone = [step.undo for step in report.steps if isinstance(step.undo, Rejected)]
    return any("Duplicate device ID" in verdict.desc for verdict in undone)


async def _go_back(vm: VcpuController) -> None:
    with contextlib.suppress(TransitionError):
        # While QEMU joins the thread of a vCPU that has left, its slot is empty and its id is still taken: rejected.
        await vm.set_map(START)
    await vm.set_map(START)


@pytest.mark.parametrize("story", [STOP, CONTINUE_SLOWLY, REVERT_REFUSED], ids=str)
async def test_the_connection_is_cut_at_every_message(story: Story, tmp_path: Path) -> None:
    lossy = Lossy(story, tmp_path)
    missed = []
    try:
        points = await lossy.run(None)
        for point in points:
            for _ in range(_TRIES):  # what depends on who is faster does not come up in each run
                try:
                    crossed = await lossy.run(point)
                except AssertionError as error:
                    raise AssertionError(f"cut at {point}: {error}") from error
                if point in crossed:
                    break
            else:
                missed.append(point)
    finally:
        await lossy.end()
    assert len(points) - len(missed) >= 30, missed


# Another QEMU.


class Replaceable:
    """A VM whose QEMU is replaced by another one, under the same address."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "vm.qmp"
        self.record = folder / "record" / "vm.xml"
        self.record.parent.mkdir()
        self._guests = contextlib.AsyncExitStack()
        self.guest: MicroGuest

    async def start(self, **options: Any) -> None:
        """Run another QEMU here from now on."""
        await self._guests.aclose()
        self.guest = await self._guests.enter_async_context(MicroGuest(boot=START, **options))
        link = self.path.with_suffix(".new")
        link.symlink_to(self.guest.qmp)
        link.replace(self.path)

    async def end(self) -> None:
        """Stop it."""
        await self._guests.aclose()


@pytest.fixture
async def vm_(tmp_path: Path) -> AsyncIterator[Replaceable]:
    machine = Replaceable(tmp_path)
    yield machine
    await machine.end()


async def test_what_was_pending_in_another_qemu_is_void(vm_: Replaceable) -> None:
    await vm_.start(behaviour=Behaviour.hanging())
    async with qmpvcpu.attach(vm_.path, name=NAME, record=vm_.record, reconnect=True) as vm:
        request = await vm.request_unplug(6)
        await vm.wait_for(lambda layout: 6 in layout.pending, timeout=10)
        waiting = asyncio.create_task(request.wait(None))
        events = vm.events()
        await vm_.start()
        async with asyncio.timeout(_NOBODY_HANGS_S):
            with pytest.raises(MonitorLostError):
                await waiting
            seen = await until(events, Reconnected)
        assert any(isinstance(each, Disconnected) for each in seen)
        assert any(isinstance(each, InstanceChanged) for each in seen)
        assert not vm.layout.pending
        assert vm.layout.enabled == START
        await vm.unplug(6)
        assert vm.layout.enabled == {0, 1}


async def test_a_transition_ends_with_the_qemu_that_it_was_of(vm_: Replaceable) -> None:
    await vm_.start(behaviour=Behaviour.hanging())
    async with qmpvcpu.attach(vm_.path, name=NAME, record=vm_.record, reconnect=True) as vm:
        wished = asyncio.create_task(vm.set_map(TARGET))
        await vm.wait_for(lambda layout: layout.pending, timeout=10)
        await vm_.start()
        async with asyncio.timeout(_NOBODY_HANGS_S):
            with pytest.raises(TransitionError, match=r"another QEMU|QEMU was replaced") as caught:
                await wished
        asked, unasked = caught.value.report.steps[-2:]
        assert isinstance(asked.verdict, Unknown), str(caught.value.report)
        assert unasked.verdict is None
        await vm.refresh()
        assert vm.layout.enabled == START
        assert not vm.layout.pending
        assert vm.interrupted is None  # it was of a QEMU that is no more
        assert (await vm.set_map(TARGET)).outcome is TransitionOutcome.REACHED
    check_record(vm_.record, TARGET)
