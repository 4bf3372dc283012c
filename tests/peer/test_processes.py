"""Peers that are processes: stopped, killed."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpvcpu.errors import MonitorConnectError, MonitorLostError
from tests.waiting import until

from .conftest import Heard, Open

SERVER = """
import contextlib, json, socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print("ready", flush=True)
while True:
    with contextlib.suppress(OSError), server.accept()[0] as client:
        client.send(b'{"QMP": {"version": {"qemu": {"major": 9, "minor": 1, "micro": 0}}, "capabilities": []}}\\r\\n')
        command = json.loads(client.recv(1000))
        client.send(json.dumps({"return": {}, "id": command["id"]}).encode() + b"\\r\\n")
        while client.recv(1000):
            pass
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    path = str(tmp_path / "qmp")
    with subprocess.Popen([sys.executable, "-c", SERVER, path], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process, path
        finally:
            process.kill()


def stop(process: subprocess.Popen[str]) -> None:
    """Stop a process, and return when it is."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


Server = tuple[subprocess.Popen[str], str]


async def test_a_stopped_peer_is_told_from_a_held_one(server: Server, connect: Open) -> None:
    process, path = server
    stop(process)
    with pytest.raises(MonitorConnectError) as caught:
        await connect(path, within=0.2)
    assert "another client holds this QMP socket, or QEMU is stopped" in caught.value.why
    assert caught.value.hint.startswith(f"pid {process.pid} (python")
    assert caught.value.hint.endswith("is stopped (SIGSTOP); SIGCONT lets it go on")
    process.send_signal(signal.SIGCONT)
    assert (await connect(path)).peer_pid == process.pid


async def test_a_held_socket_names_the_process_that_listens(server: Server, connect: Open) -> None:
    process, path = server
    await connect(path)
    with pytest.raises(MonitorConnectError) as caught:
        await connect(path, within=0.2)
    assert caught.value.hint.startswith(f"pid {process.pid} (python")
    assert "runs, so most likely another client holds the socket" in caught.value.hint


async def test_a_killed_peer_is_noticed_while_idle(server: Server, connect: Open, heard: Heard) -> None:
    process, path = server
    monitor = await connect(path)
    process.kill()
    await until(lambda: heard.lost)
    assert heard.lost[0].why == "the peer hung up (end of file)"
    assert monitor.peer_pid == process.pid


@pytest.mark.parametrize("within", [None, 30])
async def test_a_killed_peer_is_noticed_with_a_command_in_flight(
    within: float | None, server: Server, connect: Open, heard: Heard
) -> None:
    process, path = server
    monitor = await connect(path)
    asking = asyncio.create_task(monitor.execute("query-status", timeout=within))
    await until(lambda: monitor._client._pending)
    process.kill()
    with pytest.raises(MonitorLostError, match="with query-status in flight") as caught:
        await asking
    # The kernel says ECONNRESET where the peer had not read all of what we sent.
    assert caught.value.why in {"the peer hung up (end of file)", "the peer reset the connection (ECONNRESET)"}
    assert len(heard.lost) == 1
