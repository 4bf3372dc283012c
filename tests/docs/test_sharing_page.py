import importlib.util
import re
import shlex
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from qemu.qmp import QMPClient, Runstate

import qmpvcpu
from qmpvcpu.testing import MicroGuest, QemuProcess, best_qemu
from tests.cli.running import run

PAGE = (Path(__file__).parents[2] / "docs" / "sharing.md").read_text()
LIBVIRT = "{http://libvirt.org/schemas/domain/qemu/1.0}"

pytestmark = pytest.mark.qemu


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@asynccontextmanager
async def started_with(arguments: list[str], directory: Path) -> AsyncIterator[list[Path]]:
    """A QEMU with the monitors of *arguments*, which have their sockets in *directory*."""
    moved = [re.sub(r"/(?:\w+/)+(?=vm\.qmp)", f"{directory}/", each) for each in arguments]
    async with QemuProcess(best_qemu(), ["-machine", "q35", "-S", "-smp", "1,maxcpus=4,sockets=4", *moved]) as qemu:
        await qemu.wait_ready()
        yield sorted(directory.glob("vm.qmp*"))


@pytest.mark.parametrize("number", [0, 1])
async def test_two_monitors_serve_two_clients_at_once(number: int, tmp_path: Path) -> None:
    _, *arguments = shlex.split(blocks("sh")[number].replace("\\\n", ""))
    async with started_with(arguments, tmp_path) as (one, two), qmpvcpu.attach(one) as vm:
        assert (await run("plug", "2", "--qmp", two)).code == 0
        assert (await vm.refresh()).enabled == {0, 2}


async def test_what_libvirt_passes_through_is_a_monitor(tmp_path: Path) -> None:
    (document,) = blocks("xml")
    arguments = [each.get("value", "") for each in ET.fromstring(document).iter(f"{LIBVIRT}arg")]  # noqa: S314 - ours
    async with started_with(arguments, tmp_path) as (path,), qmpvcpu.attach(path) as vm:
        assert vm.layout.enabled == {0}


async def test_a_client_that_is_lent_is_given_back() -> None:
    (example,) = blocks("python")
    spec = importlib.util.spec_from_loader("example", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    exec(example, module.__dict__)  # noqa: S102 - the page's own
    client = QMPClient("vmm")
    async with MicroGuest() as guest:
        await client.connect(str(guest.qmp))
        await module.resize(client, "0,3")
        assert client.runstate is Runstate.RUNNING
        await client.disconnect()


@pytest.mark.parametrize("command", [("doctor",), ("list",)])
async def test_who_waits_for_a_held_socket_is_told_of_the_page(guest: MicroGuest, command: tuple[str, ...]) -> None:
    with socket.socket(socket.AF_UNIX) as holder:
        holder.connect(str(guest.qmp))
        ran = await run(*command, "--timeout", "1", "--qmp", guest.qmp)
    assert ran.code == 3
    assert "another client" in ran.out + ran.err
    assert "docs/sharing.md" in ran.out + ran.err


@pytest.fixture
async def guest() -> AsyncIterator[MicroGuest]:
    async with MicroGuest(boot=2) as guest:
        yield guest
