"""A monitor on a QMPClient that is its owner's, and in use."""

import asyncio
import os

import pytest
from qemu.qmp import EventListener, QMPClient, Runstate
from qemu.qmp.message import DeserializationError

from qmpvcpu.errors import CommandRejectedError, MonitorConnectError, MonitorLostError, MonitorTimeoutError
from qmpvcpu.testing.peer import HANG, Failure, ScriptedPeer
from tests.waiting import until

from .conftest import Heard, Open

VERSION = {"qemu": {"major": 8, "minor": 2, "micro": 1}, "package": "given"}


async def connected(peer: ScriptedPeer, name: str | None = None) -> QMPClient:
    client = QMPClient(name)
    await client.connect(peer.path)
    return client


async def test_its_owner_notices_nothing(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer(answers={"query-status": 1, "stop": {}}) as peer:
        client = await connected(peer)
        listeners = list(client._listeners)
        with client.listener("RESUME") as own:
            monitor = await connect(client)
            assert monitor.address == "the given QMPClient"
            assert (monitor.version, monitor.package) == ((10, 0, 2), "scripted")
            assert monitor.peer_pid == os.getpid()
            assert list(await asyncio.gather(monitor.execute("stop"), client.execute("query-status"))) == [{}, 1]
            for name in ("STOP", "RESUME", "SHUTDOWN"):
                await peer.event(name)
            assert await monitor.execute("query-status", timeout=5) == 1
            assert heard.names == ["STOP", "RESUME", "SHUTDOWN"]
            assert (await own.get())["event"] == "RESUME"
            assert own.empty()
            await monitor.close()
        assert client.runstate is Runstate.RUNNING
        assert client._listeners == listeners
        assert [(await client.events.get())["event"] for _ in range(3)] == ["STOP", "RESUME", "SHUTDOWN"]
        assert client.events.event_filter is None
        await peer.event("LATER")
        assert await client.execute("query-status") == 1
        assert (await client.events.get())["event"] == "LATER"
        assert heard.names == ["STOP", "RESUME", "SHUTDOWN"]
        with pytest.raises(MonitorLostError, match="it was closed on this side"):
            await monitor.execute("query-status")
        await client.disconnect()
    assert heard.lost == []


async def test_two_monitors_share_one_client(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer(answers={"query-status": 1}) as peer:
        client = await connected(peer, "vm7")
        one, two = await connect(client), await connect(client)
        assert one.address == "the given QMPClient 'vm7'"
        await peer.event("STOP")
        assert await one.execute("query-status") == 1
        assert heard.names == ["STOP", "STOP"]
        await one.close()
        await peer.event("RESUME")
        assert await two.execute("query-status") == 1
        assert heard.names == ["STOP", "STOP", "RESUME"]
        await client.disconnect()
        await until(lambda: two.lost)
    assert len(heard.lost) == 1


async def test_a_client_that_is_not_connected_is_refused_untouched(connect: Open) -> None:
    client = QMPClient()
    with pytest.raises(MonitorConnectError) as caught:
        await connect(client)
    assert str(caught.value) == (
        "cannot speak QMP on the given QMPClient: it is not connected (runstate IDLE)"
        " (connect() it first; it was not touched)"
    )
    assert client._listeners == [client.events]
    assert client.runstate is Runstate.IDLE


async def test_commands_in_flight_run_on_when_the_monitor_closes(connect: Open) -> None:
    async with ScriptedPeer() as peer:
        client = await connected(peer)
        monitor = await connect(client)
        asking = [asyncio.create_task(monitor.execute("stop", timeout=timeout)) for timeout in (None, 5)]
        commands = [await peer.expect("stop") for _ in asking]
        await monitor.close()
        for command in commands:
            await command.reply({})
        assert await asyncio.gather(*asking) == [{}, {}]
        await client.disconnect()


async def test_errors_are_the_same_as_on_a_client_of_our_own(connect: Open) -> None:
    async with ScriptedPeer(answers={"stop": Failure("no"), "cont": HANG}) as peer:
        client = await connected(peer)
        monitor = await connect(client)
        with pytest.raises(CommandRejectedError, match="stop rejected by QEMU: GenericError: no"):
            await monitor.execute("stop")
        with pytest.raises(MonitorTimeoutError):
            await monitor.execute("cont", timeout=0.01)
        await client.disconnect()


async def test_a_listener_that_fails_does_not_break_its_owners_reader(
    connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    async with ScriptedPeer(answers={"query-status": 1}) as peer:
        client = await connected(peer)
        monitor = await connect(client)
        monitor._on_event = lambda event: event["no such key"]
        await peer.event("STOP")
        assert await client.execute("query-status") == 1
        assert (await client.events.get())["event"] == "STOP"
        await client.disconnect()
    assert "KeyError" in caplog.text


async def test_the_owners_disconnect_is_a_loss(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer() as peer:
        client = await connected(peer)
        monitor = await connect(client)
        asking = asyncio.create_task(monitor.execute("stop"))
        await peer.expect("stop")
        await client.disconnect()
        with pytest.raises(MonitorLostError, match="with stop in flight: the QMPClient was disconnected") as caught:
            await asking
        assert caught.value.last_sent == "stop"
        assert [error.why for error in heard.lost] == ["the QMPClient was disconnected (runstate DISCONNECTING)"]
        assert client._listeners == [client.events]
        await monitor.close()


async def test_an_owner_who_reconnects_starts_a_session_that_is_not_ours(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer(answers={"stop": {}}) as peer:
        client = await connected(peer)
        monitor = await connect(client)
        await client.disconnect()
        await client.connect(peer.path)
        await peer.event("STOP")
        await client.execute("stop")
        assert heard.events == []
        with pytest.raises(MonitorLostError):
            await monitor.execute("stop")
        assert len(heard.lost) == 1
        await client.disconnect()


@pytest.mark.parametrize(
    ("said", "why", "raised"),
    [
        (b"", "the peer hung up (end of file)", EOFError),
        (b"spam\n", r"the peer sent a line that is not JSON: b'spam\n'", DeserializationError),
    ],
)
async def test_a_loss_is_explained_and_left_to_its_owner(
    said: bytes, why: str, raised: type[Exception], connect: Open, heard: Heard
) -> None:
    async with ScriptedPeer() as peer:
        client = await connected(peer)
        monitor = await connect(client)
        asking = asyncio.create_task(monitor.execute("stop", timeout=5))
        await peer.expect("stop")
        await peer.send(said)
        await peer.hang_up()
        with pytest.raises(MonitorLostError) as caught:
            await asking
        assert caught.value.why == why
        assert [(error.why, error.hung_up) for error in heard.lost] == [(why, said == b"")]
        assert client.runstate is Runstate.DISCONNECTING
        with pytest.raises(raised):
            await client.disconnect()


async def test_a_client_whose_inside_is_another_is_served_all_the_same(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer(answers={"stop": {}}) as peer:
        client = await connected(peer)
        writer, client._writer = client._writer, None
        monitor = await connect(client)
        client._writer, client._reader_task = writer, None
        assert monitor.peer_pid is None
        assert await monitor.execute("stop") == {}
        await peer.hang_up()
        await until(lambda: heard.lost)
        assert heard.lost[0].why == "the QMPClient was disconnected (runstate DISCONNECTING)"
        with pytest.raises(EOFError):
            await client.disconnect()


async def ungreeted(peer: ScriptedPeer) -> QMPClient:
    """A client that was connected without reading a greeting."""
    client = QMPClient()
    client.await_greeting = client.negotiate = False
    await client.connect(peer.path)
    return client


async def test_a_client_without_greeting_is_asked_for_the_version(connect: Open) -> None:
    async with ScriptedPeer(greeting=None, answers={"query-version": VERSION}) as peer:
        client = await ungreeted(peer)
        monitor = await connect(client)
        assert (monitor.version, monitor.package) == ((8, 2, 1), "given")
        await client.disconnect()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (HANG, "no reply to query-version in 0.1 s"),
        (Failure("no"), "query-version failed: no"),
        ({"qemu": {}}, 'it names no QEMU version: {"qemu": {}}'),
        (5, "it names no QEMU version: 5"),
        ({"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": None}, None),
    ],
)
async def test_a_client_that_cannot_tell_its_version_is_refused(
    answer: object, message: str | None, connect: Open
) -> None:
    async with ScriptedPeer(greeting=None, answers={"query-version": answer}) as peer:
        client = await ungreeted(peer)
        if message is None:
            assert (await connect(client)).version == (1, 2, 3)
        else:
            with pytest.raises(MonitorConnectError) as caught:
                await connect(client, within=0.1)
            assert caught.value.why == message
            assert client._listeners == [client.events]
        assert client.runstate is Runstate.RUNNING
        await client.disconnect()


async def test_a_client_lost_while_it_is_asked_is_refused(connect: Open) -> None:
    async with ScriptedPeer(greeting=None) as peer:
        client = await ungreeted(peer)
        opening = asyncio.create_task(connect(client))
        await peer.expect("query-version")
        await peer.hang_up()
        with pytest.raises(MonitorConnectError, match="query-version failed: Disconnected"):
            await opening
        with pytest.raises(EOFError):
            await client.disconnect()


async def test_a_listener_of_its_own_class_beside_ours_hears_all(connect: Open) -> None:
    async with ScriptedPeer(answers={"stop": {}}) as peer:
        client = await connected(peer)
        before, after = EventListener(), EventListener()
        client.register_listener(before)
        monitor = await connect(client)
        client.register_listener(after)
        await peer.event("STOP")
        await monitor.execute("stop")
        await monitor.close()
        assert [len(listener.history) for listener in (before, after)] == [1, 1]
        await client.disconnect()
