"""Places are of a host: they travel in the document, and nothing is moved by them on the target until it is asked."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import DenialReason, Place, Placement, StepDeniedError, VcpuMap
from qmpvcpu.domainxml import parse, placement_of, read_identity, update
from qmpvcpu.migration import confirm_target
from qmpvcpu.model.exported import ExportedState
from qmpvcpu.model.transition import Action, Intent, Step
from tests.controller.vms import running
from tests.migration.moving import move, rebuild, waiting
from tests.migration.test_between_qemus import NAMED, UNDER_KVM
from tests.substrates import Substrate

pytestmark = pytest.mark.qemu

HOST = VcpuMap(os.sched_getaffinity(0))
PIN = VcpuMap([min(HOST)])
NOWHERE = VcpuMap([16383])
WISH = Placement({0: Place(PIN), 3: Place(PIN), 4: Place(NOWHERE)})


@UNDER_KVM
async def test_the_places_of_the_source_travel_in_its_document_and_are_no_wish_of_the_target(on: Substrate) -> None:
    async with (
        running(on, attach={**NAMED, "placement": WISH}) as (source, vm),
        waiting(on) as (target, there),
    ):
        await vm.plug(3)
        async with await vm.export() as export:
            state = ExportedState.from_json(export.to_json())
            assert state.xml is not None
            assert placement_of(parse(state.xml)) == replace(WISH, everywhere=True)
            await rebuild(state, there)
            assert await move(source, target) == "completed"
            await confirm_target(export, there)
        assert there.host.placement == Placement()
        assert {thread.found.cpus for thread in await there.host.threads()} == {HOST}


@UNDER_KVM
async def test_a_target_that_takes_the_document_over_is_denied_host_cpus_that_it_does_not_have(
    on: Substrate, tmp_path: Path
) -> None:
    async with running(on, attach={**NAMED, "placement": WISH}) as (_, vm), await vm.export() as export:
        xml = export.state.xml
        assert xml is not None
    async with running(on, attach={**NAMED, "record": tmp_path / "vm.xml", "base": xml}) as (_, there):
        with pytest.raises(StepDeniedError, match="this host has no CPU 16383") as denied:
            await there.plug(4)
        assert denied.value.reason is DenialReason.CANNOT_PLACE
        assert await there.plug(4, placement=Placement({4: Place(HOST)})) == {4}
        assert await there.plug(3) == {3}


@UNDER_KVM
async def test_a_record_that_moves_along_sends_no_main_thread_to_the_cpus_of_another_host(
    on: Substrate, tmp_path: Path
) -> None:
    record = tmp_path / "vm.xml"
    async with contextlib.AsyncExitStack() as ours:
        source, vm = await ours.enter_async_context(running(on, attach={**NAMED, "record": record}))
        async with waiting(on) as (target, there):
            export = await vm.export()
            assert await move(source, target) == "completed"
            await confirm_target(export, there)
            await there.close()
            await vm.close()
            await ours.aclose()
            left = Intent(
                VcpuMap([0]), VcpuMap([0, 3]), (Step(Action.PLUG, VcpuMap([3])),), main_cpus=PIN, birthplaces=(HOST,)
            )
            kept = read_identity(record.read_bytes()).metadata
            assert kept is not None
            died = update(record.read_bytes(), parse(record.read_bytes()), metadata=replace(kept, intent=left))
            record.write_bytes(died)
            async with qmpvcpu.attach(target.qmp, **NAMED, record=record, arrived=True) as arrived:
                assert arrived.interrupted is not None
                assert arrived.interrupted.main_cpus is None
                assert {thread.found.cpus for thread in await arrived.host.threads()} == {HOST}
