"""What the command line prints of real VMs, read back, is what the library knows of them."""

import asyncio
from collections.abc import AsyncIterator

import pytest

import qmpvcpu
from qmpvcpu import Layout, VcpuMap
from qmpvcpu.documents import (
    code_of,
    error_from_json,
    error_json,
    event_from_json,
    layout_from_json,
    plan_from_json,
    statistics_from_json,
)
from qmpvcpu.errors import DenialReason, QmpVcpuError, StepDeniedError, TransitionError, UnplugRefusedError
from qmpvcpu.events import Origin, VcpuPlugged, VcpuUnplugged
from qmpvcpu.fleet import VmResult
from qmpvcpu.model.transition import TransitionReport
from qmpvcpu.model.verdicts import Refused
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.cli.running import run, running

pytestmark = pytest.mark.qemu


@pytest.fixture
async def guest() -> AsyncIterator[MicroGuest]:
    async with MicroGuest(boot=2) as guest:
        yield guest


async def known(guest: MicroGuest) -> Layout:
    """What the library knows of the VM."""
    async with qmpvcpu.attach(guest.qmp) as vm:
        return vm.layout


async def test_a_vm_that_is_listed_is_the_one_that_is_attached_to(guest: MicroGuest) -> None:
    assert (await run("plug", "2-3", "--proof", "acknowledged", "--qmp", guest.qmp)).code == 0
    await guest.set_behaviour(Behaviour.hanging())
    assert (await run("unplug", "3", "--timeout", "0.1", "--qmp", guest.qmp)).code == 1
    listed = await run("list", "--json", "--qmp", guest.qmp)
    layout = layout_from_json(listed.document)
    assert layout == await known(guest)
    assert (str(layout.enabled), str(layout.pending)) == ("0-3", "3")


async def test_a_map_that_was_not_reached_is_raised_on_another_host(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.refusing(0x82))
    ran = await run("fleet", "set", "0,2-3", "--qmp", guest.qmp, "--qmp", "unix:/nobody", "--json")
    row, lost = map(VmResult.from_json, ran.document["vms"])
    with pytest.raises(TransitionError) as raised:
        row.unwrap()
    report = raised.value.report
    assert report.steps[-1].verdict == Refused(VcpuMap([1]), 0x82, "device is busy", report.steps[-1].seconds)
    assert report.layout.enabled == (await known(guest)).enabled == {0, 1, 2, 3}
    assert str(TransitionError(report)).startswith("vCPUs 0,2-3 not reached (partial): unplug 1: REFUSED")
    assert (row.code, lost.code, ran.code) == (1, 3, 3)


async def test_a_map_that_was_reached_has_its_report(guest: MicroGuest) -> None:
    ran = await run("fleet", "set", "0,2", "--qmp", guest.qmp, "--json")
    (row,) = map(VmResult.from_json, ran.document["vms"])
    assert isinstance(row.value, TransitionReport)
    assert row.value == row.report == TransitionReport.from_json(ran.document["vms"][0])
    assert row.value.layout == row.layout
    assert row.value.layout.enabled == {0, 2}
    listed = await run("fleet", "list", "--qmp", guest.qmp, "--json")
    (row,) = map(VmResult.from_json, listed.document["vms"])
    assert row.layout == await known(guest)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("unplug", "0"), StepDeniedError),
        (("unplug", "1"), UnplugRefusedError),
        (("plug", "1"), StepDeniedError),
        (("set", "0-99"), StepDeniedError),
        (("set", "zero"), qmpvcpu.InvalidMapError),
        (("unplug", "1", "--offline-first"), StepDeniedError),
    ],
)
async def test_an_error_is_the_one_that_the_library_raised(
    guest: MicroGuest, arguments: tuple[str, ...], kind: type[QmpVcpuError]
) -> None:
    await guest.set_behaviour(Behaviour.refusing(0x82))
    ran = await run(*arguments, "--json", "--qmp", guest.qmp)
    error = error_from_json(ran.error)
    assert (type(error), str(error), code_of(error)) == (kind, ran.error["message"], ran.code)
    untold = {"verdict": None}  # in the library's words even there
    assert error_json(error) | untold == ran.error | untold


async def test_a_plan_is_the_one_that_the_library_makes(guest: MicroGuest) -> None:
    ran = await run("plan", "0,2-4", "--json", "--qmp", guest.qmp)
    async with qmpvcpu.attach(guest.qmp) as vm:
        plan = vm.plan("0,2-4")
        assert plan_from_json(ran.document, vm.layout) == plan
    denied = plan_from_json((await run("plan", "1", "--json", "--qmp", guest.qmp)).document)
    assert [each.reason for each in denied.denied] == [DenialReason.BOOT_VCPU]


async def test_what_is_watched_is_what_happened(guest: MicroGuest) -> None:
    async with running("watch", "--until", "0,2", "--for", "30", "--json", "--qmp", guest.qmp) as watching:
        assert watching.process.stdout is not None
        await asyncio.wait_for(watching.process.stdout.readline(), 20)  # it is attached, and says so
        async with qmpvcpu.attach(guest.sockets[1]) as vm:
            events = vm.events()
            await vm.set_map("0,2")
        ours = [each async for each in events]
        *told, last = (await watching.end()).documents
    assert last["ended"] == "reached"
    changes = VcpuPlugged, VcpuUnplugged
    seen = [each for each in map(event_from_json, told) if isinstance(each, changes)]
    # Nothing announces a plug to other clients: they find it later.
    assert {(type(each), each.ids) for each in seen} == {
        (type(each), each.ids) for each in ours if isinstance(each, changes)
    }
    assert {each.origin for each in seen} == {Origin.OTHER}


async def test_what_vcpus_did_between_two_documents_is_told_by_their_readers(guest: MicroGuest) -> None:
    ran = await run("stats", "--interval", "0.1", "--count", "2", "--json", "--qmp", guest.qmp)
    before, now = map(statistics_from_json, ran.documents)
    rates = now.since(before)
    told = ran.documents[1]
    assert rates.seconds == told["seconds"]
    assert [each.run for each in rates.vcpus] == [vcpu["rates"]["run"] for vcpu in told["vcpus"]]
