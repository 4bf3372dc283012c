"""The demo of many hosts, as people start it."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from qmpvcpu.testing.netns import can_make_namespaces
from tests.cli.running import Ran, environment, on_terminal, run, running
from tests.waiting import until

pytestmark = pytest.mark.qemu

FORTH = ["device_add vcpu4", "device_add vcpu5", "device_del vcpu3"]


def check_story(ran: Ran) -> None:
    assert ran.code == 0, ran
    document = ran.document
    assert (document["as_expected"], document["differences"]) == (True, [])
    found = [step["found"] for step in document["steps"]]
    assert len(found) == 10
    assert found[-2:] == [
        "never more than 3 VMs at once, and 1 of a host",
        "0 lost, 0 twice, of 23 requests to 9 QEMUs",
    ]
    vms = {f"{vm['host']}/{vm['vm']}": vm for vm in document["vms"]}
    refused, late, dead = vms["rack1-b/web2"], vms["rack2-a/web2"], vms["rack2-a/db1"]
    assert (refused["code"], refused["why"], refused["map"]) == (1, "refused: device is busy", "0,2-3")
    assert refused["asked"][:3] == FORTH
    assert sorted(refused["asked"][3:]) == ["device_del vcpu4", "device_del vcpu5"]
    assert (late["code"], late["why"], late["asked"], late["host_is_dead"]) == (3, "not begun in time", [], True)
    assert (dead["code"], dead["asked"], dead["host_is_dead"]) == (0, FORTH, True)
    by = {name: vm["begun_by"] for name, vm in vms.items()}
    assert {by[f"{host}/db1"] for host in ("rack1-a", "rack1-b", "rack2-a")} == {"fleet of alice"}
    assert {by[name] for name in by if not name.endswith("/db1")} == {"campaign run of bob"}
    assert sum(vm["twice"] for vm in vms.values()) == 0


@pytest.mark.skipif(not can_make_namespaces(), reason="no network namespaces here")
async def test_a_refusal_a_dead_host_and_a_killed_controller_are_shown_on_hosts_of_their_own() -> None:
    ran = await run("hosts", "demo", "--json", within=180)
    check_story(ran)
    assert ran.document["hosts_are"] == "namespaces"


async def test_hosts_are_directories_where_that_is_wanted_and_people_see_lines() -> None:
    ran = await run("hosts", "demo", "--no-namespaces", within=180)
    assert ran.code == 0, ran
    assert "Each host is a directory" in ran.out
    assert ran.out.count("as expected: ") == 10
    for words in (
        "kill -9 ",
        "rack1-b/web2  [0][ ][2][3][ ][ ]  refused: device is busy",
        "rack2-a/web1  [0][ ][2][3][ ][ ]  not begun in time; its host is dead",
        "as expected: 0 lost, 0 twice, of 23 requests to 9 QEMUs",
        "docs/fleet.md",
    ):
        assert words in ran.out
    table = ran.out.partition("host/VM")[2]
    for host in ("rack1-a", "rack1-b", "rack2-a"):
        assert [line.split()[0] for line in table.splitlines() if line.startswith(host)] == [
            f"{host}/{vm}" for vm in ("db1", "web1", "web2")
        ]


async def test_what_goes_otherwise_than_expected_ends_it_and_is_named() -> None:
    other = (
        "from qmpvcpu.testing import hostsdemo\n"
        "hostsdemo._BEFORE, hostsdemo._PATIENCE_S = hostsdemo.VcpuMap.parse('0,2'), 1.0"
    )
    ran = await run("hosts", "demo", "--json", "--no-namespaces", code=other, within=120)
    assert ran.code == 1
    assert ran.document["as_expected"] is False
    (step,) = ran.document["steps"]
    assert step["expected"] == "3 hosts have an agent; 9 VMs have the vCPUs 0,2"
    (difference,) = ran.document["differences"]
    assert step["found"] in difference


@pytest.mark.parametrize("namespaces", [(), ("--no-namespaces",)])
async def test_one_that_is_stopped_leaves_nothing_behind(tmp_path: Path, namespaces: tuple[str, ...]) -> None:
    env = environment(TMPDIR=str(tmp_path))
    async with running("hosts", "demo", "--json", *namespaces, env=env) as it:
        await until(lambda: len(list(tmp_path.glob("qmpvcpu-*/*/vms/*.qmp"))) > 3, within=120)
        started = pids_in(tmp_path)
        assert started
        it.process.send_signal(signal.SIGINT)
        ran = await it.end(within=120)
    assert (ran.code, ran.error["message"]) == (130, "stopped by SIGINT")
    assert list(tmp_path.iterdir()) == []
    assert pids_in(tmp_path) == []


async def test_one_that_is_killed_takes_its_processes_along(tmp_path: Path) -> None:
    async with running("hosts", "demo", "--json", "--no-namespaces", env=environment(TMPDIR=str(tmp_path))) as it:
        await until(lambda: len(list(tmp_path.glob("qmpvcpu-*/*/vms/*.qmp"))) > 3, within=120)
        assert len(pids_in(tmp_path)) > 3
        it.process.send_signal(signal.SIGKILL)
        await until(lambda: not pids_in(tmp_path), within=60)


def pids_in(directory: Path) -> list[str]:
    """The processes whose command line, or working directory, is about *directory*."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            said = (process / "cmdline").read_bytes() if process.name.isdigit() else b""
            if os.fsencode(directory) in said or (said and (process / "cwd").readlink().is_relative_to(directory)):
                found.append(process.name)
    return found


@pytest.mark.parametrize(
    ("variables", "code", "kind", "words"),
    [
        ({"QMPVCPU_NATS_SERVER": "/none"}, "", "NatsNotFoundError", "QMPVCPU_NATS_SERVER=/none"),
        ({"PATH": "/none", "QMPVCPU_CACHE": "/none"}, "", "QemuNotFoundError", "qemu-system-x86_64"),
        ({}, "sys.modules['nats'] = None", "UnfitServerError", "pip install 'qmpvcpu[hosts]'"),
    ],
)
async def test_what_is_missing_is_named_with_what_to_install(
    variables: dict[str, str], code: str, kind: str, words: str
) -> None:
    ran = await run("hosts", "demo", "--no-namespaces", "--json", env=environment(**variables), code=code)
    assert (ran.code, ran.error["kind"]) == (2, kind)
    assert words in ran.error["message"]


async def test_a_qemu_that_is_none_is_shown_with_its_words(tmp_path: Path) -> None:
    impostor = tmp_path / "qemu"
    impostor.write_text("#!/bin/sh\necho 'I am a teapot' >&2\nexit 7\n")
    impostor.chmod(0o755)
    ran = await run("hosts", "demo", "--no-namespaces", "--json", "--qemu", impostor)
    assert (ran.code, ran.error["kind"]) == (3, "QemuStartError")
    assert "I am a teapot" in ran.error["stderr"]


async def test_a_narrow_terminal_shows_all_of_it() -> None:
    async with on_terminal("hosts", "demo", "--no-namespaces", columns=60, lines=100) as it:
        assert await it.end(within=180) == 0
    assert "…" not in str(it.screen)
    assert str(it.screen).count("as expected: ") == 10
