"""Changes of many hosts from the command line: made, watched, steered, and gone on with."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qmpvcpu.bus import Bus
from qmpvcpu.hosts.campaignbook import CampaignBook
from qmpvcpu.model.hosts import CAMPAIGNS, LEASES, WISHES, VmKey
from qmpvcpu.testing import Behaviour, MicroGuest
from qmpvcpu.testing.nats import NatsServer
from tests.cli.running import run, running
from tests.hosts.world import agent_of, connected, served, state, vm_in

pytestmark = pytest.mark.qemu


@pytest.fixture
async def server() -> AsyncIterator[NatsServer]:
    async with served() as started:
        yield started


@pytest.fixture
async def bus(server: NatsServer) -> AsyncIterator[Bus]:
    async with connected(server) as connection:
        yield connection


@pytest.fixture
async def hosts(server: NatsServer, bus: Bus, tmp_path: Path) -> AsyncIterator[dict[str, MicroGuest]]:
    """Two hosts: rack1 with web-1, whose guest refuses removals, and rack2 with web-2."""
    for name in ("rack1", "rack2"):
        (tmp_path / name).mkdir()
    async with (
        vm_in(tmp_path / "rack1", "web-1", behaviour=Behaviour.refusing(0x82)) as refusing,
        vm_in(tmp_path / "rack2", "web-2") as obliging,
        agent_of(server, "rack1", tmp_path / "rack1"),
        agent_of(server, "rack2", tmp_path / "rack2"),
    ):
        await state(bus, VmKey("rack1", "web-1"), lambda now: "enabled" in now)
        await state(bus, VmKey("rack2", "web-2"), lambda now: "enabled" in now)
        yield {"rack1/web-1": refusing, "rack2/web-2": obliging}


def words(server: NatsServer, *given: str) -> tuple[str, ...]:
    return (*given, "--nats", server.url)


async def test_a_change_of_two_hosts_names_every_vm(server: NatsServer, hosts: dict[str, MicroGuest]) -> None:
    ran = await run(*words(server, "fleet", "set", "0-2", "--why", "load", "--json"))
    assert ran.code == 0
    document = ran.document
    assert {row["address"]: row["enabled"] for row in document["vms"]} == dict.fromkeys(hosts, "0-2")
    assert (document["campaign"]["status"], document["campaign"]["reached"]) == ("done", 2)
    assert document["campaign"]["spec"]["why"] == "load"
    ran = await run(*words(server, "fleet", "count", "1", "--on-failure", "revert", "--timeout", "5"))
    assert ran.code == 1
    assert "rack1/web-1: 0 not reached" in ran.err
    assert "1 of 2 reached, 1 failed" in ran.out
    assert [word for word in ("rack1/web-1", "rack2/web-2") if word not in ran.out] == []
    listed = await run(*words(server, "campaign", "list", "--json"))
    assert [(each["reached"], each["failed"]) for each in listed.document["campaigns"]] == [(2, 0), (1, 1)]
    shown = await run(*words(server, "campaign", "show", listed.document["campaigns"][1]["id"]))
    assert "rack1/web-1: failed" in shown.out
    assert "the guest said: device is busy" in " ".join(shown.out.split())
    assert "rack2/web-2: reached" in shown.out


@pytest.mark.usefixtures("hosts")
async def test_a_detached_campaign_is_paused_shown_resumed_and_over(server: NatsServer) -> None:
    made = await run(*words(server, "fleet", "set", "0-1", "--detach", "--json"))
    name = made.document["campaign"]["id"]
    paused = await run(*words(server, "campaign", "pause", name, "--json"))
    assert paused.document["campaign"]["status"] == "paused"
    shown = await run(*words(server, "campaign", "show", name, "--json"))
    assert sorted(shown.document["waiting"]) == ["rack1/web-1", "rack2/web-2"]
    assert shown.document["campaign"]["controller"] is None
    assert f"campaign resume {name}" in (await run(*words(server, "campaign", "show", name))).out
    assert "nobody" in (await run(*words(server, "campaign", "list"))).out
    resumed = await run(*words(server, "campaign", "resume", name, "--json"))
    assert (resumed.code, resumed.document["campaign"]["status"]) == (0, "done")
    for command in ("pause", "resume", "stop"):
        refused = await run(*words(server, "campaign", command, name, "--json"))
        assert refused.code == 2
        assert "done" in refused.error["message"]
    for command in ("show", "forget"):
        missing = await run(*words(server, "campaign", command, "none", "--json"))
        assert (missing.code, missing.error["kind"]) == (2, "CampaignError")


@pytest.mark.usefixtures("hosts")
async def test_a_campaign_that_is_over_is_forgotten_and_its_wishes_stay(server: NatsServer, bus: Bus) -> None:
    made = await run(*words(server, "fleet", "set", "0-1", "--detach", "--json"))
    name = made.document["campaign"]["id"]
    refused = await run(*words(server, "campaign", "forget", name, "--json"))
    assert refused.code == 2
    assert "it is running: stop it" in refused.error["message"]
    assert (await run(*words(server, "campaign", "resume", name))).code == 0
    forgotten = await run(*words(server, "campaign", "forget", name, "--json"))
    assert (forgotten.code, forgotten.document["campaign"]["status"]) == (0, "done")
    assert await (await bus.bucket(CAMPAIGNS)).keys() == []
    assert sorted(await (await bus.bucket(WISHES)).keys()) == ["rack1.web-1", "rack2.web-2"]
    assert "there are no campaigns" in (await run(*words(server, "campaign", "list"))).out


@pytest.mark.usefixtures("hosts")
async def test_a_stopped_campaign_tells_whom_it_has_left(server: NatsServer) -> None:
    made = await run(*words(server, "fleet", "set", "0-1", "--detach", "--json"))
    name = made.document["campaign"]["id"]
    stopped = await run(*words(server, "campaign", "stop", name))
    assert stopped.code == 0
    shown = await run(*words(server, "campaign", "show", name, "--follow"))
    assert "STOPPED" in shown.out
    assert "not begun: rack1/web-1, rack2/web-2" in shown.out


@pytest.mark.parametrize("command", ["run", "resume"])
async def test_a_campaign_whose_program_was_killed_is_gone_on_with(
    server: NatsServer, bus: Bus, hosts: dict[str, MicroGuest], command: str
) -> None:
    """At once: the lease of the one that was killed is not over yet."""
    await hosts["rack2/web-2"].set_behaviour(Behaviour.hanging())
    assert (await run(*words(server, "fleet", "set", "0-1"))).code == 0
    book = await CampaignBook.open(bus)
    async with running(*words(server, "fleet", "set", "0", "--timeout", "3", "--at-once", "1", "--json")) as killed:
        async with asyncio.timeout(20):
            while not (ledgers := await book.all())[1:] or not ledgers[1].in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        killed.process.kill()
    whose = [ledgers[1].id] if command == "resume" else []
    async with running(*words(server, "campaign", command, *whose, "--json")) as standby:
        shown = await run(*words(server, "campaign", "show", ledgers[1].id, "--follow", "--json"))
        if command == "run":
            standby.process.send_signal(signal.SIGTERM)
        assert (await standby.end()).code == (0 if command == "run" else 1)
    assert shown.document["campaign"]["epoch"] == 2
    assert {each["vm"]: each["code"] for each in shown.document["vms"]} == {"web-1": 1, "web-2": 1}


@pytest.mark.usefixtures("hosts")
async def test_options_that_do_not_go_together_are_refused(server: NatsServer, tmp_path: Path) -> None:
    for given, why in (
        (("fleet", "set", "0-1", "--at-once", "2", "--dir", str(tmp_path)), "--at-once is about a campaign"),
        (words(server, "fleet", "set", "0-1", "--concurrency", "2"), "--at-once"),
        (words(server, "fleet", "set", "0-1", "--dir", str(tmp_path)), "--dir is about VMs of this host"),
        (words(server, "fleet", "set", "0-1", "--where", "color=red"), "--where"),
        (words(server, "fleet", "set", "0-1", "--where", "name=nobody"), "chooses none"),
        (("fleet", "list", "--where", "name=*", "--dir", str(tmp_path)), "name the server"),
        (("fleet", "list", "--creds", "x", "--dir", str(tmp_path)), "--creds is for a server"),
        (words(server, "fleet", "set", ""), "empty"),
    ):
        ran = await run(*given)
        assert ran.code == 2
        assert why in ran.err


async def test_what_is_planned_for_all_is_shown_once_for_those_that_are_alike(
    server: NatsServer, hosts: dict[str, MicroGuest]
) -> None:
    ran = await run(*words(server, "fleet", "plan", "0-1"))
    assert ran.code == 0
    assert ran.out.count("plug   1") == 1
    assert "rack1/web-1, rack2/web-2:" in ran.out
    planned = await run(*words(server, "fleet", "plan", "--count", "2", "--json"))
    assert {row["address"]: row["target"] for row in planned.document["vms"]} == dict.fromkeys(hosts, "0-1")
    denied = await run(*words(server, "fleet", "plan", "0-99", "--json"))
    assert denied.code == 2


async def test_hosts_are_listed_with_what_they_do(server: NatsServer, hosts: dict[str, MicroGuest]) -> None:
    ran = await run(*words(server, "hosts", "list", "--json"))
    assert [(each["host"], each["vms"]) for each in ran.document["hosts"]] == [("rack1", 1), ("rack2", 1)]
    assert "rack2" in (await run(*words(server, "hosts", "list"))).out
    assert (await run(*words(server, "hosts", "init", "--json"))).code == 0
    assert len(hosts) == 2


@pytest.mark.usefixtures("hosts")
async def test_a_lease_that_cannot_be_read_hides_no_host(server: NatsServer) -> None:
    async with connected(server) as bus:
        leases = await bus.bucket(LEASES)
        told = json.loads((await leases.all("host.rack1"))["host.rack1"].value or b"")
        for key, value in (("host.a", b"\xff"), ("host.b", b"[" * 60_000), ("host.c.d", b"{}")):
            await leases.put(key, value)
        await leases.put("host.zz", json.dumps(told | {"since": 1e300}).encode())
        ran = await run(*words(server, "hosts", "list"))
    assert ran.code == 0
    assert [line.split()[0] for line in ran.out.splitlines()[1:]] == ["rack1", "rack2", "zz"]
    assert "the lease host.a cannot be read" in ran.err
    assert "Traceback" not in ran.err
