"""The controlling process is killed at every point of a transition; what is left behind tells the truth."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import (
    DenialReason,
    QmpVcpuError,
    Recovery,
    StepDeniedError,
    TransitionError,
    TransitionOutcome,
    VcpuController,
)
from qmpvcpu.model.transition import Action, Direction, Intent
from tests.crash.matrix import KillMatrix
from tests.crash.points import INTENT_SAVED, OUTCOME_SAVED, SAVING_TURN, TURN_SAVED
from tests.crash.proxy import Proxy
from tests.crash.stage import (
    HOME,
    OFFLINE_FIRST,
    OFFLINE_STORIES,
    PLACED,
    PLACED_STORIES,
    START,
    STORIES,
    Stage,
    Story,
    check_record,
    stage,
)
from tests.crash.zygote import NAME, Job, Zygote
from tests.figures import HOMES, KILLS

pytestmark = [pytest.mark.qemu]

_GUEST_S = 5.0


class Matrix(KillMatrix[Recovery]):
    """One story, played again and again, recovered in both ways.

    Args:
        story: The story.
        zygote: Where the controlling processes come from.
        folder: For the records.
    """

    ways = (Recovery.FINISH, Recovery.REVERT)

    def __init__(self, story: Story, zygote: Zygote, folder: Path) -> None:
        super().__init__(story, folder)
        self.kills = 0
        self.astray = 0
        self._zygote = zygote

    async def run(self, point: str | None, how: Recovery) -> tuple[str, ...]:
        """Play it to its end, or until it is killed at *point*; then recover."""
        at = await self.at_start()
        record = self.new_folder() / "vm.xml"
        async with qmpvcpu.attach(at.guest.qmp) as vm:
            plan = vm.plan(self.story.target)
        offline = self.story.offline_first
        steps = [replace(step, asks_agent=offline and step.action is Action.UNPLUG) for step in plan.steps]
        intent = Intent(plan.start, plan.target, tuple(steps), self.story.policy, _GUEST_S)
        job = Job(
            str(at.guest.qmp),
            str(record),
            str(self.story.target),
            self.story.policy.value,
            _GUEST_S,
            point or "",
            agent=at.agent_path or "",
            pins=tuple(self.story.pins.items()),
            stuck=self.story.stuck,
        )
        death = await self._zygote.run(job)
        killed = death.crossed[-1:] == (point,)
        assert death.code == (-signal.SIGKILL if killed else 0)
        try:
            await self._look(at, record, intent, death.crossed, how)
        except (AssertionError, QmpVcpuError, TimeoutError) as error:
            self.lost.append(f"{point}, {how.value}: {type(error).__name__}: {error}")
            await self.drop_stage()
        return death.crossed

    async def _look(self, at: Stage, record: Path, intent: Intent, crossed: tuple[str, ...], how: Recovery) -> None:
        before = await at.plugged()
        async with qmpvcpu.attach(at.guest.qmp, name=NAME, record=record, agent=at.agent_path) as vm:
            told = vm.layout.enabled
            self.kills += 1
            self.astray += at.main_cpus != HOME
            assert at.main_cpus == HOME, f"QEMU's main thread is on host CPUs {at.main_cpus}"
            if before == await at.plugged():  # nothing was on its way meanwhile
                assert told == before, f"layout said {told}, QEMU {before}"
            await at.agrees(vm)
            expected = _expected(intent, crossed)
            if vm.interrupted != expected and SAVING_TURN in crossed and TURN_SAVED not in crossed:
                expected = _expected(intent, (*crossed, TURN_SAVED))  # killed when that was just done
            assert vm.interrupted == expected, f"interrupted: {vm.interrupted}, not {expected}"
            if expected is None:
                assert await vm.recover(how) is None
                assert told == (self.story.result if OUTCOME_SAVED in crossed else START)
            else:
                await _recover(self.story, vm, how)
            await at.agrees(vm)
            assert not vm.layout.pending
            assert vm.interrupted is None
            plugged = vm.layout.enabled
            at.check_online(START & plugged)
            await at.check_places()
        check_record(record, plugged)


def _expected(intent: Intent, crossed: tuple[str, ...]) -> Intent | None:
    """What the record must say was under way, after these points."""
    if INTENT_SAVED not in crossed or OUTCOME_SAVED in crossed:
        return None
    back = TURN_SAVED in crossed
    return Intent(
        intent.start,
        intent.target,
        intent.steps,
        intent.on_failure,
        intent.timeout,
        Direction.REVERTING if back else Direction.FORWARD,
    )


async def _recover(story: Story, vm: VcpuController, how: Recovery) -> None:
    if how is Recovery.FINISH and story.refused:
        kept = "keeps it online, and QEMU was sent nothing" if story.refuses_agent else "refused: device is busy"
        with pytest.raises(TransitionError, match=f"unplug {story.keeps}: REFUSED: the guest {kept}") as caught:
            await vm.recover(how)
        ended = caught.value.report
        assert (ended.outcome, ended.start, vm.layout.enabled) == (TransitionOutcome.REVERTED, START, story.result)
        return
    report = await vm.recover(how)
    assert report is not None
    wanted = (
        (TransitionOutcome.REACHED, story.target) if how is Recovery.FINISH else (TransitionOutcome.REVERTED, START)
    )
    assert (report.outcome, vm.layout.enabled) == wanted


@pytest.mark.timeout(900)  # it is many tests in one, and other tests run
@pytest.mark.parametrize("story", [*STORIES, *OFFLINE_STORIES, *PLACED_STORIES], ids=str)
async def test_nothing_is_lost_wherever_it_is_killed(
    story: Story, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async with Zygote() as zygote:
        matrix = Matrix(story, zygote, tmp_path)
        points = await matrix.play()
    met = len(points) - len(matrix.unmet)
    record_property(KILLS, (met, len(matrix.lost)))
    record_property(HOMES, (matrix.kills, matrix.astray))
    print(f"\nkill matrix, {story}: {met} points, {len(matrix.lost)} lost; not met again: {matrix.unmet}")  # noqa: T201 -- for pytest -s
    assert not matrix.lost, "\n".join(matrix.lost)
    assert met >= 30, matrix.unmet


async def test_without_an_agent_a_recovery_says_what_it_cannot_do_and_one_with_it_does_that(tmp_path: Path) -> None:
    story, record = OFFLINE_FIRST, tmp_path / "vm.xml"
    async with Zygote() as zygote, stage(story) as at:
        await at.to_start()
        job = Job(
            str(at.guest.qmp),
            str(record),
            str(story.target),
            story.policy.value,
            _GUEST_S,
            "6 is offline in the guest",
            agent=at.agent_path or "",
        )
        assert (await zygote.run(job)).code == -signal.SIGKILL
        async with qmpvcpu.attach(at.guest.qmp, name=NAME, record=record) as vm:
            seen = await vm.recover(Recovery.REPORT)
            assert "it may be offline in the guest" in str(seen)
            with pytest.raises(StepDeniedError) as denied:
                await vm.recover(Recovery.FINISH)
            assert denied.value.reason is DenialReason.NO_AGENT
            with pytest.raises(TransitionError, match="attach with agent=") as caught:
                await vm.recover(Recovery.REVERT)
            assert caught.value.report.outcome is TransitionOutcome.REVERT_INCOMPLETE
            assert vm.layout.enabled == START
            assert vm.interrupted is not None
        async with qmpvcpu.attach(at.guest.qmp, name=NAME, record=record, agent=at.agent_path) as vm:
            report = await vm.recover(Recovery.REVERT)
            assert report is not None
            assert report.outcome is TransitionOutcome.REVERTED
            assert vm.interrupted is None
        at.check_online(START)
        check_record(record, START)


async def test_who_cannot_reach_the_main_thread_leaves_it_to_the_next_one(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with Zygote() as zygote, stage(PLACED) as at, Proxy(tmp_path / "proxy", at.guest.qmp) as proxy:
        await at.to_start()
        job = Job(
            *(str(at.guest.qmp), str(record), str(PLACED.target), PLACED.policy.value, _GUEST_S),
            die_at="device_add vcpu2 handed over",
            pins=tuple(PLACED.pins.items()),
        )
        assert (await zygote.run(job)).code == -signal.SIGKILL
        assert at.main_cpus != HOME
        async with qmpvcpu.attach(proxy.path, name=NAME, record=record) as vm:  # it may be on another host
            assert vm.interrupted is not None
            assert vm.interrupted.main_cpus == HOME
            assert at.main_cpus != HOME
        async with qmpvcpu.attach(at.guest.qmp, name=NAME, record=record) as vm:
            assert at.main_cpus == HOME
            await vm.recover(Recovery.FINISH)
            await at.check_places()
