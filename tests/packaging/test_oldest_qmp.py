"""The wheel with the oldest qemu.qmp that it accepts."""

import pytest

from tests.packaging.conftest import Environment, oldest_accepted

PROGRAM = """
import asyncio
from importlib.metadata import version

import qmpvcpu
from qmpvcpu.testing import MicroGuest, Mood, ScriptedAgent


async def main():
    async with MicroGuest() as guest, ScriptedAgent() as agent, qmpvcpu.attach(guest.qmp, agent=agent.path) as vm:
        await vm.plug(3)
        agent.plugged(3)
        assert await vm.guest.set_online(3) == {3}
        await agent.turn(Mood.LATE)
        try:
            await vm.guest.set_offline(3, timeout=0.3)
        except qmpvcpu.AgentSilentError:
            await agent.turn(Mood.NORMAL)
        assert [cpu.online for cpu in await vm.guest.vcpus()] == [True, True]
        await vm.set_map("0,3-6")
        await vm.unplug(3)
        print(version("qemu.qmp"), vm.layout.enabled)


asyncio.run(main())
"""


@pytest.mark.qemu
def test_it_plugs_and_unplugs(with_oldest_qmp: Environment) -> None:
    ran = with_oldest_qmp.run("python", "-W", "error", "-c", PROGRAM)
    assert ran.stderr == ""
    assert ran.stdout == f"{oldest_accepted('qemu.qmp')} 0,4-6\n"
