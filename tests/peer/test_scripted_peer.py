"""The scripted peer itself, spoken to over plain streams."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.errors import CommandRejectedError
from qmpvcpu.testing.peer import GREETING, HANG, Command, Failure, ScriptedPeer

from .conftest import Open

CAPTURE = Path(__file__).parents[2] / "fixtures" / "captures" / "10.0.2-q35-sct-2x2x2-boot3.json"


class Line:
    """A client that reads lines and writes what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def read(self) -> Any:
        return json.loads(await asyncio.wait_for(self.reader.readline(), 5))

    async def ask(self, message: object) -> Any:
        self.writer.write(json.dumps(message).encode())
        return await self.read()


@asynccontextmanager
async def line(peer: ScriptedPeer) -> AsyncIterator[Line]:
    reader, writer = await asyncio.open_unix_connection(peer.path)
    try:
        yield Line(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


async def test_it_greets_and_answers_with_the_commands_id() -> None:
    async with ScriptedPeer(answers={"stop": {}, "cont": Failure("no", "Other")}) as peer, line(peer) as client:
        assert await client.read() == GREETING
        assert await client.ask({"execute": "qmp_capabilities"}) == {"return": {}}
        assert await client.ask({"execute": "stop", "id": [1]}) == {"return": {}, "id": [1]}
        assert await client.ask({"exec-oob": "cont", "id": 0}) == {"error": {"class": "Other", "desc": "no"}, "id": 0}
        assert [command.name for command in peer.received] == ["stop", "cont"]


async def test_it_reads_json_however_it_is_cut_and_joined() -> None:
    async with ScriptedPeer(answers={"echo": lambda command: command.arguments["x"]}) as peer, line(peer) as client:
        await client.read()
        data = '{"execute": "echo", "arguments": {"x": "h\u00e4"}}'.encode()
        for byte in data:
            client.writer.write(bytes([byte]))
            await client.writer.drain()
            await asyncio.sleep(0)
        assert await client.read() == {"return": "h\u00e4"}
        client.writer.write(data + b"\n  " + data)
        assert [await client.read(), await client.read()] == [{"return": "h\u00e4"}] * 2


async def test_answers_may_be_functions_that_send_events_first() -> None:
    async with ScriptedPeer() as peer, line(peer) as client:

        async def delete(command: Command) -> object:
            await peer.event("DEVICE_DELETED", {"device": command.arguments["id"]})
            return {}

        peer.answers["device_del"] = delete
        await client.read()
        event = await client.ask({"execute": "device_del", "arguments": {"id": "v1"}})
        assert (event["event"], event["data"]) == ("DEVICE_DELETED", {"device": "v1"})
        assert set(event["timestamp"]) == {"seconds", "microseconds"}
        assert await client.read() == {"return": {}}


async def test_what_an_answer_raises_is_raised_at_the_end() -> None:
    def fail(_: Command) -> object:
        raise LookupError("in the script")

    async def play() -> None:
        async with ScriptedPeer(answers={"stop": fail}) as peer, line(peer) as client:
            await client.read()
            client.writer.write(b'{"execute": "stop"}')
            assert await client.reader.read() == b""

    with pytest.raises(LookupError, match="in the script"):
        await play()


async def test_a_failing_test_is_not_hidden_by_a_failing_answer() -> None:
    async def play() -> None:
        async with ScriptedPeer(answers={"stop": lambda _: 1 / 0}) as peer, line(peer) as client:
            await client.read()
            client.writer.write(b'{"execute": "stop"}')
            await client.reader.read()
            raise KeyError

    with pytest.raises(KeyError):
        await play()


async def test_others_are_rejected_where_nobody_expects_them() -> None:
    async with ScriptedPeer(reject_others=True) as peer, line(peer) as client:
        await client.read()
        reply = await client.ask({"execute": "stop"})
        assert reply == {"error": {"class": "CommandNotFound", "desc": "The command stop has not been found"}}


async def test_expecting_another_command_than_came_fails() -> None:
    async with ScriptedPeer(answers={"cont": HANG}) as peer, line(peer) as client:
        await client.read()
        client.writer.write(b'{"execute": "cont"}{"execute": "stop", "id": 3}')
        with pytest.raises(AssertionError, match=r"cont was expected, stop was sent: \{'execute': 'stop', 'id': 3\}"):
            await peer.expect("cont")
        with pytest.raises(AssertionError, match=r"quit was not sent within 0\.01 s; received: \['cont', 'stop'\]"):
            await peer.expect("quit", within=0.01)
        with pytest.raises(AssertionError, match=r"stop was not sent 2 times within 0\.01 s"):
            await peer.wait_for("stop", n=2, within=0.01)
        assert (await peer.wait_for("stop")).message["id"] == 3


async def test_coming_and_leaving_can_be_waited_for() -> None:
    async with ScriptedPeer() as peer:
        with pytest.raises(AssertionError, match="no client came within"):
            await peer.wait_connected(within=0.01)
        with pytest.raises(ConnectionError, match="no client is being served"):
            await peer.event("STOP")
        await peer.hang_up()  # of nobody: nothing
        peer.reset()
        async with line(peer):
            await peer.wait_connected()
            with pytest.raises(AssertionError, match="the client did not leave within"):
                await peer.wait_left(within=0.01)
        await peer.wait_left()


async def test_a_second_client_is_not_greeted_before_the_first_has_left() -> None:
    async with ScriptedPeer() as peer, line(peer) as first:
        await first.read()
        async with line(peer) as second:
            waiting = asyncio.create_task(second.read())
            done, _ = await asyncio.wait({waiting}, timeout=0.05)
            assert not done
            first.writer.close()
            assert await waiting == GREETING


async def test_a_client_that_vanishes_while_it_is_spoken_to_is_no_fault() -> None:
    async with ScriptedPeer() as peer:
        async with line(peer) as client:
            await client.read()
        await peer.wait_left()
        async with ScriptedPeer(greeting=b"x" * 30_000_000) as other, line(other):
            await other.wait_connected()


async def test_a_recording_answers_as_the_recorded_qemu_did(connect: Open) -> None:
    steps = json.loads(CAPTURE.read_text())["steps"]
    slots = [step["return"] for step in steps if step["execute"] == "query-hotpluggable-cpus"]
    plugs = [step["arguments"] for step in steps if step["execute"] == "device_add"]
    async with ScriptedPeer.from_capture(CAPTURE, answers={"query-kvm": {"enabled": True}}) as peer:
        monitor = await connect(peer.address)
        assert monitor.version == (10, 0, 2)
        assert await monitor.execute("query-kvm") == {"enabled": True}
        for _ in range(2):
            assert await monitor.execute("query-hotpluggable-cpus") == slots[0]
        for plug in plugs:
            assert await monitor.execute("device_add", plug) == {}
        assert await monitor.execute("query-hotpluggable-cpus") == slots[1]
        assert await monitor.execute("query-status") == {"status": "prelaunch", "running": False}
        with pytest.raises(CommandRejectedError, match="unplug request for not supported device type"):
            await monitor.execute("device_del", {"id": plugs[0]["id"]})
        assert await monitor.execute("query-hotpluggable-cpus") == slots[2]
        with pytest.raises(
            CommandRejectedError, match=r"the recording has no device_del with \{'id': 'x'\} from here"
        ):
            await monitor.execute("device_del", {"id": "x"})
        with pytest.raises(
            CommandRejectedError, match=r"the recording has no query-status with \{'a': 1\} up to here"
        ):
            await monitor.execute("query-status", {"a": 1})
        with pytest.raises(CommandRejectedError, match="CommandNotFound"):
            await monitor.execute("stop")


async def test_a_recording_ends_with_its_last_step(connect: Open) -> None:
    steps = [{"execute": "query-a", "return": 1}, {"execute": "device_add", "arguments": {"id": "x"}, "return": {}}]
    async with ScriptedPeer.from_capture({"greeting": GREETING, "steps": steps}, tcp=True) as peer:
        monitor = await connect(peer.address)
        assert await monitor.execute("device_add", {"id": "x"}) == {}
        assert await monitor.execute("query-a") == 1
        with pytest.raises(CommandRejectedError):
            await monitor.execute("device_add", {"id": "x"})
