"""Which process is QEMU: where it opened its socket itself, or was handed it, in a container, over TCP; and fakes."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from qmpvcpu.host import finding
from qmpvcpu.host.finding import Found, find_qemu
from qmpvcpu.host.sockets import has_open, openers, peer_inode, unix_accepted, unix_peer
from qmpvcpu.qmp.address import peer_pid
from qmpvcpu.qmp.monitor import Monitor
from qmpvcpu.testing import QemuProcess, best_qemu

from .conftest import NOBODY, ONLY_ROOT, Sleeper, run

# Accepts one connection on the socket that is its input, and tells its process id and the numbers of two threads.
SERVER = """
import os, socket, threading, time
with socket.socket(fileno=0) as server:
    threads = [threading.Thread(target=threading.Event().wait, daemon=True) for _ in range(2)]
    for each in threads:
        each.start()
    print(os.getpid(), *(each.native_id for each in threads), flush=True)
    client, _ = server.accept()
    client.recv(1)
"""


class Server(NamedTuple):
    """A QEMU, as far as the kernel can tell.

    Attributes:
        pid: Its process id here.
        tids: Its threads by its own numbers.
        client: A connection to it.
    """

    pid: int
    tids: list[int]
    client: socket.socket


Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers to which this process hands a socket that it listens on itself."""
    with ExitStack() as stack:

        def start(*before: str, family: int = socket.AF_UNIX, address: str = "") -> Server:
            listening = stack.enter_context(socket.socket(family))
            listening.bind(str(tmp_path / "qmp") if family == socket.AF_UNIX else (address, 0))
            listening.listen()
            command = [*before, sys.executable, "-c", SERVER]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=listening.fileno(), stdout=subprocess.PIPE, text=True, cwd="/")
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            _, *tids = map(int, process.stdout.readline().split())
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            client = stack.enter_context(socket.socket(family))
            client.connect(listening.getsockname())
            while (inode := peer_inode(client)) == 0 or not openers([inode or 0]):
                pass  # it accepts it only then
            return Server(int(children[0]) if children else process.pid, tids, client)

        yield start


def found_by(server: Server) -> Found:
    return find_qemu(peer_pid(server.client), server.tids, connection=peer_inode(server.client))


def test_a_process_that_opened_its_own_socket_is_found_by_its_threads(sleeper: Sleeper) -> None:
    assert find_qemu(os.getpid(), [sleeper.tid]) == Found(os.getpid())
    assert find_qemu(os.getpid(), [sleeper.tid, sleeper.tid]) == Found(os.getpid())


def test_a_process_that_was_handed_its_socket_is_found(serve: Serve) -> None:
    server = serve()
    assert peer_pid(server.client) == os.getpid()
    assert found_by(server) == Found(server.pid)


def test_a_process_in_a_container_is_found_by_the_numbers_that_it_has_there(serve: Serve) -> None:
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    server = serve("unshare", *user, "--pid", "--fork", "--kill-child")
    assert max(server.tids) < 100
    assert found_by(server) == Found(server.pid)


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_process_on_this_host_is_found_over_tcp(family: int, address: str, serve: Serve) -> None:
    server = serve(family=family, address=address)
    assert peer_pid(server.client) is None
    assert found_by(server) == Found(server.pid)


def test_without_a_proof_nobody_is_taken_for_qemu(serve: Serve) -> None:
    server = serve()
    assert find_qemu(None, server.tids).pid is None
    why = find_qemu(None, server.tids).why
    assert why.startswith(f"pid {server.pid} (python")
    assert "has such threads, but nothing proves that it is this QEMU: connect over a UNIX socket" in why
    assert find_qemu(None, [2**22 + 1]).why.startswith("it is not known which process is QEMU: connect over a UNIX")
    assert find_qemu(os.getpid(), []).why == "QEMU has not named any vCPU thread yet"


def test_a_process_that_passes_the_connection_on_is_not_qemu(serve: Serve, sleeper: Sleeper) -> None:
    """As socat does, with what another host says; a process here has the same threads by chance."""
    server = serve()
    found = find_qemu(os.getpid(), [sleeper.tid + 1000000], connection=peer_inode(server.client))
    assert found.pid is None
    assert found.why.startswith(f"pid {server.pid} (python")
    assert f"no thread {sleeper.tid + 1000000}: it is not QEMU itself; connect to QEMU's own socket" in found.why
    other = serve(family=socket.AF_INET, address="127.0.0.1")
    assert find_qemu(None, server.tids, connection=peer_inode(other.client)).pid is None


def test_a_main_thread_runs_no_vcpu(sleeper: Sleeper) -> None:
    found = find_qemu(os.getpid(), [sleeper.tid, os.getpid()])
    assert found.pid is None
    assert f"pid {os.getpid()}" in found.why


def test_two_processes_that_could_both_be_qemu_are_both_named(
    sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "_has_all", lambda pid, _: pid != os.getpid())
    monkeypatch.setattr(finding, "openers", lambda _: [1, os.getppid()])
    found = find_qemu(os.getpid(), [sleeper.tid], connection=7)
    assert found.pid is None
    assert found.why.startswith("pid 1 (")
    assert f", pid {os.getppid()} (" in found.why


def test_a_socket_that_its_opener_has_left_behind(serve: Serve) -> None:
    server = serve()
    why = find_qemu(2**22 + 1, [2**22 + 2]).why
    assert why.startswith(
        f"pid {2**22 + 1}, which opened the socket, has ended, or is hidden from us (/proc with hid"
    )
    assert find_qemu(2**22 + 1, server.tids, connection=peer_inode(server.client)) == Found(server.pid)


FIND = """
import sys
from qmpvcpu.host.finding import find_qemu
peer, connection, *tids = map(int, sys.argv[1:])
print(find_qemu(peer or None, tids, connection=connection or None))
"""


def test_another_user_cannot_see_who_has_the_connection(serve: Serve) -> None:
    if os.geteuid() != 0:
        pytest.skip(ONLY_ROOT)
    server = serve()
    inode = peer_inode(server.client)
    said = run(FIND, os.getpid(), inode, *server.tids, before=NOBODY)
    assert "pid=None" in said
    assert "has such threads, but only its user and root can see whether it is this QEMU" in said
    said = run(FIND, os.getpid(), inode, 2**22 + 1, before=NOBODY)
    assert "it is not QEMU itself, and only QEMU's user and root can see which process is" in said
    said = run(FIND, 0, inode, 2**22 + 1, before=NOBODY)
    assert "no process that we can see has the other end of the connection: run as QEMU's user or as root" in said
    hidden = ("unshare", "--mount", "sh", "-ec", 'mount -t proc -o hidepid=2 proc /proc && exec "$@"', "sh", *NOBODY)
    said = run(FIND, os.getpid(), inode, *server.tids, before=hidden)
    assert "is hidden from us (/proc with hidepid): run as its user or as root" in said


def test_a_proc_that_is_not_ours_is_no_proof(serve: Serve) -> None:
    server = serve()
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    before = ("unshare", *user, "--pid", "--fork", "--kill-child")
    said = run(FIND, os.getpid(), peer_inode(server.client), *server.tids, before=before)
    assert "another PID namespace" in said
    before = ("unshare", *user, "--mount", "sh", "-ec", 'mount -t tmpfs none /proc && exec "$@"', "sh")
    said = run(FIND, os.getpid(), peer_inode(server.client), *server.tids, before=before)
    assert "/proc is not mounted here" in said


def test_from_a_container_a_process_outside_of_it_is_not_seen(serve: Serve) -> None:
    server = serve()
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    before = ("unshare", *user, "--pid", "--fork", "--kill-child", "--mount-proc")
    said = run(FIND, 0, peer_inode(server.client), *server.tids, before=before)
    assert "no process that we can see has the other end of the connection: QEMU runs outside of this contai" in said
    assert "share QEMU's PID namespace" in said


@pytest.mark.qemu
async def test_a_real_qemu_is_found_by_its_monitor() -> None:
    async with QemuProcess(best_qemu(), ["-machine", "q35", "-accel", "tcg", "-smp", "2,maxcpus=4"]) as qemu:
        await qemu.wait_ready()
        monitor = await Monitor.open(qemu.qmp, timeout=5, on_event=lambda _: None, on_lost=lambda _: None)
        tids = [cpu["thread-id"] for cpu in await monitor.execute("query-cpus-fast")]
        assert monitor.find_qemu(tids) == Found(qemu.pid)
        assert monitor.find_qemu([*tids, 2**22 + 1]).pid is None
        await monitor.close()


# Sockets.


def test_the_other_end_of_a_connection_is_found_by_its_number() -> None:
    ours, its = socket.socketpair()
    with ours, its:
        inode = os.fstat(its.fileno()).st_ino
        assert peer_inode(ours) == unix_peer(os.fstat(ours.fileno()).st_ino) == inode
        assert openers([inode, 0]) == [os.getpid()]
        assert has_open(os.getpid(), inode)
        assert not has_open(os.getpid(), 1)
        assert has_open(2**22 + 1, inode) is None
    assert openers([]) == openers([0]) == []
    assert peer_inode(ours) is None  # closed


def test_over_tcp_too_whatever_the_family() -> None:
    with (
        socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server,
        socket.create_connection(("127.0.0.1", server.getsockname()[1])) as client,
        server.accept()[0] as accepted,
    ):
        assert peer_inode(client) == os.fstat(accepted.fileno()).st_ino
        assert peer_inode(accepted) == os.fstat(client.fileno()).st_ino
        assert peer_inode(server) is None


def test_a_server_here_on_the_same_port_is_not_the_peer_on_another_host() -> None:
    class Connected:
        """A connection to another host, where the same port is listened on here by anybody."""

        family = socket.AF_INET

        def __init__(self, port: int) -> None:
            self._port = port

        def getpeername(self) -> tuple[str, int]:
            return "192.0.2.1", self._port

        def getsockname(self) -> tuple[str, int]:
            return "192.0.2.2", 40000

    with socket.create_server(("", 0)) as server:
        assert peer_inode(Connected(server.getsockname()[1])) is None  # type: ignore[arg-type]  # all it needs


def test_a_server_that_has_not_accepted_yet_has_no_number(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(path)
        server.listen()
        client.connect(path)
        assert peer_inode(client) == 0
        assert [*unix_accepted(path)] == []
        with server.accept()[0] as accepted:
            inode = os.fstat(accepted.fileno()).st_ino
            assert peer_inode(client) == inode
            assert [*unix_accepted(path)] == [inode]


def test_a_kernel_that_does_not_answer_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, its = socket.socketpair()

    def refuse(*_: object) -> None:
        raise PermissionError

    with ours, its:
        monkeypatch.setattr(socket, "socket", refuse)
        assert unix_peer(os.fstat(ours.fileno()).st_ino) is None
