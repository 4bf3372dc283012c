import asyncio
import contextlib
import os
import re
import signal
import socket
import struct
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import VcpuMap
from qmpvcpu.model.placement import Placement
from qmpvcpu.testing import MicroGuest
from tests.cli.running import run
from tests.fleet.vms import dead_socket, garbage, guests, stopped
from tests.metrics.scraping import GET, Exporter, Page, exporting
from tests.waiting import until

pytestmark = pytest.mark.qemu


def linked(directory: Path, *vms: MicroGuest, name: str = "vm") -> None:
    """Have the sockets of *vms* in *directory*."""
    for number, vm in enumerate(vms):
        (directory / f"{name}{number}.qmp").symlink_to(vm.qmp)


async def scraped_until(exporter: Exporter, **up: int) -> None:
    async def is_so() -> bool:
        return (await exporter.scrape()).up == up

    await until(is_so, 15)


async def test_a_directory_has_each_vm_by_its_name(tmp_path: Path) -> None:
    async with guests(2) as (one, other), exporting("--dir", tmp_path) as exporter:
        assert (await exporter.scrape()).up == {}
        linked(tmp_path, one, other)
        await scraped_until(exporter, vm0=1, vm1=1)
        page = await exporter.scrape()
        assert page["qmpvcpu_vcpus_plugged"] == {("vm0",): 1, ("vm1",): 1}
        assert page["qmpvcpu_vcpus_maximum"] == {("vm0",): 8, ("vm1",): 8}
        assert (await run("set", "0-2", "--qmp", one.sockets[1])).code == 0
        page = await exporter.scrape()
        assert page["qmpvcpu_vcpus_plugged"] == {("vm0",): 3, ("vm1",): 1}
        assert page.value("qmpvcpu_events_total", domain="vm0", event="VcpuPlugged") == 2
        assert page.value("qmpvcpu_events_total", domain="vm1", event="VcpuPlugged") == 0


def counted(pid: int) -> dict[str, tuple[float, float]]:
    """Run time and delay of each vCPU in seconds, by the names of QEMU's threads."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        named = re.fullmatch(r"CPU (\d+)/\w+\n", (task / "comm").read_text())
        if named is not None:
            run, delay, _ = (task / "schedstat").read_text().split()
            found[named[1]] = int(run) / 1e9, int(delay) / 1e9
    return found


async def test_curl_shows_what_can_be_counted_by_hand(tmp_path: Path) -> None:
    async with (
        MicroGuest(boot=3, extra_args=("-name", "web,debug-threads=on")) as guest,
        exporting("--dir", tmp_path) as exporter,
    ):
        linked(tmp_path, guest)
        await scraped_until(exporter, web=1)
        assert (await run("plug", "5", "--qmp", guest.sockets[1])).code == 0
        before = counted(guest.process.pid)
        curl = await asyncio.create_subprocess_exec("curl", "--silent", exporter.url, stdout=asyncio.subprocess.PIPE)
        page = Page.of((await curl.communicate())[0].decode())
        after = counted(guest.process.pid)
    assert sorted(before) == ["0", "1", "2", "5"]
    names = ("libvirt_domain_vcpu_time_seconds_total", "libvirt_domain_vcpu_delay_seconds_total")
    for vcpu in before:
        values = tuple(page.value(name, domain="web", vcpu=vcpu) or 0.0 for name in names)
        assert before[vcpu] <= values <= after[vcpu]
        assert before[vcpu][1] <= values[1] <= after[vcpu][1]
    assert page.value("qmpvcpu_vcpus_plugged", domain="web") == len(before)


async def test_threads_out_of_the_place_that_a_record_says_are_told(tmp_path: Path) -> None:
    directory, record = tmp_path / "vms", tmp_path / "web.xml"
    directory.mkdir()
    cpus = VcpuMap(os.sched_getaffinity(0))
    one = VcpuMap([cpus.lowest])
    async with MicroGuest(extra_args=("-name", "web")) as guest:
        linked(directory, guest)
        async with qmpvcpu.attach(guest.qmp, record=record, placement=Placement(cpuset=one)) as vm:
            await vm.host.place()
            await vm.plug(2)
        async with exporting("--dir", directory, "--record", tmp_path) as exporter:

            async def drifted(count: int) -> bool:
                page = await exporter.scrape()
                return page.up == {"web": 1} and page["qmpvcpu_threads_drifted"] == {("web",): count}

            await until(lambda: drifted(0), 15)
            edited = record.read_text().replace(f"cpuset='{one}'", f"cpuset='{cpus}'")
            (tmp_path / "new").write_text(edited)
            (tmp_path / "new").rename(record)
            await until(lambda: drifted(3), 15)  # two vCPUs and QEMU's main thread
            record.unlink()
            await until(lambda: drifted(0), 15)


async def test_a_vm_that_ends_is_down_and_then_gone_and_one_that_returns_is_up(tmp_path: Path) -> None:
    async with MicroGuest() as stays, exporting("--dir", tmp_path) as exporter:
        linked(tmp_path, stays, name="stays")
        async with MicroGuest() as ends:
            linked(tmp_path, ends, name="ends")
            await scraped_until(exporter, stays0=1, ends0=1)
            ends.process.kill()
            await ends.process.wait()
            page = await exporter.scrape()
            assert page.up == {"stays0": 1, "ends0": 0}
            assert page.value("qmpvcpu_vcpus_plugged", domain="ends0") is None
        (tmp_path / "ends0.qmp").unlink()
        await scraped_until(exporter, stays0=1)
        async with MicroGuest() as returns:
            linked(tmp_path, returns, name="ends")
            await scraped_until(exporter, stays0=1, ends0=1)


async def test_a_stopped_vm_is_down_with_what_it_said_last_and_how_old_that_is(tmp_path: Path) -> None:
    async with guests(2) as (good, bad), exporting("--dir", tmp_path) as exporter:
        linked(tmp_path, good, bad)
        await scraped_until(exporter, vm0=1, vm1=1)
        with stopped(bad):
            await exporter.scrape()
            page = await exporter.scrape()
            assert page.up == {"vm0": 1, "vm1": 0}
            assert page.value("qmpvcpu_vcpus_plugged", domain="vm1") == 1
            ages = page["qmpvcpu_reading_age_seconds"]
            assert ages["vm1",] > ages["vm0",] >= 0
        await scraped_until(exporter, vm0=1, vm1=1)


async def test_vms_that_never_answered_are_down_and_hold_nobody_up(tmp_path: Path) -> None:
    async with guests(2) as (good, bad), garbage() as nonsense:
        linked(tmp_path, good)
        linked(tmp_path, bad, name="bad")
        dead_socket(tmp_path / "dead.qmp")
        (tmp_path / "nonsense.qmp").symlink_to(nonsense.path)
        (tmp_path / "file.qmp").write_text("")
        with stopped(bad):
            async with exporting("--dir", tmp_path, "--reply-timeout", "60") as exporter:
                down = {f"unix:{tmp_path}/{name}.qmp": 0 for name in ("bad0", "dead", "nonsense")}
                await scraped_until(exporter, vm0=1, **down)
                linked(tmp_path, bad, name="again")  # the same VM by another way, which is found and not counted
                await scraped_until(exporter, vm0=1, **down)


async def test_a_vm_that_hangs_keeps_no_other_from_being_found(tmp_path: Path) -> None:
    async with guests(2) as (good, bad):
        linked(tmp_path, bad, name="bad")
        with stopped(bad):
            async with exporting("--dir", tmp_path, "--reply-timeout", "60") as exporter:
                down = {f"unix:{tmp_path}/bad0.qmp": 0}
                await scraped_until(exporter, **down)
                linked(tmp_path, good, name="good")
                await scraped_until(exporter, good0=1, **down)


async def test_an_unreadable_directory_is_told_and_looked_into_again(tmp_path: Path) -> None:
    directory = tmp_path / "vms"
    assert (await run("exporter", "--dir", directory)).code == 2
    directory.mkdir()
    async with MicroGuest() as guest, exporting("--dir", directory) as exporter:
        directory.rename(tmp_path / "moved")
        await exporter.running.wait_said("cannot look for VMs")
        (tmp_path / "moved").rename(directory)
        linked(directory, guest)
        await scraped_until(exporter, vm0=1)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0", "localhost:0", ":0"])
async def test_it_listens_where_it_is_told_to(listen: str, tmp_path: Path) -> None:
    async with exporting("--dir", tmp_path, listen=listen) as exporter:
        assert (await exporter.scrape()).value("qmpvcpu_scrape_duration_seconds") is not None


async def test_a_port_that_is_taken_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        ran = await run("exporter", "--dir", tmp_path, "--listen", listen)
        assert ran.code == 3
        assert f"--listen {listen}: the port is taken" in ran.err


@pytest.mark.parametrize(
    "listen",
    ["", "9177", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "[::1", "::1:9177", "a:65536", "a b:1", "a:1\u0663"],
)
async def test_an_address_that_is_none_is_bad_usage(listen: str, tmp_path: Path) -> None:
    ran = await run("exporter", "--dir", tmp_path, "--listen", listen)
    assert ran.code == 2
    assert "such as 127.0.0.1:9177 or [::1]:9177" in ran.err


@pytest.mark.parametrize(
    ("listen", "why"),
    [
        ("192.0.2.1:9177", "this host has no such address"),
        ("no-such-host.invalid:9177", ""),
        ("..:9177", "no host has such a name"),
        (f"{'a' * 64}:9177", "no host has such a name"),
    ],
)
async def test_an_address_of_another_machine_is_an_error(listen: str, why: str, tmp_path: Path) -> None:
    ran = await run("exporter", "--dir", tmp_path, "--listen", listen)
    assert ran.code == 3
    assert f"--listen {listen}: {why}" in ran.err


async def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    code = "sys.modules['prometheus_client'] = None"
    ran = await run("exporter", "--dir", tmp_path, "--json", code=code)
    assert ran.code == 2
    assert "pip install 'qmpvcpu[metrics]'" in ran.error["message"]


async def test_no_vms_named_is_bad_usage() -> None:
    ran = await run("exporter")
    assert ran.code == 2
    assert "--dir DIR" in ran.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_is_its_regular_end(number: signal.Signals, tmp_path: Path) -> None:
    async with MicroGuest() as guest:
        linked(tmp_path, guest)
        async with exporting("--dir", tmp_path) as exporter:
            await exporter.scrape()
            exporter.running.process.send_signal(number)
            assert (await exporter.running.end()).code == 0
        async with asyncio.timeout(5):  # it has let go of the socket
            assert (await run("list", "--qmp", guest.qmp)).code == 0


async def test_its_document_says_where_it_listened_and_how_often_it_was_asked(tmp_path: Path) -> None:
    ran = await run("exporter", "--dir", tmp_path, "--listen", "127.0.0.1:0", "--for", "0", "--json")
    assert ran.code == 0
    assert ran.document["listened"].startswith("127.0.0.1:")
    assert ran.document["requests"] == 0
    assert ran.err == f"metrics of 0 VMs at http://{ran.document['listened']}/metrics\n"


# What else speaks to it.


async def test_garbage_and_other_requests_get_an_answer_or_the_door(tmp_path: Path) -> None:
    async with exporting("--dir", tmp_path) as exporter:
        answers = {
            b"GET / HTTP/1.1\r\n\r\n": b"200 OK",
            b"GET /metrics?name[]=x HTTP/1.0\r\n\r\n": b"200 OK",
            b"HEAD /metrics HTTP/1.1\r\n\r\n": b"200 OK",
            b"GET /etc/passwd HTTP/1.1\r\n\r\n": b"404 Not Found",
            b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc": b"405 Method Not Allowed",
            b"\x16\x03\x01\x02\x00\x01\r\n\r\n": b"400 Bad Request",
            b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n": b"431 Request Header Fields Too Large",
        }
        for request, answer in answers.items():
            assert (await exporter.ask(request)).startswith(b"HTTP/1.1 " + answer), request
        head, _, body = (await exporter.ask(b"HEAD /metrics HTTP/1.1\r\n\r\n")).partition(b"\r\n\r\n")
        assert b"Content-Length: " in head
        assert body == b""
        assert (await exporter.scrape()).up == {}


async def test_prometheus_is_answered_in_the_format_that_it_asks_for(tmp_path: Path) -> None:
    async with exporting("--dir", tmp_path) as exporter:
        open_metrics = await exporter.ask(
            b"GET /metrics HTTP/1.1\r\naccept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n\r\n"
        )
        assert b"Content-Type: application/openmetrics-text; version=1.0.0" in open_metrics
        assert open_metrics.endswith(b"# EOF\n")
        assert b"Content-Type: text/plain; version=0.0.4" in await exporter.ask(GET)
        for nonsense in (b"application/openmetrics-text;version=abc", b";=,,;q=x", b"\xff;version=1.0.0"):
            answer = await exporter.ask(b"GET /metrics HTTP/1.1\r\naccept: " + nonsense + b"\r\n\r\n")
            assert b"Content-Type: text/plain; version=0.0.4" in answer


async def test_slow_clients_keep_nobody_waiting_and_are_bounded(tmp_path: Path) -> None:
    async with exporting("--dir", tmp_path) as exporter:

        async def status() -> bytes:
            return (await exporter.ask(GET)).partition(b"\r\n")[0]

        async def is_refused() -> bool:
            return await status() == b"HTTP/1.1 503 Service Unavailable"

        async def is_answered() -> bool:
            return await status() == b"HTTP/1.1 200 OK"

        with contextlib.ExitStack() as clients:
            slow = [clients.enter_context(exporter.connect()) for _ in range(63)]
            slow[0].send(b"GET /met")
            assert await is_answered()
            clients.enter_context(exporter.connect())
            await until(is_refused)
        await until(is_answered)


async def test_many_scrapes_at_once_are_one_reading(tmp_path: Path) -> None:
    async with guests(2) as vms, exporting("--dir", tmp_path) as exporter:
        linked(tmp_path, *vms)
        await scraped_until(exporter, vm0=1, vm1=1)
        pages = await asyncio.gather(*(exporter.ask(GET) for _ in range(50)))
        assert {page.partition(b"\r\n")[0] for page in pages} == {b"HTTP/1.1 200 OK"}
        assert len(set(pages)) < 25


async def test_a_client_that_goes_away_hurts_nobody(tmp_path: Path) -> None:
    async with exporting("--dir", tmp_path) as exporter:
        for _ in range(20):
            with exporter.connect() as client:
                client.send(GET)
                client.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )  # it ends with a reset
        assert (await exporter.scrape()).up == {}
        exporter.running.process.send_signal(signal.SIGTERM)
        ran = await exporter.running.end()
        assert (ran.code, ran.err) == (0, "")
