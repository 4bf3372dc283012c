import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpvcpu.errors import MonitorConnectError, Unreachable
from qmpvcpu.host.processes import ProcessStat
from qmpvcpu.qmp.address import Address, connect, connected_socket, describe_peer, find_clients, first_bytes, peer_pid


def soon(seconds: float = 5) -> float:
    return asyncio.get_running_loop().time() + seconds


@pytest.mark.parametrize(
    ("target", "address", "text"),
    [
        ("/run/vm.qmp", Address(path="/run/vm.qmp"), "unix:/run/vm.qmp"),
        ("./vm:1", Address(path="./vm:1"), "unix:./vm:1"),
        (Path("/run/vm.qmp"), Address(path="/run/vm.qmp"), "unix:/run/vm.qmp"),
        ("unix:vm.qmp", Address(path="vm.qmp"), "unix:vm.qmp"),
        ("tcp:localhost:4444", Address(host="localhost", port=4444), "tcp:localhost:4444"),
        ("tcp:[::1]:4444", Address(host="::1", port=4444), "tcp:[::1]:4444"),
        (("::1", 4444), Address(host="::1", port=4444), "tcp:[::1]:4444"),
        (("host", 65535), Address(host="host", port=65535), "tcp:host:65535"),
    ],
)
def test_an_address_is_read_and_shown_in_one_form(target: object, address: Address, text: str) -> None:
    assert Address.parse(target) == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "'': the path is empty"),
        ("/run/\ud800", "'/run/\\ud800': the path cannot be encoded"),
        (("host", 10**5000), "the port is 'a very large int'"),
        ("tcp:host:" + "9" * 5000, "not a number from 1 to 65535"),
        ("unix:", "'unix:': the path is empty"),
        ("a\0b", "the path is empty or holds a NUL"),
        ("tcp:", "a TCP address is tcp:HOST:PORT"),
        ("tcp:host", "cannot speak QMP on tcp:host: a TCP address is tcp:HOST:PORT"),
        ("tcp:::1:4444", "with a numeric IPv6 host in brackets"),
        ("tcp:host:notaport", "the port is 'notaport', not a number from 1 to 65535"),
        ("tcp:host:", "the port is ''"),
        ("tcp:host:0", "the port is '0'"),
        ("tcp:host:65536", "the port is '65536'"),
        ("tcp:host:\u0664", "the port is"),
        (("host", 0), "tcp:host:0: the port is '0'"),
        (("host", -1), "the port is '-1'"),
        (("", 4444), "the host is missing"),
        ("/" + "x" * 107, "the path has 108 bytes, a UNIX socket's can have 107 (a relative path"),
    ],
)
def test_a_malformed_address_is_refused_before_anything_is_tried(target: object, message: str) -> None:
    with pytest.raises(MonitorConnectError) as caught:
        Address.parse(target)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("pasted", "text"),
    [
        ("unix:/run/vm.qmp,server=on,wait=off", "unix:/run/vm.qmp"),
        ("-qmp unix:/run/vm.qmp,server,nowait", "unix:/run/vm.qmp"),
        ("--qmp=/run/vm.qmp,server=on,wait=off,pretty=off", "unix:/run/vm.qmp"),
        ("-chardev socket,id=mon0,path=/run/vm.qmp,server=on,wait=off", "unix:/run/vm.qmp"),
        ("socket,path=/run/vm.qmp,id=mon0,server=on,wait=off", "unix:/run/vm.qmp"),
        ("socket,id=mon0,host=::1,port=4444,server=on,nodelay=on", "tcp:[::1]:4444"),
        ("socket,id=mon0,port=4444,server=on", "tcp:localhost:4444"),
        ("-chardev socket,id=mon0,path=/run/a,,b.qmp,server=on", "unix:/run/a,b.qmp"),
        ("socket,path=/run/a,,,id=mon0", "unix:/run/a,"),
        ("unix:/run/a,,b,server=on", "unix:/run/a,b"),
        ("unix:/run/a,,id,server=on", "unix:/run/a,id"),
        ("/run/a,b", "unix:/run/a,b"),
        ("/run/a,id", "unix:/run/a,id"),
        ("/run/a,id,server=on", "unix:/run/a"),
        ("/run/a,,b", "unix:/run/a,,b"),
        (" '/run/vm.qmp'\n", "unix:/run/vm.qmp"),
        ("unix:///run/vm.qmp", "unix:/run/vm.qmp"),
        ("UNIX-CONNECT:/run/vm.qmp", "unix:/run/vm.qmp"),
        ("file:///run/my%20vm.qmp", "unix:/run/my vm.qmp"),
        ("file://localhost/run/vm.qmp", "unix:/run/vm.qmp"),
        ("@vm/one", "unix:@vm/one"),
        ("unix:@vm", "unix:@vm"),
        ("\0vm", "unix:@vm"),
        ("unix:vm,abstract=on,server=on", "unix:@vm"),
        ("./@vm", "unix:./@vm"),
        ("localhost:4444", "tcp:localhost:4444"),
        ("127.0.0.1:4444", "tcp:127.0.0.1:4444"),
        ("[::1]:4444", "tcp:[::1]:4444"),
        ("[fe80::1%eth0]:4444", "tcp:[fe80::1%eth0]:4444"),
        ("-monitor unix:/run/vm.hmp,server,nowait", "unix:/run/vm.hmp"),
        (":4444", "tcp:localhost:4444"),
        ("tcp:host:4444,server=on,wait=off,nodelay=on", "tcp:host:4444"),
        ("-qmp tcp::4444,server,wait=off", "tcp:localhost:4444"),
        ("tcp://host:4444/", "tcp:host:4444"),
        ("unix:vm:1", "unix:vm:1"),
    ],
)
def test_an_address_as_people_paste_it_is_taken(pasted: str, text: str) -> None:
    assert str(Address.parse(pasted)) == text
    assert Address.parse(text) == Address.parse(pasted)


def test_a_home_directory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert Address.parse("~/vm.qmp") == Address.parse("unix:~/vm.qmp,server=on") == Address(path="/home/me/vm.qmp")
    assert Address.parse(Path("~/vm.qmp")).path == "~/vm.qmp"  # as everywhere in Python


@pytest.mark.parametrize(
    ("pasted", "message"),
    [
        ("::1:4444", "put a numeric IPv6 host in brackets, as in [::1]:4444"),
        ("localhost:0", "the port is '0'"),
        ("socket,path=/run/a,b.qmp,server=on", "is no option of a chardev; write a comma in a path twice"),
        ("unix:/run/vm.qmp,server=off", "with server=off QEMU connects instead of listening"),
        ("unix:vm,abstract=on,tight=off,server=on", "with tight=off QEMU adds NULs to the name"),
        ("tcp:host:1,telnet=on,server=on", "with telnet QEMU does not speak plain JSON"),
        (
            "-mon chardev=mon0,mode=control",
            "chardev leads to no socket of a VM; the address of one is a path, unix:PATH or tcp:",
        ),
        ("qemu:///system", "that is a URI of libvirt; the address of a VM's socket is a path"),
        ("qemu+ssh://host/system", "docs/libvirt.md says how a VM of libvirt gets one"),
        ("http://host:4444", "http leads to no socket of a VM"),
        ("vsock:3:4444", "vsock leads to no socket of a VM"),
        ("fd:7", "attach() takes a connected socket"),
        ("@", "the path is empty"),
    ],
)
def test_an_address_of_something_else_is_told_what_to_write(pasted: str, message: str) -> None:
    with pytest.raises(MonitorConnectError) as caught:
        Address.parse(pasted)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("4444", "A port is written tcp:HOST:4444"),
        ("myhost", "a host is written tcp:HOST:PORT"),
        ("myhost 4444", "a host is written tcp:HOST:PORT"),
        ("$HOME/vm.qmp", "$NAME is not expanded here"),
    ],
)
async def test_what_is_no_path_may_have_been_meant_otherwise(path: str, hint: str) -> None:
    with pytest.raises(MonitorConnectError) as caught:
        await connect(Address.parse(path), deadline=soon())
    assert caught.value.hint.endswith(hint)


async def test_an_abstract_socket_connects_and_has_no_file_to_be_left_behind() -> None:
    name = f"@qmpvcpu test {os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name[1:])
        server.listen()
        (await connect(Address.parse(name), deadline=soon())).close()
    with pytest.raises(MonitorConnectError, match=r"unix:@qmpvcpu test [0-9]+: connection refused: nobody listens$"):
        await connect(Address.parse(name), deadline=soon())


@pytest.mark.parametrize("target", [None, 5, b"/run/x", ("host",), ("host", "1"), ("host", True), {"host": 1}])
def test_what_is_no_kind_of_target_is_a_type_error(target: object) -> None:
    with pytest.raises(TypeError, match=r"a QMP server is given as a path, .* not as"):
        Address.parse(target)


async def test_a_path_of_107_bytes_connects(tmp_path: Path) -> None:
    stem = str(tmp_path / "q")
    path = stem + "x" * (107 - len(stem))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        sock = await connect(Address.parse(path), deadline=soon())
        assert peer_pid(sock) == os.getpid()
        sock.close()


async def test_each_kind_of_wrong_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        datagram.bind(str(tmp_path / "datagram"))
        expected = {
            tmp_path / "none": "no such path (is QEMU running, with -qmp unix:PATH,server=on,wait=off?)",
            tmp_path / "file" / "x": "Not a directory",
            tmp_path / "loop": "Too many levels of symbolic links",
            tmp_path: "the path is a directory, no socket",
            tmp_path / "file": "the path is a regular file, no socket",
            tmp_path / "fifo": "the path is a FIFO, no socket",
            Path("/dev/null"): "the path is a device, no socket",
            tmp_path / "stale": "connection refused: nobody listens, the socket was left behind",
            tmp_path / "datagram": "Protocol wrong type for socket",
        }
        for path, message in expected.items():
            with pytest.raises(MonitorConnectError) as caught:
                await connect(Address.parse(path), deadline=soon())
            assert str(caught.value).startswith(f"cannot speak QMP on unix:{path}: {message}")


async def test_a_missing_permission_is_named() -> None:
    folder = Path("/tmp") / f"qmp-{os.getpid()}"  # noqa: S108 - where another user may look
    locked = folder / "locked"
    locked.mkdir(parents=True)
    locked.chmod(0)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "qmp"))
        (folder / "qmp").chmod(0)
        server.listen()
        user = os.geteuid()
        if user == 0:  # root may everything
            os.seteuid(65534)
        try:
            for path in (folder / "qmp", locked / "qmp"):
                with pytest.raises(MonitorConnectError, match="permission denied: it takes write permission"):
                    await connect(Address.parse(path), deadline=soon())
        finally:
            os.seteuid(user)
            (folder / "qmp").unlink()
            locked.rmdir()
            folder.rmdir()


async def test_a_full_queue_of_waiting_clients_is_waited_for_and_named(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(path)
        server.listen(0)
        first.connect(path)
        with pytest.raises(MonitorConnectError) as caught:
            await connect(Address.parse(path), deadline=soon(0.1))
        assert "its queue of waiting clients is full: another client holds this socket" in str(caught.value)
        assert "SIGCONT lets a stopped QEMU go on" in caught.value.hint
        assert "a second -qmp" in caught.value.hint

        waiting = asyncio.create_task(connect(Address.parse(path), deadline=soon()))
        await asyncio.sleep(0)
        server.accept()[0].close()
        (await waiting).close()


async def test_cancelling_a_connection_leaves_no_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(path)
        server.listen(0)
        first.connect(path)
        waiting = asyncio.create_task(connect(Address.parse(path), deadline=soon()))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


def full_tcp_port(server: socket.socket) -> tuple[int, list[socket.socket]]:
    """A loopback port that answers no further connection."""
    server.bind(("127.0.0.1", 0))
    server.listen(0)
    clients = []
    for _ in range(4):
        client = socket.socket()
        client.settimeout(0)
        client.connect_ex(server.getsockname())
        clients.append(client)
    return server.getsockname()[1], clients


async def test_a_tcp_host_that_does_not_answer_is_given_up_at_the_deadline() -> None:
    with socket.socket() as server:
        port, clients = full_tcp_port(server)
        try:
            with pytest.raises(MonitorConnectError, match="the host did not answer within the deadline"):
                await connect(Address(host="127.0.0.1", port=port), deadline=soon(0.1))
        finally:
            for client in clients:
                client.close()


async def test_tcp_failures_are_named() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    with pytest.raises(MonitorConnectError, match=f"tcp:127.0.0.1:{port}: connection refused: nobody listens on"):
        await connect(Address(host="127.0.0.1", port=port), deadline=soon())
    with pytest.raises(MonitorConnectError, match="the host name cannot be resolved"):
        await connect(Address(host="no-such-host.invalid", port=1), deadline=soon())
    with pytest.raises(MonitorConnectError, match="the host name cannot be resolved"):
        await connect(Address(host="x" * 70 + ".example", port=1), deadline=soon())


async def test_the_next_address_of_a_host_is_tried() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]

        def two(*_: object, **__: object) -> list[object]:
            kind = socket.SOCK_STREAM
            return [(socket.AF_INET6, kind, 6, "", ("::1", port)), (socket.AF_INET, kind, 6, "", ("127.0.0.1", port))]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", two)
            sock = await connect(Address(host="both", port=port), deadline=soon())
        assert sock.getpeername() == ("127.0.0.1", port)
        assert peer_pid(sock) is None
        sock.close()


async def test_only_a_connected_stream_socket_is_taken() -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
        pytest.raises(MonitorConnectError, match="it is not a stream socket"),
    ):
        connected_socket(datagram)
    with (
        socket.socket() as lonely,
        pytest.raises(MonitorConnectError, match="not a connected socket: Transport endpoint is not connected"),
    ):
        connected_socket(lonely)
    with pytest.raises(MonitorConnectError, match=r"fd -1: it is not a connected socket: Bad file descriptor"):
        connected_socket(lonely)


async def test_the_first_bytes_stay_on_the_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0)
        theirs.send(b"hello")
        assert await first_bytes(ours, 2) == b"he"
        assert ours.recv(10) == b"hello"
        theirs.close()
        assert await first_bytes(ours) == b""


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("T", "pid 7 (qemu (x) y) is stopped (SIGSTOP)"),
        ("t", "pid 7 (qemu (x) y) is stopped by a debugger"),
        ("Z", "pid 7 (qemu (x) y) has ended"),
        ("D", "pid 7 (qemu (x) y) is blocked in the kernel"),
        ("S", "pid 7 (qemu (x) y) runs, so most likely another client holds the socket"),
    ],
)
def test_the_state_of_a_silent_peer_is_told(state: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = ProcessStat("qemu (x) y", state, 0, 1)
    for module in ("qmpvcpu.qmp.address", "qmpvcpu.host.processes"):
        monkeypatch.setattr(f"{module}.read_stat", lambda _: stat)
    monkeypatch.setattr("qmpvcpu.qmp.address.read_children", lambda _: [])
    reason, told = describe_peer(7)
    assert told.startswith(message)
    assert reason is (Unreachable.HELD if state == "S" else Unreachable.OTHER)


def test_a_peer_without_a_process_still_gets_advice() -> None:
    advice = "a QMP socket serves one client at a time; give QEMU a second -qmp"
    assert describe_peer(None) == (Unreachable.HELD, advice)
    gone = f"the process that opened it, pid 4194305, has ended; {advice}"
    assert describe_peer(2**22 + 1) == (Unreachable.HELD, gone)


@pytest.fixture
def nobody_answers_for_a_name(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names are looked up for as long as the test takes."""
    asked: list[str] = []
    over = threading.Event()

    def look_up(host: str, *_: object, **__: object) -> object:
        asked.append(host)
        over.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield asked
    over.set()
    for thread in threading.enumerate():
        if thread.name.startswith("look up "):
            thread.join()


async def test_a_deadline_holds_over_the_look_up_of_a_name(nobody_answers_for_a_name: list[str]) -> None:
    # More than the threads of the loop, in which a record's writes run.
    attempts = [connect(Address(host=f"vm{n}.example", port=4444), deadline=soon(0.1)) for n in range(40)]
    for failure in await asyncio.gather(*attempts, return_exceptions=True):
        assert isinstance(failure, MonitorConnectError)
        assert "did not answer within the deadline" in str(failure)
    assert len(nobody_answers_for_a_name) == 40
    assert await asyncio.get_running_loop().run_in_executor(None, int, "7") == 7  # while all are looked up still
    assert sum(thread.name.startswith("look up ") and thread.daemon for thread in threading.enumerate()) == 40


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_number_is_no_name(host: str, nobody_answers_for_a_name: list[str]) -> None:
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    with listener:
        (await connect(Address(host=host, port=listener.getsockname()[1]), deadline=soon())).close()
    assert nobody_answers_for_a_name == []


async def test_a_name_that_nobody_has_is_told_with_the_resolvers_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for host in ("vm.example", "a\0b"):
        with pytest.raises(MonitorConnectError, match="cannot be resolved: Name or service not known"):
            await connect(Address(host=host, port=4444), deadline=soon())


async def test_a_look_up_that_outlives_its_loop_does_no_harm(nobody_answers_for_a_name: list[str]) -> None:
    def run() -> None:
        with asyncio.Runner() as runner, pytest.raises(MonitorConnectError):
            runner.run(connect_soon())

    async def connect_soon() -> None:
        await connect(Address(host="vm.example", port=4444), deadline=soon(0.01))

    await asyncio.to_thread(run)
    assert nobody_answers_for_a_name == ["vm.example"]


@pytest.mark.parametrize("name", ["Path", "with a space"])  # the first is also what the kernel's list has as its head
def test_the_process_that_a_server_serves_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(name)
        server.listen()
        client.connect(name)
        assert find_clients(client) == []
        served, _ = server.accept()
        with served, socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(name)
            assert find_clients(waiting) == [os.getpid()]
