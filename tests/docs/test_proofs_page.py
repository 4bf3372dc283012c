"""The page about proofs: its programs, against a guest whose agent says what it is to say."""

import pytest

import qmpvcpu
from qmpvcpu.testing import MicroGuest, Mood, ScriptedAgent
from tests.docs.blocks import block

pytestmark = pytest.mark.qemu


async def test_a_vcpu_that_the_guest_leaves_offline_is_brought_online() -> None:
    program = block("docs/proofs.md", "a vCPU that works").module()
    async with MicroGuest() as guest, ScriptedAgent((0,)) as agent:
        agent.plugged(3, online=False)
        assert (await program.add(str(guest.qmp), agent.path)).startswith("online since ")


async def test_a_guest_that_refuses_before_qemu_is_asked_leaves_nothing_pending() -> None:
    program = block("docs/proofs.md", "an unplug that can be taken back").module()
    async with MicroGuest(boot=[0, 5]) as guest, ScriptedAgent((0, 5)) as agent:
        await agent.turn(Mood.REFUSING)
        said = await program.remove(str(guest.qmp), agent.path)
        assert said.startswith("kept, nothing is pending: ")
        assert said.endswith("Device or resource busy (EBUSY)")
        async with qmpvcpu.attach(guest.qmp) as vm:
            assert not vm.layout.pending
        await agent.turn(Mood.NORMAL)
        assert await program.remove(str(guest.qmp), agent.path) == "gone"
