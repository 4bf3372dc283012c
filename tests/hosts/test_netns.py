"""Hosts for tests: what runs on them, what a cut cable does, and that nothing is left of them."""

import asyncio
import contextlib
import ipaddress
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qmpvcpu.testing.clock import ClockError
from qmpvcpu.testing.nats import NatsServer
from qmpvcpu.testing.netns import Host, HostProcess, Network, NetworkError, can_make_namespaces
from tests.waiting import is_gone, until

separate = pytest.mark.skipif(not can_make_namespaces(), reason="no network namespaces here")

ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 7000)) as listener:
    print("listens", flush=True)
    connection, address = listener.accept()
    print(address[0], flush=True)
    while said := connection.recv(100):
        print(said.decode(), flush=True)
        connection.sendall(said)
"""


@pytest.fixture(params=[pytest.param(True, marks=separate), False], ids=["namespaces", "loopback"])
async def network(request: pytest.FixtureRequest) -> AsyncIterator[Network]:
    async with Network(separate=request.param) as network:
        yield network


async def echo_on(host: Host) -> HostProcess:
    """Start a server there that says what it hears."""
    server = await host.run(sys.executable, "-c", ECHO, host.address)
    await until(lambda: "listens" in server.stdout, within=20)
    return server


async def ends(process: HostProcess) -> int:
    async with asyncio.timeout(20):
        return await process.wait()


async def test_each_host_has_an_address_that_the_others_and_we_reach(network: Network) -> None:
    hosts = [await network.host(name) for name in ("rack1-a", "rack1-b")]
    addresses = {network.address, *(host.address for host in hosts)}
    assert len(addresses) == 3
    assert list(network.hosts) == ["rack1-a", "rack1-b"]
    assert await network.host("rack1-a") is hosts[0]
    for address in addresses:
        assert ipaddress.ip_address(address).is_loopback is not network.is_separate
    reached, reaching = hosts
    server = await echo_on(reached)
    code = (
        "import socket, sys; there = socket.create_connection((sys.argv[1], 7000)); there.sendall(b'hello');"
        " there.recv(5)"  # one that ends with something unread resets the connection
    )
    client = await reaching.run(sys.executable, "-c", code, reached.address)
    assert await ends(client) == 0, client.stderr
    assert await ends(server) == 0, server.stderr
    _, address, said = server.stdout.split()
    assert said == "hello"
    assert address == reaching.address or not network.is_separate
    await echo_on(reached)
    reader, writer = await asyncio.open_connection(reached.address, 7000)
    writer.write(b"hello from here")
    assert await reader.readexactly(15) == b"hello from here"
    writer.close()


async def test_what_listens_here_is_reached_from_a_host(network: Network) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"welcome")
        writer.close()

    host = await network.host("a")
    async with await asyncio.start_server(greet, network.address, 0) as server:
        port = server.sockets[0].getsockname()[1]
        code = f"import socket; print(socket.create_connection(('{network.address}', {port})).recv(9).decode())"
        client = await host.run(sys.executable, "-c", code)
        assert await ends(client) == 0, client.stderr
        assert client.stdout == "welcome\n"


@separate
async def test_a_cut_cable_is_silence_and_connections_outlive_it() -> None:
    async with Network() as network:
        host = await network.host("a")
        server = await echo_on(host)
        reader, writer = await asyncio.open_connection(host.address, 7000)
        writer.write(b"before")
        assert await reader.readexactly(6) == b"before"
        await host.cut()
        await host.cut()
        writer.write(b"meanwhile")
        await writer.drain()  # nobody tells that it goes nowhere
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(9), 0.3)
        assert "meanwhile" not in server.stdout
        assert server.returncode is None
        await host.mend()
        await host.mend()
        async with asyncio.timeout(20):
            assert await reader.readexactly(9) == b"meanwhile"
        writer.close()


@separate
async def test_a_cut_host_does_not_cut_the_others() -> None:
    async with Network() as network:
        cut, whole = await network.host("cut"), await network.host("whole")
        await cut.cut()
        await echo_on(whole)
        _, writer = await asyncio.open_connection(whole.address, 7000)
        writer.close()


async def test_a_program_runs_in_the_directory_of_its_host_with_what_it_is_given(network: Network) -> None:
    host = await network.host("a")
    program = await host.run("sh", "-c", "pwd; echo $GREETING >&2; exit 3", env={"GREETING": "hello"})
    assert await ends(program) == 3
    assert program.returncode == 3
    assert program.stdout.strip() == str(host.directory)
    assert program.stderr == "hello\n"
    assert host.processes == (program,)
    assert "ended with exit status 3: sh -c" in repr(program)
    assert repr(host) == f"<Host a at {host.address}>"


async def test_a_program_has_the_pid_that_is_told_and_takes_signals(network: Network) -> None:
    host = await network.host("a")
    program = await host.run("sh", "-c", "trap 'exit 9' TERM; echo $$; while :; do sleep 0.05; done")
    await until(lambda: program.stdout, within=20)
    assert int(program.stdout) == program.pid
    program.kill(signal.SIGTERM)
    assert await ends(program) == 9
    program.kill()


async def test_a_crash_ends_all_on_the_host_and_it_can_run_programs_again(network: Network) -> None:
    host, other = await network.host("a"), await network.host("b")
    program = await host.run("sh", "-c", "sleep 1000 & echo $!; wait")
    stays = await other.run("sleep", "1000")
    await until(lambda: program.stdout, within=20)
    await host.crash()
    assert program.returncode == -signal.SIGKILL
    child = int(program.stdout)
    await until(lambda: is_gone(child), within=20)
    assert stays.returncode is None
    again = await host.run("true")
    assert await ends(again) == 0


@separate
async def test_at_the_end_all_is_killed_and_nothing_is_left() -> None:
    async with Network(separate=True) as network:
        host = await network.host("a")
        assert network.address in await addresses()
        # One of them leaves its group and its session.
        program = await host.run("sh", "-c", "sleep 1000 & echo $!; setsid sleep 1000 & echo $!; wait")
        await until(lambda: len(program.stdout.split()) == 2, within=20)
        children = [int(pid) for pid in program.stdout.split()]

    async def is_away() -> bool:
        return network.address not in await addresses()

    await until(is_away, within=20)  # the kernel takes a namespace down after its last process
    assert program.returncode == -signal.SIGKILL
    assert all(is_gone(child) for child in children)
    assert not host.directory.exists()


OWNER = """
import asyncio, sys
from qmpvcpu.testing.netns import Network

async def main():
    async with Network(separate=True) as network:
        host = await network.host("a")
        program = await host.run("sh", "-c", "sleep 1000 & echo $!; setsid sleep 1000 & echo $!; wait")
        while len(program.stdout.split()) < 2:
            await asyncio.sleep(0.01)
        print(program.pid, *program.stdout.split(), network.address, flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


@separate
async def test_an_owner_that_is_killed_leaves_nothing() -> None:
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", OWNER, stdout=asyncio.subprocess.PIPE)
    assert owner.stdout is not None
    async with asyncio.timeout(30):
        *pids, address = (await owner.stdout.readline()).split()
    assert address.decode() in await addresses()
    owner.kill()
    await owner.wait()
    await until(lambda: all(is_gone(int(pid)) for pid in pids), within=20)

    async def is_forgotten() -> bool:
        return address.decode() not in await addresses()

    await until(is_forgotten, within=20)


async def addresses() -> str:
    """All addresses that this machine has."""
    process = await asyncio.create_subprocess_exec("ip", "-4", "address", stdout=asyncio.subprocess.PIPE)
    return (await process.communicate())[0].decode()


@pytest.mark.parametrize("apart", [pytest.param(True, marks=separate), False])
async def test_networks_at_the_same_time_have_addresses_of_their_own(apart: bool) -> None:
    async with contextlib.AsyncExitStack() as stack:
        networks = [await stack.enter_async_context(Network(separate=apart)) for _ in range(4)]
        ranges = {ipaddress.ip_network(f"{network.address}/20", strict=False) for network in networks}
        assert len(ranges) == 4
        assert all(network.is_separate is apart for network in networks)


async def test_without_namespaces_a_cable_cannot_be_cut() -> None:
    async with Network(separate=False) as network:
        host = await network.host("a")
        assert host.prefix == ()
        with pytest.raises(NetworkError, match="host a cannot be cut: it shares this machine's loopback"):
            await host.cut()
        with pytest.raises(NetworkError, match="host a cannot be mended"):
            await host.mend()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
async def test_a_host_whose_name_is_no_directory_is_refused(name: str) -> None:
    async with Network(separate=False) as network:
        with pytest.raises(ValueError, match="is no name for a host"):
            await network.host(name)


@pytest.mark.parametrize("argv", [(), ("qmpvcpu-no-such-program", "now")])
async def test_a_program_that_is_not_there_is_told(network: Network, argv: tuple[str, ...]) -> None:
    host = await network.host("a")
    with pytest.raises(FileNotFoundError, match=r"host a: no program '(qmpvcpu-no-such-program)?' to run"):
        await host.run(*argv)
    assert host.processes == ()


@separate
async def test_what_ip_says_when_it_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Network() as network:
        fake = tmp_path / "ip"
        fake.write_text("#!/bin/sh\necho 'RTNETLINK answers: No buffer space' >&2\nexit 2\n")
        fake.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
            assert not can_make_namespaces()
            with pytest.raises(NetworkError, match=r"ip failed: RTNETLINK answers: No buffer space \(of: link add"):
                await network.host("a")


async def test_without_ip_there_are_no_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert not can_make_namespaces()
    async with Network() as network:
        assert not network.is_separate


@pytest.mark.parametrize("offset", [-3600.0, 86400.5])
async def test_a_program_can_have_another_time_of_day(network: Network, offset: float) -> None:
    host = await network.host("a")
    code = "import time; a = time.monotonic(); time.sleep(0.1); print(time.time(), a, time.monotonic() - a)"
    began, began_at = time.time(), time.monotonic()
    program = await host.run(sys.executable, "-c", code, clock_offset=offset)
    assert await ends(program) == 0, program.stderr
    told, monotonic, slept = map(float, program.stdout.split())
    assert began + offset <= told <= time.time() + offset
    assert began_at <= monotonic <= time.monotonic()
    assert slept >= 0.1
    plain = await host.run(sys.executable, "-c", "import time; print(time.time())")
    assert await ends(plain) == 0
    assert began <= float(plain.stdout) <= time.time()


async def test_what_it_takes_to_shift_a_clock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Network(separate=False) as network:
        host = await network.host("a")
        true = Path("/bin/true")
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ClockError, match="no C compiler to shift a clock with: install one of cc, gcc"):
            await host.run(true, clock_offset=1)
        compiler = tmp_path / "tcc"
        compiler.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
        compiler.chmod(0o755)
        with pytest.raises(ClockError, match="tcc does not compile the library that shifts a clock: no space left"):
            await host.run(true, clock_offset=1)


@separate
async def test_a_server_can_run_on_a_host_of_its_own() -> None:
    async with Network() as network:
        hub = await network.host("hub")
        async with NatsServer(host=hub.address, prefix=hub.prefix) as server:
            reader, writer = await asyncio.open_connection(hub.address, server.port)
            assert (await reader.readline()).startswith(b"INFO ")
            await hub.crash()
            await until(lambda: not server.is_running, within=20)
            writer.close()
