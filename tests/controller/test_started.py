"""A plug that waits until the vCPU has executed guest code, in VMs whose guest starts it, or not, or that lie."""

import asyncio
import itertools
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import Proof
from qmpvcpu.errors import DenialReason, StepDeniedError, UnprovenError
from qmpvcpu.testing import Behaviour, MicroGuest, ScriptedAgent
from qmpvcpu.testing.peer import HANG, Command, Failure
from tests.controller.vms import running
from tests.hostile import HOSTILE, slots, small_vm
from tests.substrates import Substrate, substrates

_PLUGGED = "/machine/peripheral/vcpu2"
_STARTING = Behaviour.complying().starting()


@pytest.mark.qemu
@pytest.mark.parametrize("on", substrates(["q35"]))
async def test_a_plug_is_proven_by_the_start_and_told_without(on: Substrate) -> None:
    async with running(on, behaviour=[Behaviour.complying().for_slot(2), _STARTING]) as (_, vm):
        assert await vm.plug(5, proof=Proof.STARTED) == {5}
        assert vm.layout[5].proof is Proof.STARTED
        with pytest.raises(UnprovenError, match="never started") as caught:
            await vm.plug(2, proof=Proof.STARTED, timeout=0.3)
        assert caught.value.ids == {2}
        assert caught.value.reached is Proof.ACKNOWLEDGED
        assert vm.layout[2].proof is Proof.ACKNOWLEDGED
        assert await vm.plug(6, proof=Proof.STARTED) == {6}
        assert vm.layout.enabled == {0, 2, 5, 6}


@pytest.mark.qemu
@pytest.mark.parametrize("on", substrates(["q35"], that_survive=True))
async def test_a_vcpu_plugged_again_has_not_started_by_what_its_predecessor_was(on: Substrate) -> None:
    # Under KVM of one that did not run: see tests/qemu/test_started.py.
    async with running(on, behaviour=_STARTING if on.accel == "tcg" else ()) as (guest, vm):
        proof = Proof.STARTED if on.accel == "tcg" else Proof.ACKNOWLEDGED
        await vm.plug(5, proof=proof)
        await guest.set_behaviour()
        await vm.unplug(5)
        assert vm.layout[5].proof is None
        with pytest.raises(UnprovenError):
            await vm.plug(5, proof=Proof.STARTED, timeout=0.3)
        assert vm.layout[5].proof is Proof.ACKNOWLEDGED


@pytest.mark.qemu
async def test_single_threaded_tcg_denies_it_also_where_the_second_vcpu_showed_it() -> None:
    guest = MicroGuest(accel="tcg,thread=single", behaviour=_STARTING)  # type: ignore[arg-type]  # an option rides along
    async with guest, qmpvcpu.attach(guest.qmp) as vm:
        assert vm.layout.vm.start_unknowable == ""
        await vm.plug(1)
        await vm.refresh()
        with pytest.raises(StepDeniedError, match="one host thread runs all vCPUs") as caught:
            await vm.plug(2, proof=Proof.STARTED)
        assert caught.value.reason is DenialReason.CANNOT_TELL_STARTED
        assert await vm.plug(2) == {2}


def exits(path: str, value: object) -> list[dict[str, Any]]:
    return [{"provider": "kvm", "qom-path": path, "stats": [{"name": "exits", "value": value}]}]


_COUNT = itertools.count(1)


@pytest.mark.parametrize(
    "answer",
    [
        {"exits": 9},
        exits(_PLUGGED, [1, 2]),
        exits(_PLUGGED, -1),
        exits(_PLUGGED, 7),  # no more from one look to the next
        lambda _: exits("/machine/peripheral/vcpu3", next(_COUNT)),
        lambda _: exits(f"{_PLUGGED}/thread[0]", next(_COUNT)),
        Failure(HOSTILE, HOSTILE),
        HANG,
    ],
    ids=["no list", "histogram", "negative", "unchanged", "another's", "a child's", "error", "silence"],
)
async def test_what_a_hostile_qemu_answers_proves_nothing_and_holds_nothing_up(answer: object) -> None:
    vm = small_vm(query_kvm={"enabled": True}, query_stats=exits("/machine/unattached/device[0]", 3))

    def plug(_: Command) -> dict[str, Any]:
        filled = slots({})
        filled[2]["qom-path"] = _PLUGGED
        cpus = vm.answers["query-cpus-fast"]
        new = {**cpus[0], "qom-path": _PLUGGED, "thread-id": 77, "cpu-index": 2}
        vm.answers |= {
            "query-hotpluggable-cpus": filled,
            "query-cpus-fast": [*cpus, new],
            "query-stats": answer,
        }
        return {}

    vm.answers["device_add"] = plug
    async with vm as peer, qmpvcpu.attach(peer.address, reply_timeout=1.0) as attached, asyncio.timeout(30):
        with pytest.raises(UnprovenError) as caught:
            await attached.plug(2, proof=Proof.STARTED, timeout=0.5)
        assert caught.value.reached is Proof.PRESENT
        assert attached.layout.enabled == {0, 1, 2}


@pytest.mark.qemu
async def test_what_the_guest_has_acknowledged_before_is_known_to_the_next() -> None:
    async with MicroGuest() as guest:
        async with qmpvcpu.attach(guest.qmp) as vm:
            await vm.plug(3, proof=Proof.ACKNOWLEDGED, require_proof=True)
        async with qmpvcpu.attach(guest.qmp) as vm:
            assert vm.layout[3].acknowledged is True
            assert vm.layout[3].proof is Proof.ACKNOWLEDGED
            assert vm.layout[3].proven_at is None, "nobody knows when"
            assert vm.layout[2].acknowledged is None
            await vm.unplug(3)
        async with qmpvcpu.attach(guest.qmp) as vm:
            assert vm.layout[3].proof is None


@pytest.mark.qemu
async def test_a_map_brings_online_what_is_plugged_and_offline() -> None:
    async with MicroGuest(boot=3) as guest, ScriptedAgent((0, 1, 2)) as agent:
        agent.cpus[agent.number_of(2)].online = False
        async with qmpvcpu.attach(guest.qmp, agent=agent.path) as vm:
            report = await vm.set_map("0-2", proof=Proof.ONLINE, timeout=5)
            (step,) = report.steps
            assert step.ok
            assert str(step).startswith("online 2")
            assert agent.is_online(2)
            assert not (await vm.set_map("0-2", proof=Proof.ONLINE)).steps
            agent.cpus[agent.number_of(1)].online = False
            await vm.set_state(1, enabled=True, proof=Proof.ONLINE)
            assert agent.is_online(1)
