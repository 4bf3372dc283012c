"""QEMU dies, falls silent or is reset at every point of a transition: nobody hangs, and nothing is made up."""

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import (
    MonitorError,
    MonitorLostError,
    MonitorTimeoutError,
    Pending,
    Plugged,
    Recovery,
    Refused,
    Rejected,
    TransitionError,
    TransitionReport,
    Unknown,
    Unplugged,
    VcpuController,
)
from qmpvcpu.domainxml import read_identity
from tests.crash.points import INTENT_SAVED, OUTCOME_SAVED, Points, acting_at, watching
from tests.crash.stage import CONTINUE_SLOWLY, REVERT_REFUSED, START, STOP, TARGET, Stage, Story, stage
from tests.crash.zygote import NAME

# Each is many tests in one.
pytestmark = pytest.mark.qemu

_SILENCE_S = 0.6
_PATIENCE_S = 30  # with a QEMU that answers
_NOBODY_HANGS_S = 15


async def points_of(story: Story, record: Path) -> list[str]:
    """What a transition that nothing interferes with crosses."""
    async with playing(story, record) as (_, vm):
        points = Points(lambda _: None)
        with watching(points), contextlib.suppress(TransitionError):
            await vm.set_map(TARGET, on_failure=story.policy)
    return points.crossed


@contextlib.asynccontextmanager
async def playing(story: Story, record: Path) -> AsyncIterator[tuple[Stage, VcpuController]]:
    """A VM of its own, and us attached to it for the first time."""
    async with stage(story) as at:
        await at.to_start()
        async with qmpvcpu.attach(at.guest.qmp, name=NAME, record=record) as vm:
            yield at, vm


async def play(
    vm: VcpuController, story: Story, points: Points, seconds: float
) -> tuple[TransitionReport | None, MonitorError | None]:
    """The transition, with *points* watching: its report, or why there is none."""
    async with asyncio.timeout(_NOBODY_HANGS_S):
        with watching(points):
            try:
                return await vm.set_map(TARGET, on_failure=story.policy, timeout=seconds), None
            except TransitionError as error:
                return error.report, None
            except MonitorError as error:
                return None, error


async def finish(vm: VcpuController) -> None:
    """Finish what was interrupted: on a busy machine a QEMU that has just gone on needs more than the silence."""
    async with asyncio.timeout(_NOBODY_HANGS_S):
        while vm.interrupted is not None:
            with contextlib.suppress(MonitorTimeoutError):
                await vm.recover(Recovery.FINISH, timeout=10)


def check_evidence(report: TransitionReport, crossed: list[str], story: Story) -> None:
    """What the report claims has been heard of."""
    for step in report.steps:
        for verdict in (step.verdict, step.undo):
            if isinstance(verdict, Plugged):
                assert f"device_add vcpu{step.ids} replied to" in crossed, step
            elif isinstance(verdict, Unplugged):
                assert f"answer for vCPU {step.ids} taken in" in crossed, step
            elif isinstance(verdict, Refused):
                assert story.refused, step
                assert step.ids == {6}, step
            else:
                assert verdict is None or isinstance(verdict, Unknown | Pending | Rejected), step


@pytest.mark.parametrize("story", [STOP, REVERT_REFUSED], ids=str)
async def test_qemu_is_killed_at_every_point(story: Story, tmp_path: Path) -> None:
    points = await points_of(story, tmp_path / "first.xml")
    met = 0
    for number, point in enumerate(points):
        record = tmp_path / f"{number}.xml"
        async with playing(story, record) as (at, vm):
            crossing = Points(acting_at(point, at.guest.process.kill))
            report, error = await play(vm, story, crossing, 5)
            if point not in crossing.crossed:  # it depends on who is faster
                continue
            met += 1
            async with asyncio.timeout(_NOBODY_HANGS_S):
                await at.guest.process.wait()
                with pytest.raises(MonitorLostError):
                    await vm.refresh()
        if report is None:
            assert isinstance(error, MonitorLostError)
        else:
            check_evidence(report, crossing.crossed, story)
            reached = report.layout.enabled == TARGET
            assert reached or any(not step.ok for step in report.steps), point
        metadata = read_identity(record.read_bytes()).metadata
        assert metadata is not None
        begun = INTENT_SAVED in crossing.crossed and OUTCOME_SAVED not in crossing.crossed
        assert (metadata.intent is not None) == begun, point
        if metadata.intent is not None:
            assert (metadata.intent.start, metadata.intent.target) == (START, TARGET)
    assert met >= 30


async def test_qemu_falls_silent_at_every_point(tmp_path: Path) -> None:
    story = CONTINUE_SLOWLY
    record = tmp_path / "vm.xml"
    met = 0
    async with lasting(story, record, reply_timeout=_SILENCE_S) as (start, points):
        for point in points:
            async with start() as (at, vm):
                crossing = Points(acting_at(point, stopping(at)))
                report, error = await play(vm, story, crossing, _SILENCE_S)
                at.guest.process.kill(signal.SIGCONT)
                met += point in crossing.crossed  # not all: some depend on who is faster
                if report is None:
                    assert isinstance(error, MonitorTimeoutError)
                    assert not any(each.startswith("before device_") for each in crossing.crossed)
                else:
                    check_evidence(report, crossing.crossed, story)
                    for step in report.steps:
                        assert not isinstance(step.verdict, Unknown) or "did not reply to device_" in step.reason, (
                            step
                        )
                unknown = report is not None and any(isinstance(step.verdict, Unknown) for step in report.steps)
                assert (vm.interrupted is not None) == unknown, point
                await at.agrees(vm)
                if unknown:
                    await finish(vm)
                    assert vm.layout.enabled == TARGET
                    assert vm.interrupted is None
                # What was asked for before the silence goes on, whoever waits for it.
                await vm.wait_settled(timeout=10)
                await at.agrees(vm)
    assert met >= 30


async def test_the_vm_is_reset_at_every_point(tmp_path: Path) -> None:
    story = CONTINUE_SLOWLY
    met = 0
    async with lasting(story, tmp_path / "vm.xml") as (start, points):
        for point in points:
            async with start() as (at, vm):
                with raw(at.guest.sockets[2]) as execute:
                    crossing = Points(acting_at(point, lambda: execute("system_reset")))
                    report, error = await play(vm, story, crossing, _SILENCE_S)
                assert error is None
                assert report is not None
                met += point in crossing.crossed
                await at.guest.wait_ready()
                await at.agrees(vm)
                for step in report.steps:
                    if isinstance(step.verdict, Plugged):
                        assert vm.layout.enabled >= step.ids, step
                    elif isinstance(step.verdict, Unplugged):
                        assert not vm.layout.enabled & step.ids, step
                    elif isinstance(step.verdict, Pending):
                        assert vm.layout.pending >= step.ids or not vm.layout.enabled & step.ids, step
                    else:  # QEMU rejects removals until the guest is up again
                        assert isinstance(step.verdict, Rejected), step
                # A removal that the reset made latent fires at the next plug of any vCPU; one that the guest had
                # taken up is forgotten by all: it is asked for again, once the guest has looked at everything.
                for _ in range(2):
                    await vm.plug(7)
                    await vm.unplug(7)
                await vm.set_map(TARGET, timeout=10)
                await at.agrees(vm)
                assert not vm.layout.pending
    assert met >= 30


# How it is done.


@contextlib.asynccontextmanager
async def lasting(
    story: Story, record: Path, *, reply_timeout: float = _PATIENCE_S
) -> AsyncIterator[tuple[Callable[[], Any], list[str]]]:
    """A VM for many transitions, as long as it lives: how to have it at START, and the points of one."""
    points = await points_of(story, record.with_name("first.xml"))
    async with contextlib.AsyncExitStack() as stack:
        kept: list[Stage] = []

        @contextlib.asynccontextmanager
        async def start() -> AsyncIterator[tuple[Stage, VcpuController]]:
            if not kept or kept[0].guest.accelerator == "tcg":  # which can create only so many vCPUs
                await stack.aclose()
                kept[:] = [await stack.enter_async_context(stage(story, qmp_sockets=3))]
            await kept[0].to_start()
            async with qmpvcpu.attach(
                kept[0].guest.qmp, name=NAME, record=record, reply_timeout=reply_timeout, resync_interval=None
            ) as vm:
                yield kept[0], vm

        yield start, points


def stopping(at: Stage) -> Callable[[], None]:
    """What stops QEMU, so that it is silent and not dead."""
    return lambda: at.guest.process.kill(signal.SIGSTOP)


@contextlib.contextmanager
def raw(path: Path) -> Any:
    """A QMP client that needs no event loop: what executes a command, and returns when QEMU has replied."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        stream = sock.makefile("rwb")

        def execute(command: str) -> None:
            stream.write(json.dumps({"execute": command}).encode() + b"\n")
            stream.flush()
            while b'"return"' not in stream.readline():
                pass

        stream.readline()
        execute("qmp_capabilities")
        yield execute
        stream.close()
