"""A fleet's guest agents: where they are, and what they do for each VM."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qmpvcpu import Proof
from qmpvcpu.errors import AgentConnectError, StepDeniedError
from qmpvcpu.fleet import Fleet
from qmpvcpu.fleet.scan import agent_socket, check_agent_pattern
from qmpvcpu.testing import MicroGuest, ScriptedAgent
from tests.fleet.vms import guests

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("{dir}/{stem}.agent", "/run/vms/a.b.agent"),
        ("{dir}/{name}.agent", "/run/vms/a.b.qmp.agent"),
        ("/run/agents/{stem}", "/run/agents/a.b"),
    ],
)
def test_a_pattern_names_an_agent_for_each_vm(pattern: str, path: str) -> None:
    check_agent_pattern(pattern)
    assert agent_socket(pattern, Path("/run/vms/a.b.qmp")) == Path(path)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [("/run/agent", "all VMs would have one agent"), ("{dir}/{vm}", "{vm} is unknown"), ("", "one agent")],
)
def test_a_pattern_that_cannot_be_meant_is_a_value_error(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Fleet(agent=pattern)


@pytest.fixture
async def vms() -> AsyncIterator[list[MicroGuest]]:
    async with guests(2) as started:
        yield started


@pytest.fixture
async def agents(vms: list[MicroGuest]) -> AsyncIterator[list[ScriptedAgent]]:
    """An agent for each VM, next to its QMP socket."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                ScriptedAgent(vcpus=(0, 1), look=lambda: (0, 1, 5), path=agent_socket("{dir}/{stem}.agent", vm.qmp))
            )
            for vm in vms
        ]


async def test_each_vm_is_proven_by_its_own_agent(vms: list[MicroGuest], agents: list[ScriptedAgent]) -> None:
    async with Fleet([each.qmp for each in vms], agent="{dir}/{stem}.agent") as fleet:
        reports = [each.unwrap() for each in await fleet.set_map("0-1,5", proof=Proof.ONLINE, timeout=5)]
        assert [report.steps[0].proofs is not None and report.steps[0].proofs.online for report in reports]
        assert [each.is_online(5) for each in agents] == [True, True]
        await fleet.set_map("0-1", offline_first=True)
        assert [each.is_online(5) for each in agents] == [False, False]


async def test_an_agent_is_given_to_those_vms_that_a_function_has_one_for(
    vms: list[MicroGuest], agents: list[ScriptedAgent]
) -> None:
    with_agent = f"unix:{vms[0].qmp}"
    async with Fleet([each.qmp for each in vms], agent={with_agent: agents[0].path}.get) as fleet:
        proven, denied = await fleet.set_map("0-1,5", proof=Proof.ONLINE, timeout=5)
    assert proven.error is None
    assert isinstance(denied.error, StepDeniedError)


async def test_an_agent_that_is_no_address_is_the_error_of_its_vm(vms: list[MicroGuest]) -> None:
    async with Fleet([each.qmp for each in vms], agent=lambda _: "tcp:nowhere") as fleet:
        assert [type(each.error) for each in await fleet.attach()] == [AgentConnectError] * 2


async def test_sockets_of_agents_in_the_directory_are_no_vms(
    vms: list[MicroGuest], agents: list[ScriptedAgent]
) -> None:
    directory = vms[0].qmp.parent
    assert Path(agents[0].path).parent == directory
    async with Fleet(directory=directory, pattern="qmp0*", agent="{dir}/{stem}.agent") as fleet:
        assert fleet.addresses == (f"unix:{vms[0].qmp}",)
    async with Fleet(directory=directory, pattern="qmp0*", agent=lambda _: agents[0].path) as fleet:
        assert fleet.addresses == (f"unix:{vms[0].qmp}",)
