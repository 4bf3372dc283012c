"""An agent with real QEMUs and a real server: wishes, requests, what it tells."""

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import VcpuMap
from qmpvcpu.bus import Bus, ServerAddress
from qmpvcpu.errors import HostFailedError, LeaseTakenError
from qmpvcpu.fleet import Fleet, Rescan
from qmpvcpu.hosts import AgentPolicy, HostAgent
from qmpvcpu.model.hosts import STATES, WISHES, Operation, VmKey
from qmpvcpu.model.options import OnFailure
from qmpvcpu.model.wish import Claim, Wish, WishOptions
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.cli.running import run, running
from tests.hosts.world import agent_of, answer, ask, connected, served, state, vm_in, wish
from tests.waiting import until

pytestmark = [pytest.mark.qemu]

WEB = VmKey("rack1", "web")


def there(now: dict[str, Any]) -> bool:
    return "enabled" in now


@contextlib.asynccontextmanager
async def web_on_rack1(tmp_path: Path, **options: Any) -> AsyncIterator[Bus]:
    """The VM web on the host rack1, with the host's agent, and a connection of the test's own."""
    async with (
        served() as server,
        vm_in(tmp_path, "web", **options),
        connected(server) as bus,
        agent_of(server, "rack1", tmp_path),
    ):
        yield bus


async def test_a_wish_is_carried_out_and_answered(tmp_path: Path) -> None:
    async with web_on_rack1(tmp_path) as bus:
        revision = await wish(bus, WEB, Wish("1", VcpuMap.parse("0-3"), who="me"))
        now = await answer(bus, WEB, revision, "ended")
        assert (now["enabled"], now["code"], now["host"], now["name"]) == ("0-3", 0, "rack1", "web")
        assert now["answer"] == {"revision": revision, "id": "1", "phase": "ended", "code": 0, "why": ""}
        assert now["target"] == "0-3"
        assert now["outcome"] == "reached"
        assert now["drift"] is False


async def test_a_wish_waits_for_its_agent_and_for_its_vm(tmp_path: Path) -> None:
    async with served() as server, connected(server) as bus:
        revision = await wish(bus, WEB, Wish("1", count=3))
        async with agent_of(server, "rack1", tmp_path):
            waiting = await answer(bus, WEB, revision, "waiting")
            assert "no VM of this name" in waiting["answer"]["why"]
            async with vm_in(tmp_path, "web"):
                assert (await answer(bus, WEB, revision, "ended"))["enabled"] == "0-2"


async def test_what_the_guest_refuses_is_the_answer(tmp_path: Path) -> None:
    async with web_on_rack1(tmp_path, behaviour=Behaviour.refusing(0x82)) as bus:
        await answer(bus, WEB, await wish(bus, WEB, Wish("1", VcpuMap.parse("0-2"))), "ended")
        options = WishOptions(on_failure=OnFailure.REVERT, timeout=5)
        now = await answer(bus, WEB, await wish(bus, WEB, Wish("2", VcpuMap.parse("0"), options=options)), "ended")
        assert (now["enabled"], now["code"], now["answer"]["code"]) == ("0-2", 1, 1)
        assert now["error"]["kind"] == "TransitionError"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b'{"id": "1", "map": "0-3", "later": 1}', '"later" is no key of it'),
        (b'{"id": "1", "map": "0-3", "schema": "qmpvcpu/2"}', "is not qmpvcpu/1, which this version reads"),
        (b'{"id": "1", "map": "0-3", "why": "' + b"x" * 70_000 + b'"}', "65,536 are read"),
    ],
)
async def test_a_wish_that_cannot_be_read_is_answered_once(tmp_path: Path, content: bytes, why: str) -> None:
    async with served() as server, vm_in(tmp_path, "web"), connected(server) as bus:
        revision = await wish(bus, WEB, content)
        for _ in range(2):  # the second agent has nothing to add
            async with agent_of(server, "rack1", tmp_path):
                await answer(bus, WEB, revision, "rejected")
                now = await state(bus, WEB, there)
                assert why in now["answer"]["why"]
                assert now["answer"]["code"] == 2
                assert now["enabled"] == "0"


async def test_nonsense_while_a_wish_is_carried_out_is_answered_too(tmp_path: Path) -> None:
    async with web_on_rack1(tmp_path, behaviour=Behaviour.hanging()) as bus:
        await answer(bus, WEB, await wish(bus, WEB, Wish("1", VcpuMap.parse("0-2"))), "ended")
        slow = await wish(bus, WEB, Wish("2", VcpuMap.parse("0"), options=WishOptions(timeout=60)))
        await answer(bus, WEB, slow, "running")
        now = await answer(bus, WEB, await wish(bus, WEB, b"[" * 60_000), "rejected")
        assert "nested too deeply" in now["answer"]["why"]
        # It is to keep a vCPU whose removal the guest may be at work on for ever.
        soon = WishOptions(timeout=1)
        await answer(bus, WEB, await wish(bus, WEB, Wish("3", VcpuMap.parse("0-3"), options=soon)), "ended")


async def test_a_claim_of_what_is_yet_to_come_is_no_answer_to_it(tmp_path: Path) -> None:
    async with web_on_rack1(tmp_path) as bus:
        forged = Wish("1", VcpuMap.parse("0-3"), claim=Claim(10**15, 0.0, "somebody", 0))
        now = await answer(bus, WEB, await wish(bus, WEB, forged), "rejected")
        assert "1000000000000000, which is yet to come" in now["answer"]["why"]
        assert (await state(bus, WEB, there))["enabled"] == "0"


@pytest.mark.parametrize("who", ["wh\u00f6", "=zz", "a*"])
async def test_who_asks_under_no_name_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture, who: str) -> None:
    async with web_on_rack1(tmp_path) as bus:
        await state(bus, WEB, there)
        told = json.loads(await bus.request(f"qmpvcpu.do.rack1.plug.{who}", b'{"vm": "web"}', 20))
        assert told["code"] == 2
        assert "not known who asks" in told["error"]["message"]
        assert told["enabled"] == "0"
    assert "Traceback" not in caplog.text


async def test_an_expired_wish_is_dropped(tmp_path: Path) -> None:
    async with served() as server, connected(server) as bus, agent_of(server, "rack1", tmp_path):
        revision = await wish(bus, WEB, Wish("1", VcpuMap.parse("0-3"), drop_after=0.3))
        now = await answer(bus, WEB, revision, "expired")
        assert "within 0.3 s" in now["answer"]["why"]
        bucket = await bus.bucket(WISHES)
        await until(lambda: _is_gone(bucket.get(WEB.key)))
        async with vm_in(tmp_path, "web"):
            now = await state(bus, WEB, there)
            assert now["enabled"] == "0"


@pytest.mark.parametrize("hours", [1, -1])
async def test_wishes_keep_their_time_after_the_servers_clock_was_set(tmp_path: Path, hours: int) -> None:
    async with served() as server, vm_in(tmp_path, "web"), connected(server) as bus:
        own = await Bus.connect(ServerAddress(server.url), name="agent")
        async with agent_of(own, "rack1", tmp_path):
            await state(bus, WEB, there)
            for name, drop_after, phase in (("web", 60.0, "ended"), ("ghost", 0.5, "expired")):
                assert own._clock._offset is not None
                own._clock._offset += hours * 3600  # for the agent the same as if the server's had been set
                vm, wished = VmKey("rack1", name), Wish("1", VcpuMap.parse("0-1"), drop_after=drop_after)
                await answer(bus, vm, await wish(bus, vm, wished), phase)


async def test_vms_that_are_gone_are_not_kept_in_mind_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpvcpu.hosts.agent._REMEMBERED_S", 0.5)
    async with (
        served() as server,
        vm_in(tmp_path, "web"),
        connected(server) as bus,
        agent_of(server, "rack1", tmp_path) as agent,
    ):
        await answer(bus, WEB, await wish(bus, WEB, Wish("1", VcpuMap.parse("0-1"))), "ended")
        tasks = len(asyncio.all_tasks())
        for number in range(20):
            await wish(bus, VmKey("rack1", f"ghost{number}"), Wish("1", VcpuMap.parse("0-1"), drop_after=0.3))
        wishes, states = await bus.bucket(WISHES), await bus.bucket(STATES)
        await until(lambda: _are(wishes.keys(), [WEB.key]))  # the others have expired
        await until(lambda: list(agent.vms) == ["web"])
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        await until(lambda: _are(states.keys(), [WEB.key]))
        await answer(bus, WEB, await wish(bus, WEB, Wish("2", VcpuMap.parse("0-2"))), "ended")


async def _are(reading: Any, wanted: list[str]) -> bool:
    return bool(await reading == wanted)


async def _is_gone(reading: Any) -> bool:
    return await reading is None


async def test_a_newer_wish_supersedes_the_one_that_runs(tmp_path: Path) -> None:
    async with web_on_rack1(tmp_path, behaviour=Behaviour.hanging()) as bus:
        await answer(bus, WEB, await wish(bus, WEB, Wish("1", VcpuMap.parse("0-2"))), "ended")
        slow = await wish(bus, WEB, Wish("2", VcpuMap.parse("0"), options=WishOptions(timeout=60)))
        await answer(bus, WEB, slow, "running")
        # What was asked for already is waited for.
        newer = Wish("3", VcpuMap.parse("0-3"), options=WishOptions(timeout=1))
        now = await answer(bus, WEB, await wish(bus, WEB, newer), "ended")
        assert now["answer"]["id"] == "3"
        assert 3 in VcpuMap.parse(now["enabled"])


async def test_a_wish_that_is_withdrawn_stops_at_the_next_safe_point(tmp_path: Path) -> None:
    async with web_on_rack1(tmp_path, behaviour=Behaviour.hanging()) as bus:
        await answer(bus, WEB, await wish(bus, WEB, Wish("1", VcpuMap.parse("0-2"))), "ended")
        slow = await wish(bus, WEB, Wish("2", VcpuMap.parse("0"), options=WishOptions(timeout=60)))
        await answer(bus, WEB, slow, "running")
        await (await bus.bucket(WISHES)).delete(WEB.key)
        now = await answer(bus, WEB, slow, "withdrawn")
        assert now["code"] == 130


async def test_a_wish_that_is_deleted_while_it_waits_is_answered_with_the_deletion(tmp_path: Path) -> None:
    async with served() as server, connected(server) as bus, agent_of(server, "rack1", tmp_path):
        waiting = await wish(bus, WEB, Wish("1", VcpuMap.parse("0-2")))
        await answer(bus, WEB, waiting, "waiting")
        deleted = await (await bus.bucket(WISHES)).delete(WEB.key)
        now = await answer(bus, WEB, waiting, "withdrawn")
        assert now["answer"]["code"] == 1
        assert now["answer"]["why"] == f"it was deleted (revision {deleted})"
        await state(bus, WEB, lambda now: now["deleted"] == deleted)


@pytest.mark.parametrize("how", ["the key", "the whole bucket"])
async def test_a_state_that_somebody_deletes_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("qmpvcpu.bus.feed._LONGEST_S", 1.0)  # after which a watch reads all keys again
    async with web_on_rack1(tmp_path) as bus:
        await state(bus, WEB, there)
        states = await bus.bucket(STATES)
        before = await states.get(WEB.key)
        assert before is not None
        if how == "the key":
            await states.delete(WEB.key)
        else:
            await bus._link.api(f"STREAM.PURGE.KV_{STATES}", {}, asked="empty it")
        await until(lambda: _is_later(states.get(WEB.key), before.revision))


async def _is_later(reading: Any, revision: int) -> bool:
    entry = await reading
    return entry is not None and entry.revision > revision


async def test_what_is_changed_by_hand_shows_as_drift(tmp_path: Path) -> None:
    async with (
        served() as server,
        vm_in(tmp_path, "web") as guest,
        connected(server) as bus,
    ):
        async with agent_of(server, "rack1", tmp_path):
            await answer(bus, WEB, await wish(bus, WEB, Wish("1", VcpuMap.parse("0-2"))), "ended")
            async with qmpvcpu.attach(guest.sockets[1]) as hand:
                await hand.plug(5)
            now = await state(bus, WEB, lambda now: now["drift"])
            assert (now["wanted"], now["enabled"]) == ("0-2", "0-2,5")
            async with Fleet(server.url) as fleet:
                assert fleet.drifted == {"rack1/web": {0, 1, 2}}
            ran = await run("fleet", "list", "--nats", server.url, "--json")
            assert ran.document["drift"] == {"rack1/web": "0-2"}
            told = await run("fleet", "list", "--nats", server.url)
            assert "rack1/web: drift: a wish for 0-2 was reached" in told.out
        async with agent_of(server, "rack1", tmp_path):  # the next one knows too
            await state(bus, WEB, lambda now: now["drift"])
            await wish(bus, WEB, Wish("2", VcpuMap.parse("0-2,5")))
            await state(bus, WEB, lambda now: now["drift"] is False)


async def test_requests_are_answered_with_documents(tmp_path: Path) -> None:
    async with web_on_rack1(tmp_path) as bus:
        await state(bus, WEB, there)
        listed = await ask(bus, "rack1", Operation.LIST)
        assert [(row["name"], row["enabled"]) for row in listed["vms"]] == [("web", "0")]
        planned = await ask(bus, "rack1", Operation.PLAN, vm="web", map="0-1")
        assert [step["action"] for step in planned["steps"]] == ["plug"]
        assert (await ask(bus, "rack1", Operation.SET, vm="web", map="0-2"))["enabled"] == "0-2"
        assert (await ask(bus, "rack1", Operation.COUNT, vm="web", count=2))["enabled"] == "0-1"
        assert (await ask(bus, "rack1", Operation.PLUG, vm="web", ids=[5, 6]))["enabled"] == "0-1,5-6"
        assert (await ask(bus, "rack1", Operation.UNPLUG, vm="web", ids=[5]))["enabled"] == "0-1,6"
        assert (await ask(bus, "rack1", Operation.CANCEL, vm="web"))["cancelled"] is False
        assert (await ask(bus, "rack1", Operation.RECOVER, vm="web"))["interrupted"] is False
        assert (await ask(bus, "rack1", Operation.STATISTICS, vm="web"))["vcpus"][0]["id"] == 0


@pytest.mark.parametrize(
    ("operation", "request_", "why"),
    [
        (Operation.SET, {"vm": "other", "map": "0"}, "no VM 'other' on rack1"),
        (Operation.SET, {"vm": "web", "map": "0", "dry": True}, '"dry" is no key of it'),
        (Operation.SET, {"map": "0"}, "'vm' is missing"),
        (Operation.UNPLUG, {"vm": "web"}, "'ids' is empty"),
        (Operation.PLUG, {"vm": "web", "ids": [99]}, "99"),
        (Operation.SET, {"vm": "web", "map": "0-99"}, "99"),
    ],
)
async def test_a_bad_request_is_answered(
    tmp_path: Path, operation: Operation, request_: dict[str, Any], why: str
) -> None:
    async with web_on_rack1(tmp_path) as bus:
        await state(bus, WEB, there)
        told = await ask(bus, "rack1", operation, **request_)
        assert told["code"] == 2
        assert why in told["error"]["message"]


async def test_what_is_too_long_for_the_server_hides_neither_the_vm_nor_the_answer(tmp_path: Path) -> None:
    big = VmKey("rack1", "big")
    async with (
        served(config="max_payload: 65536") as server,
        vm_in(tmp_path, "big", max_vcpus=240),
        vm_in(tmp_path, "web"),
        connected(server) as bus,
        agent_of(server, "rack1", tmp_path),
    ):
        await state(bus, WEB, there)
        now = await answer(bus, big, await wish(bus, big, Wish("1", VcpuMap.parse("0-1"))), "ended")
        assert now["answer"]["code"] == 0
        assert (now["error"]["kind"], "vm" in now) == ("TooLongError", False)
        assert "max_payload" in now["error"]["message"]
        rows = (await ask(bus, "rack1", Operation.LIST))["vms"]
        assert [(row["name"], row["code"]) for row in rows] == [("big", 2), ("web", 0)]


async def test_a_request_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    async with web_on_rack1(tmp_path) as bus:
        await state(bus, WEB, there)
        told = await ask(bus, "rack1", Operation.SET, vm="web", map="0," * 40_000)
        assert told["code"] == 2
        assert "65,536 are read" in told["error"]["message"]
        assert "enabled" not in told  # not even which VM


async def test_an_agent_does_only_what_it_was_started_for(tmp_path: Path) -> None:
    policy = AgentPolicy.read_only(("web*",))
    async with (
        served() as server,
        vm_in(tmp_path, "web"),
        vm_in(tmp_path, "secret"),
        connected(server) as bus,
        agent_of(server, "rack1", tmp_path, policy=policy),
    ):
        await state(bus, WEB, there)
        assert [row["name"] for row in (await ask(bus, "rack1", Operation.LIST))["vms"]] == ["web"]
        told = await ask(bus, "rack1", Operation.PLUG, vm="web")
        assert "does not plug" in told["error"]["message"]
        told = await ask(bus, "rack1", Operation.STATISTICS, vm="secret")
        assert "does not serve" in told["error"]["message"]
        now = await answer(bus, WEB, await wish(bus, WEB, Wish("1", VcpuMap.parse("0-3"))), "rejected")
        assert "does not set" in now["answer"]["why"]
        assert now["enabled"] == "0"


async def test_two_vms_of_one_name_are_both_left_alone(tmp_path: Path) -> None:
    async with (
        served() as server,
        vm_in(tmp_path, "web"),
        MicroGuest(extra_args=("-name", "web")) as twin,
    ):
        (tmp_path / "twin.qmp").symlink_to(twin.qmp)
        async with connected(server) as bus, agent_of(server, "rack1", tmp_path):
            now = await state(bus, WEB, lambda now: now["error"] and "share" in now["error"]["message"])
            assert now["error"]["kind"] == "NameTakenError"
            told = await ask(bus, "rack1", Operation.PLUG, vm="web")
            assert "twin.qmp" in told["error"]["message"]
            (tmp_path / "twin.qmp").unlink()
            twin.process.kill()
            await state(bus, WEB, there)


@pytest.mark.parametrize("host", ["", "rack1/web1"])
async def test_a_host_whose_vms_could_not_be_addressed_is_refused(host: str) -> None:
    async with served() as server, connected(server) as bus:
        with pytest.raises(ValueError, match="has no slash"):
            HostAgent(bus, host, ())


async def test_an_agent_whose_server_is_away_ends_when_it_is_told_to(tmp_path: Path) -> None:
    words = ("agent", "--host", "rack1", "--dir", tmp_path, "--record", tmp_path)
    async with (
        served() as server,
        vm_in(tmp_path, "web"),
        connected(server) as bus,
        running(*words, "--nats", server.url) as agent,
    ):
        await agent.wait_said("serving")
        await answer(bus, WEB, await wish(bus, WEB, Wish("1", VcpuMap.parse("0-1"))), "ended")
        await server.kill()
        await agent.wait_said("lease host.rack1 is lost")
        agent.process.send_signal(signal.SIGTERM)
        assert (await agent.end()).code == 0


async def test_the_log_says_once_which_sockets_lead_to_no_vm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dead = tmp_path / "dead.qmp"
    with socket.socket(socket.AF_UNIX) as unheard:
        unheard.bind(str(dead))
    async with served() as server, agent_of(server, "rack1", tmp_path, rescan=0.01) as agent:
        (fleet,) = agent._fleets
        rescan = fleet.rescan
        seen = asyncio.Semaphore(0)

        async def counted() -> Rescan:
            seen.release()
            return await rescan()

        fleet.rescan = counted  # type: ignore[method-assign]  # to know how often it has looked
        for _ in range(3):
            await seen.acquire()
    (said,) = [each.getMessage() for each in caplog.records if "dead" in each.getMessage()]
    assert said.startswith(f"rack1/dead at unix:{dead} cannot be served: ")
    assert said.endswith("nobody listens, the socket was left behind by a process that has ended")


async def test_a_second_agent_of_a_host_is_refused(tmp_path: Path) -> None:
    async with web_on_rack1(tmp_path) as bus:
        await state(bus, WEB, there)
        second = HostAgent(bus, "rack1", [])
        with pytest.raises(LeaseTakenError):
            await second.run()


async def test_what_happened_and_who_asked_is_in_the_stream(tmp_path: Path) -> None:
    async with (
        served() as server,
        vm_in(tmp_path, "web"),
        connected(server) as bus,
        bus.follow("qmpvcpu.event.>") as stream,
        agent_of(server, "rack1", tmp_path),
    ):
        await state(bus, WEB, there)
        revision = await wish(bus, WEB, Wish("1", VcpuMap.parse("0-1"), who="alice", why="load"))
        await answer(bus, WEB, revision, "ended")
        await ask(bus, "rack1", Operation.PLUG, vm="web", ids=[4])
        seen = []
        async with asyncio.timeout(20):
            async for each in stream:
                told = json.loads(each.data)
                assert each.subject == f"qmpvcpu.event.rack1.web.{told['event']}"
                seen.append(told)
                if told["event"] == "Answered" and told["operation"] == "plug":
                    break
    asked = [each for each in seen if each["event"] == "Asked"]
    assert [(each["who"], each["operation"]) for each in asked] == [("alice", "wish"), ("tester", "plug")]
    answered = [each for each in seen if each["event"] == "Answered"]
    assert [(each["who"], each["operation"], each["code"]) for each in answered] == [
        ("alice", "wish", 0),
        ("tester", "plug", 0),
    ]
    assert {str(each["ids"]) for each in seen if each["event"] == "VcpuPlugged"} == {"1", "4"}


async def test_a_request_that_is_no_json_puts_json_into_the_stream(tmp_path: Path) -> None:
    async with web_on_rack1(tmp_path) as bus, bus.follow("qmpvcpu.event.*.*.Asked") as stream:
        await state(bus, WEB, there)
        told = await ask(bus, "rack1", Operation.PLUG, vm="web", ids=[float("nan")])
        assert (told["code"], "NaN" in told["error"]["message"]) == (2, True)
        asked = b""
        async with asyncio.timeout(20):
            async for each in stream:
                asked = each.data
                break
    assert json.loads(asked)["request"] == {"vm": "web", "ids": ["NaN"]}


async def test_what_came_of_a_request_is_in_the_stream_if_its_agent_is_stopped_meanwhile(tmp_path: Path) -> None:
    async with (
        served() as server,
        vm_in(tmp_path, "web", behaviour=Behaviour.hanging()),
        connected(server) as bus,
        bus.follow("qmpvcpu.event.rack1.web.*") as stream,
        agent_of(server, "rack1", tmp_path) as agent,
    ):
        await state(bus, WEB, there)
        await ask(bus, "rack1", Operation.PLUG, vm="web", ids=[4])
        asking = asyncio.ensure_future(
            ask(bus, "rack1", Operation.UNPLUG, vm="web", ids=[4], options={"timeout": 60})
        )
        try:
            async with asyncio.timeout(60):
                async for each in stream:
                    told = json.loads(each.data)
                    if told["event"] == "UnplugRequested":
                        agent.stop()
                    if told["event"] == "Answered" and told["operation"] == "unplug":
                        break
        finally:
            await asyncio.wait({asking})
    assert (told["who"], told["code"], told["why"]) == ("tester", 3, "its agent was stopped meanwhile")
    assert isinstance(asking.exception(), HostFailedError)
