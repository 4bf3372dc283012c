"""A fleet whose VMs are on other hosts: real agents, a real server, real QEMUs."""

import asyncio
import contextlib
import gc
import inspect
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_overloads

import nats
import pytest

import qmpvcpu
from qmpvcpu import TransitionError, VcpuMap
from qmpvcpu.bus import Bus, Endpoint, Request, ServerAddress
from qmpvcpu.errors import (
    HostFailedError,
    HostSilentError,
    InvalidMapError,
    Outcome,
    RequestRefusedError,
    SameNameError,
    ServerConnectError,
    ServerLostError,
    StepDeniedError,
    UnfitServerError,
    WishError,
)
from qmpvcpu.events import VcpuPlugged, VcpuUnplugged
from qmpvcpu.fleet import Fleet, Rescan, VmResult, remote
from qmpvcpu.fleet.local import LocalVms
from qmpvcpu.fleet.remote import RemoteVms
from qmpvcpu.fleet.wishes import WishBook
from qmpvcpu.hosts import AgentPolicy
from qmpvcpu.model.codec import from_json, to_json
from qmpvcpu.model.hosts import LEASES, STATES, WISHES, HostInfo, Operation, VmKey, request_subjects, token
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import OnFailure
from qmpvcpu.model.placement import Placement
from qmpvcpu.model.wish import Claim, Wish, WishPhase
from qmpvcpu.testing import Behaviour, MicroGuest
from qmpvcpu.testing.nats import NatsServer
from tests.hosts.world import agent_of, answer, served, state, vm_in
from tests.waiting import until

pytestmark = pytest.mark.qemu

WEB, DB, OTHER = VmKey("rack1", "web-1"), VmKey("rack1", "db"), VmKey("rack2", "web-2")


@contextlib.asynccontextmanager
async def host(
    server: NatsServer,
    bus: Bus,
    tmp_path: Path,
    name: str,
    *vms: str,
    policy: AgentPolicy | None = None,
    **options: Any,
) -> AsyncIterator[list[MicroGuest]]:
    """A host whose agent has told of all of its VMs."""
    (tmp_path / name).mkdir()
    async with contextlib.AsyncExitStack() as stack:
        guests = [await stack.enter_async_context(vm_in(tmp_path / name, vm, **options)) for vm in vms]
        await stack.enter_async_context(agent_of(server, name, tmp_path / name, policy=policy))
        for vm in vms:
            await state(bus, VmKey(name, vm), is_here)
        yield guests


def is_here(told: dict[str, Any]) -> bool:
    return "vm" in told


@pytest.fixture
async def hosts(server: NatsServer, bus: Bus, tmp_path: Path) -> AsyncIterator[dict[VmKey, MicroGuest]]:
    """Two hosts: rack1 with db and web-1, rack2 with web-2."""
    async with (
        host(server, bus, tmp_path, "rack1", "db", "web-1") as first,
        host(server, bus, tmp_path, "rack2", "web-2") as second,
    ):
        yield dict(zip((DB, WEB, OTHER), (*first, *second), strict=True))


@contextlib.asynccontextmanager
async def requests(server: NatsServer) -> AsyncIterator[Counter[str]]:
    """Which requests agents get, as their host and operation."""
    seen: Counter[str] = Counter()
    client = await nats.connect(server.url)

    async def count(message: Any) -> None:
        seen[".".join(message.subject.split(".")[2:4])] += 1

    await client.subscribe("qmpvcpu.do.>", cb=count)
    await client.flush()
    try:
        yield seen
    finally:
        await client.close()


async def enabled(guest: MicroGuest) -> VcpuMap:
    """What QEMU itself says, to another client."""
    async with qmpvcpu.attach(guest.sockets[1]) as vm:
        return vm.layout.enabled


async def test_the_vms_of_many_hosts_are_read_and_changed_as_those_of_one(
    server: NatsServer, hosts: dict[VmKey, MicroGuest]
) -> None:
    async with Fleet(server.url) as fleet:
        assert fleet.addresses == ("rack1/db", "rack1/web-1", "rack2/web-2")
        assert fleet.directory is None
        read = await fleet.refresh()
        assert [(each.address, each.name, each.error) for each in read] == [
            ("rack1/db", "db", None),
            ("rack1/web-1", "web-1", None),
            ("rack2/web-2", "web-2", None),
        ]
        assert all(isinstance(each.value, Layout) and each.value is each.layout for each in read)
        set_ = await fleet.set_map("0-2", timeout=10)
        assert [each.unwrap().layout.enabled for each in set_] == [{0, 1, 2}] * 3
        assert [each.layout and each.layout.enabled for each in set_] == [{0, 1, 2}] * 3
        assert [each.report is each.value for each in set_] == [True] * 3
        counted = [each async for each in fleet.set_count(2)]
        assert sorted(each.address for each in counted) == sorted(fleet.addresses)
        assert {str(each.unwrap().target) for each in counted} == {"0-1"}
    for guest in hosts.values():
        assert await enabled(guest) == {0, 1}


async def test_all_are_planned_and_measured_as_those_of_one(
    server: NatsServer, hosts: dict[VmKey, MicroGuest]
) -> None:
    async with Fleet(server.url, where="name=web-* host=*") as there, Fleet([hosts[WEB].sockets[1]]) as here:
        (local,) = await here.plan("0-1,3", in_flight=1)
        planned = await there.plan("0-1,3", in_flight=1)
        assert [each.address for each in planned] == ["rack1/web-1", "rack2/web-2"]
        assert [str(each.unwrap()) for each in planned] == [str(local.unwrap())] * 2
        counted = await there.plan_count(3)
        assert [each.unwrap().target for each in counted] == [{0, 1, 2}] * 2
        assert all("99" in str(each.error or each.unwrap()) for each in await there.plan("0-99"))
        read = await there.statistics(kvm=())
        assert [[vcpu.id for vcpu in each.unwrap().vcpus] for each in read] == [[0], [0]]
        with pytest.raises(InvalidMapError):
            there.plan("")
    assert await enabled(hosts[DB]) == {0}


async def test_a_fleet_of_one_host_reads_no_states_of_others(
    server: NatsServer, bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    async with stand_in(bus, "rack1", WEB):
        await (await bus.bucket(STATES)).put(OTHER.key, b"not to be read")
        async with Fleet(server.url, where="host=rack1") as fleet:
            assert fleet.addresses == ("rack1/web-1",)
    assert not caplog.messages


@pytest.mark.usefixtures("hosts")
async def test_each_host_is_asked_once_for_all_of_its_vms(server: NatsServer) -> None:
    async with Fleet(server.url, concurrency=1) as fleet, requests(server) as seen:
        await fleet.refresh()
        await until(lambda: seen == {"rack1.list": 1, "rack2.list": 1})
        await fleet.refresh()
        await until(lambda: seen == {"rack1.list": 2, "rack2.list": 2})


async def test_a_change_by_hand_is_seen_when_it_is_read_again(
    server: NatsServer, hosts: dict[VmKey, MicroGuest]
) -> None:
    async with Fleet(server.url, where="name=web-1") as fleet:
        async with qmpvcpu.attach(hosts[WEB].sockets[1]) as hand:
            await hand.plug(3)
        (only,) = await fleet.refresh()
        assert only.unwrap().enabled == {0, 3}


@pytest.mark.usefixtures("hosts")
async def test_words_choose_and_vms_come_and_go(server: NatsServer, tmp_path: Path) -> None:
    async with Fleet(server.url, where="host=rack* name=web-*") as fleet:
        assert fleet.addresses == ("rack1/web-1", "rack2/web-2")
        async with vm_in(tmp_path / "rack2", "web-9"):
            found = await rescanned(fleet)
            assert found == Rescan(("rack2/web-9",), ())
            assert [*fleet.addresses] == ["rack1/web-1", "rack2/web-2", "rack2/web-9"]
        assert await rescanned(fleet) == Rescan((), ("rack2/web-9",))
        assert fleet.addresses == ("rack1/web-1", "rack2/web-2")
    async with Fleet(server.url, where="name=nothing") as fleet:
        assert await fleet.refresh() == ()


async def rescanned(fleet: Fleet) -> Rescan:
    """Look again until there is news."""
    found = Rescan((), ())

    async def has_news() -> bool:
        nonlocal found
        found = await fleet.rescan()
        return any(found)

    await until(has_news, within=20)
    return found


async def test_a_name_on_two_hosts_is_not_guessed_at(server: NatsServer, bus: Bus, tmp_path: Path) -> None:
    async with host(server, bus, tmp_path, "rack1", "web"), host(server, bus, tmp_path, "rack2", "web"):
        with pytest.raises(SameNameError, match="host=\\*"):
            async with Fleet(server.url, where="name=web"):
                pass
        async with Fleet(server.url, where="name=web host=*") as fleet:
            assert fleet.addresses == ("rack1/web", "rack2/web")


async def test_what_a_vm_does_not_reach_is_the_error_that_it_would_be_here(
    server: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    behaviour = Behaviour.refusing(0x82)
    async with (
        host(server, bus, tmp_path, "rack1", "web-1", boot=3, behaviour=behaviour),
        Fleet(server.url) as fleet,
    ):
        (refused,) = await fleet.set_map("0", timeout=10, on_failure=OnFailure.REVERT)
        (denied,) = await fleet.set_map("0-99")
    async with MicroGuest(boot=3, behaviour=behaviour) as guest, Fleet([guest.qmp]) as here:
        (refused_here,) = await here.set_map("0", timeout=10, on_failure=OnFailure.REVERT)
        (denied_here,) = await here.set_map("0-99")
    assert isinstance(refused.error, TransitionError)
    assert refused.report is not None
    assert refused_here.report is not None
    assert refused.report.outcome is refused_here.report.outcome
    assert [each.said for each in refused.report.steps] == [each.said for each in refused_here.report.steps]
    assert type(denied.error) is type(denied_here.error) is StepDeniedError
    assert str(denied.error) == str(denied_here.error)


async def test_functions_do_not_travel(server: NatsServer) -> None:
    async with Fleet(server.url) as fleet:
        with pytest.raises(TypeError, match="functions do not travel"):
            fleet.each(lambda vm: vm.plug(1))
        with pytest.raises(TypeError, match="refresh"):
            fleet.attach()
        with pytest.raises(TypeError, match="agents"):
            fleet.vms  # noqa: B018 - it raises


@pytest.mark.usefixtures("hosts")
async def test_bad_input_is_refused_before_anything_is_wished(server: NatsServer, bus: Bus) -> None:
    async with Fleet(server.url) as fleet:
        with pytest.raises(InvalidMapError):
            fleet.set_map("")
        with pytest.raises(ValueError, match="in_flight"):
            fleet.set_map("0-1", in_flight=0)
        with pytest.raises(ValueError, match="placement"):
            fleet.set_map("0-1", placement=Placement())
    assert await (await bus.bucket(WISHES)).keys() == []


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"where": "web"}, "chooses no VMs"),
        ({"drop_after": 0}, "drop_after"),
        ({"reply_timeout": -1}, "reply_timeout"),
    ],
)
def test_what_a_fleet_of_other_hosts_cannot_have_is_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Fleet("nats://127.0.0.1:1", **given)


@pytest.mark.parametrize(
    "name", ["directory", "pattern", "record", "agent", "read_only", "resync_interval", "creds", "nonsense"]
)
def test_options_that_do_not_go_with_a_server_are_refused(name: str) -> None:
    given: dict[str, Any] = {name: None}
    for server in ("nats://127.0.0.1:1", ServerAddress("127.0.0.1:1")):
        with pytest.raises(TypeError, match=f"^{name} is no option of a fleet of other hosts, .* it has where, "):
            Fleet(server, **given)


@pytest.mark.parametrize("name", ["where", "who", "why", "drop_after", "nonsense"])
def test_options_that_need_a_server_are_refused_without_one(name: str) -> None:
    given: dict[str, Any] = {name: "x"}
    with pytest.raises(TypeError, match=f"^{name} is no option of a fleet of this host: no server .* directory, "):
        Fleet(directory="/run", **given)


def test_a_fleet_has_the_options_of_both_kinds_of_vms() -> None:
    def options(function: Callable[..., object]) -> dict[str, tuple[object, object]]:
        given = inspect.signature(function).parameters.values()
        return {each.name: (each.annotation, each.default) for each in given if each.kind is each.KEYWORD_ONLY}

    there, here = map(options, get_overloads(Fleet.__init__))
    of_fleet = {"concurrency": (int | None, None)}
    assert (there, here) == (options(RemoteVms.__init__) | of_fleet, options(LocalVms.__init__) | of_fleet)


async def test_no_server_and_an_unfit_one_say_what_to_do() -> None:
    with pytest.raises(ServerConnectError, match="nats://"):
        async with Fleet("nats://127.0.0.1:1", reply_timeout=2):
            pass
    async with NatsServer() as server:
        with pytest.raises(UnfitServerError, match="qmpvcpu hosts init"):
            async with Fleet(server.url):
                pass


async def test_a_host_that_is_away_has_its_own_error_and_its_wish_is_taken_back(
    server: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    async with host(server, bus, tmp_path, "rack1", "web-1"):
        async with host(server, bus, tmp_path, "rack2", "web-2"):
            pass
        async with Fleet(server.url, reply_timeout=0.5) as fleet:
            here, away = await fleet.refresh()
            assert here.error is None
            assert isinstance(away.error, HostSilentError)
            done, undone = await fleet.set_map("0-1")
            assert done.error is None
            assert isinstance(undone.error, HostSilentError)
            assert undone.layout is not None  # as it was last seen
            assert "qmpvcpu agent" in str(undone.error)
    assert await (await bus.bucket(WISHES)).get(OTHER.key) is None


async def test_a_host_that_dies_before_it_begins_has_the_wish_taken_back(server: NatsServer, bus: Bus) -> None:
    async with stand_in(bus, "rack1", WEB), Fleet(server.url, reply_timeout=0.5) as fleet:
        results = fleet.set_map("0-1")
        wishes = await bus.bucket(WISHES)
        await until(lambda: _is_there(wishes.get(WEB.key)))
        await (await bus.bucket(LEASES)).delete("host.rack1")
        (only,) = await results
        assert isinstance(only.error, HostSilentError)
        assert await wishes.get(WEB.key) is None


async def _is_there(reading: Any) -> bool:
    return await reading is not None


async def test_a_vm_that_is_away_has_its_wish_taken_back(server: NatsServer, bus: Bus, tmp_path: Path) -> None:
    async with (
        host(server, bus, tmp_path, "rack1", "web-1") as (guest,),
        Fleet(server.url, reply_timeout=0.5) as fleet,
    ):
        guest.process.kill()
        await state(bus, WEB, lambda told: not is_here(told))
        (only,) = await fleet.set_map("0-1")
        assert isinstance(only.error, WishError)
        assert only.error.phase is WishPhase.WITHDRAWN
        assert only.error.code == 3
        assert await (await bus.bucket(WISHES)).get(WEB.key) is None


async def test_an_agent_that_only_reads_rejects_it(server: NatsServer, bus: Bus, tmp_path: Path) -> None:
    async with (
        host(server, bus, tmp_path, "rack1", "web-1", policy=AgentPolicy.read_only()),
        Fleet(server.url) as fleet,
    ):
        (only,) = await fleet.set_map("0-1")
    assert isinstance(only.error, WishError)
    assert only.error.phase is WishPhase.REJECTED
    assert only.error.code == 2
    assert "does not set" in str(only.error)


async def test_a_newer_wish_supersedes_it(server: NatsServer, bus: Bus, tmp_path: Path) -> None:
    async with (
        host(server, bus, tmp_path, "rack1", "web-1", boot=3, behaviour=Behaviour.hanging()),
        Fleet(server.url) as fleet,
        Fleet(server.url) as other,
    ):
        slow = fleet.set_map("0", timeout=60)
        await state(bus, WEB, _is_running)
        (newer,) = await other.set_map("0-3", timeout=0)
        (only,) = await slow
        assert isinstance(only.error, WishError | TransitionError)
        if isinstance(only.error, WishError):
            assert only.error.phase is WishPhase.SUPERSEDED
        assert newer.error is None or newer.report is not None


def _is_running(told: dict[str, Any]) -> bool:
    return told["answer"] is not None and told["answer"]["phase"] == "running"


@pytest.mark.parametrize("how", ["the results", "the fleet"])
async def test_closing_stops_what_was_wished_at_its_next_safe_point(
    server: NatsServer, bus: Bus, tmp_path: Path, how: str
) -> None:
    async with (
        host(server, bus, tmp_path, "rack1", "web-1", boot=3, behaviour=Behaviour.hanging()),
        Fleet(server.url) as fleet,
    ):
        results = fleet.set_map("0", timeout=60)
        running = await state(bus, WEB, _is_running)
        await (results.aclose() if how == "the results" else fleet.close())
        revision = running["answer"]["revision"]
        told = await answer(bus, WEB, revision, "withdrawn")
        assert told["cancelled"] is True
        assert [each async for each in results] == []
    assert await (await bus.bucket(WISHES)).get(WEB.key) is None


async def test_cancelling_takes_back_what_nobody_has_begun(server: NatsServer, bus: Bus) -> None:
    async with stand_in(bus, "rack1", WEB), Fleet(server.url) as fleet:
        results = fleet.set_map("0-1")
        wishes = await bus.bucket(WISHES)
        await until(lambda: _is_there(wishes.get(WEB.key)))
        await results.aclose()
        assert await wishes.get(WEB.key) is None


@pytest.mark.usefixtures("hosts")
async def test_what_happens_on_all_hosts_comes_in_one_stream(server: NatsServer) -> None:
    async with Fleet(server.url, where="name=web-* host=*") as fleet, Fleet(server.url) as all_:
        events = fleet.events()
        await fleet.set_map("0-1", timeout=10)
        await all_.set_map("0-2", timeout=10)  # db too, whose events are not chosen
        await fleet.set_map("0", timeout=10)
        seen: dict[str, str] = {}
        async with asyncio.timeout(20):
            while len(seen) < 2:
                each = await anext(events)
                if isinstance(each.event, VcpuUnplugged) and each.event.ids == {1}:
                    seen[each.address] = each.name
                assert each.address != "rack1/db"
        assert seen == {"rack1/web-1": "web-1", "rack2/web-2": "web-2"}
    left = [each async for each in events]  # it has ended with the fleet
    assert all(each.address.endswith(each.name) for each in left)


@pytest.mark.usefixtures("hosts")
async def test_what_nobody_can_have_told_does_not_end_a_stream(server: NatsServer) -> None:
    async with Fleet(server.url, where="name=web-1") as fleet:
        events = fleet.events()
        await fleet.refresh()  # it has begun
        async with contextlib.AsyncExitStack() as stack:
            client = await nats.connect(server.url)
            stack.push_async_callback(client.close)
            for subject in ("rack1.w\u00e9b.Boom", "rack1.=zz.Boom", "rack1.web-1.\x1b", "rack1.web-1.Asked"):
                await client.publish(f"qmpvcpu.event.{subject}", b"[" * 100_000)
            await client.flush()
        await fleet.set_map("0-1", timeout=10)
        async with asyncio.timeout(20):
            assert isinstance((await anext(events)).event, VcpuPlugged)


@pytest.mark.usefixtures("hosts")
async def test_a_dropped_stream_is_not_filled(server: NatsServer) -> None:
    async with Fleet(server.url, where="name=web-1") as fleet:
        events = fleet.events()
        await fleet.set_map("0-1", timeout=10)
        first = await anext(events)
        assert isinstance(first.event, VcpuPlugged)
        before = len(asyncio.all_tasks())
        del events
        gc.collect()
        await until(lambda: len(asyncio.all_tasks()) < before)


@pytest.mark.usefixtures("hosts")
async def test_a_stream_that_is_dropped_at_once_holds_up_nothing(server: NatsServer) -> None:
    async with Fleet(server.url, where="name=web-1") as fleet:
        fleet.events()
        gc.collect()
        async with asyncio.timeout(60):
            await fleet.refresh()


async def test_a_server_that_is_killed_and_comes_back_loses_no_wish(
    server: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    async with (
        host(server, bus, tmp_path, "rack1", "web-1", boot=3, behaviour=Behaviour.hanging()) as (guest,),
        Fleet(server.url) as fleet,
    ):
        results = fleet.set_map("0", timeout=60)
        await state(bus, WEB, _is_running)
        await server.kill()
        await guest.comply()
        await server.start()
        async with asyncio.timeout(40):
            (only,) = await results
        assert only.unwrap().layout.enabled == {0}


async def test_a_fleet_closes_in_time_without_its_server(
    server: NatsServer, bus: Bus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        host(server, bus, tmp_path, "rack1", "web-1", boot=3, behaviour=Behaviour.hanging()),
        Fleet(server.url, reply_timeout=0.5) as fleet,
    ):
        results = fleet.set_map("0", timeout=60)
        await state(bus, WEB, _is_running)
        await server.kill()
        async with asyncio.timeout(10):  # a call to the server is tried for 15 s
            await fleet.close()
        assert [each async for each in results] == []
        await server.start()
    assert "rack1/web-1: what was wished has not stopped yet" in caplog.text


@pytest.mark.usefixtures("hosts")
async def test_a_list_waits_for_a_server_that_is_about_to_be_back(server: NatsServer) -> None:
    async with Fleet(server.url, reply_timeout=30) as fleet:
        await server.kill()
        results = fleet.refresh()
        await asyncio.sleep(0)
        await server.start()
        assert [each.error for each in await results] == [None] * 3


@pytest.mark.usefixtures("hosts")
async def test_a_server_that_stays_away_is_waited_for_as_long_as_a_reply_may_take(server: NatsServer) -> None:
    async with Fleet(server.url, reply_timeout=0.5) as fleet, asyncio.timeout(30):
        await server.kill()
        assert [type(each.error) for each in await fleet.refresh()] == [ServerLostError] * 3
        assert [type(each.error) for each in await fleet.plan("0-1")] == [ServerLostError] * 3


# What agents may say.


@contextlib.asynccontextmanager
async def stand_in(
    bus: Bus, name: str, *vms: VmKey, answers: list[bytes] | None = None
) -> AsyncIterator[list[dict[str, Any]]]:
    """Something that holds a host's lease and tells of its VMs, but does nothing; it answers requests for lists."""
    info = HostInfo(name, "stand-in", "0", tuple(each.value for each in Operation), 0.0, len(vms))
    await (await bus.bucket(LEASES)).put(f"host.{token(name)}", json.dumps(to_json(info)).encode())
    states = await bus.bucket(STATES)
    for vm in vms:
        row = VmResult("unix:/x", vm.vm, None, None, None, 0.0).to_json(whole=True)
        await states.put(vm.key, json.dumps({**row, "answer": None}).encode())
    asked: list[dict[str, Any]] = []
    said = iter(answers or ())

    async def answer(request: Request) -> bytes:
        asked.append(json.loads(request.data))
        return next(said)

    endpoint = Endpoint(request_subjects(name, Operation.LIST), answer)
    async with bus.serve("stand-in", "0.0.0", "a test", {}, {"list": endpoint}):
        yield asked


@pytest.mark.usefixtures("hosts")
async def test_a_list_in_parts_is_read_to_its_end(server: NatsServer, bus: Bus) -> None:
    async with Fleet(server.url, where="host=rack2") as fleet:
        layout = (await fleet.refresh())[0].unwrap()
    vms = [VmKey("rack3", name) for name in ("a", "b", "c")]
    rows = [VmResult("unix:/x", vm.vm, layout, None, None, 0.0).to_json(whole=True) for vm in vms]
    parts = [
        json.dumps({"schema": "qmpvcpu/1", "code": 0, "host": "rack3", "vms": [row], "next": following}).encode()
        for row, following in zip(rows, ("a", "b", None), strict=True)
    ]
    async with stand_in(bus, "rack3", *vms, answers=parts) as asked, Fleet(server.url, where="host=rack3") as fleet:
        assert [each.unwrap() for each in await fleet.refresh()] == [layout] * 3
        assert [each["after"] for each in asked] == [None, "a", "b"]


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"{}",
        b'{"vms": {}, "next": null}',
        b'{"vms": [], "next": 7}',
        b'{"vms": [{"name": "web-1"}], "next": null}',
        b"[" * 100_000,
    ],
)
async def test_nonsense_from_an_agent_is_an_error_of_its_vms(server: NatsServer, bus: Bus, said: bytes) -> None:
    async with stand_in(bus, "rack1", WEB, answers=[said]), Fleet(server.url) as fleet:
        (only,) = await fleet.refresh()
        assert isinstance(only.error, HostFailedError)


async def test_not_all_wishes_are_written_at_once(
    server: NatsServer, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_WRITES_AT_ONCE", 2)
    now, seen = 0, list[int]()
    replace_ = WishBook.replace

    async def counted(book: WishBook, vm: VmKey, wish: Wish) -> int:
        nonlocal now
        now += 1
        seen.append(now)
        try:
            return await replace_(book, vm, wish)
        finally:
            now -= 1

    monkeypatch.setattr(WishBook, "replace", counted)
    vms = [VmKey("rack1", f"web-{number}") for number in range(8)]
    async with stand_in(bus, "rack1", *vms), Fleet(server.url) as fleet:
        results = fleet.set_map("0-1")
        await until(lambda: len(seen) == len(vms))
        await results.aclose()
    assert max(seen) == 2


async def test_a_list_that_does_not_end_is_given_up(server: NatsServer, bus: Bus) -> None:
    page = b'{"vms": [], "next": "a"}'
    async with stand_in(bus, "rack1", WEB, answers=[page] * 9) as asked, Fleet(server.url) as fleet:
        (only,) = await fleet.refresh()
        assert isinstance(only.error, RequestRefusedError)
        assert len(asked) == 2


async def test_an_error_in_place_of_a_list_is_that_of_each_vm(server: NatsServer, bus: Bus) -> None:
    said = json.dumps({"code": 2, "error": {"kind": "QmpVcpuError", "message": "not served", "outcome": "unchanged"}})
    async with stand_in(bus, "rack1", WEB, DB, answers=[said.encode()]), Fleet(server.url) as fleet:
        assert [str(each.error) for each in await fleet.refresh()] == ["not served"] * 2


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"{}", b'{"answer": 7}', b'{"answer": null, "vm": []}']
)
async def test_a_state_that_cannot_be_read_is_passed_over(
    server: NatsServer, bus: Bus, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with stand_in(bus, "rack1", WEB):
        await (await bus.bucket(STATES)).put(DB.key, content)
        async with Fleet(server.url) as fleet:
            assert fleet.addresses == ("rack1/web-1",)
    assert "rack1.db cannot be read" in caplog.text


async def test_a_wish_that_nobody_begins_is_taken_back_when_its_time_is_over(
    server: NatsServer, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "GRACE_S", 0.1)
    async with stand_in(bus, "rack1", WEB), Fleet(server.url, drop_after=0.2) as fleet:
        (only,) = await fleet.set_map("0-1")
        assert isinstance(only.error, WishError)
        assert only.error.phase is WishPhase.EXPIRED
        assert only.error.outcome is Outcome.UNCHANGED
        assert await (await bus.bucket(WISHES)).get(WEB.key) is None


async def test_an_answer_that_never_comes_is_told_as_unknown(
    server: NatsServer, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "GRACE_S", 0.5)
    async with stand_in(bus, "rack1", WEB), Fleet(server.url, drop_after=0.5) as fleet:
        results = fleet.set_map("0-1")
        wishes = await bus.bucket(WISHES)
        await until(lambda: _is_there(wishes.get(WEB.key)))
        entry = await wishes.get(WEB.key)
        assert entry is not None
        assert entry.value is not None
        claim = Claim(entry.revision, entry.created, "stand-in", 0)
        begun = replace(from_json(Wish, entry.value.decode()), claim=claim)
        await wishes.update(WEB.key, json.dumps(to_json(begun)).encode(), entry.revision)
        (only,) = await results
        assert isinstance(only.error, WishError)
        assert only.error.phase is WishPhase.RUNNING
        assert only.error.outcome is Outcome.UNKNOWN


@pytest.mark.parametrize("next_agent", [True, False])
async def test_a_wish_that_somebody_deletes_before_it_is_begun_is_over_at_once(
    server: NatsServer, bus: Bus, tmp_path: Path, *, next_agent: bool
) -> None:
    wishes, leases = await bus.bucket(WISHES), await bus.bucket(LEASES)
    async with contextlib.AsyncExitStack() as stack:
        fleet = Fleet(server.url, reply_timeout=20 if next_agent else 0.5)
        async with stand_in(bus, "rack1", WEB), fleet:
            results = fleet.set_map("0-1")
            await until(lambda: _is_there(wishes.get(WEB.key)))
            deleted = await wishes.delete(WEB.key)
            await leases.delete("host.rack1")
            if next_agent:
                await stack.enter_async_context(agent_of(server, "rack1", tmp_path))
            (only,) = await results
    assert isinstance(only.error, WishError)
    assert only.error.phase is WishPhase.WITHDRAWN
    assert only.error.outcome is Outcome.UNCHANGED
    assert f"somebody deleted it (revision {deleted})" in only.error.why
    assert only.code == 1


async def test_a_fleet_is_used_between_entering_and_closing_and_nowhere_else() -> None:
    async with served() as server:
        fleet = Fleet(server.url)
        with pytest.raises(RuntimeError, match="inside async with"):
            fleet.set_map("0-3")
        with pytest.raises(RuntimeError, match="inside async with"):
            fleet.events()
        with pytest.raises(RuntimeError, match="inside async with"):
            await fleet.rescan()
        async with fleet:
            with pytest.raises(RuntimeError, match="entered once"):
                await fleet.__aenter__()
            assert await fleet.rescan() == Rescan((), ())
        with pytest.raises(RuntimeError, match="entered once"):
            await fleet.__aenter__()
        for use in (fleet.rescan, fleet.refresh):
            with pytest.raises(RuntimeError, match="closed"):
                await use()
