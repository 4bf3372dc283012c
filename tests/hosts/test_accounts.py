"""The files of docs/nats: what each kind of member may do on a real server, and what it may not."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu import VcpuMap
from qmpvcpu.bus import Bus, Endpoint, Request, ServerAddress
from qmpvcpu.errors import HostSilentError, ServerConnectError, ServerForbiddenError
from qmpvcpu.fleet import Fleet
from qmpvcpu.model import hosts
from qmpvcpu.model.hosts import CAMPAIGNS, LEASES, STATES, WISHES, Operation, VmKey, request_subject
from qmpvcpu.model.wish import Wish
from tests.docs.blocks import block
from tests.hosts.accounts import (
    FILES,
    Permitted,
    accounts,
    by_imports_alone,
    certificates,
    in_one_account,
    permitted,
    program,
)
from tests.hosts.world import agent_of, answer, vm_in, wish
from tests.waiting import until

OLD_SERVER = Path(
    os.environ.get("QMPVCPU_CACHE", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "qmpvcpu"),
    "nats-server/usr/sbin/nats-server",
)
OLDER = pytest.param(
    OLD_SERVER, id="debian-12", marks=pytest.mark.skipif(not OLD_SERVER.exists(), reason="no older nats-server here")
)
SERVERS = pytest.mark.parametrize("binary", [pytest.param(None, id="newest"), OLDER])
EVENT = "qmpvcpu.event.web2.vm.Asked"
STREAMS = [*(f"KV_{bucket}" for bucket in (WISHES, STATES, LEASES, CAMPAIGNS)), hosts.EVENTS]


def key(bucket: str, name: str) -> str:
    return f"$KV.{bucket}.{name}"


MANAGE = [
    f"$JS.API.STREAM.{verb}.{stream}"
    for verb in ("CREATE", "UPDATE", "DELETE", "PURGE", "MSG.DELETE", "SNAPSHOT", "LEADER.STEPDOWN")
    for stream in (*STREAMS, "MINE")
]
ANOTHER_HOST = [key(WISHES, "web2.vm"), key(STATES, "web2.vm"), key(LEASES, "host.web2"), EVENT]
A_HOST = [key(STATES, "web1.vm"), key(LEASES, "host.web1"), "qmpvcpu.event.web1.vm.Asked"]
FORBIDDEN = {
    "web1": [
        *ANOTHER_HOST,
        *MANAGE,
        key(WISHES, "web1"),
        key(CAMPAIGNS, "c1"),
        key(LEASES, "campaign.c1"),
        "qmpvcpu.do.web2.set.web1",
        "qmpvcpu.do.web1.set.alice",
        f"$JS.API.CONSUMER.CREATE.KV_{STATES}",
        f"$JS.API.CONSUMER.CREATE.KV_{STATES}.mine.{key(STATES, 'web2.>')}",
        f"$JS.API.CONSUMER.CREATE.{hosts.EVENTS}.mine.qmpvcpu.event.>",
        f"$JS.API.DIRECT.GET.KV_{WISHES}.{key(WISHES, 'web2.vm')}",
        "_INBOX.host.web2.x",
        "_INBOX.who.alice.x",
    ],
    "alice": [
        *A_HOST,
        *ANOTHER_HOST[1:],
        *MANAGE,
        "qmpvcpu.do.web1.set.bob",
        "qmpvcpu.do.web1.list.grafana",
        "_INBOX.host.web1.x",
        "_INBOX.who.bob.x",
        "$SRV.PING",
    ],
    "grafana": [
        *A_HOST,
        *ANOTHER_HOST,
        *MANAGE,
        key(CAMPAIGNS, "c1"),
        key(LEASES, "campaign.c1"),
        "qmpvcpu.do.web1.list.alice",
        *(f"qmpvcpu.do.web1.{each.value}.grafana" for each in Operation if not each.only_reads),
        "_INBOX.who.alice.x",
    ],
}
NOT_TO_HEAR = {
    "web1": [
        "qmpvcpu.do.web2.set.*",
        "qmpvcpu.do.>",
        "_INBOX.>",
        "_INBOX.host.web2.>",
        "$KV.>",
        "qmpvcpu.event.>",
        ">",
    ],
    "alice": ["qmpvcpu.do.web1.set.*", "_INBOX.who.bob.>", "_INBOX.host.web1.>", "$KV.>", "$SRV.>", ">"],
    "grafana": ["qmpvcpu.do.>", "_INBOX.who.alice.>", "_INBOX.>", "$KV.>", ">"],
}


async def everything(world: Permitted) -> dict[str, Any]:
    """What the buckets and the stream have, as the admin sees it, after all that was sent before."""
    found: dict[str, Any] = {}
    async with world.bus("admin") as bus:
        for name in (WISHES, STATES, LEASES, CAMPAIGNS):
            bucket = await bus.bucket(name)
            await bucket.put("admin.last", b"")  # it is behind whatever was sent to this bucket
            entries = await bucket.all()
            found |= {f"{name} {each}": entry.value for each, entry in entries.items() if each != "admin.last"}
    async with world.raw("admin") as raw:
        streams = await asyncio.gather(*(raw.client.jetstream().stream_info(each) for each in STREAMS))
        found["events"] = streams[-1].state.messages
        found["streams"] = sorted(each.config.name for each in await raw.client.jetstream().streams_info())
    return found


EMPTY = {"events": 0, "streams": sorted(STREAMS)}


@SERVERS
async def test_a_host_an_operator_and_a_reader_can_do_what_they_need(tmp_path: Path, binary: Path | None) -> None:
    async def told(request: Request) -> bytes:
        return request.subject.encode()

    async with (
        permitted(tmp_path, binary=binary) as world,
        world.bus("web1") as host,
        world.bus("alice") as operator,
        world.bus("grafana") as reader,
    ):
        mine, wishes = await host.bucket(STATES), await operator.bucket(WISHES)
        async with (
            (await host.bucket(WISHES)).watch("web1.>") as wished,
            (await reader.bucket(STATES)).watch() as states,
            reader.follow("qmpvcpu.event.>") as events,
        ):
            assert [await anext(wished), await anext(states)] == [None, None]
            written = await wishes.create("web1.vm", b"wish")
            seen = await anext(wished)
            assert seen is not None
            assert (seen.value, seen.revision) == (b"wish", written)
            claimed = await (await host.bucket(WISHES)).update("web1.vm", b"claimed", written)
            await mine.put("web1.vm", b"state")
            assert (state := await anext(states)) is not None
            assert state.value == b"state"
            await host.publish("qmpvcpu.event.web1.vm.Answered", b"{}")
            assert (await anext(events)).subject == "qmpvcpu.event.web1.vm.Answered"
            await wishes.delete("web1.vm", claimed)
        await host.sync_clock()
        await (await host.bucket(LEASES)).create("host.web1", b"here")
        await (await operator.bucket(LEASES)).create("campaign.c1", b"alice")
        await (await operator.bucket(CAMPAIGNS)).create("c1", b"ledger")
        assert set(await (await operator.bucket(LEASES)).all()) == {"host.web1", "campaign.c1"}
        assert await (await reader.bucket(CAMPAIGNS)).get("c1") is not None
        requests = {each.value: Endpoint(hosts.request_subjects("web1", each), told) for each in Operation}
        async with host.serve("qmpvcpu", "1.0.0", "", {}, requests):
            for each in Operation:
                subject = request_subject("web1", each, "alice")
                assert await operator.request(subject, b"", 5) == subject.encode()
                if each.only_reads:
                    subject = request_subject("web1", each, "grafana")
                    assert await reader.request(subject, b"", 5) == subject.encode()
            async with world.raw("admin") as admin:  # as `nats micro ls` asks
                inbox = await admin.client.subscribe("_INBOX.admin.1")
                await admin.client.publish("$SRV.PING", b"", reply="_INBOX.admin.1")
                assert json.loads((await inbox.next_msg(timeout=5)).data)["name"] == "qmpvcpu"


@SERVERS
@pytest.mark.parametrize("name", FORBIDDEN)
async def test_what_is_not_needed_is_refused_with_an_error(tmp_path: Path, name: str, binary: Path | None) -> None:
    async with permitted(tmp_path, binary=binary) as world, world.raw(name) as raw:
        await raw.publish(FORBIDDEN[name])
        await raw.listen(NOT_TO_HEAR[name])
        await until(lambda: raw.refused(FORBIDDEN[name]) == FORBIDDEN[name])
        await until(lambda: raw.refused(NOT_TO_HEAR[name], "subscription") == NOT_TO_HEAR[name])
        assert await everything(world) == EMPTY


@SERVERS
@pytest.mark.parametrize("name", FORBIDDEN)
async def test_the_imports_alone_hold_too(tmp_path: Path, name: str, binary: Path | None) -> None:
    async with permitted(tmp_path, binary=binary, change=by_imports_alone) as world, world.raw(name) as raw:
        heard: list[str] = []

        async def hear(message: Any) -> None:
            heard.append(message.subject)

        await raw.client.subscribe(">", cb=hear)
        async with world.raw("web2") as other, world.raw("bob") as another:
            await raw.publish(FORBIDDEN[name])
            # What is meant for others, while this one listens to everything that there is.
            await other.client.publish(key(STATES, "web2.theirs"), b"")
            await another.client.publish(key(WISHES, "web2.theirs"), b"")
            await another.client.publish("qmpvcpu.do.web2.list.bob", b"")
            await asyncio.gather(other.client.flush(), another.client.flush())
        found = await everything(world)
        assert {found.pop(f"{WISHES} web2.theirs"), found.pop(f"{STATES} web2.theirs")} == {b""}
        assert found == EMPTY
        assert raw.errors == []  # nobody says no, and it comes to nothing
        own = [each for each in heard if each not in FORBIDDEN[name]]
        assert [each for each in own if not each.startswith("$SRV.")] == []


def attacks(name: str) -> list[tuple[str, bytes, str]]:
    """Questions that *name* may ask, and where it wants the answers."""
    own = {"web1": "web1.evil", "alice": "web1.evil"}.get(name)
    get = json.dumps({"last_by_subj": key(WISHES, "web1.evil")}).encode()
    asked = [
        (f"$JS.API.STREAM.INFO.KV_{WISHES}", b""),
        (f"$JS.API.STREAM.MSG.GET.KV_{WISHES}", get),
        *([(key(WISHES, own), b"evil")] if own else []),
        *([(f"$JS.API.DIRECT.GET.KV_{WISHES}.{key(WISHES, 'web1.evil')}", b"")] if name != "web1" else []),
    ]
    places = [key(STATES, "web2.vm"), key(LEASES, "host.web2"), EVENT, "qmpvcpu.do.web2.set.bob"]
    places += [key(WISHES, "web2.vm")] if name != "alice" else []
    return [(subject, content, place) for subject, content in asked for place in places]


@contextlib.asynccontextmanager
async def asking_elsewhere(world: Permitted, name: str) -> AsyncIterator[asyncio.Queue[str]]:
    """Have *name* ask for answers in others' places; what comes there in its own account is in the queue."""
    came: asyncio.Queue[str] = asyncio.Queue()

    async def hear(message: Any) -> None:
        came.put_nowait(message.subject)

    async with world.raw("bob") as bob:
        await bob.publish([key(WISHES, "web1.evil")])
    async with world.raw(name) as raw:
        for place in {place for _, _, place in attacks(name)}:
            await raw.client.subscribe(place, cb=hear)
        for subject, content, place in attacks(name):
            await raw.client.publish(subject, content, reply=place)
        await raw.client.flush()
        yield came


@SERVERS
@pytest.mark.parametrize("name", FORBIDDEN)
async def test_an_answer_does_not_go_where_its_asker_may_not_write(
    tmp_path: Path, name: str, binary: Path | None
) -> None:
    async with permitted(tmp_path, binary=binary, change=by_imports_alone) as world, world.raw("web2") as victim:
        taken = await victim.client.subscribe("qmpvcpu.do.web2.>")
        await victim.client.flush()
        async with asking_elsewhere(world, name) as came, asyncio.timeout(20):
            for _ in attacks(name):
                await came.get()
        found = await everything(world)
        assert {each for each in found if each not in EMPTY} == {f"{WISHES} web1.evil"}
        assert (found["events"], taken.pending_msgs) == (0, 0)


async def test_in_one_account_it_does(tmp_path: Path) -> None:
    """Why each has its own: with the same permissions, all in one account, a reader writes, and a host wishes."""
    async with permitted(tmp_path, change=in_one_account) as world, world.bus("admin") as admin:
        async with world.raw("grafana") as raw:
            await raw.publish([forbidden := key(STATES, "web2.vm")])
            await until(lambda: raw.refused([forbidden]) == [forbidden])
        states, wishes = await admin.bucket(STATES), await admin.bucket(WISHES)

        async with (
            states.watch("web2.vm") as forged,
            wishes.watch("web2.vm") as wished,
            asking_elsewhere(world, "grafana"),
        ):
            for each in (forged, wished):
                while (entry := await anext(each)) is None:
                    pass
                assert entry.value


async def test_a_consumer_does_not_deliver_where_its_maker_may_not_write(tmp_path: Path) -> None:
    async with permitted(tmp_path) as world, world.raw("alice") as alice, world.raw("web1") as web1:
        await alice.client.publish(key(WISHES, "web1.vm"), b"evil")
        wide = {"stream_name": f"KV_{WISHES}", "config": {"name": "w", "filter_subject": key(WISHES, ">")}}
        narrow = f"$JS.API.CONSUMER.CREATE.KV_{WISHES}.w.{key(WISHES, 'web1.>')}"
        told = json.loads((await web1.client.request(narrow, json.dumps(wide).encode())).data)
        assert "did not match filtered subject" in told["error"]["description"]
        for number, place in enumerate(
            [key(STATES, "web1.vm"), EVENT, "qmpvcpu.do.web2.set.bob", "_INBOX.who.bob.x"]
        ):
            config = {"name": f"c{number}", "deliver_subject": place, "ack_policy": "none", "deliver_policy": "all"}
            subject = f"$JS.API.CONSUMER.CREATE.KV_{WISHES}.c{number}"
            request = {"stream_name": f"KV_{WISHES}", "config": config}
            assert "error" not in json.loads((await alice.client.request(subject, json.dumps(request).encode())).data)
        found = await everything(world)
        assert {each for each in found if each not in EMPTY} == {f"{WISHES} web1.vm"}
        assert found["events"] == 0


async def test_who_may_write_one_key_cannot_empty_the_bucket(tmp_path: Path) -> None:
    async with permitted(tmp_path) as world, world.bus("web2") as victim, world.raw("web1") as raw:
        states = await victim.bucket(STATES)
        await states.put("web2.vm", b"kept")
        told = await raw.client.request(key(STATES, "web1.vm"), b"x", headers={"Nats-Rollup": "all"})
        assert "rollup not permitted" in json.loads(told.data)["error"]["description"]
        assert (await states.get("web2.vm")) is not None


async def test_the_refusal_names_the_subject(tmp_path: Path) -> None:
    async with permitted(tmp_path) as world, world.bus("alice") as alice, world.bus("web1") as web1:
        with pytest.raises(ServerForbiddenError, match=r"\$KV\.qmpvcpu_states\.web2\.vm") as raised:
            await (await web1.bucket(STATES)).put("web2.vm", b"")
        assert raised.value.subject == "$KV.qmpvcpu_states.web2.vm"
        with pytest.raises(ServerForbiddenError, match=r"qmpvcpu\.do\.web1\.set\.bob"):
            await alice.request(request_subject("web1", Operation.SET, "bob"), b"", 5)
        with pytest.raises(HostSilentError):  # may be asked, and has no agent now
            await alice.request(request_subject("web1", Operation.SET, "alice"), b"", 5)


async def test_nobody_else_is_let_in(tmp_path: Path) -> None:
    async with permitted(tmp_path) as world:
        known = world.address("alice")
        stranger = tmp_path / "stranger"
        program("nkey").main(str(stranger))
        with pytest.raises(ServerConnectError, match=r"(?i)authorization"):
            await Bus.connect(ServerAddress(known.urls, nkey=stranger, tls_ca=known.tls_ca), name="stranger")
        with pytest.raises(ServerConnectError, match=r"(?i)authorization"):
            await Bus.connect(ServerAddress(known.urls, tls_ca=known.tls_ca), name="nobody")
        with pytest.raises(ServerConnectError, match=r"(?i)certificate"):
            await Bus.connect(ServerAddress(known.urls, nkey=known.nkey), name="the system's CAs")
        reader, writer = await asyncio.open_connection("127.0.0.1", world.servers[0].port)
        assert json.loads((await reader.readline()).removeprefix(b"INFO "))["tls_required"]
        writer.write(b'CONNECT {"verbose": true}\r\nPING\r\n')
        async with asyncio.timeout(20):  # the server waits for a handshake
            said = await reader.read()
        assert b"PONG" not in said
        writer.close()


async def test_a_password_lets_in_too(tmp_path: Path) -> None:
    hashed = "$2b$04$/ZjBp2pKUuXlChZpBji/v.SCQf5iANoUS59eVwVMleLtknFxK6ocW"

    def with_password(conf: str) -> str:
        return conf.replace("# Made", f"# {hashed}\n# Made") if "WEB9" in conf else conf

    async with permitted(tmp_path, change=with_password) as world:
        world.keys["web9"] = hashed
        await world.add("host", "web9")
        (tmp_path / "login").write_text("web9:secret\n")
        (tmp_path / "wrong").write_text("web9:guess\n")
        known = world.address("alice")
        address = ServerAddress(known.urls, login=tmp_path / "login", tls_ca=known.tls_ca)
        async with await Bus.connect(address, name="web9", inbox=world.inbox("web9")) as bus:
            await (await bus.bucket(STATES)).put("web9.vm", b"")
        with pytest.raises(ServerConnectError, match=r"(?i)authorization"):
            await Bus.connect(ServerAddress(known.urls, login=tmp_path / "wrong", tls_ca=known.tls_ca), name="web9")


async def _works(host: Bus, name: str, operator: Bus) -> None:
    """*host* writes its state, and answers *operator*."""

    async def told(request: Request) -> bytes:
        return request.subject.encode()

    await (await host.bucket(STATES)).put(f"{name}.vm", b"state")
    subject = request_subject(name, Operation.LIST, "alice")
    async with host.serve("qmpvcpu", "1.0.0", "", {}, {"list": Endpoint(subject, told)}):

        async def answers() -> bool:
            try:
                return await operator.request(subject, b"", 1) == subject.encode()
            except HostSilentError:
                return False  # the operator's server has not heard of it yet

        await until(answers, within=20)


@pytest.mark.parametrize(
    ("conf", "binary"),
    [
        pytest.param("server.conf", None, id="one"),
        pytest.param("cluster.conf", None, id="three"),
        pytest.param("cluster.conf", *OLDER.values, id="three-debian-12", marks=OLDER.marks),
    ],
)
async def test_members_come_and_go_while_the_others_stay(tmp_path: Path, conf: str, binary: Path | None) -> None:
    lost: list[str] = []
    async with permitted(tmp_path, conf=conf, binary=binary) as world:
        last = len(world.servers) - 1
        async with (
            world.bus("web1", last, on_lost=lambda: lost.append("web1")) as web1,
            world.bus("alice", on_lost=lambda: lost.append("alice")) as alice,
            world.raw("bob") as bob,
        ):
            await _works(web1, "web1", alice)
            async with (await alice.bucket(STATES)).watch("web3.>") as states:
                assert await anext(states) is None
                world.members = tuple(each for each in world.members if each[1] != "bob")
                await world.add("host", "web3")
                async with world.bus("web3", last) as web3:
                    await _works(web3, "web3", alice)
                assert (entry := await anext(states)) is not None
                assert entry.key == "web3.vm"
            await _works(web1, "web1", alice)
            await until(lambda: bob.client.is_closed)
            assert lost == []


@pytest.mark.qemu
async def test_an_agent_carries_out_what_an_operator_wishes_and_tells_who_asked(tmp_path: Path) -> None:
    async with (
        permitted(tmp_path) as world,
        vm_in(tmp_path, "web"),
        world.bus("alice") as alice,
        world.bus("grafana") as reader,
        reader.follow("qmpvcpu.event.web1.>") as events,
        agent_of(world.bus("web1"), "web1", tmp_path),
    ):
        vm = VmKey("web1", "web")
        revision = await wish(alice, vm, Wish("1", VcpuMap.parse("0-2"), who="alice"))
        assert (await answer(reader, vm, revision, "ended"))["enabled"] == "0-2"
        told = json.loads(
            await alice.request(request_subject("web1", Operation.PLUG, "alice"), b'{"vm": "web", "ids": [3]}', 20)
        )
        assert told["code"] == 0
        audit = set()
        async for each in events:
            said = json.loads(each.data)
            if said["event"] in {"Asked", "Answered"}:
                audit.add((said["event"], said["operation"], said["who"]))
            if len(audit) == 4:
                break
        assert audit == {
            ("Asked", "wish", "alice"),
            ("Answered", "wish", "alice"),
            ("Asked", "plug", "alice"),
            ("Answered", "plug", "alice"),
        }


@pytest.mark.qemu
async def test_a_fleet_of_an_operator_changes_and_that_of_a_reader_looks(tmp_path: Path) -> None:
    async with permitted(tmp_path) as world, vm_in(tmp_path, "web"), agent_of(world.bus("web1"), "web1", tmp_path):

        def fleet(name: str) -> Fleet:
            return Fleet(world.address(name), who=name)

        async with fleet("alice") as operators:
            events = operators.events()
            await until(lambda: _has_vms(operators), within=20)
            (set_to_3,) = [each async for each in operators.set_count(3)]
            assert set_to_3.unwrap().layout.enabled == VcpuMap.parse("0-2")
            assert (await anext(events)).address == "web1/web"
        async with fleet("grafana") as readers:
            (read,) = [each async for each in readers.refresh()]
            assert read.unwrap().enabled == VcpuMap.parse("0-2")
            (refused,) = [each async for each in readers.set_count(1)]
            assert isinstance(refused.error, ServerForbiddenError)
            assert "qmpvcpu_wishes.web1.web" in str(refused.error)


async def _has_vms(fleet: Fleet) -> bool:
    await fleet.rescan()
    return bool(fleet.addresses)


def test_the_sample_is_what_the_program_makes() -> None:
    assert accounts(FILES / "members") == (FILES / "accounts.conf").read_text()


def test_the_program_knows_the_names_that_the_package_uses() -> None:
    made = program("accounts")
    assert set(made.STREAMS) == set(STREAMS)
    assert set(made.LOOKS) == {each.value for each in Operation if each.only_reads}
    for name in ("web1", "web1.example.org", "me@web-1.example"):
        member = made.Member.parse(f"host {name} {'U' * 56}")
        assert member.token == hosts.token(name)
        assert member.inbox == f"{hosts.host_inbox(name)}.>"
        assert made.Member.parse(f"reader {name} {'U' * 56}").inbox == f"{hosts.client_inbox(name)}.>"


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ("host web1", "members:1: 'host web1': a line is KIND NAME KEY"),
        (f"\nhost web1 {'U' * 56} more", "members:2: "),
        (f"boss web1 {'U' * 56}", "members:1: 'boss' is not a valid Kind"),
        (f"host web*1 {'U' * 56}", "members:1: 'web*1': a name has letters"),
        (f"host web1 {'S' * 56}", "members:1: web1: its key is neither"),
        ("host web1 UABC", "members:1: web1: its key is neither"),
        ("operator alice secret", "members:1: alice: its key is neither"),
        (f"reader alice {'U' * 56}\noperator alice {'U' * 56}", "members: alice: a name is there twice"),
    ],
)
def test_a_list_of_members_that_is_wrong_is_refused(tmp_path: Path, members: str, why: str) -> None:
    (tmp_path / "members").write_text(members)
    argv = [sys.executable, "-I", str(FILES / "accounts.py"), "members"]
    ran = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.startswith(why)


def test_a_seed_is_readable_by_its_owner_only_and_never_replaced(tmp_path: Path) -> None:
    nkey = program("nkey")
    public = nkey.main(str(tmp_path / "seed"))
    assert re.fullmatch(r"U[A-Z2-7]{55}", public)
    assert (tmp_path / "seed").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        nkey.main(str(tmp_path / "seed"))


def test_the_certificates_of_the_page_are_a_server_s_and_no_ca_s(tmp_path: Path) -> None:
    assert "server.pem" in block("docs/nats-server.md", "certificates").text
    certificates(tmp_path)
    for purpose in ("sslserver", "sslclient"):
        argv = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca.pem", "server.pem"]
        assert subprocess.run(argv, cwd=tmp_path, check=False, capture_output=True).returncode == 0
    said = subprocess.run(
        ["openssl", "x509", "-in", "server.pem", "-noout", "-text"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "CA:FALSE" in said


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    unit = (FILES / "qmpvcpu-agent.service").read_text()
    here = unit.replace("/opt/qmpvcpu/bin/qmpvcpu", "/bin/true").replace("=qemu", "=root")
    (tmp_path / "qmpvcpu-agent.service").write_text(here)
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "qmpvcpu-agent.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line for line in ran.stderr.splitlines() if "qmpvcpu" in line] == []
    assert ran.returncode == 0


async def test_the_unit_runs_an_agent_with_options_that_there_are() -> None:
    command = re.search(r"^ExecStart=\S+ (.*)$", (FILES / "qmpvcpu-agent.service").read_text(), re.MULTILINE)
    assert command is not None
    argv = [*command[1].replace("%d", "/nowhere").replace("%H", "web1").split(), "--allow", "nothing"]
    ran = await _run("qmpvcpu", *argv)
    assert "--allow nothing: the words are" in ran  # which is looked at once all others are known


async def _run(*argv: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec(
        *argv, env={**os.environ, "PATH": path}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    return said.decode()


async def test_the_steps_of_the_page_lead_to_a_fleet(tmp_path: Path) -> None:
    keys, made = block("docs/nats-server.md", "keys").text, block("docs/nats-server.md", "accounts").text
    init, people = block("docs/nats-server.md", "init").text, block("docs/nats-server.md", "people").text
    async with permitted(tmp_path, prepare=False) as world:
        for name in ("accounts.py", "nkey.py"):
            shutil.copy(FILES / name, tmp_path)
        (tmp_path / "server.conf").write_text(world.adapted[0])
        here = f"tls://127.0.0.1:{world.servers[0].port}"
        steps = {
            keys: f"{tmp_path}/new",
            made: "accounts.conf is valid" if False else "is valid",
            init: "is ready",
            people: "no host has an agent",
        }
        for step, wanted in steps.items():
            commands = step.replace("/etc/qmpvcpu/nkey", f"{tmp_path}/new").replace("tls://nats1:4222", here)
            said = await _run("bash", "-euc", f"cd {tmp_path}\n{commands}")
            assert (wanted in said) or (step is keys and re.fullmatch(r"U[A-Z2-7]{55}\n", said)), said
