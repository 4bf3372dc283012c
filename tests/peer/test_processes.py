"""Peers that are processes: stopped, killed."""

import asyncio
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpvcpu.errors import MonitorConnectError, MonitorLostError, MonitorTimeoutError, Outcome
from qmpvcpu.host.processes import ProcessStat, read_stat, why_idle
from qmpvcpu.record.owner import instance_of
from qmpvcpu.testing.signals import send_signal
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


Server = tuple[subprocess.Popen[str], str]


async def test_a_stopped_peer_is_told_from_a_held_one(server: Server, connect: Open) -> None:
    process, path = server
    send_signal(process.pid, signal.SIGSTOP)
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


LAUNCHER = """
import os, socket, sys, time
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
child = os.fork()
if child == 0:
    open("/proc/self/comm", "w").write("qemu-system-x86")
    print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[tuple[int, int, str]]:
    """A launcher, its QEMU, and the socket that the one has opened for the other."""
    path = str(tmp_path / "qmp")
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, path], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        qemu = int(launcher.stdout.readline())
        try:
            yield launcher.pid, qemu, path
        finally:
            os.kill(qemu, signal.SIGKILL)
            launcher.kill()


async def test_a_stopped_qemu_is_named_where_its_launcher_opened_the_socket(
    launched: tuple[int, int, str], connect: Open
) -> None:
    launcher, qemu, path = launched
    send_signal(qemu, signal.SIGSTOP)
    with pytest.raises(MonitorConnectError) as caught:
        await connect(path, within=0.2)
    assert caught.value.hint.startswith(f"pid {qemu} (qemu-system-x86), started by pid {launcher} (python")
    assert caught.value.hint.endswith("is stopped (SIGSTOP); SIGCONT lets it go on")


FILES = {
    "/proc/7/stat": "7 (qemu) S 1 7 7 0 -1 4194304 {zeros}",
    "/proc/7/cgroup": "4:freezer:/a/b\n1:name=systemd:/a\n0::/a/b\n",
    "/sys/fs/cgroup/freezer/a/b/freezer.state": "THAWED\n",
    "/sys/fs/cgroup/a/b/cgroup.events": "populated 1\nfrozen 0\n",
}


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("", "", ""),
        ("/proc/7/cgroup", "", ""),
        ("/proc/7/cgroup", "nonsense\n", ""),
        ("/sys/fs/cgroup/freezer/a/b/freezer.state", "FROZEN\n", "is frozen, as a container that was paused"),
        ("/sys/fs/cgroup/freezer/a/b/freezer.state", "FREEZING\n", "is frozen"),
        ("/sys/fs/cgroup/freezer/a/b/freezer.state", "", ""),
        ("/sys/fs/cgroup/a/b/cgroup.events", "frozen 1\n", "is frozen"),
        ("/proc/7/stat", "", ""),
        ("/proc/7/stat", "7 (qemu) D 1 7 7 0 -1 4194304 {zeros}", "is blocked in the kernel"),
    ],
)
def test_a_frozen_process_is_told_from_one_that_runs(
    file: str, text: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: said.format(zeros="0 " * 15) for name, said in (FILES | {file: text}).items()}
    for module in ("processes", "cgroups"):
        monkeypatch.setattr(f"qmpvcpu.host.{module}.read_text", lambda path: files.get(path, ""))
    monkeypatch.setattr("qmpvcpu.host.cgroups.names_in", lambda _: ["cgroup.procs"])
    assert why_idle(7).startswith(why)
    assert bool(why_idle(7)) is bool(why)


@pytest.mark.parametrize(
    ("command", "outcome"), [("query-status", Outcome.UNCHANGED), ("device_del", Outcome.UNKNOWN)]
)
async def test_a_peer_that_is_stopped_meanwhile_is_named_by_the_command_that_has_no_reply(
    command: str, outcome: Outcome, server: Server, connect: Open
) -> None:
    process, path = server
    monitor = await connect(path)
    send_signal(process.pid, signal.SIGSTOP)
    with pytest.raises(MonitorTimeoutError, match=rf"within 0.1 s \(pid {process.pid} .* is stopped") as caught:
        await monitor.execute(command, timeout=0.1)
    assert caught.value.outcome is outcome


async def test_nothing_is_unknown_where_nothing_was_sent_that_changes_a_vm(server: Server, connect: Open) -> None:
    process, path = server
    monitor = await connect(path)
    asking = asyncio.create_task(monitor.execute("query-status"))
    await until(lambda: monitor._client._pending)
    process.kill()
    with pytest.raises(MonitorLostError) as reading:
        await asking
    with pytest.raises(MonitorLostError) as late:
        await monitor.execute("device_add")
    assert (reading.value.outcome, late.value.outcome) == (Outcome.UNCHANGED, Outcome.UNCHANGED)


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"caf\xc3", "caf\ufffd"), (b"a) R (b", "a) R (b"), (b"x\ny", "x\ny"), (b"\xff\xfe", "\ufffd\ufffd")],
)
def test_a_process_may_be_called_anything(name: bytes, shown: str) -> None:
    """The kernel cuts a name at 15 bytes, in the middle of a character too."""
    seen: queue.Queue[tuple[ProcessStat | None, object]] = queue.Queue()

    def look_at_itself() -> None:
        task = Path(f"/proc/self/task/{threading.get_native_id()}")
        (task / "comm").write_bytes(name)
        instance = instance_of(threading.get_native_id(), os.getpid())
        seen.put((read_stat(str(task)), None if instance is None else instance.start_ticks))

    threading.Thread(target=look_at_itself).start()
    stat, start_ticks = seen.get()
    assert stat is not None
    assert (stat.name, stat.state) == (shown, "R")
    assert start_ticks == stat.start_ticks


async def test_a_killed_peer_is_noticed_while_idle(server: Server, connect: Open, heard: Heard) -> None:
    process, path = server
    monitor = await connect(path)
    process.kill()
    await until(lambda: heard.lost)
    assert heard.lost[0].why == f"the peer hung up (end of file); its process, {process.pid}, has ended"
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
    why, _, gone = caught.value.why.partition("; ")
    assert why in {"the peer hung up (end of file)", "the peer reset the connection (ECONNRESET)"}
    assert gone == f"its process, {process.pid}, has ended"
    assert len(heard.lost) == 1
