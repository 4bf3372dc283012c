"""What plans and denials know of a guest once its agent has said what system it runs."""

import asyncio

import pytest

from qmpvcpu import AgentSilentError, DenialReason, StepDeniedError, VcpuController
from qmpvcpu.events import VmReset
from qmpvcpu.testing import Mood, ScriptedAgent
from tests.agent.test_guest import guest
from tests.controller.vms import other_client, until

pytestmark = pytest.mark.qemu

# In the shape of QEMU's qga/commands-win32.c; no Windows was at hand.
SERVER = {
    "id": "mswindows",
    "name": "Microsoft Windows",
    "pretty-name": "Windows Server 2022 Standard",
    "version": "Microsoft Windows Server 2022",
    "version-id": "2022",
    "variant": "server",
    "variant-id": "server",
    "kernel-version": "10.0",
    "kernel-release": "20348",
    "machine": "x86_64",
}
CLIENT = {**SERVER, "pretty-name": "Windows 10 Pro", "version-id": "10", "variant": "client", "variant-id": "client"}


def runs(agent: ScriptedAgent, system: dict[str, str]) -> None:
    """Have the guest run another system: a Windows has no files of Linux, and changes no CPU."""
    missing = RuntimeError("failed to open file: The system cannot find the path specified.")
    agent.answers |= {"guest-get-osinfo": system, "guest-file-open": missing}


def warnings(vm: VcpuController, target: str) -> str:
    return "\n".join(vm.plan(target).warnings)


async def test_windows_is_asked_for_no_vcpu_once_its_agent_has_told() -> None:
    async with guest() as (agent, vm, _):
        runs(agent, SERVER)
        await vm.plug(3)
        assert vm.plan("0").denied == ()  # nothing is known of the guest yet
        assert (await vm.guest.os()).full_name == "Windows Server 2022 Standard"
        (denied,) = vm.plan("0").denied
        assert denied.reason is DenialReason.GUEST_CANNOT_UNPLUG
        for change in (
            vm.unplug(3),
            vm.request_unplug(3),
            vm.set_state(3, enabled=False),
            vm.set_map("0"),
            vm.set_count(1, allow_fatal=True),
        ):
            with pytest.raises(StepDeniedError, match="Windows, which releases no vCPU") as caught:
                await change
            assert caught.value.reason is DenialReason.GUEST_CANNOT_UNPLUG
        assert vm.layout.pending == set()
        assert await vm.plug(4) == {4}


@pytest.mark.parametrize(("system", "warned"), [(SERVER, False), (CLIENT, True)])
async def test_an_edition_of_windows_that_takes_no_vcpu_is_warned_of(system: dict[str, str], warned: bool) -> None:
    async with guest() as (agent, vm, _):
        runs(agent, system)
        await vm.guest.os()
        assert ("Windows 10 Pro sees a new vCPU at its next boot" in warnings(vm, "0-1")) is warned
        assert await vm.plug(1) == {1}


async def test_another_system_may_start_at_a_reset() -> None:
    async with guest() as (agent, vm, micro):
        runs(agent, SERVER)
        await vm.plug(3)
        await vm.guest.os()
        stream = vm.events()
        async with other_client(micro) as other:
            await other.execute("system_reset")
            await asyncio.wait_for(until(stream, VmReset), 5)
        await micro.wait_ready()
        assert await vm.unplug(3) == {3}


async def test_the_list_before_an_offline_first_tells_windows_too() -> None:
    async with guest() as (agent, vm, _):
        runs(agent, SERVER)
        await vm.plug(3)
        with pytest.raises(StepDeniedError) as caught:
            await vm.unplug(3, offline_first=True)
        assert caught.value.reason is DenialReason.GUEST_CANNOT_UNPLUG


async def test_a_guest_whose_agent_answers_does_not_boot() -> None:
    async with guest((0,)) as (agent, vm, micro):
        async with other_client(micro) as other:
            await other.execute("stop")
        await vm.refresh()
        await vm.plug(2)
        assert "the guest has answered nothing about a vCPU since it started" in warnings(vm, "0")
        await agent.turn(Mood.SILENT)
        with pytest.raises(AgentSilentError):
            await vm.guest.os(timeout=0.2)
        assert "the guest has answered nothing about a vCPU since it started" in warnings(vm, "0")
        await agent.turn(Mood.NORMAL)
        await vm.guest.vcpus()
        assert "the guest has answered nothing" not in warnings(vm, "0")


async def test_a_kernel_that_is_known_to_need_no_hypervisor_ends_the_warning() -> None:
    async with guest(rule="arrival", accel="tcg") as (agent, vm, _):
        assert "Linux does not see TCG as a hypervisor" in warnings(vm, "0-1")
        assert (await vm.guest.os()).kernel == "6.1.0-40-amd64"
        assert "Linux does not see TCG as a hypervisor" not in warnings(vm, "0-1")
        agent.kernel = "6.12.77+deb13-amd64"
        await vm.guest.os()
        assert "Linux does not see TCG as a hypervisor" in warnings(vm, "0-1")
