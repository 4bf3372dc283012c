"""``watch`` of many VMs: of other hosts, and of this one."""

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from qmpvcpu import VcpuMap
from qmpvcpu.cli.watch_many import _LiveTable, _Watched, words
from qmpvcpu.events import VcpuPlugged
from qmpvcpu.fleet import Answered, Asked, MapState, VmEvent
from qmpvcpu.model.hosts import Operation
from qmpvcpu.model.wish import Wish, WishPhase
from qmpvcpu.testing import MicroGuest
from tests.cli.many import WEB, Hosts, hosts_in
from tests.cli.running import Running, environment, on_terminal, run, running
from tests.cli.schema import check
from tests.hosts.world import agent_of, answer, ask, connected, served, state, vm_in, wish

pytestmark = pytest.mark.qemu


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[Hosts]:
    async with hosts_in(tmp_path) as started:
        yield started


async def line_of(it: Running) -> str:
    """The next line."""
    assert it.process.stdout is not None
    line = await asyncio.wait_for(it.process.stdout.readline(), 20)
    assert line, "it has ended"
    return line.decode()


async def document_where(it: Running, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """All documents up to the first that is as wanted."""
    seen: list[dict[str, Any]] = []
    while not (seen and wanted(seen[-1])):
        seen.append(json.loads(await line_of(it)))
        check(seen[-1], "watch")
    return seen


async def test_programs_get_the_states_then_what_happens_anywhere_and_who_asked_for_it(hosts: Hosts) -> None:
    async with running("watch", "--nats", hosts.url, "--json") as it:
        states = [json.loads(await line_of(it)) for _ in range(2)]
        assert sorted((each["event"], each["host"], each["vm"], each["enabled"]) for each in states) == [
            (None, "rack1", "web", "0-1"),
            (None, "rack2", "db", "0-1"),
        ]
        revision = await wish(hosts.bus, WEB, Wish("w1", VcpuMap.parse("0-2"), who="alice", why="load"))
        await answer(hosts.bus, WEB, revision, "ended")
        await ask(hosts.bus, "rack2", Operation.PLUG, vm="db", ids=[3])
        seen = await document_where(it, lambda each: each["event"] == "Answered" and each["operation"] == "plug")
        it.process.send_signal(signal.SIGINT)
        ran = await it.end()
    assert (ran.code, ran.err) == (0, "")
    assert ran.documents[-1]["ended"] == "SIGINT"
    assert {each["address"]: each["enabled"] for each in ran.documents[-1]["vms"]} == {
        "rack1/web": "0-2",
        "rack2/db": "0-1,3",
    }
    plugged = {each["address"]: each for each in seen if each["event"] == "VcpuPlugged"}
    assert (plugged["rack1/web"]["ids"], plugged["rack1/web"]["enabled"]) == ("2", "0-2")
    assert (plugged["rack2/db"]["ids"], plugged["rack2/db"]["enabled"]) == ("3", "0-1,3")
    asked = {each["address"]: each for each in seen if each["event"] == "Asked"}
    assert (asked["rack1/web"]["who"], asked["rack1/web"]["why"]) == ("alice", "load")
    assert (asked["rack1/web"]["revision"], asked["rack1/web"]["wish"]["map"]) == (revision, "0-2")
    assert (asked["rack2/db"]["who"], asked["rack2/db"]["request"]["ids"]) == ("tester", [3])
    assert {(each["address"], each["phase"], each["code"]) for each in seen if each["event"] == "Answered"} == {
        ("rack1/web", "ended", 0),
        ("rack2/db", None, 0),
    }


async def test_people_read_a_line_an_event_that_begins_with_whose_it_is(hosts: Hosts) -> None:
    async with running("watch", "--nats", hosts.url) as it:
        begun = sorted([await line_of(it) for _ in range(2)])
        assert begun == ["rack1/web  2 of 8 vCPUs plugged: 0-1\n", "rack2/db  2 of 8 vCPUs plugged: 0-1\n"]
        await ask(hosts.bus, "rack2", Operation.PLUG, vm="db", ids=[3])
        lines: list[str] = []
        while not (lines and "exit code" in lines[-1]):
            lines.append(await line_of(it))
        it.process.send_signal(signal.SIGINT)
        assert (await it.end()).code == 0
    told = [line.split(maxsplit=2) for line in lines]
    assert {name for name, _, _ in told} == {"rack2/db"}
    assert {len(at) for _, at, _ in told} == {len("12:34:56.789")}
    assert [line for _, _, line in told if "plugged" in line] == ["vCPU 3 is plugged  0-1,3\n"]
    assert told[0][2].startswith("tester asks for plug: ids [3]")
    assert told[-1][2].startswith("plug of tester: exit code 0")


async def test_it_waits_until_all_chosen_vms_have_the_map(hosts: Hosts) -> None:
    until = ("--until", "0-2", "--nats", hosts.url, "--json")
    async with running("watch", *until) as it:
        await document_where(it, lambda each: each["event"] is None)
        await ask(hosts.bus, "rack1", Operation.PLUG, vm="web", ids=[2])
        one = await run("watch", "--where", "host=rack1", *until)
        assert (one.code, one.documents[-1]["ended"]) == (0, "reached")
        assert [each["address"] for each in one.documents[-1]["vms"]] == ["rack1/web"]
        await ask(hosts.bus, "rack2", Operation.PLUG, vm="db", ids=[2])
        ran = await it.end()
    assert (ran.code, ran.documents[-1]["ended"]) == (0, "reached")
    late = await run("watch", "--for", "0.2", "--until", "0", "--nats", hosts.url)
    assert late.code == 1
    assert "0 not reached within 0.2 s by rack1/web, rack2/db" in late.err
    never = await run("watch", "--until", "0-9", "--nats", hosts.url)
    assert never.code == 2
    assert "no vCPUs 8-9: rack" in never.err


async def test_vms_that_come_and_go_are_in_it(hosts: Hosts, tmp_path: Path) -> None:
    async with running("watch", "--nats", hosts.url, "--json") as it:
        states = [json.loads(await line_of(it)) for _ in range(2)]
        assert {each["vm"] for each in states} == {"web", "db"}
        async with vm_in(tmp_path / "rack1", "new"):
            (*_, came) = await document_where(it, lambda each: each["vm"] == "new" and each["event"] is None)
            assert (came["host"], came["enabled"], came["error"]) == ("rack1", "0", None)
        seen = await document_where(it, lambda each: each["event"] == "Gone")
        it.process.send_signal(signal.SIGTERM)
        ran = await it.end()
    assert [each["event"] for each in seen if each["vm"] == "new"] == ["Disconnected", "Gone"]
    assert [each["vm"] for each in ran.documents[-1]["vms"]] == ["web", "db"]


async def test_what_no_agent_has_told_is_seen_all_the_same(tmp_path: Path) -> None:
    async with (
        served() as server,
        connected(server) as bus,
        vm_in(tmp_path, "web") as web,
        contextlib.AsyncExitStack() as stack,
    ):
        async with agent_of(server, "rack1", tmp_path):
            await state(bus, WEB, lambda told: "vm" in told)
            watching = running("watch", "--until", "0,3", "--nats", server.url, "--json")
            it = await stack.enter_async_context(watching)
            await line_of(it)
        assert (await run("plug", "3", "--qmp", web.sockets[1])).code == 0  # while there is no agent
        async with agent_of(server, "rack1", tmp_path):
            ran = await it.end()
    assert (ran.code, ran.documents[-1]["ended"]) == (0, "reached")


async def test_a_host_without_an_agent_is_told_and_holds_no_other_up(tmp_path: Path) -> None:
    async with (
        hosts_in(tmp_path, away="rack2") as hosts,
        running("watch", "--nats", hosts.url, "--reply-timeout", "0.5") as it,
    ):
        first, second = sorted([await line_of(it), await line_of(it)])
        assert first == "rack1/web  2 of 8 vCPUs plugged: 0-1\n"
        assert second.startswith("rack2/db  ")
        assert "start the agent of that host" in second
        await ask(hosts.bus, "rack1", Operation.PLUG, vm="web", ids=[3])
        assert (await line_of(it)).startswith("rack1/web  ")
        it.process.send_signal(signal.SIGINT)
        assert (await it.end()).code == 0


async def test_an_agent_that_ends_is_told_and_so_is_one_that_comes_back(tmp_path: Path) -> None:
    async with (
        hosts_in(tmp_path, away="rack2") as hosts,
        running("watch", "--nats", hosts.url, "--json", "--reply-timeout", "0.5") as it,
    ):
        async with agent_of(hosts.nats, "rack2", tmp_path / "rack2"):
            (*_, back) = await document_where(it, lambda each: each["vm"] == "db" and each["error"] is None)
            assert (back["event"], back["enabled"]) == (None, "0-1")
        (*_, away) = await document_where(it, lambda each: each["vm"] == "db" and each["error"] is not None)
        assert (away["event"], away["error"]["kind"], away["enabled"]) == (None, "HostSilentError", "0-1")
        it.process.send_signal(signal.SIGINT)
        assert (await it.end()).code == 0


async def test_a_terminal_has_a_row_for_each_and_the_last_events(hosts: Hosts) -> None:
    async with on_terminal("watch", "--nats", hosts.url, columns=100) as it:
        await it.wait_on_screen("2 VMs")
        await it.wait_until(lambda: {"rack1/web", "rack2/db"} <= {line.split(" ")[0] for line in it.screen.lines})
        await ask(hosts.bus, "rack1", Operation.PLUG, vm="web", ids=[5])
        await it.wait_on_screen("rack1/web: plug of tester: exit code 0")
        it.process.send_signal(signal.SIGINT)
        assert await it.end() == 0
    (row,) = [line.split() for line in it.screen.lines if line.startswith("rack1/web ")]
    assert row[1:5] == ["3", "of", "8", "0-1,5"]
    assert "rack1/web: vCPU 5 is plugged" in str(it.screen)
    assert "Traceback" not in it.shown


async def test_the_vms_of_one_host_need_no_server(tmp_path: Path) -> None:
    async with vm_in(tmp_path, "a") as a, vm_in(tmp_path, "b") as b:
        words = ("watch", "--until", "0-1", "--json", "--dir", tmp_path, "--pattern", "*.qmp")
        async with running(*words) as it:
            states = [json.loads(await line_of(it)) for _ in range(2)]
            assert [(each["host"], each["enabled"]) for each in states] == [(None, "0")] * 2
            for guest in (a, b):
                assert (await run("set", "0-1", "--qmp", guest.sockets[1])).code == 0
            ran = await it.end()
        assert ran.code == 0
        assert {(each["vm"], each["ids"]) for each in ran.documents if each.get("event") == "VcpuPlugged"} == {
            ("a", "1"),
            ("b", "1"),
        }
        both = await run("watch", "--for", "0", "--qmp", a.qmp, "--qmp", b.qmp)
        assert both.code == 0


async def test_one_that_is_lost_ends_nothing(tmp_path: Path) -> None:
    async with (
        vm_in(tmp_path, "a") as a,
        vm_in(tmp_path, "b") as b,
        running("watch", "--json", "--dir", tmp_path, "--pattern", "*.qmp") as it,
    ):
        for _ in range(2):
            await line_of(it)
        a.process.kill()
        (*_, lost) = await document_where(it, lambda each: each["event"] == "Disconnected")
        assert lost["vm"] == "a"
        assert (await run("plug", "3", "--qmp", b.sockets[1])).code == 0
        (*_, plugged) = await document_where(it, lambda each: each["event"] == "VcpuPlugged")
        assert plugged["vm"] == "b"
        it.process.send_signal(signal.SIGINT)
        assert (await it.end()).code == 0


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("--qmp x --nats nats://127.0.0.1:1", "--qmp is about VMs of this host"),
        ("--record x --nats nats://127.0.0.1:1", "--record is about VMs of this host"),
        ("--name x --nats nats://127.0.0.1:1", "--name is about one VM"),
        ("--name x --dir .", "--name is about one VM"),
        ("--record x --qmp a --qmp b", "--record is about one VM"),
        ("--where name=x", "name the server"),
        ("--where frob --nats nats://127.0.0.1:1", "--where: "),
        ("--login x", "--login is for a server"),
    ],
)
@pytest.mark.parametrize("command", ["watch", "stats"])
async def test_options_that_do_not_go_together_are_refused(command: str, line: str, why: str) -> None:
    ran = await run(command, *line.split())
    assert ran.code == 2
    assert why in ran.err


async def test_what_is_shown_of_one_vm_only_is_refused_for_many(tmp_path: Path) -> None:
    for line in ("--host", "--agent x"):
        ran = await run("watch", *line.split(), "--dir", tmp_path)
        assert ran.code == 2
        assert f"{line.split()[0]} is about one VM" in ran.err


async def test_a_vm_in_the_environment_is_meant_before_a_server_there(guest: MicroGuest) -> None:
    env = environment(QMPVCPU_QMP=str(guest.qmp), QMPVCPU_NATS="nats://127.0.0.1:1")
    ran = await run("watch", "--for", "0", env=env)
    assert ran.code == 0
    assert "2 of 8 vCPUs plugged: 0-1" in ran.out


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (
            Asked(who="alice", operation="wish", why="load", revision=1, wish=Wish("1", VcpuMap.parse("0-1"))),
            "alice wishes 0-1: load",
        ),
        (Asked(who="", operation="wish", revision=1, wish=Wish("1", count=2)), "somebody wishes 2 vCPUs"),
        (
            Asked(who="bob", operation="plug", request={"vm": "web", "ids": [1], "options": {}}),
            "bob asks for plug: ids [1]",
        ),
        (
            Answered(operation="wish", revision=1, id="1", phase=WishPhase.REJECTED, code=2, why="may not"),
            "the wish 1: rejected, exit code 2: may not",
        ),
        (
            Answered(who="alice", operation="wish", revision=1, id="1", phase=WishPhase.ENDED),
            "the wish of alice: ended, exit code 0",
        ),
        (Answered(who="bob", operation="plug"), "plug of bob: exit code 0"),
        (VcpuPlugged(generation=1, ids=VcpuMap({3})), "vCPU 3 is plugged"),
    ],
)
def test_each_event_has_words(event: Any, told: str) -> None:
    assert words(event) == told


class OneScreen:
    """What a table needs of a terminal."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height

    def height_of(self, *blocks: object) -> int:
        return sum(max(len(str(block).splitlines()), 1) for block in blocks)


@pytest.mark.parametrize("height", [12, 20, 50])
def test_a_table_of_many_fits_the_terminal_and_has_those_of_which_most_is_told(height: int) -> None:
    table = _LiveTable()
    for number in range(100):
        state = MapState(8, VcpuMap.parse("0-3"), VcpuMap())
        vm = _Watched(f"rack1/web-{number:02}", "rack1", f"web-{number:02}", state, touched=float(number))
        table.show(vm)
    event = VcpuPlugged(generation=1, ids=VcpuMap({3}))
    vm.last = "12:34:56.789", words(event), VcpuPlugged
    for _ in range(30):
        table.tell(VmEvent(vm.address, vm.name, event, 1.8e9, None), vm)
    screen = OneScreen(80, height)
    shown = "\n".join(str(block) for block in table.picture(cast("Any", screen)))
    lines = shown.splitlines()
    assert len(lines) < height
    assert max(map(len, lines)) <= 80
    rows = [line.split()[0] for line in lines if line.startswith("rack1/web-")]
    assert rows == [f"rack1/web-{number:02}" for number in range(100 - len(rows), 100)]
    assert f"{100 - len(rows)} more, where less has happened" in shown
    assert lines[-1].endswith("rack1/web-99: vCPU 3 is plugged")
