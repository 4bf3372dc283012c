import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics

import qmpvcpu
from qmpvcpu import OnFailure, Proof, TransitionError, VcpuController, VcpuMap
from qmpvcpu.events import VcpuPlaced
from qmpvcpu.fleet import Fleet
from qmpvcpu.metrics import VcpuCollector, exposition
from qmpvcpu.model.placement import Placement
from qmpvcpu.model.statistics import VcpuStatistics, VmStatistics
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.fleet.vms import guests, stopped
from tests.metrics.scraping import Page, rendered
from tests.waiting import until

pytestmark = pytest.mark.qemu

PARSE: Callable[[str], Iterable[prometheus_client.Metric]] = parse_open_metrics  # which has no types


@contextlib.asynccontextmanager
async def collecting(guest: MicroGuest, name: str = "vm") -> AsyncIterator[tuple[VcpuController, VcpuCollector]]:
    """A VM, and its collector without a registry."""
    async with (
        qmpvcpu.attach(guest.qmp, name=name) as vm,
        VcpuCollector(vm, registry=None) as collector,
    ):
        yield vm, collector


async def page_of(collector: VcpuCollector) -> Page:
    """What *collector* says after a reading."""
    await collector.read()
    registry = CollectorRegistry()
    registry.register(collector)
    return rendered(registry)


def proc(pid: int, tid: int) -> tuple[float, float, int]:
    """Run time and delay in seconds, and turns, of a thread, as the kernel has them."""
    run, delay, turns = map(int, Path(f"/proc/{pid}/task/{tid}/schedstat").read_text().split())
    return run / 1e9, delay / 1e9, turns


# What it says of a VM.


async def test_times_are_those_of_the_kernel() -> None:
    async with MicroGuest(boot=3) as guest, collecting(guest) as (vm, collector):
        await vm.refresh()
        tids = {vcpu.id: vcpu.host_tid for vcpu in vm.layout if vcpu.host_tid is not None}
        before = {vcpu: proc(guest.process.pid, tid) for vcpu, tid in tids.items()}
        page = await page_of(collector)
        after = {vcpu: proc(guest.process.pid, tid) for vcpu, tid in tids.items()}
    names = ("libvirt_domain_vcpu_time_seconds_total", "libvirt_domain_vcpu_delay_seconds_total")
    assert sorted(tids) == [0, 1, 2]
    for vcpu in tids:
        for place, name in enumerate((*names, "qmpvcpu_vcpu_turns_total")):
            value = page.value(name, domain="vm", vcpu=str(vcpu))
            assert value is not None
            assert before[vcpu][place] <= value <= after[vcpu][place], name
        host_cpu = page.value("libvirt_domain_vcpu_cpu", domain="vm", vcpu=str(vcpu))
        assert host_cpu is not None
        assert page.value("libvirt_domain_vcpu_state", domain="vm", vcpu=str(vcpu)) in (1, 2)


@pytest.mark.kvm
async def test_under_kvm_exits_are_counted_and_halted_vcpus_known() -> None:
    async with MicroGuest(accel="kvm", boot=2) as guest, collecting(guest) as (_, collector):
        first = await page_of(collector)
        await guest.scan_slots()
        second = await page_of(collector)
    exits = [page.value("qmpvcpu_vcpu_kvm_exits_total", domain="vm", vcpu="0") for page in (first, second)]
    assert exits[0] is not None
    assert exits[1] is not None
    assert 0 < exits[0] < exits[1]
    assert set(first["qmpvcpu_vcpu_halted"].values()) <= {0, 1}


async def test_the_map_and_what_is_pending_is_told_with_its_age() -> None:
    async with MicroGuest(boot=2) as guest, collecting(guest) as (vm, collector):
        page = await page_of(collector)
        assert page.value("qmpvcpu_pending_age_seconds", domain="vm") is None
        await guest.set_behaviour(Behaviour.hanging())
        await vm.request_unplug(1)
        first, second = await page_of(collector), await page_of(collector)
        assert first.value("qmpvcpu_vcpus_pending", domain="vm") == 1
        assert first.value("libvirt_domain_vcpu_current", domain="vm") == 2
        assert first.value("libvirt_domain_vcpu_maximum", domain="vm") == 8
        ages = [page.value("qmpvcpu_pending_age_seconds", domain="vm") for page in (first, second)]
        assert 0 <= (ages[0] or -1) < (ages[1] or -1)
        await guest.comply()
        await vm.wait_settled(timeout=10)
        page = await page_of(collector)
        assert page.value("qmpvcpu_vcpus_pending", domain="vm") == 0
        assert page.value("qmpvcpu_pending_age_seconds", domain="vm") is None
        assert page.value("qmpvcpu_stage_seconds_count", action="unplug", stage="gone") == 1


async def test_what_the_vm_is_can_be_joined_to_everything() -> None:
    async with MicroGuest(extra_args=("-uuid", "6d9f9b20-4f1f-4b56-9f0b-7a1a4e0d4b1a")) as guest:
        async with collecting(guest) as (vm, collector):
            page = await page_of(collector)
        assert page.value(
            "qmpvcpu_vm_info",
            domain="vm",
            address=f"unix:{guest.qmp}",
            uuid="6d9f9b20-4f1f-4b56-9f0b-7a1a4e0d4b1a",
            machine=vm.layout.vm.machine,
            accelerator=str(guest.accelerator),
            qemu=".".join(map(str, vm.layout.vm.qemu_version)),
        )


# Changes.


async def test_changes_by_us_and_by_others_are_counted_with_how_long_they_took() -> None:
    async with MicroGuest() as guest, collecting(guest) as (vm, collector):
        await vm.plug(3, proof=Proof.ACKNOWLEDGED)
        await vm.unplug(3, allow_fatal=True)
        async with qmpvcpu.attach(guest.sockets[1]) as other:
            await other.plug(2)
        await vm.wait_for(lambda layout: 2 in layout.enabled, timeout=5)
        await guest.refuse(0x82)
        with pytest.raises(qmpvcpu.UnplugRefusedError):
            await vm.unplug(2)
        page = await page_of(collector)
    counts = {event: page.value("qmpvcpu_events_total", domain="vm", event=event) for event in EVENTS}
    assert counts == EVENTS
    assert page["qmpvcpu_unplug_refusals_total"] == {("0x82", "vm"): 1}
    for action, stage in (("plug", "acknowledged"), ("unplug", "gone"), ("unplug", "refused")):
        assert (page.value("qmpvcpu_stage_seconds_count", action=action, stage=stage) or 0) >= 1
        assert 0 <= (page.value("qmpvcpu_stage_seconds_sum", action=action, stage=stage) or 0) < 10


EVENTS = {"VcpuPlugged": 2, "VcpuUnplugged": 1, "UnplugRequested": 2, "UnplugRefused": 1, "UnplugPending": 0}


async def test_a_guest_cannot_make_labels() -> None:
    async with MicroGuest(boot=2) as guest, collecting(guest) as (vm, collector):
        for status in (0x82, 0x77, 0x5F):
            await guest.refuse(status)
            with pytest.raises(qmpvcpu.UnplugRefusedError):
                await vm.unplug(1)
        page = await page_of(collector)
    assert page["qmpvcpu_unplug_refusals_total"] == {("0x82", "vm"): 1, ("other", "vm"): 2}


async def test_reports_of_whole_maps_are_counted_by_outcome_and_step() -> None:
    async with MicroGuest() as guest, collecting(guest) as (vm, collector):
        collector.observe(await vm.set_map("0-2"))
        collector.observe(None)
        await guest.refuse(0x82)
        with pytest.raises(TransitionError) as raised:
            await vm.set_map("0", on_failure=OnFailure.CONTINUE)
        collector.observe(raised.value.report)
        page = await page_of(collector)
    outcomes = {outcome: count for (outcome,), count in page["qmpvcpu_transition_seconds_count"].items() if count}
    assert outcomes == {"reached": 1, "partial": 1}
    assert page["qmpvcpu_steps_total"] == {("plug", "plugged"): 2, ("unplug", "refused"): 2}
    assert page.value("qmpvcpu_stage_seconds_count", action="plug", stage="present") == 2


async def test_threads_out_of_their_place_are_told() -> None:
    cpu = min(os.sched_getaffinity(0))
    placement = Placement(cpuset=VcpuMap([cpu]))
    async with (
        MicroGuest() as guest,
        qmpvcpu.attach(guest.qmp, name="vm", placement=placement) as vm,
        VcpuCollector(vm, registry=None) as collector,
    ):
        await vm.host.place()
        await vm.refresh()
        await vm.plug(2)
        page = await page_of(collector)
        assert page.value("qmpvcpu_threads_drifted", domain="vm") == 0
        assert page.value("qmpvcpu_unplaced_total", domain="vm") == 0
        assert page.value("qmpvcpu_stage_seconds_count", action="plug", stage="placed") == 1
        drifts = page.value("qmpvcpu_events_total", domain="vm", event="PlaceDrifted") or 0
        layout = await vm.refresh()
        tid = layout[2].host_tid
        assert tid is not None
        os.sched_setaffinity(tid, os.sched_getaffinity(0))  # a QEMU of this PID namespace: its number is the host's
        await vm.refresh()
        page = await page_of(collector)
        assert page.value("qmpvcpu_threads_drifted", domain="vm") == 1
        assert page.value("qmpvcpu_events_total", domain="vm", event="PlaceDrifted") == drifts + 1


# Who does not answer.


async def test_a_stopped_vm_is_waited_for_once_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with MicroGuest() as guest, collecting(guest) as (_, collector):
        assert (await page_of(collector)).up == {"vm": 1}
        with stopped(guest):
            assert (await page_of(collector)).up == {"vm": 0}
            with monkeypatch.context() as patch:
                patch.setattr("qmpvcpu.metrics._QUIET_S", 3600)  # how long it is waited for the first time
                page = await page_of(collector)
            assert page.up == {"vm": 0}
            assert page.value("libvirt_domain_vcpu_time_seconds_total", domain="vm", vcpu="0") is not None

        async def is_up() -> bool:
            return (await page_of(collector)).up == {"vm": 1}

        await until(is_up)


async def test_a_lost_vm_has_no_values_any_more() -> None:
    async with MicroGuest() as guest, collecting(guest) as (_, collector):
        assert (await page_of(collector)).up == {"vm": 1}
        guest.process.kill(signal.SIGKILL)
        await guest.process.wait()
        page = await page_of(collector)
        assert page.up == {"vm": 0}
        assert {name for name, labels in page.values if ("domain", "vm") in labels} <= {
            "qmpvcpu_up",
            "qmpvcpu_reading_age_seconds",
            "qmpvcpu_events_total",
            "qmpvcpu_unplaced_total",
        }


async def test_a_vm_that_is_removed_has_no_series_and_one_that_is_added_has_them() -> None:
    async with (
        guests(2) as (one, other),
        collecting(one, "one") as (vm, collector),
        qmpvcpu.attach(other.qmp, name="other") as more,
    ):
        collector.add(more)
        assert (await page_of(collector)).up == {"one": 1, "other": 1}
        collector.remove(vm)
        page = await page_of(collector)
        assert page.up == {"other": 1}
        assert 'domain="one"' not in page.text


# Names.


@pytest.mark.parametrize(
    "name", ['a"b', "a\\b", "a\nb 1\nevil 2", "\ud800", "\x1b[31m", "{}", "ü" * 500, "x" * 10_000]
)
async def test_no_name_breaks_a_page(name: str) -> None:
    async with MicroGuest() as guest, collecting(guest, name) as (_, collector):
        page = await page_of(collector)
        assert [*page.up.values()] == [1]
        assert "evil" not in {line.split()[0] for line in page.text.splitlines()}
        assert max(map(len, page.up)) < 150
        registry = CollectorRegistry()
        registry.register(collector)
        open_metrics = exposition(registry, "application/openmetrics-text")[1].decode()
        assert [*PARSE(open_metrics)]


async def test_two_vms_of_one_name_are_told_apart() -> None:
    async with (
        guests(2, extra_args=("-name", "web")) as (one, other),
        Fleet([one.qmp, other.qmp]) as fleet,
        VcpuCollector(fleet, registry=None) as collector,
    ):
        await fleet.attach()
        page = await page_of(collector)
    assert page.up == {"web": 1, f"web (unix:{other.qmp})": 1}


async def test_vms_of_other_hosts_are_for_the_exporters_there() -> None:
    async with VcpuCollector(registry=None) as collector:
        with pytest.raises(TypeError, match="an exporter on each"):
            collector.add(Fleet("nats://127.0.0.1:1"))


# Registries, threads and loops.


async def test_a_registry_has_one_and_is_free_again() -> None:
    registry = CollectorRegistry(auto_describe=True)
    async with VcpuCollector(registry=registry):
        with pytest.raises(ValueError, match="Duplicated timeseries"):
            VcpuCollector(registry=registry)
    async with VcpuCollector(registry=registry) as collector:
        collector.close()
    assert generate_latest(registry) == b""


async def test_prometheus_clients_own_server_reads_from_its_thread() -> None:
    registry = CollectorRegistry()
    async with (
        MicroGuest() as guest,
        qmpvcpu.attach(guest.qmp, name="vm") as vm,
        VcpuCollector(vm, registry=registry),
    ):
        server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
        try:
            first = await asyncio.to_thread(rendered, registry)
            await vm.plug(2)
            second = await asyncio.to_thread(rendered, registry)
        finally:
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            thread.join()
    assert first.value("libvirt_domain_vcpu_time_seconds_total", domain="vm", vcpu="0") is not None
    assert second.value("qmpvcpu_vcpus_plugged", domain="vm") == 2


async def test_in_the_loop_without_a_reading_it_has_the_one_before() -> None:
    registry = CollectorRegistry()
    async with (
        MicroGuest() as guest,
        qmpvcpu.attach(guest.qmp, name="vm") as vm,
        VcpuCollector(vm, registry=registry),
    ):
        assert rendered(registry).up == {}
        await until(lambda: rendered(registry).up == {"vm": 1})
        assert rendered(registry).value("libvirt_domain_vcpu_time_seconds_total", domain="vm", vcpu="0") is not None


def test_after_its_loop_it_has_what_it_read_last() -> None:
    registry = CollectorRegistry()

    async def read() -> None:
        async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp, name="vm") as vm:
            await VcpuCollector(vm, registry=registry).read()

    asyncio.run(read())
    assert rendered(registry).value("qmpvcpu_vcpus_plugged", domain="vm") == 1


async def test_what_is_missing_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async with MicroGuest() as guest, collecting(guest) as (vm, collector):
        statistics = await vm.statistics()

        async def incomplete(**_: object) -> VmStatistics:
            return replace(statistics, vcpus=(VcpuStatistics(0),), why_incomplete="/proc is hidden")

        vm.statistics = incomplete  # type: ignore[method-assign]  # as of a QEMU elsewhere
        pages = [await page_of(collector) for _ in range(3)]
        assert pages[-1].up == {"vm": 1}
        assert pages[-1]["libvirt_domain_vcpu_time_seconds_total"] == {}
        del vm.statistics
        assert (await page_of(collector))["libvirt_domain_vcpu_time_seconds_total"] != {}
    assert [record.levelname for record in caplog.records if "not all metrics" in record.message] == ["WARNING"]
    assert "/proc is hidden" in caplog.text


async def test_vcpus_that_could_not_be_placed_are_counted() -> None:
    async with MicroGuest() as guest, collecting(guest) as (vm, collector):
        failed = VcpuPlaced(generation=1, ids=VcpuMap([2]), why_not="host CPU 9 is offline", seconds=0.1)
        vm._driver.subscribers.push(failed)
        page = await page_of(collector)
    assert page.value("qmpvcpu_unplaced_total", domain="vm") == 1
    assert page.value("qmpvcpu_stage_seconds_count", action="plug", stage="placed") == 0


async def test_a_fleet_without_a_directory_is_attached_again_and_may_be_closed_first() -> None:
    async with (
        guests(1) as (guest,),
        Fleet([guest.qmp]) as fleet,
        VcpuCollector(fleet, registry=None, rescan_interval=0.01) as collector,
    ):

        async def is_up() -> bool:
            return [*(await page_of(collector)).up.values()] == [1]

        await until(is_up)
        (vm,) = fleet.vms.values()
        await vm.close()
        await until(lambda: [*fleet.vms.values()] not in ([], [vm]))
        await until(is_up)
        await fleet.close()
        assert [*(await page_of(collector)).up.values()] == [0]
        await asyncio.sleep(0.05)  # it looks again, and finds the fleet closed


async def test_readings_at_once_are_one() -> None:
    async with MicroGuest() as guest, collecting(guest) as (vm, collector):
        asked = 0
        statistics = vm.statistics

        async def counted(**options: object) -> object:
            nonlocal asked
            asked += 1
            return await statistics(**options)  # type: ignore[arg-type]  # it is passed on as it came

        vm.statistics = counted  # type: ignore[method-assign,assignment]  # to count
        await asyncio.gather(*(collector.read() for _ in range(10)))
        assert asked == 1
