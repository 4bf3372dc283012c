"""libvirt and we run the threads of twin VMs in the same places, and say so alike in their documents."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from qmpvcpu import Affect, Placement
from tests.figures import OPERATIONS
from tests.libvirt.daemon import Libvirt
from tests.libvirt.placed_twins import (
    HOST,
    Change,
    PlacedTwins,
    generated_document,
    generated_story,
    running_placed_twins,
)
from tests.libvirt.tolerated import OF_PLACES
from tests.substrates import Substrate, substrates

pytestmark = [
    pytest.mark.libvirt,
    pytest.mark.qemu,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this"),  # real time
    pytest.mark.skipif(len(HOST) == 1, reason="this host has one CPU"),
]

KVM = substrates(["q35"], accels=["kvm"])
FIRST, LAST = min(HOST), max(HOST)
REALTIME = (
    "<vcpusched vcpus='1-4' scheduler='rr' priority='1'/>"  # each is told by its own row once libvirt has read it
    "<emulatorsched scheduler='fifo' priority='1'/>"
)
TUNES = {
    "nothing": ("", ""),
    "pins": (f"<vcpupin vcpu='0' cpuset='{FIRST}'/><vcpupin vcpu='3' cpuset='{LAST}'/>", ""),
    "a cpuset": ("", f"{LAST}"),
    "pins over a cpuset": (f"<vcpupin vcpu='1' cpuset='{HOST}'/><vcpupin vcpu='3' cpuset='{LAST}'/>", f"{FIRST}"),
    "an emulatorpin": (f"<emulatorpin cpuset='{FIRST}'/>", ""),
    "an emulatorpin over a cpuset": (f"<emulatorpin cpuset='{FIRST}'/>", f"{LAST}"),
    "schedulers": (
        "<vcpusched vcpus='0,3' scheduler='fifo' priority='2'/><vcpusched vcpus='4' scheduler='idle'/>",
        "",
    ),
    "an emulatorsched": ("<emulatorsched scheduler='batch'/>", ""),
    "everything": (f"<vcpupin vcpu='3' cpuset='{LAST}'/><emulatorpin cpuset='{FIRST}'/>{REALTIME}", f"{HOST}"),
}
STORY = (
    Change("plug", 3),
    Change("plug", 4),
    Change("unplug", 3),
    Change("pin", 4, f"{FIRST}"),
    Change("pin", 3, f"{FIRST}", Affect.BOTH),
    Change("plug", 3),
    Change("pin", 0, f"{LAST}", Affect.CONFIG),
    Change("emulatorpin", 0, f"{LAST}"),
    Change("plug", 6),
    Change("emulatorpin", 0, f"{FIRST}", Affect.BOTH),
    Change("pin", 8, f"{FIRST}"),
    Change("unplug", 6),
    Change("plug", 6),
)
GENERATED = range(6)
Record = Callable[[str, object], None]


def report(twins: PlacedTwins, record_property: Record) -> None:
    record_property(OPERATIONS, (twins.compared, len(twins.unexplained)))
    assert not twins.unexplained, "\n\n".join(twins.unexplained)


@pytest.mark.parametrize("on", KVM[:1])
@pytest.mark.parametrize("tune", TUNES)
async def test_threads_run_where_libvirt_has_them_and_the_documents_say_the_same(
    libvirt: Libvirt, tmp_path: Path, tune: str, on: Substrate, record_property: Record
) -> None:
    cputune, cpuset = TUNES[tune]
    async with running_placed_twins(libvirt, on.qemu, tmp_path, cputune=cputune, cpuset=cpuset) as twins:
        await twins.compare()
        for change in STORY:
            await twins.compare(change)
    report(twins, record_property)


@pytest.mark.parametrize("on", substrates(["q35"], accels=["tcg"])[-2:])
async def test_so_they_do_without_kvm(
    libvirt: Libvirt, tmp_path: Path, on: Substrate, record_property: Record
) -> None:
    # libvirt cannot see a vCPU leave under TCG: nothing leaves here.
    cputune, cpuset = TUNES["everything"]
    async with running_placed_twins(libvirt, on.qemu, tmp_path, accel="tcg", cputune=cputune, cpuset=cpuset) as twins:
        await twins.compare()
        for change in STORY[:2] + STORY[3:5] + STORY[6:11]:
            await twins.compare(change)
    report(twins, record_property)


@pytest.mark.parametrize("on", KVM)
@pytest.mark.parametrize("seed", GENERATED)
async def test_so_they_do_whatever_a_document_says_and_whatever_is_changed(
    libvirt: Libvirt, tmp_path: Path, seed: int, on: Substrate, record_property: Record
) -> None:
    choose = random.Random(f"{seed} {on.version}")  # noqa: S311 - no secret
    cputune, cpuset = generated_document(choose)
    async with running_placed_twins(libvirt, on.qemu, tmp_path, cputune=cputune, cpuset=cpuset) as twins:
        await twins.compare()
        for change in generated_story(choose, 12):
            await twins.compare(change)
    report(twins, record_property)


@pytest.mark.parametrize("on", KVM[:1])
async def test_the_tolerated_difference_is_met(
    libvirt: Libvirt, tmp_path: Path, on: Substrate, record_property: Record
) -> None:
    async with running_placed_twins(libvirt, on.qemu, tmp_path) as twins:
        await twins.compare(Change("plug", 3))
        assert not twins.tolerated
        await twins.compare(Change("emulatorpin", 0, f"{FIRST}"))
        assert twins.tolerated == set(OF_PLACES)
    report(twins, record_property)


@pytest.mark.parametrize("on", KVM[:1])
async def test_what_is_not_on_the_list_is_told(libvirt: Libvirt, tmp_path: Path, on: Substrate) -> None:
    async with running_placed_twins(libvirt, on.qemu, tmp_path) as twins:
        await twins.ours.host.place(Placement.pinned({1: f"{FIRST}"}))
        await twins.compare()
        assert [told.split("\n")[0] for told in twins.unexplained] == [
            "threads after None (no. 1)",
            "live document after None (no. 1)",
        ]
