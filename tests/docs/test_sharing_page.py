"""What the page on sharing a VM says is so."""

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
from tests.docs.blocks import Block, block

LIBVIRT = "{http://libvirt.org/schemas/domain/qemu/1.0}"

pytestmark = pytest.mark.qemu


@asynccontextmanager
async def started_with(arguments: list[str], directory: Path) -> AsyncIterator[list[Path]]:
    """A QEMU with the monitors of *arguments*, which have their sockets in *directory*."""
    moved = [re.sub(r"/(?:\w+/)+(?=vm\.qmp)", f"{directory}/", each) for each in arguments]
    async with QemuProcess(best_qemu(), ["-machine", "q35", "-S", "-smp", "1,maxcpus=4,sockets=4", *moved]) as qemu:
        await qemu.wait_ready()
        yield sorted(directory.glob("vm.qmp*"))


@pytest.mark.parametrize(
    "shown",
    [block("docs/sharing.md", "two monitors"), block("docs/sharing.md", "two monitors, written out")],
    ids=["in short", "written out"],
)
async def test_two_monitors_serve_two_clients_at_once(shown: Block, tmp_path: Path) -> None:
    _, *arguments = shlex.split(shown.text.replace("\\\n", ""))
    async with started_with(arguments, tmp_path) as (one, two), qmpvcpu.attach(one) as vm:
        assert (await run("plug", "2", "--qmp", two)).code == 0
        assert (await vm.refresh()).enabled == {0, 2}


async def test_what_libvirt_passes_through_is_a_monitor(tmp_path: Path) -> None:
    document = block("docs/sharing.md", "arguments that libvirt passes through").text
    arguments = [each.get("value", "") for each in ET.fromstring(document).iter(f"{LIBVIRT}arg")]  # noqa: S314 - ours
    async with started_with(arguments, tmp_path) as (path,), qmpvcpu.attach(path) as vm:
        assert vm.layout.enabled == {0}


async def test_a_client_that_is_lent_is_given_back() -> None:
    module = block("docs/sharing.md", "a client that is lent").module()
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
        ran = await run(*command, "--reply-timeout", "1", "--qmp", guest.qmp)
    assert ran.code == 3
    assert "another client" in ran.out + ran.err
    assert "docs/sharing.md" in ran.out + ran.err


@pytest.fixture
async def guest() -> AsyncIterator[MicroGuest]:
    async with MicroGuest(boot=2) as guest:
        yield guest
