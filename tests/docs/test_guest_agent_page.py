"""The page about the guest's agent: its port is one that QEMU takes, and its programs run."""

import asyncio
import shlex
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu.testing import MicroGuest, ScriptedAgent
from tests.docs.blocks import block

pytestmark = pytest.mark.qemu


async def test_qemu_takes_the_port_and_the_program_asks_over_it(tmp_path: Path) -> None:
    arguments = shlex.split(block("docs/guest-agent.md", "the port").text)
    path = tmp_path / "agent"
    extra = [each.replace("/run/vm.agent", str(path)) for each in arguments]
    async with MicroGuest(extra_args=extra) as guest, qmpvcpu.attach(guest.qmp, agent=path) as vm:
        with pytest.raises(qmpvcpu.AgentSilentError) as caught:
            await vm.guest.vcpus(timeout=1)
        assert caught.value.port_open is False


async def test_the_program_brings_a_vcpu_online() -> None:
    program = block("docs/guest-agent.md", "asking the guest").module()
    async with MicroGuest() as guest, ScriptedAgent((0,)) as agent:
        agent.plugged(3)
        assert await program.bring_online(str(guest.qmp), agent.path) == [(0, 0, True), (3, 3, True)]


def test_the_test_passes() -> None:
    asyncio.run(block("docs/guest-agent.md", "a test").module().test_a_refusal_is_told())
