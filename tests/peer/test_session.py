"""A session that came about: commands, events, loss, closing."""

import asyncio
import errno
import gc
import json
import logging
import time
import tracemalloc
from collections.abc import Mapping
from typing import Any

import pytest

from qmpvcpu.errors import CommandRejectedError, MalformedReplyError, MonitorLostError, MonitorTimeoutError, Outcome
from qmpvcpu.qmp.client import explain
from qmpvcpu.qmp.monitor import Monitor
from qmpvcpu.testing.peer import HANG, Failure, ScriptedPeer
from tests.waiting import until

from .conftest import Heard, Open


async def test_a_command_returns_what_qemu_returned(connect: Open) -> None:
    async with ScriptedPeer(answers={"query-status": {"running": True}, "qom-get": 7, "stop": {}}) as peer:
        monitor = await connect(peer.address)
        assert await monitor.execute("query-status") == {"running": True}
        assert await monitor.execute("stop", timeout=5) == {}
        arguments = {"path": "/machine", "property": "smp"}
        assert await monitor.execute("qom-get", arguments, timeout=5) == 7
        assert [(command.name, command.arguments) for command in peer.received] == [
            ("query-status", {}),
            ("stop", {}),
            ("qom-get", arguments),
        ]


async def test_commands_of_one_moment_go_out_in_one_piece_and_in_order(
    connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"query-{number}" for number in range(12)]
    async with ScriptedPeer(answers={name: {} for name in names}) as peer:
        monitor = await connect(peer.address)
        pieces: list[bytes] = []
        write = asyncio.StreamWriter.write

        def noted(self: asyncio.StreamWriter, data: bytes) -> None:
            if b"execute" in data:
                pieces.append(data)
            write(self, data)

        monkeypatch.setattr(asyncio.StreamWriter, "write", noted)
        await asyncio.gather(*map(monitor.execute, names))
        await monitor.execute(names[0])
        assert [command.name for command in peer.received] == [*names, names[0]]
    assert [piece.count(b'"execute"') for piece in pieces] == [12, 1]


@pytest.mark.parametrize("within", [None, 5])
async def test_a_rejection_carries_class_text_and_what_was_sent(within: float | None, connect: Open) -> None:
    async with ScriptedPeer(answers={"device_del": Failure("Device 'v7' not found", "DeviceNotFound")}) as peer:
        monitor = await connect(peer.address)
        with pytest.raises(CommandRejectedError) as caught:
            await monitor.execute("device_del", {"id": "v7"}, timeout=within)
    error = caught.value
    assert (error.error_class, error.desc) == ("DeviceNotFound", "Device 'v7' not found")
    assert error.sent["execute"] == "device_del"
    assert error.sent["arguments"] == {"id": "v7"}
    assert error.outcome is Outcome.UNCHANGED


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({}, "malformed reply to stop: QMP reply is missing a 'error' or 'return' member: {"),
        ({"error": {}}, 'malformed reply to stop: QMP error reply is malformed: {"error": {}'),
        ({"error": {"class": 5, "desc": "x"}}, "malformed reply to stop: QMP error reply is malformed"),
        ({"error": "x"}, "malformed reply to stop: QMP error reply is malformed"),
    ],
)
async def test_a_reply_that_is_none_is_quoted_and_the_session_goes_on(
    reply: Mapping[str, Any], message: str, connect: Open, heard: Heard
) -> None:
    async with ScriptedPeer(answers={"query-status": 1}) as peer:
        monitor = await connect(peer.address)
        asking = asyncio.create_task(monitor.execute("stop"))
        await (await peer.expect("stop")).answer(reply)
        with pytest.raises(MalformedReplyError) as caught:
            await asking
        assert str(caught.value).startswith(message)
        assert caught.value.command == "stop"
        assert await monitor.execute("query-status") == 1
    assert heard.lost == []


async def test_commands_that_are_never_answered_are_not_kept_for_ever(connect: Open) -> None:
    async with ScriptedPeer(answers={"stop": HANG}) as peer:
        monitor = await connect(peer.address)
        for _ in range(100):
            with pytest.raises(MonitorTimeoutError):
                await monitor.execute("stop", timeout=0)
        await until(lambda: len(monitor._running) == 64)


async def test_arguments_that_are_no_json_are_the_callers_error_and_nothing_is_sent(connect: Open) -> None:
    async with ScriptedPeer(answers={"stop": {}}) as peer:
        monitor = await connect(peer.address)
        with pytest.raises(TypeError, match="not JSON serializable"):
            await monitor.execute("qom-set", {"value": object()})
        assert await monitor.execute("stop") == {}
        assert peer.count("qom-set") == 0


async def test_a_command_without_reply_ends_at_its_deadline(connect: Open) -> None:
    async with ScriptedPeer(answers={"stop": HANG, "query-status": 1}) as peer:
        monitor = await connect(peer.address)
        began = time.monotonic()
        with pytest.raises(MonitorTimeoutError, match=r"QEMU did not reply to stop within 0\.05 s") as caught:
            await monitor.execute("stop", timeout=0.05)
        assert time.monotonic() - began > 0.04
        assert caught.value.command == "stop"
        assert caught.value.timeout == 0.05
        assert isinstance(caught.value, TimeoutError)
        assert await monitor.execute("query-status", timeout=5) == 1


async def test_a_late_reply_is_dropped_quietly(connect: Open, caplog: pytest.LogCaptureFixture) -> None:
    async with ScriptedPeer(answers={"query-status": 1}) as peer:
        monitor = await connect(peer.address)
        with pytest.raises(MonitorTimeoutError):
            await monitor.execute("stop", timeout=0.01)
        with pytest.raises(MonitorTimeoutError):
            await monitor.execute("cont", timeout=0.01)
        await (await peer.expect("stop")).reply({})
        await (await peer.expect("cont")).fail("too late")
        assert await monitor.execute("query-status") == 1
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_caller_that_is_cancelled_under_a_deadline_leaves_the_reply_someone(
    connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    async with ScriptedPeer(answers={"query-status": 1}) as peer:
        monitor = await connect(peer.address)
        asking = asyncio.create_task(monitor.execute("stop", timeout=5))
        command = await peer.expect("stop")
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await command.reply({})
        assert await monitor.execute("query-status") == 1
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_command_that_is_cancelled_from_below_cancels_its_caller(connect: Open) -> None:
    async with ScriptedPeer() as peer:
        monitor = await connect(peer.address)
        asking = asyncio.create_task(monitor.execute("stop", timeout=5))
        await peer.expect("stop")
        next(iter(monitor._running)).cancel()  # as asyncio.run() does at its end
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert monitor.lost is None


async def test_a_reply_that_comes_twice_or_to_nobody_disturbs_nobody(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer(answers={"query-status": 1}) as peer:
        monitor = await connect(peer.address)
        asking = asyncio.create_task(monitor.execute("stop"))
        command = await peer.expect("stop")
        await command.reply("first")
        await command.reply("second")
        await peer.send({"return": {}, "id": "nobody's"})
        assert await asking == "first"
        assert await monitor.execute("query-status") == 1
    assert heard.lost == []


async def test_replies_may_come_in_any_order(connect: Open) -> None:
    async with ScriptedPeer() as peer:
        monitor = await connect(peer.address)
        asking = [asyncio.create_task(monitor.execute("device_add", {"id": f"v{n}"}, timeout=5)) for n in range(8)]
        commands = [await peer.expect("device_add") for _ in asking]
        for command in reversed(commands):
            await command.reply(command.arguments["id"])
        assert await asyncio.gather(*asking) == [f"v{n}" for n in range(8)]


async def test_events_are_calls_in_wire_order_before_the_reply_behind_them(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer() as peer:
        monitor = await connect(peer.address)
        asking = asyncio.create_task(monitor.execute("device_del", {"id": "v3"}))
        command = await peer.expect("device_del")
        for number in range(3):
            await peer.event(f"E{number}", {"n": number})
        await peer.event("BARE")
        await command.reply({})
        await asking
        assert heard.names == ["E0", "E1", "E2", "BARE"]
        assert type(heard.events[0]) is dict
        assert heard.events[1]["data"] == {"n": 1}
        assert set(heard.events[3]) == {"event", "timestamp"}


async def test_events_are_not_kept() -> None:
    count = 0

    def listen(_: object) -> None:
        nonlocal count
        count += 1

    async with ScriptedPeer() as peer:
        monitor = await Monitor.open(peer.address, timeout=5, on_event=listen, on_lost=print)
        line = (
            b'{"event": "E", "data": {"x": "' + b"x" * 1000 + b'"}, "timestamp": {"seconds": 1, "microseconds": 1}}\n'
        )
        await peer.send(line * 100)
        await until(lambda: count == 100)
        gc.collect()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            await peer.send(line * 3000)
            await until(lambda: count == 3100)
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert grown < 1_000_000  # 3 MB and more, if they were
        await monitor.close()


@pytest.mark.parametrize("shape", [{"event": 5}, {"event": None, "data": []}, {"event": {"a": 1}}])
async def test_an_event_of_a_strange_shape_is_handed_on_as_it_is(
    shape: dict[str, Any], connect: Open, heard: Heard
) -> None:
    async with ScriptedPeer(answers={"stop": {}}) as peer:
        monitor = await connect(peer.address)
        await peer.send(shape)
        await monitor.execute("stop")
    assert heard.events == [shape]


async def test_what_a_listener_raises_is_logged_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail(news: object) -> None:
        raise RuntimeError(f"no {news}")

    async with ScriptedPeer(answers={"stop": {}}) as peer:
        monitor = await Monitor.open(peer.address, timeout=5, on_event=fail, on_lost=fail)
        await peer.event("SPAM")
        assert await monitor.execute("stop") == {}
        await peer.hang_up()
        await until(lambda: monitor.lost)
        await until(lambda: len(caplog.records) > 1)
        await monitor.close()
    mine = [record for record in caplog.records if record.name == "qmpvcpu.qmp"]
    assert ["SPAM" in mine[0].getMessage(), "end of file" in mine[1].getMessage()] == [True, True]
    assert all(record.exc_info for record in mine)


LOSSES = [
    (b"", "the peer hung up (end of file)"),
    (b'{"return": {', """the peer hung up in the middle of a message: b'{"return": {'"""),
    (b"spam\n", r"the peer sent a line that is not JSON: b'spam\n'"),
    (b"x" * 200 + b"\n", "the peer sent a line that is not JSON: b'" + "x" * 80 + "'..."),
    (b"\n", r"the peer sent a line that is not JSON: b'\n'"),
    (b'"\xff"\n', r"""the peer sent a line that is not UTF-8: b'"\xff"\n'"""),
    (b"[1, 2]\n", "the peer sent JSON that is not an object: [1, 2]"),
    (b'{"error": {"class": "GenericError", "desc": "x"}}\n', "the peer could not read a message of ours: {"),
    (b'{"return": {}, "id": []}\n', "the peer sent a message of the wrong shape: TypeError: unhashable type: 'list'"),
    (b"[" * 100_000 + b"\n", "the peer sent a message of the wrong shape: RecursionError"),
    (b"9" * 5000 + b"\n", "the peer sent a message of the wrong shape: ValueError: Exceeds the limit"),
    (b"x" * 20_000_000, "the peer sent a line of more than 10485760 bytes"),
]


@pytest.mark.parametrize(("said", "why"), LOSSES, ids=[why[:60] for _, why in LOSSES])
async def test_a_loss_is_noticed_idle_and_says_why(said: bytes, why: str, connect: Open, heard: Heard) -> None:
    async with ScriptedPeer() as peer:
        monitor = await connect(peer.address)
        sending = asyncio.create_task(send_and_hang_up(peer, said))
        await until(lambda: heard.lost)
        await sending
        assert heard.lost[0].why.startswith(why)
        assert heard.lost[0].hung_up is why.startswith("the peer hung up")
        assert heard.lost[0].last_sent is None
        assert monitor.lost is heard.lost[0]
        for timeout in (None, 5):
            with pytest.raises(MonitorLostError) as caught:
                await monitor.execute("stop", timeout=timeout)
            assert (caught.value.why, caught.value.hung_up) == (heard.lost[0].why, heard.lost[0].hung_up)
            assert caught.value.last_sent is None
        await monitor.close()
    assert len(heard.lost) == 1


async def send_and_hang_up(peer: ScriptedPeer, said: bytes) -> None:
    """Send, unless the other side has had enough before the end."""
    try:
        await peer.send(said)
    except ConnectionError:
        return
    await peer.hang_up()


@pytest.mark.parametrize("within", [None, 30])
async def test_a_loss_ends_all_commands_in_flight_at_once(within: float | None, connect: Open, heard: Heard) -> None:
    async with ScriptedPeer() as peer:
        monitor = await connect(peer.address)
        asking = [asyncio.create_task(monitor.execute(name, timeout=within)) for name in ("stop", "cont")]
        await peer.expect("stop")
        await (await peer.expect("cont")).cut({"some": "value"})
        errors = await asyncio.gather(*asking, return_exceptions=True)
        for error, name in zip(errors, ("stop", "cont"), strict=True):
            assert isinstance(error, MonitorLostError)
            assert str(error).startswith(
                f"the QMP connection is lost with {name} in flight: the peer hung up in the middle of a message"
            )
            assert error.outcome is Outcome.UNKNOWN
            assert error.last_sent == name
            assert error.hung_up
    assert len(heard.lost) == 1


async def test_a_reset_connection_is_told_from_one_that_was_hung_up(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer(tcp=True) as peer:
        await connect(peer.address)
        peer.reset()
        await until(lambda: heard.lost)
    assert heard.lost[0].why == "the peer reset the connection (ECONNRESET)"
    assert heard.lost[0].hung_up


def test_a_failure_of_the_network_is_told_in_the_kernels_words() -> None:
    assert explain(OSError(errno.EHOSTUNREACH, "No route to host")) == "No route to host"
    assert explain(OSError("just so")) == "just so"


async def test_a_reply_right_before_the_end_still_counts(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer() as peer:
        monitor = await connect(peer.address)
        asking = asyncio.create_task(monitor.execute("quit"))
        command = await peer.expect("quit")
        await peer.event("SHUTDOWN")
        await command.reply({})
        await peer.hang_up()
        assert await asking == {}
        await until(lambda: heard.lost)
    assert heard.names == ["SHUTDOWN"]


async def test_a_command_sent_at_the_moment_of_loss_learns_of_it(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer() as peer:
        monitor = await connect(peer.address)
        changed = asyncio.create_task(monitor._client.runstate_changed())
        await asyncio.sleep(0)
        await peer.hang_up()
        await changed
        assert monitor.lost is None  # nobody knows why yet
        with pytest.raises(MonitorLostError, match="hung up") as caught:
            await monitor.execute("stop")
        assert caught.value.last_sent is None
    assert len(heard.lost) == 1


async def test_closing_is_no_loss_and_ends_what_is_in_flight(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer() as peer:
        monitor = await connect(peer.address)
        asking = [asyncio.create_task(monitor.execute("stop", timeout=timeout)) for timeout in (None, 5)]
        await peer.wait_for("stop", n=2)
        await monitor.close()
        await peer.wait_left()
        for task in asking:
            with pytest.raises(MonitorLostError, match="with stop in flight: it was closed on this side"):
                await task
        with pytest.raises(MonitorLostError, match="the QMP connection is lost: it was closed on this side"):
            await monitor.execute("stop")
        await monitor.close()
    assert heard.lost == []


async def test_closing_after_or_during_a_loss_is_quiet(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer() as peer:
        monitor = await connect(peer.address)
        await peer.hang_up()
        await until(lambda: heard.lost)
        await monitor.close()
        assert len(heard.lost) == 1

        other = await connect(peer.address)
        await peer.wait_connected()
        changed = asyncio.create_task(other._client.runstate_changed())
        await asyncio.sleep(0)
        await peer.send(b"spam\n")
        await changed
        await other.close()
        assert len(heard.lost) == 1
        assert str(other.lost) == "the QMP connection is lost: it was closed on this side"


async def test_closing_waits_no_longer_than_its_grace_for_a_peer_that_reads_nothing(connect: Open) -> None:
    ready = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"QMP": {"version": {"qemu": {"major": 9, "minor": 1, "micro": 0}}, "capabilities": []}}\r\n')
        command = json.loads(await reader.read(1000))
        writer.write(json.dumps({"return": {}, "id": command["id"]}).encode() + b"\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined] # a socket's transport is a ReadTransport too
        await ready.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1024)
    async with server:
        monitor = await connect(("127.0.0.1", server.sockets[0].getsockname()[1]))
        asking = asyncio.create_task(monitor.execute("qom-set", {"value": "x" * 30_000_000}))
        await until(lambda: monitor._client._pending)
        began = time.monotonic()
        await monitor.close()
        assert time.monotonic() - began > 0.9
        with pytest.raises(MonitorLostError, match="with qom-set in flight"):
            await asking
        ready.set()


async def test_cancelling_a_close_does_not_undo_it(connect: Open) -> None:
    async with ScriptedPeer() as peer:
        monitor = await connect(peer.address)
        closing = asyncio.create_task(monitor.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await peer.wait_left()
        await monitor.close()


async def test_events_after_closing_reach_nobody(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer() as peer:
        monitor = await connect(peer.address)
        closing = asyncio.create_task(monitor.close())
        await peer.event("LATE")
        await closing
    assert heard.events == []


async def test_the_exchange_is_logged_as_data(connect: Open, caplog: pytest.LogCaptureFixture, heard: Heard) -> None:
    caplog.set_level(logging.DEBUG, logger="qmpvcpu.qmp")
    async with ScriptedPeer(answers={"stop": {}, "cont": Failure("no"), "qom-get": "x" * 5000}) as peer:
        monitor = await connect(peer.address)
        await monitor.execute("stop")
        with pytest.raises(CommandRejectedError):
            await monitor.execute("cont", {"a": 1}, timeout=5)
        await peer.event("RESUME")
        await until(lambda: heard.events)
        await monitor.execute("qom-get")
    records = [record for record in caplog.records if record.name == "qmpvcpu.qmp"]
    assert [(record.direction, next(iter(record.qmp))) for record in records] == [  # type: ignore[attr-defined] # extra fields
        ("sent", "execute"),
        ("received", "return"),
        ("sent", "execute"),
        ("received", "error"),
        ("event", "timestamp"),
        ("sent", "execute"),
        ("received", "return"),
    ]
    assert all(record.vm == peer.address for record in records)  # type: ignore[attr-defined] # extra field
    assert records[0].getMessage() == f'{peer.address} sent {{"execute": "stop"}}'
    assert records[2].getMessage() == f'{peer.address} sent {{"execute": "cont", "arguments": {{"a": 1}}}}'
    assert len(records[6].getMessage()) < 1200
    assert len(records[6].qmp["return"]) == 5000  # type: ignore[attr-defined] # extra field
    assert all("\n" not in record.getMessage() for record in records)
