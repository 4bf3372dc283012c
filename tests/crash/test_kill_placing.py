"""The controlling process is killed at every point of vm.host.place(); what is left behind tells the truth."""

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import Affect, Placement, QmpVcpuError, VcpuMap
from qmpvcpu.domainxml import parse, placement_of, start_of
from qmpvcpu.engine.places import EMULATOR
from tests.crash import stage as staging
from tests.crash.points import PLACEMENT_SAVED
from tests.crash.stage import HOME, START, STOP, Pins, Stage, check_record, stage
from tests.crash.zygote import NAME, Job, Zygote
from tests.figures import HOMES, KILLS

pytestmark = pytest.mark.qemu

_FIRST, _LAST = str(min(HOME)), str(max(HOME))
# vCPU 3 is not there: what is said of it counts once it is plugged.
PINS: Mapping[int, tuple[str, str | None]] = {0: (_FIRST, None), 3: (_FIRST, None), 6: (_LAST, "batch")}
WITH_EMULATOR: Mapping[int, tuple[str, str | None]] = {**PINS, EMULATOR: (_LAST, None)}
_EVERYWHERE: Pins = dict.fromkeys(WITH_EMULATOR, (str(HOME), "other"))


def placement(pins: Pins) -> Placement:
    return staging.placement_of(pins) or Placement()


def as_written(data: bytes, *, next_boot: bool) -> dict[int, tuple[str, str | None]]:
    """Where the document has threads run, as pins."""
    domain = parse(data)
    found = placement_of(start_of(domain) if next_boot else domain)
    places = {**found.vcpus, EMULATOR: found.emulator}
    return {
        vcpu: (str(place.cpus), str(place.scheduler) if place.scheduler else None)
        for vcpu, place in places.items()
        if place.cpus is not None
    }


class PlacingMatrix:
    """One placement, done again and again."""

    def __init__(self, at: Stage, zygote: Zygote, folder: Path, pins: Pins, affect: Affect) -> None:
        self.lost: list[str] = []
        self.kills = 0
        self.astray = 0
        self._runs = 0
        self._at = at
        self._zygote = zygote
        self._folder = folder
        self._pins = pins
        self._affect = affect

    async def play(self) -> list[str]:
        """Kill it at each point, twice: then it is done again, or undone."""
        points = await self._run("", self._pins)
        for point in points:
            for after in (self._pins, _EVERYWHERE):
                crossed = await self._run(point, after)
                assert crossed[-1] == point, f"{point} was not met again"
        return points

    async def _run(self, point: str, after: Pins) -> list[str]:
        self._send_home()
        self._runs += 1
        folder = self._folder / str(self._runs)
        folder.mkdir()
        record = folder / "vm.xml"
        async with qmpvcpu.attach(self._at.guest.qmp, name=NAME, record=record) as vm:
            await vm.host.place(Placement())  # there is a record, which says nothing of it
        job = Job(
            *(str(self._at.guest.qmp), str(record), "", "", 5.0, point),
            pins=tuple(self._pins.items()),
            place=self._affect.value,
        )
        death = await self._zygote.run(job)
        assert death.code == (-signal.SIGKILL if point else 0)
        try:
            await self._look(record, death.crossed, after)
        except (AssertionError, QmpVcpuError) as error:
            self.lost.append(f"{point}: {type(error).__name__}: {error}")
        return list(death.crossed)

    async def _look(self, record: Path, crossed: tuple[str, ...], after: Pins) -> None:
        saved = PLACEMENT_SAVED in crossed
        async with qmpvcpu.attach(self._at.guest.qmp, name=NAME, record=record) as vm:
            assert vm.layout.enabled == START
            assert vm.interrupted is None
            assert bool(vm.host.placement) == saved, f"wanted: {vm.host.placement}"
            assert vm.host.drifted == {}  # what is wanted is only ever said once it is so
            if saved:
                await self._at.check_places(self._pins)
            await vm.host.place(placement(after), affect=self._affect)
            self.kills += 1
            wanted = after.get(EMULATOR, (str(HOME), None))[0]
            self.astray += self._at.main_cpus != VcpuMap.parse(wanted)
            await self._at.check_places(after)
        check_record(record, START)
        data = record.read_bytes()
        said = {vcpu: (cpus, None if word == "other" else word) for vcpu, (cpus, word) in after.items()}
        assert as_written(data, next_boot=False) == said
        # What the next boot has is that of the running VM, unless it was changed by itself.
        assert as_written(data, next_boot=True) == said

    def _send_home(self) -> None:
        for task in Path(f"/proc/{self._at.guest.process.pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), HOME)
                os.sched_setscheduler(int(task.name), os.SCHED_OTHER, os.sched_param(0))


@pytest.mark.parametrize("affect", [Affect.LIVE, Affect.BOTH], ids=str)
@pytest.mark.parametrize("pins", [PINS, WITH_EMULATOR], ids=["vCPUs", "vCPUs and emulator"])
async def test_threads_are_where_they_were_or_where_they_are_to_be_wherever_it_is_killed(
    pins: Pins, affect: Affect, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async with Zygote() as zygote, stage(STOP) as at:
        await at.to_start()
        matrix = PlacingMatrix(at, zygote, tmp_path, pins, affect)
        points = await matrix.play()
    record_property(KILLS, (len(points), len(matrix.lost)))
    record_property(HOMES, (matrix.kills, matrix.astray))
    assert not matrix.lost, "\n".join(matrix.lost)
    assert len(points) >= 10
