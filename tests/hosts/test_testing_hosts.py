"""Hosts with real VMs and real agents for tests, and what their QEMUs were asked."""

import contextlib
from typing import Any

import pytest
from qemu.qmp import ExecuteError

import qmpvcpu
from qmpvcpu.bus import Bus
from qmpvcpu.model.hosts import VmKey
from qmpvcpu.model.wish import Wish
from qmpvcpu.testing import Behaviour, MicroGuest, find_qemus
from qmpvcpu.testing.hosts import Change, Hosts, HostVm, read_changes
from qmpvcpu.testing.nats import NatsServer
from qmpvcpu.testing.netns import can_make_namespaces
from qmpvcpu.testing.vms import TRACE_ARGUMENTS, TRACE_FILE, QmpMessage, read_transcript
from tests.controller.vms import other_client
from tests.hosts.world import answer, connected, wish
from tests.waiting import until

SLOT = {"socket-id": 0, "core-id": 1, "thread-id": 0}


def said(*contents: dict[str, Any]) -> list[QmpMessage]:
    """A transcript: what has ``execute`` is a client's."""
    return [QmpMessage(1.0, 1, "client" if "execute" in each else "qemu", each) for each in contents]


def add(device: str, number: int, **slot: int) -> dict[str, Any]:
    return {"execute": "device_add", "id": number, "arguments": {"driver": "cpu", "id": device, **slot}}


def delete(device: str, number: int) -> dict[str, Any]:
    return {"execute": "device_del", "id": number, "arguments": {"id": device}}


def done(number: int) -> dict[str, Any]:
    return {"return": {}, "id": number}


def rejected(number: int) -> dict[str, Any]:
    return {"error": {"class": "GenericError", "desc": ""}, "id": number}


def event(name: str, **data: Any) -> dict[str, Any]:
    return {"event": name, "data": data}


def ost(device: str, status: int, source: int = 3) -> dict[str, Any]:
    return event("ACPI_DEVICE_OST", info={"device": device, "source": source, "status": status, "slot": "2"})


GONE = event("DEVICE_DELETED", device="vcpu2", path="/machine/peripheral/vcpu2")
ADDED = (add("vcpu2", 1, **SLOT), done(1))
REMOVING = (*ADDED, delete("vcpu2", 2), done(2))


@pytest.mark.parametrize(
    ("messages", "accepted", "repeated"),
    [
        ([*ADDED], [True], [False]),
        ([add("vcpu2", 1)], [None], [False]),
        ([*ADDED, add("vcpu2", 2, **SLOT), rejected(2)], [True, False], [False, True]),
        ([*ADDED, add("vcpu2-2", 2, **SLOT), rejected(2)], [True, False], [False, True]),
        ([*ADDED, add("vcpu3", 2, **SLOT | {"core-id": 0}), done(2)], [True, True], [False, False]),
        ([add("vcpu2", 1, **SLOT), rejected(1), add("vcpu2", 2, **SLOT), done(2)], [False, True], [False, False]),
        ([add("vcpu2", 1, **SLOT), add("vcpu2", 2, **SLOT)], [None, None], [False, True]),
        ([add("vcpu2", 1, **SLOT), add("vcpu2", 2, **SLOT), done(2)], [None, True], [False, False]),
        ([*REMOVING], [True, True], [False, False]),
        ([*REMOVING, delete("/machine/peripheral/vcpu2", 3), rejected(3)], [True, True, False], [False, False, True]),
        ([*REMOVING, GONE, add("vcpu2", 3, **SLOT), done(3)], [True, True, True], [False, False, False]),
        ([*REMOVING, ost("vcpu2", 0x82), delete("vcpu2", 3), done(3)], [True, True, True], [False, False, False]),
        ([*REMOVING, ost("vcpu2", 0x84), delete("vcpu2", 3), done(3)], [True, True, True], [False, False, True]),
        ([*REMOVING, ost("vcpu2", 1, 1), delete("vcpu2", 3), done(3)], [True, True, True], [False, False, True]),
        (
            [*REMOVING, event("DEVICE_UNPLUG_GUEST_ERROR", device="vcpu2"), delete("vcpu2", 3)],
            [True, True, None],
            [False, False, False],
        ),
        ([delete("vcpu1", 1), rejected(1), delete("vcpu1", 2), done(2)], [False, True], [False, False]),
        ([event("DEVICE_DELETED", path="/machine/unattached/device[1]"), *ADDED], [True], [False]),
        ([{"execute": "query-status", "id": 1}, done(1), event("STOP")], [], []),
    ],
)
def test_what_was_asked_before_is_told(
    messages: list[dict[str, Any]], accepted: list[bool | None], repeated: list[bool]
) -> None:
    changes = read_changes(said(*messages))
    assert [change.accepted for change in changes] == accepted
    assert [change.is_repeated for change in changes] == repeated


def test_answers_of_one_client_are_not_those_of_another() -> None:
    first, second = said(add("vcpu2", 1), rejected(1))
    other = QmpMessage(2.0, 2, "client", {**add("vcpu3", 1)})
    changes = read_changes([first, other, second])
    assert changes == (Change("device_add", "vcpu2", 1.0, accepted=False), Change("device_add", "vcpu3", 2.0))


@pytest.mark.qemu
@pytest.mark.parametrize("version", find_qemus())
async def test_every_qemu_tells_what_it_was_asked_twice(version: str) -> None:
    qemu = find_qemus()[version]
    async with (
        MicroGuest(qemu, accel="tcg", behaviour=Behaviour.hanging(), extra_args=TRACE_ARGUMENTS) as guest,
        other_client(guest) as client,
    ):
        slots: Any = await client.execute("query-hotpluggable-cpus")
        device = {"driver": slots[0]["type"], "id": "vcpu7", **slots[0]["props"]}
        for command, arguments in (("device_add", device), ("device_del", {"id": "vcpu7"})):
            await client.execute(command, arguments)
            with contextlib.suppress(ExecuteError):  # of an unplug not every QEMU minds
                await client.execute(command, arguments)
        changes = read_changes(read_transcript((guest.process.directory / TRACE_FILE).read_text()))
    assert [(change.command, change.device, change.is_repeated) for change in changes] == [
        ("device_add", "vcpu7", False),
        ("device_add", "vcpu7", True),
        ("device_del", "vcpu7", False),
        ("device_del", "vcpu7", True),
    ]
    assert [change.accepted for change in changes[:3]] == [True, False, True]


async def wish_of_all(bus: Bus, hosts: Hosts, count: int, name: str) -> dict[str, int]:
    """Wish for *count* vCPUs of every VM; return the revisions of the wishes."""
    revisions = {}
    for host in hosts:
        for vm in host.vms:
            wanted = Wish(id=f"{name}/{host.name}/{vm}", count=count)
            revisions[f"{host.name}/{vm}"] = await wish(bus, VmKey(host.name, vm), wanted)
    return revisions


async def all_reached(bus: Bus, revisions: dict[str, int]) -> None:
    for address, revision in revisions.items():
        host, _, vm = address.partition("/")
        told = await answer(bus, VmKey(host, vm), revision, "ended", within=60)
        assert told["answer"]["code"] == 0, told


def plugged(vm: HostVm) -> list[str]:
    """What its QEMU plugged; it was asked for nothing else, and for nothing again but what was dropped."""
    assert all(change.command == "device_add" and change.accepted is not False for change in vm.changes), vm.changes
    assert not any(change.is_repeated for change in vm.changes), vm.changes
    return [change.device for change in vm.changes if change.accepted]


@pytest.mark.qemu
async def test_a_wish_of_every_vm_is_carried_out_once_though_agents_are_killed() -> None:
    async with (
        Hosts(2, vms=2) as hosts,
        NatsServer(host=hosts.network.address) as server,
        connected(server) as bus,
    ):
        await bus.prepare(lease_s=2.0)
        assert set(hosts.vms) == {"host0/vm0", "host0/vm1", "host1/vm0", "host1/vm1"}
        killed = [await host.start_agent(server.url) for host in hosts]
        revisions = await wish_of_all(bus, hosts, 3, "first")
        await until(lambda: any(vm.changes for vm in hosts.vms.values()), within=60)
        for agent in killed:
            agent.kill()
        again = [await host.start_agent(server.url) for host in hosts]
        await all_reached(bus, revisions)
        for vm in hosts.vms.values():
            assert plugged(vm) == ["vcpu1", "vcpu2"]
        assert [agent.returncode for agent in again] == [None, None], again[0].stderr


@pytest.mark.qemu
@pytest.mark.skipif(not can_make_namespaces(), reason="no network namespaces here")
async def test_a_host_that_is_cut_off_does_what_is_wished_once_it_is_back() -> None:
    async with (
        Hosts(["cut", "whole"], vms=["web"]) as hosts,
        NatsServer(host=hosts.network.address) as server,
        connected(server) as bus,
    ):
        await bus.prepare(lease_s=2.0)
        for host in hosts:
            await host.start_agent(server.url)
        await all_reached(bus, await wish_of_all(bus, hosts, 2, "first"))
        await hosts["cut"].host.cut()
        revisions = await wish_of_all(bus, hosts, 4, "second")
        await all_reached(bus, {"whole/web": revisions["whole/web"]})
        assert plugged(hosts["cut"].vms["web"]) == ["vcpu1"]
        await hosts["cut"].host.mend()
        await all_reached(bus, revisions)
        for vm in hosts.vms.values():
            assert plugged(vm) == ["vcpu1", "vcpu2", "vcpu3"]


@pytest.mark.qemu
async def test_a_crash_takes_the_vms_with_it_and_they_can_be_started_again() -> None:
    async with Hosts(["a"], vms=["web", "db"]) as hosts:
        host = hosts["a"]
        web = host.vms["web"]
        assert web.socket.resolve() == web.guest.qmp
        await host.crash()
        assert web.guest.process.returncode is not None
        assert not host.vms
        assert list(host.sockets.iterdir()) == []
        assert web.changes == ()
        again = await host.add_vm("web", boot=2)
        another = await host.add_vm("web", boot=3)
        assert again.guest.process.returncode is not None
        assert host.vms == {"web": another}
        async with qmpvcpu.attach(another.socket) as vm:
            assert vm.layout.enabled == {0, 1, 2}
        with pytest.raises(ValueError, match="there is a host a already"):
            await hosts.add_host("a")
