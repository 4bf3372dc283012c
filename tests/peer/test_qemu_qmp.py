"""What qemu.qmp itself does where the monitor relies on it, so that we notice a version that changes it."""

import asyncio
import logging

import pytest
from qemu.qmp import ConnectError, ExecInterruptedError, QMPClient, Runstate, StateError

from qmpvcpu.testing.peer import ScriptedPeer
from tests.waiting import until


async def connected(peer: ScriptedPeer) -> QMPClient:
    client = QMPClient()
    await client.connect(peer.path)
    return client


async def test_connecting_to_a_silent_peer_has_no_end_of_its_own() -> None:
    async with ScriptedPeer(greeting=None) as peer:
        client = QMPClient()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.connect(peer.path), 0.1)
        assert client.runstate is Runstate.IDLE


async def test_commands_are_sent_without_a_newline() -> None:
    sent = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
        sent.extend(await reader.read(1000))
        writer.write(b'{"return": {}}\r\n')
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        client = QMPClient()
        await client.connect(("127.0.0.1", server.sockets[0].getsockname()[1]))
        await client.disconnect()
    assert sent == b'{"execute":"qmp_capabilities","arguments":{}}'


async def test_a_cancelled_command_is_not_recalled_and_its_late_reply_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with ScriptedPeer(answers={"query-status": 1}) as peer:
        client = await connected(peer)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.execute("stop"), 0.05)
        await (await peer.expect("stop")).reply({})
        assert await client.execute("query-status") == 1
        await client.disconnect()
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "Unknown ID '__qmp#00000', message dropped."
    ]


async def test_a_listener_does_not_wake_when_the_peer_dies_and_the_cause_comes_out_of_disconnect() -> None:
    async with ScriptedPeer() as peer:
        client = await connected(peer)
        waiting = asyncio.create_task(client.events.get())
        asking = asyncio.create_task(client.execute("stop"))
        await peer.expect("stop")
        await peer.hang_up()
        with pytest.raises(ExecInterruptedError, match="Disconnected"):
            await asking
        assert client.runstate is Runstate.DISCONNECTING
        with pytest.raises(StateError):
            await client.execute("stop")
        with pytest.raises(EOFError):
            await client.disconnect()
        assert repr(client) == "<QMPClient runstate=IDLE>"
        assert not waiting.done()
        waiting.cancel()


async def test_the_runstate_pulse_is_missed_by_who_comes_late() -> None:
    async with ScriptedPeer() as peer:
        client = await connected(peer)
        await peer.hang_up()
        await until(lambda: client.runstate is Runstate.DISCONNECTING)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.runstate_changed(), 0.05)
        with pytest.raises(EOFError):
            await client.disconnect()


async def test_the_default_listener_keeps_every_event() -> None:
    async with ScriptedPeer(answers={"stop": {}}) as peer:
        client = await connected(peer)
        for _ in range(5):
            await peer.event("STOP")
            await client.events.get()
        await client.execute("stop")
        assert len(client.events.history) == 5
        await client.disconnect()


async def test_a_refused_negotiation_has_no_text() -> None:
    async with ScriptedPeer() as peer:
        del peer.answers["qmp_capabilities"]
        client = QMPClient()
        connecting = asyncio.create_task(client.connect(peer.path))
        await (await peer.expect("qmp_capabilities")).fail("the reason")
        with pytest.raises(ConnectError) as caught:
            await connecting
        assert "the reason" not in str(caught.value)


async def test_what_the_monitor_peeks_at_is_where_it_was() -> None:
    async with ScriptedPeer() as peer:
        client = await connected(peer)
        assert isinstance(client._reader_task, asyncio.Task)
        assert isinstance(client._writer, asyncio.StreamWriter)
        await client.disconnect()
