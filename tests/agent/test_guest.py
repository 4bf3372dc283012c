"""vm.guest: a real QEMU whose guest's agent is scripted, so that both tell the same story, or not."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import (
    AgentSilentError,
    GuestRefusedError,
    InvalidMapError,
    KnownBy,
    MonitorConnectError,
    Outcome,
    QmpVcpuError,
    VcpuController,
    VcpuMap,
)
from qmpvcpu.errors import (
    AgentConnectError,
    AgentForbiddenError,
    AgentLostError,
    GuestNumberUnknownError,
    MalformedAnswerError,
)
from qmpvcpu.events import VmReset
from qmpvcpu.testing import MicroGuest, Mood, ScriptedAgent, ScriptedPeer
from tests.controller.vms import other_client, until
from tests.waiting import until as met

pytestmark = pytest.mark.qemu


@contextlib.asynccontextmanager
async def guest(
    vcpus: tuple[int, ...] = (0,),
    *,
    follows: bool = True,
    accel: Any = None,
    attach: dict[str, Any] | None = None,
    **agent: Any,
) -> AsyncIterator[tuple[ScriptedAgent, VcpuController, MicroGuest]]:
    """Start a VM, and an agent that has the CPUs of its guest."""
    followed: list[VcpuController] = []

    def look() -> VcpuMap:
        return followed[0].layout.enabled

    async with (
        MicroGuest(accel=accel, qmp_sockets=2) as micro,
        ScriptedAgent(vcpus, look=look if follows else None, **agent) as scripted,
        qmpvcpu.attach(micro.qmp, agent=scripted.path, **(attach or {})) as vm,
    ):
        followed.append(vm)
        yield scripted, vm, micro


def numbers(vcpus: tuple[qmpvcpu.GuestVcpu, ...]) -> dict[int, int | None]:
    return {each.number: each.vcpu for each in vcpus}


async def test_without_an_agent_each_call_says_how_to_give_one() -> None:
    async with MicroGuest() as micro, qmpvcpu.attach(micro.qmp) as vm:
        assert not vm.guest.has_agent
        for call in (vm.guest.vcpus(), vm.guest.set_online(1), vm.guest.set_offline(1), vm.guest.os()):
            with pytest.raises(AgentConnectError, match=r"no agent was given .attach\(agent=ADDRESS\)"):
                await call


@pytest.mark.parametrize("rule", ["arrival", "fixed"])
async def test_numbers_are_those_of_the_guests_files_whatever_its_kernel(rule: Any) -> None:
    async with guest(rule=rule) as (agent, vm, _):
        assert vm.guest.has_agent
        assert numbers(await vm.guest.vcpus()) == {0: 0}
        await vm.set_map("0,2,5,7")
        expected = {"arrival": {0: 0, 1: 2, 2: 5, 3: 7}, "fixed": {0: 0, 2: 2, 5: 5, 7: 7}}[rule]
        listed = await vm.guest.vcpus()
        assert numbers(listed) == expected
        assert {each.known_by for each in listed} == {KnownBy.FIRMWARE}
        assert [each.online for each in listed] == [True, False, False, False]
        await vm.set_map("0,5")
        assert set(numbers(await vm.guest.vcpus()).values()) == {0, 5}
        assert agent.is_online(0)


async def test_vcpus_go_online_and_offline_by_their_ids() -> None:
    async with guest(rule="arrival") as (agent, vm, _):
        await vm.set_map("0,3,5")
        assert await vm.guest.set_online([3, 5]) == {3, 5}
        assert agent.is_online(3)
        assert agent.is_online(5)
        assert await vm.guest.set_online("3,5") == VcpuMap()
        assert await vm.guest.set_offline(VcpuMap([5])) == {5}
        assert not agent.is_online(5)
        assert await vm.guest.set_offline(5) == VcpuMap()
        assert await vm.guest.set_offline("3") == {3}
        assert vm.layout.enabled == {0, 3, 5}


async def test_files_are_read_once_a_boot() -> None:
    async with guest() as (agent, vm, _):
        await vm.set_map("0,2,5")
        await vm.guest.vcpus()
        agent.received.clear()
        await vm.guest.vcpus()
        assert agent.received.count("guest-file-open") == 1  # the boot's id
        await vm.unplug(5)
        await vm.plug(5)
        agent.received.clear()
        await vm.guest.vcpus()
        assert agent.received.count("guest-file-open") == 2


async def test_a_guest_that_boots_anew_without_a_reset_is_asked_anew() -> None:
    async with guest((0, 1), follows=False) as (agent, vm, _):
        await vm.plug(1)
        assert numbers(await vm.guest.vcpus()) == {0: 0, 1: 1}
        agent.reboot([0, 1])
        agent.cpus[4] = agent.cpus.pop(1)
        agent.cpus[1] = agent.cpus.pop(0)
        agent.cpus[0] = agent.cpus.pop(4)
        assert numbers(await vm.guest.vcpus()) == {0: 1, 1: 0}


async def test_a_reset_makes_all_numbers_void() -> None:
    async with guest(rule="arrival") as (agent, vm, micro):
        await vm.plug(5)
        assert numbers(await vm.guest.vcpus()) == {0: 0, 1: 5}
        await vm.plug(2)
        assert numbers(await vm.guest.vcpus()) == {0: 0, 1: 5, 2: 2}
        events = vm.events()
        async with other_client(micro) as other:
            await other.execute("system_reset")
        await until(events, VmReset)
        agent.reboot([0, 2, 5])
        assert numbers(await vm.guest.vcpus()) == {0: 0, 1: 2, 2: 5}


# An agent that may read no files.


async def test_without_files_a_number_is_learnt_around_a_plug() -> None:
    async with guest(rule="arrival") as (agent, vm, _):
        await agent.turn(Mood.FORBIDDING)
        assert [(each.vcpu, each.known_by) for each in await vm.guest.vcpus()] == [(0, KnownBy.RULE)]
        await vm.plug(5)
        assert [(each.vcpu, each.known_by) for each in await vm.guest.vcpus()][1:] == [(5, KnownBy.LEARNT)]
        await vm.plug(3)
        await vm.guest.set_online(3)
        assert agent.is_online(3)
        assert not agent.is_online(5)


async def test_without_files_what_is_not_known_is_not_guessed() -> None:
    async with guest(rule="arrival") as (agent, vm, _):
        await agent.turn(Mood.FORBIDDING)
        await vm.set_map("0,3,5")
        assert [each.vcpu for each in await vm.guest.vcpus()] == [0, None, None]
        with pytest.raises(GuestNumberUnknownError, match="vCPUs 3,5 in the guest") as caught:
            await vm.guest.set_online([3, 5])
        assert caught.value.ids == {3, 5}
        assert "nothing says which of the guest's CPUs it is" in caught.value.why
        assert "does not list" not in str(caught.value)
        assert "let the agent read files" in caught.value.hint
        assert agent.changes == []


async def test_a_vcpu_that_is_not_plugged_has_no_number() -> None:
    async with guest() as (agent, vm, _):
        with pytest.raises(
            GuestNumberUnknownError, match="CPU number of vCPU 4 in the guest is unknown: it is not plugged"
        ):
            await vm.guest.set_online(4)
        with pytest.raises(
            GuestNumberUnknownError, match="number of vCPU 100 in the guest is unknown: this machine has 0 to 7"
        ):
            await vm.guest.set_offline("0,100")
        assert agent.changes == []


async def test_a_vcpu_that_the_guest_has_not_found_has_no_number() -> None:
    async with guest(follows=False) as (agent, vm, _):
        await vm.plug(3)
        with pytest.raises(GuestNumberUnknownError, match="the guest does not list it"):
            await vm.guest.set_online(3, timeout=0.3)
        with pytest.raises(GuestNumberUnknownError, match="the guest does not list it") as caught:
            await vm.guest.set_offline(3)
        assert "unplug it without offline_first=True" in caught.value.hint
        assert "nothing says" not in str(caught.value)
        agent.plugged(3)
        assert await vm.guest.set_online(3) == {3}


async def test_a_vcpu_that_was_just_plugged_is_waited_for_before_it_is_brought_online() -> None:
    async with guest(follows=False) as (agent, vm, _):
        await vm.plug(3)
        asked = asyncio.create_task(vm.guest.set_online(3))
        await asyncio.sleep(0.2)
        assert not asked.done()
        agent.plugged(3)
        assert await asked == {3}


@pytest.mark.parametrize("change", ["online", "offline"])
async def test_a_vcpu_whose_number_the_guests_answer_will_tell_is_waited_for(change: str) -> None:
    async with guest(rule="arrival", onlines=change == "offline") as (agent, vm, micro):
        events = vm.events()
        async with other_client(micro) as other:
            await other.execute("system_reset")
        await until(events, VmReset)
        await micro.wait_ready()
        agent.reboot([0])
        await agent.turn(Mood.FORBIDDING)
        await vm.guest.vcpus()
        await vm.run_control.pause()  # it cannot acknowledge a plug
        await vm.plug(2)
        await vm.plug(5)
        assert numbers(await vm.guest.vcpus()) == {0: 0, 1: None, 2: None}
        agent.received.clear()
        act = vm.guest.set_online if change == "online" else vm.guest.set_offline
        asked = asyncio.create_task(act(5))
        await met(lambda: agent.received.count("guest-get-vcpus") > 1)
        assert not asked.done()
        await vm.run_control.resume()
        assert await asked == {5}
        assert agent.changes == [(2, change == "online")]


# Refusals.


async def test_a_refusal_names_the_vcpu_the_errno_and_what_was_done_before() -> None:
    async with guest() as (agent, vm, _):
        await vm.set_map("0,2,3,5")
        await vm.guest.set_online([2, 3, 5])
        await agent.turn(Mood.REFUSING)
        agent.refuses = frozenset({3})
        with pytest.raises(GuestRefusedError, match=r"offline of vCPU 3 refused by the guest: .*EBUSY") as caught:
            await vm.guest.set_offline([2, 3, 5])
        assert caught.value.ids == {3}
        assert caught.value.done == {2}
        assert (caught.value.errno, caught.value.number) == ("EBUSY", 3)
        assert caught.value.outcome is Outcome.CHANGED
        assert agent.is_online(5)


async def test_a_silence_names_the_vcpus_the_limit_that_was_given_and_the_next_step() -> None:
    async with guest((0, 3)) as (agent, vm, _):
        await vm.plug(3)
        await vm.guest.vcpus()
        await agent.turn(Mood.LATE)
        with pytest.raises(AgentSilentError, match=r"offline of vCPU 3: no answer within 0\.51 s: ") as caught:
            await vm.guest.set_offline(3, timeout=0.51)
        assert caught.value.timeout == 0.51
        assert "start it" in caught.value.hint
        assert "an unplug without offline_first=True does not need the agent" in str(caught.value)
        with pytest.raises(AgentSilentError, match=r"online of vCPU 3: no answer within 0\.51 s: "):
            await vm.guest.set_online(3, timeout=0.51)


async def test_a_silence_before_an_unplug_names_the_vcpu_the_limit_and_the_way_without() -> None:
    async with guest((0, 3)) as (agent, vm, _):
        await vm.plug(3)
        await agent.turn(Mood.SILENT)
        with pytest.raises(AgentSilentError, match=r"offline of vCPU 3: no answer within 0\.51 s: ") as caught:
            await vm.unplug(3, offline_first=True, timeout=0.51)
        assert "an unplug without offline_first=True does not need the agent" in str(caught.value)
        assert vm.layout.enabled == {0, 3}


async def test_a_question_that_waits_for_others_in_vain_names_its_vcpu() -> None:
    async with guest((0, 3)) as (agent, vm, _):
        await agent.turn(Mood.SILENT)
        first = asyncio.ensure_future(vm.guest.vcpus(timeout=2))
        await asyncio.sleep(0.1)
        with pytest.raises(AgentSilentError, match=r"online of vCPU 3: no answer within .*: it is still busy"):
            await vm.guest.set_online(3, timeout=0.2)
        first.cancel()


async def test_cpu_0_stays() -> None:
    async with guest() as (agent, vm, _):
        with pytest.raises(GuestRefusedError, match="offline of vCPU 0 refused") as caught:
            await vm.guest.set_offline(0)
        assert caught.value.outcome is Outcome.UNCHANGED
        assert agent.changes == []


async def test_an_agent_that_only_says_that_it_is_done_is_not_believed() -> None:
    async with guest() as (agent, vm, _):
        await vm.plug(3)
        agent.answers["guest-set-vcpus"] = 1
        with pytest.raises(GuestRefusedError, match="its list does not show it") as caught:
            await vm.guest.set_online(3)
        assert caught.value.ids == {3}
        agent.answers["guest-set-vcpus"] = 0
        with pytest.raises(MalformedAnswerError, match="nothing was done"):
            await vm.guest.set_online(3)


async def test_where_only_the_look_afterwards_fails_the_guest_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with guest() as (agent, vm, _):
        await vm.plug(3)
        await vm.guest.set_online(3)
        obey = agent._guest_set_vcpus

        def obey_and_talk_nonsense(vcpus: list[dict[str, Any]]) -> int:
            agent.answers["guest-get-vcpus"] = 7
            return obey(vcpus)

        monkeypatch.setattr(agent, "_guest_set_vcpus", obey_and_talk_nonsense)
        with pytest.raises(MalformedAnswerError) as caught:
            await vm.guest.set_offline(3)
        assert caught.value.outcome is Outcome.CHANGED
        assert not agent.is_online(3)


async def test_another_client_may_bring_a_cpu_online_meanwhile() -> None:
    async with MicroGuest() as micro:

        def meddle() -> VcpuMap:
            if agent.received[-1:] == ["guest-set-vcpus"] or agent.changes:
                agent.cpus[3].online = True
            return vm.layout.enabled

        async with (
            ScriptedAgent((0,), look=meddle) as agent,
            qmpvcpu.attach(micro.qmp, agent=agent.path) as vm,
        ):
            await vm.plug(3)
            assert await vm.guest.set_online(3) == {3}
            with pytest.raises(GuestRefusedError, match="its list does not show it"):
                await vm.guest.set_offline(3)


async def test_two_cpus_that_claim_to_be_one_vcpu_are_a_lie() -> None:
    async with guest(follows=False) as (agent, vm, _):
        agent.plugged(3)
        agent.cpus[4] = agent.cpus[3]
        await vm.plug(3)
        with pytest.raises(MalformedAnswerError, match="both say that they are vCPU 3"):
            await vm.guest.vcpus()


@pytest.mark.parametrize("nothing", ["", [], VcpuMap()])
async def test_no_vcpus_are_an_invalid_map(nothing: Any) -> None:
    async with guest() as (_, vm, _):
        with pytest.raises(InvalidMapError):
            await vm.guest.set_online(nothing)
        with pytest.raises(TypeError, match="timeout is a number of seconds"):
            await vm.guest.set_online(1, timeout="soon")  # type: ignore[arg-type]


async def test_a_forbidden_change_is_told() -> None:
    async with guest() as (agent, vm, _):
        await vm.plug(3)
        agent.forbidden = frozenset({"guest-set-vcpus"})
        await agent.turn(Mood.FORBIDDING)
        with pytest.raises(AgentForbiddenError, match="guest-set-vcpus is forbidden"):
            await vm.guest.set_online(3)


# QMP goes on.


async def test_qmp_does_not_wait_for_a_silent_agent() -> None:
    async with guest(follows=False) as (agent, vm, _):
        await agent.turn(Mood.SILENT)
        asking = asyncio.create_task(vm.guest.vcpus(timeout=3600))
        await asyncio.sleep(0.05)
        await vm.plug(3)
        await vm.unplug(3)
        assert not asking.done()
        asking.cancel()


async def test_a_vm_is_attached_to_and_closed_without_its_agent(tmp_path: Path) -> None:
    async with MicroGuest() as micro, qmpvcpu.attach(micro.qmp, agent=str(tmp_path / "ga")) as vm:
        await vm.plug(3)
        with pytest.raises(AgentConnectError, match="no such path"):
            await vm.guest.vcpus()


async def test_a_closed_vm_lets_go_of_its_agent() -> None:
    async with guest() as (agent, vm, micro):
        await vm.guest.vcpus()
        await vm.close()
        with pytest.raises(AgentLostError):
            await vm.guest.vcpus()
        async with qmpvcpu.attach(micro.qmp, agent=agent.path) as again:
            assert await again.guest.vcpus(timeout=2)


async def test_what_is_no_address_is_told_before_anybody_is_connected_to() -> None:
    with pytest.raises(AgentConnectError, match="the port is"):
        await qmpvcpu.attach("/nowhere", agent="tcp:host:0")


async def test_a_given_socket_is_closed_with_a_vm_that_cannot_be_attached_to() -> None:
    async with ScriptedAgent() as agent:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(agent.path)
        with pytest.raises(MonitorConnectError, match="no such path"):
            await qmpvcpu.attach("/nowhere", agent=sock)
        assert sock.fileno() == -1


async def test_the_socket_of_the_vm_itself_is_told() -> None:
    async with MicroGuest(qmp_sockets=2) as micro, qmpvcpu.attach(micro.qmp, agent=str(micro.sockets[1])) as vm:
        with pytest.raises(AgentConnectError, match="it is a QMP socket"):
            await vm.guest.vcpus()


@pytest.mark.parametrize("way", ["path", "symlink", "socket"])
async def test_the_qmp_socket_that_is_attached_to_is_refused_before_anything_is_sent(
    tmp_path: Path, way: str
) -> None:
    async with ScriptedPeer() as peer:
        target: Any = peer.path
        agent: Any = f"unix:{peer.path}"
        if way == "symlink":
            (tmp_path / "link").symlink_to(peer.path)
            agent = tmp_path / "link"
        elif way == "socket":
            target = agent = socket.socket(socket.AF_UNIX)
            agent.connect(peer.path)
        with pytest.raises(AgentConnectError, match="it is the VM's QMP socket, not an agent's") as caught:
            await qmpvcpu.attach(target, agent=agent)
        assert "org.qemu.guest_agent.0" in caught.value.hint
        assert peer.received == []
        if way == "socket":
            agent.close()


# QEMU's own port.


def port(path: Path) -> tuple[str, ...]:
    """What gives QEMU a port for an agent."""
    return (
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=ga,path={path},server=on,wait=off"),
        *("-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0"),
    )


async def test_qemu_tells_that_no_agent_has_opened_the_port(tmp_path: Path) -> None:
    path = tmp_path / "ga"
    async with MicroGuest(extra_args=port(path)) as micro, qmpvcpu.attach(micro.qmp, agent=str(path)) as vm:
        with pytest.raises(AgentSilentError, match="no process in the guest has the agent's port open") as caught:
            await vm.guest.vcpus(timeout=1)
        assert caught.value.port_open is False
        with pytest.raises(AgentSilentError):
            await vm.guest.set_online(0, timeout=1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_port_over_tcp_is_found_too(host: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    chardev = f"socket,id=ga,host=127.0.0.1,port={number},server=on,wait=off"
    extra = tuple(chardev if "socket" in each else each for each in port(Path("unused")))
    async with MicroGuest(extra_args=extra) as micro, qmpvcpu.attach(micro.qmp, agent=(host, number)) as vm:
        with pytest.raises(AgentSilentError) as caught:
            await vm.guest.vcpus(timeout=1)
        assert caught.value.port_open is False


async def test_a_port_is_found_by_any_way_to_its_socket(tmp_path: Path) -> None:
    path, link = tmp_path / "ga", tmp_path / "link"
    link.symlink_to(path)
    given = socket.socket(socket.AF_UNIX)
    async with MicroGuest(extra_args=port(path)) as micro:
        for agent in (link, given):
            if agent is given:
                given.connect(str(path))
            async with qmpvcpu.attach(micro.qmp, agent=agent) as vm:
                with pytest.raises(AgentSilentError, match="no process in the guest has") as caught:
                    await vm.guest.vcpus(timeout=1)
            assert caught.value.port_open is False


async def test_a_vm_that_is_paused_is_told_from_an_agent_that_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "ga"
    async with (
        MicroGuest(qmp_sockets=2, extra_args=port(path)) as micro,
        qmpvcpu.attach(micro.qmp, agent=str(path)) as vm,
        other_client(micro) as other,
    ):
        await other.execute("stop")
        with pytest.raises(AgentSilentError, match="the VM is not running: QEMU says paused"):
            await vm.guest.vcpus(timeout=1)


async def test_a_port_of_qemus_that_serves_another_client_is_told(tmp_path: Path) -> None:
    path = tmp_path / "ga"
    async with MicroGuest(extra_args=port(path)) as micro, qmpvcpu.attach(micro.qmp, agent=str(path)) as vm:
        _, writer = await asyncio.open_unix_connection(path)
        await asyncio.sleep(0.1)
        ours = f"pid {os.getpid()}"
        with pytest.raises(AgentConnectError, match=f"another client holds this socket: {ours}") as caught:
            await vm.guest.vcpus(timeout=1)
        assert "qmpvcpu watch --agent" in caught.value.hint
        writer.close()


async def test_a_port_whose_queue_is_full_is_not_advised_to_be_made(tmp_path: Path) -> None:
    path = tmp_path / "ga"
    async with MicroGuest(extra_args=port(path)) as micro, qmpvcpu.attach(micro.qmp, agent=str(path)) as vm:
        others = [socket.socket(socket.AF_UNIX) for _ in range(6)]
        for other in others:
            other.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                other.connect(str(path))
            await asyncio.sleep(0.1)
        with pytest.raises(AgentConnectError, match="its queue of waiting clients is full") as caught:
            await vm.guest.vcpus(timeout=0.5)
        assert "qmpvcpu watch --agent" in caught.value.hint
        assert "-device" not in caught.value.hint
        for other in others:
            other.close()


async def test_every_error_is_one_of_ours() -> None:
    async with guest() as (agent, vm, _):
        for mood in (Mood.SILENT, Mood.LYING, Mood.RESTARTING, Mood.REFUSING):
            await agent.turn(mood)
            with contextlib.suppress(QmpVcpuError):
                await vm.guest.set_online([0, 3], timeout=0.3)
