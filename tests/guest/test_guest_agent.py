"""The agent in the Linux guest is a real one: it answers, stops, starts again, and forbids what it is told to."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.qemu import Accelerator, QemuProcessError
from tests.guest.test_linux_guest import raw_vm

pytestmark = [pytest.mark.guest, pytest.mark.asyncio(loop_scope="module")]

SILENT = 0.5  # s: an agent answers within 0.1


class RawAgent:
    """The agent through nothing but its socket, so that the guest is tested and not the package."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, command: str, **arguments: Any) -> Any:
        """What the agent answers next, after this was asked."""
        self._writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        return await self.hear()

    async def hear(self, seconds: float = 10) -> Any:
        """What the agent says next."""
        async with asyncio.timeout(seconds):
            return json.loads(await self._reader.readline())

    async def is_silent(self) -> bool:
        """Whether the agent says nothing for a while."""
        with contextlib.suppress(TimeoutError):
            await self.hear(SILENT)
            return False
        return True


@contextlib.asynccontextmanager
async def raw_agent(guest: LinuxGuest) -> AsyncIterator[RawAgent]:
    reader, writer = await asyncio.open_unix_connection(guest.agent)
    try:
        yield RawAgent(reader, writer)
    finally:
        writer.close()


async def test_it_answers_once_the_guest_is_up(shared_guest: LinuxGuest, kernel: str) -> None:
    async with raw_agent(shared_guest) as agent:
        assert await agent.ask("guest-sync", id=7) == {"return": 7}
        system = (await agent.ask("guest-get-osinfo"))["return"]
        assert system["id"] == "qmpvcpu"
        assert system["kernel-release"].startswith(f"{kernel}.")


async def test_it_takes_a_cpu_offline_and_brings_it_online(shared_guest: LinuxGuest) -> None:
    async with raw_agent(shared_guest) as agent:
        for online in (False, True):
            done = await agent.ask("guest-set-vcpus", vcpus=[{"logical-id": 1, "online": online}])
            assert done == {"return": 1}
            assert (1 in await shared_guest.online()) == online
            listed = (await agent.ask("guest-get-vcpus"))["return"]
            assert {cpu["logical-id"]: cpu["online"] for cpu in listed} == {0: True, 1: online}


async def test_it_brings_a_plugged_cpu_online_that_linux_leaves_offline(shared_guest: LinuxGuest) -> None:
    await shared_guest.set_auto_online(False)
    async with raw_agent(shared_guest) as agent, raw_vm(shared_guest) as vm:
        await vm.plug(2)
        await vm.answer_to_plug(2)
        listed = (await agent.ask("guest-get-vcpus"))["return"]
        assert {cpu["logical-id"]: cpu["online"] for cpu in listed} == {0: True, 1: True, 2: False}
        assert await agent.ask("guest-set-vcpus", vcpus=[{"logical-id": 2, "online": True}]) == {"return": 1}
        assert len(await shared_guest.online()) == 3
        await vm.request_unplug(2)
        assert await vm.unplug_answer(2) == 0
    await shared_guest.set_auto_online(True)


async def test_a_cpu_that_is_reserved_is_refused_to_it(shared_guest: LinuxGuest) -> None:
    await shared_guest.refuse()
    async with raw_agent(shared_guest) as agent:
        wish = {"vcpus": [{"logical-id": 1, "online": False}]}
        assert "Device or resource busy" in (await agent.ask("guest-set-vcpus", **wish))["error"]["desc"]
        await shared_guest.comply()
        assert await agent.ask("guest-set-vcpus", **wish) == {"return": 1}
        wish = {"vcpus": [{"logical-id": 1, "online": True}]}
        assert await agent.ask("guest-set-vcpus", **wish) == {"return": 1}


async def test_paused_it_is_silent_and_answers_once_it_resumes(shared_guest: LinuxGuest) -> None:
    await shared_guest.pause_agent()
    async with raw_agent(shared_guest) as agent:
        asking = asyncio.create_task(agent.ask("guest-sync", id=8))
        await asyncio.sleep(SILENT)
        assert not asking.done()
        await shared_guest.resume_agent()
        assert await asking == {"return": 8}


async def test_stopped_its_port_is_closed_until_it_starts_again(shared_guest: LinuxGuest) -> None:
    async def is_open() -> bool:
        chardevs: Any = await vm.client.execute("query-chardev")
        return bool(next(chardev["frontend-open"] for chardev in chardevs if chardev["label"] == "agent"))

    async with raw_vm(shared_guest) as vm:
        assert await is_open()
        await shared_guest.stop_agent()
        assert not await is_open()
        await shared_guest.stop_agent()
        async with raw_agent(shared_guest) as agent:
            asking = asyncio.create_task(agent.ask("guest-sync", id=9))
            await asyncio.sleep(SILENT)
            assert not asking.done()
            await shared_guest.start_agent()
            assert await is_open()
            assert await asking == {"return": 9}


async def test_it_forbids_what_it_is_told_to_forbid(shared_guest: LinuxGuest) -> None:
    await shared_guest.start_agent(blocks=["guest-file-open", "guest-set-vcpus"])
    async with raw_agent(shared_guest) as agent:
        info = (await agent.ask("guest-info"))["return"]
        forbidden = {command["name"] for command in info["supported_commands"] if not command["enabled"]}
        assert forbidden >= {"guest-file-open", "guest-set-vcpus"}  # and what it has on another OS only
        answer = await agent.ask("guest-file-open", path="/etc/os-release")
        assert answer["error"]["class"] == "CommandNotFound"
        await shared_guest.start_agent()
        assert "return" in await agent.ask("guest-file-open", path="/etc/os-release")


@pytest.mark.parametrize("blocks", ["guest-ping", ["guest ping"]])
async def test_what_is_no_list_of_commands_is_told(blocks: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"guest-ping|'guest ping' is no command of the agent"):
        LinuxGuest(agent_blocks=blocks)


async def test_a_guest_begins_with_the_agent_that_it_is_told_to(qemu: Path, accel: Accelerator, kernel: str) -> None:
    async with LinuxGuest(qemu, accel=accel, kernel=kernel, agent_runs=False) as guest, raw_agent(guest) as agent:
        assert await agent.is_silent()
    blocks = ["guest-file-open", "guest-file-read"]
    async with LinuxGuest(qemu, accel=accel, kernel=kernel, agent_blocks=blocks) as guest, raw_agent(guest) as agent:
        assert (await agent.ask("guest-file-open", path="/init"))["error"]["class"] == "CommandNotFound"


async def test_a_linux_without_virtio_serial_has_no_agent(qemu: Path, accel: Accelerator, kernel: str) -> None:
    # As a module, and built in.
    without = "module_blacklist=virtio_console initcall_blacklist=virtio_console_init"
    async with LinuxGuest(qemu, accel=accel, kernel=kernel, kernel_options=without) as guest:
        await guest.ping()
        with pytest.raises(QemuProcessError, match="Linux started no agent"):
            await guest.start_agent()
